"""Kandinsky 5: video self-attention beside cross-attention in the visual blocks; latents come channels last."""

from __future__ import annotations

from typing import Any

from vidsparse.layout import LatentGrid
from vidsparse.processors.families.base import Arguments, Family

NABLA = "the pipeline asked for the model's own sparse attention, NABLA"


def _is_target(path: str, module: Any) -> bool:
    return path.startswith("visual_transformer_blocks.") and path.endswith(".self_attention")


def _grid(arguments: Arguments, config: Any) -> LatentGrid:
    # [batch, frames, height, width, channels]
    _, *sizes, _ = arguments["hidden_states"].shape
    return LatentGrid(*(size // patch for size, patch in zip(sizes, config.patch_size, strict=True)))


def _obstacle(arguments: Arguments, config: Any) -> str | None:
    # NABLA reorders the tokens, too.
    return NABLA if arguments.get("sparse_params") is not None else None


KANDINSKY_5 = Family(
    name="Kandinsky 5",
    model_classes=("Kandinsky5Transformer3DModel",),
    is_target=_is_target,
    grid=_grid,
    obstacle=_obstacle,
)
