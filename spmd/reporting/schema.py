"""Values from JSON as the types that a record's annotations name: nothing else gets in.

A report may come from anybody. What is read has the right types, numbers that can be added up,
and texts that a terminal can show.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Mapping
from typing import Any

__all__ = ["SchemaError", "convert", "load"]

_LARGEST = 1e30  # of a number: sums of many stay finite
# Control characters but tab and newline would be commands to a terminal; a lone surrogate cannot
# be written as UTF-8.
_UNSHOWABLE = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class SchemaError(ValueError):
    """A value is not what its place needs."""


def load(text: str) -> Any:
    """The JSON value of a text.

    Raises:
      SchemaError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"it is no JSON: {error}") from None


def convert(kind: Any, x: Any, where: str) -> Any:
    """`x` as a value of type `kind`.

    Args:
      kind: int, float, str, `tuple[T, ...]`, `Mapping[str, T]`, a NamedTuple or a dataclass. A
        tuple of NamedTuples is a table: `columns`, and in `rows` a list for each record.
      where: what `x` is, for errors.

    Raises:
      SchemaError: it is none.
    """
    if kind is int or kind is float:
        return _number(kind, x, where)
    if kind is str:
        if not isinstance(x, str) or _UNSHOWABLE.search(x):
            raise SchemaError(f"{where} is no text that can be shown")
        return x
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        item = arguments[0]
        table = hasattr(item, "_fields")
        entries = _of(list, _rows(item, x, where) if table else x, where)
        named = (dict(zip(item._fields, _of(list, e, where), strict=False)) for e in entries)
        return tuple(
            convert(item, e, f"{where}[{i}]") for i, e in enumerate(named if table else entries)
        )
    found = _of(dict, x, where)
    if origin is not None and issubclass(origin, Mapping):
        return {
            convert(str, key, f"a name in {where}"): convert(arguments[1], e, f"{where}.{key}")
            for key, e in found.items()
        }
    return _record(kind, found, where)


def _record(kind: Any, found: dict[str, Any], where: str) -> Any:
    hints = _hints(kind)
    if missing := [name for name in hints if name not in found]:
        raise SchemaError(f"{where} has no {missing[0]}")
    return kind(**{name: convert(hint, found[name], name) for name, hint in hints.items()})


def _rows(record: Any, x: Any, where: str) -> Any:
    table = _of(dict, x, where)
    if table.get("columns") != list(record._fields):
        raise SchemaError(f"{where} has other columns than {', '.join(record._fields)}")
    return table.get("rows")


def _of(kind: type, x: Any, where: str) -> Any:
    if type(x) is not kind:
        raise SchemaError(f"{where} is a {type(x).__name__}, and a {kind.__name__} is needed")
    return x


def _number(kind: type, x: Any, where: str) -> Any:
    if type(x) is not int and not (kind is float and type(x) is float):
        raise SchemaError(f"{where} is a {type(x).__name__}, and a number is needed")
    if not -_LARGEST <= x <= _LARGEST:  # false for NaN, too
        raise SchemaError(f"{where} is out of range")
    return x


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    names = kind._fields if hasattr(kind, "_fields") else [f.name for f in dataclasses.fields(kind)]
    hints = typing.get_type_hints(kind)
    return {name: hints[name] for name in names}
