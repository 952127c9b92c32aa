"""Command-line options of a sparse method, read from its config dataclass: there is no second list of defaults."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any

from vidsparse.errors import ConfigError


def option_name(field: str) -> str:
    """`decay_factor` -> `--decay-factor`."""
    return "--" + field.replace("_", "-")


def config_fields(config: type) -> dict[str, Any]:
    """Names of a config dataclass's fields with their resolved types."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}


def parse_options(
    method: str, fields: dict[str, Any], given: dict[str, Any], other: typing.Iterable[str] = ()
) -> dict[str, Any]:
    """Check the names of `given` against `fields` and convert their text.

    Args:
        method: the method's name, for messages.
        fields: its option names and types.
        given: option names (dashes or underscores) and values, text from the command line or values from a file.
        other: the command's own option names, offered when a name is unknown.

    Raises:
        ConfigError: unknown option (with the nearest known one), or a value of another type.
    """
    result: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in fields and name.startswith("no_") and value is True and fields.get(name[3:]) is bool:
            name, value = name[3:], False
        if name not in fields:
            names = [option_name(field) for field in fields]
            near = difflib.get_close_matches(option_name(name), [*names, *other], n=1)
            hint = f"did you mean {near[0]}?" if near else f"the method takes {', '.join(names)}."
            raise ConfigError(
                f"Neither `generate` nor the method {method!r} has an option {option_name(name)}; {hint}"
            )
        result[name] = convert(option_name(name), fields[name], value)
    return result


def convert(name: str, kind: Any, value: Any) -> Any:
    """Convert `value` (text, or already of the right type) to the annotated type `kind`.

    Raises:
        ConfigError: it cannot be.
    """
    if not isinstance(value, str):
        if value is True and kind is not bool and bool not in typing.get_args(kind):
            raise ConfigError(f"The option {name} needs a value.")
        return tuple(value) if isinstance(value, list) else value
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(kind)
        if type(None) in choices and value.lower() in ("none", "null", ""):
            return None
        failure: ConfigError | None = None
        for choice in (c for c in choices if c is not type(None)):
            try:
                return convert(name, choice, value)
            except ConfigError as error:
                failure = failure or error
        assert failure is not None
        raise failure
    if origin is typing.Literal:
        allowed = typing.get_args(kind)
        for choice in allowed:
            if str(choice) == value:
                return choice
        raise ConfigError(f"The option {name} must be one of {', '.join(map(str, allowed))}, got {value!r}.")
    if origin is tuple:
        items = [part for part in value.replace("(", "").replace(")", "").split(",") if part.strip()]
        return tuple(convert(name, typing.get_args(kind)[0], part.strip()) for part in items)
    if kind is bool:
        if value.lower() in ("true", "yes", "on", "1"):
            return True
        if value.lower() in ("false", "no", "off", "0"):
            return False
        raise ConfigError(f"The option {name} is true or false, got {value!r}.")
    if kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"The option {name} must be {what}, got {value!r}.") from None
    return value


def attribute_help(config: type) -> dict[str, str]:
    """Field descriptions from the `Attributes:` sections of a dataclass's docstring and its bases'."""
    import inspect
    import re

    base = config.__base__
    texts = {} if base is None or base is object else attribute_help(base)
    name, inside = "", False
    for line in (inspect.getdoc(config) or "").splitlines():
        if not line.startswith(" "):
            inside = line.strip() in ("Attributes:", "Args:") if line.strip() else inside
            continue
        if not inside:
            continue
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start[1]
            texts[name] = start[2].strip()
        elif name:
            texts[name] += " " + line.strip()
    return texts
