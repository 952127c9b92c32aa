"""Time the pooled tail beside the block-sparse kernel that it completes, on one GPU.

    python scripts/bench_pooled_tail.py --output pooled_tail.json

Checks the kernels against float64 first and prints no speed if that fails. Times are medians of CUDA events with a cold
L2. First the whole in turns, so that a GPU that grows hot slows all alike: the listed blocks alone, the tail after them
("separate"), and both in one kernel, pools and bias counted; and whole calls of the methods with and without the tail,
selection counted, whose difference is what the tail adds. Then the parts. `share` is the time over that of
`block_sparse_attention` with its LSE at the same shape, of the whole in the same round. The file is written after each shape.

`--quick`: 75,600 tokens of 12 heads, no other shape; `--whole`: no parts; `--sweep`: also other tile shapes of the tail
kernel, each checked against the default one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from vidsparse import LatentGrid, Recipe, TokenLayout, make_context
from vidsparse.attention import attend
from vidsparse_kernels import (
    BlockMask,
    block_sparse_attention,
    block_sparse_attention_with_tail,
    merge_attention_states,
    pool_blocks,
    select_backend_with_tail,
)
from vidsparse_kernels.block_sparse_attention.configs import ForwardConfig
from vidsparse_kernels.pooled_tail import api, pool_for_tail, pooled_tail_attention, pooled_tail_merge_
from vidsparse_kernels.pooled_tail.forward import triton_tail
from vidsparse_kernels.pooled_tail.words import listed_words
from vidsparse_kernels.testing import make_block_mask, make_qkv, make_variable_block_mask

SHAPES = ((32_760, 12, 128), (32_760, 40, 128), (75_600, 12, 128), (75_600, 40, 128))
KV_BLOCK_SIZES = (128, 64)
GRIDS = {32_760: LatentGrid(21, 30, 52), 75_600: LatentGrid(21, 45, 80)}
Q_BLOCK_SIZE, DENSITY = 128, 0.15
BYTES_PER_MS = 4.26e9
"""Device copy of an H200, bytes read and written."""
QUICK_SHAPES = ((75_600, 12, 128),)
SWEEP = (
    ForwardConfig(128, 64, 4, 2, True), ForwardConfig(128, 64, 8, 2, True), ForwardConfig(128, 64, 8, 3, True),
    ForwardConfig(64, 64, 4, 2, True), ForwardConfig(64, 64, 4, 3, True),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each row (default 15)")
    parser.add_argument("--sweep", action="store_true", help="also time other tile shapes")
    parser.add_argument("--whole", action="store_true", help="only what is timed in turns, no parts")
    parser.add_argument("--quick", action="store_true", help="75,600 tokens of 12 heads, no other shape")
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
    rows: list[dict[str, Any]] = []
    for size in KV_BLOCK_SIZES:
        for shape in QUICK_SHAPES if arguments.quick else SHAPES:
            rows += bench_shape(*shape, size, arguments)
            if arguments.output:
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def check_correctness() -> None:
    """Tail and fused merge against float64 on ragged uniform blocks and on clusters."""
    q, k, v = make_qkv(seq_len_q=5000, num_heads=4, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    wide = (q.double(), k.double(), v.double())
    options: dict[str, Any] = dict(
        seq_len_q=5000, q_block_size=128, kv_block_size=64, num_heads=4, empty_rows=True, full_rows=True
    )
    clusters: dict[str, Any] = dict(num_q_blocks=20, num_kv_blocks=90, offsets_heads=4)
    for mask in (
        make_block_mask(**options, density=DENSITY, device="cuda"),
        make_variable_block_mask(**options, **clusters, density=DENSITY, device="cuda"),
    ):
        truth = pooled_tail_attention(*wide, mask)
        got = pooled_tail_attention(q, k, v, mask)
        close(got, truth, "tail")
        kept = block_sparse_attention(q, k, v, mask, return_lse=True)
        merged = merge_attention_states(kept[0].double(), kept[1].double(), *truth)
        close(pooled_tail_merge_(*kept, q, k, v, mask), merged, "merge")
        if select_backend_with_tail(q, k, v, mask)[0] == "hopper_with_tail":
            close(block_sparse_attention_with_tail(q, k, v, mask, return_lse=True), merged, "one kernel")
        again = pooled_tail_attention(q, k, v, mask)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"


def close(got: tuple[torch.Tensor, torch.Tensor], truth: tuple[torch.Tensor, torch.Tensor], name: str) -> None:
    """Relative root-mean-square error of the output within bf16's rounding of weights, values and result."""
    assert torch.equal(got[1] == -torch.inf, truth[1] == -torch.inf), f"{name}: -inf in the wrong rows"
    error = (got[0].double() - truth[0]).norm() / truth[0].norm()
    assert error < 6e-3, f"{name}: relative error {error:.2e}"
    finite = truth[1] > -torch.inf
    largest = (got[1].double() - truth[1])[finite].abs().max()
    assert largest < 2e-2, f"{name}: LSE off by {largest:.2e}"


