"""`vidsparse bench`: times on this machine, told only when the results are right."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError

from .method_options import convert


def run(
    *,
    device: str,
    level: str,
    density: str,
    methods: str,
    grid: str | None,
    heads: int | None,
    head_dim: int | None,
    milliseconds: float,
    csv: str | None,
    as_json: bool,
) -> int:
    """Check, time and print. Returns 0, or 1 where a kernel is wrong.

    Raises:
        VidsparseError: one sentence for the user.
    """
    from vidsparse.methods import processor_class
    from vidsparse_pipelines import bench
    from vidsparse_pipelines.device import resolve_device

    from .generate import _hush

    resolved = resolve_device(device)
    default = bench.GPU_SHAPE if resolved.type == "cuda" else bench.CPU_SHAPE
    shape = _shape(default, grid, heads, head_dim)
    densities = [convert("--density", float, part.strip()) for part in density.split(",")]
    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        processor_class(name)
    path = None if csv is None else Path(csv).expanduser()
    if path is not None:
        bench.check_csv(path)
    levels = bench.LEVELS if level == "all" else (level,)
    _hush()
    notes: list[str] = []
    try:
        rows = bench.run(
            resolved,
            shape,
            levels=levels,
            densities=densities,
            methods=names,
            milliseconds=milliseconds,
            note=notes.append,
        )
    except bench.WrongResult as error:
        print(f"vidsparse: {error}", file=sys.stderr)
        return 1
    if path is not None:
        bench.append_csv(path, rows)
    notes = list(dict.fromkeys(notes))
    if as_json:
        print(bench.to_json(rows, notes))
    else:
        _print(rows, notes)
    return 0


def _shape(default: Any, grid: str | None, heads: int | None, head_dim: int | None) -> Any:
    from dataclasses import replace

    from vidsparse.layout import LatentGrid

    if grid is not None:
        match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*x\s*(\d+)\s*", grid.lower())
        if not match:
            raise ConfigError(f"The grid {grid!r} is not understood; use FRAMESxHEIGHTxWIDTH such as 21x30x52.")
        default = replace(default, grid=LatentGrid(*map(int, match.groups())))
    for flag, name, value in (("--heads", "num_heads", heads), ("--head-dim", "head_dim", head_dim)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1, got {value}.")
        if value is not None:
            default = replace(default, **{name: value}, ffn_dim=None)
    return default


def _print(rows: list[Any], notes: list[str]) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)

    def line(text: str) -> None:
        console.print(text, markup=False)

    first = rows[0]
    line(f"{first.device}, torch {first.torch}, {first.dtype}")
    line(f"{first.tokens:,} tokens ({first.grid}), {first.num_heads} heads of {first.head_dim}; results are right\n")
    for level in dict.fromkeys(row.level for row in rows):
        line({"kernel": "one attention call", "block": "one transformer block"}.get(level, "a denoising loop"))
        for row in (row for row in rows if row.level == level):
            speed = "" if row.tflops is None else f"  {row.tflops:8.2f} TFLOP/s"
            gain = "" if row.speedup is None else f"  {row.speedup:.2f} times as fast as the fastest dense"
            counts = f"  (counts: {row.counts})" if row.counts else ""
            line(
                f"  {row.name:30} density {row.density:.2f}  {row.ms:9.3f} ms ({row.ms_p20:.3f} to {row.ms_p80:.3f})"
                f"{speed}{gain}{counts}"
            )
        line("")
    for note in notes:
        line(note)
