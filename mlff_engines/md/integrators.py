"""One time step of many replicas: velocity Verlet, Langevin and Nosé-Hoover, each replica with its own temperature.

All are built of kicks (v += h/2 F/m) and drifts (x += h v), and evaluate forces once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mlff_engines.errors import ConfigError
from mlff_engines.md.replicas import Replicas
from mlff_engines.units import ACCELERATION, BOLTZMANN

Forces = Callable[[], Tensor]


class Integrator(Protocol):
    """Moves replicas by one step; its own variables stand in `state`, for restarts."""

    timestep: float

    def begin(self, replicas: Replicas) -> None:
        """Make what depends on the replicas."""
        ...

    def step(self, replicas: Replicas, forces: Tensor, evaluate: Forces) -> None:
        """One step. `forces` are those of the present positions; `evaluate` is called once, after these have moved."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that a restart needs beside positions and velocities; tensors that `restore` takes back."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        ...

    def extra_energy(self) -> Tensor | float:
        """What has to be added to the energy of each replica (B,) for a conserved quantity, eV."""
        ...


class VelocityVerlet:
    """Constant energy; Swope et al., J. Chem. Phys. 76, 637 (1982).

    Args:
        timestep: fs.
    """

    def __init__(self, timestep: float) -> None:
        self.timestep = _positive("timestep", timestep)

    def begin(self, replicas: Replicas) -> None:
        """Nothing to make."""

    def step(self, replicas: Replicas, forces: Tensor, evaluate: Forces) -> None:
        """Kick, drift, kick."""
        _kick(replicas, forces, 0.5 * self.timestep)
        replicas.positions += self.timestep * replicas.velocities
        _kick(replicas, evaluate(), 0.5 * self.timestep)

    def state(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""

    def extra_energy(self) -> float:
        """Zero: the energy itself is conserved."""
        return 0.0


class Langevin:
    """Canonical ensemble by BAOAB; Leimkuhler and Matthews, Appl. Math. Res. Express 2013, 34.

    Every replica draws from its own random numbers, so that its path does not depend on the others'.

    Args:
        timestep: fs.
        temperatures: K; one for all, or one for each.
        friction: 1/ps.
        seeds: one for each replica; by default 0, 1, 2, ...
    """

    def __init__(
        self,
        timestep: float,
        temperatures: float | Sequence[float],
        *,
        friction: float = 1.0,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.timestep = _positive("timestep", timestep)
        self.friction = _positive("friction", friction)
        self.temperatures, self.seeds = temperatures, seeds

    def begin(self, replicas: Replicas) -> None:
        """Random generators and the width of the noise."""
        seeds = range(len(replicas)) if self.seeds is None else self.seeds
        if len(seeds) != len(replicas):
            raise ConfigError(f"{len(seeds)} seeds for {len(replicas)} replicas; give one for each")
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._keep = float(torch.exp(torch.tensor(-self.friction * 1e-3 * self.timestep, dtype=torch.float64)))
        heat = _heat(self.temperatures, replicas).index_select(0, replicas.batch)
        self._width = ((1 - self._keep**2) * heat * ACCELERATION / replicas.masses).sqrt().unsqueeze(1)

    def step(self, replicas: Replicas, forces: Tensor, evaluate: Forces) -> None:
        """B A O A B."""
        _kick(replicas, forces, 0.5 * self.timestep)
        replicas.positions += 0.5 * self.timestep * replicas.velocities
        noise = torch.cat(
            [
                torch.randn((len(structure), 3), generator=generator, dtype=torch.float64)
                for structure, generator in zip(replicas.structures, self._generators, strict=True)
            ]
        )
        replicas.velocities.mul_(self._keep).add_(self._width * noise.to(replicas.device))
        replicas.positions += 0.5 * self.timestep * replicas.velocities
        _kick(replicas, evaluate(), 0.5 * self.timestep)

    def state(self) -> dict[str, Tensor]:
        """Of the random generators."""
        return {f"generator.{n}": generator.get_state() for n, generator in enumerate(self._generators)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on with the same random numbers."""
        for n, generator in enumerate(self._generators):
            generator.set_state(state[f"generator.{n}"])

    def extra_energy(self) -> float:
        """Zero; nothing is conserved."""
        return 0.0


class NoseHoover:
    """Canonical ensemble without random numbers: a chain of thermostats for each replica.

    Martyna, Klein and Tuckerman, J. Chem. Phys. 97, 2635 (1992), integrated as in Martyna et al., Mol. Phys. 87, 1117
    (1996), eqs. 29 to 37, with the fourth-order weights of Yoshida, Phys. Lett. A 150, 262 (1990). Momentum is
    conserved: replicas at rest stay there, and have 3N - 3 degrees of freedom.

    Args:
        timestep: fs.
        temperatures: K; one for all, or one for each.
        period: of the thermostats' oscillation, fs.
        length: thermostats in each chain.
    """

    WEIGHTS = (1 / (2 - 2 ** (1 / 3)), 1 - 2 / (2 - 2 ** (1 / 3)), 1 / (2 - 2 ** (1 / 3)))

    def __init__(
        self, timestep: float, temperatures: float | Sequence[float], *, period: float = 100.0, length: int = 3
    ) -> None:
        self.timestep, self.period = _positive("timestep", timestep), _positive("period", period)
        self.temperatures, self.length = temperatures, length
        if length < 1:
            raise ConfigError(f"a chain of {length} thermostats; allowed: 1 or more")

    def begin(self, replicas: Replicas) -> None:
        """Thermostats at rest."""
        self._heat = _heat(self.temperatures, replicas)
        counts = torch.bincount(replicas.batch, minlength=len(replicas)).double()
        self._freedom = (3 * counts - 3).clamp(min=1)
        self._inertia = (self._heat * (self.period / (2 * torch.pi)) ** 2).repeat(self.length, 1)  # eV fs²
        self._inertia[0] *= self._freedom
        self._position = torch.zeros_like(self._inertia)
        self._rate = torch.zeros_like(self._inertia)

    def step(self, replicas: Replicas, forces: Tensor, evaluate: Forces) -> None:
        """Thermostats, velocity Verlet, thermostats."""
        self._thermostat(replicas)
        _kick(replicas, forces, 0.5 * self.timestep)
        replicas.positions += self.timestep * replicas.velocities
        _kick(replicas, evaluate(), 0.5 * self.timestep)
        self._thermostat(replicas)

    def _thermostat(self, replicas: Replicas) -> None:
        """Half a step of the chain, from its end to the atoms and back."""
        twice, scale = 2 * kinetic_energies(replicas), torch.ones_like(self._heat)
        rate, last = self._rate, self.length - 1

        def push(link: int, h: float) -> None:
            drive = twice - self._freedom * self._heat
            if link > 0:
                drive = self._inertia[link - 1] * rate[link - 1] ** 2 - self._heat
            slow = torch.exp(-0.125 * h * rate[link + 1]) if link < last else 1.0
            rate[link] = (rate[link] * slow + 0.25 * h * drive / self._inertia[link]) * slow

        for weight in self.WEIGHTS:
            h = weight * self.timestep
            for link in range(last, -1, -1):
                push(link, h)
            factor = torch.exp(-0.5 * h * rate[0])
            scale, twice = scale * factor, twice * factor**2
            self._position += 0.5 * h * rate
            for link in range(self.length):
                push(link, h)
        replicas.velocities *= scale.index_select(0, replicas.batch).unsqueeze(1)

    def state(self) -> dict[str, Tensor]:
        """Of the thermostats."""
        return {"thermostat.position": self._position.clone(), "thermostat.rate": self._rate.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on with these thermostats."""
        self._position.copy_(state["thermostat.position"])
        self._rate.copy_(state["thermostat.rate"])

    def extra_energy(self) -> Tensor:
        """Of the thermostats (B,), eV."""
        weight = torch.ones_like(self._inertia)
        weight[0] = self._freedom
        return (0.5 * self._inertia * self._rate**2 + weight * self._heat * self._position).sum(0)


def kinetic_energies(replicas: Replicas) -> Tensor:
    """Σ m v²/2 of each replica (B,), eV."""
    return replicas.total(0.5 * replicas.masses * replicas.velocities.square().sum(1) / ACCELERATION)


def _kick(replicas: Replicas, forces: Tensor, time: float) -> None:
    replicas.velocities += (time * ACCELERATION) * forces / replicas.masses.unsqueeze(1)


def _heat(temperatures: float | Sequence[float], replicas: Replicas) -> Tensor:
    """k_B T of each replica (B,), eV."""
    given = torch.as_tensor(temperatures, dtype=torch.float64)
    if given.shape not in ((), (len(replicas),)) or not bool((given > 0).all()):
        raise ConfigError(
            f"temperatures {temperatures} for {len(replicas)} replicas; give one, or one for each, above 0"
        )
    return (BOLTZMANN * given).expand(len(replicas)).clone().to(replicas.device)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ConfigError(f"{name} {value}; allowed: above 0")
    return value
