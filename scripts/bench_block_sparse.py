"""Time block_sparse_attention against the dense and sparse kernels that are there, on one GPU, in one run.

    python scripts/bench_block_sparse.py --output block_sparse.json
    python scripts/bench_block_sparse.py --variable --output variable.json     blocks of variable size only

Checks every backend against float64 first and prints no speed if that fails. A section is one shape, direction and
mask; its kernels are timed in turns, with cuDNN's dense kernel and a large matrix product among them, because a GPU
that grows warm slows down. So every line also says how much of the matrix product's rate it reaches (the roofline: all
of this is bound by arithmetic) and of dense cuDNN's. As power is the limit, each kernel is timed a second time `rested`:
single calls with a pause before each, at the clocks that follow work that draws less.

Sections come in the order of their importance, the file is
written after each, and what `--seconds` leaves no time for is listed there.

Random masks list the same number of blocks per row and head, so nothing is gained from locality; radial ones are those
of Wan at 480p and 720p, 81 frames. TFLOP/s counts computed blocks only: 4 * seq_len^2 * head_dim * num_heads * density,
2.5 times that for a backward (ours computes 3.5 times as much). Conversions and transposed lists are made once per mask
and not timed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidsparse.layout import LatentGrid
from vidsparse.masks.radial import radial_block_mask
from vidsparse_kernels import BlockMask, UnsupportedBackendError, available_backends, block_sparse_attention
from vidsparse_kernels.testing import (
    assert_close_to_oracle,
    make_block_mask,
    make_qkv,
    make_variable_block_mask,
    masked_attention_oracle,
)

BACKENDS = ("hopper", "triton", "flash4", "flex")
WAN_480P, WAN_720P = (32_760, 12, 128), (75_600, 6, 128)
HEAD_DIM_64 = ((32_760, 12, 64), (75_600, 6, 64))
SHORT = (8_192, 12, 128)
GRIDS = {32_760: LatentGrid(21, 30, 52), 75_600: LatentGrid(21, 45, 80)}
SECTIONS: tuple[tuple[str, tuple[int, int, int], str], ...] = (
    *(
        ("forward", WAN_480P, mask)
        for mask in ("random 0.20 128x128", "radial", "random 0.10 128x128", "random 1.00 128x128")
    ),
    *(
        ("forward", HEAD_DIM_64[0], mask)
        for mask in ("random 0.20 128x128", "radial", "random 0.10 128x128", "random 1.00 128x128")
    ),
    *(("backward", WAN_480P, mask) for mask in ("random 0.20 128x128", "radial")),
    *(
        ("forward", WAN_720P, mask)
        for mask in ("random 0.20 128x128", "radial", "random 0.10 128x128", "random 1.00 128x128")
    ),
    *(("backward", HEAD_DIM_64[0], mask) for mask in ("random 0.20 128x128", "radial")),
    ("backward", WAN_720P, "random 0.20 128x128"),
    *(
        ("forward", HEAD_DIM_64[1], mask)
        for mask in ("random 0.20 128x128", "radial", "random 0.10 128x128", "random 1.00 128x128")
    ),
    ("forward", WAN_480P, "random 0.20 128x64"),
    *(("forward", SHORT, mask) for mask in ("random 0.20 128x128", "random 0.10 128x128", "random 1.00 128x128")),
    ("backward", SHORT, "random 0.20 128x128"),
    *(("backward", WAN_480P, mask) for mask in ("random 0.10 128x128", "random 1.00 128x128")),
    *(("backward", WAN_720P, mask) for mask in ("radial", "random 1.00 128x128")),
    *(("backward", HEAD_DIM_64[1], mask) for mask in ("random 0.20 128x128", "radial")),
    *(
        ("forward with FlexAttention", WAN_480P, mask)
        for mask in ("random 0.20 128x128", "radial", "random 1.00 128x128")
    ),
)
"""Direction, (tokens, heads, head_dim) and mask. FlexAttention comes last, because it takes long to compile."""
INT8 = "hopper int8"
"""The Hopper kernel with 8-bit query and key; making them is timed too."""
MAX_INT8_ERROR = 0.03
FLASH4_DENSE = "dense FlashAttention-4"
MATRIX = "matrix product"
MATRIX_SIZE = 8192
DENSE = {"dense cuDNN": SDPBackend.CUDNN_ATTENTION, "dense FlashAttention-2": SDPBackend.FLASH_ATTENTION}
VARIABLE_SHAPE = (32_760, 12, 128)
CLUSTERS = {64: (64, 64), 128: (128, 64)}
"""Mean tokens of a cluster, and the tiles that it is computed in."""
ROUNDS = 3
RESTED_CALLS = 7


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no section after so long (default 240)")
    parser.add_argument("--milliseconds", type=float, default=40.0, help="per kernel and round (default 40)")
    parser.add_argument("--pause", type=float, default=50.0, help="milliseconds before a rested call (default 50)")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="comma-separated, of " + ", ".join(BACKENDS))
    parser.add_argument("--variable", action="store_true", help="clusters of random sizes beside uniform blocks")
    arguments = parser.parse_args()
    for name in arguments.backends.split(","):
        if name not in BACKENDS:
            print(f'--backends must name some of {", ".join(BACKENDS)}, got "{name}"', file=sys.stderr)
            return 2
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "machine": {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "flash-attn-4": version_of("flash-attn-4"),
            "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        },
        "command": " ".join(["python scripts/bench_block_sparse.py", *sys.argv[1:]]),
        "rows": [],
        "left_out": [],
    }
    print("  ".join(f"{name} {value}" for name, value in report["machine"].items()), flush=True)
    asked = arguments.backends.split(",")
    backends = [b for b in asked if b in available_backends() and not arguments.variable]
    report["left_out"] += [f"{b}: not installed" for b in asked if b not in available_backends()]

    def save() -> None:
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")

    try:
        # FlexAttention is compiled, and checked, when its sections come.
        kept = [b for b in backends if b == "flex" or is_exact(b)]
        report["left_out"] += [
            f"{b}: it cannot do the case, or its package is there in part" for b in backends if b not in kept
        ]
        backends = kept
        check_variable() if arguments.variable else check_gradients()
    except AssertionError as error:
        print(f"Wrong result, so no speed is reported: {error}", file=sys.stderr)
        return 1
    if arguments.variable:
        report["rows"] = bench_variable(*VARIABLE_SHAPE, arguments.milliseconds)
        save()
        return 0
    last = 0.0
    for direction, shape, mask in SECTIONS:
        begun = time.monotonic() - started
        name = f"{direction}, {shape[0]} tokens, {shape[1]} heads of {shape[2]}, {mask}"
        if begun + last > arguments.seconds:
            report["left_out"].append(f"{name}: no time left")
            continue
        if direction == "forward with FlexAttention" and ("flex" not in backends or not is_exact("flex")):
            continue
        rows = bench(direction, shape, mask, backends, arguments.milliseconds, arguments.pause)
        report["rows"] += rows
        print_rows(name, rows)
        last = time.monotonic() - started - begun
        save()
    for line in report["left_out"]:
        print(f"left out: {line}")
    save()
    return 0


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_exact(backend: str) -> bool:
    """Whether it takes part: False where it cannot do the case at all.

    Raises:
        AssertionError: it is wrong.
    """
    for head_dim, lengths in ((64, (1111, 1050)), (128, (900, 1300))):
        q, k, v = make_qkv(
            seq_len_q=lengths[0], seq_len_kv=lengths[1], num_heads=4, head_dim=head_dim, dtype=torch.bfloat16,
            device="cuda",
        )  # fmt: skip
        mask = make_block_mask(
            seq_len_q=lengths[0], seq_len_kv=lengths[1], q_block_size=128, kv_block_size=128, num_heads=4,
            device="cuda",
        )  # fmt: skip
        try:
            out = block_sparse_attention(q, k, v, mask, backend=backend)
        except (UnsupportedBackendError, ImportError) as error:  # also of a package that is there in part
            print(f"Left out: {backend}: {error}")
            return False
        truth, _ = masked_attention_oracle(q, k, v, mask)
        eager, _ = masked_attention_oracle(q, k, v, mask, dtype=torch.bfloat16)
        assert_close_to_oracle(out, eager, truth, name=f"{backend}, head_dim {head_dim}")
        if backend == "hopper":
            out = block_sparse_attention(q, k, v, mask, backend=backend, quantize="int8")
            error = float((out - truth).norm() / truth.norm())
            assert error < MAX_INT8_ERROR, f"{INT8}, head_dim {head_dim}: relative error {error}"
    return True


def check_gradients() -> None:
    for head_dim in (64, 128):
        inputs = make_qkv(
            seq_len_q=1111, seq_len_kv=1050, num_heads=4, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
        )
        query, key, value = tensors = [x.requires_grad_() for x in inputs]
        mask = make_block_mask(
            seq_len_q=1111, seq_len_kv=1050, q_block_size=128, kv_block_size=128, num_heads=4, empty_rows=True,
            device="cuda",
        )  # fmt: skip
        outputs = [
            block_sparse_attention(query, key, value, mask, backend="triton"),
            *(
                masked_attention_oracle(query, key, value, mask, dtype=dtype)[0]
                for dtype in (torch.bfloat16, torch.float64)
            ),
        ]
        grad_out = torch.randn_like(tensors[0])
        grads = [torch.autograd.grad((out * grad_out.to(out.dtype)).sum(), tensors) for out in outputs]
        for name, got, eager, truth in zip(("query", "key", "value"), *grads, strict=True):
            assert_close_to_oracle(got, eager, truth, name=f"gradient of {name}, head_dim {head_dim}")


def bench(
    direction: str,
    shape: tuple[int, int, int],
    mask_name: str,
    backends: list[str],
    milliseconds: float,
    pause: float,
) -> list[dict[str, Any]]:
    """Rows of one section."""
    seq_len, num_heads, head_dim = shape
    with_flex, direction = direction.endswith("FlexAttention"), direction.split()[0]
    query, key, value = make_qkv(
        seq_len_q=seq_len, num_heads=num_heads, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    mask = make_mask(mask_name, seq_len, num_heads)
    candidates = {**dense_runs(direction, query, key, value)}
    for backend in backends:
        if (backend == "flex") == with_flex or (with_flex and backend == "hopper"):
            candidates[backend] = sparse_run(direction, backend, query, key, value, mask)
    if "hopper" in backends and direction == "forward" and not with_flex:
        candidates[INT8] = lambda: partial(
            block_sparse_attention, query, key, value, mask, backend="hopper", quantize="int8"
        )
    left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    runs: dict[str, Callable[[], Any]] = {MATRIX: lambda: left @ right}
    for name, make in candidates.items():
        try:
            run = make()
            run()
        except (UnsupportedBackendError, ImportError):
            continue
        runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name] += measure(run, milliseconds)
    rested_times = {name: statistics.median(rested(run, pause)) for name, run in runs.items()}
    rows: list[dict[str, Any]] = []
    for name, samples in times.items():
        samples.sort()
        ms = samples[len(samples) // 2]
        sparse = name in (*BACKENDS, INT8)
        density = mask.token_density if sparse else 1.0
        flops = (4 if direction == "forward" else 10) * seq_len**2 * head_dim * num_heads * density
        if name == MATRIX:
            flops = 2 * MATRIX_SIZE**3
        rows.append(
            {
                "direction": direction, "kernel": name, "mask": mask_name if sparse else "",
                "section": mask_name, "seq_len": seq_len, "num_heads": num_heads, "head_dim": head_dim,
                "density": round(density, 4), "ms": ms, "ms_p20": samples[len(samples) // 5],
                "ms_p80": samples[len(samples) * 4 // 5], "tflops": flops / ms / 1e9,
                "rested_ms": rested_times[name], "rested_tflops": flops / rested_times[name] / 1e9,
            }
        )  # fmt: skip
    rates = {row["kernel"]: row["tflops"] for row in rows}
    dense = min(row["ms"] for row in rows if row["kernel"].startswith("dense"))
    for row in rows[1:]:
        row["share_of_matrix_product"] = row["tflops"] / rates[MATRIX]
        row["share_of_dense_cudnn"] = row["tflops"] / rates["dense cuDNN"]
        row["times_faster_than_dense"] = dense / row["ms"]
    return rows


def print_rows(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"{name}: matrix product {rows[0]['tflops']:.0f} TFLOP/s, rested {rows[0]['rested_tflops']:.0f}")
    for row in rows[1:]:
        print(
            f"    {row['kernel']:24s} density {row['density']:5.3f}  {row['ms']:8.3f} ms ({row['ms_p20']:.3f}-"
            f"{row['ms_p80']:.3f})  {row['tflops']:4.0f} TFLOP/s, rested {row['rested_tflops']:4.0f}  "
            f"{row['share_of_matrix_product']:4.0%} of matrix product  "
            f"{row['share_of_dense_cudnn']:4.0%} of dense cuDNN  {row['times_faster_than_dense']:5.2f} x the fastest dense",
            flush=True,
        )


def sparse_run(
    direction: str, backend: str, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask
) -> Callable[[], Callable[[], Any]]:
    """Makes what is timed, which may not be possible: raises UnsupportedBackendError then."""

    def make() -> Callable[[], Any]:
        if direction == "forward":
            return partial(block_sparse_attention, query, key, value, mask, backend=backend)
        if backend == "hopper":
            from vidsparse_kernels.block_sparse_attention.hopper_backward import MIN_HEAD_DIM

            if query.shape[3] < MIN_HEAD_DIM:
                raise UnsupportedBackendError("its backward is that of triton")
        q, k, v = inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        out = block_sparse_attention(q, k, v, mask, backend=backend)
        return partial(torch.autograd.grad, out, inputs, torch.randn_like(query), retain_graph=True)

    return make


def check_variable() -> None:
    """Output and gradients with blocks of variable size, in the tiles that are timed.

    Raises:
        AssertionError: they are wrong.
    """
    inputs = make_qkv(seq_len_q=1111, seq_len_kv=1050, num_heads=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    query, key, value = tensors = [x.requires_grad_() for x in inputs]
    grad_out = torch.randn_like(query)
    for mean, (q_size, kv_size) in CLUSTERS.items():
        mask = make_variable_block_mask(
            seq_len_q=1111, seq_len_kv=1050, num_q_blocks=1111 // mean, num_kv_blocks=1050 // mean,
            q_block_size=q_size, kv_block_size=kv_size, num_heads=4, offsets_heads=4, empty_rows=True, device="cuda",
        )  # fmt: skip
        outputs = [
            block_sparse_attention(query, key, value, mask, backend="triton"),
            *(
                masked_attention_oracle(query, key, value, mask, dtype=dtype)[0]
                for dtype in (torch.bfloat16, torch.float64)
            ),
        ]
        grads = [torch.autograd.grad((out * grad_out.to(out.dtype)).sum(), tensors) for out in outputs]
        names = ("output", "gradient of query", "gradient of key", "gradient of value")
        for name, results in zip(names, (outputs, *zip(*grads, strict=True)), strict=True):
            assert_close_to_oracle(*results, name=f"{name}, clusters of {mean}")


def bench_variable(seq_len: int, num_heads: int, head_dim: int, milliseconds: float) -> list[dict[str, Any]]:
    """Clusters beside uniform blocks of the same tiles, density 0.2; rows as those of `bench`, printed too."""
    query, key, value = (
        x.requires_grad_()
        for x in make_qkv(
            seq_len_q=seq_len, num_heads=num_heads, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
        )
    )
    grad_out = torch.randn_like(query)
    runs: dict[tuple[str, str], tuple[Callable[[], Any], BlockMask]] = {}
    for mean, (q_size, kv_size) in CLUSTERS.items():
        for name, mask in (
            (f"uniform {q_size}x{kv_size}", random_lists(seq_len, num_heads, 0.2, q_size, kv_size)),
            (
                f"clusters of {mean}, tiles {q_size}x{kv_size}",
                cluster_lists(seq_len, num_heads, mean, q_size, kv_size),
            ),
        ):
            out = block_sparse_attention(query, key, value, mask, backend="triton")
            inputs = (query.detach(), key.detach(), value.detach())
            runs["forward", name] = (partial(block_sparse_attention, *inputs, mask, backend="triton"), mask)
            backward = partial(torch.autograd.grad, out, (query, key, value), grad_out, retain_graph=True)
            runs["backward", name] = (backward, mask)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (run, _) in runs.items():
            times[name] += measure(run, milliseconds)
    rows: list[dict[str, Any]] = []
    for (direction, name), samples in sorted(times.items(), key=lambda item: item[0][0] != "forward"):
        mask = runs[direction, name][1]
        samples.sort()
        ms = samples[len(samples) // 2]
        flops = (4 if direction == "forward" else 10) * seq_len**2 * head_dim * num_heads
        rows.append(
            {
                "direction": direction, "kernel": "triton", "mask": name, "seq_len": seq_len,
                "num_heads": num_heads, "head_dim": head_dim, "density": round(mask.density, 4),
                "token_density": round(mask.token_density, 4), "ms": ms, "ms_p20": samples[len(samples) // 5],
                "ms_p80": samples[len(samples) * 4 // 5], "tflops": flops * mask.token_density / ms / 1e9,
                "tflops_with_padding": flops * mask.density / ms / 1e9,
            }
        )  # fmt: skip
        row = rows[-1]
        print(
            f"S={seq_len:6d} H={num_heads:2d} D={head_dim:3d}  {direction:8s}  {name:30s} tokens "
            f"{row['token_density']:5.3f} computed {row['density']:5.3f}  {ms:8.3f} ms ({row['ms_p20']:.3f}-"
            f"{row['ms_p80']:.3f})  {row['tflops']:5.0f} TFLOP/s on tokens  {row['tflops_with_padding']:5.0f} computed",
            flush=True,
        )
    return rows


def cluster_lists(seq_len: int, num_heads: int, mean: int, q_block_size: int, kv_block_size: int) -> BlockMask:
    """Clusters of gamma-distributed sizes per head, and random lists of a fifth of them."""
    blocks = round(seq_len / mean)
    generator = torch.Generator().manual_seed(0)
    offsets = []
    for _ in range(2):
        # The sum of two exponentials: shape 2, so that a fourth of the clusters has less than half the mean.
        sizes = -torch.rand(1, num_heads, blocks, 2, generator=generator).clamp(min=1e-6).log().sum(-1)
        ends = (sizes.cumsum(-1) / sizes.sum(-1, keepdim=True) * seq_len).round().int()
        offsets.append(F.pad(ends, (1, 0)))
        offsets[-1][..., -1] = seq_len
    count = round(0.2 * blocks)
    noise = torch.rand(1, num_heads, blocks, blocks, generator=generator)
    indices = noise.topk(count, -1).indices.sort(-1).values
    return BlockMask.from_indices(
        torch.full(indices.shape[:3], count, dtype=torch.int32), indices, seq_len_q=seq_len, seq_len_kv=seq_len,
        q_block_size=q_block_size, kv_block_size=kv_block_size, q_offsets=offsets[0], kv_offsets=offsets[1],
    ).to("cuda")  # fmt: skip


def dense_runs(
    direction: str, query: Tensor, key: Tensor, value: Tensor
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Makers of what is timed, by name: dense attention of torch, and of FlashAttention-4 where it is installed."""

    def sdpa(choice: SDPBackend, *tensors: Tensor) -> Tensor:
        with sdpa_kernel(choice):
            q, k, v = (x.transpose(1, 2) for x in tensors)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def flash4(*tensors: Tensor) -> Tensor:
        from flash_attn.cute.interface import flash_attn_func  # pyright: ignore[reportMissingImports]

        result = flash_attn_func(*tensors)
        return result[0] if isinstance(result, tuple) else result

    def make(attend: Callable[..., Tensor]) -> Callable[[], Any]:
        if direction == "forward":
            return partial(attend, query, key, value)
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        out = attend(*inputs)
        return partial(torch.autograd.grad, out, inputs, torch.randn_like(query), retain_graph=True)

    kernels: dict[str, Callable[..., Tensor]] = {name: partial(sdpa, choice) for name, choice in DENSE.items()}
    if "flash4" in available_backends():
        kernels[FLASH4_DENSE] = flash4
    return {name: partial(make, attend) for name, attend in kernels.items()}


