"""Video models that need a few lines each: Cosmos, Allegro, EasyAnimate, Motif-Video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidsparse.processors.families.base import Arguments, Family, first_head, path_ends_in, video_grid


def _is_joint(path: str, module: Any) -> bool:
    return path.endswith(".attn") and path.startswith(("transformer_blocks.", "single_transformer_blocks."))


def _length(arguments: Arguments, name: str) -> int:
    tokens = arguments.get(name)
    return 0 if tokens is None else tokens.shape[1]


def _easyanimate_text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    return ((sum(_length(arguments, name) for name in ("encoder_hidden_states", "encoder_hidden_states_t5")), 0),)


def _motif_text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    text = (0, sum(_length(arguments, name) for name in ("encoder_hidden_states", "image_embeds")))
    if not config.num_decoder_layers:
        return (text,)
    # The last layers have the video as it was encoded in place of the text.
    return sorted({text, (0, video_grid(arguments, config).num_tokens)}, reverse=True)


COSMOS = Family(
    name="Cosmos",
    model_classes=("CosmosTransformer3DModel",),
    is_target=path_ends_in("attn1"),
    grid=video_grid,
)
ALLEGRO = Family(
    name="Allegro",
    model_classes=("AllegroTransformer3DModel",),
    is_target=path_ends_in("attn1"),
    grid=video_grid,
    key_mask=first_head,
)
EASYANIMATE = Family(
    name="EasyAnimate",
    model_classes=("EasyAnimateTransformer3DModel",),
    is_target=path_ends_in("attn1"),
    grid=video_grid,
    text=_easyanimate_text,
)
MOTIF_VIDEO = Family(
    name="Motif-Video",
    model_classes=("MotifVideoTransformer3DModel",),
    is_target=_is_joint,
    grid=video_grid,
    text=_motif_text,
)
