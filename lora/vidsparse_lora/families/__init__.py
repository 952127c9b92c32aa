"""One short file per family that can be trained."""

from __future__ import annotations

from vidsparse_lora.families.base import Backbone, check_trainable
from vidsparse_lora.families.cogvideox import CogVideoXBackbone
from vidsparse_lora.families.flux import FluxBackbone, flux_info
from vidsparse_lora.families.hunyuan import HunyuanBackbone
from vidsparse_lora.families.ltx import LTXBackbone
from vidsparse_lora.families.wan import WanBackbone, WanImageBackbone
from vidsparse_pipelines.model_info import ModelInfo, inspect_model

FAMILIES: tuple[type[Backbone], ...] = (
    WanBackbone,
    WanImageBackbone,
    HunyuanBackbone,
    LTXBackbone,
    CogVideoXBackbone,
    FluxBackbone,
)

__all__ = ["FAMILIES", "Backbone", "check_trainable", "family_of", "inspect_trainable", "trainable"]


def trainable() -> list[str]:
    """Pipeline classes that can be trained."""
    return [name for family in FAMILIES for name in family.pipelines]


def inspect_trainable(model: str) -> ModelInfo:
    """What is known of a model from its files, of images too; raises as `inspect_model` does."""
    return flux_info(model) or inspect_model(model)


def family_of(info: ModelInfo) -> type[Backbone]:
    """The family of a model.

    Raises:
        UnsupportedModelError: there is none.
    """
    check_trainable(info)
    return next(family for family in FAMILIES if info.pipeline_class in family.pipelines)
