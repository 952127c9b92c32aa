"""Sparse attention under diffusers' context parallelism: Ulysses, an exchange of tokens for heads around each call.

Each rank of a group of W holds 1/W of the tokens in all heads. One all-to-all gives it all tokens in 1/W of the heads,
where a method sees the sequence that it knows; a second one after attention brings the output back. See DeepSpeed
Ulysses, https://arxiv.org/abs/2309.14509. Where heads compute unlike shares of the blocks, they are dealt out once in a
generation, by what they computed in its first sparse step, so that no rank waits long for another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from vidsparse.errors import ConfigError
from vidsparse.layout import TokenLayout
from vidsparse.parts import LayerMemory, Parts, Selection, pairs_of_heads

RING = "ring attention moves keys and values in shards that block lists do not follow; use `ulysses_degree` alone"
NO_PLAN = "context parallelism of a model for which diffusers has no plan"
TEXT_LAST = "context parallelism of text that stands after the video"


@dataclass(frozen=True)
class Shards:
    """How the tokens of one sequence lie on the ranks of a group, and which heads are this rank's.

    Attributes:
        group: name of the process group.
        rank: of this process in the group.
        sizes: tokens that each rank holds.
        num_heads: heads of the model's attention.
        order: int64 `[seq_len]`, the tokens rank after rank; None where that is the model's own order.
        inverse: int64 `[seq_len]`, where in `order` each token stands; None likewise.
        heads: all heads in the order of the ranks, rank r taking `heads_per_rank` of them from r * `heads_per_rank` on;
            None for the model's own order.
        head_order, head_inverse: int64 `[num_heads]`, `heads` and its inverse on the device; None likewise.
    """

    group: str
    rank: int
    sizes: tuple[int, ...]
    num_heads: int
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    heads: tuple[int, ...] | None = None
    head_order: torch.Tensor | None = None
    head_inverse: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens on this rank."""
        return self.sizes[self.rank]

    @property
    def heads_per_rank(self) -> int:
        return -(-self.num_heads // len(self.sizes))

    @property
    def local_heads(self) -> int:
        """Heads of this rank; the last rank may have fewer than the others."""
        return min(self.heads_per_rank, self.num_heads - self.rank * self.heads_per_rank)

    @property
    def own_heads(self) -> tuple[int, ...]:
        """Numbers of this rank's heads, in the order in which it has them."""
        first = self.rank * self.heads_per_rank
        heads = self.heads or tuple(range(self.num_heads))
        return heads[first : first + self.local_heads]

    def dealt(self, heads: tuple[int, ...] | None, device: torch.device) -> Shards:
        """With the heads in another order."""
        if heads is None:
            return self
        order, inverse = _head_order(heads, device)
        return replace(self, heads=heads, head_order=order, head_inverse=inverse)

    def of_this_rank(self, parts: Parts) -> Parts:
        """The parts whose mask has the heads of this rank only; a mask for all heads alike stays."""
        mask = parts.block_mask
        if mask is None or mask.num_heads == 1:
            return parts
        first = self.rank * self.heads_per_rank
        heads = slice(first, first + self.local_heads)
        offsets = {
            name: x if x is None or x.shape[1] == 1 else x[:, heads]
            for name, x in (("q_offsets", mask.q_offsets), ("kv_offsets", mask.kv_offsets))
        }
        counts, indices = (
            x if x.shape[1] == 1 else x[:, heads].contiguous() for x in (mask.kv_num_blocks, mask.kv_indices)
        )
        return replace(parts, block_mask=replace(mask, kv_num_blocks=counts, kv_indices=indices, **offsets, _cache={}))


def refusal(config: Any, model: Any, layout: TokenLayout) -> str | None:
    """Why a layer with this parallel config runs dense, by diffusers' own means; None where it can be sparse.

    Args:
        config: diffusers' `ParallelConfig`, as `enable_parallelism` leaves it on a processor; None without.
        model: the transformer.
        layout: of its sequence.
    """
    if config is None or config.context_parallel_config is None:
        return None
    if config.context_parallel_config.ring_degree > 1:
        return RING
    if getattr(type(model), "_cp_plan", None) is None:
        # The order of the tokens after the exchange would be a guess.
        return NO_PLAN
    if layout.text_after and not layout.text_before and _splits_text(model):
        return TEXT_LAST
    return None


def _splits_text(model: Any) -> bool:
    """Whether diffusers' plan splits text apart from the video, not the sequence of both."""
    inputs = (plan for plan in model._cp_plan.values() if isinstance(plan, dict))
    return any("encoder_hidden_states" in plan for plan in inputs)


def make_shards(config: Any, model: Any, layout: TokenLayout, num_heads: int, device: torch.device) -> Shards | None:
    """How a sequence is split under a parallel config that `refusal` finds nothing wrong with; None without.

    Args:
        config, model, layout: as in `refusal`.
        num_heads: of the model's attention.
        device: of the tensors to come.

    Raises:
        ConfigError: the heads cannot be split.
    """
    if config is None or config.context_parallel_config is None:
        return None
    settings = config.context_parallel_config
    world = settings.ulysses_degree
    per_rank = -(-num_heads // world)
    if num_heads % world and not getattr(settings, "ulysses_anything", False):
        raise ConfigError(
            f"`ulysses_degree` ({world}) does not divide the model's {num_heads} attention heads; choose one that does, "
            "or set `ulysses_anything`."
        )
    if (world - 1) * per_rank >= num_heads:
        raise ConfigError(f"`ulysses_degree` ({world}) leaves ranks without any of the model's {num_heads} heads.")
    mesh = settings._ulysses_mesh
    # A text that is split before it is concatenated; then the video with whatever reference images follow it.
    text = layout.text_before if _splits_text(model) else 0
    streams = tuple(n for n in (text, layout.seq_len - text) if n)
    return _shards(mesh.get_group().group_name, mesh.get_local_rank(), world, streams, num_heads, device)


@functools.lru_cache(maxsize=8)
def _shards(
    group: str, rank: int, world: int, streams: tuple[int, ...], num_heads: int, device: torch.device
) -> Shards:
    with torch.inference_mode(False):
        tokens = torch.arange(sum(streams))
        # Rank r holds part r of each stream, the streams one after another.
        parts = [stream.tensor_split(world) for stream in tokens.split(streams)]
        held = [torch.cat(of_rank) for of_rank in zip(*parts, strict=True)]
        sizes = tuple(len(x) for x in held)
        if len(streams) == 1:
            return Shards(group, rank, sizes, num_heads)
        order = torch.cat(held)
        return Shards(group, rank, sizes, num_heads, order.to(device), order.argsort().to(device))


@functools.lru_cache(maxsize=1024)
def _head_order(heads: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        order = torch.tensor(heads)
        return order.to(device), order.argsort().to(device)


def may_deal(parts: Parts, shards: Shards | None) -> bool:
    """Whether heads may compute unlike shares: the method takes as much as each head needs. Not with uneven ranks."""
    return (
        shards is not None
        and parts.selector is not None
        and parts.density is None
        and shards.num_heads % len(shards.sizes) == 0
        and shards.heads_per_rank > 1
    )


def deal(loads: list[float], ranks: int) -> tuple[int, ...]:
    """Heads by rank, as many for each: the heaviest first, always to the lightest rank that has room."""
    room = len(loads) // ranks
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for head in sorted(range(len(loads)), key=lambda h: -loads[h]):
        open_hands = [hand for hand in hands if len(hand) < room]
        min(open_hands, key=lambda hand: sum(loads[h] for h in hand)).append(head)
    return tuple(head for hand in hands for head in sorted(hand))


def note_loads(memory: LayerMemory | None, selection: Selection | None, shards: Shards | None) -> None:
    """Keep what each head of this rank computes, until the heads are dealt."""
    if memory is None or selection is None or shards is None or shards.heads is None:
        return
    if memory.heads is None and memory.loads is None:
        memory.loads = pairs_of_heads(selection.block_mask, shards.local_heads)


def deal_heads(memories: list[LayerMemory], shards: Shards) -> None:
    """Deal the heads of layers whose loads are known, the same on every rank, and bring centroids to their new rank.

    Waits for the device once. A selection that is kept is not moved: layers are dealt when they select anew.
    """
    memories = [memory for memory in memories if memory.loads is not None and memory.heads is None]
    if not memories:
        return
    # [ranks, layers, heads of a rank]
    loads = _gather(torch.stack([memory.loads for memory in memories if memory.loads is not None]), shards)
    for memory, of_ranks in zip(memories, loads.transpose(0, 1).flatten(1).tolist(), strict=True):
        memory.heads = deal(of_ranks, len(shards.sizes))
        for name in ("selection", "state"):
            memory.drop(name)
        centroids = memory.get("centroids")
        if centroids is not None:
            own = list(replace(shards, heads=memory.heads).own_heads)
            moved = tuple(_gather(x, shards).transpose(0, 1).flatten(1, 2)[:, own].contiguous() for x in centroids)
            memory.keep("centroids", moved, list(moved))


def mean_over_ranks(densities: list[torch.Tensor | float], shards: Shards, device_type: str) -> list[Any]:
    """Densities of all heads, from those of each rank's; nobody waits for them."""
    found = [x for x in densities if isinstance(x, torch.Tensor)]
    if not found and device_type != "cpu":
        return densities  # Exact steps only, on every rank.
    device = found[0].device if found else torch.device("cpu")
    share = shards.local_heads / shards.num_heads
    own = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=device) for x in densities]) * share
    collectives = torch.ops._c10d_functional
    together = collectives.wait_tensor(collectives.all_reduce(own, "sum", shards.group))
    return together.tolist() if device_type == "cpu" else list(together.unbind())


