"""The architectures by name. To add one: write its file and its line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from mlff_engines.config import parse
from mlff_engines.errors import ConfigError, suggest
from mlff_engines.models.base import AtomicModel
from mlff_engines.models.lj import LennardJones, LennardJonesConfig
from mlff_engines.models.painn import PaiNN, PaiNNConfig

ModelConfig = PaiNNConfig | LennardJonesConfig

ARCHITECTURES: dict[str, tuple[type[ModelConfig], Callable[[Any], nn.Module]]] = {
    "painn": (PaiNNConfig, PaiNN),
    "lj": (LennardJonesConfig, LennardJones),
}


def model_config(data: Mapping[str, Any], source: str = "model") -> ModelConfig:
    """Validate hyper-parameters; `arch` names the architecture.

    Raises:
        ConfigError: unknown architecture or key, or a value out of range.
    """
    arch = data.get("arch", "painn")
    if arch not in ARCHITECTURES:
        raise ConfigError(f"{source}: unknown architecture {arch!r}{suggest(str(arch), ARCHITECTURES)}")
    return parse(ARCHITECTURES[arch][0], dict(data), source)


def build_model(
    config: ModelConfig, elements: Sequence[str], e0: Mapping[str, float], scale: float = 1.0, shift: float = 0.0
) -> AtomicModel:
    """An untrained model in the default dtype; see `AtomicModel` for the arguments."""
    network = ARCHITECTURES[config.arch][1](config)
    return AtomicModel(network, elements, e0, scale, shift)
