"""Where each method beats dense attention: one call as a model makes it, over the fastest dense call on this GPU.

    python scripts/bench_method_calls.py --output method_calls.json

Shapes are those of the families, small ones first, where it is not plain that sparse attention pays. Beside the ratio: the
host's time for one call (short calls wait for it, and a whole model with them) and what `vidsparse.break_even` estimates;
above 1, or above what it estimates for all blocks by our kernel on a Hopper GPU, such a call runs dense. The last lines say
where that was wrong: what was let through and is slower than the faster dense call by more than 2 %, and what was held back
and is faster. bf16; query and key are mixtures of Gaussians; clusters from kept
centroids, as in every step but the first.
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
from vidsparse.attention import attend, over_blocks
from vidsparse.break_even import CallShape, every_block_cost, relative_cost
from vidsparse.parts import LayerMemory, MemoryBudget
from vidsparse.processors.dense_calls import KERNEL, every_block

SHAPES = {
    "flux-1024": (LatentGrid(1, 64, 64), 512, 24, 128),
    "sd3.5-1024": (LatentGrid(1, 64, 64), 333, 38, 64),
    "ltx-768x512x121": (LatentGrid(16, 16, 24), 0, 32, 64),
    "wan-1.3b-480p17": (LatentGrid(5, 30, 52), 0, 12, 128),
    "qwen-image-1328": (LatentGrid(1, 83, 83), 64, 24, 128),
    "wan-1.3b-480p41": (LatentGrid(11, 30, 52), 0, 12, 128),
    "flux-2048": (LatentGrid(1, 128, 128), 512, 24, 128),
    "cogvideox-5b-49": (LatentGrid(13, 30, 45), 226, 48, 64),
    "wan-1.3b-480p81": (LatentGrid(21, 30, 52), 0, 12, 128),
    "hunyuan-544p61": (LatentGrid(16, 34, 60), 256, 24, 128),
    "kandinsky5-lite-5s": (LatentGrid(31, 32, 48), 0, 28, 64),
    "mochi-480p163": (LatentGrid(28, 30, 53), 256, 24, 128),
    "wan-14b-720p81": (LatentGrid(21, 45, 80), 0, 40, 128),
    "tiny": (LatentGrid(5, 8, 10), 16, 2, 64),
}
"""Grid, text tokens, heads, head_dim."""
METHODS = "radial,pooled,vidsparse,svg1,semantic,pisa,random,sla"
TINY = "tiny"
"""Shape that shows on a CPU that the script runs."""
SLOWER = 1.02
EVERY_BLOCK = "EVERY_BLOCK"


def timed(function: Any, calls: int, device: str) -> tuple[float, float]:
    """Milliseconds of a call on the device, one after another, and of the host until it has handed it over."""
    if device == "cpu":
        before = time.perf_counter()
        function()
        took = (time.perf_counter() - before) * 1000
        return took, took
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
        self, method: str, density: float, grid: LatentGrid, text: int, tensors: tuple[torch.Tensor, ...]
    ) -> None:
        query = tensors[0]
        recipe = Recipe.from_options(method, density=density)
        context = make_context(TokenLayout(grid, text_before=text), recipe, query.device)
        projection = torch.nn.Linear(query.shape[-1], query.shape[-1], bias=False).to(query)
        self.context = replace(context, memory=LayerMemory(MemoryBudget()), step_index=0, projection=projection)
        self.tensors, self.asked = tensors, density

    def __call__(self) -> torch.Tensor:
        step = self.context.step_index
        assert step is not None
        query, key, value = self.tensors
        out, selection = attend(query, key, value, self.context)
        self.context = replace(self.context, step_index=step + 1)
        self.selection = selection
        return out

    def row(self) -> dict[str, Any]:
        """Density in tokens, and the estimate of what the call costs."""
        parts = self.context.parts
        assert parts is not None
        mask = parts.block_mask if self.selection is None else self.selection.block_mask
        assert mask is not None
        density = parts.block_mask.density if parts.block_mask is not None else parts.density or self.asked
        batch, seq_len, heads, head_dim = self.tensors[0].shape
        cost = relative_cost(
            CallShape(batch, heads, seq_len, head_dim),
            density,
            selects=parts.selector is not None,
            overhead=parts.overhead,
            factor=parts.factor,
            call_seconds=parts.call_seconds,
        )
        reached = mask.density if self.selection is None else float(self.selection.density)
        return {"density": round(reached, 3), "planned_density": round(density, 3), "estimate": round(cost, 3)}


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=120.0, help="start nothing more after this time")
    shapes = ",".join(name for name in SHAPES if name != TINY)
    parser.add_argument("--shapes", default=shapes, help="comma-separated, of " + ", ".join(SHAPES))
    parser.add_argument("--methods", default=METHODS, help="comma-separated, most important first")
    parser.add_argument("--densities", default="0.2,0.5")
    parser.add_argument("--device", default="cuda", help="only the shape tiny is for a CPU")
    parser.add_argument("--compile-only", metavar="I/N", help="run every N-th call once, from the I-th: fills caches")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU; --device cpu --shapes tiny shows that it runs.", file=sys.stderr)
        return 2
    deadline = time.monotonic() + arguments.seconds
    densities = [float(density) for density in arguments.densities.split(",")]
    asked = [(density, method) for density in densities for method in arguments.methods.split(",")]
    if arguments.compile_only:
        first, workers = (int(part) for part in arguments.compile_only.split("/"))
        each = [
            (name, *rest) for name in arguments.shapes.split(",") for rest in asked[: len(asked) // len(densities)]
        ]
        for name, density, method in each[first::workers]:
            if time.monotonic() < deadline:
                call = Call(method, density, *SHAPES[name][:2], make_tensors(name, device))
                call()
                call()
                print(f"compiled {method} at {name}", flush=True)
        return 0
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python scripts/bench_method_calls.py " + " ".join(sys.argv[1:]),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "versions": {name: version(name) for name in ("torch", "triton")},
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "rows": [],
    }
    for name in arguments.shapes.split(","):
        grid, text, heads, head_dim = SHAPES[name]
        tensors = make_tensors(name, device)
        query, key, value = tensors
        calls = 3 if query.shape[1] > 30_000 else 15
        backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if device == "cuda" else (SDPBackend.MATH,)
        dense = {}
        for backend in backends:
            run = functools.partial(dense_call, query, key, value, backend)
            timed(run, 2, device)
            dense[backend.name] = statistics.median(timed(run, calls, device)[0] for _ in range(3))
        fastest = min(dense.values())
        every, dense_cost = fastest, 1.0
        if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
            dense_cost = min(1.0, every_block_cost(CallShape(1, heads, query.shape[1], head_dim)))
            blocks = every_block(query.shape[1], heads, head_dim, query.dtype, query.device).mask
            run = functools.partial(over_blocks, query, key, value, blocks, None, None, KERNEL)
            timed(run, 2, device)
            every = dense[EVERY_BLOCK] = statistics.median(timed(run, calls, device)[0] for _ in range(3))
        print(f"{name}: dense " + ", ".join(f"{backend} {ms:.3f} ms" for backend, ms in dense.items()), flush=True)
        for density, method in asked:
            if time.monotonic() > deadline:
                print(f"{name}, {method} {density:g}: not started, {arguments.seconds:g} s are over")
                continue
            row: dict[str, Any] = {"shape": name, "seq_len": query.shape[1], "heads": heads, "head_dim": head_dim}
            row |= {"method": method, "asked": density, "dense_ms": round(fastest, 4)}
            row |= {"every_block": round(every / fastest, 3), "every_block_estimate": round(dense_cost, 3)}
            try:
                call = Call(method, density, grid, text, tensors)
                timed(call, 3, device)
                times, hosts = zip(*(timed(call, calls, device) for _ in range(3)), strict=True)
                ms = statistics.median(times)
                row |= {
                    "ms": round(ms, 4),
                    "host_ms": round(statistics.median(hosts), 4),
                    "ratio": round(ms / fastest, 3),
                }
                row |= call.row()
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            result["rows"].append(row)
            print(
                "  ".join(f"{key} {value}" for key, value in row.items() if key not in ("heads", "head_dim")),
                flush=True,
            )
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for line in mistakes(result["rows"]):
        print(line)
    return 0


def make_tensors(name: str, device: str) -> tuple[torch.Tensor, ...]:
    """A mixture of 256 Gaussians of unequal weight: without structure there are no clusters, and a few hold most tokens."""
    grid, text, heads, head_dim = SHAPES[name]
    seq_len = grid.num_tokens + text
    generator = torch.Generator(device).manual_seed(0)
    weights = 1 / torch.arange(1, 257, device=device).float()
    component = torch.multinomial(weights, seq_len, replacement=True, generator=generator)
    found = []
    for _ in range(3):
        centres = torch.randn(256, heads, head_dim, generator=generator, device=device).bfloat16()
        x = torch.randn(1, seq_len, heads, head_dim, generator=generator, device=device, dtype=torch.bfloat16)
        found.append(x.mul_(0.5).add_(centres[component]))
    return tuple(found)


def mistakes(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for each row whose estimate is on the wrong side, by more than the 2 % that are allowed."""
    found = []
    for row in rows:
        what = f"{row['shape']}, {row['method']} at {row['asked']:g}"
        if "error" in row:
            found.append(f"FAILED {what}: {row['error']}")
            continue
        # What a dense call would run on.
        dense = row["every_block"] if row["every_block_estimate"] < 1 else 1.0
        if row["estimate"] <= row["every_block_estimate"] and row["ratio"] > SLOWER * dense:
            found.append(f"SLOWER {what}: {row['ratio']} of dense, estimated {row['estimate']}")
        elif row["estimate"] > row["every_block_estimate"] and row["ratio"] < dense / SLOWER:
            found.append(f"held back {what}: {row['ratio']} of dense, estimated {row['estimate']}")
    return found or ["Every estimate is on the right side."]


if __name__ == "__main__":
    sys.exit(main())
