"""What differs between model families, one file each, and the one list of them."""

from __future__ import annotations

from typing import Any

from vidsparse.errors import UnsupportedModelError
from vidsparse.processors.families.base import Family
from vidsparse.processors.families.cogvideox import COGVIDEOX
from vidsparse.processors.families.flux import FLUX
from vidsparse.processors.families.hunyuan_video import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from vidsparse.processors.families.ltx import LTX
from vidsparse.processors.families.mochi import MOCHI
from vidsparse.processors.families.qwen_image import QWEN_IMAGE
from vidsparse.processors.families.sd3 import SD3
from vidsparse.processors.families.wan import WAN

FAMILIES: tuple[Family, ...] = (
    WAN,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    COGVIDEOX,
    MOCHI,
    LTX,
    FLUX,
    QWEN_IMAGE,
    SD3,
)


def supported_models() -> tuple[str, ...]:
    """Names of the transformer classes that vidsparse can attach to."""
    return tuple(name for family in FAMILIES for name in family.model_classes)


def family_of(model: Any) -> Family:
    """The family of a transformer, also through subclasses.

    Raises:
        UnsupportedModelError: no family knows this class; the message lists those supported.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    for family in FAMILIES:
        if any(name in family.model_classes for name in names):
            return family
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported; vidsparse can attach to {', '.join(supported_models())}."
    )


__all__ = ["FAMILIES", "Family", "family_of", "supported_models"]
