"""The potential "mlff" of OpenMM-ML: `MLPotential("mlff", model="student.pt")`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openmm import CustomCVForce, PythonForce, System
from openmm.app import Topology
from openmmml.mlpotential import MLPotentialImpl, MLPotentialImplFactory

from mlff_engines.errors import ConfigError, suggest
from mlff_openmm.force import NAME, MLFFForce
from mlff_openmm.kstep.corrector import add_corrected

OPTIONS = frozenset(inspect.signature(MLFFForce).parameters) - {"path", "topology", "atoms"}
CORRECTOR = "corrector"
EMBEDDING_OPTIONS = frozenset({"linkAtomDistances"})  # of createMixedSystem itself, which hands on all that it got


class MLFFPotentialImplFactory(MLPotentialImplFactory):
    """What OpenMM-ML finds in its entry-point group `openmmml.potentials`; it must import and start light."""

    def createImpl(self, name: str, model: str | Path | None = None, **args: Any) -> MLFFPotentialImpl:  # noqa: N802
        """The potential of the artifact `model`; any option of `MLFFForce` given here is the default of its Systems.

        Raises:
            ConfigError: no model, or an unknown option.
            ArtifactError: see `mlff_engines.manifest.inspect`.
        """
        _refuse_unknown(args, OPTIONS | {"model", CORRECTOR})
        if model is None:
            raise ConfigError(f'{name} needs an artifact: MLPotential("{name}", model="student.pt")')
        return MLFFPotentialImpl(Path(model), args)


class MLFFPotentialImpl(MLPotentialImpl):
    """Adds an `MLFFForce` to the Systems of `createSystem` and `createMixedSystem`.

    Both take the options of `MLFFForce` (charge, spin, device, ...); `charge` and `spin` are those of the ML atoms.
    `createSystem` takes a `corrector` besides, the true potential that the student stands for: then the student is in
    force group 0 and true minus student in group 1, for `mlff_openmm.hybrid_integrator`. See
    `mlff_openmm.kstep.corrector` for what it can be.

    OpenMM knows molecules by their classical bonds, and the ML atoms have none among themselves: reporters with
    `enforcePeriodicBox=True`, the default in a box, wrap each by itself.
    """

    def __init__(self, model: Path, options: dict[str, Any]) -> None:
        from mlff_engines.manifest import inspect

        inspect(model)
        self.model, self.options = model.absolute(), options

    def addForces(  # noqa: N802
        self, topology: Topology, system: System, atoms: Iterable[int] | None, forceGroup: int, **args: Any
    ) -> None:
        """Called by OpenMM-ML.

        Raises:
            ConfigError: an unknown option, or atoms that already have a potential of ours.
            MLFFError: see `MLFFForce`.
        """
        chosen = None if atoms is None else list(atoms)
        corrector = args.get(CORRECTOR, self.options.get(CORRECTOR))
        _refuse_unknown(args, OPTIONS | {CORRECTOR} if chosen is None else OPTIONS | {CORRECTOR} | EMBEDDING_OPTIONS)
        if system.usesPeriodicBoundaryConditions() and topology.getPeriodicBoxVectors() is None:
            raise ConfigError(
                "the System is periodic and its Topology has no box; call topology.setPeriodicBoxVectors(...) first"
            )
        options = {name: value for name, value in (self.options | args).items() if name in OPTIONS}
        force = MLFFForce(self.model, topology, atoms=chosen, **options)
        _refuse_overlap(system, chosen)
        if corrector is not None:
            if chosen is not None:
                raise ConfigError("a corrector is the true potential of the whole System: use createSystem with it")
            add_corrected(system, topology, force, corrector)
            return
        force.setForceGroup(forceGroup)
        system.addForce(force)

    def getMLLongRange(self) -> bool:  # noqa: N802
        """False: every model of today's artifacts ends at its cutoff."""
        return False


def _refuse_unknown(args: Iterable[str], allowed: Iterable[str]) -> None:
    for name in args:
        if name not in allowed:
            raise ConfigError(f"unknown option {name!r}{suggest(name, allowed)}")


def _refuse_overlap(system: System, atoms: list[int] | None) -> None:
    """Potentials on different atoms are fine."""
    everything = range(system.getNumParticles())
    forces = list(system.getForces())
    for force in system.getForces():
        if isinstance(force, CustomCVForce):  # where interpolation hides them
            forces += [force.getCollectiveVariable(i) for i in range(force.getNumCollectiveVariables())]
    for force in forces:
        if isinstance(force, PythonForce) and force.getName() == NAME:
            both = set(atoms or everything) & set(force.getParticles() or everything)
            if both:
                raise ConfigError(
                    f"the System already has an mlff potential on {len(both)} of these atoms (the first is "
                    f"{min(both)}), and forces add up. Start from a System without it, or give the potentials "
                    "different atoms"
                )
