"""Reading what the user typed: option spelling, sizes, method options, config files."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError

# Other spellings of settings in config files, as on the command line.
_ALIASES = {
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "model_path": "model",
    "image_path": "image",
    "lora": "loras",
    "lora_path": "loras",
}


def normalise(arguments: Iterable[str]) -> list[str]:
    """Accept `--num_frames` for `--num-frames`: underscores in option names become dashes, values are untouched."""
    result = []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument.partition("=")
            argument = name.replace("_", "-") + equals + value
        result.append(argument)
    return result


def parse_size(text: str, named: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """`WIDTHxHEIGHT` (also `*`), or one of the model's named sizes. Returns `(height, width)` in pixels.

    Raises:
        ConfigError: neither form.
    """
    if text.lower() in named:
        return named[text.lower()]
    match = re.fullmatch(r"\s*(\d+)\s*[xX*×]\s*(\d+)\s*", text)
    if not match:
        names = f" or one of {', '.join(named)}" if named else ""
        raise ConfigError(f"The size {text!r} is not understood; use WIDTHxHEIGHT such as 832x480{names}.")
    return int(match[2]), int(match[1])


def split_options(extra: list[str], known: Iterable[str]) -> dict[str, str | bool]:
    """Turn leftover arguments `--name value`, `--name=value`, `--name`, `--no-name` into a dict.

    Args:
        extra: what the command's own options did not take.
        known: names of the command's own options, for the message on a stray word.

    Raises:
        ConfigError: an argument that is no option.
    """
    options: dict[str, str | bool] = {}
    i = 0
    while i < len(extra):
        word = extra[i]
        i += 1
        if not word.startswith("--") or len(word) == 2:
            near = difflib.get_close_matches("--" + word.lstrip("-"), [*known], n=1)
            hint = f"; did you mean {near[0]}?" if near else "; quote the prompt if it has spaces."
            raise ConfigError(f"The argument {word!r} is not understood{hint}")
        name, equals, value = word[2:].partition("=")
        if equals:
            options[name] = value
        elif i < len(extra) and not extra[i].startswith("--"):
            options[name] = extra[i]
            i += 1
        else:
            options[name] = True
    return options


def read_config(path: str) -> dict[str, Any]:
    """Settings of a YAML or JSON file, or of the JSON that a generation leaves beside its video.

    Dashes and underscores, and the command line's short names (`frames`, `steps`, `lora`), are accepted.

    Raises:
        ConfigError: the file is missing or not understood.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"The config file {path!r} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The config file {path!r} is not UTF-8 text.") from error
    try:
        if path.lower().endswith(".json"):
            data = json.loads(text)
        else:
            import yaml

            data = yaml.safe_load(text)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"The config file {path!r} is not valid YAML or JSON ({reason}).") from error
    if data is None:
        return {}
    if isinstance(data, dict) and data.get("format") == "vidsparse-run":
        from vidsparse_pipelines.runfile import check_version

        check_version(data, path)
        data = data.get("settings")
    if not isinstance(data, dict):
        raise ConfigError(f"The config file {path!r} must hold `name: value` pairs.")
    result: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        result[_ALIASES.get(name, name)] = value
    if isinstance(result.get("loras"), (str, dict)):
        result["loras"] = [result["loras"]]
    return result
