"""The training loop: one visible loop that can be stopped anywhere and goes on as if it had not been."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.config import Config
from mlff_engines.errors import ConfigError, TrainingError
from mlff_engines.files import replacing
from mlff_engines.models.base import AtomicModel
from mlff_engines.models.registry import ModelConfig
from mlff_engines.potential import Potential
from mlff_engines.structure import Structure
from mlff_training.data.dataset import GraphDataset, labels_of, to_graph
from mlff_training.distributed import World
from mlff_training.logs import TrainingLog
from mlff_training.losses import LossConfig, errors, require_labels, total_loss, validate
from mlff_training.state import differences, has_state, load_state, save_state


class TrainConfig(Config):
    """How a student is trained."""

    seed: int = Field(0, ge=0, description="of the weights and the order of the batches")
    dtype: Literal["float32", "float64"] = Field("float32", description="of the network")
    epochs: int = Field(500, ge=1, description="passes over the training set; the cosine schedule ends there")
    threads: int = Field(1, ge=1, description="of each process; more pay off above some hundred atoms per batch")
    batch_size: int = Field(10, ge=1, description="structures per forward pass, over all processes")
    accumulate: int = Field(1, ge=1, description="forward passes per step of the optimiser")
    optimizer: Literal["adamw", "amsgrad"] = Field("adamw", description="'amsgrad' is AdamW with its AMSGrad variant")
    learning_rate: float = Field(1e-3, gt=0, description="after the warm-up")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW, times the learning rate per step")
    schedule: Literal["cosine", "plateau", "constant"] = Field("cosine", description="of the learning rate")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    final_learning_rate: float = Field(1e-6, ge=0, description="end of the cosine, or floor of the plateau schedule")
    plateau_factor: float = Field(0.8, gt=0, lt=1, description="by which the plateau schedule lowers the rate")
    plateau_patience: int = Field(25, ge=0, description="validations without progress before the rate falls")
    clip_norm: float = Field(10.0, gt=0, description="largest norm of the gradient")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the averaged weights that are kept; 0 switches it off")
    amp: bool = Field(False, description="bfloat16 autocast in the network")
    validate_every: int = Field(1, ge=1, description="epochs")
    save_every_minutes: float = Field(5.0, ge=0, description="between saves of the resumable state")
    patience: int | None = Field(None, ge=1, description="stop after so many validations without progress")
    loss: LossConfig = Field(LossConfig(), description="targets and their weights")
    tensorboard: bool = Field(True, description="write TensorBoard events beside log.csv")
    wandb_project: str | None = Field(None, description="log to Weights & Biases, when it is installed")


Tensors = list[Tensor] | tuple[Tensor, ...]


class Interrupted(TrainingError):
    """Training was asked to stop; its state is saved."""

    exit_code = 130


class Trainer:
    """Trains one student in `folder`.

    | file                | content                                                         |
    |---------------------|-----------------------------------------------------------------|
    | `best/`             | checkpoint with the smallest validation loss (averaged weights) |
    | `state.safetensors` | all that is needed to go on; `.previous` is the one before      |
    | `log.csv`           | one row per validation; `tensorboard/` likewise                 |
    | `bad_batch.json`    | the frames on which the loss was not finite                     |

    Args:
        model: untrained, or pre-trained weights to start from.
        provenance: written into the checkpoint beside the errors reached.
        structures: some training structures, kept in the checkpoint to try the exported model on.
        allow_config_change: resume although the configuration differs from the one that was saved.

    Raises:
        DataError: a target of `config.loss` has no labels.
        TrainingError: there is a state to resume from but it cannot be read, or belongs to another configuration.
    """

    def __init__(
        self,
        model: AtomicModel,
        model_config: ModelConfig,
        domain: Domain,
        train: GraphDataset,
        valid: GraphDataset,
        config: TrainConfig,
        folder: Path,
        *,
        world: World | None = None,
        provenance: Mapping[str, Any] | None = None,
        structures: Sequence[Structure] = (),
        device: str = "cpu",
        allow_config_change: bool = False,
    ) -> None:
        self.world = world or World()
        if config.batch_size < self.world.size:
            raise ConfigError(f"train.batch_size {config.batch_size} is smaller than the {self.world.size} processes")
        if len(train) < self.world.size:
            raise ConfigError(f"{len(train)} training frames are fewer than the {self.world.size} processes")
        for part, data in (("training", train), ("validation", valid)):
            require_labels(labels_of(data[0]), config.loss, part)
        self.config, self.model_config, self.domain = config, model_config, domain
        self.train_set, self.valid_set, self.folder = train, valid, folder
        self.provenance, self.structures = dict(provenance or {}), structures
        self.device = torch.device(device)

        self.potential = Potential(model).to(self.device)
        self.forward: nn.Module = self.potential
        if self.world.size > 1:
            self.forward = DistributedDataParallel(self.potential, broadcast_buffers=False)
        self.averaged = AveragedModel(self.potential, multi_avg_fn=self._average)
        self.optimizer = torch.optim.AdamW(
            self.potential.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            amsgrad=config.optimizer == "amsgrad",
            fused=True,
        )
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer,
            factor=config.plateau_factor,
            patience=config.plateau_patience,
            min_lr=config.final_learning_rate,
        )

        self.epoch = 0  # finished
        self.batch = 0  # finished in this epoch
        self.step = 0  # of the optimiser
        self.sums: dict[str, float] = {}  # of this epoch's absolute errors, and their numbers
        self.best: dict[str, float] = {"loss": math.inf}
        self.since_best = 0
        self.seconds = 0.0
        self._stop: str | None = None
        self._asked = math.inf  # when
        reference = model.reference
        self._identity = {
            "model": {**model_config.model_dump(), "elements": domain.elements},
            "reference": {"scale": float(reference.scale), "e0": reference.e0[reference.elements].tolist()},
            "train": config.model_dump(),
            "data": {"train": train.digest, "valid": valid.digest},
        }
        self.log = TrainingLog(
            folder, active=self.world.rank == 0, tensorboard=config.tensorboard, wandb_project=config.wandb_project
        )
        if has_state(self._state_path):
            self._resume(allow_config_change)

    def run(self) -> dict[str, float]:
        """Train to the end and return the best validation errors.

        Raises:
            TrainingError: the loss is not finite (the batch is named, the last good state kept), or saving failed.
            Interrupted: SIGTERM or Ctrl-C came; the state is saved.
        """
        config, total = self.config, self._batches_per_epoch
        self._clock = self._saved = time.monotonic()
        try:
            with self._signals(), self.log.progress(config.epochs * total, self.epoch * total + self.batch):
                self.world.any(False)  # every process has looked for a state: now one may write it
                if self.step == 0:
                    self._save()  # shows that it can be done, and there is always a good state
                while self.epoch < config.epochs:
                    if config.patience is not None and self.since_best >= config.patience:
                        self.log.say(f"no progress in {config.patience} validations: stopped after {self.epoch} epochs")
                        break
                    self._train_epoch()
                    self._finish_epoch()
                self._save()
        except OSError as error:
            raise TrainingError(
                f"cannot write to {self.folder}: {error}. The last saved state is intact; free space, then run the "
                "same command to go on"
            ) from None
        return self.best

    def _train_epoch(self) -> None:
        batches = self._batches()
        mine = [batch[self.world.rank :: self.world.size] for batch in batches[self.batch :]]
        self.forward.train()
        for data in DataLoader(self.train_set, batch_sampler=mine):
            batch = batches[self.batch]
            self.batch += 1
            first = (self.batch - 1) // self.config.accumulate * self.config.accumulate
            group = batches[first : first + self.config.accumulate]  # one step of the optimiser
            structures = [i for member in group for i in member]
            steps_now = self.batch == first + len(group)
            parallel = self.forward if isinstance(self.forward, DistributedDataParallel) else None
            with nullcontext() if steps_now or parallel is None else parallel.no_sync():
                # by its share of the structures, a last small batch and a process with one structure less count less;
                # several processes average their gradients, hence their number
                self._backward(data.to(self.device), batch, data.num_graphs / len(structures) * self.world.size)
            self.log.advance()
            if steps_now:
                self._step(structures)
                if self.world.any(self._stop is not None):
                    self._save()
                    self.world.any(False)  # leave together: a launcher ends the others when one has left
                    raise Interrupted(
                        f"stopped by {self._stop or 'a signal to another process'} in epoch {self.epoch + 1}; "
                        f"the state is saved in {self.folder}: run the same command to go on"
                    )

    def _batches(self) -> list[list[int]]:
        """This epoch's batches: a function of seed and epoch only, so that a resumed run sees the same."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.train_set), generator=generator)
        batches = [batch.tolist() for batch in order.split(self.config.batch_size)]
        # a last batch too small to give every process its share waits for another epoch
        return batches if len(batches[-1]) >= self.world.size else batches[:-1]

    @property
    def _batches_per_epoch(self) -> int:
        whole, rest = divmod(len(self.train_set), self.config.batch_size)
        return whole + (rest >= self.world.size)

    def _backward(self, data: Batch, batch: list[int], share: float) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            found = errors(self.forward, to_graph(data), labels_of(data), self.config.loss)
        loss = total_loss(found, self.config.loss)
        self._require_finite(loss, "loss", batch)
        (loss * share).backward()
        added = {"loss": float(loss.detach()) * data.num_graphs, "loss_count": data.num_graphs}
        for name, error in found.items():
            added |= {name: float(error.detach().abs().sum()), f"{name}_count": error.numel()}
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in added.items()}

    def _step(self, structures: list[int]) -> None:
        norm = nn.utils.clip_grad_norm_(self.potential.parameters(), self.config.clip_norm)
        self._require_finite(norm, "norm of the gradient", structures)
        self._set_learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.averaged.update_parameters(self.potential)
        self.step += 1

    @torch.no_grad()
    def _average(self, averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        """Exponential moving average whose memory grows with the steps made, up to the configured decay."""
        decay = min(self.config.ema_decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def _require_finite(self, value: Tensor, what: str, batch: list[int]) -> None:
        if not self.world.any(not bool(value.isfinite())):
            return
        names = [f"{i} ({self.train_set.frames[i].info.get('group', 'no group')})" for i in batch]
        if self.world.rank == 0:
            with replacing(self.folder / "bad_batch.json") as temporary:
                temporary.write_text(
                    json.dumps({"epoch": self.epoch + 1, "step": self.step, "frames": names}, indent=1)
                )
        raise TrainingError(
            f"the {what} is not finite in epoch {self.epoch + 1}, step {self.step}, on the training frames "
            f"{', '.join(names)} (listed in {self.folder / 'bad_batch.json'}). The best checkpoint and the last saved "
            "state are kept; look at these labels, or lower train.learning_rate"
        )

    def _set_learning_rate(self) -> None:
        config = self.config
        if self.step < config.warmup_steps:
            rate = config.learning_rate * (self.step + 1) / config.warmup_steps
        elif config.schedule == "cosine":
            steps = config.epochs * math.ceil(self._batches_per_epoch / config.accumulate)
            fall = 0.5 * (1 + math.cos(math.pi * self.step / steps))
            rate = config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * fall
        elif config.schedule == "constant":
            rate = config.learning_rate
        else:
            return  # in the hands of the plateau schedule
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate

    def _finish_epoch(self) -> None:
        """Validate, log, keep the best, save when it is time."""
        config = self.config
        sums = self.world.sum(self.sums)
        counts = {name: sums[f"{name}_count"] for name in sums if f"{name}_count" in sums}
        train = {f"train_{name}": sums[name] / count if count else math.nan for name, count in counts.items()}
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, {}
        if self.epoch % config.validate_every == 0 or self.epoch == config.epochs:
            kept = cast(Potential, self.averaged.module) if config.ema_decay else self.potential
            valid = validate(kept, self.valid_set, config.loss, config.batch_size, self.device)
            self._keep_if_best(kept, valid)
            if config.schedule == "plateau":
                self.plateau.step(valid["loss"])
            self._tick()
            rate = self.optimizer.param_groups[0]["lr"]
            progress = {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "learning_rate": rate}
            self.log.row({**progress, **train, **{f"valid_{name}": value for name, value in valid.items()}})
        if time.monotonic() - self._saved >= 60 * config.save_every_minutes:
            self._save()

    def _keep_if_best(self, kept: Potential, valid: dict[str, float]) -> None:
        if valid["loss"] >= self.best["loss"]:
            self.since_best += 1
            return
        self.best, self.since_best = valid, 0
        if self.world.rank == 0:
            provenance = {**self.provenance, "epoch": self.epoch, "valid": valid}
            save_checkpoint(
                self.folder / "best",
                cast(AtomicModel, kept.model),
                self.model_config,
                self.domain,
                provenance,
                self.structures,
            )

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.safetensors"

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now

    def _save(self) -> None:
        self._tick()
        self._saved = self._clock
        if self.world.rank == 0:
            counters = {name: getattr(self, name) for name in _COUNTERS}
            parts = {name: getattr(self, name).state_dict() for name in _PARTS}
            save_state(self._state_path, {"identity": self._identity, "counters": counters, "parts": parts})

    def _resume(self, allow_config_change: bool) -> None:
        state, warning = load_state(self._state_path)
        if warning:
            self.log.say(f"warning: {warning}")
        changes = differences(state["identity"], self._identity)
        changed = set(changes)
        other_model = any(name.startswith("model.") for name in changed)
        if other_model or (changes and not allow_config_change):
            raise TrainingError(
                f"{self.folder} holds a run with another configuration: "
                f"{'; '.join(f'{name}: {change}' for name, change in changes.items())}. Restore it"
                + (" or choose" if other_model else ", allow the change with --allow-config-change, or choose")
                + " another folder"
            )
        # what a changed configuration makes meaningless starts anew; E0 and scale belong to the weights and stay
        skipped = {"optimizer"} if "train.optimizer" in changed else set()
        skipped |= {"plateau"} if changed & _RATE else set()
        for name, part in state["parts"].items():
            if name not in skipped:
                getattr(self, name).load_state_dict(part)
        for name, value in state["counters"].items():
            setattr(self, name, value)
        for parameters in self.optimizer.param_groups:
            parameters["weight_decay"] = self.config.weight_decay
            if "plateau" in skipped:
                parameters["lr"] = self.config.learning_rate
        if any(name.startswith(("train.loss.", "data.valid")) for name in changed):
            self.best, self.since_best = {"loss": math.inf}, 0  # not comparable any more
        self.log.forget_after(self.epoch)
        self.log.say(f"resuming in {self.folder} after {self.epoch} epochs and {self.batch} batches")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask the loop to stop after the running step; another one, later, stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if now - self._asked > 1.0:  # a launcher may pass on a Ctrl-C that the terminal sent to all
                raise KeyboardInterrupt
            self._stop, self._asked = signal.Signals(number).name, min(now, self._asked)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_PARTS = ("potential", "averaged", "optimizer", "plateau")
_COUNTERS = ("epoch", "batch", "step", "sums", "best", "since_best", "seconds")
_RATE = {
    f"train.{name}"
    for name in ("learning_rate", "schedule", "final_learning_rate", "plateau_factor", "plateau_patience")
}
