"""Stage 4: a jump is trained on pairs, in one loop that can be stopped anywhere and goes on as if it had not been."""

from __future__ import annotations

import csv
import json
import math
import platform
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import click
import numpy as np
import torch
from torch import Tensor, nn

import mlff_engines
from mlff_engines.checkpoint import Domain, load_jump_checkpoint, save_checkpoint
from mlff_engines.errors import ConfigError, DataError, TrainingError
from mlff_engines.files import replacing
from mlff_engines.graph import Graph
from mlff_engines.kstep.learned import LearnedJump
from mlff_engines.models.jump import JumpConfig, JumpModel
from mlff_training.kstep.batches import NM, Batch, PairBatches
from mlff_training.kstep.config import JumpModelConfig, JumpTrainConfig
from mlff_training.kstep.evaluation import displacements, rollout, validate
from mlff_training.kstep.pairs import Pairs, load_pairs, split_pairs
from mlff_training.loop import Interrupted
from mlff_training.state import differences, has_state, load_state, save_state


def losses(out: Graph, batch: Batch, model: JumpModel, config: JumpTrainConfig) -> dict[str, Tensor]:
    """Terms of the loss, weighted: mean squares, each in units of the spread of its element."""
    numbers = batch.graph["numbers"]
    of_x = model.reference.dx[numbers].unsqueeze(-1)
    of_v = model.reference.dv[numbers].unsqueeze(-1)
    found = {
        "x": ((out["dx"] - batch.dx) / of_x).square().mean(),
        "v": config.lambda_vel * ((out["dv"] - batch.dv) / of_v).square().mean(),
        # the projection makes the jump right whatever the drift; without it the network should be right alone
        "com": config.lambda_com
        * ((out["drift_x"] / of_x.mean()).square().mean() + (out["drift_v"] / of_v.mean()).square().mean()),
    }
    if "forces" in out and batch.forces is not None:
        known = batch.forces.isfinite()
        error = (out["forces"][known] - batch.forces[known]) / model.reference.force
        found["force"] = config.lambda_force * error.square().sum() / max(int(known.sum()), 1)
    return found


def train_jumps(
    data: Path,
    model: JumpModelConfig,
    train: JumpTrainConfig,
    folder: Path,
    *,
    by: Literal["molecule", "segment"] = "molecule",
    valid: float = 0.2,
) -> list[Path]:
    """Train the jumps of `train.k_steps`, each from the weights of the one before; their checkpoints.

    Args:
        data: folder of ``dataset_kK.npz``; the split is kept there as ``splits.json``.
        by, valid: see `split_pairs`.
        folder: of the runs; that of k is ``k08/`` for 8, with ``best/`` in it.

    Raises:
        ConfigError: a bound on displacements that the data exceed, or no forces for the force head.
        DataError: see `load_pairs` and `split_pairs`.
        TrainingError: the loss is not finite, or the folder holds another run.
    """
    made: list[Path] = []
    sets = {k: load_pairs(data / f"dataset_k{k}.npz") for k in train.k_steps}
    for k, pairs in sets.items():
        parts = split_pairs(pairs, data / "splits.json", valid=valid, seed=train.seed, by=by)
        run = JumpTrainer(pairs, parts["train"], parts["valid"], model, train, folder / f"k{k:02d}", made[-1:])
        run.run()
        made.append(folder / f"k{k:02d}" / "best")
    return made


