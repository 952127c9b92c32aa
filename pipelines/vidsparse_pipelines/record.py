"""What a method that looks at query and key selects in a real, small generation."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

from vidsparse.errors import ConfigError
from vidsparse.layout import TokenLayout
from vidsparse.methods import processor_class
from vidsparse.parts import Parts, Selection

from .generation import _call_arguments, _Run, resolve_settings
from .load import load_pipeline
from .settings import GenerateSettings


@dataclass(frozen=True)
class Recorded:
    """One selection.

    Attributes:
        selection: blocks and token orders.
        layout: the tokens.
        step, layer: where it was made.
    """

    selection: Selection
    layout: TokenLayout
    step: int
    layer: int


class _Recorder:
    """A selector that keeps what another one selected, in the first call of each layer and step."""

    def __init__(self, inner: Any, kept: dict[tuple[int, int], Recorded]) -> None:
        self.inner, self.kept = inner, kept

    def select(self, query: Any, key: Any, context: Any) -> Selection:
        selection = self.inner.select(query, key, context)
        place = (context.step_index or 0, context.layer_index)
        self.kept.setdefault(place, Recorded(selection, context.layout, *place))
        return selection


def record(settings: GenerateSettings) -> dict[tuple[int, int], Recorded]:
    """Generate once, without decoding, and return every selection by (step, layer).

    Args:
        settings: prompt, shape, method and its options.

    Raises:
        ConfigError: the method selects nothing, or every call was dense.
    """
    from .model_info import inspect_model

    info = inspect_model(settings.model)
    settings, _ = resolve_settings(settings, info)
    processor = processor_class(settings.sparse)(**{"min_tokens": 0, **settings.method_options})
    kept: dict[tuple[int, int], Recorded] = {}
    original = processor.parts

    def parts(self: Any, layout: TokenLayout, device: Any) -> tuple[Parts, str | None]:
        from dataclasses import replace

        found, note = original(layout, device)
        if found.selector is None:
            return found, note
        return replace(found, selector=_Recorder(found.selector, kept)), note

    processor.parts = types.MethodType(parts, processor)
    loaded = load_pipeline(info, dtype=settings.dtype, device=settings.device, flow_shift=settings.flow_shift)
    loaded.pipe.set_progress_bar_config(disable=True)
    loaded.pipe.transformer.set_attn_processor(processor)
    run = _Run(settings, info.folder)
    loaded.pipe(**_call_arguments(run, loaded), output_type="latent")
    if not kept:
        raise ConfigError(
            f"No call of {settings.num_inference_steps} steps selected blocks; give more --steps or fewer --warmup-steps."
        )
    return kept
