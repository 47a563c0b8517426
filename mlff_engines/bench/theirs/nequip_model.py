"""NequIP: l = 1, 64 features, 3 layers, 5 Å, untrained, compiled by its own means (AOTInductor), once."""

import os
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore")

import nequip  # noqa: E402
from ase import Atoms  # noqa: E402
from ase.build import molecule  # noqa: E402
from nequip.data import AtomicDataDict, from_ase  # noqa: E402
from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform  # noqa: E402
from nequip.integrations.ase import NequIPCalculator  # noqa: E402
from nequip.model import NequIPGNNModel  # noqa: E402
from nequip.nn.compile import DictInputOutputWrapper  # noqa: E402
from nequip.scripts._compile_utils import COMPILE_TARGET_DICT  # noqa: E402
from nequip.utils.aot import aot_export_model  # noqa: E402
from nequip.utils.global_state import set_global_state  # noqa: E402
from worker import ase_steps  # noqa: E402

CUTOFF = 5.0  # Å
ELEMENTS = ["H", "C", "O"]
TARGET = COMPILE_TARGET_DICT["ase"]


def transforms():
    """From atoms to the model's input."""
    return [ChemicalSpeciesToAtomTypeMapper(ELEMENTS), NeighborListTransform(CUTOFF)]


def graph(atoms):
    """`atoms` as the model takes them."""
    data = from_ase(atoms)
    for transform in transforms():
        data = transform(data)
    return AtomicDataDict.to_(data, "cpu")


def build():
    """The model with random weights."""
    return NequIPGNNModel(
        seed=0,
        model_dtype="float32",
        type_names=ELEMENTS,
        r_max=CUTOFF,
        num_layers=3,
        l_max=1,
        parity=True,
        num_features=64,
        avg_num_neighbors=40.0,
        per_type_energy_scales=1e-3,
    )


def compiled(path):
    """The model compiled for this machine; minutes when it is not there yet."""
    if not path.is_file():
        example = molecule("CH3CH2OH", cell=[9.0, 9.0, 9.0], pbc=True)
        shapes = {name: torch.export.Dim(name, min=2) for name in ("graph", "node", "edge")}
        temporary = path.with_name(f"{os.getpid()}-{path.name}")
        aot_export_model(
            build(),
            "cpu",
            TARGET["input"],
            TARGET["output"],
            TARGET["data_settings"](graph(example)),
            TARGET["batch_map_settings"](shapes),
            str(temporary),
        )
        temporary.rename(path)
    package = torch._inductor.aoti_load_package(str(path))
    return DictInputOutputWrapper(package, TARGET["input"], TARGET["output"]).eval()


def open_subject(what, options):
    """`what` is "model" or "ase"; the compiled model is kept in `options["folder"]`."""
    set_global_state(allow_tf32=False)
    model = compiled(Path(options["folder"]) / "bench-l1-64x3.nequip.pt2")
    about = {"nequip": nequip.__version__, "torch": torch.__version__, "model": "l=1, 64x3, 5 Å, AOTInductor"}
    if what == "ase":
        calculator = NequIPCalculator(model, "cpu", transforms=transforms())
        return lambda system: ase_steps(calculator, system), about

    def prepare(system):
        data = graph(Atoms(system["numbers"], system["positions"], cell=system["cell"], pbc=system["pbc"]))
        data = TARGET["data_settings"](data)
        return lambda: model(dict(data))["forces"]

    return prepare, about
