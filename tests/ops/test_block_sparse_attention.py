"""block_sparse_attention on the CPU: every backend against dense float64 attention."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse_kernels import (
    BlockMask,
    UnsupportedBackendError,
    available_backends,
    block_sparse_attention,
    merge_attention_states,
    select_backend,
)
from vidsparse_kernels.testing import (
    assert_close_to_oracle,
    make_block_mask,
    make_qkv,
    make_variable_block_mask,
    masked_attention_oracle,
    token_mask,
)


@st.composite
def cases(draw):
    """Query, key, value and a mask: lengths, heads, strides, broadcast and rows of all kinds."""
    batch, num_kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    num_heads = num_kv_heads * draw(st.integers(1, 3))
    lengths = st.sampled_from([1, 15, 63, 64, 111, 130, 257])
    q, k, v = make_qkv(
        batch=batch,
        seq_len_q=draw(lengths),
        seq_len_kv=draw(lengths),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([8, 40, 64, 72, 80, 96, 128])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        contiguous=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    mask = make_block_mask(
        seq_len_q=q.shape[1],
        seq_len_kv=k.shape[1],
        q_block_size=draw(st.sampled_from([16, 30, 64, 128])),
        kv_block_size=draw(st.sampled_from([16, 25, 64])),
        batch=draw(st.sampled_from([1, batch])),
        num_heads=draw(st.sampled_from([1, num_heads])),
        density=draw(st.sampled_from([0.0, 0.3, 0.6, 1.0])),
        empty_rows=draw(st.booleans()),
        full_rows=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    return q, k, v, mask


def truth_and_eager(q, k, v, mask, **options):
    return (
        masked_attention_oracle(q, k, v, mask, **options),
        masked_attention_oracle(q, k, v, mask, dtype=q.dtype, **options),
    )


def dense_sdpa(q, k, v, mask, key_bias=None):
    """torch's dense SDPA with a token mask: the error budget of the backend made of it (its exp is less exact)."""
    heads = q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    allowed = token_mask(mask)
    bias = torch.zeros(1, 1, k.shape[2]) if key_bias is None else key_bias
    bias = bias.to(torch.float32 if q.dtype.itemsize == 2 else q.dtype).unsqueeze(2).masked_fill(~allowed, -torch.inf)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return torch.where((bias > -torch.inf).any(-1, keepdim=True), out, 0.0).transpose(1, 2)


def make_bias(q, k, shape):
    """fp32 `[1 or batch, 1 or heads, seq_len_kv]`; 0 in `shape` asks for the whole size. Every third key is shut."""
    if shape is None:
        return None
    shape = (shape[0] or q.shape[0], shape[1] or q.shape[2], k.shape[1])
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    bias[..., ::3] = -torch.inf
    return bias


BIAS_SHAPES = [None, (1, 1), (0, 1), (1, 0), (0, 0)]


