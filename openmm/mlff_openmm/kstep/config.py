"""What `md.yaml` says."""

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
        if not self.burst_steps and not self.nve_window_ps:
            raise ValueError("burst_steps and nve_window_ps are both 0: nothing would be saved")
        if self.burst_interval_ps > self.nve_interval_ps:
            raise ValueError(
                f"burst_interval_ps {self.burst_interval_ps:g} is longer than nve_interval_ps {self.nve_interval_ps:g}"
            )
        return self
