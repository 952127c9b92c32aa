"""Several processes that make one video: each computes its share of the attention heads (Ulysses, by diffusers)."""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vidsparse.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from .settings import GenerateSettings

# Processes wait for the first one while it decodes and writes.
TIMEOUT = datetime.timedelta(hours=6)


def num_processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first(degree: int) -> bool:
    """Whether this process is the one that decodes, writes and prints."""
    if degree == 1:
        return True
    import torch.distributed as dist

    return dist.get_rank() == 0


def check_processes(degree: int, device: str) -> None:
    """Fail before any work where there are not as many processes, or GPUs for them, as `degree` says.

    Raises:
        ConfigError: one sentence.
    """
    if degree == 1:
        return
    import torch
    import torch.distributed as dist

    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else num_processes()
    if count != degree:
        raise ConfigError(
            f"--ulysses-degree {degree} needs {degree} processes, but there "
            f"{'is 1' if count == 1 else f'are {count}'}; give --num-gpus {degree} instead, or start with "
            f"`torchrun --nproc-per-node {degree} -m vidsparse.cli generate …`."
        )
    if device.startswith("cuda:"):
        raise ConfigError(f"--device {device} is one GPU for {degree} processes; leave it out, each takes its own.")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if device != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() < local:
        raise ConfigError(f"{local} processes need {local} GPUs, but this machine has {torch.cuda.device_count()}.")


@contextmanager
def joined(degree: int, device: torch.device) -> Iterator[None]:
    """Be one of `degree` processes that can talk to each other; nothing for one."""
    if degree == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        if mine:
            dist.destroy_process_group()


def with_same_seeds(batch: Sequence[GenerateSettings]) -> list[GenerateSettings]:
    """Settings whose missing seeds the first process drew for all."""
    import torch
    import torch.distributed as dist

    seeds: list[Any] = [random.SystemRandom().randrange(2**31) if s.seed is None else s.seed for s in batch]
    dist.broadcast_object_list(seeds, src=0, device=torch.device("cpu"))
    return [settings.with_(seed=seed) for settings, seed in zip(batch, seeds, strict=True)]


def split_over_ranks(pipe: Any, degree: int, device: torch.device) -> None:
    """Let each transformer of a pipeline share its tokens and heads among `degree` processes.

    Raises:
        ConfigError: diffusers has no plan for this model.
    """
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if model is None:
            continue
        if getattr(model, "_cp_plan", None) is None:
            raise ConfigError(
                f"diffusers cannot split {type(model).__name__} over several devices; leave --num-gpus and "
                "--ulysses-degree out."
            )
        split_model(model, degree, device)


def split_model(model: Any, degree: int, device: torch.device, mesh: Any = None) -> None:
    """Let one transformer, for which diffusers has a plan, share its tokens and heads among `degree` processes.

    Args:
        model: the transformer.
        degree: number of processes that share a sequence.
        device: of this process.
        mesh: device mesh with the dimensions "ring" and "ulysses"; default all processes.
    """
    from diffusers import ContextParallelConfig  # pyright: ignore[reportPrivateImportUsage]

    config = ContextParallelConfig(ulysses_degree=degree, mesh=mesh)
    if device.type == "cpu":
        _enable_on_cpu(model, config, device)
    else:
        model.enable_parallelism(config=config)


def _enable_on_cpu(model: Any, config: Any, device: torch.device) -> None:
    """What `enable_parallelism` does, which itself asks for an accelerator."""
    import torch.distributed as dist
    from diffusers import ParallelConfig  # pyright: ignore[reportPrivateImportUsage]
    from diffusers.hooks.context_parallel import apply_context_parallel
    from torch.distributed.device_mesh import init_device_mesh

    mesh = config.mesh or init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    whole = ParallelConfig(context_parallel_config=config)
    whole.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = whole
    model._parallel_config = whole
    apply_context_parallel(model, config, model._cp_plan)


def indivisible(error: BaseException) -> bool:
    """Whether `error` is diffusers' way to say that the tokens cannot be shared evenly."""
    return isinstance(error, AssertionError) and "divisible by mesh size" in str(error)
