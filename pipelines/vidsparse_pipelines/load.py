"""Load a diffusers pipeline: weights, number format, device, offloading, LoRAs, scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vidsparse.errors import ConfigError, ModelLoadError

from .bundled import BUNDLED_MODEL
from .device import resolve_device, resolve_dtype, resolve_offload, resolve_vae_dtype
from .lora import LoraSpec, check_lora_files, load_loras
from .model_info import ModelInfo, inspect_model, looks_like_folder, unreachable
from .ranks import split_over_ranks
from .weights import check_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline ready to run, and what was chosen for it.

    Args:
        pipe: the diffusers pipeline.
        info: what `inspect_model` found.
        device: where it computes.
        dtype, vae_dtype: number formats of the transformer and of the VAE.
        offload: `none`, `model`, `group` or `sequential`.
        flow_shift: the scheduler's shift, None where it has none.
    """

    pipe: Any
    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    offload: str
    flow_shift: float | None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def set_flow_shift(pipe: Any, flow_shift: float | None) -> float | None:
    """Rebuild the scheduler with `flow_shift`; None leaves it. Returns the shift in effect, None if it has none.

    Raises:
        ConfigError: the scheduler has no shift to set.
    """
    config = pipe.scheduler.config
    key = next((k for k in ("flow_shift", "shift") if k in config), None)
    if flow_shift is None:
        return None if key is None else config[key]
    if key is None:
        raise ConfigError(
            f"This model's scheduler ({type(pipe.scheduler).__name__}) has no flow shift; leave --flow-shift out."
        )
    pipe.scheduler = type(pipe.scheduler).from_config(config, **{key: float(flow_shift)})
    return float(flow_shift)


def _dtype_argument() -> str:
    """diffusers renamed `torch_dtype` to `dtype`; the old name warns where the new one exists."""
    from diffusers.utils import deprecation_utils

    return "dtype" if hasattr(deprecation_utils, "_TORCH_DTYPE_DEPRECATION_MESSAGE") else "torch_dtype"


def _read_pipeline(info: ModelInfo, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
    import diffusers

    pipeline_class = getattr(diffusers, info.pipeline_class, None)
    if pipeline_class is None:
        raise ModelLoadError(
            f"{info.pipeline_class} is not in the installed diffusers {diffusers.__version__}; upgrade diffusers."
        )
    local = info.name == BUNDLED_MODEL or looks_like_folder(info.name)
    if local:
        check_weights(info.folder, info.components)
    source = str(info.folder) if local else info.name
    try:
        return pipeline_class.from_pretrained(source, **{_dtype_argument(): {"default": dtype, "vae": vae_dtype}})
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if not local and isinstance(error, (OSError, ConnectionError)):
            raise unreachable(info.name, error) from error
        raise ModelLoadError(f"The pipeline in {source!r} cannot be loaded ({_first_line(error)}).") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is torch's or Python's way to say that memory ran out, on the GPU or the CPU."""
    import torch

    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)


def _component_bytes(pipe: Any) -> dict[str, int]:
    import torch

    return {
        name: sum(p.numel() * p.element_size() for p in part.parameters())
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }


def _place(pipe: Any, offload: str, device: torch.device, on_cpu: tuple[str, ...] = ()) -> None:
    import torch

    if on_cpu:
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module) and name not in on_cpu:
                part.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        from diffusers.hooks.group_offloading import apply_group_offloading

        for name, part in pipe.components.items():
            if not isinstance(part, torch.nn.Module):
                continue
            if name == "vae":
                part.to(device)
            else:
                apply_group_offloading(
                    part,
                    onload_device=device,
                    offload_device=torch.device("cpu"),
                    offload_type="leaf_level",
                    use_stream=True,
                )
    else:
        pipe.to(device)


def load_pipeline(
    model: str | ModelInfo,
    *,
    dtype: str = "auto",
    device: str = "auto",
    offload: str = "auto",
    vae_tiling: bool = False,
    compile: bool = False,
    loras: tuple[LoraSpec, ...] = (),
    flow_shift: float | None = None,
    ulysses_degree: int = 1,
    on_cpu: tuple[str, ...] = (),
) -> LoadedPipeline:
    """Load a pipeline ready to generate.

    Args:
        model: bundled name, local diffusers folder, hub id, or the result of `inspect_model`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        offload: `none`, `model`, `group`, `sequential`, `auto`.
        vae_tiling: decode in overlapping tiles to save memory.
        compile: compile the transformer's repeated blocks.
        loras: adapters to attach.
        flow_shift: timestep shift; None keeps the model's own.
        ulysses_degree: processes that share tokens and heads; each of them must call this.
        on_cpu: components that are left on the CPU, for a caller that places them; the others go to the device.

    Raises:
        ModelLoadError, UnsupportedModelError, ConfigError: one sentence each.
    """
    import torch

    info = inspect_model(model) if isinstance(model, str) else model
    resolved_device = resolve_device(device)
    resolved_dtype = resolve_dtype(dtype, resolved_device)
    vae_dtype = resolve_vae_dtype(info.pipeline_class, resolved_dtype, resolved_device)
    check_lora_files(loras)
    pipe = _read_pipeline(info, resolved_dtype, vae_dtype)
    shift = set_flow_shift(pipe, flow_shift)
    load_loras(pipe, loras)
    free = torch.cuda.mem_get_info(resolved_device)[0] if resolved_device.type == "cuda" else None
    mode = resolve_offload(offload, resolved_device, _component_bytes(pipe), free)
    _place(pipe, mode, resolved_device, on_cpu)
    if ulysses_degree > 1:
        split_over_ranks(pipe, ulysses_degree, resolved_device)
    if vae_tiling:
        if not hasattr(pipe.vae, "enable_tiling"):
            raise ConfigError(f"This model's VAE ({type(pipe.vae).__name__}) has no tiling; leave --vae-tiling out.")
        pipe.vae.enable_tiling()
    if compile:
        if not getattr(pipe.transformer, "_repeated_blocks", None):
            raise ConfigError(
                f"{type(pipe.transformer).__name__} cannot be compiled block by block; leave --compile out."
            )
        pipe.transformer.compile_repeated_blocks()
    return LoadedPipeline(pipe, info, resolved_device, resolved_dtype, vae_dtype, mode, shift)
