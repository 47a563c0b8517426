"""SchNetPack: PaiNN with 128 features and 3 interactions, 5 Å, or the model of a file."""

import warnings
from typing import TypeVar

import torch
import torch.utils.data.dataloader as loader

loader.T_co = TypeVar("T_co", covariant=True)  # SchNetPack 2.1.1 imports a name that torch no longer has
warnings.filterwarnings("ignore")

import schnetpack as spk  # noqa: E402
from ase import Atoms  # noqa: E402
from schnetpack.interfaces import AtomsConverter, SpkCalculator  # noqa: E402
from schnetpack.transform import MatScipyNeighborList, SkinNeighborList  # noqa: E402
from worker import ase_steps  # noqa: E402

CUTOFF = 5.0  # Å


def open_subject(what, options):
    """`options["model"]` is a model file of SchNetPack."""
    about = {"schnetpack": spk.__version__, "torch": torch.__version__, "model": "PaiNN 128x3, 5 Å"}
    if what == "ase":
        # its own neighbour list with a skin; made anew for every system, as it remembers positions by index alone
        return lambda system: ase_steps(
            SpkCalculator(
                options["model"],
                SkinNeighborList(MatScipyNeighborList(CUTOFF), cutoff_skin=0.5),
                energy_unit="eV",
                dtype=torch.float32,
            ),
            system,
        ), about
    model = spk.utils.load_model(options["model"]).eval()
    convert = AtomsConverter(MatScipyNeighborList(CUTOFF), dtype=torch.float32)

    def prepare(system):
        atoms = Atoms(system["numbers"], system["positions"], cell=system["cell"], pbc=system["pbc"])
        inputs = convert(atoms)
        return lambda: model(dict(inputs))["forces"].detach()

    return prepare, about
