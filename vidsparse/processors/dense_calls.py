"""Which kernel the dense calls of a sparse method run on: the model's own attention, or ours over every block.

On a Hopper GPU our kernel over all blocks is faster than torch's dense kernels, from some length on. It takes a list of all
blocks, stored as one row, and is exact, so that its output differs from the model's own by rounding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vidsparse.report import DENSE_ON
from vidsparse_kernels import BlockMask, select_backend

if TYPE_CHECKING:
    from vidsparse.break_even import CallShape

KERNEL = "hopper"
ON_KERNEL = DENSE_ON + KERNEL
"""Backend in the report of a dense call that ran on our kernel; "dense" is the model's own attention."""

BLOCK_SIZE = 128
"""Tokens of a block, of queries and of keys: that for which the kernel is fastest."""

STOCK_DENSE = "stock"
"""What a layer says where a call that our kernel was chosen for ran through the model's own attention."""

OWN = "the model's own attention"
SWITCHED_OFF = f"{OWN}: `dense_backend` is stock"
GRADIENTS = f"{OWN}: gradients are recorded"
PARALLEL = f"{OWN}: context parallelism"
NO_GPU = f"{OWN}: our kernel for all blocks needs a Hopper GPU"
DTYPE = f"{OWN}: our kernel for all blocks is faster in bf16 only"
"""In fp16, where logits spread by 6, it does most tiles twice, as weights pass fp16's range: 1.8 times cuDNN's time."""
CHOSEN = f"{OWN}: its backend was chosen by hand"
OF_THE_CALL = f"{OWN}: the call has a mask, dropout, a backend or a shape of its own"


@dataclass(frozen=True, eq=False)
class EveryBlock:
    """All blocks of one length, for calls of the shape and dtype for which the kernel was found faster.

    Attributes:
        mask: every block, stored as one row.
        num_heads, head_dim: of the query.
        dtype: of query, key and value.
    """

    mask: BlockMask
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    def fits(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> bool:
        """Whether a call `[batch, seq_len, num_heads, head_dim]` is of that shape and dtype, and records no gradients."""
        return (
            not torch.is_grad_enabled()
            and query.shape[1:] == (self.mask.seq_len_q, self.num_heads, self.head_dim)
            and key.shape == value.shape
            and (enable_gqa or key.shape == query.shape)
            and query.dtype == key.dtype == value.dtype == self.dtype
        )


@functools.lru_cache(maxsize=16)
def every_block(seq_len: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> EveryBlock:
    # Made once, outside of graphs: what a call inside one makes lies in memory of that graph.
    with torch.inference_mode(False):
        mask = BlockMask.full(seq_len, seq_len, q_block_size=BLOCK_SIZE, kv_block_size=BLOCK_SIZE, device=device)
    return EveryBlock(mask, num_heads, head_dim, dtype)


class DenseChoice(NamedTuple):
    """What a dense call without a mask runs on.

    Attributes:
        blocks: for our kernel; None: the model's own attention.
        cost: estimated time over that of the model's own attention, at most 1.
        reason: for the report.
    """

    blocks: EveryBlock | None
    cost: float
    reason: str


def choose_dense(shape: CallShape, dtype: torch.dtype, device: torch.device) -> DenseChoice:
    """What is fastest for a dense call of a shape, in inference, in the dtype in which attention is computed."""
    from vidsparse.break_even import every_block_cost

    if device.type != "cuda":
        return DenseChoice(None, 1.0, NO_GPU)
    if dtype != torch.bfloat16:
        return DenseChoice(None, 1.0, DTYPE)
    if _chosen_by_hand():
        return DenseChoice(None, 1.0, CHOSEN)
    blocks = every_block(shape.seq_len, shape.num_heads, shape.head_dim, dtype, device)
    probe = torch.empty((1, 1, 1, 1), dtype=dtype, device=device)
    probe = probe.expand(shape.batch, shape.seq_len, shape.num_heads, shape.head_dim)
    name, reason = select_backend(probe, probe, probe, blocks.mask, requires_grad=False)
    if name != KERNEL:
        return DenseChoice(None, 1.0, f"{OWN}: our kernel for all blocks would be {name} ({reason})")
    cost = every_block_cost(shape)
    if cost >= 1:
        return DenseChoice(None, 1.0, f"{OWN}: our kernel is not faster at {shape.seq_len:,} tokens")
    return DenseChoice(blocks, cost, f"all blocks, an estimated {cost:.2f} of the time of {OWN}")


def _chosen_by_hand() -> bool:
    """Whether somebody told diffusers or torch which dense kernel to take."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    backends: Any = torch.backends.cuda
    narrowed = not (
        backends.flash_sdp_enabled()
        and backends.mem_efficient_sdp_enabled()
        and backends.math_sdp_enabled()
        and backends.cudnn_sdp_enabled()
    )
    return narrowed or _AttentionBackendRegistry.get_active_backend()[0] != AttentionBackendName.NATIVE