@settings(deadline=None, max_examples=150)
@given(cases(), st.sampled_from(BIAS_SHAPES))
def test_sdpa_is_exact(case, bias_shape):
    q, k, v, mask = case
    bias = make_bias(q, k, bias_shape)
    truth, _ = masked_attention_oracle(q, k, v, mask, key_bias=bias)
    eager = dense_sdpa(q, k, v, mask, bias)
    assert_close_to_oracle(block_sparse_attention(q, k, v, mask, key_bias=bias, backend="sdpa"), eager, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_with_padded_prompts(dtype):
    """Padding at the end of each sample, over whole blocks and parts of one; one sample with every key shut."""
    q, k, v = make_qkv(batch=3, seq_len_q=300, num_heads=4, num_kv_heads=2, dtype=dtype)
    distance = (torch.arange(10)[:, None] - torch.arange(10)).abs()
    dense = torch.stack([distance <= 1, (distance <= 2) | (distance == 9), distance <= 1, distance < 0]).unsqueeze(0)
    mask = BlockMask.from_dense(dense, seq_len_q=300, seq_len_kv=300, q_block_size=32, kv_block_size=32)
    bias = torch.zeros(3, 1, 300)
    bias[0, :, 170:], bias[1, :, 290:], bias[2] = -torch.inf, -torch.inf, -torch.inf
    for key_bias in (bias, bias.repeat(1, 4, 1), bias.double()):
        truth, _ = masked_attention_oracle(q, k, v, mask, key_bias=key_bias)
        eager = dense_sdpa(q, k, v, mask, key_bias)
        out = block_sparse_attention(q, k, v, mask, key_bias=key_bias)
        assert_close_to_oracle(out, eager, truth)
        assert torch.equal(block_sparse_attention(q, k, v, mask, key_bias=key_bias), out)
        assert bool(torch.isfinite(out).all()) and not out[2].any() and not out[0, 256:, 0].any()
        assert bool(out[0, :170, :3].any(-1).all()) and not out[:, :, 3].any()


@settings(deadline=None, max_examples=150)
@given(cases(), st.sampled_from(BIAS_SHAPES))
def test_reference_is_exact(case, bias_shape):
    q, k, v, mask = case
    bias = make_bias(q, k, bias_shape)
    (truth, truth_lse), (eager, eager_lse) = truth_and_eager(q, k, v, mask, key_bias=bias)
    out, lse = block_sparse_attention(q, k, v, mask, key_bias=bias, return_lse=True, backend="reference")
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert_close_to_oracle(out, eager, truth)
    assert_close_to_oracle(lse, eager_lse, truth_lse, name="lse")


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("density", [0.45, 1.0])
def test_video_length(backend, dtype, density):
    q, k, v = make_qkv(seq_len_q=2016, num_heads=2, dtype=dtype)
    mask = make_block_mask(seq_len_q=2016, density=density)
    (truth, _), (eager, _) = truth_and_eager(q, k, v, mask)
    assert_close_to_oracle(block_sparse_attention(q, k, v, mask, backend=backend), eager, truth)


def test_sdpa_on_bands_and_heads_that_share_lists():
    """Neighbouring q-blocks join one masked call, and heads with equal lists run together."""
    distance = (torch.arange(8)[:, None] - torch.arange(8)).abs()
    dense = torch.stack([distance <= 1, distance <= 3, distance <= 1]).unsqueeze(0)
    mask = BlockMask.from_dense(dense, seq_len_q=500, seq_len_kv=500, q_block_size=64, kv_block_size=64)
    q, k, v = make_qkv(batch=2, seq_len_q=500, num_heads=3, num_kv_heads=1)
    truth, _ = masked_attention_oracle(q, k, v, mask)
    eager = dense_sdpa(q, k, v, mask)
    for _ in range(2):  # the second call runs from the kept plan
        assert_close_to_oracle(block_sparse_attention(q, k, v, mask, backend="sdpa"), eager, truth)


def test_density_one_is_dense_attention():
    q, k, v = make_qkv(seq_len_q=111)
    mask = BlockMask.full(111, 111, q_block_size=64, kv_block_size=64)
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    dense = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    assert torch.equal(block_sparse_attention(q, k, v, mask, backend="sdpa"), dense)


def test_scale_is_used():
    q, k, v = make_qkv(seq_len_q=70)
    mask = make_block_mask(seq_len_q=70, full_rows=True)
    (truth, _), (eager, _) = truth_and_eager(q, k, v, mask, scale=0.31)
    for backend in ("sdpa", "reference"):
        assert_close_to_oracle(block_sparse_attention(q, k, v, mask, scale=0.31, backend=backend), eager, truth)


def test_float64_stays_float64():
    q, k, v = make_qkv(seq_len_q=70, dtype=torch.float64)
    mask = make_block_mask(seq_len_q=70, full_rows=True)
    truth, truth_lse = masked_attention_oracle(q, k, v, mask)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, truth_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_gradients_by_finite_differences(lead):
    q, k, v = make_qkv(
        batch=2, seq_len_q=9, seq_len_kv=11, num_heads=4, num_kv_heads=2, head_dim=3, dtype=torch.float64
    )
    mask = make_block_mask(
        seq_len_q=9, seq_len_kv=11, q_block_size=4, kv_block_size=3, batch=lead[0], num_heads=lead[1],
        empty_rows=True, full_rows=True,
    )  # fmt: skip
    bias = torch.randn(2, 1, 11, dtype=torch.float64)

    def attend(q, k, v):
        out, lse = block_sparse_attention(q, k, v, mask, key_bias=bias, return_lse=True)
        return out, lse[lse != -torch.inf]

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (q, k, v)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_gradients_through_output_and_lse(dtype, head_dim):
    inputs = make_qkv(
        batch=2, seq_len_q=111, seq_len_kv=130, num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype,
        contiguous=False,
    )  # fmt: skip
    mask = make_block_mask(
        seq_len_q=111, seq_len_kv=130, q_block_size=32, kv_block_size=32, num_heads=4, empty_rows=True
    )
    weight_out, weight_lse = torch.randn(inputs[0].shape), torch.randn(2, 4, 111)

    def gradients(attend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out, lse = attend(*leaves)
        seen = torch.where(lse == -torch.inf, 0.0, lse)
        loss = (out.double() * weight_out).sum() + (seen.double() * weight_lse).sum()
        return torch.autograd.grad(loss, leaves)

    got = gradients(lambda q, k, v: block_sparse_attention(q, k, v, mask, return_lse=True), dtype)
    eager = gradients(lambda q, k, v: masked_attention_oracle(q, k, v, mask, dtype=dtype), dtype)
    truth = gradients(lambda q, k, v: masked_attention_oracle(q, k, v, mask), torch.float64)
    for name, g, e, t in zip(("query", "key", "value"), got, eager, truth, strict=True):
        assert g.dtype == dtype
        assert_close_to_oracle(g, e, t, name=f"gradient of {name}")


def test_empty_rows_have_zero_gradient_and_no_nan():
    q, k, v = (x.requires_grad_() for x in make_qkv(seq_len_q=100))
    mask = make_block_mask(seq_len_q=100, density=0.0)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    assert not out.any() and bool((lse == -torch.inf).all())
    merged, merged_lse = merge_attention_states(out, lse, out, lse)
    grads = torch.autograd.grad(merged.sum() + torch.where(merged_lse == -torch.inf, 0.0, merged_lse).sum(), (q, k, v))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_merging_a_mask_with_its_complement_is_dense(case):
    q, k, v, mask = case
    full = BlockMask.full(q.shape[1], k.shape[1], q_block_size=mask.q_block_size, kv_block_size=mask.kv_block_size)
    halves = [
        block_sparse_attention(q.float(), k.float(), v.float(), m, return_lse=True) for m in (mask, mask.complement())
    ]
    out, lse = merge_attention_states(*halves[0], *halves[1])
    truth, truth_lse = masked_attention_oracle(q.float(), k.float(), v.float(), full)
    torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-4, atol=1e-5)


def test_merge_is_differentiable_by_finite_differences():
    states = [torch.randn(1, 3, 2, 4), torch.randn(1, 2, 3), torch.randn(1, 3, 2, 4), torch.randn(1, 2, 3)]
    assert torch.autograd.gradcheck(merge_attention_states, [x.double().requires_grad_() for x in states])


def test_chunks_do_not_change_the_result(monkeypatch):
    from vidsparse_kernels.block_sparse_attention import reference

    q, k, v = make_qkv(seq_len_q=300)
    mask = make_block_mask(seq_len_q=300, q_block_size=32, kv_block_size=32, num_heads=2)
    whole = block_sparse_attention(q, k, v, mask, backend="reference")
    monkeypatch.setattr(reference, "CPU_CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(block_sparse_attention(q, k, v, mask, backend="reference"), whole)


def tiles_walked(mask: BlockMask) -> torch.Tensor:
    """Token mask cut into the tiles of q_block_size x kv_block_size that a program walks: one mask a step,
    `[steps, seq_len_q, seq_len_kv]`; batch 1, one head."""
    allowed, steps = token_mask(mask)[0, 0], []
    bounds = mask.offsets("q")[0, 0].tolist()
    for start, stop in pairwise(bounds):
        for first in range(start, stop, mask.q_block_size):
            rows = slice(first, min(stop, first + mask.q_block_size))
            step, column = 0, 0
            while column < mask.seq_len_kv:
                if not allowed[first, column]:
                    column += 1
                    continue
                width = 0
                while (
                    width < mask.kv_block_size and column + width < mask.seq_len_kv and allowed[first, column + width]
                ):
                    width += 1
                while len(steps) <= step:
                    steps.append(torch.zeros_like(allowed))
                steps[step][rows, column : column + width] = True
                step, column = step + 1, column + width
    return torch.stack(steps)


@pytest.mark.parametrize("threshold", [0.3, 0.9])
@pytest.mark.parametrize("variable", [False, True], ids=["uniform", "variable"])
def test_skipping_leaves_out_tiles_of_small_weight(variable, threshold):
    counts: dict[str, Any] = dict(num_q_blocks=5, num_kv_blocks=11) if variable else {}
    mask = make_variable_block_mask(
        seq_len_q=70, seq_len_kv=150, q_block_size=16, kv_block_size=16, density=0.7, seed=3, **counts
    )
    q, k, v = make_qkv(seq_len_q=70, seq_len_kv=150, num_heads=1, head_dim=16, dtype=torch.float64)
    # All rows agree on which keys matter, as they must for a tile to be left out.
    q[..., 0] += 4
    k[..., 0] += 4 * torch.sin(torch.arange(150) / 15).view(1, -1, 1)
    logits = torch.einsum("bshd,bthd->st", q, k) * 16**-0.5
    peak, kept = torch.full((70,), -torch.inf, dtype=torch.float64), torch.zeros(70, 150, dtype=torch.bool)
    bounds = mask.offsets("q")[0, 0].tolist()
    tiles = [
        slice(first, min(stop, first + 16)) for start, stop in pairwise(bounds) for first in range(start, stop, 16)
    ]
    for step in tiles_walked(mask):
        tile_peak = logits.masked_fill(~step, -torch.inf).amax(-1)
        for rows in tiles:
            if bool((tile_peak[rows] - peak[rows] >= math.log(threshold)).any()):
                peak[rows] = torch.maximum(peak[rows], tile_peak[rows])
                kept[rows] |= step[rows]
    allowed = token_mask(mask)[0, 0]
    assert kept.sum() < 0.9 * allowed.sum() and not bool((kept & ~allowed).any())
    masked = logits.masked_fill(~kept, -torch.inf)
    weights = torch.where(kept.any(-1, keepdim=True), torch.softmax(masked, -1), 0.0)
    out, lse = block_sparse_attention(q, k, v, mask, skip_threshold=threshold, return_lse=True)
    torch.testing.assert_close(out[0, :, 0], weights @ v[0, :, 0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(lse[0, 0], torch.logsumexp(masked, -1), rtol=1e-11, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_a_threshold_of_zero_is_exact(case):
    q, k, v, mask = case
    exact = block_sparse_attention(q, k, v, mask, return_lse=True)
    for threshold in (None, 0.0, 1e-40):
        skipped = block_sparse_attention(q, k, v, mask, skip_threshold=threshold, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(exact, skipped, strict=True))


def test_skipping_is_for_inference_on_backends_that_can():
    q, k, v = make_qkv(seq_len_q=70)
    mask = make_block_mask(seq_len_q=70)
    assert select_backend(q, k, v, mask, skip_threshold=0.1) == ("reference", '"sdpa" does not take skip_threshold')
    assert select_backend(q, k, v, mask, skip_threshold=0.0)[0] == "sdpa"
    with pytest.raises(UnsupportedBackendError, match='"sdpa" does not take skip_threshold'):
        block_sparse_attention(q, k, v, mask, skip_threshold=0.1, backend="sdpa")
    with pytest.raises(UnsupportedBackendError, match="`skip_threshold` 0.1 has no backward"):
        block_sparse_attention(q.requires_grad_(), k, v, mask, skip_threshold=0.1)
    with torch.no_grad():
        assert block_sparse_attention(q, k, v, mask, skip_threshold=0.1).shape == q.shape


def test_the_choice_is_named_with_a_reason():
    q, k, v = make_qkv(seq_len_q=70)
    mask = make_block_mask(seq_len_q=70)
    assert select_backend(q, k, v, mask) == ("sdpa", "inference on cpu")
    assert select_backend(q, k, v, mask, return_lse=True) == ("reference", '"sdpa" does not return the LSE')
    assert select_backend(q, k, v, mask, key_bias=torch.zeros(1, 1, 70)) == ("sdpa", "inference on cpu")
    name, reason = select_backend(q, k, v, mask, requires_grad=True)
    assert name == "reference" and "gradients" in reason
    assert select_backend(q.requires_grad_(), k, v, mask)[0] == "reference"
    with torch.no_grad():
        assert select_backend(q, k, v, mask)[0] == "sdpa"
    assert {"reference", "sdpa"} <= set(available_backends())


def test_a_backend_that_cannot_says_so_by_name():
    q, k, v = make_qkv(seq_len_q=70)
    mask = make_block_mask(seq_len_q=70)
    with pytest.raises(UnsupportedBackendError, match='"sdpa" does not return the LSE; use backend="reference"'):
        block_sparse_attention(q, k, v, mask, return_lse=True, backend="sdpa")
    with pytest.raises(UnsupportedBackendError, match='"sdpa" has no backward; use backend="reference"'):
        block_sparse_attention(q.requires_grad_(), k, v, mask, backend="sdpa")
    for query in (q, q.detach()):
        with pytest.raises(UnsupportedBackendError, match='"triton" needs'):
            block_sparse_attention(query, k, v, mask, backend="triton")


def test_wrong_arguments_are_named():
    q, k, v = make_qkv(seq_len_q=70, num_heads=2)
    mask = make_block_mask(seq_len_q=70)
    wrong = [
        (dict(query=q[0]), "`query` must be"),
        (dict(key=k.double()), "`key` must have the dtype and device of `query`"),
        (dict(key=k[..., :8]), "`key` must have the batch and head_dim"),
        (dict(value=v[:, :-1]), "`value` must have the shape of `key`"),
        (dict(key=k.repeat(1, 1, 2, 1)[:, :, :3], value=v.repeat(1, 1, 2, 1)[:, :, :3]), "multiple of that of `key`"),
        (dict(block_mask=make_block_mask(seq_len_q=71)), "built for seq_len_q 71, got 70 tokens"),
        (dict(block_mask=make_block_mask(seq_len_q=70, num_heads=3)), "heads 1 or 2, got 1 and 3"),
        (dict(scale=0.0), "`scale` must be positive and finite, got 0.0"),
        (dict(skip_threshold=1.0), r"`skip_threshold` must be in \[0, 1\), got 1.0"),
        (dict(skip_threshold=-0.1), r"`skip_threshold` must be in \[0, 1\), got -0.1"),
        (dict(key_bias=torch.zeros(70)), r"`key_bias` must be \[B\|1, H\|1, 70\]"),
        (dict(key_bias=torch.zeros(1, 1, 70).bfloat16()), "`key_bias` must be fp32"),
        (dict(key_bias=torch.zeros(1, 1, 70).requires_grad_()), "`key_bias` must not require grad"),
        (
            dict(backend="flash"),
            '`backend` must be "auto" or one of reference, sdpa, triton, hopper, flex, flash4, got "flash"',
        ),
    ]
    for change, message in wrong:
        arguments = dict(query=q, key=k, value=v, block_mask=mask) | change
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(**arguments)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_autocast_changes_nothing(backend):
    q, k, v = make_qkv(seq_len_q=111)
    mask = make_block_mask(seq_len_q=111, density=0.5, full_rows=True)
    grad = backend == "reference"

    def run() -> list[torch.Tensor]:
        query, key, value = inputs = [x.clone().requires_grad_(grad) for x in (q, k, v)]
        out = block_sparse_attention(query, key, value, mask, backend=backend)
        if grad:
            out.square().sum().backward()
        return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    assert len(got) == (4 if grad else 1)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, want, strict=True))
