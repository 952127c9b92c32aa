"""What `soak_block_sparse.py` compares: a backend's results, those of dense attention, and the share of the error budget."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from soak_cases import Case
from torch import Tensor

from vidsparse_kernels import UnsupportedBackendError, block_sparse_attention
from vidsparse_kernels.testing import masked_attention_oracle, token_mask


def oracle(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, LSE and gradients by dense attention in `dtype`."""
    with_gradients = case.gradient != "none"
    tensors = [x.detach().to(dtype).contiguous().requires_grad_(with_gradients) for x in case.tensors]
    query, key, value = tensors
    out, lse = masked_attention_oracle(
        query, key, value, case.mask, scale=case.scale, key_bias=case.key_bias, dtype=dtype
    )
    return {"output": out.detach(), "lse": lse.detach(), **gradients(case, out, lse, tensors)}


def dense_sdpa(case: Case) -> Tensor:
    """torch's dense attention with a mask: what eager attention is to the backend made of it."""
    q, k, v = (x.transpose(1, 2) for x in case.tensors)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    bias = torch.zeros(1, 1, k.shape[2], device=k.device) if case.key_bias is None else case.key_bias
    # On a CPU a mask in fp32 goes with any dtype, elsewhere it has to have that of the query.
    bias = bias.to(torch.float32 if q.device.type == "cpu" else q.dtype).unsqueeze(2)
    bias = bias.masked_fill(token_mask(case.mask).logical_not(), -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=case.scale)
    return torch.where((bias > -torch.inf).any(-1, keepdim=True), out, 0.0).transpose(1, 2)


def gradients(case: Case, out: Tensor, lse: Tensor | None, tensors: list[Tensor]) -> dict[str, Tensor]:
    if case.gradient == "none":
        return {}
    outputs, grads = [], []
    if case.gradient != "lse":
        outputs.append(out)
        grads.append(case.grad_out.to(out.dtype))
    if case.gradient != "out":
        assert lse is not None
        outputs.append(lse)
        grads.append(case.grad_lse.to(lse.dtype))
    found = torch.autograd.grad(outputs, tensors, grads, allow_unused=True)
    return {
        f"gradient of {name}": torch.zeros_like(x) if grad is None else grad
        for name, x, grad in zip(("query", "key", "value"), tensors, found, strict=True)
    }


def attend(backend: str, case: Case) -> tuple[dict[str, Tensor], list[str]]:
    """All that a backend does of a case, and why it does not do the rest."""
    refusals = []
    asked_lse = case.combination.return_lse or case.gradient in ("lse", "both")
    attempts = [(case.gradient != "none", asked_lse), (False, asked_lse), (False, False)]
    for with_gradients, return_lse in dict.fromkeys(attempts):
        query, key, value = tensors = [x.detach().requires_grad_(with_gradients) for x in case.tensors]
        try:
            with fresh_memory_holds_nan(), descriptors_everywhere(backend, case.combination.descriptors):
                result = block_sparse_attention(
                    query, key, value, case.mask, scale=case.scale, key_bias=case.key_bias, return_lse=return_lse,
                    backend=backend,
                )  # fmt: skip
                out, lse = result if isinstance(result, tuple) else (result, None)
                grads = gradients(case, out, lse, tensors) if with_gradients else {}
        except UnsupportedBackendError as error:
            refusals.append(str(error).split("; use backend=")[0].split(", got")[0])
            continue
        found = {"output": out.detach(), **grads}
        if lse is not None:
            found["lse"] = lse.detach()
        return found, refusals
    return {}, refusals


@contextmanager
def fresh_memory_holds_nan() -> Iterator[None]:
    """NaN (the largest number in integers) in all that torch allocates, which is what its deterministic mode does."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # About operations that have no deterministic form, and from numpy under Triton's interpreter.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def descriptors_everywhere(backend: str, wanted: bool) -> Iterator[None]:
    """TMA descriptors for small cases too, for which the kernels' table takes pointers."""
    if not wanted or backend not in ("triton", "hopper"):
        yield
        return
    from vidsparse_kernels.block_sparse_attention import backward, forward

    # Each holds the number under this name, as imported from the table.
    name, modules = "MIN_DESCRIPTOR_FLOPS", (forward, backward)
    before = [getattr(module, name) for module in modules]
    for module in modules:
        setattr(module, name, 0)
    try:
        yield
    finally:
        for module, flops in zip(modules, before, strict=True):
            setattr(module, name, flops)


def budget_used(actual: Tensor, eager: Tensor, oracle: Tensor) -> float:
    """The larger of the two errors over what `assert_close_to_oracle` allows for it; 0 where there is none."""
    finite = oracle != -torch.inf
    truth = oracle[finite].double()
    if truth.numel() == 0:
        return 0.0
    sizes = [
        torch.stack([x.abs().max(), x.square().mean().sqrt()])
        for x in (actual[finite].double() - truth, eager[finite].double() - truth, truth)
    ]
    error, allowed, size = torch.stack(sizes).tolist()
    band = 4 * torch.finfo(actual.dtype).eps
    return max(e / (a + band * s) if e else 0.0 for e, a, s in zip(error, allowed, size, strict=True))
