"""Typed configuration: a pydantic model per section, checked before any compute, explained when wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mlff_engines.errors import ConfigError, suggest


class Config(BaseModel):
    """Base of every configuration section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse(kind: type[ConfigT], data: Any, source: str) -> ConfigT:
    """Validate `data` as `kind`.

    Raises:
        ConfigError: naming `source`, each offending key, what was got and, for an unknown key, the nearest match.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = [_explain(kind, detail) for detail in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems)) from None


def load_yaml(kind: type[ConfigT], path: Path) -> ConfigT:
    """Read and validate one YAML file."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    return parse(kind, {} if data is None else data, str(path))


def describe_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per key of `kind` and the sections in it: name, default, meaning."""
    lines = []
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        sections = _models_in(field.annotation)
        if sections:
            lines += describe_keys(sections[0], f"{prefix}{name}.")
            continue
        shown = "required" if field.is_required() else f"default {default}"
        lines.append(f"{prefix + name:36s} {shown}" + (f": {field.description}" if field.description else ""))
    return lines


def _explain(kind: type[BaseModel], detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        allowed = _keys_beside(kind, detail["loc"])
        return f"unknown key {path!r}{suggest(str(detail['loc'][-1]), allowed)}"
    if detail["type"] == "missing":
        return f"missing key {path!r}"
    return f"{path} = {detail['input']!r}: {detail['msg']}"


def _keys_beside(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys allowed where the unknown key `loc` stands."""
    section: type[BaseModel] = kind
    for part in loc[:-1]:
        field = section.model_fields.get(str(part))
        for candidate in _models_in(field.annotation) if field else []:
            section = candidate
    return list(section.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _models_in(part)]
