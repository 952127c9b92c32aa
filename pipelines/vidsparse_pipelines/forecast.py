"""What a generation will take, before any weight is loaded: densities, FLOPs, memory, time and what can be gained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from vidsparse.break_even import CallShape
from vidsparse.errors import ConfigError
from vidsparse.methods import processor_class
from vidsparse.plan import Plan
from vidsparse.processors.base import UNKNOWN_DENSITY

from .costs import MASKED_DENSE, ModelShape
from .rates import Rates

WORTH_IT = 1.05
"""Below this speed-up sparse attention does not help: estimates are not that exact, and quality is given for it."""


@dataclass(frozen=True)
class Forecast:
    """A generation as it is expected to go. Times are of denoising: without text encoder and VAE.

    Attributes:
        model: name.
        num_frames, height, width, num_steps, guidance_scale: the shape that would be generated.
        notes: what was changed or assumed, in sentences.
        plan: densities by layer and step.
        density: of a sparse call, None where every call is dense.
        tokens: of one call, text included.
        linear_flops, attention_flops: of one forward of one sample, dense.
        sparse_attention_flops: of a sparse call in every layer.
        dense_flops, expected_flops: of the whole denoising.
        memory: bytes by part, roughly.
        seconds_dense, seconds_expected: of the whole denoising, by the model as it is and by the method.
        attention_share: of the time of the dense run.
        ceiling: speed-up if the calls that may be sparse took no time (Amdahl).
        verdict: one sentence.
        helps: whether sparse attention is worth it here.
        rates: speeds used.
    """

    model: str
    num_frames: int
    height: int
    width: int
    num_steps: int
    guidance_scale: float
    notes: tuple[str, ...]
    plan: Plan
    density: float | None
    num_heads: int
    head_dim: int
    tokens: int
    linear_flops: float
    attention_flops: float
    dense_flops: float
    expected_flops: float
    memory: dict[str, int | None]
    seconds_dense: float
    seconds_expected: float
    attention_share: float
    ceiling: float
    verdict: str
    helps: bool
    rates: Rates

    @property
    def speedup(self) -> float:
        return self.seconds_dense / self.seconds_expected

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "plan": self.plan.to_dict(), "speedup": self.speedup}


def forecast(
    shape: ModelShape,
    rates: Rates,
    *,
    sparse: str = "radial",
    options: dict[str, Any] | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    itemsize: int | None = None,
) -> Forecast:
    """Work out a generation.

    Args:
        shape: the model.
        rates: of the device.
        sparse: method.
        options: of the method and its schedule.
        num_frames, height, width, num_steps, guidance_scale: None: the model's preset.
        itemsize: bytes of a number; None: 2 on a GPU, 4 on a CPU.

    Raises:
        ConfigError: the size or an option does not fit.
    """
    import torch

    info, preset = shape.info, shape.info.preset
    frames = preset.num_frames if num_frames is None else num_frames
    height, width = height or preset.height, width or preset.width
    steps = num_steps or preset.num_inference_steps
    guidance = preset.guidance_scale if guidance_scale is None else guidance_scale
    itemsize = itemsize or (2 if rates.is_gpu else 4)
    notes: list[str] = []
    info.check_size(height, width)
    if info.temporal == 1 and frames != 1:
        raise ConfigError(f"{info.name} makes images; leave --frames out.")
    snapped = info.snap_frames(frames)
    if snapped != frames:
        notes.append(f"{frames} frames become {snapped}: {info.frame_reason()}.")
    info.check_length(snapped, height, width)
    grid = shape.grid(snapped, height, width)
    processor = processor_class(sparse)(**(options or {}))
    layout = processor.layout(grid, *shape.facts.text)
    parts, note = processor.parts_with_reuse(layout, "cpu")
    if note:
        notes.append(f"{note}.")
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    heads = (shape.num_heads, shape.head_dim)
    ours = rates.is_hopper and dtype == torch.bfloat16 and not shape.facts.masked
    plan = processor.plan(grid, steps, shape.num_layers, rates.device_type, dtype, heads, ours)
    call = CallShape(1, shape.num_heads, layout.seq_len, shape.head_dim)
    density = parts.block_mask.density if parts.block_mask is not None else parts.density
    if density is None:
        density = UNKNOWN_DENSITY
        notes.append(f"the density depends on the video; {density:g} is assumed for the time.")
    dense_cost = processor.dense_cost(call, ours)
    slow = None
    if not processor.always_dense:
        slow = processor.slow_reason(parts, call, rates.device_type, dtype, dense_cost)
    if dense_cost < 1:
        dense_cost = min(1.0, rates.relative(call, 1.0))
        notes.append(f"dense calls run on our kernel, in {dense_cost:.2f} of the time of the model's own attention.")
    selects = parts.selector is not None
    sparse_cost = rates.relative(
        call, density, selects=selects, overhead=parts.overhead, factor=parts.factor, call_seconds=parts.call_seconds
    )
    if not rates.is_gpu and parts.is_static and parts.block_mask is not None:
        from vidsparse_kernels.block_sparse_attention.sdpa import relative_cost as cost_on_cpu

        sparse_cost = cost_on_cpu(parts.block_mask, dtype)
    elif not rates.is_gpu and slow is None and not processor.always_dense:
        notes.append("what selecting blocks costs on a CPU is not known, and not in the time.")

    schedule = processor.recipe.schedule

    def may_be_sparse(step: int, layer: int) -> bool:
        dense = processor.always_dense or schedule.dense_reason(step, steps, layer, layout.seq_len)
        return not dense

    # A selection whose density the video decides has its upper bound in the plan; the estimate is worth more here.
    cells = tuple(
        tuple(density if may_be_sparse(s, layer) and not slow else 1.0 for s in range(steps))
        for layer in range(shape.num_layers)
    )
    plan = replace(plan, density=cells)
    eligible = sum(may_be_sparse(s, layer) for s in range(steps) for layer in range(shape.num_layers))
    share_eligible = eligible / (steps * shape.num_layers)
    share_sparse = 0.0 if slow else share_eligible
    linear, attention = shape.linear_flops(grid), shape.attention_flops(grid)
    attention_s = attention / rates.attention_rate(shape.head_dim)
    dense_attention_s = attention_s * (MASKED_DENSE if shape.facts.masked and rates.is_gpu else 1.0)
    other_s = linear / rates.matmul + shape.elementwise_bytes(grid, itemsize) / rates.bandwidth
    forwards = steps * shape.passes(guidance)
    dense_s = forwards * (dense_attention_s + other_s)
    kept_dense_s = dense_attention_s * (1 - share_sparse) * dense_cost
    expected_s = forwards * (other_s + kept_dense_s + attention_s * share_sparse * sparse_cost)
    ceiling = (dense_attention_s + other_s) / (other_s + dense_attention_s * (1 - share_eligible) * dense_cost)
    attention_share = dense_attention_s / (dense_attention_s + other_s)
    speedup = dense_s / expected_s
    # What our kernel for dense calls gains is not sparse attention's: it can be had alone, and costs no quality.
    sparse_gain = speedup * (dense_attention_s * dense_cost + other_s) / (dense_attention_s + other_s)
    helps = sparse_gain >= WORTH_IT
    return Forecast(
        model=info.name,
        num_frames=snapped,
        height=height,
        width=width,
        num_steps=steps,
        guidance_scale=guidance,
        notes=tuple(notes),
        plan=plan,
        density=density if share_sparse else None,
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        tokens=layout.seq_len,
        linear_flops=linear,
        attention_flops=attention,
        dense_flops=forwards * (linear + attention),
        expected_flops=forwards * (linear + attention * (1 - share_sparse + share_sparse * density)),
        memory=shape.memory(grid, itemsize, guidance),
        seconds_dense=dense_s,
        seconds_expected=expected_s,
        attention_share=attention_share,
        ceiling=ceiling,
        verdict=_verdict(sparse, helps, speedup, sparse_gain, ceiling, attention_share, share_eligible, slow),
        helps=helps,
        rates=rates,
    )


def _verdict(
    sparse: str,
    helps: bool,
    speedup: float,
    gain: float,
    ceiling: float,
    share: float,
    eligible: float,
    slow: str | None,
) -> str:
    """`gain` and what is said where nothing helps are over a dense run with the same kernel for dense calls."""
    if helps:
        return f"Sparse attention ({sparse}) should make denoising {speedup:.2f} times as fast, {ceiling:.2f} at most."
    if eligible == 0:
        why = "with these settings every call is dense"
    elif slow is not None:
        why = slow
    elif ceiling * gain / speedup < WORTH_IT:
        why = f"attention that may be sparse takes too little of the time ({share * eligible:.0%})"
    elif gain < 1:
        why = f"a sparse call takes longer than a dense one ({gain:.2f} times as fast in all)"
    else:
        why = f"{gain:.2f} times as fast is within the error of the estimate; try a lower --density"
    return f"Sparse attention will not help here: {why}."


def choose_rates(model_is_bundled: bool, device: str, load: Callable[[str], Rates]) -> tuple[Rates, str | None]:
    """Rates for `auto`: the GPU here; without one the CPU for the bundled model and an H200 for the others.

    Returns:
        The rates and a note, or None.
    """
    import torch

    if device == "auto" and not torch.cuda.is_available() and not model_is_bundled:
        return load("h200"), "there is no GPU here, so times are those of an H200; --device cpu is for this machine."
    return load(device), None
