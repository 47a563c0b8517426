"""One artifact: a TorchScript file that carries its own description, hashes and golden vectors.

`student.pt`, as `torch.jit.save` writes it, is the scripted `Potential` or `Ensemble` under the contract of
`mlff_engines.graph`, with the entries of `mlff_engines.manifest` beside it.

A TorchScript file is a program. The manifest is read, and every hash checked, before any of it is executed.
This is the only file of the project that names `torch.jit`.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from mlff_engines.checkpoint import set_dtype
from mlff_engines.compilation import Compiled, Signature, package, place
from mlff_engines.cudagraphs import CapturedPotential
from mlff_engines.errors import ArtifactError, KernelWarning, MissingEngineError, suggest
from mlff_engines.evaluator import Evaluator
from mlff_engines.files import replacing
from mlff_engines.graph import INPUTS, Graph
from mlff_engines.kernels import FUSED, available, fuse, load_operators, memory
from mlff_engines.manifest import DTYPES, GOLDEN, TOLERANCE, Dtype, Golden, GoldenJump, Kernel, Manifest, read, seal
from mlff_engines.models.registry import build_model, model_config
from mlff_engines.neighbors import SKIN
from mlff_engines.potential import Ensemble, Potential

Running = Literal["torch", "fused", "compiled"]
KERNELS = ("auto", "torch", "fused", "compiled")


class Artifact:
    """A loaded artifact. Make one with `load`.

    Attributes:
        program: what the file holds, with the weights.
        module: what runs: the program, or a form of it for this machine.
        kernel: of `module`: "fused" if it calls a kernel, "compiled" if torch has compiled it, else "torch".
    """

    def __init__(self, manifest: Manifest, golden: list[Golden], program: nn.Module, device: torch.device) -> None:
        self.manifest = manifest
        self.kernel: Running = manifest.kernel
        self.golden = golden
        self.program = self.module = program
        self.device = device
        self.dtype = DTYPES[manifest.dtype]

    def __call__(self, graph: Graph) -> Graph:
        """Run the module under the contract of `mlff_engines.graph`."""
        return execute(self.module, graph)

    def evaluator(self, *, skin: float = SKIN, outside: str = "warn") -> Evaluator:
        """A new `Evaluator` of this artifact, with a neighbour list of its own."""
        m = self.manifest
        per_edge, per_atom = m.bytes_per_edge, 0.0
        if self.kernel == "fused":
            per_edge, per_atom = max(memory(model, self.dtype) for model in m.models)
        return Evaluator(
            self.replayed(),
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

    def replayed(self) -> Callable[[Graph], Graph]:
        """This artifact for one caller that runs it again and again: on a GPU by CUDA graphs, in buffers of its own."""
        on_gpu = self.device.type == "cuda" and self.kernel == "torch"
        return CapturedPotential(self, self.manifest.cutoff) if on_gpu else self

    def eager(self) -> Potential | Ensemble:
        """The `Potential` or `Ensemble` as plain torch code in float64, with the weights of this artifact."""
        m = self.manifest
        members = [Potential(build_model(model_config(config), m.domain.elements, m.e0)) for config in m.models]
        potential: Potential | Ensemble = members[0] if len(members) == 1 else Ensemble(members)
        set_dtype(potential, torch.float64)
        state = self.program.state_dict()  # a kernel's holds more
        potential.load_state_dict({name: state[name].cpu() for name in potential.state_dict()})
        return potential.eval()  # with the energies of isolated atoms in float64 too

    def verify(
        self, advice: str = "Export the artifact again from its checkpoint on this machine"
    ) -> dict[str, dict[str, float]]:
        """Replay the golden vectors; their deviations by name.

        Args:
            advice: what to do where they differ.

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
                        f"{torch.__version__}). {advice}"
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
        return seal(temporary, manifest)


def recast(loaded: Artifact, out: Path, *, overwrite: bool = False) -> Manifest:
    """Write `loaded` in its present dtype and for its present kernel: for engines that take a program as it is.

    The weights stay those of the original; so a float64 copy of a float32 artifact is that artifact without its
    rounding. Of a compiled one, the plain form is written.

    Raises:
        ArtifactError: `out` exists.
    """
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out} exists; choose another name or pass --overwrite")
    golden, manifest = loaded.golden, loaded.manifest
    if loaded.dtype != DTYPES[manifest.dtype]:
        dtype = next(name for name, kind in DTYPES.items() if kind == loaded.dtype)
        manifest = manifest.model_copy(update={"dtype": dtype})
        evaluate = loaded.evaluator(skin=0.0, outside="ignore")
        golden = [Golden.record(g.name, g.structure, evaluate(g.structure)) for g in golden]
    kernel: Kernel = "fused" if loaded.kernel == "fused" else "torch"
    module = _potential(loaded, manifest.dtype) if loaded.kernel == "compiled" else loaded.module
    if not isinstance(module, torch.jit.ScriptModule):
        module = script(module)
    return save(out, module, manifest.model_copy(update={"kernel": kernel}), golden)


