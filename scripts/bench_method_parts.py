"""Where the time of one attention call goes under each method, at the true size of a model, against dense attention.

    python scripts/compare_selections.py --device cuda --methods radial --densities 0.5 --record record.pt
    python scripts/bench_method_parts.py --record record.pt --output parts.json

A call is what a layer does in a step that is not the first: cluster (from the centroids of the step before), select,
permute, attend, correct, restore. "ms" is the whole call, everything counted; the parts are timed one by one, and
"uniform" and "uniform_128" are the times of uniform blocks of 128 queries and 64 or 128 keys, chosen at random, of the same
density. All on the GPU's clock, bf16, head dim 128, batch 1.

Query, key and value are those of the bundled model as `compare_selections.py --record` keeps them, made larger: each
latent pixel is repeated over the pixels of the larger grid (21 frames both), two heads of 64 make one of 128 (every pair
of heads of every layer after the first), and noise of a tenth of each channel's spread is added. Without --record they
are a mixture of 256 Gaussians of very unequal size. The run ends within --seconds and writes after every method; name
the most important first.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidsparse import LatentGrid, Recipe, TokenLayout, make_context
from vidsparse.attention import attend
from vidsparse.parts import JointCorrection, LayerMemory, MemoryBudget, Selection
from vidsparse.selection.blocks import PooledSelector
from vidsparse.selection.clusters import ClusterSelector
from vidsparse_kernels import block_sparse_attention

SHAPES = {
    "wan-14b-720p81": (LatentGrid(21, 45, 80), 40),
    "wan-1.3b-480p81": (LatentGrid(21, 30, 52), 12),
}
HEAD_DIM = 128
DEVICE = "cuda"
METHODS = (
    "vidsparse:density=0.15,vidsparse:density=0.15:step_iterations=1,vidsparse:density=0.25,semantic:density=0.25,"
    "random:density=0.25,pooled:density=0.25,vidsparse:density=0.15:k_clusters=2000,radial:density=0.35,"
    "pisa:density=0.25,semantic:density=0.15,svg1:density=0.25,semantic:density=0.35,"
    "vidsparse:density=0.35,pooled:density=0.15,pisa:density=0.15"
)
Tensors = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--record", type=Path, help="file of compare_selections.py --record")
    parser.add_argument("--methods", default=METHODS, help="comma-separated, NAME:OPTION=VALUE:...")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each part")
    parser.add_argument("--seconds", type=float, default=120.0, help="start no further method after this time")
    parser.add_argument("--compile-only", metavar="I/N", help="run every N-th call once, from the I-th: fills caches")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    deadline = time.monotonic() + arguments.seconds
    methods = arguments.methods.split(",")
    shapes = {name: SHAPES[name] for name in arguments.shapes.split(",")}
    if arguments.compile_only:
        first, workers = (int(part) for part in arguments.compile_only.split("/"))
        for name, (grid, heads) in shapes.items():
            tensors = make_tensors(grid, heads, None)
            for method in methods[first::workers]:
                call = Call(method, grid, tensors)
                call()
                call()
                print(f"compiled {method} at {name}", flush=True)
        return 0
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python scripts/bench_method_parts.py " + " ".join(sys.argv[1:]),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "tensors": "recorded from the bundled model and made larger" if arguments.record else "mixture of Gaussians",
        "rows": [],
    }
    record = torch.load(arguments.record, map_location=DEVICE) if arguments.record else None
    for name, (grid, heads) in shapes.items():
        tensors = make_tensors(grid, heads, record)
        dense = {
            kind.name: timed(partial(dense_call, *tensors, kind), arguments.repeats)
            for kind in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
        }
        print(f"{name}: dense {dense}", flush=True)
        for method in methods:
            if time.monotonic() > deadline:
                print(f"{name}, {method}: not started, {arguments.seconds:g} s are over")
                continue
            row: dict[str, Any] = {"shape": name, "seq_len": grid.num_tokens, "heads": heads, "method": method}
            row["dense_ms"] = round(min(dense.values()), 3)
            try:
                row |= measure(method, grid, tensors, arguments.repeats)
                row["ratio"] = round(row["ms"] / row["dense_ms"], 3)
                row["overhead"] = round(
                    sum(row["parts"].get(part, 0) for part in ("cluster", "select", "permute", "restore"))
                    / row["dense_ms"],
                    4,
                )
            except Exception as error:  # the next method may still run
                row["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            result["rows"].append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def make_tensors(grid: LatentGrid, heads: int, record: Any) -> Tensors:
    """bf16 query, key and value `[1, tokens, heads, HEAD_DIM]` on the GPU."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    if record is None:
        shape = (1, grid.num_tokens, heads, HEAD_DIM)
        weights = 1 / torch.arange(1, 257, device=DEVICE).float()
        component = torch.multinomial(weights, grid.num_tokens, replacement=True, generator=generator)
        found = []
        for _ in range(3):
            centres = torch.randn(256, heads, HEAD_DIM, generator=generator, device=DEVICE)
            x = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
            found.append(x.mul_(0.5).add_(centres.bfloat16()[component]))
        return found[0], found[1], found[2]
    (frames, height, width), calls = record
    if frames != grid.frames:
        raise SystemExit(f"the record has {frames} latent frames, the shape {grid.frames}")
    last = max(step for step, *_ in calls)
    layers = [tensors for step, layer, *tensors in calls if step == last and layer > 0]
    pairs = list(itertools.combinations(range(layers[0][0].shape[2]), 2))
    places = [(layer, pair) for layer in layers for pair in pairs]
    found = []
    for which in range(3):
        chosen = []
        for layer, pair in (places[i % len(places)] for i in range(heads)):
            x = layer[which][0][:, list(pair)].flatten(1)  # [tokens, 128]
            x = x.T.reshape(1, HEAD_DIM, frames, height, width).float()
            large = F.interpolate(x, size=(frames, grid.height, grid.width), mode="nearest").flatten(2)[0].T
            noise = torch.randn(large.shape, generator=generator, device=DEVICE)
            chosen.append((large + 0.1 * large.std(0) * noise).bfloat16())
        found.append(torch.stack(chosen, 1)[None])
    return found[0], found[1], found[2]


