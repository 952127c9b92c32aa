"""What counts as a number in a setting: True is none, and 32.0 is not a whole one."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from vidsparse.errors import ConfigError


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; NumPy's integers are."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_share(name: str, value: Any) -> None:
    """Raise ConfigError unless a setting is in (0, 1]."""
    if not is_number(value) or not 0.0 < value <= 1.0:
        raise ConfigError(f"`{name}` must be in (0, 1], got {value!r}.")
