"""Message passing by exchange: between two layers the features of ghost atoms come from the ranks that own them.

A LAMMPS with KOKKOS hands `pair_style mliap unified` two calls that a plain one does not have, for contiguous tensors
(owned and ghost atoms, features):

| call                            | what it writes to `to`                                                         |
|---------------------------------|--------------------------------------------------------------------------------|
| `forward_exchange(from, to, n)` | `from`, and in the rows of ghosts the rows of their owners                     |
| `reverse_exchange(from, to, n)` | `from`, the rows of ghosts added to those of their owners, and zero for ghosts |

The second is the gradient of the first. With them no rank needs more ghosts than those within one cutoff, nor their
pairs, however many layers there are: the gradient that comes home is that of the energy of all ranks.

Tested against an emulation of these calls between two domains in two threads; not yet run on a LAMMPS with KOKKOS.
There it is meant for GPUs: on CPUs these calls are known to crash (https://github.com/lammps/lammps/issues/4814).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mlff_engines.artifact import Artifact
from mlff_engines.checkpoint import set_dtype
from mlff_engines.errors import ConfigError
from mlff_engines.graph import Graph
from mlff_engines.potential import Potential
from mlff_lammps.host import Host

# by architecture: the modules, called with the scalar (N, F) and vector features (N, 3, F) of atoms first, that read
# those of neighbours; not the first, for what it reads depends on the element alone
LATER_LAYERS: dict[str, Callable[[Any], Iterable[nn.Module]]] = {
    "painn": lambda network: network.messages[1:],
    "lj": lambda network: (),
}


class LayerByLayer:
    """An artifact as plain torch code with an exchange before each layer but the first. On every rank or on none.

    Args:
        artifact: gives the weights, dtype and device.
        host: LAMMPS.

    Raises:
        ConfigError: an architecture whose layers are not known here.
    """

    def __init__(self, artifact: Artifact, host: Host) -> None:
        architectures = artifact.manifest.architectures
        missing = sorted(set(architectures) - set(LATER_LAYERS))
        if missing:
            raise ConfigError(
                f"no exchange between the layers of {', '.join(missing)}: run it in a LAMMPS without KOKKOS, or "
                "without -suffix kk, with ghost neighbours"
            )
        self.host = host
        potential = artifact.eager()
        set_dtype(potential, artifact.dtype)
        self.potential = potential.eval().to(artifact.device)
        members: list[Any] = [member for member in potential.modules() if isinstance(member, Potential)]
        for architecture, member in zip(architectures, members, strict=True):
            for layer in LATER_LAYERS[architecture](member.model.network):
                layer.register_forward_pre_hook(self._exchange)
        self._data: Any = None

    def __call__(self, graph: Graph, data: Any) -> Graph:
        """Evaluate owned and ghost atoms, with the edges of owned ones; every rank must call it, empty or not.

        Other ranks wait in an exchange for one that fails: then all of them are ended.
        """
        self._data = data
        try:
            # MPI is called on the way back too, and only by the thread that LAMMPS called
            with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
                out: Graph = self.potential(graph)
                return out
        except Exception as error:
            self.host.abort(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._data = None

    def probe(self, data: Any, elements: Tensor, owned: Tensor) -> None:
        """Try both calls on known numbers: some releases of 2025 have them wrong, and say nothing.

        Args:
            data: of LAMMPS.
            elements: (N,) index of the element.
            owned: (N,) whether this rank owns the atom.

        Raises:
            ConfigError: on every rank, if they are wrong on any.
        """
        known = torch.stack(
            [elements + 1.0, 7.0 * elements + 2.0, torch.full_like(elements, 3.0, dtype=torch.double)], 1
        )
        known = known.double().requires_grad_()
        with torch.autograd.set_multithreading_enabled(False):
            found = exchanged(known * owned.unsqueeze(1), data)
            (copies,) = torch.autograd.grad(found, known, torch.ones_like(found))
        # each owned atom is itself and its ghosts: their number, over all ranks, is that of all atoms
        off = round(float((copies[owned].sum() / 3 - len(elements)).item()))
        wrong = int((found != known).sum())
        if self.host.total(wrong) or self.host.total(off):
            raise ConfigError(
                "this LAMMPS does not carry the features of atoms to their ghosts and back (known numbers came out "
                "wrong, as with the releases from October to December 2025): use a newer one, or a plain LAMMPS with "
                "ghost neighbours: mlff lammps build makes one"
            )

    def _exchange(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before a layer: its features of atoms with those of ghosts brought up to date."""
        q, mu, *others = arguments
        features = torch.cat([q.unsqueeze(1), mu], dim=1)  # (N, 4, F)
        q, mu = exchanged(features.flatten(1), self._data).unflatten(1, (4, -1)).split([1, 3], dim=1)
        return q.squeeze(1), mu, *others


def exchanged(features: Tensor, data: Any) -> Tensor:
    """`features` (N, any) with the rows of ghosts from their owners; the gradient goes the other way."""
    made: Tensor = _Exchange.apply(features, data)  # type: ignore[no-untyped-call]
    return made


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, data: Any) -> Tensor:
        ctx.data = data
        return _called(data.forward_exchange, features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _called(ctx.data.reverse_exchange, gradient), None


def _called(exchange: Callable[[Tensor, Tensor, int], object], given: Tensor) -> Tensor:
    given = given.contiguous()
    made = torch.empty_like(given)
    synchronize(given.device)
    exchange(given, made, given.shape[1])
    synchronize(given.device)
    return made


def synchronize(device: torch.device) -> None:
    """KOKKOS and torch have streams of their own: neither may read what the other is still writing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
