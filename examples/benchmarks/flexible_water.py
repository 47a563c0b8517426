"""Flexible TIP3P water by OpenMM, as an ASE calculator: a true potential that is cheap enough to measure drifts with.

python examples/benchmarks/flexible_water.py runs/water.xyz                        (a box of 64, settled)
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.langevin import Langevin
from ase.optimize import FIRE
from openmm import app, unit

from mlff_engines.bench.systems import named
from mlff_engines.units import energy_unit, length_unit

NM, KJ_PER_MOL = length_unit("nm"), energy_unit("kJ/mol")  # Å, eV
CUTOFF = 0.55  # nm, of Lennard-Jones and of the direct part of Ewald's sum


class FlexibleTIP3P(Calculator):
    """Harmonic bonds and angles (CHARMM's), PME; in float64.

    Atoms come as O, H, H of one molecule after another, in a box of at least 11 Å.
    """

    implemented_properties = ("energy", "forces")

    def __init__(self) -> None:
        super().__init__()
        self._context: openmm.Context | None = None

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = tuple(all_changes)
    ) -> None:
        """As ASE asks for."""
        super().calculate(atoms, properties, system_changes)
        if self._context is None or "numbers" in system_changes:
            self._context = _context(self.atoms)
        self._context.setPeriodicBoxVectors(*(np.asarray(self.atoms.cell) / NM))
        self._context.setPositions(self.atoms.positions / NM)
        state = self._context.getState(getEnergy=True, getForces=True)
        forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
        energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        self.results = {"energy": energy * KJ_PER_MOL, "forces": forces * KJ_PER_MOL / NM}


def _context(atoms: Atoms) -> openmm.Context:
    if atoms.get_chemical_symbols() != ["O", "H", "H"] * (len(atoms) // 3):
        raise ValueError(f"{atoms.get_chemical_formula()}: flexible TIP3P takes water, as O, H, H for each molecule")
    topology = app.Topology()
    topology.setPeriodicBoxVectors(np.asarray(atoms.cell) / NM)
    chain = topology.addChain()
    for _ in range(len(atoms) // 3):
        residue = topology.addResidue("HOH", chain)
        oxygen, *hydrogens = (
            topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")
        )
        for hydrogen in hydrogens:
            topology.addBond(oxygen, hydrogen)
    field = app.ForceField("tip3p.xml")
    system = field.createSystem(
        topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=CUTOFF,
        ewaldErrorTolerance=1e-5,
        rigidWater=False,
        removeCMMotion=False,
    )
    return openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))


def settled() -> Atoms:
    """64 molecules at 300 K."""
    box = named("water-192").structure
    atoms = Atoms(box.numbers, box.positions, cell=box.cell, pbc=box.pbc)
    atoms.calc = FlexibleTIP3P()
    FIRE(atoms, logfile=None).run(fmax=1.0, steps=200)
    rng = np.random.default_rng(0)
    Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.02 / units.fs, fixcm=False, rng=rng).run(4000)
    return atoms


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    settled().write(out)
