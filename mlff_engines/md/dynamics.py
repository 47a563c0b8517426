"""Molecular dynamics of many replicas, with restarts, and without an end when one of them fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlff_engines.artifact import Artifact
from mlff_engines.errors import ConfigError
from mlff_engines.files import replacing
from mlff_engines.md.integrators import Integrator, kinetic_energies
from mlff_engines.md.replicas import BatchEvaluator, BatchResult, Replicas
from mlff_engines.neighbors import SKIN
from mlff_engines.units import ACCELERATION, BOLTZMANN

FARTHEST = 1.0  # Å in one step: no atom of a stable run moves so far


class BatchDynamics:
    """Runs `replicas` with one artifact.

    >>> replicas = Replicas([molecule] * 32)
    >>> draw_velocities(replicas, 300.0, seeds=range(32))
    >>> dynamics = BatchDynamics(load("student.pt"), replicas, Langevin(0.5, 300.0))
    >>> for step in dynamics.run(100_000, every=20):
    ...     energies.append(dynamics.result.energies)

    A replica whose forces are not finite, or one of whose atoms moves more than 1 Å in a step, has failed: it stops
    where it was before that step, and the others go on.

    Attributes:
        replicas: move as `run` goes on.
        result: energies, forces and virials of the present positions.
        steps: made so far.
        failed: by replica, the step that it could not make.

    Args:
        artifact: loaded on the device of `replicas`.
        replicas: with velocities.
        integrator: of `mlff_engines.md.integrators`.
        skin: of the neighbour lists, Å.
    """

    def __init__(self, artifact: Artifact, replicas: Replicas, integrator: Integrator, *, skin: float = SKIN) -> None:
        self.replicas, self.integrator = replicas, integrator
        self.steps = 0
        self.failed: dict[int, int] = {}
        self._evaluate = BatchEvaluator(artifact, replicas, skin=skin)
        integrator.begin(replicas)
        self.result: BatchResult = self._evaluate()

    def run(self, steps: int, every: int = 1) -> Iterator[int]:
        """Make `steps` steps; gives the number of steps made so far after each `every` of them."""
        for step in range(1, steps + 1):
            self._step()
            if step % every == 0:
                yield self.steps

    def conserved(self) -> Tensor:
        """The quantity that each replica's dynamics conserves (B,), eV: energies, thermostats included."""
        return self.result.energies + kinetic_energies(self.replicas) + self.integrator.extra_energy()

    def temperatures(self) -> Tensor:
        """From the kinetic energy and 3N degrees of freedom of each replica (B,), K."""
        counts = torch.bincount(self.replicas.batch, minlength=len(self.replicas))
        return 2 * kinetic_energies(self.replicas) / (3 * counts * BOLTZMANN)

    def _step(self) -> None:
        before = self.replicas.positions.clone()

        def forces() -> Tensor:
            far = (self.replicas.positions - before).square().sum(1) > FARTHEST**2
            self._stop(far | ~self.replicas.positions.isfinite().all(1), before)
            self.result = self._evaluate()
            bad = ~(self.result.forces.isfinite().all(1) & self.result.energies.isfinite()[self.replicas.batch])
            if self._stop(bad, before):
                self.result = self._evaluate()
            return self.result.forces

        self.integrator.step(self.replicas, self.result.forces, forces)
        for replica in self.failed:
            self.replicas.velocities[self.replicas.atoms(replica)] = 0.0
        self.steps += 1

    def _stop(self, bad: Tensor, before: Tensor) -> bool:
        """Stop the replicas of atoms that are `bad`; whether there are any."""
        stopped = sorted(set(self.replicas.batch[bad].tolist()) - set(self.failed))
        for replica in stopped:
            self.failed[replica] = self.steps + 1
            self._evaluate.leave_out(replica)
        for replica in self.failed:  # thermostats would move them
            atoms = self.replicas.atoms(replica)
            self.replicas.positions[atoms] = before[atoms]
        return bool(stopped)

    def save(self, path: Path) -> None:
        """Write a restart: it goes on bitwise as if it had never stopped."""
        tensors = {f"integrator.{name}": tensor for name, tensor in self.integrator.state().items()}
        tensors |= {"positions": self.replicas.positions, "velocities": self.replicas.velocities}
        failed = torch.tensor([[r, s] for r, s in self.failed.items()], dtype=torch.int64).reshape(-1, 2)
        tensors |= {"steps": torch.tensor(self.steps), "failed": failed}
        with replacing(path) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)

    def restore(self, path: Path) -> None:
        """Go on from a restart of the same replicas.

        Raises:
            ConfigError: it is of others.
        """
        tensors = load_file(path)
        if tensors["positions"].shape != self.replicas.positions.shape:
            raise ConfigError(
                f"{path} holds {len(tensors['positions'])} atoms, the replicas have {len(self.replicas.positions)}"
            )
        self.replicas.positions.copy_(tensors["positions"])
        self.replicas.velocities.copy_(tensors["velocities"])
        self.steps = int(tensors["steps"])
        self.failed = {int(replica): int(step) for replica, step in tensors["failed"]}
        for replica in self.failed:
            self._evaluate.leave_out(replica)
        own = {name.removeprefix("integrator."): t for name, t in tensors.items() if name.startswith("integrator.")}
        self.integrator.restore(own)
        self.result = self._evaluate()


def draw_velocities(replicas: Replicas, temperatures: float | Sequence[float], seeds: Sequence[int]) -> None:
    """Maxwell-Boltzmann velocities, each replica's centre of mass at rest.

    Args:
        replicas: get them.
        temperatures: K; one for all, or one for each.
        seeds: one for each.
    """
    given = torch.as_tensor(temperatures, dtype=torch.float64).expand(len(replicas))
    if len(seeds) != len(replicas):
        raise ConfigError(f"{len(seeds)} seeds for {len(replicas)} replicas; give one for each")
    for replica, (temperature, seed) in enumerate(zip(given.tolist(), seeds, strict=True)):
        atoms = replicas.atoms(replica)
        masses = replicas.masses[atoms].cpu().unsqueeze(1)
        noise = torch.randn((len(masses), 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        velocities = noise * (BOLTZMANN * temperature * ACCELERATION / masses).sqrt()
        if len(masses) > 1:
            velocities -= (masses * velocities).sum(0) / masses.sum()
        replicas.velocities[atoms] = velocities.to(replicas.device)
