"""`mlff lammps build` on a source that compiles in a second: kept, resumed, never half there, and clear when it fails.

The real LAMMPS that it makes is what every test of `pair_style mliap` runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import requirements
from mlff_engines.errors import ConfigError, MissingEngineError
from mlff_lammps import build, source
from mlff_lammps.build import build_lammps, find_build

requirements.require_engine("lammps")
requirements.require_compiler()
if shutil.which("cmake") is None or shutil.which("ninja") is None:
    pytest.skip("needs cmake and ninja", allow_module_level=True)

CMAKE = """cmake_minimum_required(VERSION 3.16)
project(toy CXX)
add_library(lammps SHARED ../src/toy.cpp)
set_target_properties(lammps PROPERTIES SOVERSION 0)
add_executable(lmp ../src/main.cpp)
target_link_libraries(lmp PRIVATE lammps)
"""
MAIN = """#include <cstdio>
extern "C" const char *packages();
int main() { std::printf("Large-scale Simulator - 4 Feb 2025\\nInstalled packages:\\n%s\\n", packages()); }
"""
TOY = 'extern "C" const char *packages() { return "ML-IAP PYTHON"; }\n'


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy in the layout of LAMMPS' source, an empty cache, and a place for the launcher."""
    folder = tmp_path / "lammps-toy"
    for name, text in {
        "cmake/CMakeLists.txt": CMAKE,
        "src/version.h": '#define LAMMPS_VERSION "4 Feb 2025"\n',
        "src/main.cpp": MAIN,
        "src/toy.cpp": TOY,
        "src/ML-IAP/mliap_data.cpp": "keep\n    memory->grow(lmp_firstneigh, natomneigh, nneigh_max, 0);\nkeep\n",
        "python/lammps/__init__.py": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "cythonize").write_text("#!/bin/sh\n")  # else it is fetched from PyPI
    (programs / "cythonize").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "launcher_path", lambda: tmp_path / "lmp-mliap")
    return folder


def test_is_built_once_and_found_again(tree: Path) -> None:
    with pytest.raises(MissingEngineError, match="mlff lammps build"):
        find_build()
    told: list[str] = []
    made = build_lammps(tree, jobs=1, echo=told.append)
    assert "configuring" in told
    assert find_build() == made
    assert made.about["version"] == "4 Feb 2025"
    assert (made.folder / "python" / "lammps" / "liblammps.so").exists()
    said = subprocess.run([tree.parent / "lmp-mliap"], env={}, capture_output=True, text=True)
    assert "4 Feb 2025" in said.stdout, said.stderr
    assert [path.name for path in build.cache().glob("*.work")] == []
    again: list[str] = []
    assert build_lammps(tree, jobs=1, echo=again.append) == made
    assert again == []
    (tree / "src" / "toy.cpp").write_text(TOY + "\n")
    assert build_lammps(tree, jobs=1) != made


def test_archive_and_changes_to_the_source(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "toy.tar.gz", "w:gz") as packed:
        packed.add(tree, "lammps-4Feb2025")
    unpacked = source.unpacked(tmp_path / "toy.tar.gz", tmp_path / "work", print)
    assert (unpacked / "src" / "ML-IAP" / "mliap_data.cpp").read_text() == "keep\nkeep\n"
    assert "lmp_firstneigh" in (tree / "src" / "ML-IAP" / "mliap_data.cpp").read_text()
    assert build_lammps(tmp_path / "toy.tar.gz", jobs=1).executable.is_file()


def test_killed_build_leaves_nothing_that_is_used_and_goes_on(tree: Path) -> None:
    slow = tree / "slow"
    slow.touch()
    script = tree / "wait.sh"
    script.write_text(f"while [ -e {slow} ]; do sleep 0.1; done\ntouch waited\n")
    (tree / "cmake" / "CMakeLists.txt").write_text(
        f"{CMAKE}add_custom_command(OUTPUT waited COMMAND sh {script})\n"
        "add_custom_target(wait ALL DEPENDS waited)\nadd_dependencies(lmp wait)\n"
    )
    program = "import sys; from pathlib import Path; from mlff_lammps import build\n"
    program += "build.launcher_path = lambda: Path(sys.argv[1]).parent / 'lmp-mliap'\n"
    program += "build.build_lammps(Path(sys.argv[1]), jobs=2)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tree)], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(build.cache().glob("*.work/build/liblammps.so*")):
            assert process.poll() is None, "it ended"
            assert time.monotonic() < deadline, "the library was not built"
            time.sleep(0.1)
        time.sleep(1.0)  # linked
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with pytest.raises(MissingEngineError, match="mlff lammps build"):
        find_build()
    (library,) = {path.resolve() for path in build.cache().glob("*.work/build/liblammps.so*")}
    compiled = library.stat().st_mtime_ns
    slow.unlink()
    work = library.parent.parent
    kept: list[int] = []
    made = build_lammps(tree, jobs=1, echo=lambda line: kept.append(library.stat().st_mtime_ns))
    assert set(kept) == {compiled}  # what was compiled is not compiled again
    assert not work.exists()
    assert find_build() == made


def test_failures_say_what_to_do(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "src" / "toy.cpp").write_text("nonsense\n")
    with pytest.raises(MissingEngineError, match=r"(?s)compiling LAMMPS failed.*build\.log.*nonsense"):
        build_lammps(tree, jobs=1)
    (tree / "src" / "toy.cpp").write_text(TOY.replace(" PYTHON", ""))
    with pytest.raises(MissingEngineError, match="has no ML-IAP with PYTHON"):
        build_lammps(tree, jobs=1)
    with pytest.raises(ConfigError, match="neither an archive nor a folder"):
        build_lammps(tmp_path)
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08\x00cut")
    with pytest.raises(ConfigError, match=r"cannot unpack .*cut\.tar\.gz"):
        build_lammps(tmp_path / "cut.tar.gz")
    monkeypatch.setenv("CXX", "absent-compiler")
    with pytest.raises(MissingEngineError, match=r"no C\+\+ compiler 'absent-compiler'\. Install g\+\+"):
        build_lammps(tree)
    with pytest.raises(MissingEngineError, match="mlff lammps build"):
        find_build()


NO_NETWORK = """#!/bin/sh
case "$*" in
  indextargets*) echo http://mirror.invalid/debian/ ;;
  *update) echo "W: Failed to fetch http://mirror.invalid" >&2 ;;
  *) echo "E: Unable to find a source package" >&2; exit 100 ;;
esac
"""


@pytest.mark.parametrize(
    ("apt", "message"),
    [
        (None, "no apt-get"),
        ("#!/bin/sh\necho http://mirror.invalid/ubuntu\n", "no Debian mirror"),
        (NO_NETWORK, r"(?s)at http://mirror\.invalid/debian/: is that within reach\?.*Failed to fetch.*Unable to find"),
    ],
    ids=["no apt", "no Debian", "no network"],
)
def test_without_a_debian_mirror_an_archive_is_asked_for(
    tree: Path, monkeypatch: pytest.MonkeyPatch, apt: str | None, message: str
) -> None:
    programs = tree.parent / "bin"
    for name in ("apt-get", "apt-cache") if apt else ():
        (programs / name).write_text(str(apt))
        (programs / name).chmod(0o755)
    for name in ("g++", "mpicxx", "sh"):
        (programs / name).symlink_to(shutil.which(name) or Path(sys.executable).parent / name)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(ConfigError, match=message) as caught:
        build_lammps()
    assert "--source ARCHIVE" in str(caught.value)
