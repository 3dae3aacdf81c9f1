"""Base of every configuration: a frozen dataclass that goes to YAML and back, and has a digest.

Order: a recipe builds the whole config → the command line overrides fields → `to_yaml` is saved with the run →
`from_yaml` gives the same object back, refusing what it does not know.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

_IS_ADDED_LATER = "is_added_later"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A configuration: frozen, keyword-only, validated where it is built."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested dicts, lists, numbers and strings; a nested union member names its type under `type`."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def to_yaml(self) -> str:
        """Return the YAML text that `from_yaml` reads back to an equal object."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text

    def flat(self) -> dict[str, str]:
        """Return dotted names to values as text, for trackers that know only flat parameters."""
        return dict(_flatten("", self.to_dict()))

    def digest(self) -> str:
        """Return the sha256 of the canonical JSON of all fields."""
        return digest_of(self.to_dict())

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Return the config that `to_yaml` wrote.

        Raises:
            ValueError: for an unknown or missing field or a value of another type, naming it.
        """
        raw = yaml.safe_load(text)
        if not isinstance(raw, dict):
            raise ValueError(f"a config file holds a mapping of fields, got {type(raw).__name__}")
        built: Self = _build(cls, raw, cls.__name__)
        return built


def added_later(default: Any) -> Any:
    """Return a config field that plain data leaves out at its default: what older code made keeps its digests."""
    return dataclasses.field(default=default, metadata={_IS_ADDED_LATER: True})


def digest_of(content: Any) -> str:
    """Return the sha256 of the canonical JSON of `content` (sorted keys, no spaces)."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        said = [field for field in dataclasses.fields(value) if _is_said(field, getattr(value, field.name))]
        return {"type": type(value).__name__, **{field.name: _plain(getattr(value, field.name)) for field in said}}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _is_said(field: dataclasses.Field[Any], value: Any) -> bool:
    return _IS_ADDED_LATER not in field.metadata or bool(value != field.default)


def _flatten(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for name, item in value.items() for pair in _flatten(f"{prefix}.{name}" if prefix else name, item)]
    return [(prefix, json.dumps(value) if isinstance(value, list) else str(value))]


def _build(expected: Any, raw: Any, where: str) -> Any:
    """Turn plain data into the annotated type, or say where it does not fit."""
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        return _build_union(typing.get_args(expected), raw, where)
    if origin is typing.Literal:
        return _checked(raw, raw in typing.get_args(expected), where, f"one of {list(typing.get_args(expected))}")
    if origin is tuple:
        _checked(raw, isinstance(raw, list), where, "a list")
        kinds = typing.get_args(expected)
        item_kinds = [kinds[0]] * len(raw) if len(kinds) == 2 and kinds[1] is Ellipsis else kinds
        _checked(raw, len(item_kinds) == len(raw), where, f"{len(item_kinds)} items")
        numbered = enumerate(zip(item_kinds, raw, strict=True))
        return tuple(_build(kind, item, f"{where}[{i}]") for i, (kind, item) in numbered)
    if origin is dict:
        _checked(raw, isinstance(raw, dict), where, "a mapping")
        return {name: _build(typing.get_args(expected)[1], item, f"{where}.{name}") for name, item in raw.items()}
    if isinstance(expected, type) and issubclass(expected, Config):
        return _build_config(expected, raw, where)
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        known = [member.value for member in expected]
        return expected(_checked(raw, raw in known, where, f"one of {known}"))
    if expected is float:
        return float(_checked(raw, isinstance(raw, int | float) and not isinstance(raw, bool), where, "a number"))
    if expected is int:
        return _checked(raw, isinstance(raw, int) and not isinstance(raw, bool), where, "a whole number")
    if expected is Path:
        return Path(_checked(raw, isinstance(raw, str), where, "a path"))
    return _checked(raw, isinstance(raw, expected), where, getattr(expected, "__name__", str(expected)))


def _build_union(members: tuple[Any, ...], raw: Any, where: str) -> Any:
    if raw is None and types.NoneType in members:
        return None
    candidates = [member for member in members if member is not types.NoneType]
    if isinstance(raw, dict) and "type" in raw:
        named = [member for member in candidates if getattr(member, "__name__", "") == raw["type"]]
        known = [getattr(member, "__name__", str(member)) for member in candidates]
        _checked(raw["type"], bool(named), f"{where}.type", f"one of {known}")
        return _build(named[0], raw, where)
    for member in candidates:
        try:
            return _build(member, raw, where)
        except ValueError:
            if member is candidates[-1]:
                raise
    raise ValueError(f"{where} expects one of {members}, got {raw!r}")


def _build_config(expected: type[Config], raw: Any, where: str) -> Config:
    _checked(raw, isinstance(raw, dict), where, "a mapping of fields")
    given = {name: item for name, item in raw.items() if name != "type"}
    if raw.get("type", expected.__name__) != expected.__name__:
        raise ValueError(f"{where} expects a {expected.__name__}, the file holds a {raw['type']}")
    kinds = typing.get_type_hints(expected)
    fields = {field.name: field for field in dataclasses.fields(expected)}
    for name in given:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"{where} has no field {name!r}{hint} It has: {', '.join(fields)}")
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in given and not has_default:
            raise ValueError(f"{where} lacks the field {name!r}")
    return expected(**{name: _build(kinds[name], item, f"{where}.{name}") for name, item in given.items()})


def _checked(raw: Any, fits: bool, where: str, expectation: str) -> Any:
    if not fits:
        raise ValueError(f"{where} expects {expectation}, got {raw!r}")
    return raw