def load(
    path: Path | str, device: str | torch.device = "cpu", dtype: Dtype | None = None, kernel: str | None = None
) -> Artifact:
    """Load an artifact, whatever device it was saved on.

    Args:
        path: the `.pt` file.
        device: where to run it.
        dtype: "float32" or "float64" in place of the artifact's own.
        kernel: "fused" for the operators of `mlff_engines.kernels`; "compiled" for what torch itself compiles for this
            machine, which takes a minute and is kept, see `mlff_engines.compilation`; "torch" for plain torch; "auto"
            for the fastest of these that is there. By default the environment variable MLFF_KERNEL, or "auto".

    Raises:
        ArtifactError: as `inspect`; also a missing custom operator, an unavailable device or kernel, weights that do
            not fit the dtype asked for, or golden vectors that fail under an untested torch.
    """
    path = Path(path)
    kernel = kernel_asked(kernel)
    manifest, golden = read(path)
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
    try:
        _choose(artifact, dtype or manifest.dtype, kernel)
    except MissingEngineError as error:
        raise ArtifactError(f"{path} has no compiled form here: {error}. Or use kernel='torch'") from None
    if _release(torch.__version__) != _release(manifest.torch_version):
        warnings.warn(
            f"{path} was made with torch {manifest.torch_version} and runs on {torch.__version__}: "
            "replaying its golden vectors",
            stacklevel=2,
        )
        artifact.verify()
    return artifact


def kernel_asked(kernel: str | None) -> str:
    """One of `KERNELS`: the one given, or that of the environment variable MLFF_KERNEL, or "auto".

    Raises:
        ArtifactError: another.
    """
    kernel = kernel or os.environ.get("MLFF_KERNEL") or "auto"
    if kernel not in KERNELS:
        raise ArtifactError(f"kernel {kernel!r}{suggest(kernel, KERNELS)}")
    return kernel


def load_jump(
    path: Path, device: str | torch.device, dtype: Dtype | None
) -> tuple[Manifest, list[GoldenJump], nn.Module, torch.device]:
    """Manifest, golden vectors and program of a jump, for `mlff_engines.kstep.learned`.

    Raises:
        ArtifactError: as `load`; also another kind of artifact.
    """
    manifest, golden = read(path)
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
    wanted: Running = "torch"
    if kernel in ("auto", "fused") and on_cpu and not missing and available():
        wanted = "fused"
    elif kernel == "compiled" or (kernel == "auto" and _package(artifact, dtype).is_file()):  # never made unasked
        wanted = "compiled"
    if manifest.kernel == "torch" and dtype != manifest.dtype:
        _cast(artifact.program, dtype, manifest.dtype)
        artifact.dtype = DTYPES[dtype]
        if dtype == "float64":  # isolated atoms were evaluated in float32
            artifact.program.load_state_dict(artifact.eager().state_dict())
    if wanted == manifest.kernel and (wanted == "torch" or dtype == manifest.dtype):
        return
    potential = _potential(artifact, dtype)
    artifact.module, artifact.dtype, artifact.kernel = potential, DTYPES[dtype], "torch"
    try:
        if wanted == "fused":
            artifact.module = fuse(potential, manifest.architectures)
        elif wanted == "compiled":
            signature = Signature(INPUTS, manifest.outputs, artifact.dtype, artifact.device)
            artifact.module = compiled(artifact, _package(artifact, dtype), lambda: potential, signature)
        artifact.kernel = wanted
    except (ArtifactError, MissingEngineError) as error:
        if kernel == wanted:
            raise
        warnings.warn(f"{error}. Plain torch is used", KernelWarning, stacklevel=3)


def _potential(artifact: Artifact, dtype: Dtype) -> Potential | Ensemble:
    """Plain torch code in `dtype`, with the weights of `artifact`."""
    potential = artifact.eager()
    set_dtype(potential, DTYPES[dtype])
    return potential.eval().to(artifact.device)


def _package(artifact: Artifact, dtype: Dtype) -> Path:
    return place(artifact.manifest.sha256, DTYPES[dtype], artifact.device)


class Verified(Protocol):
    """A loaded artifact, of a potential or a jump."""

    module: nn.Module

    def verify(self, advice: str) -> object:
        """Replay the golden vectors by `module`."""


def compiled(loaded: Verified, path: Path, eager: Callable[[], nn.Module], signature: Signature) -> Compiled:
    """The package at `path`, made from `eager()` if need be; it reproduces the golden vectors of `loaded`.

    Raises:
        ArtifactError: it does not.
        MissingEngineError: it cannot be made or loaded.
    """

    def check(module: Compiled) -> None:
        trial = copy.copy(loaded)
        trial.module = module
        trial.verify(f"So {path} is not this artifact. Delete it if it is there, or use kernel='torch'")

    return package(path, eager, signature, check)


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
