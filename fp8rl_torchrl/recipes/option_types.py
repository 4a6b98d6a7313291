"""The types that options of a recipe have: what belongs to one, how a text is read as one, and each in words."""

from __future__ import annotations

import math
import numbers
import types
import typing
from typing import Any, Literal


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types that a union joins; of any other type, that type."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def read_value(name: str, kind: Any, text: str) -> Any:
    """Read the value of an option; widths of layers are joined by an x.

    Args:
        name: The option, for the message.
        kind: Its type, as `typing.get_type_hints` gives it.
        text: The value as text.

    Raises:
        ValueError: If the text is no value of the type.
    """
    if type(None) in alternatives(kind) and text.lower() == "none":
        return None
    for each in alternatives(kind):
        if typing.get_origin(each) is Literal:
            if text in typing.get_args(each):
                return text
        elif each is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
        elif each is str:
            return text
        elif each in (int, float) or typing.get_origin(each) is tuple:
            try:
                value = each(text) if each in (int, float) else tuple(int(width) for width in text.split("x"))
            except ValueError:
                continue
            if not isinstance(value, float) or math.isfinite(value):
                return value
    raise _refusal(name, kind, text)


def check_value(name: str, kind: Any, value: Any) -> None:
    """Refuse a value that is not of an option's type, before it is compared with anything; its range is not looked at.

    Args:
        name: The option, for the message.
        kind: Its type, as `typing.get_type_hints` gives it.
        value: Its value.

    Raises:
        ValueError: If the value is of another type.
    """
    if not any(_is(value, each) for each in alternatives(kind)):
        raise _refusal(name, kind, value)


def _is(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in typing.get_args(kind))
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(each, typing.get_args(kind)[0]) for each in value)
    if kind in (int, float):
        return isinstance(value, numbers.Real if kind is float else numbers.Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


def _refusal(name: str, kind: Any, value: Any) -> ValueError:
    return ValueError(f"{name} takes {' or '.join(map(_in_words, alternatives(kind)))}; got {value!r}")


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        if str in typing.get_args(kind):
            return "a tuple of texts"
        return "widths of layers, such as (64, 64), or 64x64 as text"
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", type(None): "none"}
    return words[kind]
