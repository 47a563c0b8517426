"""What is compiled once for the machine at hand and kept in the user's cache: where, with which compiler, by whom."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import cpp_extension

from mlff_engines.errors import MissingEngineError
from mlff_engines.files import replacing

logger = logging.getLogger(__name__)


def cache() -> Path:
    """The folder for what is built once: `mlff-engines` in $XDG_CACHE_HOME, which is ~/.cache by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlff-engines"


def compiler() -> str:
    """The C++ compiler: g++, or the one that CXX names.

    Raises:
        MissingEngineError: it is not there.
    """
    wanted = os.environ.get("CXX", "g++")
    found = shutil.which(wanted)
    if found is None:
        raise MissingEngineError(
            f"no C++ compiler {wanted!r}. Install g++ 11 or newer (Debian and Ubuntu: apt install g++; "
            "conda: conda install gxx), or name another with CXX"
        )
    return found


def operator_library(name: str, source: Path, *, flags: Sequence[str] = ()) -> Path:
    """The library of torch operators that `source` makes; compiled if there is none yet for this machine and torch.

    Args:
        name: of the library, for people.
        source: a C++ file; all files of its folder take part in the key.
        flags: for the compiler, besides those that torch and this processor ask for.

    Raises:
        MissingEngineError: no compiler, a folder that cannot be written, or a build that failed.
    """
    flags = [
        *("-std=c++20", "-O3", "-fPIC", "-shared", "-DNDEBUG", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
        "-mcpu=native" if platform.machine() == "aarch64" else "-march=native",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *flags,
    ]
    files = sorted(file for file in source.parent.iterdir() if file.suffix in {".cpp", ".h"})
    key = {
        "source": {file.name: file.read_text(encoding="utf-8") for file in files},
        "flags": flags,
        "torch": torch.__version__,
        "processor": processor(),
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    out = cache() / "kernels" / f"{name}-{digest[:16]}.so"
    if not out.is_file():  # no lock and no compiler needed once it is there
        try:
            with locked(out.with_suffix(".lock")):
                if not out.is_file():
                    _compile(source, flags, out)
        except OSError as error:
            raise MissingEngineError(
                f"cannot build into {out.parent}: {error.strerror}. Make it writable, or set XDG_CACHE_HOME"
            ) from None
    return out


def _compile(source: Path, flags: Sequence[str], out: Path) -> None:
    program = compiler()
    logger.warning("compiling %s for this machine, once: about half a minute", source.name)
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    # libtorch is in the process already; it registers itself, so the linker must not drop it as unused
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    with replacing(out) as temporary:
        command = [program, *flags, *includes, str(source), "-o", str(temporary), *libraries]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise MissingEngineError(
                f"{program} cannot compile {source.name} (exit code {done.returncode}); it needs C++20, as g++ 11 "
                "and newer have. Its first words:\n" + "\n".join(errors[:5])
            )


def processor() -> tuple[str, ...]:
    """What `-march=native` depends on: the architecture and, in order, the features of this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    features = [line.split(":", 1)[1] for line in lines if line.lower().startswith(("flags", "features"))]
    return platform.machine(), *sorted(set(features[0].split()) if features else ())


@contextmanager
def locked(file: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
    """One builder at a time; the lock goes with the processes that hold this descriptor.

    Args:
        file: the lock; its folder is made.
        waiting: called when another builder holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle.fileno()
