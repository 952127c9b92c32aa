"""Processors of diffusers with norm and rotary embedding of query and key in one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vidsparse_kernels.qk_norm_rope import qk_norm_rope_pair

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def fused_call(
    base: type, attend: Callable[..., torch.Tensor], stock: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor] | None:
    """A `__call__` of a family's processor that fuses norm and rotary embedding, or None where there is none.

    Args:
        base: the family's processor class; only diffusers' own `WanAttnProcessor` has a fused form.
        attend: called as `attend(processor, query, key, value, **arguments)` where the family calls
            `dispatch_attention_fn`.
        stock: the unfused `__call__`, run for every call that `wan_is_usual` refuses: cross-attention, gradients,
            hooks on the norms, tables that are not float32, tensors that are not on a CUDA device.
    """
    try:
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor
    except ImportError:
        return None
    if base is not WanAttnProcessor:
        return None

    def call(
        self: Any,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if not (
            hidden_states.device.type == "cuda"
            and wan_is_usual(attn, hidden_states, encoder_hidden_states, rotary_emb)
        ):
            return stock(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        return wan_fused(self, attn, hidden_states, attention_mask, rotary_emb, attend)

    return call


def wan_is_usual(
    attn: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None,
    rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
) -> bool:
    """Whether the fused form gives what the stock one does, but for rounding."""
    if encoder_hidden_states is not None or attn.add_k_proj is not None or rotary_emb is None:
        return False
    # Autocast rounds where the fused form does not, and the kernel has no backward.
    if torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type):
        return False
    return (
        hidden_states.dtype in _FLOATS
        and all(_plain_rms_norm(norm, hidden_states.dtype) for norm in (attn.norm_q, attn.norm_k))
        and all(t.dtype == torch.float32 and t.ndim == 4 for t in rotary_emb)
    )


def _plain_rms_norm(norm: Any, dtype: torch.dtype) -> bool:
    """A `torch.nn.RMSNorm` whose weight may be read directly: no subclass, wrapper, hook or replaced forward."""
    return (
        type(norm) is torch.nn.RMSNorm
        and norm.weight is not None
        and norm.weight.dtype == dtype
        and norm.eps is not None
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        and "forward" not in vars(norm)
    )


def wan_fused(
    processor: Any,
    attn: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    attend: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Self-attention of Wan; the projections stay modules, so LoRA on them works."""
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    query, key = qk_norm_rope_pair(
        query,
        key,
        num_heads=attn.heads,
        weights=(attn.norm_q.weight, attn.norm_k.weight),
        eps=(attn.norm_q.eps, attn.norm_k.eps),
        norm="rms_all",
        rotary=rotary_emb,
    )
    hidden_states = attend(
        processor,
        query,
        key,
        value.unflatten(2, (attn.heads, -1)),
        attn_mask=attention_mask,
        dropout_p=0.0,
        is_causal=False,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    hidden_states = hidden_states.flatten(2, 3).type_as(query)
    return attn.to_out[1](attn.to_out[0](hidden_states))
