"""DeePMD: se_e2_a, 25-50-100 and 240x3, 6 Å, float32, frozen and compressed (PyTorch backend); untrained."""

import os
import warnings
from importlib.metadata import version
from pathlib import Path

for pool in ("INTRA", "INTER"):  # what it asks for instead of OMP_NUM_THREADS alone
    os.environ[f"DP_{pool}_OP_PARALLELISM_THREADS"] = os.environ["OMP_NUM_THREADS"] if pool == "INTRA" else "1"

import torch  # noqa: E402

warnings.filterwarnings("ignore")

from deepmd.calculator import DP  # noqa: E402
from deepmd.pt.model.model import get_model  # noqa: E402
from deepmd.pt.utils.nlist import extend_input_and_build_neighbor_list  # noqa: E402
from worker import ase_steps, kept  # noqa: E402

ELEMENTS = {1: "H", 6: "C", 8: "O"}
CUTOFF = 6.0  # Å
SELECTED = [120, 20, 60]  # most neighbours of each element: liquid water has up to 100 H and 50 O
SCALE = 1e-3  # of the last layer
SHORTEST = 0.5  # Å: the table of the compressed model begins there


def build():
    """The model with random weights, compressed."""
    descriptor = {
        "type": "se_e2_a",
        "sel": SELECTED,
        "rcut_smth": 0.5,
        "rcut": CUTOFF,
        "neuron": [25, 50, 100],
        "axis_neuron": 16,
        "resnet_dt": False,
        "type_one_side": True,
        "precision": "float32",
        "seed": 1,
    }
    fitting = {"neuron": [240, 240, 240], "resnet_dt": True, "precision": "float32", "seed": 1}
    model = get_model({"type_map": list(ELEMENTS.values()), "descriptor": descriptor, "fitting_net": fitting})
    with torch.no_grad():
        for network in model.get_fitting_net().filter_layers.networks:
            for parameter in network.layers[-1].parameters():
                parameter.mul_(SCALE)
    model.min_nbor_dist = torch.tensor(SHORTEST, dtype=torch.float64)
    model.enable_compression(5, 0.01, 0.1, -1)  # the defaults of `dp compress`
    return model.eval()


def freeze(path):
    """The frozen model into a file."""
    torch.jit.save(torch.jit.script(build()), path)


def open_subject(what, options):
    """`what` is "model" or "ase"."""
    about = {
        "deepmd-kit": version("deepmd-kit"),
        "torch": torch.__version__,
        "model": f"se_e2_a, {CUTOFF:g} Å, compressed",
    }
    path = kept(Path(options["folder"]) / "bench-se_e2_a.pth", freeze)
    if what == "ase":
        calculator = DP(path)
        return lambda system: ase_steps(calculator, system), about
    model = torch.jit.load(path)

    def prepare(system):
        kinds = torch.tensor([[list(ELEMENTS).index(number) for number in system["numbers"]]])
        positions = torch.tensor([system["positions"]], dtype=torch.float64)
        box = torch.tensor(system["cell"], dtype=torch.float64).reshape(1, 9) if any(system["pbc"]) else None
        where, types, owners, neighbors = extend_input_and_build_neighbor_list(
            positions, kinds, CUTOFF, SELECTED, box=box
        )

        def work():
            found = model.forward_lower(where.detach().requires_grad_(True), types, neighbors, owners)
            forces = found["extended_force"].detach()
            return torch.zeros_like(positions, dtype=forces.dtype).index_add_(1, owners[0], forces)

        return work

    return prepare, about
