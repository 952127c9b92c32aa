"""HunyuanVideo, HunyuanVideo-1.5 and Framepack: joint attention, video first, then text whose padding is masked.

Framepack's earlier frames stand before the video at three resolutions; they count as text, seen by all and seeing all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from vidsparse.processors.families.base import Arguments, Family, read_once, video_grid


def _is_target(path: str, module: Any) -> bool:
    # The token refiner, under context_embedder, attends over text alone.
    return path.endswith(".attn") and path.startswith(("transformer_blocks.", "single_transformer_blocks."))


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    return ((0, arguments["encoder_hidden_states"].shape[1]),)


def _text_15(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return ((0, sum(arguments[name].shape[1] for name in names)),)


FRAMEPACK_HISTORY = {
    "latents_clean": ("indices_latents_clean", (1, 2, 2)),
    "latents_history_2x": ("indices_latents_history_2x", (2, 4, 4)),
    "latents_history_4x": ("indices_latents_history_4x", (4, 8, 8)),
}
"""Earlier frames: their positions, without which they are left out, and their patches, frames first."""


def _text_framepack(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    history = 0
    for name, (positions, patches) in FRAMEPACK_HISTORY.items():
        latents = arguments.get(name)
        if latents is not None and arguments.get(positions) is not None:
            history += math.prod(-(-size // patch) for size, patch in zip(latents.shape[2:], patches, strict=True))
    mask = arguments["encoder_attention_mask"]
    # The prompt of a single sample is cut to its length, those of a batch are masked.
    prompt = read_once(mask, lambda mask: int(mask.sum())) if len(mask) == 1 else mask.shape[1]
    return ((history, arguments["image_embeds"].shape[1] + prompt),)


class HunyuanVideo15Processor:
    """Attention of HunyuanVideo-1.5 with its text mask kept per key.

    The family's own processor spreads it to `[batch, 1, seq_len, seq_len]`, gigabytes at usual sizes; rows of padding,
    which that mask empties, nobody reads.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.embeddings import apply_rotary_emb

        video_len = hidden_states.shape[1]
        heads = (attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(2, heads))
        key = attn.norm_k(attn.to_k(hidden_states).unflatten(2, heads))
        value = attn.to_v(hidden_states).unflatten(2, heads)
        if image_rotary_emb is not None:
            rotate: Any = functools.partial(apply_rotary_emb, freqs_cis=image_rotary_emb, sequence_dim=1)
            query, key = rotate(query), rotate(key)
        text_query = attn.add_q_proj(encoder_hidden_states).unflatten(2, heads)
        text_key = attn.add_k_proj(encoder_hidden_states).unflatten(2, heads)
        text_value = attn.add_v_proj(encoder_hidden_states).unflatten(2, heads)
        if attn.norm_added_q is not None:
            text_query = attn.norm_added_q(text_query)
        if attn.norm_added_k is not None:
            text_key = attn.norm_added_k(text_key)
        out = dispatch_attention_fn(
            torch.cat([query, text_query], dim=1),
            torch.cat([key, text_key], dim=1),
            torch.cat([value, text_value], dim=1),
            attn_mask=torch.nn.functional.pad(attention_mask.bool(), (video_len, 0), value=True)[:, None, None, :],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2, 3).to(hidden_states.dtype)
        video = attn.to_out[1](attn.to_out[0](out[:, :video_len]))
        return video, attn.to_add_out(out[:, video_len:])


HUNYUAN_VIDEO = Family(
    name="HunyuanVideo",
    model_classes=("HunyuanVideoTransformer3DModel",),
    is_target=_is_target,
    grid=video_grid,
    text=_text,
)
HUNYUAN_VIDEO_15 = Family(
    name="HunyuanVideo-1.5",
    model_classes=("HunyuanVideo15Transformer3DModel",),
    is_target=_is_target,
    grid=video_grid,
    text=_text_15,
    processors={"HunyuanVideo15AttnProcessor2_0": HunyuanVideo15Processor},
)
HUNYUAN_VIDEO_FRAMEPACK = Family(
    name="HunyuanVideo Framepack",
    model_classes=("HunyuanVideoFramepackTransformer3DModel",),
    is_target=_is_target,
    grid=video_grid,
    text=_text_framepack,
)
