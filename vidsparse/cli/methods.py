"""`vidsparse methods`: the methods, and the options of one."""

from __future__ import annotations

from typing import Any

from vidsparse.errors import ConfigError


def option_types(method: str) -> dict[str, Any]:
    """Option names of a method with their types: the fields of its config, then those of its schedule.

    Raises:
        ConfigError: no method has this name.
    """
    from vidsparse.methods import PROCESSORS, processor_class
    from vidsparse.schedule import Schedule

    from .method_options import config_fields

    if method not in PROCESSORS:
        raise ConfigError(f"The method {method!r} is unknown; use one of {', '.join(PROCESSORS)}.")
    own = config_fields(processor_class(method).config_class)
    own.pop("schedule", None)
    return own | config_fields(Schedule)


def show(name: str | None) -> None:
    """Print the list of methods, or one method's options with defaults and meaning."""
    import inspect

    from rich.console import Console
    from rich.padding import Padding

    from vidsparse.methods import PROCESSORS, method_options, processor_class
    from vidsparse.schedule import Schedule

    from .method_options import attribute_help, option_name

    console = Console(highlight=False)
    if name is None:
        for method, processor in PROCESSORS.items():
            summary = (inspect.getdoc(inspect.getmodule(processor)) or "").splitlines()[0]
            console.print(f"{method:12} {summary}", markup=False, soft_wrap=True)
        return
    if name not in PROCESSORS:
        raise ConfigError(f"The method {name!r} is unknown; use one of {', '.join(PROCESSORS)}.")
    texts = attribute_help(processor_class(name).config_class) | attribute_help(Schedule)
    for option, default in method_options(name).items():
        console.print(f"{option_name(option)} (default {default})", markup=False)
        if option in texts:
            console.print(Padding(texts[option].replace("[", "\\["), (0, 0, 0, 4)))