class Call:
    """One layer's call in step after step, with what it keeps between them."""

    def __init__(self, method: str, grid: LatentGrid, tensors: Tensors) -> None:
        name, *pairs = method.split(":")
        options = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        context = make_context(TokenLayout(grid), Recipe.from_options(name, **options), tensors[0].device)
        projection = torch.nn.Linear(tensors[0].shape[-1], tensors[0].shape[-1], bias=False).to(tensors[0])
        self.context = replace(context, memory=LayerMemory(MemoryBudget()), step_index=0, projection=projection)
        self.tensors = tensors

    def __call__(self) -> Selection | None:
        step = self.context.step_index
        assert step is not None
        _, selection = attend(*self.tensors, self.context)
        self.context = replace(self.context, step_index=step + 1)
        return selection


def measure(method: str, grid: LatentGrid, tensors: Tensors, repeats: int) -> dict[str, Any]:
    """Milliseconds of a call and of its parts, and its density in tokens."""
    call = Call(method, grid, tensors)
    call()
    selection = call()
    row: dict[str, Any] = {"ms": timed(call, repeats), "parts": {}}
    context, parts = call.context, call.context.parts
    assert parts is not None
    query, key, value = tensors
    if selection is None:
        assert parts.block_mask is not None
        row["density"] = round(parts.block_mask.token_density, 4)
        row["parts"]["attend"] = row["ms"]
        return row
    row["density"] = round(float(selection.density), 4)
    if parts.selector is not None:
        select = timed(partial(parts.selector.select, query, key, context), repeats)
        row["parts"]["select"] = select
        if isinstance(parts.selector, ClusterSelector):
            cluster = partial(parts.selector.clustering.run, query, key, context.layout, context)
            row["parts"]["cluster"] = timed(cluster, repeats)
            row["parts"]["select"] = round(select - row["parts"]["cluster"], 4)
            row["clusters"] = [parts.selector.clustering.q_clusters, parts.selector.clustering.k_clusters]
    if selection.q_order is not None:
        row["parts"]["permute"] = timed(partial(selection.permute, query, key, value), repeats)
        row["parts"]["restore"] = timed(partial(selection.restore, query), repeats)
    assert selection.backend is not None
    row["backend"] = selection.backend[0]
    moved = selection.permute(query, key, value)
    with_lse = parts.correction is not None and parts.correction.needs_lse
    scale = query.shape[-1] ** -0.5
    run: Callable[[], Any] = partial(
        block_sparse_attention, *moved, selection.block_mask, return_lse=with_lse, backend=selection.backend[0]
    )
    if selection.backend[0] == "hopper_with_tail":
        # Both in one kernel, and the pooling, which a call has in its selection.
        assert isinstance(parts.correction, JointCorrection)
        run = partial(parts.correction.attend, *moved, selection, context, scale, None)
    elif parts.correction is not None:
        state = run()
        out, lse = state if isinstance(state, tuple) else (state, None)
        correct = partial(parts.correction.correct, *moved, out, lse, selection, context, scale, None)
        row["parts"]["correct"] = timed(correct, repeats)
    plain = {}
    for name, size in (("uniform", 64), ("uniform_128", 128)):
        layout, density = context.layout, float(selection.density)
        random = PooledSelector(layout, query.device, density, None, random_seed=0, kv_block_size=size)
        plain[name] = random.select(query, key, context).block_mask
    # In turns, as the clock of the GPU sinks over a run.
    every = [run, *(partial(block_sparse_attention, query, key, value, mask) for mask in plain.values())]
    turns = [[timed(function, 1) for function in every] for _ in range(max(3, repeats))]
    row["parts"]["attend"], *times = (round(statistics.median(ms), 4) for ms in zip(*turns, strict=True))
    for (name, mask), ms in zip(plain.items(), times, strict=True):
        row[name] = {"ms": ms, "density": round(mask.token_density, 4)}
        scaled = ms * row["density"] / row[name]["density"]
        row[f"rate_of_{name}"] = round(scaled / row["parts"]["attend"], 3)
    return row


def dense_call(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))


def timed(function: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds on the GPU. Calls are handed over while the GPU sleeps, so that none waits for the host."""
    function()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in pairs:
        torch.cuda._sleep(8_000_000)  # about 4 ms
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return round(statistics.median(start.elapsed_time(end) for start, end in pairs), 4)


if __name__ == "__main__":
    sys.exit(main())
