"""Sparse attention under diffusers' context parallelism: Ulysses, an exchange of tokens for heads around each call.

Each rank of a group of W holds 1/W of the tokens in all heads. One all-to-all gives it all tokens in 1/W of the heads,
where a method sees the sequence that it knows; a second one after attention brings the output back. See DeepSpeed
Ulysses, https://arxiv.org/abs/2309.14509. A broadcast mask costs every head the same, so the ranks are balanced.
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
from vidsparse.parts import Parts

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
        num_heads: heads of the model's attention; rank r takes `heads_per_rank` of them from r * `heads_per_rank` on.
        order: int64 `[seq_len]`, the tokens rank after rank; None where that is the model's own order.
        inverse: int64 `[seq_len]`, where in `order` each token stands; None likewise.
    """

    group: str
    rank: int
    sizes: tuple[int, ...]
    num_heads: int
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

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
    return back[:, :, : shards.num_heads]


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