def _gather(x: torch.Tensor, shards: Shards) -> torch.Tensor:
    """`[ranks, ...]` of every rank's `x`."""
    collectives = torch.ops._c10d_functional
    ranks = len(shards.sizes)
    gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(x.contiguous(), ranks, shards.group))
    return gathered.unflatten(0, (ranks, -1))


def attend_over_ranks(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_bias: torch.Tensor | None,
    shards: Shards,
) -> torch.Tensor:
    """Attention over the tokens of all ranks, each rank computing its share of the heads.

    Args:
        attend: (query, key, value, key_bias) -> output, on `[batch, seq_len, local_heads, head_dim]` in the model's own
            order of tokens.
        query, key, value: this rank's tokens in all heads, `[batch, num_tokens, num_heads, head_dim]`.
        key_bias: fp32 `[batch | 1, 1, num_tokens]` of this rank's tokens, not differentiated.
        shards: who holds what.

    Returns:
        Output of this rank's tokens, shaped like `query`. Differentiable in query, key and value.
    """
    world, heads, local = len(shards.sizes), shards.heads_per_rank, shards.local_heads
    padding = world * heads - shards.num_heads
    tensors = (query, key, value)
    if shards.head_order is not None:
        tensors = tuple(x.index_select(2, shards.head_order) for x in tensors)
    if padding:
        tensors = tuple(F.pad(x, (0, 0, 0, padding)) for x in tensors)
    # [ranks, num_tokens, 3, batch, heads, head_dim]: what goes to one rank lies together, and one exchange serves all.
    sent = torch.stack([x.unflatten(2, (world, heads)).permute(2, 1, 0, 3, 4) for x in tensors], 2).flatten(0, 1)
    received = _exchange(sent, True, shards)
    q, k, v = (x.transpose(0, 1)[:, :, :local] for x in received.unbind(1))
    bias = None if key_bias is None else _gather_bias(key_bias, shards)
    out = attend(q, k, v, bias)
    if local < heads:
        out = F.pad(out, (0, 0, 0, heads - local))
    # [ranks * num_tokens, batch, heads, head_dim]
    back = _exchange(out.transpose(0, 1), False, shards)
    back = back.unflatten(0, (world, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)
    back = back[:, :, : shards.num_heads]
    return back if shards.head_inverse is None else back.index_select(2, shards.head_inverse)


def _gather_bias(key_bias: torch.Tensor, shards: Shards) -> torch.Tensor:
    """The bias of all ranks' keys, `[batch | 1, 1, seq_len]`."""
    # Every rank is sent the same; unlike an all-gather this takes shards of different sizes.
    sent = key_bias.detach()[:, 0].transpose(0, 1).repeat(len(shards.sizes), 1)
    return _exchange(sent, True, shards).transpose(0, 1)[:, None].contiguous()


def _exchange(x: torch.Tensor, to_heads: bool, shards: Shards) -> torch.Tensor:
    return _Exchange.apply(  # pyright: ignore[reportReturnType]
        x, to_heads, shards.sizes, shards.rank, shards.group, shards.order, shards.inverse
    )


class _Exchange(torch.autograd.Function):
    """`[ranks * own tokens, ...]`, what each rank gets of own tokens, to `[seq_len, ...]`, own share of all; or back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        to_heads: bool,
        sizes: tuple[int, ...],
        rank: int,
        group: str,
        order: torch.Tensor | None,
        inverse: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.to_heads, ctx.sizes, ctx.rank, ctx.group = to_heads, sizes, rank, group
        ctx.save_for_backward(order, inverse)
        return _all_to_all(x, to_heads, sizes, rank, group, order, inverse)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        order, inverse = ctx.saved_tensors
        back = _all_to_all(grad, not ctx.to_heads, ctx.sizes, ctx.rank, ctx.group, order, inverse)
        return (back, *(None,) * 6)


def _all_to_all(
    x: torch.Tensor,
    to_heads: bool,
    sizes: tuple[int, ...],
    rank: int,
    group: str,
    order: torch.Tensor | None,
    inverse: torch.Tensor | None,
) -> torch.Tensor:
    own, all_ranks = [sizes[rank]] * len(sizes), list(sizes)
    collectives = torch.ops._c10d_functional
    if to_heads:
        x = collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), all_ranks, own, group))
        return x if inverse is None else x.index_select(0, inverse)
    x = x.contiguous() if order is None else x.index_select(0, order)
    return collectives.wait_tensor(collectives.all_to_all_single(x, own, all_ranks, group))
