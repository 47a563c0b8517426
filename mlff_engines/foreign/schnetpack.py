"""PaiNN as SchNetPack 2 trained it, as a checkpoint of ours with the same energies and forces.

A model file of SchNetPack is a pickle of its classes: it is read by SchNetPack itself, in an environment of its own,
so give only files that you trust. It hands over the weights, and its energies and forces of some structures in
float64, which the checkpoint has to reproduce: whatever the conversion does not know of is noticed.

| SchNetPack (`representation.`)                    | here (`network.`)                                       |
|---------------------------------------------------|---------------------------------------------------------|
| `embedding`                                       | `embedding`, rows up to 118                             |
| `radial_basis.offsets`, `.widths`; `.freqs`       | `basis.centers`, `.inverse_width`; `.frequencies`       |
| `filter_net`, repeated where layers share filters | `filter_net`                                            |
| `interactions.L.interatomic_context_net.0, 1`     | `messages.L.message_net.0, 2`                           |
| `mixing.L.mu_channel_mix`                         | `updates.L.vector_mix`                                  |
| `mixing.L.intraatomic_context_net.0, 1`           | `updates.L.update_net.0, 2`                             |
| `output_modules.K.outnet.0, 1`                    | `readout.0, 2`                                          |
| mean + atomref[z], and y of an isolated atom      | E0[z]; so the energy of SchNetPack is ours, offset and all |

Schütt et al., J. Chem. Phys. 158, 144801 (2023); `mlff_engines.models.painn`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlff_engines.checkpoint import Domain, save_checkpoint
from mlff_engines.errors import ArtifactError
from mlff_engines.evaluator import Evaluator
from mlff_engines.export import synthetic
from mlff_engines.files import sha256_of
from mlff_engines.models.base import AtomicModel, empty_graph, with_isolated_atoms
from mlff_engines.models.painn import PaiNNConfig
from mlff_engines.models.radial import BasisName
from mlff_engines.models.registry import build_model
from mlff_engines.neighbors import neighbor_list
from mlff_engines.potential import Potential
from mlff_engines.structure import NUMBERS, Structure
from mlff_engines.units import energy_unit

THEIRS = Path(__file__).parent / "theirs" / "schnetpack_file.py"
TOLERANCE = 1e-10  # eV per atom and eV/Å, of values up to 1, else relative; both in float64
BASES: dict[str, BasisName] = {"GaussianRBF": "gaussian", "BesselRBF": "bessel"}
# what a converted model may consist of
INPUTS, OUTPUTS = {"PairwiseDistances", "Strain"}, {"Atomwise", "Forces"}
POSTPROCESSORS = {"CastTo64", "CastTo32", "AddOffsets"}

State = dict[str, Tensor]


def import_schnetpack(
    model: Path,
    folder: Path,
    *,
    elements: Sequence[str],
    unit: str,
    python: Path,
    structures: Sequence[Structure] = (),
) -> float:
    """Write SchNetPack's model file as a checkpoint; the largest deviation of its forces from SchNetPack's, eV/Å.

    Args:
        model: as SchNetPack's trainer writes it, such as `best_model`. Lengths are in Å.
        folder: the checkpoint to write.
        elements: symbols that it was trained for, which the file does not tell.
        unit: of its energies, which the file does not tell either, e.g. "eV" or "kcal/mol".
        python: an interpreter that has SchNetPack.
        structures: more of them to compare on.

    Raises:
        ArtifactError: it cannot be read, has parts that ours has not, or is not reproduced.
        ConfigError: an unknown unit.
    """
    scale, domain = energy_unit(unit), Domain(elements=list(elements))
    tried = {**synthetic(domain), **{f"structure {n}": s for n, s in enumerate(structures)}}
    about, state, expected = _read(model, list(tried.values()), python)
    cutoff = _check(model, about, state)
    config = _hyper_parameters(about, state, cutoff)
    ours = build_model(config, elements, dict.fromkeys(elements, 0.0), scale=scale)
    ours.network.double()
    ours.network.load_state_dict(_weights(state, config.features, config.interactions, ours.network.state_dict()))
    _set_offsets(ours.eval(), about, state, elements, scale)
    off = _compare(model, ours, domain, cutoff, tried, [(scale * e, scale * f) for e, f in expected])
    provenance = {
        "teacher": "unknown",
        "imported": f"SchNetPack {about['schnetpack']}",
        "file_sha256": sha256_of(model),
    }
    save_checkpoint(folder, ours, config, domain, provenance, list(structures))
    return off


def make_untrained(out: Path, python: Path, **options: Any) -> None:
    """A model file of SchNetPack with random weights, by SchNetPack: for tests and benchmarks.

    Args:
        out: the file.
        python: an interpreter that has SchNetPack.
        options: see `theirs/schnetpack_file.py`.
    """
    _finish(_start(python, "make", str(out), json.dumps(options)), "", f"make {out}")


def _start(python: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # SchNetPack's files are pickles
    pipe = subprocess.PIPE
    try:
        command = [str(python), "-P", str(THEIRS), *arguments]
        return subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
    except OSError as error:
        raise ArtifactError(f"cannot run {python}: {error.strerror}; name a Python that has SchNetPack") from None


def _finish(process: subprocess.Popen[str], text: str, doing: str) -> None:
    said = [line for line in process.communicate(text)[1].splitlines() if line.strip()]
    if process.returncode:
        raise ArtifactError(f"cannot {doing} with SchNetPack: {said[-1] if said else process.returncode}")


def _read(
    model: Path, structures: Sequence[Structure], python: Path
) -> tuple[dict[str, Any], State, list[tuple[float, Any]]]:
    """What SchNetPack says of a file: description, weights, energy and forces of each structure."""
    if not model.is_file():
        raise ArtifactError(f"no file {model}; expected a model as SchNetPack writes it, such as best_model")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "read.npz"
        process = _start(python, "read", str(model), str(out))
        assert process.stdout is not None
        cutoff = process.stdout.readline()  # empty where it failed
        given = [_with_edges(structure, float(cutoff)) for structure in structures] if cutoff else []
        _finish(process, json.dumps(given), f"read {model}")
        with np.load(out) as found:
            about: dict[str, Any] = json.loads(str(found["about"]))
            tensors = {name: torch.from_numpy(found[name]) for name in found if name.startswith("state/")}
            results = [(float(found[f"energy/{k}"]), found[f"forces/{k}"]) for k in range(about["evaluated"])]
    return about, {name.removeprefix("state/"): tensor for name, tensor in tensors.items()}, results


def _with_edges(structure: Structure, cutoff: float) -> dict[str, Any]:
    index, vectors = neighbor_list(structure.positions, structure.cell, structure.pbc, cutoff)
    return {
        "numbers": structure.numbers.tolist(),
        "positions": structure.positions.tolist(),
        "edges": index.tolist(),
        "vectors": vectors.tolist(),
    }


def _check(model: Path, about: Mapping[str, Any], state: State) -> float:
    """The cutoff of a model that ours can be."""
    steps = [step["type"] for step in about["postprocessors"]]
    shifts = [step for step in about["postprocessors"] if step["type"] == "AddOffsets"]
    wrong = {
        f"representation {about['representation']}": about["representation"] != "PaiNN",
        f"radial basis {about['basis']}": about["basis"] not in BASES,
        f"cutoff function {about['cutoff_function']}": about["cutoff_function"] != "CosineCutoff",
        f"embedding {about['embedding']}": about["embedding"] != "Embedding",
        "embeddings of charge or spin": about["electronic"] > 0,
        f"input modules {about['inputs']}": not set(about["inputs"]) <= INPUTS,
        f"output modules {about['outputs']}": sorted(about["outputs"]) != sorted(OUTPUTS),
        f"aggregation {about['aggregation']}": about["aggregation"] != ["sum"],
        f"postprocessors {steps}": not set(steps) <= POSTPROCESSORS,
        "offsets that are not extensive": any(not step["is_extensive"] for step in shifts),
    }
    found = [what for what, bad in wrong.items() if bad]
    if not found:
        widths = state.get("representation.radial_basis.widths", torch.ones(1))
        readout = sum(".outnet." in name and name.endswith(".weight") for name in state)
        features = state["representation.embedding.weight"].shape[1]
        hidden = next(t.shape[0] for name, t in state.items() if name.endswith("outnet.0.weight"))
        if bool((widths != widths[0]).any()):
            found.append("Gaussians of different widths")
        if readout != 2 or hidden != features // 2:
            found.append(f"a readout of {readout} layers, the first {hidden} wide")
    if found:
        raise ArtifactError(
            f"{model} has {'; '.join(found)}: only SchNetPack's PaiNN with Gaussian or Bessel basis, cosine cutoff and "
            "its usual Atomwise and Forces outputs can be imported"
        )
    return float(state["representation.cutoff_fn.cutoff"][0])


def _hyper_parameters(about: Mapping[str, Any], state: State, cutoff: float) -> PaiNNConfig:
    return PaiNNConfig(
        features=state["representation.embedding.weight"].shape[1],
        interactions=sum(name.endswith("mu_channel_mix.weight") for name in state),
        cutoff=cutoff,
        basis=BASES[about["basis"]],
        basis_size=state["representation.filter_net.weight"].shape[1],
    )


def _weights(state: State, features: int, layers: int, ours: Mapping[str, Tensor]) -> State:
    """The network's state in float64."""
    theirs = {name.removeprefix("representation."): tensor.double() for name, tensor in state.items()}
    found: State = {"embedding.weight": torch.zeros_like(ours["embedding.weight"])}
    rows = theirs["embedding.weight"]
    found["embedding.weight"][: len(rows)] = rows
    if "radial_basis.offsets" in theirs:
        found["basis.centers"] = theirs["radial_basis.offsets"]
        found["basis.inverse_width"] = 1 / theirs["radial_basis.widths"][0]
    else:
        found["basis.frequencies"] = theirs["radial_basis.freqs"]
    for kind in ("weight", "bias"):
        filters = theirs[f"filter_net.{kind}"]
        shared = len(filters) == 3 * features
        found[f"filter_net.{kind}"] = torch.cat([filters] * layers) if shared else filters
        for layer in range(layers):
            for theirs_at, ours_at in ((0, 0), (1, 2)):
                message = theirs[f"interactions.{layer}.interatomic_context_net.{theirs_at}.{kind}"]
                update = theirs[f"mixing.{layer}.intraatomic_context_net.{theirs_at}.{kind}"]
                found[f"messages.{layer}.message_net.{ours_at}.{kind}"] = message
                found[f"updates.{layer}.update_net.{ours_at}.{kind}"] = update
        for theirs_at, ours_at in ((0, 0), (1, 2)):
            found[f"readout.{ours_at}.{kind}"] = next(
                tensor for name, tensor in theirs.items() if name.endswith(f".outnet.{theirs_at}.{kind}")
            )
    for layer in range(layers):
        found[f"updates.{layer}.vector_mix.weight"] = theirs[f"mixing.{layer}.mu_channel_mix.weight"]
    return found


