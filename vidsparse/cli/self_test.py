"""Every kernel on a tiny shape against plain torch in float64: what `vidsparse doctor` runs.

The tests of the repository check far more; these say within seconds whether a kernel works on this machine at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vidsparse_kernels import (
    BlockMask,
    UnsupportedBackendError,
    block_sparse_attention,
    block_sparse_attention_with_tail,
    cluster,
    linear_branch,
    permute_tokens,
    pool_blocks,
    pooled_tail_attention,
    qk_norm_rope,
    sampled_error,
    score_blocks,
    select_blocks,
    unpermute_tokens,
)
from vidsparse_kernels.testing import (
    assert_close_to_oracle,
    make_block_mask,
    make_qkv,
    make_variable_block_mask,
    masked_attention_oracle,
)

RUNS, MISSING, WRONG, LEFT_OUT = "runs", "no", "WRONG", "left out"
SEQ_LEN = 300
TOLERANCE = 2e-3
"""Largest error relative to the largest value, for kernels in fp32."""

ATTENTION = "block_sparse_attention"
CLUSTERS, GRADIENTS, WITH_TAIL = f"{ATTENTION} clusters", f"{ATTENTION} gradients", f"{ATTENTION}_with_tail"
OPS = (
    "block_selection", "clustering", "permutation", "pooled_tail", "linear_branch", "qk_norm_rope", "sampled_error"
)  # fmt: skip
OTHER_BACKENDS = ("reference", "triton")
HOPPER_BACKENDS = (*OTHER_BACKENDS, "hopper")


@dataclass(frozen=True)
class Outcome:
    """One kernel on one backend.

    Attributes:
        op, backend: which.
        state: "runs", "no" (cannot run here), "WRONG" or "left out" (no time).
        reason: why, where it does not run.
        seconds: taken, compilation included.
    """

    op: str
    backend: str
    state: str
    reason: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def close(name: str, actual: torch.Tensor, truth: torch.Tensor) -> None:
    """Raises AssertionError where the largest error is too large or anything is not finite."""
    assert actual.shape == truth.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name} is not finite"
    error = float((actual.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-12))
    assert error <= TOLERANCE, f"{name} is off by {error:.1e} of its largest value"


def attention(backend: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = make_qkv(seq_len_q=SEQ_LEN, head_dim=64, dtype=dtype, device=device)
    # FlashAttention-4 computes two tiles of queries together from Blackwell on.
    blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
    size = 256 if backend == "flash4" and blackwell else 128
    mask = make_block_mask(seq_len_q=SEQ_LEN, q_block_size=size, kv_block_size=128, full_rows=True, device=device)
    out = block_sparse_attention(query, key, value, mask, backend=backend)
    truth, _ = masked_attention_oracle(query, key, value, mask)
    eager, _ = masked_attention_oracle(query, key, value, mask, dtype=dtype)
    assert_close_to_oracle(out, eager, truth)


def attention_over_clusters(backend: str, device: torch.device) -> None:
    """Blocks of any sizes on both sides, and of keys alone, as full tiles of queries have them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = make_qkv(seq_len_q=SEQ_LEN, head_dim=128, dtype=dtype, device=device)
    for num_q_blocks, size in ((5, 64), (None, 128)):
        mask = make_variable_block_mask(
            seq_len_q=SEQ_LEN,
            num_q_blocks=num_q_blocks,
            num_kv_blocks=12,
            q_block_size=size,
            full_rows=True,
            device=device,
        )
        out = block_sparse_attention(query, key, value, mask, backend=backend)
        eager, truth = (
            masked_attention_oracle(query, key, value, mask, dtype=kind)[0] for kind in (dtype, torch.float64)
        )
        assert_close_to_oracle(out, eager, truth)


