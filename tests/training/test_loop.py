"""The parts of training, each against what it is defined to do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

import tiny
from mlff_engines.checkpoint import load_checkpoint
from mlff_engines.config import parse
from mlff_engines.errors import ConfigError, TrainingError
from mlff_training.data.dataset import GraphDataset
from mlff_training.loop import TrainConfig, Trainer
from mlff_training.losses import LossConfig, validate
from mlff_training.state import load_state


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return tiny.clusters(16)


@pytest.fixture(scope="module")
def valid() -> list[Atoms]:
    return tiny.clusters(4, seed=9)


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.potential.parameters()])


def each_step(trainer: Trainer, look: Callable[[], Any]) -> list[Any]:
    """Train to the end; what `look` sees after every step of the optimiser."""
    seen, step = [], trainer._step

    def watched(structures: list[int]) -> None:
        step(structures)
        seen.append(look())

    trainer._step = watched  # type: ignore[method-assign]
    trainer.run()
    return seen


def test_learns_and_keeps_the_best(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, frames, valid, {"epochs": 30, "ema_decay": 0.9}, provenance={"teacher": "emt"})
    best = trainer.run()
    rows = tiny.rows(tmp_path)
    assert [row["epoch"] for row in rows] == list(range(1, 31))
    assert rows[-1]["valid_forces_mae"] < 0.5 * rows[0]["valid_forces_mae"]
    assert rows[-1]["train_forces"] < 0.5 * rows[0]["train_forces"]
    assert best["loss"] == pytest.approx(min(row["valid_loss"] for row in rows), rel=1e-6)
    # what is kept is the model that had these errors
    potential, config = load_checkpoint(tmp_path / "best")
    dataset = GraphDataset(valid, 4.0)
    assert validate(potential, dataset, trainer.config.loss, 4, torch.device("cpu")) == pytest.approx(best, rel=1e-4)
    assert config.training["teacher"] == "emt"
    assert config.training["valid"] == best
    assert config.domain.elements == ["Cu", "Au"]


def test_validates_every_so_many_epochs_and_at_the_end(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    tiny.trainer(tmp_path, frames, valid, {"epochs": 5, "validate_every": 2}).run()
    assert [row["epoch"] for row in tiny.rows(tmp_path)] == [2, 4, 5]


def test_moving_average(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    """Its memory grows as (1 + n)/(10 + n), up to the configured decay."""
    trainer = tiny.trainer(tmp_path, frames, valid, {"epochs": 5, "ema_decay": 0.5, "dtype": "float64"})
    seen = each_step(trainer, lambda: weights(trainer))
    assert len(seen) == 20
    average = seen[0]
    for n, current in enumerate(seen[1:], 1):
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * current
    kept = torch.cat([p.detach().reshape(-1) for p in trainer.averaged.module.parameters()])
    torch.testing.assert_close(kept, average, rtol=0, atol=1e-13)
    assert (kept - seen[-1]).abs().max() > 1e-5


def test_no_average_keeps_the_weights_themselves(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, frames, valid, {"epochs": 1, "ema_decay": 0})
    trainer.run()
    kept, _ = load_checkpoint(tmp_path / "best")
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in kept.parameters()]), weights(trainer))


def rates(folder: Path, frames: list[Atoms], valid: list[Atoms], config: dict[str, Any]) -> list[float]:
    trainer = tiny.trainer(folder, frames, valid, {"learning_rate": 1e-2, "final_learning_rate": 1e-4, **config})
    return each_step(trainer, lambda: trainer.optimizer.param_groups[0]["lr"])


def test_warm_up_and_cosine(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    seen = rates(tmp_path, frames, valid, {"epochs": 5, "warmup_steps": 4, "accumulate": 2})
    assert len(seen) == 10
    cosine = [1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(4, 10)]
    assert seen == pytest.approx([0.25e-2, 0.5e-2, 0.75e-2, 1e-2, *cosine])


def test_constant_rate(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    seen = rates(tmp_path, frames, valid, {"epochs": 2, "schedule": "constant", "warmup_steps": 2})
    assert seen == pytest.approx([0.5e-2, *[1e-2] * 7])


def test_plateau(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    """The rate falls when the validation loss has not for longer than the patience, down to the floor."""
    config = {"epochs": 12, "schedule": "plateau", "plateau_patience": 1, "plateau_factor": 0.1, "warmup_steps": 0}
    trainer = tiny.trainer(tmp_path, frames, valid, {**config, "learning_rate": 1e-2, "final_learning_rate": 2e-4})
    trainer.best = {"loss": 0.0}  # and no step helps
    trainer.plateau.best = 0.0
    trainer.run()
    seen = [row["learning_rate"] for row in tiny.rows(tmp_path)]
    assert seen == pytest.approx([1e-2, 1e-3, 1e-3, *[2e-4] * 9])


@pytest.mark.parametrize("optimizer", ["adamw", "amsgrad"])
def test_steps_are_those_of_the_reference_implementation(
    optimizer: str, frames: list[Atoms], valid: list[Atoms], tmp_path: Path
) -> None:
    """Clipping and (AMSGrad's) AdamW with decay, written out."""
    config = {"optimizer": optimizer, "weight_decay": 0.1, "clip_norm": 0.05, "schedule": "constant", "epochs": 2}
    trainer = tiny.trainer(tmp_path, frames, valid, {**config, "warmup_steps": 0, "dtype": "float64"})
    start, gradients, step = weights(trainer), [], trainer._step

    def watched(structures: list[int]) -> None:
        gradients.append(torch.cat([p.grad.reshape(-1) for p in trainer.potential.parameters() if p.grad is not None]))
        step(structures)

    trainer._step = watched  # type: ignore[method-assign]
    trainer.run()
    assert len(gradients) == 8
    assert gradients[0].norm() > 0.05
    w, m, v, v_max = start, torch.zeros_like(start), torch.zeros_like(start), torch.zeros_like(start)
    for t, gradient in enumerate(gradients, 1):
        g = gradient * min(1.0, 0.05 / float(gradient.norm()))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        v_max = torch.maximum(v_max, v) if optimizer == "amsgrad" else v
        w = w * (1 - 5e-3 * 0.1) - 5e-3 * (m / (1 - 0.9**t)) / ((v_max / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(weights(trainer), w, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (3, 5), (5, 2)])
def test_accumulation_equals_a_larger_batch(
    batch_size: int, accumulate: int, frames: list[Atoms], valid: list[Atoms], tmp_path: Path
) -> None:
    """Also where batches are odd: 16 frames are 3+3+3+3+3 and 1, or 5+5, 5+1."""
    found = []
    for size, parts in ((batch_size, accumulate), (batch_size * accumulate, 1)):
        folder = tmp_path / str(parts)
        trainer = tiny.trainer(
            folder, frames, valid, {"batch_size": size, "accumulate": parts, "dtype": "float64", "clip_norm": 0.1}
        )
        trainer.run()
        found.append((trainer.step, weights(trainer), tiny.rows(folder)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-10)
    for row, other in zip(found[0][2], found[1][2], strict=True):
        assert row == pytest.approx({**other, "seconds": row["seconds"]}, rel=1e-6)


def test_stops_early(
    frames: list[Atoms], valid: list[Atoms], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {"epochs": 50, "patience": 3, "learning_rate": 1e-12}
    trainer = tiny.trainer(tmp_path, frames, valid, config)
    trainer.best = {"loss": 0.0}
    trainer.run()
    assert [row["epoch"] for row in tiny.rows(tmp_path)] == [1, 2, 3]
    assert "no progress in 3 validations: stopped after 3 epochs" in capfd.readouterr().err
    again = tiny.trainer(tmp_path, frames, valid, config)  # a finished run stays finished
    assert again.run() == {"loss": 0.0}
    assert len(tiny.rows(tmp_path)) == 3


def test_bfloat16_autocast(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    losses = {}
    for amp in (False, True):
        trainer = tiny.trainer(tmp_path / str(amp), frames, valid, {"epochs": 15, "amp": amp, "ema_decay": 0.9})
        kinds: list[torch.dtype] = []
        trainer.potential.model.network.filter_net.register_forward_hook(  # type: ignore[union-attr, operator]
            lambda module, args, out, kinds=kinds: kinds.append(out.dtype)
        )
        losses[amp] = trainer.run()["loss"]
        assert (torch.bfloat16 in kinds) == amp
        assert weights(trainer).isfinite().all()
        assert weights(trainer).dtype == torch.float32
        rows = tiny.rows(tmp_path / str(amp))
        assert losses[amp] < 0.5 * rows[0]["valid_loss"]
    assert losses[True] != losses[False]


def test_hessian_rows_train(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    """Third derivatives through the whole loop, autocast included."""
    rng = np.random.default_rng(0)
    rowed = [atoms.copy() for atoms in frames]
    for atoms, labelled in zip(rowed, frames, strict=True):
        atoms.calc = labelled.calc
        atoms.arrays["hessian_row"], atoms.info["hessian_index"] = rng.normal(0, 1, (4, 3)), int(rng.integers(12))
    for amp in (False, True):
        config = {"epochs": 8, "amp": amp, "loss": {"energy": 0.0, "forces": 0.0, "hessian": 1.0}}
        tiny.trainer(tmp_path / str(amp), rowed, valid, config).run()
        rows = tiny.rows(tmp_path / str(amp))
        assert rows[-1]["train_hessian"] < rows[0]["train_hessian"]


@pytest.mark.fault("R4")
def test_loss_that_is_not_finite_stops(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, frames, valid, {"epochs": 4, "save_every_minutes": 0})
    order = [trainer._batches()]
    trainer.run()
    checkpoint = {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()}
    spoilt = tiny.clusters(16)
    spoilt[5].calc.results["energy"] = np.nan
    spoilt[5].info["group"] = "run 7"
    trainer = tiny.trainer(tmp_path, spoilt, valid, {"epochs": 9}, allow_config_change=True)
    before = weights(trainer)
    order = trainer._batches()
    batch = next(batch for batch in order if 5 in batch)
    with pytest.raises(TrainingError, match=r"the loss is not finite in epoch 5, step \d+, .* 5 \(run 7\)") as caught:
        trainer.run()
    assert "last saved state are kept" in str(caught.value)
    listed = json.loads((tmp_path / "bad_batch.json").read_text())
    assert listed["epoch"] == 5
    assert [name.split()[0] for name in listed["frames"]] == [str(i) for i in batch]
    # the best checkpoint and the last state are as good as before, and can be resumed
    assert {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()} == checkpoint
    state, warning = load_state(tmp_path / "state.safetensors")
    assert warning is None
    assert state["counters"]["epoch"] == 4
    resumed = tiny.trainer(tmp_path, frames, valid, {"epochs": 9}, allow_config_change=True)
    assert torch.equal(weights(resumed), before)
    resumed.run()
    assert len(tiny.rows(tmp_path)) == 9


@pytest.mark.fault("R4")
def test_gradient_that_is_not_finite_stops(frames: list[Atoms], valid: list[Atoms], tmp_path: Path) -> None:
    """The loss is a number, its slope is not; and there is a good state from the very first step on."""
    trainer = tiny.trainer(tmp_path, frames, valid)
    parameter = next(trainer.potential.parameters())
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    start = weights(trainer)
    with pytest.raises(TrainingError, match="the norm of the gradient is not finite in epoch 1, step 0"):
        trainer.run()
    assert torch.equal(weights(trainer), start)  # no step was made
    assert len(json.loads((tmp_path / "bad_batch.json").read_text())["frames"]) == 4
    assert torch.equal(weights(tiny.trainer(tmp_path, frames, valid, weights_seed=1)), start)


def test_configuration_is_checked_before_any_compute() -> None:
    for data, message in (
        ({"epoch": 3}, r"unknown key 'epoch'; did you mean 'epochs'\?"),
        ({"loss": {"stres": 1}}, r"unknown key 'loss.stres'; did you mean 'stress'\?"),
        ({"epochs": "many"}, "epochs = 'many': .*valid integer"),
        ({"epochs": 1.5}, r"epochs = 1\.5: .*valid integer"),
        ({"batch_size": 0}, "batch_size = 0: .*greater than or equal to 1"),
        ({"optimizer": "sgd"}, "optimizer = 'sgd': .*'adamw' or 'amsgrad'"),
        ({"ema_decay": 1.0}, r"ema_decay = 1\.0: .*less than 1"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"epochs": "x", "batch_size": "y"}, "epochs = .*batch_size = "),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(TrainConfig, data, "train")
    # YAML 1.1 reads 1e-3 as text
    assert parse(TrainConfig, {"learning_rate": "1e-3"}, "train").learning_rate == 1e-3


def test_every_field_is_documented() -> None:
    for config in (TrainConfig, LossConfig):
        assert [name for name, field in config.model_fields.items() if not field.description] == []
