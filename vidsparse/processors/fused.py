"""Self-attention of the main families with norm and rotary embedding of query and key in one kernel.

An optimisation of processors whose code is known word for word, never a second meaning: whatever a call has that the
fused form was not made for, the family's own code runs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
import types
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm

from vidsparse_kernels.qk_norm_rope import qk_norm_rope_pair

Stream = tuple[torch.Tensor, torch.Tensor, tuple[Any, Any], Any]
"""Query and key as their projections give them, the norms of both, and the rotary tables."""


def fused_form(call: types.FunctionType) -> Callable[..., Any] | None:
    """The fused form of a processor's `__call__`, or None where there is none.

    It takes the arguments of `call` and returns what that returns, within rounding; or None, having done nothing, where
    the call is not one it was made for: under torch.compile (which fuses these operations itself), autocast or
    gradients, off a CUDA device with Triton, with hooks on a norm or weights of another type, and in cross-attention.
    """
    form = FORMS.get(fingerprint(call))
    if form is None:
        return None

    def fused(layer: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        usual = _is_usual(hidden_states, encoder_hidden_states)
        out = form(layer, attn, hidden_states, encoder_hidden_states, *arguments) if usual else None
        layer.fuses = out is not None
        return out

    return fused


def fingerprint(call: types.FunctionType) -> str:
    """A hash of a function's arguments and code, without types, comments and layout."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(call))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    names = ",".join(argument.arg for argument in definition.args.args)
    return hashlib.sha256("\n".join([names, *map(ast.unparse, definition.body)]).encode()).hexdigest()[:16]


def _is_usual(hidden_states: Any, encoder_hidden_states: Any) -> bool:
    # Autocast rounds where the fused form does not, and the kernel has no backward.
    return (
        type(hidden_states) is torch.Tensor
        and hidden_states.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and (encoder_hidden_states is None or encoder_hidden_states.dtype == hidden_states.dtype)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and _has_kernel(hidden_states.device)
    )


def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None


def _plain(norms: tuple[Any, Any], kind: type, x: torch.Tensor, width: int) -> bool:
    """Whether the weights of both norms may be read directly: no subclass, wrapper, hook or replaced forward."""
    return all(
        type(norm) is kind
        and norm.eps is not None
        and type(norm.weight) is torch.nn.Parameter
        and getattr(norm, "bias", None) is None
        and (norm.weight.shape, norm.weight.dtype, norm.weight.device) == ((width,), x.dtype, x.device)
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        and "forward" not in vars(norm)
        for norm in norms
    )


def _real_tables(rotary: Any, num_tokens: int, ndim: int, device: torch.device) -> bool:
    """Whether rotary tables are cos and sin in fp32, `[num_tokens, head_dim]` or `[1, num_tokens, 1, head_dim]`."""
    return (
        isinstance(rotary, tuple | list)
        and len(rotary) == 2
        and all(t.ndim == ndim and t.shape[0 if ndim == 2 else 1] == num_tokens for t in rotary)
        and all(t.dtype == torch.float32 and t.device == device for t in rotary)
    )


