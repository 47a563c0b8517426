"""The judge's answer: `report.json` for machines and `report.html` for people, both written from one `Report`.

```python
report = Report(
    title="student.pt",
    provenance=Provenance(command="mlff validate student.pt", artifact="student.pt", sha256=manifest.sha256),
    sections=[Section(engine="ase", system="water-64", results=results, versions=engine.versions())],
    views=[View.of("water-64", structure, forces)],
)
write_report(report, folder)
sys.exit(report.exit_code)
```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, computed_field, model_validator

from mlff_engines import __version__
from mlff_engines.errors import DataError
from mlff_engines.structure import SYMBOLS, FloatArray, Structure
from mlff_engines.validation.result import CheckResult, Verdict

EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "inconclusive": 3}
Vector = tuple[float, float, float]


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of them: fail, then inconclusive, then pass. Nothing at all shows nothing: inconclusive."""
    found = set(verdicts)
    if "fail" in found:
        return "fail"
    return "pass" if found == {"pass"} else "inconclusive"


def _plain(value: Any) -> Any:
    """Dataclasses, mappings and arrays, however nested, as what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class _Part(BaseModel):
    # JSON has no word for numbers that are not finite: they are the strings "NaN", "Infinity" and "-Infinity"
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    @model_validator(mode="before")
    @classmethod
    def _recompute(cls, data: Any) -> Any:
        """A verdict that was written follows from the rest: it is not read."""
        computed = cls.model_computed_fields
        return {key: value for key, value in data.items() if key not in computed} if isinstance(data, dict) else data


class Provenance(_Part):
    """All it takes to do it again."""

    command: str = Field(default="", description="the command line, or the call")
    artifact: str = Field(default="", description="file name of the artifact")
    sha256: str = Field(default="", description="hash of the artifact, as its manifest has it")
    date: str = Field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"), description="ISO 8601, when written"
    )
    seconds: float | None = Field(default=None, description="wall time of the whole validation")
    seeds: dict[str, int] = Field(default_factory=dict, description="by what they are for")
    versions: Annotated[dict[str, str], BeforeValidator(_plain)] = Field(
        default_factory=lambda: {"mlff-engines": __version__}, description="of packages, besides those of the engines"
    )
    hashes: dict[str, str] = Field(default_factory=dict, description="sha256 of other files that were read, by name")
    settings: Annotated[dict[str, str | float | int | bool | None], BeforeValidator(_plain)] = Field(
        default_factory=dict, description="whatever else was chosen: temperature, time step, number of replicas, ..."
    )


class Section(_Part):
    """What one engine showed on one system."""

    engine: str = Field(description="name of the engine")
    system: str = Field(description="name of the structure, or what else the checks were run on")
    results: Annotated[list[CheckResult], BeforeValidator(_plain)] = Field(
        default_factory=list, description="one for each check; see mlff_engines.validation.result"
    )
    versions: Annotated[dict[str, str], BeforeValidator(_plain)] = Field(
        default_factory=dict, description="of the engine and its builds"
    )
    problem: str = Field(
        default="", description="why checks are missing, with what to do: the engine is not installed, the run stopped"
    )

    @computed_field(description="worst of the results; inconclusive at best where there is a problem")  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """Worst of the results; inconclusive at best where there is a problem."""
        found = overall(result.verdict for result in self.results)
        return "inconclusive" if self.problem and found == "pass" else found


class View(_Part):
    """A structure to look at, with the forces on it."""

    name: str
    symbols: list[str]
    positions: list[Vector] = Field(description="Å")
    forces: list[Vector] | None = Field(default=None, description="eV/Å")
    cell: tuple[Vector, Vector, Vector] | None = Field(default=None, description="Å, rows; None without periodicity")

    @classmethod
    def of(cls, name: str, structure: Structure, forces: FloatArray | None = None) -> View:
        """From a structure and forces (N, 3) in eV/Å; along axes without periodicity the cell has no length."""
        return cls(
            name=name,
            symbols=[SYMBOLS[number] for number in structure.numbers],
            positions=structure.positions.tolist(),
            forces=None if forces is None else forces.tolist(),
            cell=(structure.cell * structure.pbc[:, None]).tolist() if structure.pbc.any() else None,
        )


class Report(_Part):
    """Everything that was found, and how.

    Raises:
        pydantic.ValidationError: a part is not what the schema says (`Report.model_json_schema()`).
    """

    schema_version: Literal[1] = 1
    title: str = Field(description="what was judged")
    provenance: Provenance = Field(default_factory=Provenance)
    sections: list[Section] = Field(default_factory=list)
    views: list[View] = Field(default_factory=list)

    @computed_field(description="worst of the sections; inconclusive without any")  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """Worst of the sections; inconclusive without any."""
        return overall(section.verdict for section in self.sections)

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 inconclusive."""
        return EXIT_CODES[self.verdict]


def read_report(path: Path) -> Report:
    """Read `report.json` back.

    Raises:
        DataError: there is none, or it is not of this schema.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"no report at {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path} is no report of schema 1: {where}: {first['msg']}; {error.error_count()} "
            "problem(s). Run the validation again with this version"
        ) from None
