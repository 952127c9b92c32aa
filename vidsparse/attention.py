"""sparse_attention: the one path from query, key and value to the output, whatever the method."""

from __future__ import annotations

import torch

from vidsparse.errors import ConfigError
from vidsparse.processors.context import AttentionContext
from vidsparse_kernels import BlockMask, block_sparse_attention


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: AttentionContext | BlockMask,
    *,
    key_bias: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention over the blocks that the context (or a bare block mask) selects, exact on those blocks.

    Args:
        query, key, value: `[batch, seq_len, num_heads, head_dim]`, any strides, one dtype.
        context: from a bound processor, or a BlockMask.
        key_bias: fp32 `[batch | 1, num_heads | 1, seq_len]` added to the logits, -inf for keys that nobody may see
            (padding of a prompt); not differentiated.
        scale: factor on query . key, default 1 / sqrt(head_dim).
        backend: a backend of `vidsparse_kernels.block_sparse_attention`, default what the context says, else "auto".

    Returns:
        Output with the shape and dtype of `query`; under autocast in its dtype, as with dense attention. Differentiable
        in query, key and value, also under torch.compile.

    Raises:
        ConfigError: the context selects nothing or is something else.
        ValueError: a shape, dtype or device does not fit the mask.

    Example:
        >>> mask = radial_block_mask(LatentGrid(5, 8, 8), q_block_size=64, kv_block_size=64)
        >>> q = k = v = torch.randn(1, 320, 2, 64)
        >>> sparse_attention(q, k, v, mask).shape
        torch.Size([1, 320, 2, 64])
    """
    if isinstance(context, BlockMask):
        block_mask, backend = context, backend or "auto"
    elif isinstance(context, AttentionContext):
        block_mask = context.block_mask
        backend = backend or (context.backend if key_bias is None else context.bias_backend)
    else:
        raise ConfigError(f"`context` must be a BlockMask or an AttentionContext, got {type(context).__name__}.")
    if block_mask is None:
        raise ConfigError("The context of a dense call selects no blocks; call the model's dense attention instead.")
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        # Norms and rotary embedding may leave query and key in fp32 beside a value in half precision.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if torch.compiler.is_compiling():
        from vidsparse.ops import block_sparse_attention_op

        return block_sparse_attention_op(
            query, key, value, block_mask, key_bias=key_bias, scale=scale, backend=backend
        )
    if block_mask.device != query.device:
        block_mask = block_mask.to(query.device)
    out = block_sparse_attention(query, key, value, block_mask, key_bias=key_bias, scale=scale, backend=backend)
    assert isinstance(out, torch.Tensor)
    return out
