"""Time block_sparse_attention against the dense kernels on one GPU.

    python scripts/bench_block_sparse.py --output block_sparse.json

Checks the kernels against float64 first and prints no speed if that fails. Block lists are random per head with the
same number of blocks in every row, so nothing is gained from locality. TFLOP/s counts computed blocks only:
4 * seq_len^2 * head_dim * num_heads * density.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidsparse_kernels import BlockMask
from vidsparse_kernels.block_sparse_attention.forward import config_for, triton_forward
from vidsparse_kernels.testing import assert_close_to_oracle, make_block_mask, make_qkv, masked_attention_oracle

SHAPES = ((5_040, 4, 64), (32_760, 12, 128), (75_600, 6, 128))
DENSITIES = (1.0, 0.45, 0.2)
Q_BLOCK_SIZE, KV_BLOCK_SIZE = 128, 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=20.0, help="time budget for all measurements (default 20)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    machine = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
    }
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    try:
        check_correctness()
    except AssertionError as error:
        print(f"Wrong result, so no speed is reported: {error}", file=sys.stderr)
        return 1
    budget = arguments.seconds / (len(SHAPES) * (2 + 2 * len(DENSITIES)))
    rows = [row for shape in SHAPES for row in bench_shape(*shape, budget)]
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def check_correctness() -> None:
    """Both variants against the float64 oracle on ragged shapes."""
    for head_dim in (64, 128):
        q, k, v = make_qkv(
            seq_len_q=1111, seq_len_kv=1050, num_heads=4, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
        )
        mask = make_block_mask(
            seq_len_q=1111, seq_len_kv=1050, q_block_size=128, num_heads=4, empty_rows=True, device="cuda"
        )
        truth, _ = masked_attention_oracle(q, k, v, mask)
        eager, _ = masked_attention_oracle(q, k, v, mask, dtype=torch.bfloat16)
        for variant in (True, False):
            out = run_triton(q, k, v, mask, variant)
            assert_close_to_oracle(out, eager, truth, name=f"head_dim {head_dim}, descriptors {variant}")


def bench_shape(seq_len: int, num_heads: int, head_dim: int, seconds: float) -> list[dict[str, Any]]:
    query, key, value = make_qkv(
        seq_len_q=seq_len, num_heads=num_heads, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    rows: list[dict[str, Any]] = []

    def add(name: str, density: float, run: Callable[[], Tensor]) -> None:
        p20, median, p80 = measure(run, seconds)
        flops = 4 * seq_len**2 * head_dim * num_heads * density
        row = {
            "kernel": name, "seq_len": seq_len, "num_heads": num_heads, "head_dim": head_dim,
            "density": round(density, 4), "ms": median, "ms_p20": p20, "ms_p80": p80,
            "tflops": flops / median / 1e9,
        }  # fmt: skip
        dense = [r["ms"] for r in rows if r["kernel"].startswith("dense")]
        row["kernel_speedup"] = min(dense, default=median) / median
        rows.append(row)
        print(
            f"S={seq_len:6d} H={num_heads:2d} D={head_dim:3d}  {name:24s} density {density:4.2f}  {median:8.3f} ms "
            f"({p20:.3f}-{p80:.3f})  {row['tflops']:6.0f} TFLOP/s  kernel speedup {row['kernel_speedup']:5.2f}",
            flush=True,
        )

    add("dense SDPA default", 1.0, lambda: F.scaled_dot_product_attention(q, k, v))
    add("dense SDPA cuDNN", 1.0, cudnn)
    for density in DENSITIES:
        mask = random_lists(seq_len, num_heads, density)
        for variant in (True, False):
            name = "triton descriptors" if variant else "triton pointers"
            add(name, mask.token_density, lambda m=mask, d=variant: run_triton(query, key, value, m, d))
    return rows


def run_triton(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, descriptors: bool) -> Tensor:
    """The Triton kernel as the table configures it, with or without tensor descriptors."""
    config = config_for(query, key, value, torch.empty_like(query), mask, descriptors=descriptors)
    return triton_forward(
        query, key, value, mask, scale=query.shape[-1] ** -0.5, key_bias=None, return_lse=False, config=config
    )[0]


def random_lists(seq_len: int, num_heads: int, density: float) -> BlockMask:
    """Random kv-blocks per head and q-block, the same number in every row."""
    num_q_blocks, num_kv_blocks = math.ceil(seq_len / Q_BLOCK_SIZE), math.ceil(seq_len / KV_BLOCK_SIZE)
    count = max(1, round(density * num_kv_blocks))
    generator = torch.Generator("cuda").manual_seed(0)
    noise = torch.rand(1, num_heads, num_q_blocks, num_kv_blocks, generator=generator, device="cuda")
    indices = noise.topk(count, -1).indices.sort(-1).values
    counts = torch.full(indices.shape[:3], count, device="cuda", dtype=torch.int32)
    return BlockMask.from_indices(
        counts,
        indices,
        seq_len_q=seq_len,
        seq_len_kv=seq_len,
        q_block_size=Q_BLOCK_SIZE,
        kv_block_size=KV_BLOCK_SIZE,
    )


def measure(run: Callable[[], Tensor], seconds: float) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile in milliseconds, by CUDA events, within a time budget."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    run()
    torch.cuda.synchronize()
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    repeats = max(5, min(200, int(seconds * 1e3 / max(events[0].elapsed_time(events[1]), 1e-3))))
    for _ in range(repeats // 4 + 1):
        run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in pairs)
    return times[repeats // 5], times[repeats // 2], times[repeats * 4 // 5]


if __name__ == "__main__":
    sys.exit(main())
