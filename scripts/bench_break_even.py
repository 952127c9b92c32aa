"""From which length on, and up to which density, our kernels beat torch's dense attention on this GPU.

    python scripts/bench_break_even.py --output break_even.json

Times one attention call as a model makes it (Python included: short calls wait for the host) for lengths, numbers of
heads, head dims and densities, against the fastest dense kernel there (cuDNN or FlashAttention-2 through torch). Prints
the ratio sparse / dense; below 1 sparse is faster. Random blocks of 128 x 128 tokens, bf16. "every block" is a dense call
through the Hopper kernel, as the dense steps of a sparse method make it, where there is such a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidsparse import sparse_attention
from vidsparse.attention import over_blocks
from vidsparse.processors.dense_calls import KERNEL, every_block
from vidsparse_kernels import BlockMask

LENGTHS = (1_024, 2_048, 4_096, 5_120, 6_144, 8_192, 12_288, 16_384, 32_760, 75_600, 118_800)
HEADS = {128: (12, 40), 64: (24, 48)}
LONGEST = {24: 75_600, 40: 75_600, 48: 75_600}
"""Tokens with so many heads beyond which nothing more is learned."""
DENSITIES = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
EVERY_BLOCK = "every block"
MILLISECONDS = 6.0
"""Of one measurement, at least."""


def milliseconds(function: Callable[[], Any], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The GPU is busy with this one when the first call that counts is on its way, as in a model.
    function()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def random_mask(seq_len: int, density: float) -> BlockMask:
    blocks = -(-seq_len // 128)
    count = max(1, round(density * blocks))
    order = torch.rand(blocks, blocks, device="cuda").argsort(-1)[:, :count].sort(-1).values
    counts = torch.full((1, 1, blocks), count, dtype=torch.int32, device="cuda")
    return BlockMask.from_indices(
        counts, order[None, None].int(), seq_len_q=seq_len, seq_len_kv=seq_len, q_block_size=128, kv_block_size=128
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python scripts/bench_break_even.py " + " ".join(sys.argv[1:]),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "rows": rows,
    }
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    for head_dim, all_heads in HEADS.items():
        for heads in all_heads:
            for seq_len in (length for length in LENGTHS if length <= LONGEST.get(heads, length)):
                q, k, v = (torch.randn(1, seq_len, heads, head_dim, device="cuda").bfloat16() for _ in range(3))
                dense = {}
                for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

                    def attention(backend: Any = backend, q: Any = q, k: Any = k, v: Any = v) -> Any:
                        with sdpa_kernel(backend):
                            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

                    dense[backend.name] = attention
                functions: dict[str, Callable[[], Any]] = dict(dense)
                for density in DENSITIES:
                    mask = random_mask(seq_len, density)
                    functions[f"{density:g}"] = lambda mask=mask, q=q, k=k, v=v: sparse_attention(q, k, v, mask)
                if is_hopper:
                    blocks = every_block(seq_len, heads, head_dim, q.dtype, q.device).mask
                    functions[EVERY_BLOCK] = lambda mask=blocks, q=q, k=k, v=v: over_blocks(
                        q, k, v, mask, None, None, KERNEL
                    )
                times: dict[str, list[float]] = {name: [] for name in functions}
                with torch.no_grad():
                    for function in functions.values():
                        function()
                    first = next(iter(functions.values()))
                    one = milliseconds(first, 3)
                    calls = min(20, max(1 if one > 20 else 2, round(MILLISECONDS / one)))
                    for _ in range(5 if one < 50 else 3):
                        for name, function in functions.items():
                            times[name].append(milliseconds(function, calls))
                median = {name: statistics.median(values) for name, values in times.items()}
                best = min(median[name] for name in dense)
                ratios = {name: round(ms / best, 3) for name, ms in median.items() if name not in dense}
                row = {"head_dim": head_dim, "heads": heads, "seq_len": seq_len, "dense_ms": round(best, 4)}
                rows.append({**row, "torch_ms": {name: round(median[name], 4) for name in dense}, "ratio": ratios})
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
                if arguments.output:
                    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
