"""The public functions: they check the arguments once and choose the implementation."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Union

import torch
from torch import Tensor

from ..errors import UnsupportedBackendError
from .reference import norm_rope_reference

NORMS = ("rms_heads", "rms_all", "layer_heads", "none")
PAIRINGS = ("interleaved", "half")
Rotary = Union[Tensor, "tuple[Tensor, Tensor]", None]


def qk_norm_rope(
    x: Tensor,
    *,
    num_heads: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms_heads",
    round_before_weight: bool = False,
    rotary: Rotary = None,
    pairing: str = "interleaved",
    rope_start: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Norm and rotary embedding of a projection's output, with the roundings of diffusers.

    Args:
        x: `[batch, seq_len, num_heads * head_dim]` with `num_heads` given, or four dimensions; any strides.
        weight, bias: `[head_dim]`, or `[num_heads * head_dim]` with norm "rms_all".
        eps: added to the mean square.
        norm: "rms_heads" over each head, "rms_all" over all heads (Wan, LTX), "layer_heads" (CogVideoX) or "none".
        round_before_weight: round to the dtype of x before and after the weight, as `diffusers.RMSNorm` does with a
            16-bit weight; `torch.nn.RMSNorm` rounds once, after it.
        rotary: (cos, sin), each `[S, head_dim]`, `[B|1, S, H|1, head_dim]` or `[B, S, num_heads * head_dim]` with each
            value repeated for both members of a pair, or complex `[S, head_dim / 2]`.
        pairing: "interleaved" (pairs 2i, 2i + 1) or "half" (pairs i, i + head_dim / 2).
        rope_start: the first token that is rotated; as many follow as the tables have rows, the others are only normed.
        backend: "auto", "reference" or "triton".

    Returns:
        `[batch, seq_len, num_heads, head_dim]` in the dtype of x. Where gradients are needed the reference runs.

    Raises:
        ValueError: a shape or name does not fit.
        UnsupportedBackendError: "triton" was asked for and cannot do this case.
    """
    return _run((x,), (weight,), (bias,), (eps,), num_heads, norm, round_before_weight, rotary, pairing, rope_start,
                backend)[0]  # fmt: skip


