"""What one attention call of each method takes, selecting included, over the fastest dense call on this GPU.

    python scripts/bench_method_calls.py --output method_calls.json

Beside the ratio: the host's time for one call (short calls wait for it, and a whole model with them) and what
`vidsparse.break_even` estimates. All methods at density 0.2, bf16, random query and key; clusters from kept centroids, as
in every step but the first. Shapes: an image of Flux, and Wan 1.3B and 14B.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidsparse import LatentGrid, Recipe, TokenLayout, make_context
from vidsparse.attention import attend
from vidsparse.break_even import CallShape, relative_cost
from vidsparse.parts import LayerMemory, MemoryBudget

SHAPES = {
    "flux-1024": (LatentGrid(1, 64, 64), 512, 24),
    "wan-1.3b, 17 frames at 480p": (LatentGrid(5, 30, 52), 0, 12),
    "wan-1.3b, 41 frames at 480p": (LatentGrid(11, 30, 52), 0, 12),
    "wan-1.3b-480p81": (LatentGrid(21, 30, 52), 0, 12),
    "wan-14b-720p81": (LatentGrid(21, 45, 80), 0, 40),
}
METHODS = ("radial", "pooled", "random", "svg1", "pisa", "sla", "semantic", "vidsparse")
HEAD_DIM = 128
DENSITY = 0.2


def timed(function: Any, calls: int) -> tuple[float, float]:
    """Milliseconds of a call on the device, one after another, and of the host until it has handed it over."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before = time.perf_counter()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    host = time.perf_counter() - before
    end.synchronize()
    return start.elapsed_time(end) / calls, host * 1000 / calls


def dense_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


class Call:
    """One layer's call in step after step, with what it keeps between them."""

    def __init__(
        self, method: str, grid: LatentGrid, text: int, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> None:
        recipe = Recipe.from_options(method, density=DENSITY)
        context = make_context(TokenLayout(grid, text_before=text), recipe, "cuda")
        projection = torch.nn.Linear(HEAD_DIM, HEAD_DIM, bias=False, device="cuda", dtype=torch.bfloat16)
        self.context = replace(context, memory=LayerMemory(MemoryBudget()), step_index=0, projection=projection)
        self.tensors, self.density = tensors, 1.0

    def __call__(self) -> torch.Tensor:
        step = self.context.step_index
        assert step is not None
        out, selection = attend(*self.tensors, self.context)
        self.context = replace(self.context, step_index=step + 1)
        self.selection = selection
        return out

    def row(self, heads: int) -> dict[str, Any]:
        """Density in tokens, and the estimate of what the call costs."""
        parts = self.context.parts
        assert parts is not None
        mask = parts.block_mask if self.selection is None else self.selection.block_mask
        assert mask is not None
        density = parts.block_mask.density if parts.block_mask is not None else parts.density or DENSITY
        cost = relative_cost(
            CallShape(1, heads, mask.seq_len_q, HEAD_DIM),
            density,
            selects=parts.selector is not None,
            overhead=parts.overhead,
            factor=parts.factor,
        )
        reached = mask.density if self.selection is None else float(self.selection.density)
        return {"density": round(reached, 3), "planned_density": round(density, 3), "estimate": round(cost, 3)}


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=120.0, help="start no further method after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python scripts/bench_method_calls.py " + " ".join(sys.argv[1:]),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "rows": [],
    }
    deadline = time.monotonic() + arguments.seconds
    for name, (grid, text, heads) in SHAPES.items():
        seq_len = grid.num_tokens + text
        q, k, v = (torch.randn(1, seq_len, heads, HEAD_DIM, device="cuda").bfloat16() for _ in range(3))
        calls = 3 if seq_len > 50_000 else 20
        dense = []
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            dense_call(q, k, v, backend)
            dense.append(timed(functools.partial(dense_call, q, k, v, backend), calls)[0])
        for method in METHODS:
            if time.monotonic() > deadline:
                print(f"{name}, {method}: not started, {arguments.seconds:g} s are over")
                continue
            row: dict[str, Any] = {"shape": name, "seq_len": seq_len, "heads": heads, "method": method}
            try:
                call = Call(method, grid, text, (q, k, v))
                for _ in range(3):
                    call()
                device, host = zip(*(timed(call, calls) for _ in range(3)), strict=True)
                row |= {
                    "dense_ms": round(min(dense), 4),
                    "ms": round(statistics.median(device), 4),
                    "host_ms": round(statistics.median(host), 4),
                    "ratio": round(statistics.median(device) / min(dense), 3),
                    **call.row(heads),
                }
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            result["rows"].append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
