"""The Triton kernel: one program normalises and rotates one token of query or key."""

# Names bound under one compile-time flag are read under the same flag only.
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = 2048
"""Elements that a program holds at a time: 16 for each of its 128 threads, two wide loads of 16-bit numbers."""


def unsupported(x: Tensor, rotary: Tensor | None) -> str | None:
    """Why the kernel cannot do this case, or None."""
    if x.dtype not in DTYPES:
        return f"takes bfloat16, float16 or float32, not {x.dtype}"
    if rotary is not None and rotary.dtype != torch.float32:
        return f"needs rotary tables in float32, not {rotary.dtype}"
    if x.shape[-1] % 2 or x.shape[-1] > 512:
        return f"needs an even head_dim up to 512, got {x.shape[-1]}"
    return None


@triton.jit
def _load_pairs(
    at, rows, row_mask, row_stride, dim_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """First and second member of each pair, fp32 `[rows, BLOCK_D / 2]`; 0 outside."""
    at += rows.to(tl.int64)[:, None] * row_stride
    if INTERLEAVED:
        # One wide load, parted in registers; loads of every other element would be narrow.
        dim = tl.arange(0, BLOCK_D)
        mask = row_mask[:, None] & (dim < HEAD_DIM)[None, :]
        x = tl.load(at + dim[None, :] * dim_stride, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [rows.shape[0], BLOCK_D // 2, 2]))
    else:
        pair = tl.arange(0, BLOCK_D // 2)
        mask = row_mask[:, None] & (pair < HEAD_DIM // 2)[None, :]
        first = tl.load(at + pair[None, :] * dim_stride, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + (pair + HEAD_DIM // 2)[None, :] * dim_stride, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(
    to, first, second, rows, row_mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr
):
    to += rows[:, None] * HEAD_DIM
    first = first.to(to.dtype.element_ty)
    second = second.to(to.dtype.element_ty)
    if INTERLEAVED:
        dim = tl.arange(0, BLOCK_D)
        mask = row_mask[:, None] & (dim < HEAD_DIM)[None, :]
        tl.store(to + dim[None, :], tl.reshape(tl.join(first, second), [rows.shape[0], BLOCK_D]), mask=mask)
    else:
        pair = tl.arange(0, BLOCK_D // 2)
        mask = row_mask[:, None] & (pair < HEAD_DIM // 2)[None, :]
        tl.store(to + pair[None, :], first, mask=mask)
        tl.store(to + (pair + HEAD_DIM // 2)[None, :], second, mask=mask)


@triton.jit
def _load_table(at, head, head_mask, pair_mask, stride_h, stride_d, other):
    """cos or sin of a token, `[heads, pairs]`."""
    pair = tl.arange(0, pair_mask.shape[0])
    at += head.to(tl.int64)[:, None] * stride_h + pair[None, :] * stride_d
    return tl.load(at, mask=head_mask[:, None] & pair_mask[None, :], other=other)


@triton.jit
def _norm_rope_one(
    x, out, weight, bias, cos, sin, row, rope_len, head_stride, dim_stride, cos_h, cos_d, sin_h, sin_d, num_heads, eps,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROPE: tl.constexpr, TABLE_PER_HEAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One token: `x` and `out` point at its first head, `cos` and `sin` at its row."""
    dtype = out.dtype.element_ty
    pair_mask = tl.arange(0, BLOCK_D // 2) < HEAD_DIM // 2
    rows = tl.zeros([BLOCK_D // 2], tl.int64) + row
    table_mask = pair_mask & (rows >= 0) & (rows < rope_len)
    # Weights of one head, and tables that all heads share, are read once.
    one = tl.arange(0, 1)
    if HAS_WEIGHT and NORM != "rms_all":
        wa, wb = _load_pairs(weight, one, one == 0, HEAD_DIM, 1, HEAD_DIM, BLOCK_D, INTERLEAVED)
    if HAS_BIAS and NORM != "rms_all":
        ba, bb = _load_pairs(bias, one, one == 0, HEAD_DIM, 1, HEAD_DIM, BLOCK_D, INTERLEAVED)
    if HAS_ROPE and not TABLE_PER_HEAD:
        c = _load_table(cos, one, one == 0, table_mask, cos_h, cos_d, 1.0)
        s = _load_table(sin, one, one == 0, table_mask, sin_h, sin_d, 0.0)
    if NORM == "rms_all":
        total = tl.zeros([BLOCK_H], tl.float32)
        for start in range(0, num_heads, BLOCK_H):
            head = start + tl.arange(0, BLOCK_H)
            a, b = _load_pairs(x, head, head < num_heads, head_stride, dim_stride, HEAD_DIM, BLOCK_D, INTERLEAVED)
            total += tl.sum(a * a + b * b, 1)
        row_scale = 1.0 / tl.sqrt_rn(tl.sum(total, 0) / (num_heads * HEAD_DIM) + eps)
    for start in range(0, num_heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        a, b = _load_pairs(x, head, head < num_heads, head_stride, dim_stride, HEAD_DIM, BLOCK_D, INTERLEAVED)
        if NORM == "layer_heads":
            mean = tl.sum(a + b, 1) / HEAD_DIM
            a = tl.where(pair_mask[None, :], a - mean[:, None], 0.0)
            b = tl.where(pair_mask[None, :], b - mean[:, None], 0.0)
        if NORM == "rms_all":
            a = a * row_scale
            b = b * row_scale
        elif NORM != "none":
            scale = 1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, 1) / HEAD_DIM + eps)
            a = a * scale[:, None]
            b = b * scale[:, None]
        if NORM != "none":
            if EARLY:
                a = a.to(dtype).to(tl.float32)
                b = b.to(dtype).to(tl.float32)
            if HAS_WEIGHT:
                if NORM == "rms_all":
                    wa, wb = _load_pairs(weight, head, head < num_heads, HEAD_DIM, 1, HEAD_DIM, BLOCK_D, INTERLEAVED)
                a = a * wa
                b = b * wb
                if EARLY:
                    a = a.to(dtype).to(tl.float32)
                    b = b.to(dtype).to(tl.float32)
            if HAS_BIAS:
                if NORM == "rms_all":
                    ba, bb = _load_pairs(bias, head, head < num_heads, HEAD_DIM, 1, HEAD_DIM, BLOCK_D, INTERLEAVED)
                a = a + ba
                b = b + bb
            # The norm's output has the dtype of x before the rotation reads it.
            a = a.to(dtype).to(tl.float32)
            b = b.to(dtype).to(tl.float32)
        if HAS_ROPE:
            if TABLE_PER_HEAD:
                c = _load_table(cos, head, head < num_heads, table_mask, cos_h, cos_d, 1.0)
                s = _load_table(sin, head, head < num_heads, table_mask, sin_h, sin_d, 0.0)
            a, b = a * c - b * s, a * s + b * c
        _store_pairs(out, a, b, head, head < num_heads, HEAD_DIM, BLOCK_D, INTERLEAVED)


@triton.jit
def norm_rope_kernel(
    x0, out0, weight0, bias0, x0_b, x0_s, x0_h, x0_d,
    x1, out1, weight1, bias1, x1_b, x1_s, x1_h, x1_d,
    cos, sin, cos_b, cos_s, cos_h, cos_d, sin_b, sin_s, sin_h, sin_d,
    out_b, out_s, seq_len, num_heads, rope_start, rope_len, eps0, eps1,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROPE: tl.constexpr, TABLE_PER_HEAD: tl.constexpr,
    INTERLEAVED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid `(batch * seq_len, 1 or 2)`: the second axis chooses between query and key."""
    token = (tl.program_id(0) % seq_len).to(tl.int64)
    batch = (tl.program_id(0) // seq_len).to(tl.int64)
    to = batch * out_b + token * out_s
    row = token - rope_start
    cos += batch * cos_b + row * cos_s
    sin += batch * sin_b + row * sin_s
    # With heads one behind the other their stride is known, also where it is no multiple of 16.
    if tl.program_id(1) == 0:
        _norm_rope_one(
            x0 + batch * x0_b + token * x0_s, out0 + to, weight0, bias0, cos, sin, row, rope_len,
            HEAD_DIM if PACKED else x0_h, 1 if PACKED else x0_d, cos_h, cos_d, sin_h, sin_d, num_heads, eps0, HEAD_DIM,
            BLOCK_D, BLOCK_H, NORM, EARLY, HAS_WEIGHT, HAS_BIAS, HAS_ROPE, TABLE_PER_HEAD, INTERLEAVED,
        )  # fmt: skip
    else:
        _norm_rope_one(
            x1 + batch * x1_b + token * x1_s, out1 + to, weight1, bias1, cos, sin, row, rope_len,
            HEAD_DIM if PACKED else x1_h, 1 if PACKED else x1_d, cos_h, cos_d, sin_h, sin_d, num_heads, eps1, HEAD_DIM,
            BLOCK_D, BLOCK_H, NORM, EARLY, HAS_WEIGHT, HAS_BIAS, HAS_ROPE, TABLE_PER_HEAD, INTERLEAVED,
        )  # fmt: skip


def triton_norm_rope(
    xs: tuple[Tensor, ...],
    outs: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...],
    biases: tuple[Tensor | None, ...],
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    eps: tuple[float, ...],
    norm: str,
    round_before_weight: bool,
    pairing: str,
    rope_start: int,
    tile: int = TILE,
    num_warps: int = 4,
) -> None:
    """One launch for one tensor, or for a query and a key of the same shape; `outs` have equal strides."""
    batch, seq_len, num_heads, head_dim = xs[0].shape
    if xs[0].numel() == 0:
        return
    sides: list[Any] = []
    for i in (0, len(xs) - 1):
        weight, bias = (xs[i] if t is None else t.contiguous() for t in (weights[i], biases[i]))
        sides += [xs[i], outs[i], weight, bias, *xs[i].stride()]
    tables: list[Any] = [xs[0], xs[0]] + [0] * 8
    if cos is not None and sin is not None:
        strides = [0 if n == 1 else s for t in (cos, sin) for n, s in zip(t.shape, t.stride())]
        tables = [cos, sin, *strides]
    block_d = triton.next_power_of_2(head_dim)
    kernel: Any = norm_rope_kernel
    kernel[(batch * seq_len, len(xs))](
        *sides, *tables, *outs[0].stride()[:2], seq_len, num_heads, rope_start, 0 if cos is None else cos.shape[1],
        eps[0], eps[-1], HEAD_DIM=head_dim, BLOCK_D=block_d,
        BLOCK_H=min(max(1, tile // block_d), triton.next_power_of_2(num_heads)), NORM=norm, EARLY=round_before_weight,
        HAS_WEIGHT=weights[0] is not None, HAS_BIAS=biases[0] is not None, HAS_ROPE=cos is not None,
        TABLE_PER_HEAD=cos is not None and cos.shape[2] > 1, INTERLEAVED=pairing == "interleaved",
        PACKED=all(x.stride()[2:] == (head_dim, 1) for x in xs), num_warps=num_warps,
        # Products and sums are rounded apart, as the separate kernels of eager mode do.
        enable_fp_fusion=False,
    )  # fmt: skip