def _set_offsets(
    ours: AtomicModel, about: Mapping[str, Any], state: State, elements: Sequence[str], scale: float
) -> None:
    """E0: what SchNetPack gives an isolated atom."""
    numbers = torch.tensor([NUMBERS[symbol] for symbol in elements])
    with torch.no_grad():
        e0 = ours.network(with_isolated_atoms(empty_graph(ours.network, numbers.device), numbers)).double()
    for at, step in enumerate(about["postprocessors"]):
        if step.get("add_mean"):
            e0 = e0 + state[f"postprocessors.{at}.mean"].double().reshape(())
        if step.get("add_atomrefs"):
            e0 = e0 + state[f"postprocessors.{at}.atomref"].double().flatten()[numbers]
    ours.reference.e0[numbers] = scale * e0


def _compare(
    model: Path,
    ours: AtomicModel,
    domain: Domain,
    cutoff: float,
    structures: Mapping[str, Structure],
    expected: Sequence[tuple[float, Any]],
) -> float:
    """The largest deviation of the forces."""
    evaluate = Evaluator(Potential(ours).eval(), domain, cutoff, skin=0.0, dtype=torch.float64, outside="ignore")
    worst = 0.0
    for (name, structure), (energy, forces) in zip(structures.items(), expected, strict=True):
        found = evaluate(structure)
        size = max(1.0, float(np.abs(forces).max(initial=0.0)), abs(energy) / len(structure))
        off = float(np.abs(found.forces - forces).max(initial=0.0))
        if not max(off, abs(found.energy - energy) / len(structure)) <= TOLERANCE * size:
            raise ArtifactError(
                f"{model} is not reproduced: on {name}, energies are {found.energy:.9g} and {energy:.9g} eV and forces "
                f"{off:.3g} eV/Å apart. It has something that is not imported, such as another activation function"
            )
        worst = max(worst, off)
    return worst
