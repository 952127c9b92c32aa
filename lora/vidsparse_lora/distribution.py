"""Several processes: batches shared out (DDP), frozen weights shared out (FSDP2), sequences shared out (Ulysses).

What is trained, a LoRA, is small: every process holds it whole and averages its gradients, so that optimizer, running
average, checkpoints and the adapter's file are those of one process. FSDP2 shares out the frozen weights alone, which are
nearly all of the memory, and so composes with the other two.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidsparse.errors import ConfigError
from vidsparse_pipelines.ranks import split_model


@dataclass(frozen=True)
class Distribution:
    """Which share of the work is this process's.

    Attributes:
        world: number of processes.
        rank: of this one.
        sequence: processes that share each sequence; neighbours by rank.
        fsdp: accelerate's settings of FSDP2, None where every process holds all weights.
    """

    world: int = 1
    rank: int = 0
    sequence: int = 1
    fsdp: Any = None

    @property
    def groups(self) -> int:
        """Batches in one forward of all processes."""
        return self.world // self.sequence

    @property
    def group(self) -> int:
        """Which of these is this process's."""
        return self.rank // self.sequence

    @property
    def place(self) -> int:
        """Of this process among those that share its batch."""
        return self.rank % self.sequence

    @property
    def together(self) -> bool:
        """Whether a forward needs all processes."""
        return self.sequence > 1 or self.fsdp is not None

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over processes."""
        if self.world > 1:
            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Gradients of the mean loss over all batches: a sum over the processes of a sequence, a mean over batches."""
        found = [p for p in parameters if p.grad is not None]
        if self.world == 1 or not found:
            return
        grads: list[Any] = [p.grad for p in found]
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat)
        flat /= self.groups
        for parameter, part in zip(found, flat.split([grad.numel() for grad in grads]), strict=True):
            parameter.grad = part.view_as(parameter)


def distribution_of(accelerator: Any, sequence: int) -> Distribution:
    """What accelerate was launched for.

    Args:
        accelerator: accelerate's.
        sequence: the setting `context_parallel`.

    Raises:
        ConfigError: for something that training cannot do, or for another number of processes than it takes.
    """
    kind, world = str(accelerator.distributed_type.value), accelerator.num_processes
    if accelerator.parallelism_config is not None:
        raise ConfigError(
            "accelerate was set up with a parallelism_config, whose context parallelism replaces torch's dense attention "
            "and leaves block lists out; launch without it and set `context_parallel` to the number of GPUs that share a "
            "sequence."
        )
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP"):
        raise ConfigError(
            f"accelerate was set up for {kind}, which wraps model and optimizer as one, and training switches adapters "
            "inside the model; launch with configs/accelerate/ddp.yaml or fsdp2.yaml."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > world:
        raise ConfigError(
            f"{started} processes were started and accelerate joined {world}, as it does without a GPU; set `device` to 'cpu' "
            "to train on the CPU with several."
        )
    if world % sequence:
        raise ConfigError(
            f"`context_parallel` {sequence} does not divide the {world} processes that were started; launch a multiple of "
            f"{sequence} by `accelerate launch --num_processes`."
        )
    # accelerate itself passes over FSDP where there is no GPU.
    sharded = world > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    fsdp = _fsdp(accelerator) if sharded else None
    return Distribution(world, accelerator.process_index, sequence, fsdp)


def _fsdp(accelerator: Any) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"accelerate was set up for FSDP version {plugin.fsdp_version}, which flattens frozen and trained weights into "
            "one; set `fsdp_version: 2`, as configs/accelerate/fsdp2.yaml does."
        )
    # With it transformers would read the text encoder's weights on the first process alone.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return plugin


def share_sequences(model: Any, distribution: Distribution, device: torch.device) -> None:
    """Let neighbouring processes share each sequence of a transformer.

    Raises:
        ConfigError: diffusers cannot split this model, or not over so many.
    """
    sequence = distribution.sequence
    if sequence == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh

    heads = getattr(model.config, "num_attention_heads", sequence)
    if heads % sequence:
        raise ConfigError(
            f"`context_parallel` {sequence} does not divide the model's {heads} attention heads, of which each process "
            "takes as many as the others; choose one that does."
        )
    shape = (distribution.groups, 1, sequence)
    split_model(
        model, sequence, device, init_device_mesh(device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))
    )


def share_weights(
    model: Any, distribution: Distribution, device: torch.device, trained: Iterable[torch.nn.Parameter]
) -> None:
    """Share out a transformer's frozen weights over all processes: block by block, then what is left.

    Weights may come from the CPU; what is `trained` stays whole on every process.
    """
    fsdp = distribution.fsdp
    if fsdp is None:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distribution.world,))
    ignored = set(trained)
    for parameter in ignored:
        parameter.data = parameter.data.to(device)
    blocks = set(getattr(model, "_repeated_blocks", None) or model._no_split_modules or ())
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": fsdp.cpu_offload, "ignored_params": ignored}
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, reshard_after_forward=bool(fsdp.reshard_after_forward), **options)
    fully_shard(model, **options)
