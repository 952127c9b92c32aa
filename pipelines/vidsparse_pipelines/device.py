"""Choose device, number format and offloading from what the machine has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vidsparse.errors import ConfigError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
OFFLOADS = ("none", "model", "group", "sequential", "auto")
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}


def dtype_name(value: str) -> str:
    """Normalise `bf16`, `fp32`, … to torch's names. Raises ConfigError on an unknown one."""
    name = _ALIASES.get(value.lower(), value.lower())
    if name not in DTYPES:
        raise ConfigError(f"The dtype {value!r} is unknown; use one of {', '.join(DTYPES)}.")
    return name


def resolve_device(device: str) -> torch.device:
    """`auto` is the first CUDA GPU, else the CPU.

    Raises:
        ConfigError: unknown device, or CUDA asked for and not there.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"The device {device!r} is unknown; use auto, cpu, cuda or cuda:N.") from error
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"The device {device!r} is not supported; use auto, cpu, cuda or cuda:N.")
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            build = (
                "this torch is a CPU-only build" if torch.version.cuda is None else "no usable NVIDIA GPU was found"
            )
            raise ConfigError(f"The device {device!r} was asked for but {build}; use --device cpu or auto.")
        if resolved.index is not None and resolved.index >= torch.cuda.device_count():
            raise ConfigError(
                f"The device {device!r} does not exist; this machine has {torch.cuda.device_count()} GPU(s)."
            )
    return resolved


def cpu_has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware tiles (AMX).

    Elsewhere bf16 is emulated or gains little over fp32 and loses accuracy. Detected from the CPU's flags, not timed, so
    that the same machine always makes the same choice and a seed gives the same video.
    """
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Transformer and text encoder dtype. `auto`: bf16 on CUDA and on CPUs where it is faster, else fp32."""
    import torch

    name = dtype_name(name)
    if name == "auto":
        fast = device.type == "cuda" or cpu_has_fast_bfloat16()
        name = "bfloat16" if fast else "float32"
    if name == "float16" and device.type == "cpu":
        raise ConfigError("The dtype float16 is not supported on the CPU; use bfloat16, float32 or auto.")
    return getattr(torch, name)


def resolve_vae_dtype(pipeline_class: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The VAE's dtype: fp32 for Wan on CUDA (bf16 shows in flat areas and decoding is a small part of the time there)."""
    import torch

    return torch.float32 if pipeline_class.startswith("Wan") and device.type == "cuda" else dtype


def resolve_offload(name: str, device: torch.device, component_bytes: dict[str, int], free_bytes: int | None) -> str:
    """Choose how components move between CPU and GPU memory.

    `auto` keeps everything on the GPU if the weights take at most 70 % of what is free (the rest is for activations),
    moves whole components in turn (`model`) if the largest takes at most 70 %, and else streams layers (`group`).

    Args:
        name: one of `OFFLOADS`.
        device: the device to compute on; on the CPU there is nothing to offload.
        component_bytes: bytes of weights per component.
        free_bytes: free GPU memory, None on the CPU.
    """
    if name not in OFFLOADS:
        raise ConfigError(f"The offload mode {name!r} is unknown; use one of {', '.join(OFFLOADS)}.")
    if device.type == "cpu" or free_bytes is None:
        if name in ("none", "auto"):
            return "none"
        raise ConfigError(
            f"Offloading ({name!r}) moves weights between GPU and CPU memory and needs a GPU; use --offload none."
        )
    if name != "auto":
        return name
    room = 0.7 * free_bytes
    if sum(component_bytes.values()) <= room:
        return "none"
    return "model" if max(component_bytes.values(), default=0) <= room else "group"
