"""`vidsparse plan`: what a generation will compute and take, before any weight is loaded."""

from __future__ import annotations

import json
from typing import Any

from vidsparse.errors import ConfigError

from .arguments import parse_size, split_options
from .method_options import convert


def run(
    *,
    model: str,
    frames: str | None,
    size: str | None,
    steps: str | None,
    guidance_scale: str | None,
    sparse: str,
    typed: dict[str, Any],
    extra: list[str],
    option_names: list[str],
    device: str,
    dtype: str,
    remeasure: bool,
    as_json: bool,
) -> int:
    """Print the forecast. Returns 0.

    Raises:
        VidsparseError: one sentence for the user.
    """
    from vidsparse_pipelines.bundled import BUNDLED_MODEL
    from vidsparse_pipelines.costs import read_shape
    from vidsparse_pipelines.device import dtype_name
    from vidsparse_pipelines.forecast import choose_rates, forecast
    from vidsparse_pipelines.rates import rates_for

    from .method_options import parse_options
    from .methods import option_types

    options = parse_options(
        sparse, option_types(sparse), {**split_options(extra, option_names), **typed}, option_names
    )
    numbers = {
        "num_frames": _whole("--frames", frames),
        "num_steps": _whole("--steps", steps),
        "guidance_scale": None if guidance_scale is None else convert("--guidance-scale", float, guidance_scale),
    }
    itemsize = {"auto": None, "float32": 4, "bfloat16": 2, "float16": 2}[dtype_name(dtype)]
    shape = read_shape(model)
    if size is not None:
        numbers["height"], numbers["width"] = parse_size(size, shape.info.preset.sizes)
    rates, note = choose_rates(model == BUNDLED_MODEL, device, lambda name: rates_for(name, remeasure))
    found = forecast(shape, rates, sparse=sparse, options=options, itemsize=itemsize, **numbers)
    data = found.to_dict()
    if note:
        data["notes"] = (*data["notes"], note)
    if as_json:
        print(json.dumps(data))
    else:
        _print(data)
    return 0


def _whole(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    value = convert(name, int, text)
    if value < 1:
        raise ConfigError(f"The option {name} must be a whole number of at least 1, got {text}.")
    return value


def as_report(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan in the form of a report, for the table: a density of 1 is a dense call."""
    density = plan["density"]
    layers, steps = list(range(len(density))), list(range(len(density[0])))
    dense = [{"layers": [i], "steps": [s for s in steps if density[i][s] == 1.0]} for i in layers]
    return {"matrix": {"layers": layers, "steps": steps, "density": density}, "dense": dense}


def amount(value: float) -> str:
    """`3.2 TFLOP`, `1.5 PFLOP`, `12 GFLOP`."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP"
    return f"{value / 1e6:.3g} MFLOP"


def gib(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 2**30:.1f} GiB" if value >= 2**28 else f"{value / 2**20:.0f} MiB"


def _print(data: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from .screen import duration
    from .table import condense

    console = Console(highlight=False, soft_wrap=True)

    def line(name: str, text: str) -> None:
        console.print(f"{name:12} {text}", markup=False)

    plan, grid, rates = data["plan"], data["plan"]["grid"], data["rates"]
    made = "1 frame" if data["num_frames"] == 1 else f"{data['num_frames']} frames"
    line("model", data["model"])
    line("makes", f"{made} of {data['width']}x{data['height']} in {data['num_steps']} steps")
    for note in data["notes"]:
        line("note", note)
    layers = len(plan["density"])
    line("tokens", f"{data['tokens']:,} in a latent grid of {grid['frames']} x {grid['height']} x {grid['width']}")
    line("attention", f"{layers} layers of {data['num_heads']} heads of {data['head_dim']}")
    whole = data["linear_flops"] + data["attention_flops"]
    line("FLOPs", f"{amount(whole)} a forward, {data['attention_flops'] / whole:.0%} of it attention")
    line("", f"{amount(data['dense_flops'])} dense in all, {amount(data['expected_flops'])} with {plan['method']}")
    memory = data["memory"]
    line(
        "memory",
        f"transformer {gib(memory['transformer'])}, text encoder {gib(memory['text_encoder'])}, activations about "
        f"{gib(memory['activations'])}; decoding not counted",
    )
    header, body = condense(as_report(plan))
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    console.print("\nDensity of attention, by layer and step (1 is all of it):")
    console.print(table)
    line("device", f"{rates['device']} ({rates['source']})")
    line("attention", f"{data['attention_share']:.0%} of the time of a dense run")
    line("denoising", f"{duration(data['seconds_dense'])} dense, {duration(data['seconds_expected'])} expected")
    line("ceiling", f"{data['ceiling']:.2f} times as fast, if sparse calls took no time")
    console.print(f"\n{data['verdict']}", markup=False)
