"""NequIP and Allegro, compiled by NequIP's own means (AOTInductor), once; untrained unless weights are given.

By default NequIP has l = 1, 64 features, 3 layers, 5 Å; Allegro l = 1, 64 scalar and 16 tensor features, 2 layers, 5 Å.
"""

import hashlib
import json
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore")

import nequip  # noqa: E402
from ase import Atoms  # noqa: E402
from ase.build import molecule  # noqa: E402
from ase.data import chemical_symbols  # noqa: E402
from nequip.data import AtomicDataDict, from_ase  # noqa: E402
from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform  # noqa: E402
from nequip.integrations.ase import NequIPCalculator  # noqa: E402
from nequip.model import NequIPGNNModel  # noqa: E402
from nequip.nn.compile import DictInputOutputWrapper  # noqa: E402
from nequip.scripts._compile_utils import COMPILE_TARGET_DICT  # noqa: E402
from nequip.utils.aot import aot_export_model  # noqa: E402
from nequip.utils.global_state import set_global_state  # noqa: E402
from worker import ase_steps, kept  # noqa: E402

SIZES = {
    "nequip": {"num_layers": 3, "l_max": 1, "parity": True, "num_features": 64},
    "allegro": {
        **{"num_layers": 2, "l_max": 1, "parity": True, "num_scalar_features": 64, "num_tensor_features": 16},
        "radial_chemical_embed": {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 8},
    },
}
FACTS = {"elements": [1, 6, 8], "e0": [0.0, 0.0, 0.0], "scale": 1e-3, "neighbors": 40.0}
CUTOFF = 5.0  # Å, of all sizes: graphs do not depend on them
TARGET = COMPILE_TARGET_DICT["ase"]


def build(options):
    """The model, in training; with random weights unless there is a state."""
    set_global_state(allow_tf32=False)
    name, facts = options.get("architecture", "nequip"), options.get("facts", FACTS)
    if name == "allegro":
        from allegro.model import AllegroModel
    names = [chemical_symbols[z] for z in facts["elements"]]
    model = (AllegroModel if name == "allegro" else NequIPGNNModel)(
        seed=0,
        model_dtype="float32",
        type_names=names,
        r_max=CUTOFF,
        avg_num_neighbors=facts["neighbors"],
        per_type_energy_scales=facts["scale"],
        per_type_energy_shifts=dict(zip(names, facts["e0"], strict=True)),
        **{**SIZES[name], **options.get("size", {})},
    )
    if "state" in options:
        model.load_state_dict(options["state"])
    return model


def transforms(elements):
    """From atoms to the model's input."""
    return [ChemicalSpeciesToAtomTypeMapper([chemical_symbols[z] for z in elements]), NeighborListTransform(CUTOFF)]


def of_atoms(atoms, elements):
    """Atoms as the model takes them."""
    data = from_ase(atoms)
    for transform in transforms(elements):
        data = transform(data)
    return AtomicDataDict.to_(data, "cpu")


def graph(numbers, positions):
    """One molecule."""
    return of_atoms(Atoms(numbers, positions), sorted({int(z) for z in numbers}))


def neighbors(graph):
    """Edges per atom."""
    return graph["edge_index"].shape[1] / graph["pos"].shape[0]


def collate(graphs):
    """A batch."""
    return AtomicDataDict.batched_from_list(graphs)


def predict(model, batch):
    """Energies and forces."""
    found = model(dict(batch))
    return found["total_energy"].flatten(), found["forces"]


def compiled(options, path):
    """The model compiled for this machine; minutes when it is not there yet."""

    def compile_into(path):
        example = molecule("CH3CH2OH", cell=[9.0, 9.0, 9.0], pbc=True)
        shapes = {name: torch.export.Dim(name, min=2) for name in ("graph", "node", "edge")}
        aot_export_model(
            build(options).eval(),
            "cpu",
            TARGET["input"],
            TARGET["output"],
            TARGET["data_settings"](of_atoms(example, options.get("facts", FACTS)["elements"])),
            TARGET["batch_map_settings"](shapes),
            str(path),
        )

    package = torch._inductor.aoti_load_package(str(kept(path, compile_into)))
    return DictInputOutputWrapper(package, TARGET["input"], TARGET["output"]).eval()


def open_subject(what, options):
    """`what` is "model" or "ase".

    `options` may have "architecture", nequip or allegro; "mode", compiled or eager; and "weights", a file of `fit.py`.
    What is compiled is kept in `options["folder"]`.
    """
    set_global_state(allow_tf32=False)
    options = {**options, **(torch.load(options["weights"], weights_only=True) if "weights" in options else {})}
    name, mode = options.get("architecture", "nequip"), options.get("mode", "compiled")
    size = {**SIZES[name], **options.get("size", {})}
    decisive = [name, size, options.get("facts", FACTS), Path(options.get("weights", "none")).parent.name]
    key = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]
    about = {"nequip": nequip.__version__, "torch": torch.__version__, "model": f"{name} {size}", "mode": mode}
    if mode == "compiled":
        model = compiled(options, Path(options["folder"]) / f"{name}-{key}.nequip.pt2")
    else:
        model = build(options).eval()
        for parameter in model.parameters():
            parameter.requires_grad = False
    elements = options.get("facts", FACTS)["elements"]
    if what == "ase":
        calculator = NequIPCalculator(model, "cpu", transforms=transforms(elements))
        return lambda system: ase_steps(calculator, system), about

    def prepare(system):
        atoms = Atoms(system["numbers"], system["positions"], cell=system["cell"], pbc=system["pbc"])
        data = TARGET["data_settings"](of_atoms(atoms, elements))
        return lambda: model(dict(data))["forces"].detach()

    return prepare, about
