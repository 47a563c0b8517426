"""One artifact: a TorchScript file that carries its own description, hashes and golden vectors.

Layout of `student.pt` (a zip archive, as `torch.jit.save` writes it):

| entry               | content                                                                            |
|---------------------|------------------------------------------------------------------------------------|
| `code/`, `data.pkl` | the scripted `Potential` or `Ensemble`; its contract stands in `mlff_engines.graph` |
| `extra/golden.json` | small structures with what the eager float64 model says of them                    |
| `extra/mlff.json`   | the `Manifest`; its `sha256` covers all the rest of the archive                    |

A TorchScript file is a program. The manifest is read, and every hash checked, before any of it is executed.
This is the only file of the project that names `torch.jit`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from mlff_engines.checkpoint import Domain, StructureRecord, set_dtype
from mlff_engines.config import Config, parse
from mlff_engines.errors import ArtifactError, ConfigError, KernelWarning, MissingEngineError, suggest
from mlff_engines.evaluator import Evaluator
from mlff_engines.files import replacing
from mlff_engines.graph import Graph
from mlff_engines.kernels import FUSED, available, fuse, load_operators, memory
from mlff_engines.models.jump import JumpTerms
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.potential import Ensemble, Potential
from mlff_engines.structure import FloatArray, Result, Structure

SCHEMA = 1
MANIFEST = "mlff.json"
GOLDEN = "golden.json"
Dtype = Literal["float32", "float64"]
Kernel = Literal["torch", "fused"]
KERNELS = ("auto", "torch", "fused")
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


class Artifact:
    """A loaded artifact. Make one with `load`.

    Attributes:
        kernel: "fused" if `module` calls a kernel, "torch" if it is plain torch.
    """

    def __init__(self, manifest: Manifest, golden: list[Golden], module: nn.Module, device: torch.device) -> None:
        self.manifest = manifest
        self.kernel: Kernel = manifest.kernel
        self.golden = golden
        self.module = module
        self.device = device
        self.dtype = DTYPES[manifest.dtype]

    def __call__(self, graph: Graph) -> Graph:
        """Run the module under the contract of `mlff_engines.graph`."""
        return execute(self.module, graph)

    def evaluator(self, *, skin: float = 0.5, outside: str = "warn") -> Evaluator:
        """A new `Evaluator` of this artifact, with a neighbour list of its own."""
        m = self.manifest
        per_edge, per_atom = m.bytes_per_edge, 0.0
        if self.kernel == "fused":
            per_edge, per_atom = max(memory(model, self.dtype) for model in m.models)
        return Evaluator(
            self,
            m.domain,
            m.cutoff,
            takes_charge=m.takes_charge,
            takes_spin=m.takes_spin,
            skin=skin,
            dtype=self.dtype,
            device=self.device,
            outside=outside,
            bytes_per_edge=per_edge,
            bytes_per_atom=per_atom,
        )

    def eager(self) -> Potential | Ensemble:
        """The `Potential` or `Ensemble` as plain torch code in float64, with the weights of this artifact."""
        m = self.manifest
        members = [Potential(build_model(model_config(config), m.domain.elements, m.e0)) for config in m.models]
        potential: Potential | Ensemble = members[0] if len(members) == 1 else Ensemble(members)
        set_dtype(potential, torch.float64)
        state = self.module.state_dict()  # a kernel's holds more
        potential.load_state_dict({name: state[name].cpu() for name in potential.state_dict()})
        return potential.eval()  # with the energies of isolated atoms in float64 too

    def verify(self) -> dict[str, dict[str, float]]:
        """Replay the golden vectors; their deviations by name.

        Raises:
            ArtifactError: a deviation above the tolerance of the artifact's dtype, or no golden vectors.
        """
        if not self.golden:
            raise ArtifactError("the artifact has no golden vectors; export it again from its checkpoint")
        evaluate = self.evaluator(skin=0.0, outside="ignore")
        found = {g.name: g.deviation(evaluate(g.structure)) for g in self.golden}
        tolerance = TOLERANCE["float32" if self.dtype == torch.float32 else self.manifest.dtype]
        for name, deviations in found.items():
            for quantity, deviation in deviations.items():
                if not deviation <= tolerance:
                    raise ArtifactError(
                        f"golden vector {name!r}: {quantity} off by {deviation:.3g}, allowed {tolerance:g} "
                        f"({self.manifest.dtype}, made with torch {self.manifest.torch_version}, running "
                        f"{torch.__version__}). Export the artifact again from its checkpoint on this machine"
                    )
        return found


def execute(module: nn.Module, graph: Graph) -> Graph:
    """What `module`, scripted or not, makes of `graph`."""
    # the optimising executor recompiles for each new shape, tens of milliseconds at a time, and gains nothing
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        try:
            out: Graph = module(graph)
        except RuntimeError as error:
            if "KeyboardInterrupt" in str(error):  # torch turns one that comes amid its own work into an error
                raise KeyboardInterrupt from None
            raise
        return out


def script(potential: nn.Module) -> nn.Module:
    """The TorchScript form of an eager `Potential` or `Ensemble` in evaluation mode."""
    with _no_deprecation():
        scripted: nn.Module = torch.jit.script(potential.eval())
    return scripted


def save(path: Path, scripted: nn.Module, manifest: Manifest, golden: Sequence[Golden | GoldenJump]) -> Manifest:
    """Write an artifact atomically; returns the manifest with its hash."""
    extra = {GOLDEN: json.dumps([g.model_dump() for g in golden])}
    with replacing(path) as temporary:
        with _no_deprecation():
            torch.jit.save(scripted, str(temporary), _extra_files=extra)
        with zipfile.ZipFile(temporary, "a") as archive:
            digest = _digest(archive, manifest.content())
            manifest = manifest.model_copy(update={"sha256": digest})
            root = archive.namelist()[0].split("/")[0]
            archive.writestr(f"{root}/extra/{MANIFEST}", json.dumps(manifest.content(), indent=1))
    return manifest


def recast(
    path: Path, out: Path, dtype: Dtype | None = None, kernel: Kernel = "torch", *, overwrite: bool = False
) -> Artifact:
    """Write the artifact at `path` in another dtype, or for another kernel: for engines that take a program as it is.

    Weights are those of `path`; so a float64 copy of a float32 artifact is that artifact without its rounding.

    Raises:
        ArtifactError: as `load`; also if `out` exists.
    """
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out} exists; choose another name or pass --overwrite")
    loaded = load(path, dtype=dtype, kernel=kernel)
    dtype = dtype or loaded.manifest.dtype
    golden = loaded.golden
    if dtype != loaded.manifest.dtype:
        evaluate = loaded.evaluator(skin=0.0, outside="ignore")
        golden = [Golden.record(g.name, g.structure, evaluate(g.structure)) for g in golden]
    module = loaded.module if isinstance(loaded.module, torch.jit.ScriptModule) else script(loaded.module)
    save(out, module, loaded.manifest.model_copy(update={"dtype": dtype, "kernel": kernel}), golden)
    return load(out, kernel=kernel)


def inspect(path: Path | str) -> Manifest:
    """The manifest, its hashes checked; nothing of the artifact is executed.

    Raises:
        ArtifactError: missing, truncated or altered file, another kind of file, or a newer schema.
    """
    return _read(Path(path))[0]


def load(
    path: Path | str, device: str | torch.device = "cpu", dtype: Dtype | None = None, kernel: str | None = None
) -> Artifact:
    """Load an artifact, whatever device it was saved on.

    Args:
        path: the `.pt` file.
        device: where to run it.
        dtype: "float32" or "float64" in place of the artifact's own.
        kernel: "fused" for the operators of `mlff_engines.kernels`, "torch" for plain torch, "auto" for whichever is
            faster here; by default the environment variable MLFF_KERNEL, or "auto".

    Raises:
        ArtifactError: as `inspect`; also a missing custom operator, an unavailable device or kernel, weights that do
            not fit the dtype asked for, or golden vectors that fail under an untested torch.
    """
    path = Path(path)
    kernel = kernel or os.environ.get("MLFF_KERNEL") or "auto"
    if kernel not in KERNELS:
        raise ArtifactError(f"kernel {kernel!r}{suggest(kernel, KERNELS)}")
    manifest, golden = _read(path)
    if manifest.kind != "potential":
        raise ArtifactError(f"{path} is a {manifest.kind}, not a potential: mlff_ase.KStepDynamics runs it")
    device = _device(device, dtype)
    if "fused" in (manifest.kernel, kernel):
        try:
            load_operators()
        except MissingEngineError as error:
            raise ArtifactError(f"{path} cannot run its fused kernel: {error}. {_WITHOUT[manifest.kernel]}") from None
    artifact = Artifact(
        manifest, [g for g in golden if isinstance(g, Golden)], _program(path, manifest, device), device
    )
    _choose(artifact, dtype or manifest.dtype, kernel)
    if _release(torch.__version__) != _release(manifest.torch_version):
        warnings.warn(
            f"{path} was made with torch {manifest.torch_version} and runs on {torch.__version__}: "
            "replaying its golden vectors",
            stacklevel=2,
        )
        artifact.verify()
    return artifact


def load_jump(
    path: Path, device: str | torch.device, dtype: Dtype | None
) -> tuple[Manifest, list[GoldenJump], nn.Module, torch.device]:
    """Manifest, golden vectors and program of a jump, for `mlff_engines.kstep.learned`.

    Raises:
        ArtifactError: as `load`; also another kind of artifact.
    """
    manifest, golden = _read(path)
    if manifest.kind != "jump":
        raise ArtifactError(f"{path} is a {manifest.kind}, not a jump")
    device = _device(device, dtype)
    module = _program(path, manifest, device)
    _cast(module, dtype or manifest.dtype, manifest.dtype)
    return manifest, [g for g in golden if isinstance(g, GoldenJump)], module, device


def _device(device: str | torch.device, dtype: Dtype | None) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ArtifactError(f"unknown device {device!r}; allowed: cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArtifactError(f"device {device} was asked for but this torch {torch.__version__} sees no CUDA: use cpu")
    if dtype is not None and dtype not in DTYPES:
        raise ArtifactError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    return device


def _program(path: Path, manifest: Manifest, device: torch.device) -> nn.Module:
    try:
        with _no_deprecation():
            module: nn.Module = torch.jit.load(str(path), map_location=device)
    except RuntimeError as error:
        raise ArtifactError(_explain_load_failure(path, manifest, error)) from error
    return module.eval()


_WITHOUT: dict[Kernel, str] = {
    "torch": "Or load it with kernel='torch'",
    "fused": "Or export its checkpoint again with --kernel torch",
}


def _choose(artifact: Artifact, dtype: Dtype, kernel: str) -> None:
    """Put the form asked for in place of the program, where that is another."""
    manifest = artifact.manifest
    missing = sorted(set(manifest.architectures) - set(FUSED))
    on_cpu = artifact.device.type == "cpu"
    if kernel == "fused" and (missing or not on_cpu):
        what = f"architecture {', '.join(missing)}" if missing else f"device {artifact.device}"
        raise ArtifactError(f"there is no fused kernel for {what}: use kernel='auto' or 'torch'")
    wanted: Kernel = "fused" if kernel != "torch" and on_cpu and not missing and available() else "torch"
    if manifest.kernel == "torch" and dtype != manifest.dtype:
        _cast(artifact.module, dtype, manifest.dtype)
        artifact.dtype = DTYPES[dtype]
        if dtype == "float64":  # isolated atoms were evaluated in float32
            artifact.module.load_state_dict(artifact.eager().state_dict())
    if wanted == manifest.kernel and (wanted == "torch" or dtype == manifest.dtype):
        return
    potential = artifact.eager()
    set_dtype(potential, DTYPES[dtype])
    module = potential.eval().to(artifact.device)
    if wanted == "fused":
        try:
            module = fuse(potential, manifest.architectures)
        except ArtifactError as error:
            if kernel == "fused":
                raise
            warnings.warn(f"{error}. Plain torch is used", KernelWarning, stacklevel=3)
            wanted = "torch"
    artifact.module, artifact.dtype, artifact.kernel = module, DTYPES[dtype], wanted


def _read(path: Path) -> tuple[Manifest, list[Golden | GoldenJump]]:
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
    except zipfile.BadZipFile:
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
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
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


def _explain_load_failure(path: Path, manifest: Manifest, error: RuntimeError) -> str:
    text = str(error)
    if "Unknown builtin op" in text:
        operator = text.split("Unknown builtin op:", 1)[1].split(".")[0].strip()
        return (
            f"{path} uses the operator {operator}, which this installation does not have. Upgrade mlff-engines, "
            "or export the checkpoint again on this machine"
        )
    return (
        f"torch {torch.__version__} cannot load {path} (made with torch {manifest.torch_version}): "
        f"{text.strip().splitlines()[-1]}. Export the checkpoint again on this machine"
    )


def _cast(module: nn.Module, dtype: Dtype, own: Dtype) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        # references are float64 in every artifact
        if tensor.is_floating_point() and "reference" not in name.split("."):
            tensor.data = tensor.data.to(DTYPES[dtype])
            if not tensor.data.isfinite().all():
                raise ArtifactError(f"{name} is not finite in {dtype}: use the artifact in {own}")


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


class _no_deprecation(warnings.catch_warnings):  # noqa: N801 (a context manager, used as a function)
    """TorchScript is deprecated upstream; the weights are the truth and newer forms are made from them."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)