def attention_backward(backend: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Below 65 the Hopper backend takes the portable kernels.
    head_dim = 128 if backend == "hopper" else 64
    tensors = [x.requires_grad_() for x in make_qkv(seq_len_q=SEQ_LEN, head_dim=head_dim, dtype=dtype, device=device)]
    query, key, value = tensors
    mask = make_block_mask(seq_len_q=SEQ_LEN, q_block_size=128, kv_block_size=128, full_rows=True, device=device)
    outputs = [block_sparse_attention(query, key, value, mask, backend=backend)]
    outputs += [masked_attention_oracle(query, key, value, mask, dtype=kind)[0] for kind in (dtype, torch.float64)]
    weight = torch.linspace(-1, 1, head_dim, device=device, dtype=dtype)
    grads = [torch.autograd.grad((out * weight.to(out.dtype)).sum(), tensors) for out in outputs]
    for name, got, eager, truth in zip(("query", "key", "value"), *grads, strict=True):
        assert_close_to_oracle(got, eager, truth, name=f"gradient of {name}")


def block_selection(backend: str, device: torch.device) -> None:
    query, key, _ = make_qkv(seq_len_q=SEQ_LEN, head_dim=32, device=device)
    pooled = [pool_blocks(x, 32, backend=backend)["mean"] for x in (query, key)]
    for name, got, x in zip(("query", "key"), pooled, (query, key), strict=True):
        blocks = [part.double().mean(1) for part in x.split(32, 1)]
        close(f"the mean {name}", got, torch.stack(blocks, 2))
    scores = score_blocks(pooled[0], pooled[1])
    mask = select_blocks(
        scores, seq_len_q=SEQ_LEN, seq_len_kv=SEQ_LEN, q_block_size=32, kv_block_size=32, density=0.3, backend=backend
    )
    wanted = torch.zeros_like(scores, dtype=torch.bool)
    count = int(mask.kv_num_blocks.max())
    wanted.scatter_(-1, scores.topk(count, -1).indices, True)
    assert torch.equal(mask.to_dense(), wanted), "the blocks are not those with the largest scores"


def clustering(backend: str, device: torch.device) -> None:
    # Tokens close to eight far points: the assignment is beyond doubt in any precision.
    generator = torch.Generator().manual_seed(0)
    points = 20 * torch.eye(8, 32)
    labels = torch.arange(SEQ_LEN) % 8
    x = (points[labels] + 0.1 * torch.randn(SEQ_LEN, 32, generator=generator))[None, :, None].to(device)
    found = cluster(x, 8, iterations=2, centroids=points[None, None].to(device), backend=backend)
    labels = labels.to(device)
    assert torch.equal(found.labels[0, 0].long(), labels), "tokens are not in their nearest cluster"
    means = torch.stack([x[0, labels == i, 0].double().mean(0) for i in range(8)])
    close("the centroids", found.centroids[0, 0], means)
    order = torch.sort(labels, stable=True).indices
    assert torch.equal(found.order[0, 0].long(), order), "tokens are not in the order of their clusters"


def permutation(backend: str, device: torch.device) -> None:
    x, _, _ = make_qkv(seq_len_q=SEQ_LEN, head_dim=32, device=device)
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(SEQ_LEN - 7, generator=generator) for _ in range(2)])[None].int().to(device)
    moved = permute_tokens(x, order, text_after=7, backend=backend)
    index = order.long().transpose(1, 2)[..., None].expand(-1, -1, -1, 32)
    assert torch.equal(moved, torch.cat([x[:, :-7].gather(1, index), x[:, -7:]], 1)), "tokens are misplaced"
    assert torch.equal(unpermute_tokens(moved, order, text_after=7, backend=backend), x), "the way back differs"


def pooled_tail(backend: str, device: torch.device) -> None:
    query, key, value = make_qkv(seq_len_q=SEQ_LEN, head_dim=32, device=device)
    dense = torch.zeros(1, 1, 5, 5, dtype=torch.bool, device=device)
    dense[..., :2] = True
    mask = BlockMask.from_dense(dense, seq_len_q=SEQ_LEN, seq_len_kv=SEQ_LEN, q_block_size=64, kv_block_size=64)
    out, lse = pooled_tail_attention(query, key, value, mask, first_order=False, backend=backend)
    scale = 32**-0.5
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    sizes = torch.tensor([part.shape[2] for part in k.split(64, 2)], device=device, dtype=torch.float64)
    k_mean, v_mean = (torch.stack([part.mean(2) for part in x.split(64, 2)], 2) for x in (k, v))
    logits = q @ k_mean.transpose(2, 3) * scale + sizes.log()
    listed = mask.to_dense().repeat_interleave(64, 2)[:, :, :SEQ_LEN]
    logits = logits.masked_fill(listed, -torch.inf)
    close("the logsumexp", lse, logits.logsumexp(-1))
    close("the output", out, (logits.softmax(-1) @ v_mean).transpose(1, 2))


def attention_with_tail(backend: str, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = make_qkv(seq_len_q=SEQ_LEN, head_dim=128, dtype=dtype, device=device)
    mask = make_block_mask(seq_len_q=SEQ_LEN, q_block_size=128, kv_block_size=128, device=device)
    out = block_sparse_attention_with_tail(query, key, value, mask, first_order=False, backend=backend)
    listed = mask.to_dense().repeat_interleave(128, 2)[:, :, :SEQ_LEN]
    sizes = torch.tensor([part.shape[1] for part in key.split(128, 1)], device=device)

    def attend(kind: torch.dtype) -> torch.Tensor:
        """Keys of listed blocks, and of the others their means, each as often as it has tokens."""
        q, k, v = (x.to(kind).transpose(1, 2) for x in (query, key, value))
        k_mean, v_mean = (torch.stack([part.mean(2) for part in x.split(128, 2)], 2) for x in (k, v))
        tokens = listed.repeat_interleave(128, 3)[..., :SEQ_LEN]
        near = (q @ k.transpose(2, 3) * 128**-0.5).masked_fill(~tokens, -torch.inf)
        far = (q @ k_mean.transpose(2, 3) * 128**-0.5 + sizes.to(kind).log()).masked_fill(listed, -torch.inf)
        return (torch.cat([near, far], -1).softmax(-1) @ torch.cat([v, v_mean], 2)).transpose(1, 2)

    assert_close_to_oracle(out, attend(dtype), attend(torch.float64))


def linear(backend: str, device: torch.device) -> None:
    query, key, value = make_qkv(seq_len_q=SEQ_LEN, head_dim=32, device=device)
    out = linear_branch(query, key, value, backend=backend)
    a, b = (x.double().softmax(-1).transpose(1, 2) for x in (query, key))
    weights = a @ b.transpose(2, 3)
    truth = weights @ value.double().transpose(1, 2) / (weights.sum(-1, keepdim=True) + 1e-5)
    close("the output", out, truth.transpose(1, 2))


def norm_and_rope(backend: str, device: torch.device) -> None:
    x, weight, _ = make_qkv(seq_len_q=SEQ_LEN, head_dim=32, device=device)
    weight = weight[0, 0, 0]
    angle = torch.arange(SEQ_LEN, device=device)[:, None] * torch.linspace(0.01, 1, 16, device=device)
    tables = tuple(t.repeat_interleave(2, -1) for t in (angle.cos(), angle.sin()))
    out = qk_norm_rope(x, weight=weight, rotary=(tables[0], tables[1]), backend=backend)
    y = x.double()
    normed = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angle), angle).to(torch.complex128)[None, :, None]
    close("the output", out, torch.view_as_real(turned).flatten(-2))


