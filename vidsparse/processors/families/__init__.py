"""What differs between model families, a short file for each or for a few, and the one list of them."""

from __future__ import annotations

from typing import Any

from vidsparse.errors import UnsupportedModelError
from vidsparse.processors.families.base import Family
from vidsparse.processors.families.cogvideox import COGVIDEOX
from vidsparse.processors.families.flux import CHROMA, FLUX, FLUX_2
from vidsparse.processors.families.helios import HELIOS
from vidsparse.processors.families.hidream import HIDREAM
from vidsparse.processors.families.hunyuan_video import HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, HUNYUAN_VIDEO_FRAMEPACK
from vidsparse.processors.families.images import AURAFLOW, COGVIEW_4, HUNYUAN_IMAGE, LATTE, PIXART
from vidsparse.processors.families.kandinsky import KANDINSKY_5
from vidsparse.processors.families.ltx import LTX, LTX_2
from vidsparse.processors.families.lumina import LUMINA_2
from vidsparse.processors.families.minimax import MINIMAX_H3
from vidsparse.processors.families.mochi import MOCHI
from vidsparse.processors.families.qwen_image import QWEN_IMAGE
from vidsparse.processors.families.refused import REFUSED
from vidsparse.processors.families.sd3 import SD3
from vidsparse.processors.families.videos import ALLEGRO, COSMOS, EASYANIMATE, MOTIF_VIDEO
from vidsparse.processors.families.wan import WAN
from vidsparse.processors.families.z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    WAN,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    HUNYUAN_VIDEO_FRAMEPACK,
    COGVIDEOX,
    MOCHI,
    LTX,
    LTX_2,
    COSMOS,
    KANDINSKY_5,
    ALLEGRO,
    EASYANIMATE,
    MOTIF_VIDEO,
    HELIOS,
    MINIMAX_H3,
    LATTE,
    FLUX,
    FLUX_2,
    CHROMA,
    QWEN_IMAGE,
    SD3,
    Z_IMAGE,
    LUMINA_2,
    HIDREAM,
    HUNYUAN_IMAGE,
    PIXART,
    COGVIEW_4,
    AURAFLOW,
)


def supported_models() -> tuple[str, ...]:
    """Names of the transformer classes that vidsparse can attach to."""
    return tuple(name for family in FAMILIES for name in family.model_classes)


def family_of(model: Any) -> Family:
    """The family of a transformer, also through subclasses.

    Raises:
        UnsupportedModelError: no family knows this class; the message says why it cannot, or lists those supported.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    for family in FAMILIES:
        if any(name in family.model_classes for name in names):
            return family
    for name in names:
        if name in REFUSED:
            raise UnsupportedModelError(f"{name} is not supported: {REFUSED[name]}.")
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported; vidsparse can attach to {', '.join(supported_models())}."
    )


__all__ = ["FAMILIES", "REFUSED", "Family", "family_of", "supported_models"]
