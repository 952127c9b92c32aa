"""The public function: checks the arguments once and names the backend that runs."""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from ..block_mask import BlockMask
from ..errors import UnsupportedBackendError
from .reference import FEATURE_MAPS, reference

BACKENDS = ("reference", "triton")
EPS = {"all": 1e-5, "non_selected": 0.0}
"""What the public code of each form adds to the denominator (thu-ml/SLA, main and the branch SLA-1)."""


def linear_branch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | None = None,
    *,
    feature_map: str = "softmax",
    coverage: str = "all",
    skipped: BlockMask | None = None,
    eps: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear attention beside block-sparse attention (SLA, arXiv:2509.24006, section 4).

    With features a_i = phi(query_i), b_j = phi(key_j) and the sums over the keys j that count for row i,

        out_i = sum_j (a_i . b_j) value_j / (sum_j a_i . b_j + eps)

    SLA adds it to sparse attention through a linear layer that starts at zero: sparse + proj(linear_branch).

    Args:
        query: `[batch, seq_len_q, num_heads, head_dim]`, any strides.
        key, value: `[batch, seq_len_kv, num_kv_heads, head_dim]`; num_heads is a multiple of num_kv_heads.
        block_mask: the blocks that sparse attention computes; needed for coverage "non_selected", ignored for "all".
        feature_map: phi, over the head dimension: "softmax", "elu" (elu + 1) or "relu".
        coverage: "all": every key counts, selected or not: the released SLA and TurboDiffusion checkpoints;
            "non_selected": the keys of blocks that `block_mask` does not list, as in the paper.
        skipped: blocks that do not count either (the paper's negligible class), with the lengths and block sizes of
            `block_mask`; may overlap with it. Works with both coverages.
        eps: added to each denominator; None: what the public code of the coverage does, 1e-5 for "all", 0 for
            "non_selected". Rows without weight give 0.
        backend: "auto" (Triton on a GPU where it can, else the reference), "reference" or "triton".

    Returns:
        `[batch, seq_len_q, num_heads, head_dim]` in the dtype of `query`. Differentiable once in query, key and value
        (the reference: as often as torch allows). Autocast changes nothing: cast the inputs before.

    Raises:
        ValueError: a shape, dtype, device or value does not fit; the message names it.
        UnsupportedBackendError: the backend asked for cannot do this case.

    Example:
        >>> q = k = v = torch.randn(1, 100, 2, 32)
        >>> linear_branch(q, k, v).shape
        torch.Size([1, 100, 2, 32])
    """
    if not torch.compiler.is_compiling():
        _check_arguments(query, key, value, block_mask, feature_map, coverage, skipped, eps, backend)
    excluded = block_mask if coverage == "non_selected" else None
    if skipped is not None:
        excluded = skipped if excluded is None else excluded.union(skipped)
    if eps is None:
        eps = EPS[coverage]
    obstacle = _obstacle(query, excluded)
    if backend == "auto":
        # The interpreter is for tests: it runs only when asked for by name.
        backend = "reference" if obstacle or query.device.type == "cpu" else "triton"
    elif backend == "triton" and obstacle:
        raise UnsupportedBackendError(
            f'backend "triton" {obstacle}; use backend="reference" or "auto" for this case.'
        )  # fmt: skip
    with without_autocast(query.device.type):
        if backend == "reference":
            return reference(query, key, value, excluded, feature_map=feature_map, eps=eps)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            from .autograd import triton_linear_branch

            return triton_linear_branch(query, key, value, excluded, feature_map=feature_map, eps=eps)
        from .forward import triton_forward

        return triton_forward(query, key, value, excluded, feature_map=feature_map, eps=eps, keep_rest=False)[0]


def add_linear_branch(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    block_mask: BlockMask | None = None,
    *,
    feature_map: str = "softmax",
    coverage: str = "all",
    skipped: BlockMask | None = None,
    eps: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """out + torch.nn.functional.linear(linear_branch(query, key, value, ...), weight, bias).

    Over all keys, in half precision and at head_dim up to 128, Triton projects the total of each head in place of every
    row and adds as it writes, in the precision of `weight` for the projection; everywhere else this is the sum as
    written above, weight and bias rounded to the dtype of `query`.

    Args:
        out: output of sparse attention, like `query`.
        query, key, value, block_mask, feature_map, coverage, skipped, eps, backend: as for `linear_branch`.
        weight, bias: of the projection, `[head_dim, head_dim]` and `[head_dim]` or None, any floating point dtype.

    Returns:
        Like `query`. Differentiable once in all six tensors.

    Raises:
        ValueError: a shape, dtype, device or value does not fit; the message names it.
        UnsupportedBackendError: the backend asked for cannot do this case.

    Source: SLA (arXiv:2509.24006); M = (phi(K)^T V) P^T in place of P after the sum.
    """
    if not torch.compiler.is_compiling():
        _check_arguments(query, key, value, block_mask, feature_map, coverage, skipped, eps, backend)
        _check_projection(out, query, weight, bias)
    if coverage == "all" and skipped is None and (backend == "triton" or backend == "auto" and query.is_cuda):
        if _obstacle(query, None) is None and query.numel() and key.numel():
            from .projected import fits, triton_projected

            if fits(query):
                eps = EPS[coverage] if eps is None else eps
                with without_autocast(query.device.type):
                    return triton_projected(out, query, key, value, weight, bias, feature_map=feature_map, eps=eps)
    branch = linear_branch(
        query, key, value, block_mask, feature_map=feature_map, coverage=coverage, skipped=skipped, eps=eps,
        backend=backend,
    )  # fmt: skip
    with without_autocast(query.device.type):
        return out + F.linear(branch, weight.to(branch.dtype), None if bias is None else bias.to(branch.dtype))


def _check_projection(out: Tensor, query: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if out.shape != query.shape or out.dtype != query.dtype or out.device != query.device:
        raise ValueError(
            f"`out` must be like `query` {tuple(query.shape)} {query.dtype} on {query.device}, got {tuple(out.shape)} "
            f"{out.dtype} on {out.device}."
        )
    head_dim = query.shape[3]
    for name, x, shape in (("weight", weight, (head_dim, head_dim)), ("bias", bias, (head_dim,))):
        if x is not None and (tuple(x.shape) != shape or not x.dtype.is_floating_point or x.device != query.device):
            raise ValueError(
                f"`{name}` must be floating point {shape} on {query.device}, got {x.dtype} {tuple(x.shape)} on "
                f"{x.device}."
            )


def _obstacle(query: Tensor, excluded: BlockMask | None) -> str | None:
    """Why Triton cannot do a case, as the end of a sentence that starts with its name; None if it can."""
    if find_spec("triton") is None:
        return "needs the package triton (pip install triton)"
    from .forward import unsupported

    return unsupported(query, excluded)


def _check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | None,
    feature_map: str,
    coverage: str,
    skipped: BlockMask | None,
    eps: float | None,
    backend: str,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(
                f"`{name}` must be [batch, seq_len, num_heads, head_dim], got shape {tuple(tensor.shape)}."
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"`{name}` must have a floating point dtype, got {tensor.dtype}.")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"`{name}` must have the dtype and device of `query` ({query.dtype}, {query.device}), "
                f"got {tensor.dtype}, {tensor.device}."
            )
    batch, seq_len_q, num_heads, head_dim = query.shape
    _, seq_len_kv, num_kv_heads, _ = key.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"`key` must have the batch and head_dim of `query` ({batch}, {head_dim}), got {tuple(key.shape)}."
        )
    if value.shape != key.shape:
        raise ValueError(f"`value` must have the shape of `key` {tuple(key.shape)}, got {tuple(value.shape)}.")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads of `query` must be a multiple of that of `key`, got {num_heads} and {num_kv_heads}."
        )
    for name, mask in (("block_mask", block_mask), ("skipped", skipped)):
        if mask is None:
            continue
        for length_name, length in (("seq_len_q", seq_len_q), ("seq_len_kv", seq_len_kv)):
            if getattr(mask, length_name) != length:
                raise ValueError(
                    f"`{name}` was built for {length_name} {getattr(mask, length_name)}, got {length} tokens."
                )
        if mask.batch_size not in (1, batch) or mask.num_heads not in (1, num_heads):
            raise ValueError(
                f"`{name}` must have batch 1 or {batch} and heads 1 or {num_heads}, got {mask.batch_size} "
                f"and {mask.num_heads}."
            )
        if mask.device != query.device:
            raise ValueError(
                f"`{name}` must be on the device of `query` ({query.device}), got {mask.device}; use .to()."
            )
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f'`feature_map` must be one of {", ".join(FEATURE_MAPS)}, got "{feature_map}".')
    if coverage not in EPS:
        raise ValueError(f'`coverage` must be one of {", ".join(EPS)}, got "{coverage}".')
    if coverage == "non_selected" and block_mask is None:
        raise ValueError('`block_mask` must be given for coverage "non_selected", got None.')
    if eps is not None and not 0 <= eps < math.inf:
        raise ValueError(f"`eps` must be at least 0 and finite, got {eps}.")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f'`backend` must be "auto" or one of {", ".join(BACKENDS)}, got "{backend}".')
