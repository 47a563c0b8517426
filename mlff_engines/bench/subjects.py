"""What can be timed here: our student at every level, and other packages whose environments are at hand."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlff_engines.artifact import load
from mlff_engines.bench import ours
from mlff_engines.bench.run import Subject
from mlff_engines.bench.systems import named
from mlff_engines.checkpoint import load_checkpoint, set_dtype
from mlff_engines.errors import ArtifactError, ConfigError, MLFFError, suggest
from mlff_engines.evaluator import Evaluator
from mlff_engines.export import export
from mlff_engines.foreign import environments
from mlff_engines.foreign.schnetpack import import_schnetpack, make_untrained

Echo = Callable[[str], None]
SCRIPTS = Path(__file__).parent / "theirs"


@dataclass(frozen=True)
class Peer:
    """Another package.

    Attributes:
        script: the file of `theirs` that runs in its environment.
        environment: where that is; see `mlff_engines.foreign.environments`.
        options: for the script.
    """

    script: str
    environment: str
    options: dict[str, Any] = field(default_factory=dict)


PEERS = {
    "schnetpack": Peer("schnetpack_painn.py", "schnetpack"),
    "torchmdnet": Peer("torchmdnet_model.py", "torchmdnet"),
    "mace": Peer("mace_model.py", "mace"),
    "nequip": Peer("nequip_model.py", "nequip"),
    "allegro": Peer("nequip_model.py", "nequip", {"architecture": "allegro"}),
    "deepmd": Peer("deepmd_model.py", "deepmd"),
    "so3krates": Peer("so3lr_model.py", "so3krates"),
}
KERNELS = {"mlff-eager": "torch", "mlff-compiled": "compiled"}
SAME_WEIGHTS = "mlff-schnetpack"
TOLERANCE = 1e-5  # eV/Å, of forces in float32 with the same weights


def all_subjects(
    folder: Path, artifact: Path | None = None, peers: Sequence[str] = (), echo: Echo = lambda line: None
) -> list[Subject]:
    """Every subject.

    | name                       | what it is                                                                      |
    |----------------------------|---------------------------------------------------------------------------------|
    | `mlff`                     | the student alone: energy and forces, edges given; fused kernel                 |
    | `mlff-eager`               | the same in plain torch                                                         |
    | `mlff-compiled`            | the same, compiled by torch itself (AOTInductor); made once, in a minute        |
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
    found = [fused]
    found += [replace(fused, what=what, environment={"MLFF_KERNEL": kernel}) for what, kernel in KERNELS.items()]
    found += [replace(fused, what=f"mlff/{level}", level=level) for level in ours.LEVELS[1:]]
    for name, peer_of in PEERS.items():
        python: Path | None = None
        missing: str | None = None
        place = peer_of.environment
        try:
            python = environments.make(place, echo) if name in peers else environments.at_hand(place)
        except MLFFError as error:
            missing = str(error)
        if python is None and missing is None:
            continue
        peer = Subject(
            name,
            str(SCRIPTS / peer_of.script),
            python=str(python),
            missing=missing,
            options={**peer_of.options, "folder": str(environments.folder(place))},
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
    """One untrained model in SchNetPack and here, to the same forces."""
    echo("making one PaiNN of SchNetPack with random weights, and importing it")
    model, checkpoint, artifact = (folder / f"schnetpack{suffix}" for suffix in (".model", "", ".pt"))
    try:
        make_untrained(model, python)
        off = import_schnetpack(model, checkpoint, elements=ours.ELEMENTS, unit="eV", python=python)
        note = (
            f"`{SAME_WEIGHTS}` has the weights of `schnetpack`: its checkpoint gives SchNetPack's forces to {off:.0e} "
            f"eV/Å in float64, its kernel those of the checkpoint to {kernel_error(checkpoint):.0e} eV/Å in float32"
        )
        # timed with energies so small that the atoms hardly move
        import_schnetpack(model, checkpoint, elements=ours.ELEMENTS, unit="meV", python=python)
        export([checkpoint], artifact, overwrite=True)
    except MLFFError as error:
        return replace(fused, what=SAME_WEIGHTS, missing=str(error)), replace(peer, missing=str(error))
    options = {**fused.options, "artifact": str(artifact.absolute())}
    same = replace(fused, what=SAME_WEIGHTS, options=options, note=note)
    return same, replace(peer, options={**peer.options, "model": str(model.absolute())})


def kernel_error(checkpoint: Path) -> float:
    """Largest deviation of a force in float32, through the kernel, from the checkpoint's in float64, eV/Å.

    Raises:
        ArtifactError: it is larger than `TOLERANCE`.
    """
    potential, config = load_checkpoint(checkpoint)
    set_dtype(potential, torch.float64)
    exact = Evaluator(potential, config.domain, config.model["cutoff"], dtype=torch.float64)
    export([checkpoint], checkpoint.with_suffix(".float32.pt"), overwrite=True)
    evaluate = load(checkpoint.with_suffix(".float32.pt"), kernel="fused").evaluator()
    structures = [named(name).structure for name in ("aspirin", "water-192")]
    off = max(float(np.abs(evaluate(s).forces - exact(s).forces).max()) for s in structures)
    if off > TOLERANCE:
        raise ArtifactError(f"{checkpoint}: forces differ by {off:.1e} eV/Å in float32; allowed {TOLERANCE:g}")
    return off
