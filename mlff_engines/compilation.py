"""Models compiled by torch itself (AOTInductor), of any architecture, for the machine at hand.

torch traces a model together with its gradient, for any number of atoms, edges and structures, and writes C++ for it,
or Triton for a GPU. The package that comes of it holds weights and machine code. It stays in the user's cache: an
artifact is what is shipped, and a package takes its place only after it has reproduced the artifact.

On the CPU a package uses one thread, matrix products apart. For several, torch would add edges up by atomic operations,
which cost as much again as all the rest and give other digits in each run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from mlff_engines import native
from mlff_engines.errors import MissingEngineError
from mlff_engines.files import replacing, sha256_of
from mlff_engines.graph import Graph, TensorSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Signature:
    """What a compiled model takes and returns.

    Attributes:
        inputs: contract of the graph; dimensions are numbers, or N, E and B for any.
        outputs: names of what it returns.
        dtype, device: for which it is made.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Sequence[str]
    dtype: torch.dtype
    device: torch.device

    @property
    def kinds(self) -> dict[str, torch.dtype]:
        """dtype of each input."""
        named = {"float": self.dtype, "float64": torch.float64, "int64": torch.int64, "bool": torch.bool}
        return {name: named[spec.dtype] for name, spec in self.inputs.items()}


class Compiled(nn.Module):
    """Takes the place of the module that `package` was made from.

    Args:
        package: the file.
        signature: of that module.

    Raises:
        MissingEngineError: torch cannot load it.
    """

    def __init__(self, package: Path, signature: Signature) -> None:
        super().__init__()
        self.package, self.outputs, self.device = package, list(signature.outputs), signature.device
        self.kinds = signature.kinds
        device = signature.device
        index = -1 if device.index is None else device.index
        try:
            # what `torch._inductor.aoti_load_package` makes, but that takes seconds to import
            self.run = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, index).run
        except TypeError:
            raise MissingEngineError(f"compiled models need a newer torch than {torch.__version__}") from None
        except RuntimeError as error:
            cause = str(error).strip().splitlines()[0]
            raise MissingEngineError(f"cannot load {package}: {cause}. Delete it, and it is compiled again") from None

    def forward(self, graph: Graph) -> Graph:
        """As that module; what comes out cannot be differentiated."""
        # machine code trusts its arguments: another stride or dtype would be read as this one
        inputs = [graph[name].to(self.device, kind).contiguous() for name, kind in self.kinds.items()]
        with torch.no_grad():
            return dict(zip(self.outputs, self.run(inputs), strict=True))


def require_intact(package: Path) -> None:
    """Compare a package with the hash beside it, which torch's own reader does not: it would run what is damaged.

    Raises:
        MissingEngineError: it is not what was compiled, or its hash is not there.
    """
    try:
        intact = sha256_of(package) == _hash_of(package).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        intact = False
    if not intact:
        raise MissingEngineError(f"{package} is damaged. Delete it, and it is compiled again")


def place(sha256: str, dtype: torch.dtype, device: torch.device) -> Path:
    """Where the package of an artifact is, or would be.

    Args:
        sha256: of the artifact.
        dtype, device: to run it in.
    """
    return folder(device) / f"{sha256}-{str(dtype).removeprefix('torch.')}.pt2"


def folder(device: torch.device) -> Path:
    """For the packages that this torch makes for this processor or GPU."""
    key = {
        "builder": Path(__file__).read_text(encoding="utf-8"),
        "torch": [torch.__version__, torch.version.cuda],
        "processor": [native.processor(), torch.backends.cpu.get_cpu_capability()],
        "gpu": None if device.type == "cpu" else str(torch.cuda.get_device_properties(device).name),
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return native.cache() / "compiled" / f"{device.type}-{digest[:16]}"


def package(
    out: Path, module: Callable[[], nn.Module], signature: Signature, check: Callable[[Compiled], object]
) -> Compiled:
    """The package at `out`, made first if it is not there.

    Args:
        out: its `place`.
        module: makes what is compiled: in evaluation mode, with the dtype and on the device of `signature`.
        check: raises if a package does not reproduce the artifact; such a one is not kept.

    Raises:
        MissingEngineError: it cannot be made or loaded.
    """

    def tried(path: Path) -> Compiled:
        found = Compiled(path, signature)
        check(found)
        return found

    if not out.is_file():
        _build(out, module(), signature, tried)
    require_intact(out)
    return tried(out)


def _build(out: Path, module: nn.Module, signature: Signature, check: Callable[[Path], object]) -> None:
    """Compile `module` into `out`, unless another process does so first; on one core it takes a minute.

    Raises:
        MissingEngineError: no compiler, torch cannot compile it, or the cache cannot be written.
    """
    native.compiler()
    try:
        with native.locked(out.with_suffix(".lock")):
            if out.is_file():
                return
            logger.warning("compiling %s for this machine, once: about a minute", type(module).__name__)
            with replacing(out) as temporary:
                _compile(module, signature, temporary)
                check(temporary)
                with replacing(_hash_of(out)) as digest:
                    digest.write_text(sha256_of(temporary), encoding="ascii")
    except OSError as error:
        raise MissingEngineError(
            f"cannot compile into {out.parent}: {error.strerror}. Make it writable, or set XDG_CACHE_HOME"
        ) from None


def _compile(module: nn.Module, signature: Signature, out: Path) -> None:
    from torch._inductor.utils import fresh_inductor_cache  # takes seconds

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        found: Graph = module(dict(zip(signature.inputs, inputs, strict=True)))
        return tuple(found[name] for name in signature.outputs)

    # all different, and no 0, 1 or 3: tracing takes equal numbers for the same one, and these for constants
    sizes = {"N": 7, "E": 19, "B": 5}
    any_size = {name: torch.export.Dim(name) for name in sizes}
    shapes = [spec.shape.strip("()").replace(" ", "").strip(",").split(",") for spec in signature.inputs.values()]
    example = tuple(
        torch.ones([sizes.get(axis) or int(axis) for axis in axes], dtype=kind, device=signature.device)
        for axes, kind in zip(shapes, signature.kinds.values(), strict=True)
    )
    dynamic = tuple({i: any_size[axis] for i, axis in enumerate(axes) if axis in sizes} for axes in shapes)
    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            fresh_inductor_cache(dir=scratch),  # else it keeps all that it writes
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # torch's, of itself
            # the gradient becomes part of the program
            traced = make_fx(flat, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
            program = torch.export.export(traced, example, dynamic_shapes=dynamic)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(out), inductor_configs={"cpp.threads": 1, "compile_threads": 1}
            )
    except OSError:
        raise
    except Exception as error:  # torch has no class for what it cannot compile
        words = str(error).strip().splitlines() or [""]
        raise MissingEngineError(
            f"torch {torch.__version__} cannot compile the model ({type(error).__name__}: {words[0]})"
        ) from error


def _hash_of(package: Path) -> Path:
    return package.with_suffix(".sha256")
