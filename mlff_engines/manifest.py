"""What an artifact says of itself, read without executing any of it: manifest, golden vectors and their hash.

An artifact is a zip archive. Besides the program, which `mlff_engines.artifact` writes and loads, it holds

| entry               | content                                                         |
|---------------------|-----------------------------------------------------------------|
| `extra/golden.json` | small structures with what the eager float64 model says of them |
| `extra/mlff.json`   | the `Manifest`; its `sha256` covers all the rest of the archive |
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from mlff_engines.checkpoint import Domain, StructureRecord
from mlff_engines.config import Config, parse
from mlff_engines.errors import ArtifactError, ConfigError
from mlff_engines.models.jump import JumpTerms
from mlff_engines.structure import FloatArray, Result, Structure

SCHEMA = 1
MANIFEST = "mlff.json"
GOLDEN = "golden.json"
Dtype = Literal["float32", "float64"]
Kernel = Literal["torch", "fused"]
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE: dict[Dtype, float] = {
    "float32": 5e-5,
    "float64": 1e-10,
}  # eV per atom, eV/Å and eV per atom; docs/conformance.md, S1


class Units(Config):
    """Units of everything that enters and leaves the artifact."""

    length: Literal["Angstrom"]
    energy: Literal["eV"]


class Manifest(Config):
    """What an artifact says of itself."""

    schema_version: int
    kind: Literal["potential", "jump"] = "potential"
    jump: JumpTerms | None = Field(None, description="what a jump is tied to; absent for a potential")
    architecture: str
    models: list[dict[str, Any]] = Field(min_length=1, description="hyper-parameters, one entry per member")
    units: Units
    dtype: Dtype
    cutoff: float = Field(gt=0, description="Å")
    layers: int = Field(ge=1, description="message-passing steps; interaction range = layers x cutoff")
    takes_charge: bool
    takes_spin: bool
    outputs: list[str] = Field(description="of mlff_engines.graph.OUTPUTS")
    domain: Domain
    e0: dict[str, float] = Field(description="energy of the isolated atom per element, eV")
    training: list[dict[str, Any]] = Field(description="provenance, one entry per member")
    weights_sha256: list[str] = Field(description="of the checkpoint of each member")
    bytes_per_edge: float | None = Field(None, description="memory of one evaluation in plain torch")
    kernel: Kernel = Field("torch", description="whether the program calls an operator of mlff_engines.kernels")
    torch_version: str
    sha256: str = Field("", description="of all else in the archive")

    def content(self) -> dict[str, Any]:
        """As plain values; that of a potential does not speak of jumps, so that older versions can read it."""
        return self.model_dump(mode="json", exclude={"jump"} if self.jump is None else None)

    @property
    def members(self) -> int:
        """1, or the size of the ensemble."""
        return len(self.models)

    @property
    def architectures(self) -> list[str]:
        """Of each member."""
        return [model["arch"] for model in self.models]


class Golden(StructureRecord):
    """A structure and what the eager float64 model said of it."""

    name: str
    energy: float
    forces: list[list[float]]
    virial: list[list[float]]

    @classmethod
    def record(cls, name: str, structure: Structure, result: Result) -> Golden:
        """Make one from an evaluation."""
        return cls(
            **StructureRecord.of(structure).model_dump(),
            name=name,
            energy=result.energy,
            forces=result.forces.tolist(),
            virial=result.virial.tolist(),
        )

    def deviation(self, result: Result) -> dict[str, float]:
        """Differences of energy (eV/atom), forces (eV/Å) and virial (eV/atom).

        Forces and virials above 1 eV/Å or 1 eV/atom are compared relative to the largest: golden structures may lie
        far outside the trained range.
        """
        atoms = max(len(self.numbers), 1)
        forces, virial = np.reshape(self.forces, (-1, 3)), np.array(self.virial) / atoms
        scale = max(1.0, float(np.abs(forces).max(initial=0.0)), float(np.abs(virial).max()))
        return {
            "energy": abs(result.energy - self.energy) / atoms / scale,
            "forces": float(np.abs(result.forces - forces).max(initial=0.0)) / scale,
            "virial": float(np.abs(result.virial / atoms - virial).max()) / scale,
        }


class GoldenJump(StructureRecord):
    """A structure that moves, and the jump that the eager float64 model makes of it."""

    name: str
    velocities: list[list[float]]
    temperature: float
    dx: list[list[float]]
    dv: list[list[float]]

    def deviation(self, dx: FloatArray, dv: FloatArray) -> dict[str, float]:
        """Largest differences of dx and dv, relative to the largest dx and dv."""
        pairs = {"dx": (dx, self.dx), "dv": (dv, self.dv)}
        return {
            name: float(np.abs(found - np.reshape(expected, (-1, 3))).max() / np.abs(expected).max())
            for name, (found, expected) in pairs.items()
        }


def inspect(path: Path | str) -> Manifest:
    """The manifest, its hashes checked; nothing of the artifact is executed.

    Raises:
        ArtifactError: missing, truncated or altered file, another kind of file, or a newer schema.
    """
    return read(Path(path))[0]


# what reading an archive with a wrong bit somewhere comes to: in its directory, its entries' flags or their content
DAMAGED = (zipfile.BadZipFile, zlib.error, UnicodeDecodeError, EOFError, RuntimeError)


def read(path: Path) -> tuple[Manifest, list[Golden | GoldenJump]]:
    """Manifest and golden vectors, hashes checked.

    Raises:
        ArtifactError: as `inspect`.
    """
    if not path.exists():
        raise ArtifactError(
            f"no artifact at {path}; make one with: mlff-export CHECKPOINT -o {path.with_suffix('.pt').name}"
        )
    if path.is_dir() or path.suffix in {".safetensors", ".yaml"}:
        folder = path if path.is_dir() else path.parent
        raise ArtifactError(f"{path} is a checkpoint, not an artifact; export it: mlff-export {folder} -o student.pt")
    try:
        with path.open("rb") as file:
            start = file.read(2)
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    except DAMAGED:
        what = (
            "is a truncated artifact" if start == b"PK" else "is a pickle" if start[:1] == b"\x80" else "is no artifact"
        )
        raise ArtifactError(
            f"{path} {what} ({path.stat().st_size} bytes); copy it anew, or make it with: "
            f"mlff-export CHECKPOINT -o {path.with_suffix('.pt').name}"
        ) from None
    with archive:
        members = {name.split("/", 1)[-1]: name for name in archive.namelist()}
        if f"extra/{MANIFEST}" not in members:
            raise ArtifactError(
                f"{path} has no manifest: it is a torch file made by another program. "
                f"Export a checkpoint: mlff-export CHECKPOINT -o {path.with_suffix('.pt').name}"
            )
        try:
            content = json.loads(archive.read(members[f"extra/{MANIFEST}"]))
            if not isinstance(content, dict):
                raise ValueError("its manifest is no JSON object")
            version = content.get("schema_version")
            if isinstance(version, int) and version > SCHEMA:
                raise ArtifactError(
                    f"{path} has schema version {version}; this mlff-engines reads up to {SCHEMA}: upgrade mlff-engines"
                )
            manifest = parse(Manifest, content, f"manifest of {path}")
            digest = _digest(archive, content)
            records = json.loads(archive.read(members[f"extra/{GOLDEN}"]))
            recorded: type[Golden | GoldenJump] = Golden if manifest.jump is None else GoldenJump
            golden = [recorded.model_validate(g) for g in records]
        except ConfigError as error:
            raise ArtifactError(f"{error}. Export the artifact again from its checkpoint") from None
        except (*DAMAGED, KeyError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged ({error}); copy it anew or export it again") from None
    if digest != manifest.sha256:
        raise ArtifactError(
            f"{path} was altered or damaged: SHA-256 of its content is {digest[:12]}..., its manifest says "
            f"{manifest.sha256[:12]}.... It was not executed; copy it anew or export it again"
        )
    return manifest, golden


def _digest(archive: zipfile.ZipFile, manifest: Mapping[str, Any]) -> str:
    """SHA-256 over name and content of every entry, and over the manifest less this hash."""
    claims = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(claims, sort_keys=True).encode())
    for name in sorted(archive.namelist()):
        if not name.endswith(f"/extra/{MANIFEST}"):
            content = archive.read(name)
            digest.update(f"{name.split('/', 1)[-1]}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def seal(archive: Path, manifest: Manifest) -> Manifest:
    """Append `manifest`, with the hash of all else in `archive`; returns what was written."""
    with zipfile.ZipFile(archive, "a") as file:
        manifest = manifest.model_copy(update={"sha256": _digest(file, manifest.content())})
        root = file.namelist()[0].split("/")[0]
        file.writestr(f"{root}/extra/{MANIFEST}", json.dumps(manifest.content(), indent=1))
    return manifest