def sampled(backend: str, device: torch.device) -> None:
    query, key, value = make_qkv(seq_len_q=SEQ_LEN, head_dim=32, device=device)
    out = torch.zeros_like(query)
    found = sampled_error(query, key, value, out, first=10, among=200, count=16, offset=7, backend=backend)
    rows = 10 + (torch.arange(16, device=device) * 200 + 7) // 16
    q, k, v = (x.double().transpose(1, 2) for x in (query[:, rows], key, value))
    exact = torch.softmax(q @ k.transpose(2, 3) * 32**-0.5, -1) @ v
    norm = exact.square().sum(-1).flatten(1)
    close("the error", found, torch.stack([norm, norm], -1))


CHECKS: dict[str, Callable[[str, torch.device], None]] = {
    ATTENTION: attention,
    CLUSTERS: attention_over_clusters,
    GRADIENTS: attention_backward,
    WITH_TAIL: attention_with_tail,
    "block_selection": block_selection,
    "clustering": clustering,
    "permutation": permutation,
    "pooled_tail": pooled_tail,
    "linear_branch": linear,
    "qk_norm_rope": norm_and_rope,
    "sampled_error": sampled,
}


def cases() -> list[tuple[str, str]]:
    """(op, backend), those that compile longest last."""
    from vidsparse_kernels.block_sparse_attention.api import BACKENDS
    from vidsparse_kernels.pooled_tail.api import BACKENDS_WITH_TAIL

    slow = ("flex", "flash4")
    ours = [(ATTENTION, backend) for backend in BACKENDS if backend not in slow]
    ours += [(op, backend) for op in (CLUSTERS, GRADIENTS) for backend in HOPPER_BACKENDS]
    ours += [(WITH_TAIL, backend) for backend in BACKENDS_WITH_TAIL]
    ours += [(op, backend) for op in OPS for backend in OTHER_BACKENDS]
    return ours + [(ATTENTION, backend) for backend in BACKENDS if backend in slow]


def run(device: torch.device, seconds: float) -> Iterator[Outcome]:
    """Run the checks one after the other; those that would start after `seconds` are left out."""
    from vidsparse_kernels import available_backends

    started = time.perf_counter()
    for op, backend in cases():
        begun = time.perf_counter()
        if begun - started > seconds:
            yield Outcome(op, backend, LEFT_OUT, f"the {seconds:g} seconds were over; give --seconds more")
            continue
        state, reason = RUNS, None
        try:
            if op in (ATTENTION, CLUSTERS, GRADIENTS) and backend not in available_backends():
                raise UnsupportedBackendError(f'backend "{backend}" is not installed')
            with torch.random.fork_rng(devices=[]):
                CHECKS[op](backend, device)
        except UnsupportedBackendError as error:
            state, reason = MISSING, short_reason(str(error), backend)
        except AssertionError as error:
            state, reason = WRONG, str(error)
        except Exception as error:
            # A kernel that does not compile or launch here is as bad as a wrong one.
            lines = str(error).strip().splitlines()
            state, reason = WRONG, f"{type(error).__name__}: {lines[0] if lines else ''}"
        yield Outcome(op, backend, state, reason, time.perf_counter() - begun)


PIP = {
    "triton": "triton",
    "hopper": "triton",
    "hopper_with_tail": "triton",
    "flex": "triton",
    "flash4": "flash-attn-4",
}


def short_reason(message: str, backend: str) -> str:
    """The reason in an UnsupportedBackendError without its advice; with the pip line where a package is missing."""
    text = message.removeprefix(f'backend "{backend}" ').partition("; use backend=")[0].rstrip(".")
    if "not installed" in text or "needs the package" in text:
        return f"not installed: pip install {PIP.get(backend, backend)}"
    return text
