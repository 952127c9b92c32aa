"""apply: attach a method to a whole pipeline, and the handle that reports and undoes it."""

from __future__ import annotations

import weakref
from typing import Any

from vidsparse.errors import UnsupportedModelError
from vidsparse.layout import LatentGrid
from vidsparse.methods import processor_class
from vidsparse.plan import Plan
from vidsparse.processors.base import SparseProcessor
from vidsparse.recipe import Recipe
from vidsparse.report import Report

TRANSFORMERS = ("transformer", "transformer_2")


def apply(target: Any, method: str | Recipe = "radial", *, strict: bool = False, **options: Any) -> Handle:
    """Make the video self-attention of a pipeline sparse.

    Args:
        target: a diffusers pipeline (all its transformers are bound and share one run) or one transformer.
        method: name of a method, or a recipe.
        strict: raise DenseFallbackError instead of running dense, or slowly on a GPU, where the recipe does not ask
            for it.
        options: fields of the method's config and of `Schedule`, such as `density`, `warmup_steps`, `dense_layers`.

    Returns:
        A handle with the report, the plan and the way back.

    Raises:
        ConfigError: method or option unknown or out of range.
        UnsupportedModelError: the model's family is not supported; the message lists those that are.

    Example:
        >>> handle = vidsparse.apply(pipe, "radial", density=0.3)
        >>> video = pipe("a cat on a skateboard").frames
        >>> print(handle.report())
        >>> handle.remove()
    """
    import torch

    from vidsparse.processors.binding import bind, check_model
    from vidsparse.processors.context import RunState

    name = method.method if isinstance(method, Recipe) else method
    recipe = method if isinstance(method, Recipe) else None
    processor = processor_class(name)(recipe, strict=strict, **options)
    if isinstance(target, torch.nn.Module):
        models = {"transformer": _inner(target)}
    else:
        models = {
            name: _inner(module)
            for name in TRANSFORMERS
            if isinstance(module := getattr(target, name, None), torch.nn.Module)
        }
    if not models:
        raise UnsupportedModelError(f"{type(target).__name__} has no transformer; give a pipeline or a transformer.")
    for model in models.values():
        check_model(model)
    run = RunState(None if isinstance(target, torch.nn.Module) else _StepCount(target))
    bindings = {
        label: bind(processor, model, run=run, label=label if len(models) > 1 else "")
        for label, model in models.items()
    }
    return Handle(processor, models, bindings)


class Handle:
    """A method attached to the transformers of one pipeline.

    Attributes:
        processor: the processor that was bound.
        recipe: its method and settings.
    """

    def __init__(self, processor: SparseProcessor, models: dict[str, Any], bindings: dict[str, Any]) -> None:
        self.processor = processor
        self.recipe = processor.recipe
        self._models, self._bindings = models, bindings
        self._run = next(iter(bindings.values())).run

    def report(self) -> Report:
        """What ran in the last (or current) generation."""
        return self._run.report

    def reset(self) -> None:
        """Forget step, masks and report, as if nothing had run."""
        self._run.reset()
        self._run.parts.clear()
        self._run.forget()
        self._run.report.clear()

    def remove(self) -> None:
        """Put the model back as it was; the report stays readable. Harmless when already removed or replaced."""
        from vidsparse.processors.binding import BINDING

        for label, model in self._models.items():
            if vars(model).get(BINDING) is self._bindings[label]:
                self._bindings[label].detach(model)

    def is_dense_step(self, step_index: int, num_steps: int) -> bool:
        """Whether every layer of a step runs dense, for an estimate of the time left."""
        return self.processor.always_dense or self.recipe.schedule.is_dense_step(step_index, num_steps)

    def describe(self, grid: LatentGrid, num_steps: int) -> Plan:
        """Expected density of every layer and step of a generation on `grid`, before running it.

        The device is the one that the weights are on now, the dtype theirs.
        """
        import torch

        num_layers = max(len(binding.layers) for binding in self._bindings.values())
        weights = next(next(iter(self._models.values())).parameters())
        heads = next(iter(self._bindings.values())).heads(next(iter(self._models.values())))
        device = weights.device
        is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
        return self.processor.plan(grid, num_steps, num_layers, device.type, weights.dtype, heads, is_hopper)


class _StepCount:
    """The number of steps as the pipeline knows it, for diffusers versions that do not pass it to the model."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)

    def __call__(self) -> int | None:
        pipeline = self._pipeline()
        return getattr(pipeline, "_num_timesteps", None) if pipeline is not None else None


def _inner(module: Any) -> Any:
    """The module itself, also when it is wrapped by torch.compile."""
    return getattr(module, "_orig_mod", module)
