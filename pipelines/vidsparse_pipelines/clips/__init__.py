"""Captioned clips that the project draws itself: grammar (what), renderer (pixels), checker (what is to be seen).

The bundled model is trained on them, the checker reads their attributes back from any clip, and the LoRA examples
use them as data. Because every clip is drawn from its caption, prompt adherence can be *measured*.
"""

from vidsparse_pipelines.clips.grammar import ClipSpec, ObjectSpec, caption, is_held_out, sample_spec, vocabulary
from vidsparse_pipelines.clips.renderer import render, sample_params

__all__ = [
    "ClipSpec",
    "ObjectSpec",
    "caption",
    "is_held_out",
    "render",
    "sample_params",
    "sample_spec",
    "vocabulary",
]
