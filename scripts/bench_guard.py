"""Time the guard beside the attention calls that it watches, on one GPU.

    python scripts/bench_guard.py --output guard.json

For every shape: the sparse call of `radial` at its defaults and of `pooled` at density 0.2, the guard's comparison of
sampled rows (two launches: `vidsparse.guard`), and the call with it. Times are medians of CUDA events, taken in turns;
`host_ms` is what the comparison takes on the host while the GPU works. Counted before it was measured: with R = 32 rows
in a sixth of the heads the comparison is 4 R N d H / 6 FLOPs beside the call's 4 N^2 d H density, R / (6 N density) of
it; what it costs is reading a sixth of key and value, 4 N H d / 6 bytes in bf16.

First the kernel is checked against float64, and a call with the guard is run with torch's check for synchronisation on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import triton

from vidsparse.attention import attend, make_context
from vidsparse.guard import HEAD_GROUPS, ROWS, measure, sample
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.recipe import Recipe
from vidsparse_kernels import sampled_error

SHAPES = {
    "Wan 1.3B 480p 81": (LatentGrid(21, 30, 52), 12),
    "Wan 14B 720p 81": (LatentGrid(21, 45, 80), 40),
}
METHODS: dict[str, dict[str, Any]] = {"radial": {}, "pooled": {"density": 0.2}}
HEAD_DIM = 128
ROUNDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    machine = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "diffusers": diffusers.__version__,
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "command": "python scripts/bench_guard.py --output FILE",
    }
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name, (grid, num_heads) in SHAPES.items():
            for method, options in METHODS.items():
                rows.append({"shape": name, "method": method, **bench(grid, num_heads, method, options)})
                print(json.dumps(rows[-1]))
                if arguments.output:
                    arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def bench(grid: LatentGrid, num_heads: int, method: str, options: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, grid.num_tokens, num_heads, HEAD_DIM, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    )
    context = make_context(TokenLayout(grid), Recipe.from_options(method, **options), "cuda")
    context = replace(context, layer_index=3, step_index=7, guarded=True)
    out, selection = attend(query, key, value, context)

    def call() -> Any:
        return attend(query, key, value, context)

    def compare() -> Any:
        return measure(query, key, value, out, context, None, None)

    def both() -> Any:
        found = attend(query, key, value, context)[0]
        return measure(query, key, value, found, context, None, None)

    check(query, key, value, out, context)
    torch.cuda.set_sync_debug_mode("error")
    both()
    torch.cuda.set_sync_debug_mode("default")
    times = timed({"call": call, "guard": compare, "both": both})
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(50):
        compare()
    host = (time.perf_counter() - begun) * 1000 / 50
    torch.cuda.synchronize()
    mask = context.parts.block_mask if context.parts is not None else None
    density = float(mask.density if mask is not None else selection.density)  # type: ignore[union-attr]
    sampled = ROWS * -(-num_heads // HEAD_GROUPS)
    return {
        "tokens": grid.num_tokens,
        "num_heads": num_heads,
        "head_dim": HEAD_DIM,
        "density": round(density, 4),
        **{f"{name}_ms": round(ms, 4) for name, ms in times.items()},
        "host_ms": round(host, 4),
        "guard_share": round(times["guard"] / times["call"], 5),
        "flops_share": round(sampled / (grid.num_tokens * num_heads * density), 6),
    }


def check(query: Any, key: Any, value: Any, out: Any, context: Any) -> None:
    first, among, count, offset, heads = sample(context, query.shape[2])
    options = {"first": first, "among": among, "count": count, "offset": offset, "heads": heads}
    got = sampled_error(query, key, value, out, **options)
    want = sampled_error(query, key, value, out, backend="reference", **options)
    assert torch.allclose(got, want, rtol=0.02), (got, want)
    assert torch.equal(got, sampled_error(query, key, value, out, **options))


def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians in ms, all in turns, because a GPU that grows warm slows down."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(6)]
            # So that the host is ahead of the GPU, and launches are not what is timed.
            torch.cuda._sleep(10_000_000)
            for start, stop in pairs:
                start.record()
                call()
                stop.record()
            torch.cuda.synchronize()
            found[name] += [start.elapsed_time(stop) for start, stop in pairs]
    return {name: sorted(times)[len(times) // 2] for name, times in found.items()}


if __name__ == "__main__":
    sys.exit(main())
