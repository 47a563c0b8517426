"""Fixed bond lengths: SHAKE for positions, RATTLE for velocities, both solved by Newton's method.

SHAKE: Ryckaert, Ciccotti, Berendsen, J. Comput. Phys. 23, 327 (1977); RATTLE: Andersen, J. Comput. Phys. 52, 24 (1983).
Constraints that share atoms form clusters; the equations of a cluster are solved together.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt

from mlff_engines.errors import ConfigError, SimulationError
from mlff_engines.structure import FloatArray, IntArray

TOLERANCE = 1e-12  # of |d²/l² - 1|/2: Newton's last step goes far below
MOST_ITERATIONS = 50
DENSE = 48  # so few are solved as one cluster: quicker than several
MATCHED_LENGTH = 1e-6  # relative; a bond that is worse does not have its length


class BondConstraints:
    """Bonds i-j kept at their lengths.

    Args:
        pairs: (C, 2) atoms.
        lengths: (C,) Å.
        masses: (N,) amu.
        shifts: (C, 3) Å, added to x_j - x_i: for bonds that cross a periodic boundary.

    Raises:
        ConfigError: an atom that is not there, a bond of an atom with itself or given twice, a length or mass that is
            not positive.
    """

    def __init__(
        self,
        pairs: npt.ArrayLike,
        lengths: npt.ArrayLike,
        masses: npt.ArrayLike,
        shifts: FloatArray | None = None,
    ) -> None:
        self.pairs: IntArray = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        self.lengths = np.asarray(lengths, dtype=np.float64)
        self.masses = np.asarray(masses, dtype=np.float64)
        self.shifts = np.zeros((len(self.pairs), 3)) if shifts is None else np.asarray(shifts, dtype=np.float64)
        self._check()
        inverse = 1 / self.masses
        # constraints by cluster, clusters by size: (clusters, size) indices and couplings (clusters, size, size)
        self._blocks: list[tuple[IntArray, FloatArray]] = []
        by_size: dict[int, list[list[int]]] = defaultdict(list)
        few = len(self.pairs) <= DENSE
        for cluster in [list(range(len(self.pairs)))] if few else _clusters(self.pairs):
            by_size[len(cluster)].append(cluster)
        for clusters in by_size.values():
            index = np.array(clusters)
            ends = self.pairs[index]  # (clusters, size, 2)
            sign = np.array([-1.0, 1.0])
            same = ends[:, :, None, :, None] == ends[:, None, :, None, :]
            weight = sign[:, None] * sign * inverse[ends][:, :, None, :, None]
            self._blocks.append((index, (same * weight).sum((-1, -2))))

    def __len__(self) -> int:
        return len(self.pairs)

    def vectors(self, x: FloatArray) -> FloatArray:
        """Bond vectors x_j - x_i (C, 3), Å."""
        bonds: FloatArray = x[self.pairs[:, 1]] - x[self.pairs[:, 0]] + self.shifts
        return bonds

    def positions(self, x: FloatArray, reference: FloatArray) -> FloatArray:
        """SHAKE: `x` (N, 3) moved along the bonds of `reference`, with weights 1/m, until all lengths are right.

        Raises:
            SimulationError: no solution is found.
        """
        along = self.vectors(reference)
        for _ in range(MOST_ITERATIONS):
            bonds = self.vectors(x)
            excess = 0.5 * (np.einsum("ca,ca->c", bonds, bonds) - self.lengths**2)
            error = np.abs(excess) / self.lengths**2
            if not np.isfinite(error).all():
                break
            if error.max(initial=0.0) < TOLERANCE:
                return x
            try:
                x = x + self._displacement(self._solve(bonds, along, -excess), along)
            except np.linalg.LinAlgError:  # such as a bond turned by a right angle
                break
        bonds = self.vectors(x)
        worst = int(np.argmax(np.nan_to_num(np.abs(np.linalg.norm(bonds, axis=1) / self.lengths - 1), nan=np.inf)))
        i, j = self.pairs[worst]
        raise SimulationError(
            f"the constraint of bond {i}-{j} cannot be met: {np.linalg.norm(self.vectors(reference)[worst]):.4f} Å "
            f"before the step, {np.linalg.norm(bonds[worst]):.4g} Å after {MOST_ITERATIONS} iterations, wanted "
            f"{self.lengths[worst]:.4f} Å. The step is too large or the forces are wrong: use a smaller time step"
        )

    def velocities(self, x: FloatArray, v: FloatArray) -> FloatArray:
        """RATTLE: `v` (N, 3) without the parts that would change bond lengths at `x`, orthogonal in the mass metric.

        Raises:
            SimulationError: the constraints are redundant.
        """
        bonds = self.vectors(x)
        stretching = np.einsum("ca,ca->c", bonds, v[self.pairs[:, 1]] - v[self.pairs[:, 0]])
        try:
            return v + self._displacement(self._solve(bonds, bonds, -stretching), bonds)
        except np.linalg.LinAlgError:
            raise SimulationError(
                f"the bond constraints of atoms {np.unique(self.pairs).tolist()[:20]} are redundant: constrain fewer"
            ) from None

    def require_met(self, x: FloatArray) -> None:
        """Refuse positions that do not have the lengths.

        Raises:
            SimulationError: naming the worst bond.
        """
        error = np.abs(np.linalg.norm(self.vectors(x), axis=1) / self.lengths - 1)
        if error.max(initial=0.0) > MATCHED_LENGTH:
            worst = int(np.argmax(error))
            i, j = self.pairs[worst]
            raise SimulationError(
                f"bond {i}-{j} is {np.linalg.norm(self.vectors(x)[worst]):.5f} Å long at the start, its constraint "
                f"wants {self.lengths[worst]:.5f} Å: project the positions first, or constrain the present lengths"
            )

    def _solve(self, rows: FloatArray, columns: FloatArray, right: FloatArray) -> FloatArray:
        """Multipliers (C,): for each cluster, sum_b K_ab rows_a·columns_b multiplier_b = right_a."""
        multipliers = np.zeros(len(self))
        for index, coupling in self._blocks:
            matrix = coupling * np.einsum("nax,nbx->nab", rows[index], columns[index])
            multipliers[index] = np.linalg.solve(matrix, right[index][..., None])[..., 0]
        return multipliers

    def _displacement(self, multipliers: FloatArray, along: FloatArray) -> FloatArray:
        moved = np.zeros((len(self.masses), 3))
        push = multipliers[:, None] * along
        np.add.at(moved, self.pairs[:, 1], push)
        np.subtract.at(moved, self.pairs[:, 0], push)
        return moved / self.masses[:, None]

    def _check(self) -> None:
        atoms, count = len(self.masses), len(self.pairs)
        if self.lengths.shape != (count,) or self.shifts.shape != (count, 3):
            raise ConfigError(f"{count} bonds, but lengths {self.lengths.shape} and shifts {self.shifts.shape}")
        if not ((self.lengths > 0).all() and np.isfinite(self.lengths).all() and (self.masses > 0).all()):
            raise ConfigError("bond constraints need finite lengths > 0 and masses > 0")
        outside = ((self.pairs < 0) | (self.pairs >= atoms)).any(1)
        bad = self.pairs[outside | (self.pairs[:, 0] == self.pairs[:, 1])]
        if len(bad):
            raise ConfigError(f"bond {bad[0].tolist()} among {atoms} atoms; allowed: two different atoms below {atoms}")
        if len(np.unique(np.sort(self.pairs, axis=1), axis=0)) != count:
            raise ConfigError("a bond is constrained twice: name each pair once")


def _clusters(pairs: IntArray) -> list[list[int]]:
    """Indices of the constraints in each connected component."""
    parent: dict[int, int] = {}

    def root(atom: int) -> int:
        while parent.setdefault(atom, atom) != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    for i, j in pairs.tolist():
        parent[root(i)] = root(j)
    found: dict[int, list[int]] = defaultdict(list)
    for number, (i, _) in enumerate(pairs.tolist()):
        found[root(i)].append(number)
    return list(found.values())
