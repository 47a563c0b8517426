"""What `md.yaml` and `run.yaml` say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mlff_engines.config import Config

Positive = Annotated[float, Field(gt=0)]


def _several(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


Temperatures = Annotated[tuple[Positive, ...], Field(min_length=1), BeforeValidator(_several)]


class SystemConfig(Config):
    """What decides the System of a molecule."""

    force_field: str = Field(
        "mmff94", description="mmff94, mmff94s, gaff-2.11, openff-2.2.0, ..., amber14, amber19, or an artifact (.pt)"
    )
    implicit_solvent: Literal["OBC2"] | None = Field("OBC2", description="OBC2 or null")
    constraints: Literal["HBonds", "AllBonds"] | None = Field("HBonds", description="HBonds, AllBonds or null")
    hydrogen_mass_amu: Positive | None = Field(
        None, description="mass taken from the atom a hydrogen is bound to; null: hydrogen's own"
    )
    nonbonded_cutoff_nm: Positive | None = Field(None, description="null: no cutoff, the only choice for MMFF")


class MDConfig(SystemConfig):
    """Langevin dynamics, and the constant-energy segments that branch off it.

    Time steps, lengths and intervals are rounded to whole steps.
    """

    temperature_K: Temperatures = Field((300.0,), description="K; a list: one run at each")  # noqa: N815
    friction_per_ps: Positive = 1.0
    dt_fs: Positive = 2.0
    length_ns: Positive = Field(1.0, description="of the Langevin dynamics, constant-energy segments not counted")
    equilibration_ps: float = Field(50.0, ge=0, description="before, and not counted")
    nve_interval_ps: Positive = Field(200.0, description="Langevin dynamics between two windows")
    nve_window_ps: float = Field(50.0, ge=0, description="length of a constant-energy window; 0: none")
    burst_interval_ps: Positive = Field(1.0, description="Langevin dynamics between two bursts")
    burst_steps: int = Field(16, ge=0, description="length of a constant-energy burst; 0: none")
    displaced_nm: float = Field(
        0.0, ge=0, description="a frame after each burst with atoms displaced so far, rms, for force fields; 0: none"
    )
    save_interval_steps: int = Field(4, ge=1, description="between two frames of a window or burst")
    save_forces: bool = Field(False, description="true forces of every frame")
    platform: Literal["Reference", "CPU", "CUDA", "OpenCL", "HIP"] = Field(
        "Reference", description="of OpenMM; for one small molecule the fastest, in double precision, and reproducible"
    )
    seed: int = Field(1, ge=1, description="of conformers, velocities and noise")

    @model_validator(mode="after")
    def _segments(self) -> MDConfig:
        if self.burst_steps % self.save_interval_steps:
            raise ValueError(
                f"burst_steps {self.burst_steps} is no multiple of save_interval_steps {self.save_interval_steps}: "
                "the end of a burst would be lost"
            )
        if not (self.burst_steps or self.nve_window_ps or self.displaced_nm):
            raise ValueError("burst_steps, nve_window_ps and displaced_nm are all 0: nothing would be saved")
        if self.burst_interval_ps > self.nve_interval_ps:
            raise ValueError(
                f"burst_interval_ps {self.burst_interval_ps:g} is longer than nve_interval_ps {self.nve_interval_ps:g}"
            )
        return self


Kind = Literal["verlet", "hmr", "mts", "student", "jump", "A1", "A2", "C", "D"]
NEEDED: dict[str, str] = {"mts": "macro_step_fs", "jump": "k", "A1": "k", "A2": "k", "C": "macro_step_fs"} | {
    "D": "trajectory_ps"
}
SUFFIX = {"k": "", "trajectory_ps": "ps"}  # of names; others are in fs
OF_STUDENT = ("student", "C", "D")
OF_JUMP = ("jump", "A1", "A2")


class Variant(Config):
    """A way to make steps, or a baseline."""

    kind: Kind = Field(
        description="verlet; hmr: with heavy hydrogens; mts: nonbonded forces seldom; student or jump alone; A1 to D: "
        "the variants of mlff_engines.kstep"
    )
    name: str = Field("", pattern=r"^[A-Za-z0-9.+-]*$", description="of files and rows; default from the rest")
    dt_fs: Positive | None = Field(
        None, description="of the innermost steps; default: dt_fs of the run, inner_step_fs with a student, 4 for hmr"
    )
    k: int | None = Field(None, ge=1, description="steps of a jump: jump, A1, A2")
    ballistic: bool = Field(False, description="jump, A1, A2: free flight in place of the learned jump")
    macro_step_fs: Positive | None = Field(None, description="between true forces: C; between nonbonded ones: mts")
    trajectory_ps: Positive | None = Field(None, description="of the student, as a proposal: D")
    allow_unsafe: bool = Field(False, description="C: run a macro-step at a resonance all the same")
    length_ps: Positive | None = Field(None, description="in place of that of the run")
    nve_ps: float | None = Field(None, ge=0, description="in place of that of the run")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("kind") == "hmr":
            data = {"dt_fs": 4.0} | data
        if isinstance(data, dict) and not data.get("name"):
            key = NEEDED.get(str(data.get("kind")), "dt_fs")
            value = data.get(key)
            mark = "k" if key == "k" else ""
            size = f"-{mark}{value:g}{SUFFIX.get(key, 'fs')}" if isinstance(value, int | float) else ""
            data = data | {"name": f"{data.get('kind')}{size}{'-ballistic' if data.get('ballistic') else ''}"}
        return data

    @model_validator(mode="after")
    def _complete(self) -> Variant:
        needed = NEEDED.get(self.kind)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"{self.kind} needs {needed}")
        if self.ballistic and self.kind not in OF_JUMP:
            raise ValueError(f"{self.name}: ballistic is for {', '.join(OF_JUMP)}")
        return self


class RunConfig(Config):
    """A file for `mlff kstep run`. Lengths and intervals are rounded to whole macro-steps."""

    variants: tuple[Variant, ...] = Field(min_length=1, description="what to run beside the reference")
    replicas: int = Field(5, ge=1, description="starts, each with noise of its own")
    temperature_K: Positive = 300.0  # noqa: N815
    friction_per_ps: Positive = 1.0
    dt_fs: Positive = Field(2.0, description="of the reference and of the steps in a jump")
    inner_step_fs: Positive = Field(1.0, description="of the student, if a variant names none")
    equilibration_ps: float = Field(10.0, ge=0, description="of the starts, by the reference")
    length_ps: Positive = Field(100.0, description="of each replica at the temperature")
    nve_ps: float = Field(100.0, ge=0, description="of each replica without thermostat; 0: none")
    reference_ps: Positive | None = Field(None, description="length of the reference's replicas; null: length_ps")
    sample_fs: Positive = Field(100.0, description="between two frames")
    dcd: bool = Field(False, description="write the frames into DCD files as well")
    platform: Literal["Reference", "CPU", "CUDA", "OpenCL", "HIP"] = "Reference"
    seed: int = Field(1, ge=1, description="of starts and noise")

    @model_validator(mode="after")
    def _variants(self) -> RunConfig:
        names = [variant.name for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or "reference" in names:
            raise ValueError(f"variants need names of their own, none of them reference; twice there: {twice}")
        for variant in self.variants:
            inner = self.time_step(variant)
            steps = self.macro_step(variant) / inner
            if abs(steps - max(1, round(steps))) > 1e-6:
                raise ValueError(f"{variant.name} is {steps:g} inner steps of {inner:g} fs; allowed: 1, 2, 3, ...")
        return self

    def macro_step(self, variant: Variant) -> float:
        """fs between two true forces, or energies; of a student or jump alone, that of its own steps."""
        if variant.k is not None:
            return (variant.k + (variant.kind != "jump")) * self.dt_fs
        if variant.trajectory_ps is not None:
            return 1e3 * variant.trajectory_ps
        return variant.macro_step_fs or self.time_step(variant)

    def time_step(self, variant: Variant) -> float:
        """fs, of the innermost steps."""
        return variant.dt_fs or (self.inner_step_fs if variant.kind in OF_STUDENT else self.dt_fs)
