"""LAMMPS with the Python coupling of ML-IAP, built from source: once per source, Python and MPI, kept in the cache.

A build that was stopped goes on where it stopped; what it makes takes its place only when it is complete.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mlff_engines import native
from mlff_engines.errors import MissingEngineError
from mlff_engines.files import replacing
from mlff_lammps.source import EDITS, Echo, origin_of, output_of, unpacked

PACKAGES = (
    *("EXTRA-COMPUTE", "EXTRA-PAIR", "KSPACE", "MANYBODY", "ML-IAP", "ML-SNAP", "MOLECULE"),
    *("PLUGIN", "PYTHON", "RIGID"),
)
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "on",
    "BUILD_MPI": "on",
    "BUILD_OMP": "off",
    "MLIAP_ENABLE_PYTHON": "on",
    "FFT": "KISS",
    "WITH_JPEG": "off",
    "WITH_PNG": "off",
    "WITH_FFMPEG": "off",
    "WITH_GZIP": "off",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "on",
    **{f"PKG_{package}": "on" for package in PACKAGES},
}
LAUNCHER = "lmp-mliap"
UNBUFFERED = "PYTHONUNBUFFERED"  # makes the Python inside LAMMPS drop what LAMMPS has read of a deck on its input
COMPLETE = "build.json"


@dataclass(frozen=True)
class Build:
    """A LAMMPS with `pair_style mliap unified`, in `folder` of the cache."""

    folder: Path

    @property
    def executable(self) -> Path:
        """`lmp`; it needs `environment`."""
        return self.folder / "bin" / "lmp"

    @property
    def paths(self) -> dict[str, list[Path]]:
        """Folders that the lists of folders of this name must begin with.

        An embedded Python takes its environment from the `python3` that it finds first.
        """
        libraries = [mpi_library(), sysconfig.get_config_var("LIBDIR")]
        return {
            "PATH": [Path(sys.executable).parent],
            "LD_LIBRARY_PATH": [Path(path) for path in libraries if path],
            "PYTHONPATH": [self.folder / "python"],
        }

    def environment(self) -> dict[str, str]:
        """The variables with which `executable`, and `import lammps` in Python, find all they need."""
        found = _before(self.paths)
        found.pop(UNBUFFERED, None)
        return found

    @property
    def about(self) -> dict[str, str]:
        """Version of LAMMPS and what it was built from and with."""
        content: dict[str, str] = json.loads((self.folder / COMPLETE).read_text())
        return content


def cache() -> Path:
    """Where builds are kept."""
    return native.cache() / "lammps"


def find_build() -> Build:
    """The build made last for this Python and MPI.

    Raises:
        MissingEngineError: there is none.
    """
    current = _current()
    if not (current / COMPLETE).is_file():
        raise MissingEngineError(
            "pair_style mliap needs a LAMMPS with the Python coupling of ML-IAP, which no wheel has. Build it once, "
            "in about 15 core minutes: mlff lammps build"
        )
    return Build(current.resolve())


def build_lammps(source: Path | None = None, *, jobs: int | None = None, echo: Echo = lambda line: None) -> Build:
    """Build LAMMPS, or find it built, and write the launcher `lmp-mliap` beside this Python.

    Args:
        source: folder or archive of a LAMMPS release; None takes Debian's source package.
        jobs: compilers at a time; by default one for each core.
        echo: is told of progress.

    Raises:
        MissingEngineError: a tool is missing, or the build failed.
        ConfigError: the source cannot be had, or is none of LAMMPS.
    """
    jobs = jobs or len(os.sched_getaffinity(0))
    tools = _tools()
    origin = origin_of(source)
    about = {
        "origin": origin,
        "edits": json.dumps(EDITS),
        "options": shlex.join(f"{k}={v}" for k, v in OPTIONS.items()),
        **_surroundings(tools),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    target, work = cache() / key, cache() / f"{key}.work"
    with native.locked(cache() / f"{key}.lock", lambda: echo("waiting for another build")) as lock:
        if not (target / COMPLETE).is_file():
            work.mkdir(parents=True, exist_ok=True)
            tree = unpacked(source, work, echo)
            _compile(tree, work, tools, jobs, lock, echo)
            _collect(tree, work, about, target)
            shutil.rmtree(work)
    link = cache() / f".{key}.{os.getpid()}"
    link.symlink_to(key)
    link.replace(_current())
    build = Build(target)
    write_launcher(build)
    return build


def mpi_library() -> Path | None:
    """Folder of the MPI library in the mpich wheel, if that is installed."""
    try:
        files = metadata.files("mpich") or ()
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())).resolve().parent for f in files if f.name == "libmpi.so"), None)


def _tools() -> dict[str, str]:
    """Paths of compilers and builders; those of PyPI are fetched later.

    Raises:
        MissingEngineError: one that only the system can give is missing.
    """
    compiler = native.compiler()
    scripts = Path(sysconfig.get_path("scripts"))
    mpi = shutil.which("mpicxx", path=str(scripts)) or shutil.which("mpicxx")
    python = sysconfig.get_config_var("LDLIBRARY") or ""
    if mpi is None:
        raise MissingEngineError("no mpicxx: pip install mpich, or load your machine's MPI module")
    if not python.endswith((".so", ".dylib")):
        raise MissingEngineError(
            f"{sys.executable} has no shared library (libpython{sysconfig.get_python_version()}.so) for LAMMPS. "
            "Use the Python of your distribution or conda, or build yours with --enable-shared"
        )
    return {"compiler": compiler, "mpi": mpi}


def _surroundings(tools: Mapping[str, str]) -> dict[str, str]:
    """What a build is for: another compiler, Python or MPI needs another one."""
    version = subprocess.run([tools["compiler"], "-dumpfullversion", "-dumpversion"], capture_output=True, text=True)
    return {"compiler": f"{Path(tools['compiler']).name} {version.stdout.strip()}", **_runtime(tools["mpi"])}


def _runtime(mpi: str | None = None) -> dict[str, str]:
    mpi = mpi or shutil.which("mpicxx", path=sysconfig.get_path("scripts")) or shutil.which("mpicxx") or ""
    in_wheel = Path(mpi).parent == Path(sysconfig.get_path("scripts"))
    return {
        "python": f"{sysconfig.get_python_version()} {sysconfig.get_config_var('LIBDIR')}",
        # the wheel's library is found wherever it is installed
        "mpi": f"mpich {metadata.version('mpich').split('.')[0]}" if in_wheel else mpi,
    }


def _current() -> Path:
    runtime = hashlib.sha256(json.dumps(_runtime()).encode()).hexdigest()[:16]
    return cache() / f"current-{runtime}"


def _compile(tree: Path, work: Path, tools: Mapping[str, str], jobs: int, lock: int, echo: Echo) -> None:
    extra = _from_pypi(work, echo)
    environment = {**os.environ, **extra}
    path = environment.get("PATH")
    rpath = ["$ORIGIN/../lib", mpi_library(), sysconfig.get_config_var("LIBDIR")]
    options = {
        **OPTIONS,
        "CMAKE_CXX_COMPILER": tools["compiler"],
        "MPI_CXX_COMPILER": tools["mpi"],
        "MPI_CXX_SKIP_MPICXX": "on",
        "Python_EXECUTABLE": sys.executable,
        "Cythonize_EXECUTABLE": shutil.which("cythonize", path=path),
        "CMAKE_INSTALL_RPATH": ";".join(str(p) for p in rpath if p),
    }
    folder = work / "build"
    log = work / "build.log"
    cmake, ninja = (str(shutil.which(name, path=path)) for name in ("cmake", "ninja"))
    definitions = [word for name, value in options.items() for word in ("-D", f"{name}={value}")]
    echo("configuring")
    with log.open("w") as file:
        command = [cmake, "-S", str(tree / "cmake"), "-B", str(folder), "-G", "Ninja", *definitions]
        command.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    _check(done.returncode, log, "configuring")
    started, told, steps = time.monotonic(), -1, 0
    compiling = [ninja, "-C", str(folder), f"-j{jobs}"]
    piped = subprocess.PIPE
    # should this process be killed, the lock stays with ninja
    with (
        log.open("a") as file,
        subprocess.Popen(
            compiling, stdout=piped, stderr=subprocess.STDOUT, text=True, env=environment, pass_fds=[lock]
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if match := re.match(r"\[(\d+)/(\d+)\]", line):
                # short lists of steps come before and in between
                steps = max(steps, int(match[2]))
                now = 20 * int(match[1]) // steps if int(match[2]) == steps > 50 else told
                if now > told:
                    told = now
                    minutes = (time.monotonic() - started) / 60
                    echo(f"compiling: {5 * now:3d} % of {steps} steps, {minutes:.1f} min on {jobs} cores")
    _check(process.returncode, log, "compiling")


def _check(returncode: int, log: Path, doing: str) -> None:
    if returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise MissingEngineError(f"{doing} LAMMPS failed; the whole output is in {log}. It ends:\n{last}")


def _from_pypi(work: Path, echo: Echo) -> dict[str, str]:
    """Cython, and cmake and ninja where the system has none; the variables to find them."""
    wanted = {"cython": "cythonize", "cmake": "cmake", "ninja": "ninja"}
    search = _before({"PATH": [Path(sys.executable).parent]})["PATH"]
    missing = [package for package, program in wanted.items() if shutil.which(program, path=search) is None]
    if not missing:
        return {"PATH": search}
    tools = work / "tools"
    if not tools.is_dir():
        if importlib.util.find_spec("pip") is None:
            raise MissingEngineError(f"{sys.executable} has no pip: install {', '.join(missing)}")
        echo(f"fetching {', '.join(missing)}")
        partial = work / "tools.partial"
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        output_of([*pip, "--target", str(partial), *missing], f"install {', '.join(missing)}")
        partial.replace(tools)
    found = _before({"PYTHONPATH": [tools]})
    return {"PATH": os.pathsep.join([str(tools / "bin"), search]), "PYTHONPATH": found["PYTHONPATH"]}


def _collect(tree: Path, work: Path, about: Mapping[str, str], target: Path) -> None:
    """What is needed to run, in a folder that takes its name only when complete."""
    staging = work / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    built = work / "build"
    (staging / "bin").mkdir(parents=True)
    (staging / "lib").mkdir()
    shutil.copy2(built / "lmp", staging / "bin")
    (library,) = {path.resolve() for path in built.glob("liblammps.so*")}
    shutil.copy2(library, staging / "lib" / "liblammps.so.0")
    # below a folder `python`, LAMMPS' package does not take the version of an installed wheel for its own
    shutil.copytree(tree / "python" / "lammps", staging / "python" / "lammps")
    (staging / "python" / "lammps" / "liblammps.so").symlink_to("../../lib/liblammps.so.0")
    said = output_of([str(staging / "bin" / "lmp"), "-h"], "try the LAMMPS just built", Build(staging).environment())
    version = re.search(r"Simulator - (\d+ \w+ \d+)", said)
    if version is None or not {"ML-IAP", "PYTHON"} <= set(said.split()):
        raise MissingEngineError(f"the LAMMPS just built has no ML-IAP with PYTHON; see {work / 'build.log'}")
    (staging / COMPLETE).write_text(json.dumps({"version": version[1], **about}, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    staging.replace(target)


def launcher_path() -> Path:
    """Where `lmp-mliap` stands."""
    return Path(sysconfig.get_path("scripts")) / LAUNCHER


def write_launcher(build: Build) -> Path:
    """`lmp-mliap` beside this Python: LAMMPS with all it needs, from any shell and under mpiexec."""
    path = launcher_path()
    lines = ["#!/bin/sh", f"unset {UNBUFFERED}"]
    for name, folders in build.paths.items():
        first = shlex.quote(os.pathsep.join(map(str, folders)))
        lines += [f'{name}={first}"${{{name}:+:${name}}}"', f"export {name}"]
    lines += [f'exec {shlex.quote(str(build.executable))} "$@"', ""]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines))
        temporary.chmod(0o755)
    return path


def _before(paths: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """The environment with `paths` in front of its lists of folders."""
    found = dict(os.environ)
    for name, folders in paths.items():
        found[name] = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(name)])])
    return found
