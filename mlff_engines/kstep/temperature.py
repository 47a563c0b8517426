"""The temperature that configurations have, on the manifold of the bond constraints where there are any.

For any vector field B on that manifold kT = <B·∇U> / <∇·B>; with B = ∇U (Rugh, Phys. Rev. Lett. 78, 772 (1997); Butler,
Ayton, Jepps, Evans, J. Chem. Phys. 109, 6519 (1998)). Positions under constraints are distributed as exp(-U/kT) in the
measure of the mass-weighted metric, so that gradient and divergence are those of this metric, along the manifold.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mlff_engines.kstep.particles import Particles
from mlff_engines.structure import FloatArray


def configurational(
    particles: Particles,
    forces: Callable[[FloatArray], FloatArray],
    x: FloatArray,
    here: FloatArray,
    probe: float,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """|∇U|² and an unbiased estimate of ∇²U at `x`: the ratio of their means over configurations is kT.

    ∇²U = Σ_e <e, D_e ∇U> over all directions e of the manifold, from one random direction (Hutchinson, Commun. Stat.
    Simul. Comput. 19, 433 (1990)): two evaluations of forces.

    Args:
        forces: of positions (N, 3), in any units.
        x, here: positions and the forces there.
        probe: largest displacement of an atom in the finite difference, in the unit of `x`.
    """
    masses = particles.masses[:, None]

    def descent(x: FloatArray, forces: FloatArray) -> FloatArray:
        return particles.tangent(x, forces / masses)

    down = descent(x, here)
    u = particles.tangent(x, rng.standard_normal(x.shape) / np.sqrt(masses))
    scale = probe / float(np.abs(u).max())
    ahead, behind = (descent(y, forces(y)) for y in (x + scale * u, x - scale * u))
    along = (behind - ahead) / (2 * scale)
    return float((masses * down**2).sum()), float((masses * u * along).sum())