def make_mask(name: str, seq_len: int, num_heads: int) -> BlockMask:
    """The mask called "radial" or "random DENSITY BLOCKS", with blocks such as 128x64."""
    if name == "radial":
        return radial_block_mask(GRIDS[seq_len], q_block_size=128, kv_block_size=128, variant="release", device="cuda")
    _, density, blocks = name.split()
    q_size, kv_size = (int(x) for x in blocks.split("x"))
    return random_lists(seq_len, num_heads, float(density), q_size, kv_size)


def random_lists(seq_len: int, num_heads: int, density: float, q_block_size: int, kv_block_size: int) -> BlockMask:
    """Random kv-blocks per head and q-block, the same number in every row."""
    num_q_blocks, num_kv_blocks = math.ceil(seq_len / q_block_size), math.ceil(seq_len / kv_block_size)
    count = max(1, round(density * num_kv_blocks))
    generator = torch.Generator("cuda").manual_seed(0)
    noise = torch.rand(1, num_heads, num_q_blocks, num_kv_blocks, generator=generator, device="cuda")
    indices = noise.topk(count, -1).indices.sort(-1).values
    return BlockMask.from_indices(
        torch.full(indices.shape[:3], count, device="cuda", dtype=torch.int32), indices,
        seq_len_q=seq_len, seq_len_kv=seq_len, q_block_size=q_block_size, kv_block_size=kv_block_size,
    )  # fmt: skip


def measure(run: Callable[[], Any], milliseconds: float) -> list[float]:
    """Milliseconds of single runs, by CUDA events, for about as long as asked after a warm-up of a quarter of it."""
    once = timed(run, 2)[1]
    repeats = max(3, min(200, int(milliseconds / max(once, 1e-3))))
    for _ in range(repeats // 4 + 1):
        run()
    return timed(run, repeats)


def rested(run: Callable[[], Any], pause: float) -> list[float]:
    """Milliseconds of single runs, each the second of two after a pause; a wait on the GPU hides what the host takes, but
    of calls below about 0.5 ms."""
    samples = []
    for _ in range(RESTED_CALLS):
        time.sleep(pause / 1e3)
        torch.cuda._sleep(2_000_000)
        run()
        samples += timed(run, 1)
    return samples


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
