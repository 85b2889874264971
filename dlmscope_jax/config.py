"""Strict conversion between YAML, plain mappings and frozen dataclasses.

A configuration is a frozen dataclass of the standard library. What a person writes is checked against it here, once:
an unknown key, a wrong type or a value outside a ``Literal`` is one line that names the dotted path. Nothing is coerced
behind the reader's back, except that an integer is a float where a float is wanted.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from dlmscope_jax.errors import UserError

T = TypeVar("T")


def from_mapping(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """Builds a dataclass from plain values.

    Args:
      cls: a dataclass whose fields are bool, int, float, str, ``Literal``, ``X | None``, ``tuple[X, ...]``,
        ``dict[str, X]``, ``Any`` or dataclasses of these.
      mapping: field names -> plain values; fields that are absent keep their defaults.

    Raises:
      UserError: for an unknown or missing key and for a value of a wrong type; names the dotted path.
    """
    return _build(cls, mapping, "")


def to_mapping(obj: Any) -> dict[str, Any]:
    """The inverse of ``from_mapping``: a mapping of plain values (lists for tuples), in the order of the fields."""
    return {field.name: _plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}


def load(cls: type[T], path: str | Path | None = None, overrides: Iterable[str] = ()) -> T:
    """Reads a dataclass from a YAML file and dotted overrides.

    Args:
      cls: the dataclass.
      path: a YAML file; None starts from the defaults.
      overrides: ``"a.b.c=value"``, with or without leading dashes; the value is read as YAML, and the last one wins.

    Raises:
      UserError: when the file is missing or is no YAML mapping, and as in ``from_mapping``.
    """
    mapping = read_yaml(path) if path is not None else {}
    alone = _complaint(cls, mapping) if path is not None else None
    for override in overrides:
        dotted, equals, text = override.removeprefix("--").partition("=")
        if not equals or not dotted:
            raise UserError(f"override {override!r}: write --section.field=value")
        *sections, last = dotted.replace("-", "_").split(".")
        at = mapping
        for section in sections:
            inner = at.setdefault(section, {})
            at[section] = inner = {} if inner is None else inner
            if not isinstance(inner, dict):
                raise UserError(f"--{dotted}: {section} is a value, not a section")
            at = inner
        kind = _type_at(cls, dotted.replace("-", "_"))
        at[last] = text if kind is str else _parse(text, f"--{dotted}")
    try:
        return from_mapping(cls, mapping)
    except UserError as error:  # say whether the file or an override is to be mended
        raise UserError(f"{path}: {error}" if str(error) == alone else str(error)) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping (an empty file is an empty one).

    Raises:
      UserError: when there is no such file, it is not YAML, a key occurs twice or the top is no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"config {path}: is not UTF-8 text") from None
    found = _parse(text, str(path))
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"config {path}: holds {_describe(found)}, should hold fields, one 'name: value' a line")
    return found


def dump(obj: Any) -> str:
    """The YAML text of a dataclass; ``load`` reads it back to an equal one."""
    import yaml

    return yaml.safe_dump(to_mapping(obj), sort_keys=False, width=120)


def digest(obj: Any) -> str:
    """12 hex digits that change when any field of the dataclass, or its name, does; the same in every process."""
    text = json.dumps([type(obj).__name__, to_mapping(obj)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _parse(text: str, where: str) -> Any:
    """YAML, strictly: a key may not occur twice, and ``3e-4`` is a number (YAML 1.1 reads a text there)."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise UserError(f"{where}: key {key!r} occurs twice")
            return super().construct_mapping(node, deep)

    exponent = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _complaint(cls: Any, mapping: dict[str, Any]) -> str | None:
    try:
        from_mapping(cls, mapping)
    except UserError as error:
        return str(error)
    return None


def _type_at(cls: Any, dotted: str) -> Any:
    """The declared type of a dotted field, or None where there is none (``from_mapping`` complains better)."""
    for name in dotted.split("."):
        cls = next((a for a in typing.get_args(cls) if dataclasses.is_dataclass(a)), cls)
        if not dataclasses.is_dataclass(cls) or name not in (hints := typing.get_type_hints(cls)):
            return None
        cls = hints[name]
    return cls


def _build(cls: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{path or 'config'}: {_describe(value)}, should be a section with the fields {_names(cls)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            raise UserError(f"{_join(path, key)}: no such field; " + (f"did you mean {near[0]!r}?" if near else f"there are {_names(cls)}"))
    optional = [name for name, f in fields.items() if not (f.default is f.default_factory is dataclasses.MISSING)]
    required = [name for name in fields if name not in value and name not in optional]
    if required:
        raise UserError(f"{_join(path, required[0])}: missing, has no default")
    built = {name: _convert(hints[name], entry, _join(path, name)) for name, entry in value.items()}
    try:
        return cls(**built)
    except UserError as error:  # a dataclass that checks itself
        raise UserError(f"{path}: {error}" if path else str(error)) from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if origin is Literal:
        if value not in args or isinstance(value, bool) is not isinstance(args[0], bool):
            raise UserError(f"{path}: {value!r}, should be one of {', '.join(repr(a) for a in args)}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) != 1:
            raise TypeError(f"{path}: config.py reads X | None and no other union, got {hint}")
        return _convert(options[0], value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}: {_describe(value)}, should be a list, [a, b]")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], entry, f"{path}[{i}]") for i, entry in enumerate(value))
        if len(value) != len(args):
            raise UserError(f"{path}: {len(value)} entries, should have {len(args)}")
        return tuple(_convert(arg, entry, f"{path}[{i}]") for i, (arg, entry) in enumerate(zip(args, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{path}: {_describe(value)}, should be a mapping")
        return {str(key): _convert(args[1], entry, _join(path, key)) for key, entry in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300:  # float() raises above 1.8e308
        return float(value)
    if hint not in (bool, int, float, str):
        raise TypeError(f"{path}: config.py cannot read {hint}")
    if type(value) is not hint:
        raise UserError(f"{path}: {_describe(value)}, should be {_NOUNS[hint]}")
    return value


_NOUNS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _describe(value: Any) -> str:
    if value is None:
        return "empty"
    kind: Any = type(value)
    noun = {dict: "a section", list: "a list", tuple: "a list"}.get(kind) or _NOUNS.get(kind, kind.__name__)
    return f"{value!r} is {noun}" if kind in (bool, int, float, str) else noun


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def _names(cls: Any) -> str:
    return ", ".join(field.name for field in dataclasses.fields(cls))


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