def _normed(streams: list[Stream], head_dim: int, *, norm: str = "rms_heads") -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key of the streams behind each other, normed and rotated, each written to its place at once."""
    first = streams[0][0]
    batch, _, width = first.shape
    lengths = [stream[0].shape[1] for stream in streams]
    joined = tuple(first.new_empty(batch, sum(lengths), width // head_dim, head_dim) for _ in range(2))
    parts = zip(*(x.split(lengths, dim=1) for x in joined), strict=True)
    for (query, key, norms, rotary), out in zip(streams, parts, strict=True):
        qk_norm_rope_pair(
            query,
            key,
            num_heads=width // head_dim,
            weights=(norms[0].weight, norms[1].weight),
            eps=(norms[0].eps, norms[1].eps),
            norm=norm,
            # torch's norm rounds once, after the weight.
            round_before_weight=type(norms[0]) is RMSNorm,
            rotary=rotary,
            out=(out[0], out[1]),
        )
    return joined[0], joined[1]


def _projections(attn: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if attn.fused_projections:
        return attn.to_qkv(hidden_states).chunk(3, dim=-1)
    return attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)


def _added_projections(attn: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if attn.fused_projections:
        return attn.to_added_qkv(hidden_states).chunk(3, dim=-1)
    return attn.add_q_proj(hidden_states), attn.add_k_proj(hidden_states), attn.add_v_proj(hidden_states)


def _wan(
    layer: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any, rotary_emb: Any
) -> Any:
    norms = attn.norm_q, attn.norm_k
    x = hidden_states
    if (
        encoder_hidden_states is not None
        or attn.add_k_proj is not None
        or not _plain(norms, torch.nn.RMSNorm, x, attn.inner_dim)
        or not _real_tables(rotary_emb, x.shape[1], 4, x.device)
    ):
        return None
    query, key, value = _projections(attn, hidden_states)
    query, key = _normed([(query, key, norms, rotary_emb)], attn.inner_dim // attn.heads, norm="rms_all")
    out = layer.attend(
        query,
        key,
        value.unflatten(2, (attn.heads, -1)),
        attn_mask=attention_mask,
        dropout_p=0.0,
        is_causal=False,
        backend=layer._attention_backend,
        parallel_config=layer._parallel_config,
    )
    return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))


def _hunyuan_video(
    layer: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any, image_rotary_emb: Any
) -> Any:
    if encoder_hidden_states is None or attn.norm_q is None or attn.norm_k is None:
        return None
    joint = attn.add_q_proj is not None
    head_dim = attn.inner_dim // attn.heads
    norms, added_norms = (attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k)
    x = hidden_states
    if (
        not all(_plain(pair, RMSNorm, x, head_dim) for pair in ((norms, added_norms) if joint else (norms,)))
        or not _real_tables(image_rotary_emb, x.shape[1], 2, x.device)
    ):  # fmt: skip
        return None
    text_len = encoder_hidden_states.shape[1]
    if not joint:
        # The text stands behind the video in one stream, beyond the tables' last row.
        hidden_states = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    streams: list[Stream] = [(query, key, norms, image_rotary_emb)]
    if joint:
        text_query, text_key, text_value = (
            projection(encoder_hidden_states) for projection in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        streams.append((text_query, text_key, added_norms, None))
        value = torch.cat([value, text_value], dim=1)
    query, key = _normed(streams, head_dim)
    out = layer.attend(
        query,
        key,
        value.unflatten(2, (-1, head_dim)),
        attn_mask=attention_mask,
        dropout_p=0.0,
        is_causal=False,
        backend=layer._attention_backend,
        parallel_config=layer._parallel_config,
    )
    out = out.flatten(2, 3).to(query.dtype)
    video, text = out[:, :-text_len], out[:, -text_len:]
    if getattr(attn, "to_out", None) is not None:
        video = attn.to_out[1](attn.to_out[0](video))
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return video, text


def _flux(
    layer: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any, attention_mask: Any, image_rotary_emb: Any,
    packs: bool = True,
) -> Any:  # fmt: skip
    """`packs`: text and image are made contiguous before their output projections, as in Flux."""
    joint = attn.added_kv_proj_dim is not None
    if joint != (encoder_hidden_states is not None):
        return None
    x, head_dim = hidden_states, attn.head_dim
    text_len = encoder_hidden_states.shape[1] if joint else 0
    norms = attn.norm_q, attn.norm_k
    if (
        not _plain(norms, torch.nn.RMSNorm, x, head_dim)
        or joint and not _plain((attn.norm_added_q, attn.norm_added_k), torch.nn.RMSNorm, x, head_dim)
        or not _real_tables(image_rotary_emb, text_len + x.shape[1], 2, x.device)
    ):  # fmt: skip
        return None
    query, key, value = _projections(attn, hidden_states)
    streams: list[Stream] = [(query, key, norms, tuple(t[text_len:] for t in image_rotary_emb))]
    if joint:
        text_query, text_key, text_value = _added_projections(attn, encoder_hidden_states)
        text_tables = tuple(t[:text_len] for t in image_rotary_emb)
        streams.insert(0, (text_query, text_key, (attn.norm_added_q, attn.norm_added_k), text_tables))
        value = torch.cat([text_value, value], dim=1)
    query, key = _normed(streams, head_dim)
    out = layer.attend(
        query,
        key,
        value.unflatten(-1, (-1, head_dim)),
        attn_mask=attention_mask,
        backend=layer._attention_backend,
        parallel_config=layer._parallel_config,
    )
    out = out.flatten(2, 3).to(query.dtype)
    if not joint:
        return out
    text, image = out.split_with_sizes([text_len, x.shape[1]], dim=1)
    if packs:
        text, image = text.contiguous(), image.contiguous()
    return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def _qwen_image(
    layer: Any,
    attn: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    encoder_hidden_states_mask: Any,
    attention_mask: Any,
    image_rotary_emb: Any,
) -> Any:
    if encoder_hidden_states is None or attention_mask is not None or image_rotary_emb is None:
        return None
    x, text = hidden_states, encoder_hidden_states
    head_dim = attn.inner_dim // attn.heads
    norms, added_norms = (attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k)
    if not all(_plain(pair, RMSNorm, x, head_dim) for pair in (norms, added_norms)) or not all(
        t.dtype == torch.complex64 and t.device == x.device and t.shape == (tokens.shape[1], head_dim // 2)
        for t, tokens in zip(image_rotary_emb, (x, text), strict=True)
    ):
        return None
    if encoder_hidden_states_mask is not None:
        image_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        attention_mask = torch.cat([encoder_hidden_states_mask, image_mask], dim=1)[:, None, None, :]
    text_query, text_key, text_value = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    image_query, image_key, image_value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    query, key = _normed(
        [
            (text_query, text_key, added_norms, image_rotary_emb[1]),
            (image_query, image_key, norms, image_rotary_emb[0]),
        ],
        head_dim,
    )
    out = layer.attend(
        query,
        key,
        torch.cat([text_value, image_value], dim=1).unflatten(-1, (-1, head_dim)),
        attn_mask=attention_mask,
        dropout_p=0.0,
        is_causal=False,
        backend=layer._attention_backend,
        parallel_config=layer._parallel_config,
    )
    out = out.flatten(2, 3).to(query.dtype)
    image = attn.to_out[0](out[:, text.shape[1] :].contiguous())
    if len(attn.to_out) > 1:
        image = attn.to_out[1](image)
    return image, attn.to_add_out(out[:, : text.shape[1]].contiguous())


FORMS: dict[str, Callable[..., Any]] = {
    "1dcc1d819a5be1d3": _wan,
    "a430a7ecf4dff9f5": _hunyuan_video,
    "68b188d851109648": _flux,
    "c451eeeed62da1b3": functools.partial(_flux, packs=False),
    "2a6750636313cceb": _qwen_image,
}
"""Fused forms by the fingerprint of the `__call__` that each was read from, in diffusers 0.42; the second of Flux is
Bria's, LongCat's and Ovis's. Where another release changes one, its models run unfused until somebody has read it."""
