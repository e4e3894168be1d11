"""Frozen dataclasses out of plain data, with an error that names the place of what is wrong. Knows no setting by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from falconlib.errors import WORDS, FalconError, did_you_mean, shown

SUCH_AS = {"str": "tiny", "int": "5", "float": "0.1", "bool": "true", "tuple[int, ...]": "0,1", "tuple[str, ...]": "grpo,falcon"}


def build(kind: type, data: dict[str, Any], where: str = "") -> Any:
    """A frozen dataclass from plain data. Raises FalconError on an unknown name or a wrong type, naming the place."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for name, value in data.items():
        place = f"{where}.{name}".lstrip(".")
        if name not in fields:
            raise did_you_mean("parameter", place, [f"{where}.{f}".lstrip(".") for f in fields])
        default = getattr(kind(), name)
        if dataclasses.is_dataclass(default) and type(value) is not type(default):
            if not isinstance(value, dict):
                raise FalconError(f"parameter {place} is a group of settings, not {shown(value)}", f"set {place}.<name>")
            values[name] = build(type(default), {**flat(default), **value}, place)
        else:
            values[name] = value if dataclasses.is_dataclass(default) else typed(value, str(fields[name].type), place)
    return kind(**values)


def typed(value: Any, annotation: str, place: str, strict: bool = True) -> Any:
    """`value` if it has the annotated type (an int passes as a float, a list as a tuple; not strict: text that spells a value
    passes as it), else FalconError."""
    plain = {"str": str, "int": int, "float": float, "bool": bool, "tuple[int, ...]": tuple[int, ...]}
    kind = plain.get(annotation, tuple[str, ...])
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        unread = strict and kind is float and isinstance(value, str)
        hint = "YAML reads 1e-5 as text: write 1.0e-5" if unread else f"--set {place}={SUCH_AS[annotation]}"
        raise FalconError(f"parameter {place} = {shown(value)}: {WORDS[annotation]} is expected", hint) from error


def flat(config: Any) -> dict[str, Any]:
    """The fields of one dataclass as a dict, groups left as they are."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def leaves(config: Any, prefix: str = "") -> dict[str, tuple[str, Any]]:
    """Dotted name -> (annotation, value) of all settings, those in groups included."""
    found: dict[str, tuple[str, Any]] = {}
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), prefix + f.name
        found |= leaves(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: (str(f.type), value)}
    return found
