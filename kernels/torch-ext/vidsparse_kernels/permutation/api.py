"""The public functions: they check the arguments once and choose the implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from .backends import use_triton
from .reference import permute_reference


@overload
def permute_tokens(
    x: Tensor, order: Tensor, *, text_before: int = ..., text_after: int = ..., heads_first: bool = ...,
    backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def permute_tokens(
    x: Sequence[Tensor], order: Tensor, *, text_before: int = ..., text_after: int = ..., heads_first: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, ...]: ...  # fmt: skip
def permute_tokens(
    x: Tensor | Sequence[Tensor],
    order: Tensor,
    *,
    text_before: int = 0,
    text_after: int = 0,
    heads_first: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Put the video tokens of every head into an order: video token i of the result is token order[b, h, i] of `x`.

    Args:
        x: `[batch, seq_len, num_heads, head_dim]`, any strides; or one or two such tensors of the same shape and
            dtype (key and value), which one launch then moves.
        order: int32 `[batch|1, num_heads|1, num_video]`, in each row a permutation of 0 .. num_video - 1, with
            text_before + num_video + text_after = seq_len. Its values are checked on the CPU only.
        text_before, text_after: tokens at the start and the end that keep their place.
        heads_first: the result lies in memory as `[batch, num_heads, seq_len, head_dim]`, so that the tokens of a head
            are next to each other; its shape is the same.
        backend: "auto", "reference" or "triton".

    Returns:
        A tensor like `x`, or a tuple of them. Differentiable.

    Raises:
        ValueError: a shape, dtype or value does not fit.
        UnsupportedBackendError: the backend asked for cannot do this case.

    Example:
        >>> x = torch.arange(4.0).view(1, 4, 1, 1)
        >>> permute_tokens(x, torch.tensor([[[1, 0]]], dtype=torch.int32), text_after=2).flatten()
        tensor([1., 0., 2., 3.])
    """
    return _move(x, order, text_before, text_after, heads_first, backend, inverse=False)


@overload
def unpermute_tokens(
    x: Tensor, order: Tensor, *, text_before: int = ..., text_after: int = ..., heads_first: bool = ...,
    backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def unpermute_tokens(
    x: Sequence[Tensor], order: Tensor, *, text_before: int = ..., text_after: int = ..., heads_first: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, ...]: ...  # fmt: skip
def unpermute_tokens(
    x: Tensor | Sequence[Tensor],
    order: Tensor,
    *,
    text_before: int = 0,
    text_after: int = 0,
    heads_first: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Undo `permute_tokens` with the same `order`: video token order[b, h, i] of the result is token i of `x`.

    Args, returns, raises: as for `permute_tokens`.
    """
    return _move(x, order, text_before, text_after, heads_first, backend, inverse=True)


def _move(
    x: Tensor | Sequence[Tensor],
    order: Tensor,
    text_before: int,
    text_after: int,
    heads_first: bool,
    backend: str,
    *,
    inverse: bool,
) -> Tensor | tuple[Tensor, ...]:
    tensors = (x,) if isinstance(x, Tensor) else tuple(x)
    if not torch.compiler.is_compiling():
        _check(tensors, order, text_before, text_after)
    if use_triton(backend, tensors[0]):
        options = dict(text_before=text_before, inverse=inverse, heads_first=heads_first)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            from .autograd import move_with_grad

            moved = move_with_grad(tensors, order, **options)  # pyright: ignore[reportArgumentType]
        else:
            from .gather import triton_move

            moved = triton_move(tensors, order, **options)  # pyright: ignore[reportArgumentType]
    else:
        moved = tuple(
            permute_reference(tensor, order, text_before=text_before, text_after=text_after, inverse=inverse)
            for tensor in tensors
        )
        if heads_first:
            moved = tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in moved)
    return moved[0] if isinstance(x, Tensor) else moved


def _check(tensors: tuple[Tensor, ...], order: Tensor, text_before: int, text_after: int) -> None:
    if len(tensors) not in (1, 2):
        raise ValueError(f"`x` must be one tensor or a sequence of one or two, got {len(tensors)}.")
    x = tensors[0]
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(
            f"`x` must be floating point [batch, seq_len, num_heads, head_dim], got {x.dtype} {tuple(x.shape)}."
        )
    if any((other.shape, other.dtype, other.device) != (x.shape, x.dtype, x.device) for other in tensors):
        raise ValueError(
            "All tensors of `x` must have the same shape, dtype and device, got "
            f"{', '.join(f'{t.dtype} {tuple(t.shape)} on {t.device}' for t in tensors)}."
        )
    for name, count in (("text_before", text_before), ("text_after", text_after)):
        if count < 0:
            raise ValueError(f"`{name}` must be at least 0, got {count}.")
    batch, seq_len, num_heads, _ = x.shape
    num_video = seq_len - text_before - text_after
    fits = order.ndim == 3 and order.shape[0] in (1, batch) and order.shape[1] in (1, num_heads)
    if not fits or order.shape[2] != num_video or order.dtype != torch.int32 or order.device != x.device:
        raise ValueError(
            f"`order` must be int32 [1 or {batch}, 1 or {num_heads}, {num_video}] on {x.device}, which is `x` without "
            f"{text_before} + {text_after} text tokens, got {order.dtype} {tuple(order.shape)} on {order.device}."
        )
    if order.device.type == "cpu":
        ascending = torch.arange(num_video, dtype=order.dtype)
        if not torch.equal(order.sort(-1).values, ascending.expand(order.shape)):
            raise ValueError(f"Each row of `order` must be a permutation of 0 .. {num_video - 1}.")
