"""A jump from an artifact: structure and velocities in, displacement out, only for what it was made for."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mlff_engines import artifact
from mlff_engines.checkpoint import CheckpointConfig, Domain, StructureRecord, load_jump_checkpoint, set_dtype
from mlff_engines.compilation import Signature, place
from mlff_engines.config import parse
from mlff_engines.errors import ArtifactError, ConfigError, KernelWarning, MissingEngineError, StructureError
from mlff_engines.files import replacing
from mlff_engines.graph import Graph, make_graph
from mlff_engines.kstep.jumps import Displacement
from mlff_engines.manifest import DTYPES, SCHEMA, TOLERANCE, Dtype, GoldenJump, Manifest, Units
from mlff_engines.models.jump import INPUTS, JumpConfig, JumpModel, JumpTerms
from mlff_engines.neighbors import SKIN, VerletList
from mlff_engines.structure import NUMBERS, SYMBOLS, FloatArray, IntArray, Structure
from mlff_engines.units import ACCELERATION, BOLTZMANN

SAME = 1e-3  # relative difference of masses or time steps: tables of standard weights differ by less, isotopes by more
FLOATS: dict[Dtype, float] = {"float32": 1e-4, "float64": TOLERANCE["float64"]}  # relative, of golden vectors


class LearnedJump:
    """A network that jumps, with its terms and a neighbour list. Make one with `load`, or from a model.

    Args:
        module: maps the graph of `mlff_engines.models.jump` to its outputs.
        cutoff: Å.

    Attributes:
        kernel: "compiled" if torch has compiled `module` for this machine, else "torch".
    """

    def __init__(
        self,
        module: nn.Module,
        terms: JumpTerms,
        cutoff: float,
        *,
        takes_temperature: bool = False,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        skin: float = SKIN,
    ) -> None:
        self.module, self.terms, self.takes_temperature = module, terms, takes_temperature
        self.dtype, self.device = dtype, torch.device(device)
        self.neighbors = VerletList(cutoff, skin)
        self.kernel: artifact.Running = "torch"
        self.manifest: Manifest | None = None
        self.golden: list[GoldenJump] = []

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: Dtype | None = None,
        skin: float = SKIN,
        kernel: str | None = None,
    ) -> LearnedJump:
        """From the artifact of a jump; arguments and errors as of `mlff_engines.artifact.load`.

        Raises:
            ArtifactError: as there; there is no fused kernel for jumps.
        """
        kernel = artifact.kernel_asked(kernel)
        manifest, golden, module, where = artifact.load_jump(Path(path), device, dtype)
        config, terms = parse(JumpConfig, manifest.models[0], str(path)), manifest.jump
        assert terms is not None
        found = cls(
            module,
            terms,
            manifest.cutoff,
            takes_temperature=config.temperature,
            dtype=DTYPES[dtype or manifest.dtype],
            device=where,
            skin=skin,
        )
        found.manifest, found.golden = manifest, golden
        found._choose(Path(path), manifest, config, kernel)
        if torch.__version__.split("+")[0] != manifest.torch_version.split("+")[0]:
            warnings.warn(
                f"{path} was made with torch {manifest.torch_version} and runs on {torch.__version__}: "
                "replaying its golden vectors",
                stacklevel=2,
            )
            found.verify()
        return found

    def __call__(self, structure: Structure, velocities: FloatArray, temperature: float | None = None) -> Displacement:
        """The jump of `structure` moving at `velocities` (N, 3) Å/fs; `temperature` in K where the model takes it.

        Raises:
            ConfigError: no temperature, though the model takes one.
            StructureError: an element that it does not know.
        """
        out = self.evaluate(structure, velocities, temperature)
        clamped = int(out["clamped"].sum())
        return Displacement(out["dx"].cpu().numpy(), out["dv"].cpu().numpy(), clamped)

    def evaluate(self, structure: Structure, velocities: FloatArray, temperature: float | None = None) -> Graph:
        """All outputs, see `mlff_engines.models.jump`; errors as when called."""
        self._require_elements(structure.numbers)
        if self.takes_temperature and temperature is None:
            raise ConfigError(f"this jump takes the temperature; it was trained at {self.terms.temperatures} K")
        index, edge_vec = self.neighbors.update(structure)
        graph = make_graph(
            torch.from_numpy(structure.numbers).to(self.device),
            torch.from_numpy(index).to(self.device),
            torch.from_numpy(edge_vec).to(self.device, self.dtype),
        )
        graph["velocities"] = torch.from_numpy(np.ascontiguousarray(velocities)).to(self.device)
        given = self.terms.temperatures[0] if temperature is None else temperature
        graph["temperature"] = torch.tensor([given], dtype=self.dtype, device=self.device)
        with torch.no_grad():
            return artifact.execute(self.module, graph)

    def require(self, numbers: IntArray, masses: FloatArray, timestep: float, steps: int, constraints: str) -> None:
        """Refuse a run that the jump was not made for.

        Args:
            timestep: fs.
            constraints: "none", "hbonds" or another name.

        Raises:
            ConfigError: other masses, time step, number of steps or constraints.
            StructureError: an element that it does not know.
        """
        self._require_elements(numbers)
        terms, problems = self.terms, []
        wanted = np.array([terms.masses[SYMBOLS[z]] for z in numbers])
        wrong = np.flatnonzero(np.abs(masses / wanted - 1) > SAME)
        if len(wrong):
            atom = wrong[0]
            problems.append(
                f"masses: {masses[atom]:g} amu on atom {atom} ({SYMBOLS[numbers[atom]]}), trained with {wanted[atom]:g}"
                f" ({len(wrong)} such atoms)"
            )
        if abs(timestep / terms.timestep - 1) > SAME:
            problems.append(f"time step: {timestep:g} fs, trained with {terms.timestep:g} fs")
        if steps != terms.steps:
            problems.append(f"steps per jump: {steps}, trained with {terms.steps}")
        if constraints != terms.constraints:
            problems.append(f"constraints: {constraints}, trained with {terms.constraints}")
        if problems:
            raise ConfigError(
                f"the jump was made for another run: {'; '.join(problems)}. Run it as it was trained, or train another"
            )

    def _choose(self, path: Path, manifest: Manifest, config: JumpConfig, kernel: str) -> None:
        """Put what torch compiled for this machine in place of the program, if it is asked for or there."""
        if kernel == "fused":
            raise ArtifactError(f"there is no fused kernel for jumps, such as {path}: use kernel='auto' or 'torch'")
        where = place(manifest.sha256, self.dtype, self.device)
        if kernel == "torch" or (kernel == "auto" and not where.is_file()):  # never made unasked
            return

        def eager() -> JumpModel:
            model = JumpModel(config, self.terms)
            set_dtype(model, torch.float64)
            model.load_state_dict(self.module.state_dict())
            set_dtype(model, self.dtype)
            return model.eval().to(self.device)

        signature = Signature(INPUTS, manifest.outputs, self.dtype, self.device)
        try:
            self.module = artifact.compiled(self, where, eager, signature)
            self.kernel = "compiled"
        except (ArtifactError, MissingEngineError) as error:
            if kernel == "compiled" and isinstance(error, MissingEngineError):
                raise ArtifactError(f"{path} has no compiled form here: {error}. Or use kernel='torch'") from None
            if kernel == "compiled":
                raise
            warnings.warn(f"{error}. Plain torch is used", KernelWarning, stacklevel=3)

    def verify(
        self, advice: str = "Export the artifact again from its checkpoint on this machine"
    ) -> dict[str, dict[str, float]]:
        """Replay the golden vectors; their deviations by name.

        Args:
            advice: what to do where they differ.

        Raises:
            ArtifactError: a deviation above the tolerance of the dtype, or no golden vectors.
        """
        if not self.golden:
            raise ArtifactError("the artifact has no golden vectors; export it again from its checkpoint")
        tolerance = FLOATS["float64" if self.dtype == torch.float64 and self._exact else "float32"]
        found = {}
        for g in self.golden:
            jump = self(g.structure, np.reshape(g.velocities, (-1, 3)), g.temperature)
            found[g.name] = g.deviation(jump.dx, jump.dv)
            for quantity, deviation in found[g.name].items():
                if not deviation <= tolerance:
                    raise ArtifactError(
                        f"golden vector {g.name!r}: {quantity} off by {deviation:.3g} of its size, allowed "
                        f"{tolerance:g}. {advice}"
                    )
        return found

    @property
    def _exact(self) -> bool:
        return self.manifest is None or self.manifest.dtype == "float64"

    def _require_elements(self, numbers: IntArray) -> None:
        unknown = sorted({SYMBOLS[z] for z in numbers} - set(self.terms.masses))
        if unknown:
            raise StructureError(
                f"the jump does not know {', '.join(unknown)}; it was trained for {', '.join(self.terms.masses)}"
            )


def export_jump(
    checkpoint: Path, out: Path, *, dtype: Dtype = "float32", device: str = "cpu", overwrite: bool = False
) -> LearnedJump:
    """Write the artifact of a jump, and replay its golden vectors.

    Raises:
        ArtifactError: no checkpoint of a jump, an existing `out`, or an artifact that is not as the eager model.
    """
    if dtype not in DTYPES:
        raise ArtifactError(f"dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out} exists; choose another name or pass --overwrite")
    model, config = load_jump_checkpoint(checkpoint)
    terms, hyper = config.jump, parse(JumpConfig, config.model, str(checkpoint))
    assert terms is not None
    reference = copy.deepcopy(model)
    set_dtype(reference, torch.float64)
    exact = LearnedJump(reference.eval(), terms, hyper.cutoff, takes_temperature=hyper.temperature, skin=0)
    golden = [_record(name, structure, exact) for name, structure in _tried(config).items()]
    set_dtype(model, DTYPES[dtype])
    manifest = Manifest(
        schema_version=SCHEMA,
        kind="jump",
        jump=terms,
        architecture=hyper.arch,
        models=[hyper.model_dump()],
        units=Units(length="Angstrom", energy="eV"),
        dtype=dtype,
        cutoff=hyper.cutoff,
        layers=hyper.hops,
        takes_charge=False,
        takes_spin=False,
        outputs=["dx", "dv", "clamped", "drift_x", "drift_v", *(["forces"] if hyper.forces else [])],
        domain=config.domain,
        e0={},
        training=[config.training],
        weights_sha256=[config.sha256],
        torch_version=str(torch.__version__),
    )
    with replacing(out) as temporary:  # takes its place only when it has proved itself
        artifact.save(temporary, artifact.script(model.to(device)), manifest, golden)
        made = LearnedJump.load(temporary, device)
        made.verify()
    return made


def _tried(config: CheckpointConfig) -> dict[str, Structure]:
    """The structures recorded, or a chain of all elements."""
    recorded = {f"structure {i}": record.structure for i, record in enumerate(config.structures)}
    return recorded | {"chain": _chain(config.domain)}


def _chain(domain: Domain) -> Structure:
    numbers = np.array([NUMBERS[symbol] for symbol in domain.elements * 2])
    steps = np.arange(len(numbers))[:, None] * np.array([[1.1, 0.4, -0.3]])
    return Structure(numbers, steps + np.random.default_rng(0).normal(0, 0.1, steps.shape))


def _record(name: str, structure: Structure, jump: LearnedJump) -> GoldenJump:
    temperature = jump.terms.temperatures[0]
    masses = np.array([jump.terms.masses[SYMBOLS[z]] for z in structure.numbers])
    thermal = np.sqrt(BOLTZMANN * temperature * ACCELERATION / masses)[:, None]
    velocities = thermal * np.random.default_rng(1).standard_normal(structure.positions.shape)
    found = jump(structure, velocities, temperature)
    return GoldenJump(
        **StructureRecord.of(structure).model_dump(),
        name=name,
        velocities=velocities.tolist(),
        temperature=temperature,
        dx=found.dx.tolist(),
        dv=found.dv.tolist(),
    )
