"""Triton kernel that moves rows of one or two tensors by an order per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTEGERS = ["order_stride_b", "order_stride_h", "num_heads", "num_tiles", "seq_len", "text_before", "num_video"]


@dataclass(frozen=True)
class MoveConfig:
    """How the kernel is compiled.

    Attributes:
        rows: tokens of one head per program.
        num_warps: warps per program.
        heads_fastest: whether neighbouring programs take neighbouring heads of the same tokens, or neighbouring
            tokens of the same head.
    """

    rows: int = 32
    num_warps: int = 4
    heads_fastest: bool = True


@triton.jit(do_not_specialize=INTEGERS)
def move_kernel(
    x_ptr, y_ptr, x2_ptr, y2_ptr, order_ptr,
    x_stride_b, x_stride_s, x_stride_h, x_stride_d, x2_stride_b, x2_stride_s, x2_stride_h, x2_stride_d,
    y_stride_b, y_stride_s, y_stride_h, order_stride_b, order_stride_h,
    num_heads, num_tiles, seq_len, text_before, num_video,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    TWO: tl.constexpr, SCATTER: tl.constexpr, HEADS_FASTEST: tl.constexpr,
):  # fmt: skip
    """y[s] = x[order[s]], with SCATTER y[order[s]] = x[s], for ROWS tokens s of one head."""
    program = tl.program_id(0)
    if HEADS_FASTEST:
        head = program % num_heads
        tile = (program // num_heads) % num_tiles
    else:
        tile = program % num_tiles
        head = (program // num_tiles) % num_heads
    batch = (program // num_heads // num_tiles).to(tl.int64)
    head = head.to(tl.int64)
    # [ROWS]
    tokens = tile * ROWS + tl.arange(0, ROWS)
    inside = tokens < seq_len
    place = tokens - text_before
    is_video = (place >= 0) & (place < num_video)
    order_ptr += batch * order_stride_b + head * order_stride_h
    listed = tl.load(order_ptr + place, mask=is_video, other=0)
    others = tl.where(is_video, listed + text_before, tokens)
    source = (tokens if SCATTER else others).to(tl.int64)[:, None]
    target = (others if SCATTER else tokens).to(tl.int64)[:, None]
    # [1, BLOCK_D]
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] & (dims < HEAD_DIM)
    wide = dims.to(tl.int64)
    y_offsets = batch * y_stride_b + head * y_stride_h + target * y_stride_s + wide
    rows = tl.load(
        x_ptr + batch * x_stride_b + head * x_stride_h + source * x_stride_s + wide * x_stride_d, mask=mask, other=0
    )
    if TWO:
        # Both loads are under way before the first store waits.
        rows2 = tl.load(
            x2_ptr + batch * x2_stride_b + head * x2_stride_h + source * x2_stride_s + wide * x2_stride_d,
            mask=mask, other=0,
        )  # fmt: skip
        tl.store(y2_ptr + y_offsets, rows2, mask=mask)
    tl.store(y_ptr + y_offsets, rows, mask=mask)


def triton_move(
    tensors: tuple[Tensor, ...],
    order: Tensor,
    *,
    text_before: int,
    inverse: bool,
    heads_first: bool,
    config: MoveConfig | None = None,
) -> tuple[Tensor, ...]:
    """Permute one or two tensors of the same shape and dtype in one launch; not differentiable.

    Args:
        tensors: `[batch, seq_len, num_heads, head_dim]` each, any strides.
        order: int32 `[batch|1, num_heads|1, num_video]`.
        text_before: tokens before the first video token.
        inverse: scatter instead of gather.
        heads_first: the result lies in memory as `[batch, num_heads, seq_len, head_dim]`.
        config: how to compile; None: the default.
    """
    x = tensors[0]
    batch, seq_len, num_heads, head_dim = x.shape
    if heads_first:
        new = [x.new_empty(batch, num_heads, seq_len, head_dim).transpose(1, 2) for _ in tensors]
    else:
        new = [x.new_empty(x.shape) for _ in tensors]
    if x.numel() == 0:
        return tuple(new)
    config = config or MoveConfig()
    order = order if order.stride(-1) == 1 else order.contiguous()
    strides = [0 if order.shape[d] == 1 else order.stride(d) for d in range(2)]
    tiles = triton.cdiv(seq_len, config.rows)
    launch: Any = move_kernel[(batch * num_heads * tiles,)]
    with torch.cuda.device_of(x):
        launch(
            x, new[0], tensors[-1], new[-1], order, *x.stride(), *tensors[-1].stride(), *new[0].stride()[:3], *strides,
            num_heads, tiles, seq_len, text_before, order.shape[-1],
            HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), ROWS=config.rows, TWO=len(tensors) == 2,
            SCATTER=inverse, HEADS_FASTEST=config.heads_fastest, num_warps=config.num_warps,
        )  # fmt: skip
    return tuple(new)
