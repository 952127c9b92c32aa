"""From which length on, and up to which density, sparse attention beats dense attention on this GPU.

    python scripts/bench_break_even.py --output break_even.json

Times one attention call as a model makes it (Python included: short calls wait for the host) for lengths, numbers of
heads, head dims and densities, against the fastest dense kernel there (cuDNN or FlashAttention-2 through torch). Prints
the ratio sparse / dense; below 1 sparse is faster. Random blocks of 128 x 128 tokens, bf16.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidsparse import sparse_attention
from vidsparse_kernels import BlockMask

LENGTHS = (1_024, 2_048, 4_096, 8_192, 16_384, 32_760)
HEADS = {128: (12, 40), 64: (24, 48)}
DENSITIES = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
CALLS = 12


def milliseconds(function: Callable[[], Any], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
    rows = []
    for head_dim, all_heads in HEADS.items():
        for heads in all_heads:
            for seq_len in LENGTHS:
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
                times: dict[str, list[float]] = {name: [] for name in functions}
                with torch.no_grad():
                    for function in functions.values():
                        function()
                    for _ in range(5):
                        for name, function in functions.items():
                            times[name].append(milliseconds(function, CALLS if seq_len < 30_000 else 3))
                median = {name: statistics.median(values) for name, values in times.items()}
                best = min(median[name] for name in dense)
                ratios = {f"{density:g}": round(median[f"{density:g}"] / best, 3) for density in DENSITIES}
                row = {"head_dim": head_dim, "heads": heads, "seq_len": seq_len, "dense_ms": round(best, 4)}
                rows.append({**row, "ratio": ratios})
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if arguments.output:
        result = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
