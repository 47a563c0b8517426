"""From checkpoints to the forms that engines load."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from mlff_engines import artifact
from mlff_engines.artifact import Artifact
from mlff_engines.checkpoint import CheckpointConfig, Domain, load_checkpoint, read_checkpoint, set_dtype
from mlff_engines.errors import ArtifactError
from mlff_engines.evaluator import Evaluator
from mlff_engines.files import replacing
from mlff_engines.graph import OUTPUTS
from mlff_engines.kernels import FUSED, fuse, load_operators
from mlff_engines.kstep.learned import LearnedJump, export_jump
from mlff_engines.manifest import DTYPES, SCHEMA, Dtype, Golden, Kernel, Manifest, Units
from mlff_engines.models.base import AtomicModel
from mlff_engines.models.registry import model_config
from mlff_engines.potential import Ensemble, Potential
from mlff_engines.structure import NUMBERS, Structure


def export(
    checkpoints: Sequence[Path],
    out: Path,
    *,
    dtype: Dtype = "float32",
    device: str = "cpu",
    structures: Sequence[Structure] = (),
    overwrite: bool = False,
    kernel: Kernel = "torch",
) -> Artifact:
    """Write the edge artifact of one checkpoint, or of several as an ensemble, and replay its golden vectors.

    Args:
        checkpoints: folders; more than one makes an ensemble.
        out: the artifact to write.
        dtype: of the network in the artifact.
        device: the artifact is saved for; loading remaps it.
        structures: more structures to check and to keep among the golden vectors.
        overwrite: replace an existing `out`.
        kernel: "torch" runs wherever torch does, and `artifact.load` finds the fused kernel for it; "fused" names that
            operator in the program, for engines that load it without Python.

    Raises:
        MissingEngineError: the fused kernel cannot be built here.
        ArtifactError: see `load_checkpoint`; also an existing `out`, members of an ensemble that do not fit each
            other, no kernel for the architecture, weights that are not finite in `dtype`, or an artifact that does
            not reproduce the eager model.
    """
    if dtype not in DTYPES:
        raise ArtifactError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out} exists; choose another name or pass --overwrite")
    loaded = [load_checkpoint(folder) for folder in checkpoints]
    configs = [config for _, config in loaded]
    first = model_config(configs[0].model)
    domain = _common_domain(checkpoints, configs)

    def assemble() -> Potential | Ensemble:
        members = [copy.deepcopy(potential) for potential, _ in loaded]
        return members[0] if len(members) == 1 else Ensemble(members)

    def evaluator(potential: nn.Module, kind: torch.dtype) -> Evaluator:
        return Evaluator(
            potential,
            domain,
            first.cutoff,
            takes_charge=first.charge,
            takes_spin=first.spin,
            skin=0,
            dtype=kind,
            outside="ignore",
        )

    reference = assemble()
    set_dtype(reference, torch.float64)
    exact = evaluator(reference.eval(), torch.float64)
    recorded = [record.structure for record in configs[0].structures]
    named = {f"structure {i}": s for i, s in enumerate([*recorded, *structures])} | synthetic(domain)
    golden = [Golden.record(name, structure, exact(structure)) for name, structure in named.items()]

    potential = assemble()
    set_dtype(potential, DTYPES[dtype])
    potential.eval()
    members = [member for member in potential.modules() if isinstance(member, Potential)]
    outputs = [name for name in OUTPUTS if len(members) > 1 or not name.endswith("_std")]
    manifest = Manifest(
        schema_version=SCHEMA,
        architecture=first.arch,
        models=[model_config(config.model).model_dump() for config in configs],
        units=Units(length="Angstrom", energy="eV"),
        dtype=dtype,
        cutoff=first.cutoff,
        layers=max(model_config(config.model).interactions for config in configs),
        takes_charge=first.charge,
        takes_spin=first.spin,
        outputs=outputs,
        domain=domain,
        e0=_e0(members, domain),
        training=[config.training for config in configs],
        weights_sha256=[config.sha256 for config in configs],
        bytes_per_edge=_bytes_per_edge(potential, evaluator(potential, DTYPES[dtype]), named["triclinic box"]),
        kernel=kernel,
        torch_version=str(torch.__version__),
    )
    if kernel == "fused":
        missing = sorted(set(manifest.architectures) - set(FUSED))
        if missing:
            raise ArtifactError(f"there is no fused kernel for {', '.join(missing)}: export with --kernel torch")
        load_operators()
        potential = fuse(potential, manifest.architectures)
    with replacing(out) as temporary:  # takes its place only when it has proved itself
        artifact.save(temporary, artifact.script(potential.to(device)), manifest, golden)
        made = artifact.load(temporary, device, kernel=kernel)
        made.verify()
    return made


def export_any(
    checkpoints: Sequence[Path],
    out: Path,
    *,
    dtype: Dtype = "float32",
    device: str = "cpu",
    structures: Sequence[Structure] = (),
    overwrite: bool = False,
    kernel: Kernel = "torch",
) -> Artifact | LearnedJump:
    """`export`, or `export_jump` where the checkpoint is that of a jump.

    Raises:
        ArtifactError: as these; also several jumps, or a kernel or structures for one.
    """
    jumps = [folder for folder in checkpoints if read_checkpoint(folder)[0].jump is not None]
    if not jumps:
        return export(
            checkpoints, out, dtype=dtype, device=device, structures=structures, overwrite=overwrite, kernel=kernel
        )
    if len(checkpoints) > 1 or structures or kernel != "torch":
        raise ArtifactError(f"{jumps[0]} is a jump: it is exported alone, without --check and with --kernel torch")
    return export_jump(jumps[0], out, dtype=dtype, device=device, overwrite=overwrite)


def _common_domain(folders: Sequence[Path], configs: Sequence[CheckpointConfig]) -> Domain:
    """The domain of an ensemble; its members must share elements, charges, spins and inputs."""
    first = configs[0]
    for folder, other in zip(folders, configs, strict=True):
        for name in ("cutoff", "charge", "spin"):
            if other.model[name] != first.model[name]:
                raise ArtifactError(
                    f"{folder} has {name} {other.model[name]} but {folders[0]} has {first.model[name]}: "
                    "the members of an ensemble share cutoff and inputs"
                )
        for name in ("elements", "charges", "spins"):
            theirs, ours = getattr(other.domain, name), getattr(first.domain, name)
            if theirs != ours:
                raise ArtifactError(
                    f"{folder} was trained on {name} {theirs} but {folders[0]} on {ours}: the members of an ensemble "
                    "share elements, charges and spins"
                )
    # where every member has seen data
    distances = [config.domain.min_distances for config in configs]
    common = set.intersection(*map(set, distances))
    shortest = {pair: max(seen[pair] for seen in distances) for pair in sorted(common)}
    return first.domain.model_copy(update={"min_distances": shortest})


def synthetic(domain: Domain) -> dict[str, Structure]:
    """Structures that every artifact is tried on: a lone atom of each element and a small triclinic crystal."""
    found = {}
    for symbol in domain.elements:
        found[f"isolated {symbol}"] = Structure(
            np.array([NUMBERS[symbol]]), np.zeros((1, 3)), charge=domain.charges[0], spin=domain.spins[0]
        )
    numbers = np.array([NUMBERS[domain.elements[i % len(domain.elements)]] for i in range(8)])
    grid = np.array(np.meshgrid(*[[0.1, 0.6]] * 3)).reshape(3, -1).T
    cell = np.array([[4.4, 0.0, 0.0], [0.9, 4.2, 0.0], [-0.7, 0.5, 4.6]])
    jitter = 0.15 * np.random.default_rng(0).standard_normal((8, 3))
    found["triclinic box"] = Structure(
        numbers, grid @ cell + jitter, cell, np.ones(3, dtype=bool), domain.charges[0], domain.spins[0]
    )
    return found


def _e0(members: Sequence[Potential], domain: Domain) -> dict[str, float]:
    references = [cast(AtomicModel, member.model).reference for member in members]
    return {
        symbol: float(np.mean([float(r.e0[NUMBERS[symbol]] + r.shift) for r in references]))
        for symbol in domain.elements
    }


def _bytes_per_edge(potential: nn.Module, evaluate: Evaluator, structure: Structure) -> float:
    """Memory that one evaluation keeps for its gradient, weights apart, per edge of `structure`."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in potential.parameters()}
    kept: dict[int, int] = {}  # many tensors are views of one storage

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        evaluate(structure)
    edges: int = evaluate.neighbors.update(structure)[0].shape[1]
    return sum(kept.values()) / max(edges, 1)
