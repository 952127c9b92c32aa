"""`vidsparse doctor`: what is installed, what runs here and what does not, with the reason."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError

REQUIRED = {
    "torch": "2.7",
    "diffusers": "0.36",
    "transformers": "4.57",
    "accelerate": "1.6",
    "peft": "0.17",
    "numpy": "1.26",
    "imageio-ffmpeg": "0.5",
}
"""Least versions, as in pyproject.toml."""

OPTIONAL = {
    "triton": ("triton", "the GPU kernels"),
    "matplotlib": ("matplotlib", "pictures of `vidsparse show`"),
    "torchmetrics": ("torchmetrics", "tests"),
    "lpips": ("lpips", "LPIPS in `vidsparse compare`"),
    "flash-attn": ("flash_attn", "a dense backend of diffusers: flash"),
    "flash-attn-4": ("flash_attn.cute", "the sparse backend flash4"),
    "sageattention": ("sageattention", "a dense backend of diffusers: sage"),
    "xformers": ("xformers", "a dense backend of diffusers: xformers"),
    "kernels": ("kernels", "dense backends of diffusers from the Hub: flash_hub, sage_hub"),
}
"""Distribution name -> import name and what it is for."""


def run(*, device: str, seconds: float, as_json: bool) -> int:
    """Print what was found. Returns 0, or 1 where something must be mended.

    Raises:
        ConfigError: unknown device, or no torch at all.
    """
    if find_spec("torch") is None:
        raise ConfigError("torch is not installed; run pip install torch.")
    if not seconds > 0:
        raise ConfigError(f"--seconds must be above 0, got {seconds:g}.")
    found = examine(device, seconds)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print(found)
    return 1 if found["problems"] else 0


def examine(device: str, seconds: float) -> dict[str, Any]:
    """Environment, packages, backends, the self-test, families and methods, problems; plain values.

    Raises:
        ConfigError: unknown device.
    """
    from vidsparse_pipelines.device import resolve_device
    from vidsparse_pipelines.environment import device_name, environment, package_version

    from . import self_test

    resolved = resolve_device(device)
    packages = {name: package_version(name) for name in (*REQUIRED, *OPTIONAL)}
    outcomes = [outcome.to_dict() for outcome in self_test.run(resolved, seconds)]
    problems = package_problems(packages) + _gpu_problems()
    problems += [f"{o['op']} on {o['backend']}: {o['reason']}" for o in outcomes if o["state"] == self_test.WRONG]
    return {
        "environment": environment(),
        "device": device_name(resolved),
        "packages": packages,
        "dense": _dense_backends(resolved),
        "self_test": outcomes,
        "families": _families(),
        "methods": _methods(),
        "problems": problems,
    }


def package_problems(packages: dict[str, str | None]) -> list[str]:
    """A sentence for every required package that is missing or too old."""
    problems = []
    for name, least in REQUIRED.items():
        have = packages.get(name)
        if have is None:
            problems.append(f"{name} is not installed: pip install '{name}>={least}'")
        elif _numbers(have) < _numbers(least):
            problems.append(f"{name} {have} is too old: pip install '{name}>={least}'")
    return problems


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def _gpu_problems() -> list[str]:
    import torch

    if torch.cuda.is_available() or not Path("/proc/driver/nvidia/version").exists():
        return []
    if torch.version.cuda is None:
        return ["an NVIDIA driver is there but this torch is a CPU-only build: see pytorch.org for the CUDA one"]
    return [f"an NVIDIA driver is there but torch {torch.__version__} finds no usable GPU: check nvidia-smi"]


def _dense_backends(device: Any) -> dict[str, str | None]:
    """torch's dense kernels: name -> None where it runs, else why not."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.zeros(1, 2, 256, 64, device=device, dtype=dtype)
    kinds = {
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    found: dict[str, str | None] = {}
    for name, kind in kinds.items():
        try:
            import warnings

            with warnings.catch_warnings(), sdpa_kernel(kind):
                warnings.simplefilter("ignore")
                torch.nn.functional.scaled_dot_product_attention(x, x, x)
            found[name] = None
        except RuntimeError as error:
            found[name] = "needs a GPU" if device.type == "cpu" else str(error).splitlines()[0].rstrip(".")
    return found


def _families() -> dict[str, list[str]]:
    """Family -> transformer classes that the installed diffusers has."""
    import importlib

    from vidsparse.processors.families import FAMILIES

    try:
        known = set(dir(importlib.import_module("diffusers")))
    except ImportError:
        known = set()
    return {family.name: [name for name in family.model_classes if name in known] for family in FAMILIES}


def _methods() -> list[str]:
    from vidsparse.methods import PROCESSORS

    return list(PROCESSORS)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    from . import self_test

    console = Console(highlight=False, soft_wrap=True)

    def line(text: str = "") -> None:
        console.print(text, markup=False)

    env = found["environment"]
    line(f"vidsparse {env['vidsparse']}, Python {env['python']}, {env['platform']}")
    line(f"tested on: {found['device']}")
    for gpu in env["gpus"]:
        line(f"GPU: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory'] / 2**30:.0f} GiB")
    if not env["gpus"]:
        line("GPU: none that torch can use")
    line("\nPackages")
    for name, version in found["packages"].items():
        use = "" if version or name not in OPTIONAL else f"not installed; for {OPTIONAL[name][1]}: pip install {name}"
        line(f"  {name:16} {version or use or 'not installed'}")
    line("\nDense attention of torch")
    for name, reason in found["dense"].items():
        line(f"  {name:18} {'runs' if reason is None else f'no: {reason}'}")
    line("\nKernels against plain torch on a tiny shape")
    for outcome in found["self_test"]:
        state = outcome["state"]
        detail = f"{outcome['seconds']:.2f} s" if state == self_test.RUNS else outcome["reason"]
        line(f"  {outcome['op']:32} {outcome['backend']:16} {state}: {detail}")
    families = [f"{name} (newer diffusers)" if not classes else name for name, classes in found["families"].items()]
    line(f"\nModel families: {', '.join(families)}")
    line(f"Methods: {', '.join(found['methods'])}")
    if not found["problems"]:
        line("\nAll well.")
        return
    line(f"\n{len(found['problems'])} problem(s):")
    for problem in found["problems"]:
        line(f"  {problem}")
