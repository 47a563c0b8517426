"""Runs in SchNetPack's environment: makes a model file, or reads one, and says what its model computes.

    python -P schnetpack_file.py make OUT OPTIONS    an untrained PaiNN; OPTIONS is JSON
    python -P schnetpack_file.py read MODEL OUT      prints the cutoff, then reads a JSON list of structures with edges

OUT of `read` is a numpy archive: `about` (JSON), every tensor of the model as `state/NAME`, and in float64
`energy/K` and `forces/K` of the structures.
"""

import json
import sys
import warnings
from typing import TypeVar

import numpy as np
import torch
import torch.utils.data.dataloader as loader

if not hasattr(loader, "T_co"):  # SchNetPack 2.1.1 imports a name that torch no longer has
    loader.T_co = TypeVar("T_co", covariant=True)
warnings.filterwarnings("ignore")

import schnetpack as spk  # noqa: E402
from schnetpack import properties as p  # noqa: E402


def make(out, features=128, interactions=3, cutoff=5.0, basis="gaussian", basis_size=20, seed=0, mean=0.0, **more):
    """Write a model as SchNetPack's trainer does; `more` are arguments of its PaiNN."""
    torch.manual_seed(seed)
    bases = {"gaussian": spk.nn.GaussianRBF, "bessel": spk.nn.BesselRBF}
    functions = {"silu": torch.nn.functional.silu, "softplus": spk.nn.shifted_softplus}
    more["activation"] = functions[more.get("activation", "silu")]
    offsets = spk.transform.AddOffsets("energy", add_mean=True)
    offsets.mean = torch.tensor([mean])
    model = spk.model.NeuralNetworkPotential(
        spk.representation.PaiNN(
            features, interactions, bases[basis](basis_size, cutoff), spk.nn.CosineCutoff(cutoff), **more
        ),
        input_modules=[spk.atomistic.PairwiseDistances()],
        output_modules=[spk.atomistic.Atomwise(features, output_key="energy"), spk.atomistic.Forces()],
        postprocessors=[spk.transform.CastTo64(), offsets],
    )
    torch.save(model, out)


def read(path, out):
    """Weights, hyper-parameters and reference results of the model file `path`."""
    model = spk.utils.load_model(path).eval()
    painn = model.representation
    heads = [m for m in model.output_modules if isinstance(m, spk.atomistic.Atomwise)]
    about = {
        "schnetpack": spk.__version__,
        "representation": type(painn).__name__,
        "basis": type(getattr(painn, "radial_basis", None)).__name__,
        "cutoff_function": type(getattr(painn, "cutoff_fn", None)).__name__,
        "inputs": [type(m).__name__ for m in model.input_modules],
        "outputs": [type(m).__name__ for m in model.output_modules],
        "postprocessors": [
            {"type": type(m).__name__}
            | {name: getattr(m, name) for name in ("add_mean", "add_atomrefs", "is_extensive") if hasattr(m, name)}
            for m in model.postprocessors
        ],
        "embedding": type(getattr(painn, "embedding", None)).__name__,
        "electronic": len(getattr(painn, "electronic_embeddings", [])),
        "aggregation": [head.aggregation_mode for head in heads],
    }
    print(float(getattr(painn, "cutoff", 0.0)), flush=True)
    structures = json.load(sys.stdin)
    arrays = {f"state/{name}": tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    force_key = next((m.force_key for m in model.output_modules if isinstance(m, spk.atomistic.Forces)), None)
    evaluated = structures if force_key and len(heads) == 1 else []
    about["evaluated"] = len(evaluated)
    exact = model.double()
    torch.set_default_dtype(torch.float64)
    for k, s in enumerate(evaluated):
        n, (i, j) = len(s["numbers"]), np.array(s["edges"], dtype=np.int64).reshape(2, -1)
        positions = torch.tensor(s["positions"], dtype=torch.float64)
        vectors = torch.tensor(s["vectors"], dtype=torch.float64).reshape(-1, 3)
        i, j = torch.from_numpy(i), torch.from_numpy(j)
        found = exact(
            {
                p.Z: torch.tensor(s["numbers"]),
                p.R: positions,
                p.idx_i: i,
                p.idx_j: j,
                p.offsets: vectors - (positions[j] - positions[i]),
                p.idx_m: torch.zeros(n, dtype=torch.int64),
                p.n_atoms: torch.tensor([n]),
                p.cell: torch.zeros(1, 3, 3),
                p.pbc: torch.zeros(1, 3, dtype=torch.bool),
            }
        )
        arrays[f"energy/{k}"] = found[heads[0].output_key].detach().numpy().reshape(())
        arrays[f"forces/{k}"] = found[force_key].detach().numpy()
    np.savez(out, about=np.array(json.dumps(about)), **arrays)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], **json.loads(sys.argv[3]))
    else:
        read(sys.argv[2], sys.argv[3])
