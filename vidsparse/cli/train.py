"""`vidsparse train …`: LoRA training; and how `generate` takes the attention that a LoRA was trained for."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from vidsparse.errors import ConfigError

from . import is_first

train_app = typer.Typer(
    name="train",
    help="Train LoRA adapters through sparse attention.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EXTRA = {"allow_extra_args": True}
_Config = Annotated[str, typer.Argument(help="YAML file with the settings.", metavar="CONFIG.yaml")]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change settings, as --set rank=16 seed=1.", metavar="KEY=VALUE", show_default=False),
]
_Verbose = Annotated[bool, typer.Option("--verbose", help="Show the libraries' warnings and full tracebacks.")]


@train_app.command("length-extension", context_settings=_EXTRA)
def length_extension(context: typer.Context, config: _Config, changes: _Set = None, verbose: _Verbose = False) -> None:
    """Fine-tune on longer videos, with sparse attention."""
    _prepare(verbose)
    from vidsparse_lora.config import LengthExtensionConfig, load_config
    from vidsparse_lora.length_extension import train

    _show(train(load_config(LengthExtensionConfig, config, _changes(changes, context.args))))


@train_app.command("distill", context_settings=_EXTRA)
def distill(context: typer.Context, config: _Config, changes: _Set = None, verbose: _Verbose = False) -> None:
    """Distil the dense model into a sparse one."""
    _prepare(verbose)
    from vidsparse_lora.config import DistillConfig, load_config
    from vidsparse_lora.distill import train

    _show(train(load_config(DistillConfig, config, _changes(changes, context.args))))


def _show(path: Any) -> None:
    if is_first():
        print(path)


def _prepare(verbose: bool) -> None:
    if not verbose:
        from .generate import _hush

        _hush()


def _changes(typed: list[str] | None, extra: list[str]) -> list[str]:
    """`--set a=1 b=2` gives the second as a stray argument; anything else there is a mistake."""
    for word in extra:
        if word.startswith("-") or "=" not in word:
            raise ConfigError(f"The argument {word!r} is not understood; changes are written --set KEY=VALUE.")
    return [*(typed or []), *extra]


TRAINED_WITH = ("coverage", "feature_map", "skip")
"""Method options that a trained projection holds for alone."""


def follow_adapters(
    given: dict[str, Any], method_options: dict[str, Any], extra: list[str], config: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and method options with those that the LoRAs were trained for, where the user gives none.

    Args:
        given: settings from the command line, with `loras`.
        method_options: method options from the command line.
        extra: further method options from the command line.
        config: the config file, if any.

    Raises:
        ConfigError: a LoRA and the settings, or two LoRAs, contradict each other.
    """
    from vidsparse_pipelines.lora import LoraSpec, settings_for

    from .arguments import read_config, split_options

    from_file = read_config(config) if config is not None else {}
    specs = tuple(LoraSpec.parse(text) for text in given["loras"])
    settings, options, notes = settings_for(specs, {**from_file, **given})
    in_file = from_file.get("method_options")
    asked = {**from_file, **(in_file if isinstance(in_file, dict) else {})}
    asked |= {name.replace("-", "_"): value for name, value in split_options(extra, []).items()}
    for name in TRAINED_WITH:
        want = {**asked, **method_options}.get(name)
        if want is not None and name in options and want != options[name]:
            raise ConfigError(
                f"The LoRA {given['loras'][0]!r} was trained with {name} {options[name]!r}, not {want!r}; leave "
                f"--{name.replace('_', '-')} out."
            )
    known = set(asked)
    options = {name: value for name, value in options.items() if name not in known}
    for note in notes:
        print(note, file=sys.stderr)
    return {**settings, **given}, {**options, **method_options}
