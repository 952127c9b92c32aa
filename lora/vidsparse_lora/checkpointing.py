"""Gradient checkpointing whose kept inputs, one for each block, wait in the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LEAST_BYTES = 2**24
"""Smaller tensors stay where they are."""


class OffloadedCheckpoint:
    """Takes the place of torch's `checkpoint` in a diffusers model: `enable_gradient_checkpointing(OffloadedCheckpoint())`.

    A block's hidden states are copied to the CPU (pinned where there is a GPU) when the block is done and back when the
    backward pass recomputes it. What every block gets alike, such as rotary embeddings, stays on the device once.
    """

    def __init__(self, least_bytes: int = LEAST_BYTES) -> None:
        self.least_bytes = least_bytes
        self.moved = 0
        """Tensors moved in all."""

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        # Of a block's arguments its hidden states alone are new; their memory is known by its address.
        own = next((x for x in args if isinstance(x, Tensor) and x.requires_grad), None)
        if own is None or own.numel() * own.element_size() < self.least_bytes:
            return checkpoint(block, *args, use_reentrant=False)
        address, shape = own.data_ptr(), own.shape

        def pack(x: Tensor) -> tuple[torch.device, Tensor] | Tensor:
            if x.data_ptr() != address or x.shape != shape:
                return x
            self.moved += 1
            held = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            return x.device, held.copy_(x)

        def unpack(held: tuple[torch.device, Tensor] | Tensor) -> Tensor:
            return held if isinstance(held, Tensor) else held[1].to(held[0], non_blocking=True)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(block, *args, use_reentrant=False)
