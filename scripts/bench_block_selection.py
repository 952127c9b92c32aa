"""Time pooling, scoring and selection of blocks on one GPU against dense attention and the memory's speed.

    python scripts/bench_block_selection.py --output block_selection.json

Checks the kernels against their reference first and prints no speed if that fails. Every number is the median of CUDA
graph replays, because in a model these short launches wait behind the work before them; "eager" is the same measured
launch by launch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from vidsparse_kernels import pool_blocks, score_blocks, select_block_lists, select_from_qk
from vidsparse_kernels.testing import make_qkv

SHAPES = ((32_760, 12, 128), (75_600, 12, 128), (75_600, 40, 128))
BLOCK_SIZES = ((128, 64), (128, 128))
DENSITY, TOP_P = 0.2, 0.8
BYTES_PER_MS = 4.26e9
"""Device copy of an H200, bytes read and written."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=50, help="timed runs of each row (default 50)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    machine = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
    }
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    try:
        check_correctness()
    except AssertionError as error:
        print(f"Wrong result, so no speed is reported: {error}", file=sys.stderr)
        return 1
    rows = [row for shape in SHAPES for row in bench_shape(*shape, arguments.repeats)]
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def check_correctness() -> None:
    """Both kernels against their reference on a ragged shape."""
    q, k, _ = make_qkv(seq_len_q=5000, num_heads=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    pooled = [pool_blocks(x, size) for x, size in ((q, 128), (k, 64))]
    for x, size, got in ((q, 128, pooled[0]), (k, 64, pooled[1])):
        torch.testing.assert_close(
            got["mean"], pool_blocks(x, size, backend="reference")["mean"], rtol=1e-5, atol=1e-6
        )
    scores = score_blocks(pooled[0]["mean"], pooled[1]["mean"])
    for got, want in zip(
        select_block_lists(scores, density=DENSITY),
        select_block_lists(scores, density=DENSITY, backend="reference"),
        strict=True,
    ):
        assert torch.equal(got, want), "top-k lists differ from the reference"


def bench_shape(seq_len: int, num_heads: int, head_dim: int, repeats: int) -> list[dict[str, Any]]:
    query, key, value = make_qkv(
        seq_len_q=seq_len, num_heads=num_heads, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    dense = measure(lambda: F.scaled_dot_product_attention(q, k, v), min(repeats, 10), graph=False)
    rows: list[dict[str, Any]] = []

    def add(name: str, blocks: tuple[int, int] | None, ms: float, note: str = "") -> None:
        row = {
            "what": name, "seq_len": seq_len, "num_heads": num_heads, "head_dim": head_dim, "blocks": blocks,
            "ms": ms, "share_of_dense": ms / dense,
        }  # fmt: skip
        rows.append(row)
        sizes = "" if blocks is None else f"{blocks[0]}x{blocks[1]}"
        print(
            f"S={seq_len:6d} H={num_heads:2d} D={head_dim:3d} {sizes:8s} {name:34s} {ms:8.4f} ms  "
            f"{100 * ms / dense:6.2f} % of dense  {note}",
            flush=True,
        )

    add("dense SDPA default", None, dense)
    floor = query.numel() * query.element_size() / BYTES_PER_MS
    for blocks in BLOCK_SIZES:
        sizes: dict[str, Any] = dict(q_block_size=blocks[0], kv_block_size=blocks[1])

        def time(name: str, call: Callable[[], Any], note: str = "", blocks: tuple[int, int] = blocks) -> None:
            add(name, blocks, measure(call, repeats, graph=True), note)

        pool_q = measure(lambda size=blocks[0]: pool_blocks(query, size), repeats, graph=True)
        add("pool query (mean)", blocks, pool_q, f"{100 * floor / pool_q:.0f} % of the copy rate")
        pool_k = measure(lambda size=blocks[1]: pool_blocks(key, size), repeats, graph=True)
        add("pool key (mean)", blocks, pool_k, f"{100 * floor / pool_k:.0f} % of the copy rate")
        time("pool key (mean, max, min)", lambda n=blocks[1]: pool_blocks(key, n, kinds=("mean", "max", "min")))
        q_pooled, k_pooled = pool_blocks(query, blocks[0])["mean"], pool_blocks(key, blocks[1])["mean"]
        time("score", lambda q=q_pooled, k=k_pooled: score_blocks(q, k))
        scores = score_blocks(q_pooled, k_pooled)
        count = -(-scores.shape[3] // 5)
        forced = torch.eye(scores.shape[2], scores.shape[3], device="cuda", dtype=torch.bool)
        time("lists, top-k", lambda s=scores: select_block_lists(s, density=DENSITY))
        time("lists, top-k, forced", lambda s=scores, f=forced: select_block_lists(s, density=DENSITY, forced=f))
        time("lists, top-p", lambda s=scores: select_block_lists(s, top_p=TOP_P))
        time(
            "lists, torch.topk and sort (no ties)",
            lambda s=scores, n=count: s.topk(n, -1, sorted=False).indices.sort(-1),
        )
        time("all, top-k", lambda s=sizes: select_from_qk(query, key, density=DENSITY, **s))
        time("all, top-p", lambda s=sizes: select_from_qk(query, key, top_p=TOP_P, **s))
        eager = measure(lambda s=sizes: select_from_qk(query, key, density=DENSITY, **s), repeats, graph=False)
        add("all, top-k, eager", blocks, eager)
    return rows


def measure(run: Callable[[], Any], repeats: int, *, graph: bool) -> float:
    """Median milliseconds by CUDA events; L2 is flushed between runs, as a model's other layers would."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in pairs)[repeats // 2]


if __name__ == "__main__":
    sys.exit(main())