def bench_shape(
    seq_len: int, num_heads: int, head_dim: int, kv_block_size: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    query, key, value = make_qkv(
        seq_len_q=seq_len, num_heads=num_heads, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    mask = random_mask(seq_len, num_heads, kv_block_size)
    mk, scale = mask.num_kv_blocks, head_dim**-0.5
    rows: list[dict[str, Any]] = []

    def words() -> None:
        mask._cache.pop("listed_words", None)
        listed_words(mask)

    def whole(backend: str, first_order: bool) -> None:
        mask._cache.pop("listed_words", None)
        block_sparse_attention_with_tail(query, key, value, mask, first_order=first_order, backend=backend)

    backends = ["separate"]
    if select_backend_with_tail(query, key, value, mask)[0] == "hopper_with_tail":
        backends.append("hopper_with_tail")
    calls: dict[str, Callable[[], Any]] = {
        "block_sparse_attention with LSE": lambda: block_sparse_attention(query, key, value, mask, return_lse=True)
    }
    for backend in backends:
        for first_order in (True, False):
            name = f"whole, {backend}{'' if first_order else ', no first order'}"
            calls[name] = partial(whole, backend, first_order)
    for method in ("pooled", "pisa:first_order", "pisa:"):
        calls[f"call of {method}"] = call_of(method, seq_len, kv_block_size, (query, key, value))
    in_turns = measure_in_turns(calls, 2 * arguments.repeats + 1)
    sparse, _ = in_turns["block_sparse_attention with LSE"]

    def add(
        name: str, call: Callable[[], Any] | tuple[float, float], flops: float = 0.0, gigabytes: float = 0.0
    ) -> None:
        if callable(call):
            ms = measure(call, arguments.repeats)
            share = ms / sparse
        else:
            ms, share = call
        row = {
            "what": name, "seq_len": seq_len, "num_heads": num_heads, "head_dim": head_dim,
            "blocks": [Q_BLOCK_SIZE, kv_block_size], "density": DENSITY, "ms": ms, "share": share,
            "tflops": flops / ms / 1e9, "copy_rate": gigabytes * 1e9 / BYTES_PER_MS / ms,
        }  # fmt: skip
        rows.append(row)
        rate = f"{row['tflops']:6.0f} TFLOP/s" if flops else f"{100 * row['copy_rate']:6.0f} % of the copy rate"
        print(
            f"S={seq_len:6d} H={num_heads:2d} D={head_dim:3d} {Q_BLOCK_SIZE}x{kv_block_size:<3d} {name:44s} "
            f"{ms:8.3f} ms {100 * row['share']:7.1f} % of sparse  {rate if flops or gigabytes else ''}",
            flush=True,
        )

    tokens = seq_len * num_heads * head_dim
    # Every virtual token is multiplied, the listed ones too, and the first-order matrix once.
    tail_flops = 4.0 * tokens * mk + 2.0 * tokens * head_dim
    for name, both in in_turns.items():
        add(name, both, 4.0 * tokens * (DENSITY * seq_len + (mk if "whole" in name else 0)))
    if arguments.whole:
        return rows
    pools = pool_for_tail(key, value, mask)
    add("pool key only (mean, for the selection)", lambda: pool_blocks(key, kv_block_size), gigabytes=2 * tokens / 1e9)
    add("pool_for_tail", lambda: pool_for_tail(key, value, mask), gigabytes=4 * tokens / 1e9)
    add("pool_for_tail, no first order", lambda: pool_for_tail(key, value, mask, first_order=False),
        gigabytes=4 * tokens / 1e9)  # fmt: skip

    add("words of listed blocks (kept on the mask)", words)
    add("tail", lambda: pooled_tail_attention(query, key, value, mask, pools=pools), tail_flops)
    add("tail, no first order",
        lambda: pooled_tail_attention(query, key, value, mask, pools=pools, first_order=False),
        4.0 * tokens * mk)  # fmt: skip
    # Merging over and over keeps the values finite and the work the same.
    out, lse = block_sparse_attention(query, key, value, mask, return_lse=True)
    add(
        "tail with fused merge", lambda: pooled_tail_merge_(out, lse, query, key, value, mask, pools=pools), tail_flops
    )
    add("words, pools, tail with fused merge",
        lambda: (words(), pooled_tail_merge_(out, lse, query, key, value, mask)), tail_flops)  # fmt: skip
    if "hopper_with_tail" in backends:
        from vidsparse_kernels.pooled_tail.hopper import hopper_forward_with_tail, tail_bias

        means = api._rounded_pools(key, value, mask, None, scale)
        add("bias of the one kernel", lambda: tail_bias(mask, 1.0))
        add("pools of the one kernel", lambda: api._rounded_pools(key, value, mask, None, scale))
        add("pools of the one kernel, no first order", lambda: api._rounded_pools(key, value, mask, None, None))
        add("one kernel and its bias",
            lambda: hopper_forward_with_tail(query, key, value, *means, mask, scale=scale, return_lse=False),
            4.0 * tokens * (DENSITY * seq_len + mk))  # fmt: skip
    if arguments.sweep and num_heads == 12:
        wanted = triton_tail(query, pools, mask, scale=scale, first_order=True)
        before = out.clone(), lse.clone()  # timing merges into out and lse again and again
        merged = triton_tail(query, pools, mask, scale=scale, first_order=True, state=(out.clone(), lse.clone()))
        for config in SWEEP:
            name = f"{config.block_m}x{config.block_n} warps {config.num_warps} stages {config.num_stages}"

            def call(state: tuple[Tensor, Tensor] | None = None, config: ForwardConfig = config) -> Any:
                return triton_tail(query, pools, mask, scale=scale, first_order=True, state=state, config=config)

            try:
                results = (call(), wanted), (call((before[0].clone(), before[1].clone())), merged)
            except triton.runtime.errors.OutOfResources as refused:
                print(f"{name}: {refused}")
                continue
            errors = [
                float((got.float() - want.float()).nan_to_num(1e9).norm() / want.float().norm())
                for pair in results
                for got, want in zip(*pair, strict=True)
            ]
            if max(errors) > 5e-3:
                print(f"{name}: relative errors of output and LSE, alone and merged: {errors}, not timed")
                continue
            add(f"tail {name}", call, tail_flops)
            add(f"tail with fused merge {name}", partial(call, (out, lse)), tail_flops)
    return rows


def call_of(method: str, seq_len: int, kv_block_size: int, tensors: tuple[Tensor, ...]) -> Callable[[], Any]:
    """A layer's whole call, selection counted. "pisa:first_order" and "pisa:" differ from "pooled" by the tail alone, which
    shares the means of keys with the selection."""
    name, _, rest = method.partition(":")
    options: dict[str, Any] = dict(density=DENSITY, kv_block_size=kv_block_size)
    if name == "pisa":
        options["first_order"] = rest == "first_order"
    context = make_context(TokenLayout(GRIDS[seq_len]), Recipe.from_options(name, **options), "cuda")
    query, key, value = tensors
    return lambda: attend(query, key, value, context)


def random_mask(seq_len: int, num_heads: int, kv_block_size: int) -> BlockMask:
    """The same number of random blocks in every row of every head."""
    mq, mk = -(-seq_len // Q_BLOCK_SIZE), -(-seq_len // kv_block_size)
    count = round(DENSITY * mk)
    generator = torch.Generator("cuda").manual_seed(0)
    scores = torch.rand(1, num_heads, mq, mk, generator=generator, device="cuda")
    indices = scores.topk(count, -1, sorted=False).indices.sort(-1).values.to(torch.int32)
    counts = torch.full((1, num_heads, mq), count, dtype=torch.int32, device="cuda")
    return BlockMask.from_indices(
        counts, indices, seq_len_q=seq_len, seq_len_kv=seq_len, q_block_size=Q_BLOCK_SIZE, kv_block_size=kv_block_size
    )


def measure(run: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of one call."""
    return measure_in_turns({"": run}, repeats)[""][0]


def measure_in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds by CUDA events, and the median share of the first call's time in the same round. Calls run one
    after the other in each round; L2 is flushed before each, as a model's other layers would."""
    for _ in range(2):
        for run in calls.values():
            run()
    torch.cuda.synchronize()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    pairs: dict[str, list[list[torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, run in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            stop.record()
            pairs[name].append([start, stop])
    torch.cuda.synchronize()
    times = {name: [start.elapsed_time(stop) for start, stop in both] for name, both in pairs.items()}
    first = next(iter(times.values()))
    return {
        name: (statistics.median(ms), statistics.median(a / b for a, b in zip(ms, first, strict=True)))
        for name, ms in times.items()
    }


if __name__ == "__main__":
    sys.exit(main())
