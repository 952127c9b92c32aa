"""Time linear_branch forward and backward beside block_sparse_attention at the same mask, on one GPU, in one run.

    python scripts/bench_linear_branch.py --output linear_branch.json

Checks output and gradients against float64 first and prints no speed if that fails. All kernels of a shape are timed in
turns, because a GPU that grows warm slows down. Masks are random, with the same number of blocks in every row and head.
"torch" is coverage "all" as the public code writes it: softmax over the head dimension and two matrix products in the
dtype of the inputs. Times of the linear branch include the feature maps and the totals, not the transposed lists, which
are made once per mask. GB is what a call allocates at most beyond what was there before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from vidsparse_kernels import BlockMask, block_sparse_attention, select_backend
from vidsparse_kernels.linear_branch import linear_branch
from vidsparse_kernels.linear_branch.backward import backward_config_for, triton_backward
from vidsparse_kernels.linear_branch.forward import config_for, triton_forward
from vidsparse_kernels.linear_branch.oracle import linear_branch_oracle
from vidsparse_kernels.testing import assert_close_to_oracle, make_block_mask, make_qkv

SHAPES = ((32_760, 12, 128), (75_600, 40, 128))
DENSITIES = (0.05, 0.1, 0.2)
BLOCK_SIZES = (128, 64)
ROUNDS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--milliseconds", type=float, default=30.0, help="per kernel and round (default 30)")
    parser.add_argument("--feature-map", default="softmax", help="softmax, elu or relu (default softmax)")
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
        check(arguments.feature_map)
    except AssertionError as error:
        print(f"Wrong result, so no speed is reported: {error}", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        rows += bench(*shape, arguments.feature_map, arguments.milliseconds)
        if arguments.output:  # after each shape, so that a run cut short keeps what it has
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def check(feature_map: str) -> None:
    """Output and gradients, in the tiles that are timed.

    Raises:
        AssertionError: they are wrong.
    """
    inputs = make_qkv(seq_len_q=1111, seq_len_kv=1050, num_heads=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(
        seq_len_q=1111, seq_len_kv=1050, q_block_size=BLOCK_SIZES[0], kv_block_size=BLOCK_SIZES[1], num_heads=4,
        density=0.2, device="cuda",
    )  # fmt: skip
    grad_out = torch.randn_like(inputs[0])
    for name, excluded in (("non_selected", mask), ("all", None)):
        forward = config_for(*inputs, excluded, descriptors=True)
        backward = backward_config_for(*inputs, excluded, descriptors=True)
        saved = triton_forward(*inputs, excluded, feature_map=feature_map, eps=1e-5, config=forward)
        grads = triton_backward(
            grad_out, *inputs, *saved, excluded, feature_map=feature_map, eps=1e-5, config=backward
        )  # fmt: skip
        results = []
        for dtype in (torch.bfloat16, torch.float64):
            tensors = [x.to(dtype).requires_grad_() for x in inputs]
            out = linear_branch_oracle(*tensors, excluded=excluded, feature_map=feature_map, eps=1e-5, dtype=dtype)
            results.append((out.detach(), *torch.autograd.grad(out, tensors, grad_out.to(dtype))))
        names = ("output", "gradient of query", "gradient of key", "gradient of value")
        for which, got, eager, truth in zip(names, (saved[0], *grads), *results, strict=True):
            assert_close_to_oracle(got, eager, truth, name=f"{which}, {name}")


def in_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    q, k = q.softmax(-1), k.softmax(-1)
    return (q @ (k.transpose(-1, -2) @ v) / (1e-5 + (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True))).transpose(
        1, 2
    )


def bench(seq_len: int, num_heads: int, head_dim: int, feature_map: str, milliseconds: float) -> list[dict[str, Any]]:
    """Rows of one shape, printed too."""
    inputs = make_qkv(seq_len_q=seq_len, num_heads=num_heads, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    grad_out = torch.randn_like(inputs[0])
    functions: dict[tuple[str, float], Callable[..., Any]] = {
        ("linear all, torch", 1.0): in_torch,
        ("linear all", 1.0): partial(linear_branch, feature_map=feature_map, backend="triton"),
    }
    for density in DENSITIES:
        mask = random_lists(seq_len, num_heads, density)
        functions["linear non_selected", density] = partial(
            linear_branch, block_mask=mask, feature_map=feature_map, coverage="non_selected", backend="triton"
        )
        backend, _ = select_backend(*inputs, mask, requires_grad=True)
        functions[f"attention, {backend}", density] = partial(
            block_sparse_attention, block_mask=mask, backend=backend
        )  # fmt: skip
    samples: dict[tuple[str, str, float], list[float]] = {}
    memory: dict[tuple[str, str, float], float] = {}
    for _ in range(ROUNDS):
        for (name, density), function in functions.items():
            # One graph at a time: the saved tensors of all would not leave room to say what a call needs.
            tensors = [x.detach().requires_grad_() for x in inputs]
            out = function(*tensors)
            runs = {
                "forward": partial(function, *inputs),
                "backward": partial(torch.autograd.grad, out, tensors, grad_out, retain_graph=True),
            }
            for direction, run in runs.items():
                key = (direction, name, density)
                samples.setdefault(key, []).extend(measure(run, milliseconds))
                if key not in memory:
                    memory[key] = allocated(run)
            del out, runs
    rows: list[dict[str, Any]] = []
    for (direction, name, density), times in sorted(samples.items(), key=lambda item: (item[0][0] != "forward",)):
        times.sort()
        rows.append(
            {
                "direction": direction, "kernel": name, "feature_map": feature_map, "seq_len": seq_len,
                "num_heads": num_heads, "head_dim": head_dim, "density": density, "ms": times[len(times) // 2],
                "ms_p20": times[len(times) // 5], "ms_p80": times[len(times) * 4 // 5],
                "gigabytes": memory[direction, name, density],
            }
        )  # fmt: skip
        row = rows[-1]
        print(
            f"S={seq_len:6d} H={num_heads:2d} D={head_dim:3d}  {direction:8s}  {name:22s} density {density:4.2f}  "
            f"{row['ms']:8.3f} ms ({row['ms_p20']:.3f}-{row['ms_p80']:.3f})  {row['gigabytes']:6.3f} GB",
            flush=True,
        )
    return rows


def random_lists(seq_len: int, num_heads: int, density: float) -> BlockMask:
    """Random kv-blocks per head and q-block, the same number in every row."""
    num_q_blocks, num_kv_blocks = (math.ceil(seq_len / size) for size in BLOCK_SIZES)
    count = max(1, round(density * num_kv_blocks))
    generator = torch.Generator("cuda").manual_seed(0)
    noise = torch.rand(1, num_heads, num_q_blocks, num_kv_blocks, generator=generator, device="cuda")
    indices = noise.topk(count, -1).indices.sort(-1).values
    return BlockMask.from_indices(
        torch.full(indices.shape[:3], count, device="cuda", dtype=torch.int32), indices, seq_len_q=seq_len,
        seq_len_kv=seq_len, q_block_size=BLOCK_SIZES[0], kv_block_size=BLOCK_SIZES[1],
    )  # fmt: skip


def allocated(run: Callable[[], Any]) -> float:
    """Gigabytes at the peak of a call beyond those before it; its results count."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def measure(run: Callable[[], Any], milliseconds: float) -> list[float]:
    """Milliseconds of single runs, by CUDA events, for about as long as asked after a warm-up of a quarter of it."""
    once = timed(run, 2)[1]
    repeats = max(3, min(200, int(milliseconds / max(once, 1e-3))))
    for _ in range(repeats // 4):
        run()
    return timed(run, repeats)


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in pairs]


if __name__ == "__main__":
    sys.exit(main())
