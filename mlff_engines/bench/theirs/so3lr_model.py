"""SO3LR as so3krates-torch ships it: 128 features, 3 layers, 4.5 Å, and long-range terms up to 12 Å; trained."""

import warnings
from importlib.metadata import version

import torch

warnings.filterwarnings("ignore")

from ase import Atoms  # noqa: E402
from so3krates_torch.calculator.so3 import SO3LRCalculator  # noqa: E402
from worker import ase_steps  # noqa: E402


def open_subject(what, options):
    """`what` is "model" or "ase". The model is timed behind its ASE calculator, neighbour lists included."""
    calculator = SO3LRCalculator(device="cpu", default_dtype="float32")
    about = {
        "so3krates-torch": version("so3krates-torch"),
        "torch": torch.__version__,
        "model": "SO3LR 128x3, 4.5 Å; alone means a call of its ASE calculator",
    }
    if what == "ase":
        return lambda system: ase_steps(calculator, system), about

    def prepare(system):
        atoms = Atoms(system["numbers"], system["positions"], cell=system["cell"], pbc=system["pbc"])

        def work():
            calculator.calculate(atoms)

        return work

    return prepare, about
