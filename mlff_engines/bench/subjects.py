"""What can be timed here: our student at every level, and other packages whose environments are at hand."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mlff_engines.bench import ours
from mlff_engines.bench.run import Subject
from mlff_engines.errors import ConfigError, MLFFError, suggest
from mlff_engines.export import export
from mlff_engines.foreign import environments
from mlff_engines.foreign.schnetpack import import_schnetpack, make_untrained

Echo = Callable[[str], None]
SCRIPTS = Path(__file__).parent / "theirs"
# name -> the file that runs in the environment of that name
PEERS = {
    "schnetpack": "schnetpack_painn.py",
    "mace": "mace_model.py",
    "nequip": "nequip_model.py",
    "so3krates": "so3lr_model.py",
}
SAME_WEIGHTS = "mlff-schnetpack"


def all_subjects(
    folder: Path, artifact: Path | None = None, peers: Sequence[str] = (), echo: Echo = lambda line: None
) -> list[Subject]:
    """Every subject.

    | name                       | what it is                                                                      |
    |----------------------------|---------------------------------------------------------------------------------|
    | `mlff`                     | the student alone: energy and forces, edges given; fused kernel                 |
    | `mlff-eager`               | the same in plain torch                                                         |
    | `mlff/evaluator`           | positions in, energy, forces and virial out: with the neighbour list            |
    | `mlff/core`, `mlff/ase`, … | a whole step of molecular dynamics there                                        |
    | `schnetpack`, …            | another package's model alone, edges given where it takes them                  |
    | `schnetpack/ase`, …        | a whole step in ASE with that package's calculator                              |
    | `mlff-schnetpack`          | our PaiNN with the weights of `schnetpack`, see `mlff import schnetpack`        |

    Args:
        folder: for what has to be made.
        artifact: the student; by default our default one with random weights.
        peers: those whose environments are made if need be. Others take part where they are at hand.
        echo: gets lines of progress.

    Raises:
        ConfigError: an unknown peer.
    """
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise ConfigError(f"unknown peer {unknown[0]!r}{suggest(unknown[0], PEERS)}")
    folder.mkdir(parents=True, exist_ok=True)
    options = {"artifact": str((artifact or ours.default_student(folder)).absolute()), "folder": str(folder.absolute())}
    fused = Subject("mlff", "mlff_engines.bench.ours", options=options, environment={"MLFF_KERNEL": "fused"})
    found = [fused, replace(fused, what="mlff-eager", environment={"MLFF_KERNEL": "torch"})]
    found += [replace(fused, what=f"mlff/{level}", level=level) for level in ours.LEVELS[1:]]
    for name, script in PEERS.items():
        python: Path | None = None
        missing: str | None = None
        try:
            python = environments.make(name, echo) if name in peers else environments.at_hand(name)
        except MLFFError as error:
            missing = str(error)
        if python is None and missing is None:
            continue
        peer = Subject(
            name,
            str(SCRIPTS / script),
            python=str(python),
            missing=missing,
            options={"folder": str(environments.folder(name))},
            environment={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},  # their files are pickles, made here
        )
        if name == "schnetpack" and python is not None:
            same, peer = _same_weights(fused, peer, folder, python, echo)
            found.append(same)
        found += [peer, replace(peer, what=f"{name}/ase", level="ase")]
    return found


def chosen(subjects: Sequence[Subject], patterns: Sequence[str]) -> list[Subject]:
    """Those whose names match one of the patterns, such as `mlff/*`.

    Raises:
        ConfigError: a pattern matches none.
    """
    names = [subject.what for subject in subjects]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"nothing to time is called {pattern!r}{suggest(pattern, names)}")
    return [s for s in subjects if not patterns or any(fnmatch.fnmatch(s.what, pattern) for pattern in patterns)]


def _same_weights(fused: Subject, peer: Subject, folder: Path, python: Path, echo: Echo) -> tuple[Subject, Subject]:
    """One untrained model in SchNetPack and here."""
    echo("making one PaiNN of SchNetPack with random weights, and importing it")
    model, artifact = folder / "schnetpack.model", folder / "schnetpack.pt"
    try:
        make_untrained(model, python)
        import_schnetpack(model, folder / "schnetpack", elements=ours.ELEMENTS, unit="meV", python=python)
        export([folder / "schnetpack"], artifact, overwrite=True)
    except MLFFError as error:
        return replace(fused, what=SAME_WEIGHTS, missing=str(error)), replace(peer, missing=str(error))
    options = {**fused.options, "artifact": str(artifact.absolute())}
    same = replace(fused, what=SAME_WEIGHTS, options=options)
    return same, replace(peer, options={**peer.options, "model": str(model.absolute())})
