"""`vidsparse compare`: recipes against dense on the same prompts and noise, with a page to look at."""

from __future__ import annotations

import json
import sys
from typing import Any

from vidsparse.errors import ConfigError

from .arguments import parse_size
from .method_options import convert


def run(
    *,
    recipes: list[str],
    prompt: list[str],
    prompt_file: str | None,
    num_prompts: int,
    seeds: int,
    seed: int,
    floor: bool,
    players: int,
    output: str,
    size: str | None,
    numbers: dict[str, str | None],
    given: dict[str, Any],
    as_json: bool,
    quiet: bool,
) -> int:
    """Compare, or continue an earlier comparison in the same folder. Returns 0.

    Args:
        numbers: `num_frames`, `num_inference_steps` and `guidance_scale` as typed.
        given: further fields of `GenerateSettings`.

    Raises:
        VidsparseError: one sentence for the user.
    """
    from vidsparse_pipelines.compare import prepare
    from vidsparse_pipelines.compare_report import mean, table, write_page
    from vidsparse_pipelines.model_info import inspect_model
    from vidsparse_pipelines.progress import Observer
    from vidsparse_pipelines.prompts import read_prompts

    from .generate import _hush
    from .screen import Screen

    if prompt and prompt_file is not None:
        raise ConfigError("Give either --prompt or --prompt-file, not both.")
    if players < 0:
        raise ConfigError(f"--players must be at least 0, got {players}.")
    texts = read_prompts(prompt_file) if prompt_file is not None else list(prompt)
    settings = {k: v for k, v in given.items() if v is not None}
    for name, kind in (("num_frames", int), ("num_inference_steps", int), ("guidance_scale", float)):
        if numbers[name] is not None:
            flag = {"num_frames": "--frames", "num_inference_steps": "--steps"}.get(name, "--guidance-scale")
            settings[name] = convert(flag, kind, numbers[name])
    if size is not None:
        sizes = inspect_model(settings["model"]).preset.sizes
        settings["height"], settings["width"] = parse_size(size, sizes)
    _hush()
    screen = Observer() if quiet or as_json else Screen()
    comparison = prepare(
        output,
        recipes,
        prompts=[(text, None) for text in texts] or None,
        num_prompts=num_prompts,
        seeds=seeds,
        first_seed=seed,
        floor=floor,
        observer=screen,
        **settings,
    )
    try:
        data = comparison.run()
    finally:
        if isinstance(screen, Screen):
            screen.close()
    path = write_page(comparison, data, players)
    if as_json:
        print(json.dumps({**data, "report": str(path)}))
        return 0
    if not quiet:
        _print(*table(data, mean), data["notes"])
    print(path)
    return 0


def _print(header: list[str], rows: list[list[str]], notes: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    drawn = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        drawn.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(cell.replace("[", "\\[") for cell in row))
    console.print(drawn)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
