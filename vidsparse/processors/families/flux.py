"""Flux.1 (also Fill, Kontext, control) and models built like it: joint attention, text, image, then reference images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Arguments, Family, read_once


def _is_target(path: str, module: Any) -> bool:
    return path.endswith(".attn") and path.startswith(("transformer_blocks.", "single_transformer_blocks."))


def _grid(arguments: Arguments, config: Any) -> LatentGrid:
    def sizes(ids: torch.Tensor) -> LatentGrid:
        ids = ids[0] if ids.ndim == 3 else ids
        # [tokens, (image, row, column)], in Flux 2 one more; the first image is the one that is made, others are
        # references.
        made = ids[ids[:, 0] == ids[0, 0]]
        _, height, width, *_ = (made.amax(0) - made.amin(0) + 1).int().tolist()
        return LatentGrid(1, height, width)

    return read_once(arguments["img_ids"], sizes)


def _text(arguments: Arguments, config: Any) -> Sequence[tuple[int, int]]:
    references = arguments["hidden_states"].shape[1] - _grid(arguments, config).num_tokens
    return ((arguments["encoder_hidden_states"].shape[1], references),)


_KV_REFUSED = (
    "Flux 2's key-value processors keep the references' keys between steps and attend to them apart, so no single grid "
    "describes a call; set the plain Flux 2 processors first."
)

FLUX = Family(
    name="Flux",
    model_classes=(
        "FluxTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
        "BriaTransformer2DModel",
    ),
    is_target=_is_target,
    grid=_grid,
    text=_text,
)
FLUX_2 = Family(
    name="Flux 2",
    model_classes=("Flux2Transformer2DModel",),
    is_target=_is_target,
    grid=_grid,
    text=_text,
    refused={"Flux2KVAttnProcessor": _KV_REFUSED, "Flux2KVParallelSelfAttnProcessor": _KV_REFUSED},
)
CHROMA = Family(
    name="Chroma",
    model_classes=("ChromaTransformer2DModel",),
    is_target=_is_target,
    grid=_grid,
    text=_text,
    # The blocks spread the mask over keys to pairs; its pipeline's is of floats, added to the scores.
    pairwise_mask=True,
)
