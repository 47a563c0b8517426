"""MACE: 96 invariant channels, two layers, 4.5 Å, as MACE-OFF23 small; untrained."""

import warnings

import numpy as np
import torch

warnings.filterwarnings("ignore")

from ase import Atoms  # noqa: E402
from e3nn import o3  # noqa: E402
from mace import data, modules, tools  # noqa: E402
from mace.calculators import MACECalculator  # noqa: E402
from worker import ase_steps  # noqa: E402

CUTOFF = 4.5  # Å
ELEMENTS = [1, 6, 8]


def build():
    """The model with random weights."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    return modules.ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
        interaction_cls=block,
        num_interactions=2,
        num_elements=len(ELEMENTS),
        hidden_irreps=o3.Irreps("96x0e"),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(len(ELEMENTS)),
        avg_num_neighbors=20.0,
        atomic_numbers=ELEMENTS,
        correlation=3,
        radial_MLP=[64, 64, 64],
        atomic_inter_scale=1e-3,
        atomic_inter_shift=0.0,
    )


def open_subject(what, options):
    """`what` is "model" or "ase"."""
    about = {"torch": torch.__version__, "model": "MACE 96x0e, 2 layers, correlation 3, 4.5 Å"}
    model = build().eval()
    for parameter in model.parameters():
        parameter.requires_grad = False  # as its own calculator
    if what == "ase":
        calculator = MACECalculator(models=[model], device="cpu", default_dtype="float32")
        return lambda system: ase_steps(calculator, system), about
    table = tools.AtomicNumberTable(ELEMENTS)

    def prepare(system):
        atoms = Atoms(system["numbers"], system["positions"], cell=system["cell"], pbc=system["pbc"])
        configuration = data.config_from_atoms(atoms)
        graph = data.AtomicData.from_config(configuration, z_table=table, cutoff=CUTOFF)
        batch = next(iter(tools.torch_geometric.dataloader.DataLoader([graph], batch_size=1))).to_dict()
        return lambda: model(dict(batch), compute_force=True, training=False)["forces"].detach()

    return prepare, about
