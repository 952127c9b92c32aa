"""Figures of a run: lines of `log.jsonl`, and whatever trackers accelerate knows."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def tracker_names(wanted: tuple[str, ...]) -> tuple[list[str], str]:
    """Trackers to start, and a sentence that says where the figures go.

    Raises:
        ConfigError: a tracker is not installed.
    """
    names: list[str] = []
    for name in wanted:
        if name in ("none", "jsonl"):
            continue
        packages = PACKAGES.get("tensorboard" if name == "auto" else name, (name,))
        installed = any(find_spec(package) for package in packages)
        if name == "auto":
            names += ["tensorboard"] if installed else []
        elif installed:
            names.append(name)
        else:
            raise ConfigError(f"The tracker {name!r} is not installed; `pip install {packages[0]}`.")
    beside = f" and {', '.join(names)}" if names else ""
    missing = " (TensorBoard is not installed: `pip install tensorboard`)" if "auto" in wanted and not names else ""
    return names, f"figures go to log.jsonl{beside}{missing}"


class Figures:
    """`log.jsonl` of a run: one line `{"step": n, name: value, …}`.

    Args:
        path: the file; lines beyond `step`, of a run that was stopped after its last checkpoint, are dropped.
        step: the step to go on from.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if line.get("step", 0) <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def add(self, step: int, figures: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue  # the last line of a run that was killed while writing
    return lines
