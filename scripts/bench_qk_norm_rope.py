"""Time norm and rotary embedding of query and key at the shapes of the main models, on one GPU.

    python scripts/bench_qk_norm_rope.py --output qk_norm_rope.json

Compares one call of our kernel with what the model's own processor runs: separate kernels (eager), and the same code
under torch.compile. Checks our result first and prints no speed if it is wrong. Times are medians of CUDA events with a
cold L2. `gigabytes` are those that have to move: query and key in and out once, and the tables once; `copy_rate` is the
share of a device copy's speed that they move at. `--sweep` also times other tiles and numbers of warps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from vidsparse_kernels.qk_norm_rope import qk_norm_rope_pair
from vidsparse_kernels.qk_norm_rope.forward import triton_norm_rope
from vidsparse_kernels.qk_norm_rope.testing import assert_rounded_alike

BYTES_PER_MS = 4.26e9
"""Device copy of an H200, bytes read and written."""
EPS = 1e-6
SWEEP = ((1024, 2), (1024, 4), (2048, 8), (4096, 4), (4096, 8))
"""Elements that a program holds at a time, and warps."""


@dataclass(frozen=True)
class Shape:
    """Attributes: `rotated` tokens have a row in the tables, `text` ones follow (before, in Flux); `norm` as in the op."""

    model: str
    rotated: int
    text: int
    num_heads: int
    head_dim: int
    norm: str
    round_before_weight: bool = False

    @property
    def seq_len(self) -> int:
        return self.rotated + self.text


SHAPES = (
    Shape("Wan 14B 720p 81", 75_600, 0, 40, 128, "rms_all"),
    Shape("Wan 1.3B 480p 81", 32_760, 0, 12, 128, "rms_all"),
    # The single-stream blocks of both, which are most of them; Flux has rows for its text tokens too.
    Shape("HunyuanVideo 720p 129", 118_800, 256, 24, 128, "rms_heads", round_before_weight=True),
    Shape("Flux 4096 x 4096", 65_536 + 512, 0, 24, 128, "rms_heads"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--milliseconds", type=int, default=300, help="time given to each row (default 300)")
    parser.add_argument("--sweep", action="store_true", help="also time other tiles")
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
    print(
        f"{'':26s}{'what':14s}{'ms p50':>10s}{'p20':>9s}{'p80':>9s}{'GB':>8s}{'TB/s':>8s}{'of copy':>9s}{'speedup':>9s}"
    )
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        try:
            rows += bench_shape(shape, arguments.milliseconds, arguments.sweep)
        except AssertionError as error:
            print(f"Wrong result at {shape.model}, so no speed is reported: {error}", file=sys.stderr)
            return 1
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def bench_shape(shape: Shape, milliseconds: int, sweep: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    width = shape.num_heads * shape.head_dim
    options: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    query, key = (torch.randn(1, shape.seq_len, width, **options) for _ in range(2))
    weights = tuple(torch.randn(width if shape.norm == "rms_all" else shape.head_dim, **options) for _ in range(2))
    angle = torch.rand(shape.rotated, shape.head_dim // 2, device="cuda") * 6
    tables = tuple(t.repeat_interleave(2, -1) for t in (angle.cos(), angle.sin()))

    def ours() -> Any:
        return qk_norm_rope_pair(
            query, key, num_heads=shape.num_heads, weights=(weights[0], weights[1]), eps=(EPS, EPS), norm=shape.norm,
            round_before_weight=shape.round_before_weight, rotary=(tables[0], tables[1]), backend="triton",
        )  # fmt: skip

    def eager() -> Any:
        return tuple(stock(x, weight, tables, shape) for x, weight in zip((query, key), weights, strict=True))

    calls: dict[str, Callable[[], Any]] = {"ours": ours}
    if sweep:
        heads = (shape.num_heads, shape.head_dim)
        cos, sin = tables[0][None, :, None, ::2], tables[1][None, :, None, 1::2]
        for tile, num_warps in SWEEP:

            def tiled(tile: int = tile, num_warps: int = num_warps) -> Any:
                outs = tuple(x.new_empty(*x.shape[:2], *heads) for x in (query, key))
                triton_norm_rope(
                    (query.unflatten(2, heads), key.unflatten(2, heads)), outs, weights, (None, None), cos, sin,
                    eps=(EPS, EPS), norm=shape.norm, round_before_weight=shape.round_before_weight,
                    pairing="interleaved", rope_start=0, tile=tile, num_warps=num_warps,
                )  # fmt: skip
                return outs

            calls[f"{tile}, {num_warps} warps"] = tiled
    for call in calls.values():
        for got, want in zip(call(), eager(), strict=True):
            assert_rounded_alike(got, want, roundings=3 if shape.round_before_weight else 2)
    torch._dynamo.reset()
    calls = {"eager": eager, "compiled": torch.compile(eager, dynamic=False)} | calls
    gigabytes = (4 * query.nbytes + 2 * tables[0].nbytes) / 1e9
    rows, first = [], 0.0
    for name, call in calls.items():
        call()
        times: Any = triton.testing.do_bench(call, rep=milliseconds, warmup=50, quantiles=[0.5, 0.2, 0.8])
        p50, p20, p80 = times
        first = first or p50
        row = {
            "model": shape.model, "seq_len": shape.seq_len, "num_heads": shape.num_heads, "head_dim": shape.head_dim,
            "norm": shape.norm, "what": name, "ms": p50, "ms_p20": p20, "ms_p80": p80, "gigabytes": gigabytes,
            "terabytes_per_second": gigabytes / p50, "copy_rate": gigabytes * 1e9 / BYTES_PER_MS / p50,
            "speedup": first / p50,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{shape.model:26s}{name:14s}{p50:10.3f}{p20:9.3f}{p80:9.3f}{gigabytes:8.2f}{gigabytes / p50:8.2f}"
            f"{100 * row['copy_rate']:8.0f}%{first / p50:9.2f}",
            flush=True,
        )
    return rows


def stock(x: torch.Tensor, weight: torch.Tensor, tables: tuple[torch.Tensor, ...], shape: Shape) -> torch.Tensor:
    """Norm and rotary embedding as the model's processor in diffusers computes them."""
    heads = (shape.num_heads, shape.head_dim)
    if shape.norm == "rms_all":
        x = torch.nn.functional.rms_norm(x, weight.shape, weight, EPS).unflatten(2, heads)
        return rotate_wan(x, *(t[None, :, None] for t in tables))
    x = x.unflatten(2, heads)
    if shape.round_before_weight:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = (x * torch.rsqrt(variance + EPS)).to(weight.dtype) * weight
    else:
        x = torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)
    if not shape.text:
        return rotate(x, *tables)
    return torch.cat([rotate(x[:, : -shape.text], *tables), x[:, -shape.text :]], dim=1)


def rotate_wan(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos[None, :, None] + turned.float() * sin[None, :, None]).to(x.dtype)


if __name__ == "__main__":
    raise SystemExit(main())