class JumpTrainer:
    """Trains the jump of one k in `folder`.

    | file                 | content                                                              |
    |----------------------|----------------------------------------------------------------------|
    | `best/`              | checkpoint with the smallest validation error                        |
    | `state.safetensors`  | all that is needed to go on; `.previous` is the one before           |
    | `log.csv`            | one row per validation                                               |
    | `rollout.json`       | errors after chained jumps, of the best checkpoint                   |
    | `displacements.json` | histograms of |dx|, of the best checkpoint                           |
    """

    def __init__(
        self,
        pairs: Pairs,
        train: np.ndarray,
        valid: np.ndarray,
        model: JumpModelConfig,
        config: JumpTrainConfig,
        folder: Path,
        before: Sequence[Path] = (),
    ) -> None:
        self.pairs, self.config, self.folder = pairs, config, folder
        self.network: JumpConfig = model.network()
        self.terms = pairs.record.terms
        self.train_set = PairBatches(pairs, train, self.network.cutoff, reverse=config.reverse)
        self.valid_set = PairBatches(pairs, valid, self.network.cutoff)
        self._check(model)
        torch.manual_seed(config.seed)
        self.scales = self._scales()
        self.model = JumpModel(self.network, self.terms, self.scales, self.train_set.force_scale())
        for checkpoint in before:  # the curriculum: weights of the shorter jump, scales of this one
            self.model.network.load_state_dict(load_jump_checkpoint(checkpoint)[0].network.state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.epoch, self.batch, self.step = 0, 0, 0
        self.best: dict[str, float] = {"score": math.inf}
        self._stop: str | None = None
        self._identity = {
            "model": self.network.model_dump(),
            "train": config.model_dump(),
            "terms": self.terms.model_dump(),
            "data": {"sha256": pairs.record.sha256, "train": len(train), "valid": len(valid)},
        }
        if has_state(self._state_path):
            self._resume()

    def run(self) -> dict[str, float]:
        """Train to the end; the best validation errors.

        Raises:
            TrainingError: the loss is not finite.
            Interrupted: SIGTERM or Ctrl-C came; the state is saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._signals():
            while self.epoch < self.config.epochs:
                self._train_epoch()
            self._validate()
            self._save()
        self._report()
        return self.best

    def _train_epoch(self) -> None:
        config = self.config
        rng = np.random.default_rng([config.seed, self.epoch])  # so that a resumed run sees the same
        order = rng.permutation(len(self.train_set)).tolist()
        batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        while self.batch < len(batches):
            group = batches[self.batch : self.batch + config.grad_accum]
            total = sum(map(len, group))
            self.model.train()
            for number, indices in enumerate(group):
                noise = np.random.default_rng([config.seed, self.epoch, self.batch + number])
                batch = self.train_set.batch(indices, NM * config.noise_nm, noise)
                with torch.autocast("cpu", torch.bfloat16, enabled=config.amp):
                    out = self.model(batch.graph)
                loss = torch.stack(list(losses(out, batch, self.model, config).values())).sum()
                self._require_finite(loss, indices)
                (loss * (len(indices) / total)).backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
            self._require_finite(norm, group[0])
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = self._rate(math.ceil(len(batches) / config.grad_accum))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.batch, self.step = self.batch + len(group), self.step + 1
            if self.batch >= len(batches):
                self.epoch, self.batch = self.epoch + 1, 0
            if self.step % config.val_every_steps == 0:
                self._validate()
            if self.step % config.checkpoint_every_steps == 0 or self._stop is not None:
                self._save()
            if self._stop is not None:
                raise Interrupted(f"stopped by {self._stop}; the state is saved in {self.folder}: run the same again")
            if self.batch == 0:
                return

    def _rate(self, steps_per_epoch: int) -> float:
        config = self.config
        if self.step < config.warmup_steps:
            return config.lr * (self.step + 1) / config.warmup_steps
        done = min(self.step / (config.epochs * steps_per_epoch), 1.0)
        return config.lr_min + (config.lr - config.lr_min) * 0.5 * (1 + math.cos(math.pi * done))

    def _validate(self) -> None:
        found = validate(self.model, self.valid_set, self.config.batch_size)
        # in units of a jump's own size, positions and velocities alike
        of_x, of_v = np.mean(list(self.scales.values()), axis=0).tolist()
        found["score"] = found["x_rmse"] / of_x + self.config.lambda_vel * found["v_rmse"] / of_v
        if not math.isfinite(found["score"]):
            raise TrainingError(f"validation errors are not finite after step {self.step}: lower lr")
        self._log({"epoch": self.epoch, "step": self.step, **found})
        if found["score"] < self.best["score"]:
            self.best = found
            domain = Domain(elements=list(self.terms.masses))
            structures = [self.valid_set.structure(i) for i in range(min(2, len(self.valid_set)))]
            save_checkpoint(
                self.folder / "best", self.model, self.network, domain, self._provenance(), structures, self.terms
            )

    def _report(self) -> None:
        """Chained jumps and histograms of the best checkpoint."""
        best, _ = load_jump_checkpoint(self.folder / "best")
        jump = LearnedJump(
            best,
            self.terms,
            self.network.cutoff,
            takes_temperature=self.network.temperature,
            dtype=torch.float32,
            skin=0.0,
        )
        table = rollout(best, jump, self.pairs, self.valid_set, self.config.rollout_jumps)
        shown = displacements(best, self.valid_set, self.config.batch_size)
        for name, content in (("rollout", table), ("displacements", shown)):
            with replacing(self.folder / f"{name}.json") as temporary:
                temporary.write_text(json.dumps(content, indent=1))

    def _check(self, model: JumpModelConfig) -> None:
        largest = max(self.train_set.largest_displacement(), self.valid_set.largest_displacement())
        if model.tanh_head and model.predict_delta and largest >= self.network.max_displacement:
            raise ConfigError(
                f"max_disp_nm {model.max_disp_nm:g}: atoms of the data move {largest / NM:.4f} nm in a jump of "
                f"{self.terms.interval:g} fs; allowed: more than that, sensible: twice"
            )
        if model.use_force_head and self.train_set.forces is None:
            raise ConfigError("use_force_head: the trajectories have no forces; simulate with save_forces: true")

    def _scales(self) -> dict[str, tuple[float, float]]:
        found = self.train_set.scales()
        missing = sorted(set(self.terms.masses) - set(found))
        if missing:
            raise DataError(f"no training pair has {', '.join(missing)}: split otherwise, or add molecules")
        return found

    def _require_finite(self, value: Tensor, indices: list[int]) -> None:
        if not bool(value.isfinite()):
            raise TrainingError(
                f"the loss or its gradient is not finite in epoch {self.epoch + 1}, step {self.step}, among the pairs "
                f"{indices[:10]}. The best checkpoint and the last saved state are kept; look at these, or lower lr"
            )

    def _provenance(self) -> dict[str, Any]:
        return {
            "teacher": "trajectories of constant energy",
            "frames": {"train": len(self.train_set.part), "valid": len(self.valid_set.part)},
            "data_sha256": self.pairs.record.sha256,
            "molecules": self.pairs.record.molecules,
            "train": self.config.model_dump(mode="json"),
            "valid": self.best,
            "step": self.step,
            "versions": {
                "mlff-engines": mlff_engines.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }

    def _log(self, row: dict[str, float]) -> None:
        path = self.folder / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow({name: f"{value:.8g}" for name, value in row.items()})
        click.echo(
            f"k {self.terms.steps}, epoch {self.epoch}, step {self.step}: positions {row['x_rmse']:.5f} Å "
            f"(free flight {row['x_flight']:.5f}), kinetic energy x {row['heat']:.4f}",
            err=True,
        )

    def _forget_after(self, step: int) -> None:
        """Drop rows of the log that a resumed run writes again."""
        path = self.folder / "log.csv"
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            with replacing(path) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]) if rows else ["epoch", "step"])
                writer.writeheader()
                writer.writerows(row for row in rows if int(row["step"]) <= step)

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.safetensors"

    def _save(self) -> None:
        save_state(
            self._state_path,
            {
                "identity": self._identity,
                "counters": {"epoch": self.epoch, "batch": self.batch, "step": self.step, "best": self.best},
                "parts": {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()},
            },
        )

    def _resume(self) -> None:
        state, warning = load_state(self._state_path)
        if warning:
            click.echo(f"warning: {warning}", err=True)
        changes = differences(state["identity"], self._identity)
        if changes:
            raise TrainingError(
                f"{self.folder} holds a run with another configuration: "
                f"{'; '.join(f'{name}: {change}' for name, change in changes.items())}. Restore it or choose another "
                "folder"
            )
        self.model.load_state_dict(state["parts"]["model"])
        self.optimizer.load_state_dict(state["parts"]["optimizer"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self._forget_after(self.step)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask the loop to stop after the running step."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = signal.Signals(number).name

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