def qk_norm_rope_pair(
    query: Tensor,
    key: Tensor,
    *,
    num_heads: int | None = None,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: tuple[float, float] = (1e-6, 1e-6),
    norm: str = "rms_heads",
    round_before_weight: bool = False,
    rotary: Rotary = None,
    pairing: str = "interleaved",
    rope_start: int = 0,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` of a query and a key of one shape, in one launch; weights, biases and eps are (query's, key's).

    Args:
        out: where to write, `[batch, seq_len, num_heads, head_dim]` each with the heads of a token one behind the other,
            such as a run of tokens of a longer sequence; new tensors by default.
    """
    query, key = _run((query, key), weights, biases, eps, num_heads, norm, round_before_weight, rotary, pairing,
                      rope_start, backend, out)  # fmt: skip
    return query, key


def _run(
    xs: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...],
    biases: tuple[Tensor | None, ...],
    eps: tuple[float, ...],
    num_heads: int | None,
    norm: str,
    early: bool,
    rotary: Rotary,
    pairing: str,
    rope_start: int,
    backend: str,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    for name, value, known in (
        ("norm", norm, NORMS),
        ("pairing", pairing, PAIRINGS),
        ("backend", backend, ("auto", "reference", "triton")),
    ):
        if value not in known:
            raise ValueError(f'`{name}` must be one of {", ".join(known)}, got "{value}".')
    if xs[0].ndim == 3:
        if not num_heads or xs[0].shape[2] % num_heads:
            raise ValueError(f"`num_heads` must divide the width of x, {xs[0].shape[2]}, got {num_heads}.")
        xs = tuple(x.unflatten(2, (num_heads, -1)) for x in xs)
    if any(x.ndim != 4 or x.shape != xs[0].shape or x.dtype != xs[0].dtype for x in xs):
        raise ValueError(f"x must have 3 or 4 dimensions, query and key alike, got {[tuple(x.shape) for x in xs]}.")
    heads, head_dim = xs[0].shape[2:]
    width = heads * head_dim if norm == "rms_all" else head_dim
    for affine in (weights, biases):
        if len({t is None for t in affine}) > 1 or any(t is not None and t.shape != (width,) for t in affine):
            raise ValueError(f'weight and bias must be [{width}] for norm "{norm}", for query and key alike.')
    if out is not None and any(
        t.shape != xs[0].shape
        or t.dtype != xs[0].dtype
        or t.stride()[2:] != (head_dim, 1)
        or t.stride() != out[0].stride()
        for t in out
    ):
        raise ValueError(
            f"`out` must have the shape and dtype of x, {tuple(xs[0].shape)} {xs[0].dtype}, one layout and packed heads, "
            f"got {[(tuple(t.shape), t.stride(), t.dtype) for t in out]}."
        )
    cos, sin = _pair_tables(rotary, xs[0], pairing, rope_start)
    options = {"norm": norm, "round_before_weight": early, "pairing": pairing, "rope_start": rope_start}
    tensors = [t for t in (*xs, *weights, *biases, cos, sin) if t is not None]
    if _use_triton(backend, xs[0], cos, any(t.requires_grad for t in tensors)):
        from .forward import triton_norm_rope

        if out is None:
            out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs)
        triton_norm_rope(xs, out, weights, biases, cos, sin, eps=eps, **options)
        return out
    made = tuple(
        norm_rope_reference(x, w, b, cos, sin, eps=e, **options) for x, w, b, e in zip(xs, weights, biases, eps)
    )
    return made if out is None else tuple(to.copy_(x) for to, x in zip(out, made))


def _pair_tables(rotary: Rotary, x: Tensor, pairing: str, rope_start: int) -> tuple[Tensor | None, Tensor | None]:
    """Views of the tables as cos, sin `[B|1, S, H|1, head_dim / 2]`, one value for each pair."""
    if rotary is None:
        return None, None
    batch, seq_len, heads, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"Rotary embedding needs an even head_dim, got {head_dim}.")
    if isinstance(rotary, Tensor):
        cos, sin = torch.view_as_real(rotary)[None, :, None].unbind(-1)
    else:
        half = head_dim // 2
        at = (slice(0, None, 2), slice(1, None, 2)) if pairing == "interleaved" else (slice(half), slice(half))
        views = []
        for table, columns in zip(rotary, at):
            if table.ndim == 3:
                table = table.unflatten(2, (heads, -1))
            views.append((table[None, :, None] if table.ndim == 2 else table)[..., columns])
        cos, sin = views
    fits = cos.ndim == 4 and cos.shape[0] in (1, batch) and cos.shape[2] in (1, heads) and cos.shape == sin.shape
    if not fits or cos.shape[3] * 2 != head_dim or not 0 <= rope_start <= seq_len - cos.shape[1]:
        raise ValueError(f"`rotary` {tuple(cos.shape)} from token {rope_start} does not fit x {tuple(x.shape)}.")
    return cos, sin


def _use_triton(backend: str, x: Tensor, cos: Tensor | None, requires_grad: bool) -> bool:
    if backend == "reference":
        return False
    obstacle = "needs the package triton (pip install triton)"
    if find_spec("triton") is not None:
        from .forward import unsupported

        obstacle = unsupported(x, cos)
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        obstacle = obstacle or "needs a GPU"
    if obstacle is None and requires_grad and torch.is_grad_enabled():
        obstacle = "has no backward"
    if backend == "triton" and obstacle:
        raise UnsupportedBackendError(f'backend "triton" {obstacle}; use backend="reference" or "auto" for this case.')
    return backend == "triton" or obstacle is None and x.device.type == "cuda"
