"""The public function: it checks the arguments once and chooses the implementation."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import UnsupportedBackendError
from .reference import sampled_error_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
BACKENDS = ("auto", "reference", "triton")


def sampled_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    *,
    first: int = 0,
    among: int | None = None,
    count: int = 32,
    offset: int = 0,
    heads: tuple[int, int] | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Squared error of an attention output on sampled query rows, and the squared norm of exact attention there.

    The rows are `first + (i * among + offset) // count` for i below `count`. Nothing waits for the device, and equal
    arguments give equal results.

    Args:
        query, key, value: `[batch, seq_len, num_heads, head_dim]`, any strides, one dtype; key and value may have fewer
            heads.
        out: what is checked, shaped like `query`.
        first, among: the rows from which to sample: `among` of them from `first` on, default all.
        count: rows, at most `among`.
        offset: shifts the sample, from 0 to `among - 1`.
        heads: query heads to check, [begin, end); default all.
        key_bias: fp32 `[batch | 1, num_heads | 1, seq_len_kv]` added to the logits.
        scale: factor on query . key, default 1 / sqrt(head_dim).
        backend: "auto", "reference" or "triton".

    Returns:
        fp32 `[batch, sampled heads * count, 2]`, on the device of `query`: for each row of each head the squared error
        and the squared norm of exact attention.

    Raises:
        ValueError: a shape or number does not fit.
        UnsupportedBackendError: "triton" was asked for and cannot do this case.
    """
    batch, seq_len, num_heads, head_dim = query.shape
    among = seq_len - first if among is None else among
    begin, end = heads or (0, num_heads)
    if out.shape != query.shape or key.shape != value.shape or key.shape[0] != batch or key.shape[3] != head_dim:
        shapes = [tuple(x.shape) for x in (query, key, value, out)]
        raise ValueError(f"query and out, and key and value, must have matching shapes, got {shapes}.")
    if num_heads % key.shape[2]:
        raise ValueError(f"The {key.shape[2]} heads of key must divide the {num_heads} of query.")
    if not (0 <= first and first + among <= seq_len and 0 < count <= among and 0 <= offset < among):
        raise ValueError(
            f"`count` ({count}) rows and `offset` ({offset}) must lie among {among} rows from {first} on, of {seq_len}."
        )
    if not 0 <= begin < end <= num_heads:
        raise ValueError(f"`heads` must be a range of the {num_heads} heads, got {heads}.")
    if backend not in BACKENDS:
        raise ValueError(f'`backend` must be one of {", ".join(BACKENDS)}, got "{backend}".')
    options = {"first": first, "among": among, "count": count, "offset": offset, "heads": (begin, end), "scale": scale}
    obstacle = _obstacle(query, key, value, out)
    if backend == "triton" and obstacle is not None:
        raise UnsupportedBackendError(f'backend "triton" {obstacle}; use backend="reference" or "auto" for this case.')
    if backend == "triton" or (backend == "auto" and obstacle is None and query.device.type == "cuda"):
        from .forward import triton_sampled_error

        return triton_sampled_error(query, key, value, out, key_bias, **options)
    with torch.no_grad():
        return sampled_error_reference(query, key, value, out, key_bias, **options)


def _obstacle(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> str | None:
    """Why the kernel cannot do this case, or None."""
    if find_spec("triton") is None:
        return "needs the package triton (pip install triton)"
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a GPU"
    if any(x.dtype != query.dtype for x in (key, value, out)) or query.dtype not in DTYPES:
        return f"takes one dtype of bfloat16, float16 and float32, not {[x.dtype for x in (query, key, value, out)]}"
    if query.shape[3] > MAX_HEAD_DIM:
        return f"takes head dims up to {MAX_HEAD_DIM}, not {query.shape[3]}"
    return None
