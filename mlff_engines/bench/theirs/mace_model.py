"""MACE: by default 96 invariant channels, two layers, 4.5 Å, as MACE-OFF23 small; untrained, or a file of `fit.py`."""

import warnings

import numpy as np
import torch

warnings.filterwarnings("ignore")

from ase import Atoms  # noqa: E402
from e3nn import o3  # noqa: E402
from e3nn.util import jit  # noqa: E402
from mace import data, modules, tools  # noqa: E402
from mace.calculators import MACECalculator  # noqa: E402
from worker import ase_steps  # noqa: E402

# hidden irreps, number of layers, correlation, highest l of the edges, cutoff in Å
SIZE = {"irreps": "96x0e", "layers": 2, "correlation": 3, "l_max": 3, "cutoff": 4.5}
FACTS = {"elements": [1, 6, 8], "e0": [0.0, 0.0, 0.0], "scale": 1e-3, "neighbors": 20.0}
CUTOFF = SIZE["cutoff"]  # of all sizes: graphs do not depend on them


def build(options):
    """The model, in training; with random weights unless there is a state."""
    size, facts = {**SIZE, **options.get("size", {})}, options.get("facts", FACTS)
    if size["cutoff"] != CUTOFF:
        raise ValueError(f"cutoff {size['cutoff']}; allowed: {CUTOFF}")
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    model = modules.ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=size["l_max"],
        interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
        interaction_cls=block,
        num_interactions=size["layers"],
        num_elements=len(facts["elements"]),
        hidden_irreps=o3.Irreps(size["irreps"]),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.array(facts["e0"]),
        avg_num_neighbors=facts["neighbors"],
        atomic_numbers=facts["elements"],
        correlation=size["correlation"],
        radial_MLP=[64, 64, 64],
        atomic_inter_scale=facts["scale"],
        atomic_inter_shift=0.0,
    )
    if "state" in options:
        model.load_state_dict(options["state"])
    return model


def of_atoms(atoms, elements):
    """Atoms as the model takes them."""
    table = tools.AtomicNumberTable(elements)
    return data.AtomicData.from_config(data.config_from_atoms(atoms), z_table=table, cutoff=CUTOFF)


def graph(numbers, positions):
    """One molecule."""
    return of_atoms(Atoms(numbers, positions), sorted({int(z) for z in numbers}))


def neighbors(graph):
    """Edges per atom."""
    return graph.edge_index.shape[1] / graph.positions.shape[0]


def collate(graphs):
    """A batch."""
    loader = tools.torch_geometric.dataloader.DataLoader(graphs, batch_size=len(graphs))
    return next(iter(loader)).to_dict()


def predict(model, batch):
    """Energies and forces."""
    found = model(dict(batch), compute_force=True, training=model.training)
    return found["energy"], found["forces"]


def open_subject(what, options):
    """`what` is "model" or "ase".

    `options` may have "weights", a file of `fit.py`, and "mode", eager or compiled.
    """
    options = {**options, **(torch.load(options["weights"], weights_only=True) if "weights" in options else {})}
    size = {**SIZE, **options.get("size", {})}
    shown = "{irreps}, {layers} layers, correlation {correlation}, {cutoff} Å".format(**size)
    mode = options.get("mode", "eager")
    about = {"torch": torch.__version__, "model": f"MACE {shown}", "mode": mode}
    model = build(options).eval()
    for parameter in model.parameters():
        parameter.requires_grad = False  # as its own calculator
    if what == "ase":
        calculator = MACECalculator(models=[model], device="cpu", default_dtype="float32")
        return lambda system: ase_steps(calculator, system), about
    if mode == "compiled":
        model = jit.compile(model)  # TorchScript, as in MACE's interface to LAMMPS

    def prepare(system):
        atoms = Atoms(system["numbers"], system["positions"], cell=system["cell"], pbc=system["pbc"])
        batch = collate([of_atoms(atoms, options.get("facts", FACTS)["elements"])])
        return lambda: model(dict(batch), compute_force=True, training=False)["forces"].detach()

    return prepare, about
