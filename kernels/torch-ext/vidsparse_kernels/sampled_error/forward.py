"""Triton kernels: the keys are shared out over many programs, so that few rows keep a whole GPU busy.

`_partial` attends all sampled rows of one head to one run of keys; `_compare` joins the runs of one row and compares.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 64
PROGRAMS = 264
"""Programs wanted for the keys: two for each multiprocessor of an H200."""
MAX_RUNS = 256
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _partial(
    q_ptr, k_ptr, v_ptr, bias_ptr, acc_ptr, max_ptr, sum_ptr,
    q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d, v_b, v_s, v_h, v_d, bias_b, bias_h, bias_s,
    seq_len_kv, first, among, count, offset, first_head, groups, num_runs, run_len, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    run, local_head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = (first_head + local_head).to(tl.int64)
    kv_head = head // groups
    i = tl.arange(0, ROWS)
    row = first + (i.to(tl.int64) * among + offset) // count
    dim = tl.arange(0, BLOCK_D)
    in_dim, in_rows = dim < HEAD_DIM, i < count
    # [ROWS, BLOCK_D]
    q = tl.load(
        q_ptr + sample * q_b + head * q_h + row[:, None] * q_s + dim[None, :] * q_d,
        mask=in_rows[:, None] & in_dim[None, :],
        other=0.0,
    )
    k_ptr += sample * k_b + kv_head * k_h
    v_ptr += sample * v_b + kv_head * v_h
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    begin = run * run_len
    end = tl.minimum(begin + run_len, seq_len_kv)
    for start in range(begin, end, TILE):
        col = start + tl.arange(0, TILE).to(tl.int64)
        in_run = col < end
        # [BLOCK_D, TILE]
        k = tl.load(k_ptr + col[None, :] * k_s + dim[:, None] * k_d, mask=in_run[None, :] & in_dim[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * scale_log2
        if HAS_BIAS:
            bias = tl.load(bias_ptr + sample * bias_b + head * bias_h + col * bias_s, mask=in_run, other=-float("inf"))
            logits += bias[None, :] * LOG2E
        logits = tl.where(in_run[None, :], logits, -float("inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        # Rows that have seen no key yet keep 0 - 0 instead of inf - inf.
        pivot = tl.where(larger == -float("inf"), 0.0, larger)
        weight = tl.exp2(logits - pivot[:, None])
        shrink = tl.exp2(largest - pivot)
        total = total * shrink + tl.sum(weight, 1)
        # [TILE, BLOCK_D]
        v = tl.load(v_ptr + col[:, None] * v_s + dim[None, :] * v_d, mask=in_run[:, None] & in_dim[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        largest = larger
    pair = (sample * tl.num_programs(1) + local_head) * ROWS + i
    place = pair * num_runs + run
    tl.store(max_ptr + place, largest)
    tl.store(sum_ptr + place, total)
    tl.store(acc_ptr + place[:, None] * BLOCK_D + dim[None, :], acc)


@triton.jit
def _compare(
    acc_ptr, max_ptr, sum_ptr, out_ptr, result_ptr, o_b, o_s, o_h, o_d,
    first, among, count, offset, first_head, num_runs,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    i, local_head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    pair = (sample * tl.num_programs(1) + local_head) * ROWS + i
    run = tl.arange(0, RUNS)
    largest = tl.load(max_ptr + pair * num_runs + run, mask=run < num_runs, other=-float("inf"))
    pivot = tl.max(largest, 0)
    pivot = tl.where(pivot == -float("inf"), 0.0, pivot)
    sums = tl.load(sum_ptr + pair * num_runs + run, mask=run < num_runs, other=0.0)
    total = tl.sum(sums * tl.exp2(largest - pivot), 0)
    dim = tl.arange(0, BLOCK_D)
    exact = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_runs, STEP):
        part = start + tl.arange(0, STEP)
        there = part < num_runs
        share = tl.exp2(tl.load(max_ptr + pair * num_runs + part, mask=there, other=-float("inf")) - pivot)
        acc = tl.load(
            acc_ptr + (pair * num_runs + part)[:, None] * BLOCK_D + dim[None, :], mask=there[:, None], other=0.0
        )
        exact += tl.sum(acc * share[:, None], 0)
    # A row without any key keeps its zeros; any other has a total of at least 1, its largest weight.
    exact /= tl.maximum(total, 1.0)
    row = first + (i.to(tl.int64) * among + offset) // count
    head = (first_head + local_head).to(tl.int64)
    in_dim = dim < HEAD_DIM
    out = tl.load(out_ptr + sample * o_b + row * o_s + head * o_h + dim * o_d, mask=in_dim, other=0.0).to(tl.float32)
    error = out - exact
    result_ptr += ((sample * tl.num_programs(1) + local_head) * count + i) * 2
    tl.store(result_ptr, tl.sum(error * error, 0))
    tl.store(result_ptr + 1, tl.sum(exact * exact, 0))


def triton_sampled_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    key_bias: Tensor | None,
    *,
    first: int,
    among: int,
    count: int,
    offset: int,
    heads: tuple[int, int],
    scale: float | None,
) -> Tensor:
    """As `sampled_error_reference`, in two launches."""
    batch, _, num_heads, head_dim = query.shape
    seq_len_kv, begin, num_sampled = key.shape[1], heads[0], heads[1] - heads[0]
    block_d, rows = _power_of_2(head_dim), _power_of_2(count)
    tiles = -(-seq_len_kv // BLOCK_N)
    tiles_per_run = -(-tiles // max(1, min(MAX_RUNS, tiles, PROGRAMS // (batch * num_sampled))))
    num_runs = -(-tiles // tiles_per_run)
    pairs = batch * num_sampled * rows
    acc = torch.empty((pairs, num_runs, block_d), dtype=torch.float32, device=query.device)
    largest, total = torch.empty((2, pairs, num_runs), dtype=torch.float32, device=query.device).unbind()
    result = torch.empty((batch, num_sampled * count, 2), dtype=torch.float32, device=query.device)
    bias, bias_strides = _bias(key_bias, query)
    factor = head_dim**-0.5 if scale is None else scale
    shape: dict[str, Any] = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "ROWS": rows}
    # Wide heads of fp32 would not fit shared memory in two stages.
    stages = 3 if block_d * query.element_size() <= 256 else 1
    with torch.cuda.device(query.device) if query.device.type == "cuda" else torch.no_grad():
        launch: Any = _partial[(num_runs, num_sampled, batch)]
        launch(
            query, key, value, bias, acc, largest, total,
            *query.stride(), *key.stride(), *value.stride(), *bias_strides,
            seq_len_kv, first, among, count, offset, begin, num_heads // key.shape[2], num_runs,
            tiles_per_run * BLOCK_N, factor * 1.4426950408889634,
            **shape, TILE=BLOCK_N, HAS_BIAS=key_bias is not None, num_warps=4, num_stages=stages,
        )  # fmt: skip
        launch = _compare[(count, num_sampled, batch)]
        launch(
            acc, largest, total, out, result, *out.stride(), first, among, count, offset, begin, num_runs,
            **shape, RUNS=_power_of_2(num_runs), STEP=64, num_warps=4,
        )  # fmt: skip
    return result


def _power_of_2(n: int) -> int:
    """The next one, at least the 16 that `tl.dot` takes."""
    return max(16, 1 << (n - 1).bit_length())


def _bias(key_bias: Tensor | None, query: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    if key_bias is None:
        return query, (0, 0, 0)
    batch, heads = (0 if key_bias.shape[i] == 1 else key_bias.stride(i) for i in (0, 1))
    return key_bias, (batch, heads, key_bias.stride(2))
