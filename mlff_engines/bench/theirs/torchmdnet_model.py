"""TorchMD-Net: TensorNet with 128 channels and two layers, 5 Å, through its Warp operators; untrained."""

import warnings
from importlib.metadata import version
from pathlib import Path

import torch

warnings.filterwarnings("ignore")

from torchmdnet.calculators import TMDNETCalculator  # noqa: E402
from torchmdnet.models.model import create_model  # noqa: E402
from worker import ase_steps, kept  # noqa: E402

SETTINGS = {
    "model": "tensornet",
    "precision": 32,
    "embedding_dimension": 128,
    "num_layers": 2,
    "num_rbf": 32,
    "rbf_type": "expnorm",
    "trainable_rbf": False,
    "activation": "silu",
    "cutoff_lower": 0.0,
    "cutoff_upper": 5.0,
    "max_z": 10,
    "max_num_neighbors": 96,  # liquid water has up to 70, an atom itself among them
    "equivariance_invariance_group": "O(3)",
    "static_shapes": False,
    "derivative": True,
    "atom_filter": -1,
    "prior_model": None,
    "output_model": "Scalar",
    "reduce_op": "add",
}
SCALE = 1e-3  # eV


def build(**changes):
    """The model with random weights."""
    torch.manual_seed(0)
    model = create_model({**SETTINGS, **changes}, std=torch.tensor(SCALE))
    return model.eval()


class Calculator(TMDNETCalculator):
    """Its own, for atoms that say nothing of their charge."""

    def calculate(self, atoms=None, properties=None, system_changes=()):
        """A neutral molecule."""
        atoms.info.setdefault("charge", 0.0)
        super().calculate(atoms, properties, system_changes)


def checkpoint(path):
    """The untrained model as TorchMD-Net's trainer leaves it."""
    state = {f"model.{name}": value for name, value in build().state_dict().items()}
    torch.save({"hyper_parameters": SETTINGS, "state_dict": state}, path)


def open_subject(what, options):
    """`what` is "model", which finds its neighbours itself, or "ase"."""
    about = {
        "torchmd-net": version("torchmd-net"),
        "torch": torch.__version__,
        "model": "TensorNet 128x2, 5 Å; alone it finds its own neighbours, of N² pairs",
    }
    if what == "ase":
        calculator = Calculator(str(kept(Path(options["folder"]) / "bench-tensornet.ckpt", checkpoint)))
        return lambda system: ase_steps(calculator, system), about
    model = build()
    for parameter in model.parameters():
        parameter.requires_grad = False

    def prepare(system):
        numbers = torch.tensor(system["numbers"])
        batch = torch.zeros_like(numbers)
        positions = torch.tensor(system["positions"], dtype=torch.float32)
        box = torch.tensor(system["cell"], dtype=torch.float32) if any(system["pbc"]) else None
        return lambda: model(numbers, positions, batch, box)[1].detach()

    return prepare, about
