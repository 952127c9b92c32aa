"""`vidsparse tune`: a target in dB or in time, and the recipe file that meets it."""

from __future__ import annotations

import json
import sys
from typing import Any

from vidsparse.errors import ConfigError

from .arguments import parse_size
from .method_options import convert


def run(
    *,
    target: dict[str, str | None],
    choices: list[str],
    rule: str,
    prompt: list[str],
    prompt_file: str | None,
    num_prompts: int | None,
    seed: int,
    by_head: bool,
    output: str,
    size: str | None,
    numbers: dict[str, str | None],
    given: dict[str, Any],
    price_tokens: int | None,
    budget_seconds: float | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Calibrate, or take up an earlier calibration, and write the recipe. Returns 0.

    Args:
        target: `psnr`, `seconds` and `share` as typed, one of them not None.
        numbers: `num_frames`, `num_inference_steps` and `guidance_scale` as typed.
        given: further fields of `GenerateSettings`.

    Raises:
        VidsparseError: one sentence for the user.
    """
    from vidsparse_pipelines.model_info import inspect_model
    from vidsparse_pipelines.progress import Observer
    from vidsparse_pipelines.prompts import read_prompts
    from vidsparse_pipelines.tune import Target, prepare

    from .generate import _hush
    from .screen import Screen

    if prompt and prompt_file is not None:
        raise ConfigError("Give either --prompt or --prompt-file, not both.")
    flags = {"psnr": "--target-psnr", "seconds": "--max-time", "share": "--max-attention"}
    wanted = Target(**{k: None if v is None else convert(flags[k], float, v) for k, v in target.items()})
    texts = read_prompts(prompt_file) if prompt_file is not None else list(prompt)
    settings = {k: v for k, v in given.items() if v is not None}
    for name, kind in (("num_frames", int), ("num_inference_steps", int), ("guidance_scale", float)):
        if numbers[name] is not None:
            flag = {"num_frames": "--frames", "num_inference_steps": "--steps"}.get(name, "--guidance-scale")
            settings[name] = convert(flag, kind, numbers[name])
    if size is not None:
        settings["height"], settings["width"] = parse_size(size, inspect_model(settings["model"]).preset.sizes)
    _hush()
    screen = Observer() if quiet or as_json else Screen()
    tuning = prepare(
        output, wanted, choices=choices, rule=rule, prompts=texts, num_prompts=num_prompts, seed=seed,
        by_head=by_head, price_tokens=price_tokens, budget_seconds=budget_seconds, observer=screen, **settings,
    )  # fmt: skip
    try:
        data = tuning.run()
    finally:
        if isinstance(screen, Screen):
            screen.close()
    if as_json:
        print(json.dumps(data))
    elif quiet:
        print(data["recipe"])
    else:
        _print(data)
    return 0


def _print(data: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    drawn = Table(box=box.SIMPLE_HEAD)
    for name in ("round", "predicted", "measured", "attention time", "density"):
        drawn.add_column(name, justify="right")
    for number, x in enumerate(data["rounds"], 1):
        drawn.add_row(
            str(number), f"{x['predicted_psnr']:.1f} dB", f"{x['psnr']:.1f} dB", f"{x['attention']:.0%}",
            f"{x['density']:.2f}",
        )  # fmt: skip
    console.print(drawn)
    best = data["best"]
    line = f"{data['recipe']}  {best['psnr']:.1f} dB on {data['clips']} clips, {best['attention']:.0%} of the dense "
    line += f"attention time; a clip in {best['seconds']:.2f} s, dense in {data['dense_seconds']:.2f} s"
    console.print(line, markup=False, soft_wrap=True)
