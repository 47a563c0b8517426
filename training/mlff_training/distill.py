"""The whole way from a teacher to a student that has been tried: sample, label, split, train, export, try."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ase import Atoms
from ase.data import ground_state_magnetic_moments
from pydantic import Field
from rich.console import Console

from mlff_engines.checkpoint import load_checkpoint
from mlff_engines.config import Config
from mlff_engines.errors import ArtifactError
from mlff_engines.export import export
from mlff_engines.manifest import Dtype, inspect
from mlff_training.data.labels import results
from mlff_training.loop import TrainConfig
from mlff_training.losses import LossConfig
from mlff_training.sampling.sample import Dynamics, Rattle, SamplingConfig, sample
from mlff_training.student import split_frames, train_student
from mlff_training.teachers.config import TeacherConfig
from mlff_training.teachers.labelling import label
from mlff_training.trial import Trial, TrialConfig, try_student


class DistillConfig(Config):
    """A file for `mlff distill`. The defaults make a student of one small molecule in minutes."""

    start: list[Path] = Field([], description="structure files to start from, relative to the configuration file")
    output: Path | None = Field(None, description="folder of the run, relative to the working directory")
    teacher: TeacherConfig = Field(TeacherConfig(name="gfn2-xtb"), description="who labels")
    workers: int = Field(2, ge=1, description="teacher processes")
    sampling: SamplingConfig = SamplingConfig(
        md=Dynamics(temperatures=(300.0, 450.0, 700.0), seeds=(0, 1), steps=8000, interval=10),
        rattle=Rattle(amplitudes=(0.05, 0.1), count=50),
        select=2500,
    )
    hessian_rows: bool = Field(False, description="label one Hessian row per structure: two teacher calls more")
    valid: float | int = Field(100, description="number or fraction of the frames set aside for validation")
    e0: Literal["fit", "isolated"] | dict[str, float] = Field(
        "fit", description="reference energies per element, eV; 'isolated' asks the teacher for lone atoms"
    )
    model: dict[str, Any] = Field(default_factory=dict, description="architecture and hyper-parameters")
    train: TrainConfig = TrainConfig(epochs=40, batch_size=10, loss=LossConfig(kind="huber"))
    members: int = Field(1, ge=1, description="students trained from different seeds; more than one is an ensemble")
    dtype: Dtype = Field("float32", description="of the artifact")
    device: str = Field("cpu", description="to train on: cpu, cuda, cuda:1, ...")
    trial: TrialConfig | None = Field(TrialConfig(), description="what the student is tried on; null leaves it out")


def distill(
    start: Sequence[Atoms],
    config: DistillConfig,
    folder: Path,
    *,
    allow_config_change: bool = False,
) -> tuple[Path, Trial | None]:
    """Make a student in `folder`; run again to resume after the last finished step.

    Args:
        start: structures to sample around.
        config: what to do.
        folder: gets `sampled.xyz`, `labels.xyz`, `member-0/` ..., `student.pt` and `trial/`.
        allow_config_change: resume training although the configuration differs from the saved one.

    Returns:
        the artifact, and what its trial found.
    """
    say = Console(stderr=True, soft_wrap=True, highlight=False).print
    say(f"[1/5] sampling with {config.teacher.level_of_theory}")
    frames = sample(start, config.teacher, config.sampling, folder / "sampled.xyz", workers=config.workers)
    say(f"[2/5] labelling {len(frames)} structures")
    frames = label(
        frames, config.teacher, folder / "labels.xyz", workers=config.workers, hessian_rows=config.hessian_rows
    )
    # one molecule's trajectories overlap: the trial's own trajectories, not these frames, tell the true error
    parts = split_frames(frames, {"train": None, "valid": config.valid}, config.train.seed, "frame", folder)
    e0 = isolated_energies(frames, config.teacher, folder / "isolated.xyz") if config.e0 == "isolated" else config.e0
    checkpoints = []
    for member in range(config.members):
        which = f", member {member + 1} of {config.members}" if config.members > 1 else ""
        say(f"[3/5] training on {len(parts['train'])} structures{which}")
        own = config.train.model_copy(update={"seed": config.train.seed + member})
        train_student(
            parts,
            e0,
            config.model,
            own,
            folder / f"member-{member}",
            device=config.device,
            teacher=config.teacher.level_of_theory,
            allow_config_change=allow_config_change,
        )
        checkpoints.append(folder / f"member-{member}" / "best")
    artifact = folder / "student.pt"
    if not _is_made_of(artifact, checkpoints, config.dtype):
        say(f"[4/5] exporting {artifact}")
        export(checkpoints, artifact, dtype=config.dtype, overwrite=True)
    if config.trial is None:
        return artifact, None
    say("[5/5] trying the student on trajectories of the teacher it has never seen, and in molecular dynamics")
    return artifact, try_student(artifact, start, config.teacher, config.trial, folder / "trial")


def isolated_energies(frames: Sequence[Atoms], teacher: TeacherConfig, out: Path) -> dict[str, float]:
    """The teacher's energy (eV) of a lone neutral atom of each element, in its ground state where it knows spin."""
    knows_spin = (teacher.multiplicity or teacher.spec.multiplicity) is not None
    atoms = []
    for number in sorted({int(number) for frame in frames for number in frame.numbers}):
        lone = Atoms([number])
        lone.info = {"charge": 0.0, "multiplicity": 1 + int(knows_spin and ground_state_magnetic_moments[number])}
        atoms.append(lone)
    labelled = label(atoms, teacher, out, max_failed=0.0, progress=False)
    return {atom.get_chemical_symbols()[0]: float(results(atom)["energy"]) for atom in labelled}


def _is_made_of(artifact: Path, checkpoints: Sequence[Path], dtype: Dtype) -> bool:
    """Whether `artifact` is there, whole, and the export of these checkpoints."""
    try:
        manifest = inspect(artifact)
    except ArtifactError:
        return False
    weights = [load_checkpoint(folder)[1].sha256 for folder in checkpoints]
    return manifest.dtype == dtype and manifest.weights_sha256 == weights


def smoke(config: DistillConfig) -> DistillConfig:
    """The same path in seconds: so little of everything that the student is useless."""
    sampling = SamplingConfig(md=Dynamics(temperatures=(300.0,), steps=200, interval=5), select=30)
    return config.model_copy(
        update={
            "sampling": sampling,
            "valid": 5,
            "model": {**config.model, "features": 8, "interactions": 2},
            "train": config.train.model_copy(update={"epochs": 2}),
            "trial": config.trial
            and config.trial.model_copy(
                update={"frames": 5, "nve_ps": 0.02, "law_ps": 0.01, "temperatures": config.trial.temperatures[:1]}
            ),
        }
    )
