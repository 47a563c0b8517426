"""The teachers known by a short name: one row each. Any other ASE calculator is named by its import path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TeacherSpec:
    """One row of `TEACHERS`.

    `charge` and `multiplicity` say how the calculator takes them, as ``place:key`` (see `TeacherConfig`); None: it
    cannot use them. `required` options have no sensible default.
    """

    path: str
    install: str
    description: str
    level: str | None = None
    charge: str | None = None
    multiplicity: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()


TEACHERS: dict[str, TeacherSpec] = {
    "gfn2-xtb": TeacherSpec(
        path="tblite.ase:TBLite",
        install="tblite ase",
        description="GFN2-xTB semi-empirical tight binding, H-Rn (Bannwarth 2019); the default: no download, CPU",
        level="GFN2-xTB",
        charge="parameter:charge",
        multiplicity="parameter:multiplicity",
        options={"method": "GFN2-xTB", "verbosity": 0},
    ),
    "gfn1-xtb": TeacherSpec(
        path="tblite.ase:TBLite",
        install="tblite ase",
        description="GFN1-xTB semi-empirical tight binding, H-Rn (Grimme 2017); for periodic systems too",
        level="GFN1-xTB",
        charge="parameter:charge",
        multiplicity="parameter:multiplicity",
        options={"method": "GFN1-xTB", "verbosity": 0},
    ),
    "mace": TeacherSpec(
        path="mace.calculators:MACECalculator",
        install="mace-torch",
        description="a MACE model file; for one with charge and spin embeddings (MACE-OMOL) add "
        "`charge: info:charge`, `multiplicity: info:spin`",
        options={"device": "cpu", "default_dtype": "float64"},
        required=("model_paths",),
    ),
    "orb": TeacherSpec(
        path="orb_models.forcefield.calculator:ORBCalculator",
        install="'orb-models<0.6'",
        description="Orb v3, conservative (downloads its weights); for OrbMol set `model` and add "
        "`charge: info:charge`, `multiplicity: info:spin`",
        options={
            "model": {
                "call": "orb_models.forcefield.pretrained:orb_v3_conservative_inf_omat",
                "options": {"device": "cpu", "precision": "float32-highest", "compile": False},
            },
            "device": "cpu",
        },
    ),
    "so3krates-torch": TeacherSpec(
        path="so3krates_torch.calculator.so3:TorchkratesCalculator",
        install="so3krates-torch",
        description="a So3krates or SO3LR model file; if it was trained with charge and spin add "
        "`charge: info:charge`, `multiplicity: info:total_spin=S`",
        options={"device": "cpu", "default_dtype": "float64", "compute_stress": True},
        required=("model_paths",),
    ),
    "so3lr": TeacherSpec(
        path="so3krates_torch.calculator.so3:SO3LRCalculator",
        install="so3krates-torch",
        description="the pretrained SO3LR of so3krates-torch (Kabylda 2025), weights included, charge and spin",
        level="SO3LR",
        charge="info:charge",
        multiplicity="info:total_spin=S",
        options={"device": "cpu", "default_dtype": "float64", "compute_stress": True},
    ),
    "schnetpack": TeacherSpec(
        path="schnetpack.interfaces.ase_interface:SpkCalculator",
        install="schnetpack",
        description="a SchNetPack 2 model file; state its energy unit and a neighbour list of its cutoff, e.g. "
        "`neighbor_list: {call: schnetpack.transform:MatScipyNeighborList, options: {cutoff: 5.0}}`; "
        "for periodic structures also `stress_key: stress`",
        required=("model_file", "neighbor_list", "energy_unit"),
    ),
    "aimnet2": TeacherSpec(
        path="aimnet.calculators:AIMNet2ASE",
        install="'aimnet[ase]'",
        description="AIMNet2 (downloads its weights); the spin-resolved aimnet2nse takes `multiplicity: info:mult`",
        charge="info:charge",
    ),
    "emt": TeacherSpec(
        path="ase.calculators.emt:EMT",
        install="ase",
        description="effective-medium theory for Al, Cu, Ag, Au, Ni, Pd, Pt; for tests",
        level="EMT",
    ),
    "lj": TeacherSpec(
        path="ase.calculators.lj:LennardJones",
        install="ase",
        description="Lennard-Jones; for tests",
        options={"sigma": 3.4, "epsilon": 0.0104, "rc": 8.5, "smooth": True},  # argon
    ),
}
