"""sparse_attention: the one path from query, key and value to the output, whatever the method."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from vidsparse.errors import ConfigError
from vidsparse.parts import JointCorrection, PoolingCorrection, Selection
from vidsparse.processors.context import AttentionContext
from vidsparse_kernels import BlockMask, block_sparse_attention, select_backend

if TYPE_CHECKING:
    from vidsparse.layout import TokenLayout
    from vidsparse.recipe import Recipe


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: AttentionContext | BlockMask | None = None,
    *,
    layout: TokenLayout | None = None,
    recipe: Recipe | None = None,
    key_bias: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention over the blocks that a method selects, with the method's correction for the rest.

    Args:
        query, key, value: `[batch, seq_len, num_heads, head_dim]`, any strides, one dtype.
        context: from a bound processor or `make_context`; or a BlockMask for plain block-sparse attention.
        layout, recipe: in place of a context: the tokens and the method. The mask is then made for this call; a host
            that calls often makes a context once (`make_context`).
        key_bias: fp32 `[batch | 1, num_heads | 1, seq_len]` added to the logits, -inf for keys that nobody may see
            (padding of a prompt); not differentiated. For methods with a correction it may shut text tokens only.
        scale: factor on query . key, default 1 / sqrt(head_dim).
        backend: a backend of `vidsparse_kernels.block_sparse_attention`, default what the context says, else "auto".

    Returns:
        Output with the shape and dtype of `query`; under autocast in its dtype, as with dense attention. Differentiable
        in query, key and value, also under torch.compile.

    Raises:
        ConfigError: the context selects nothing or is something else, or neither it nor layout and recipe are given.
        ValueError: a shape, dtype or device does not fit the mask.

    Example:
        >>> mask = radial_block_mask(LatentGrid(5, 8, 8), q_block_size=64, kv_block_size=64)
        >>> q = k = v = torch.randn(1, 320, 2, 64)
        >>> sparse_attention(q, k, v, mask).shape
        torch.Size([1, 320, 2, 64])
    """
    if isinstance(context, BlockMask):
        return over_blocks(query, key, value, context, key_bias, scale, backend or "auto")
    if context is None and layout is not None and recipe is not None:
        context = make_context(layout, recipe, query.device)
    if not isinstance(context, AttentionContext):
        raise ConfigError(
            "`context` must be an AttentionContext or a BlockMask, or `layout` and `recipe` be given in its place; got "
            f"{type(context).__name__}."
        )
    return attend(query, key, value, context, key_bias=key_bias, scale=scale, backend=backend)[0]


def make_context(layout: TokenLayout, recipe: Recipe, device: torch.device | str) -> AttentionContext:
    """A context outside of a bound model: the method of a recipe on a layout, without steps and without memory.

    Args:
        layout: the tokens; its block size is replaced by the method's own choice for the grid.
        recipe: method and settings; its schedule is the caller's to follow.
        device: of the tensors to come.

    Example:
        >>> layout = TokenLayout(LatentGrid(5, 8, 8), text_after=7)
        >>> context = make_context(layout, Recipe.from_options("radial"), "cpu")
        >>> q = k = v = torch.randn(1, 327, 2, 64)
        >>> sparse_attention(q, k, v, context).shape
        torch.Size([1, 327, 2, 64])
    """
    from vidsparse.methods import processor_class

    processor = processor_class(recipe.method)(recipe)
    layout = processor.layout(layout.grid, layout.text_before, layout.text_after)
    parts, _ = processor.parts_with_reuse(layout, device)
    return AttentionContext(0, 1, None, None, None, layout, parts=parts)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    context: AttentionContext,
    *,
    key_bias: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, Selection | None]:
    """`sparse_attention` with the selection that was used, None for a static mask."""
    parts = context.parts
    if parts is None:
        raise ConfigError("The context of a dense call selects no blocks; call the model's dense attention instead.")
    if parts.is_static:
        assert parts.block_mask is not None
        backend = backend or (context.backend if key_bias is None else context.bias_backend)
        return over_blocks(query, key, value, parts.block_mask, key_bias, scale, backend), None
    query, key, value = in_autocast(query, key, value)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    correction = parts.correction
    if isinstance(correction, PoolingCorrection):
        # In training too, where the correction pools again with gradients: scores must not depend on whether they are
        # recorded, or a recomputed forward (gradient checkpointing) could select other blocks.
        context = replace(context, pool=partial(correction.pool, key, value))
    selection = _select(query, key, context)
    query, key, value = selection.permute(query, key, value)
    key_bias = selection.permute_bias(key_bias)
    mask = selection.block_mask
    if backend is None and isinstance(correction, JointCorrection):
        out = correction.attend(query, key, value, selection, context, scale, key_bias)
        if out is not None:
            return selection.restore(out), selection
    with_lse = correction is not None and correction.needs_lse
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if backend is not None:
        selection.backend = backend, "asked for"
    else:
        selection.backend = select_backend(
            query, key, value, mask, key_bias=key_bias, return_lse=with_lse, requires_grad=needs_grad
        )
    result = block_sparse_attention(
        query, key, value, mask, key_bias=key_bias, scale=scale, return_lse=with_lse, backend=selection.backend[0]
    )
    out, lse = result if isinstance(result, tuple) else (result, None)
    if correction is not None:
        out = correction.correct(query, key, value, out, lse, selection, context, scale, key_bias)
    return selection.restore(out), selection


def _select(query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> Selection:
    """The selection of this call: the one kept from an earlier step while the schedule says so, else a new one."""
    parts, memory = context.parts, context.memory
    assert parts is not None
    if memory is None or context.step_index is None:
        return _select_anew(query, key, context)
    memory.open(query, context.layout)
    kept = memory.get("selection")
    if kept is not None and not memory.selects_anew(context.step_index, context.refresh_every):
        # A call that failed may have left the means of its own keys.
        kept.pools = None
        return kept
    selection = _select_anew(query, key, context)
    memory.step = context.step_index
    # What was kept for the old selection would only take the new one's room.
    memory.drop("state")
    if context.refresh_every > 1:
        memory.keep("selection", selection, selection.tensors() if parts.selector is not None else [])
    return selection


def _select_anew(query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> Selection:
    parts = context.parts
    assert parts is not None
    if parts.selector is None:
        assert parts.block_mask is not None
        return Selection(parts.block_mask)
    with torch.no_grad():
        return parts.selector.select(query, key, context)


def over_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    key_bias: torch.Tensor | None,
    scale: float | None,
    backend: str,
) -> torch.Tensor:
    """Attention over the blocks of a mask, as one operator under torch.compile; arguments as for `sparse_attention`."""
    query, key, value = in_autocast(query, key, value)
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


def in_autocast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs as dense attention would take them: norms and rotary embedding may leave fp32 beside half precision."""
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value
