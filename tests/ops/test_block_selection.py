"""Block pooling and block selection on the CPU: against definitions written as loops, and by properties."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse_kernels import (
    UnsupportedBackendError,
    block_sparse_attention,
    pool_blocks,
    score_blocks,
    select_block_lists,
    select_blocks,
    select_from_qk,
)
from vidsparse_kernels.testing import assert_close_to_oracle, make_qkv, masked_attention_oracle

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"
KINDS = ("mean", "max", "min")


def pooled_by_loops(x, bounds, dtype):
    """`bounds[b][h]` lists the first token of each block and the end of the last; result `[B, H, M, D]`."""
    result = {kind: [] for kind in KINDS}
    for b in range(x.shape[0]):
        for h in range(x.shape[2]):
            for start, stop in zip(bounds[b][h][:-1], bounds[b][h][1:], strict=True):
                block = x[b, start:stop, h].to(dtype)
                empty = start == stop
                result["mean"].append(block.sum(0) / max(1, stop - start))
                result["max"].append(torch.full_like(x[0, 0, 0], -torch.inf, dtype=dtype) if empty else block.amax(0))
                result["min"].append(torch.full_like(x[0, 0, 0], torch.inf, dtype=dtype) if empty else block.amin(0))
    shape = (x.shape[0], x.shape[2], len(bounds[0][0]) - 1, x.shape[3])
    return {kind: torch.stack(rows).view(shape) for kind, rows in result.items()}


def check_pooled(got, x, bounds):
    eager, truth = pooled_by_loops(x, bounds, torch.float32), pooled_by_loops(x, bounds, torch.float64)
    assert set(got) == set(KINDS) and all(p.dtype == torch.float32 for p in got.values())
    assert_close_to_oracle(got["mean"], eager["mean"], truth["mean"])
    for kind in ("max", "min"):
        assert torch.equal(got[kind], eager[kind])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([1, 15, 63, 64, 111, 130]),
    st.sampled_from([1, 16, 64, 100, 300]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_pooling_of_uniform_blocks(seq_len, block_size, dtype, contiguous, seed):
    x, _, _ = make_qkv(batch=2, seq_len_q=seq_len, head_dim=8, dtype=dtype, contiguous=contiguous, seed=seed)
    row = [*range(0, seq_len, block_size), seq_len]
    check_pooled(pool_blocks(x, block_size, kinds=KINDS), x, [[row] * 2] * 2)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_pooling_of_variable_blocks(data):
    seq_len, num_blocks = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 9))
    lead = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]))
    rows = [
        [sorted(data.draw(st.lists(st.integers(0, seq_len), min_size=num_blocks + 1, max_size=num_blocks + 1)))
         for _ in range(lead[1])]
        for _ in range(lead[0])
    ]  # fmt: skip
    x, _, _ = make_qkv(batch=2, seq_len_q=seq_len, num_heads=3, head_dim=8, seed=seq_len)
    got = pool_blocks(x, 1, kinds=KINDS, offsets=torch.tensor(rows, dtype=torch.int32))
    check_pooled(got, x, [[rows[b % lead[0]][h % lead[1]] for h in range(3)] for b in range(2)])


def test_mean_pooling_is_differentiable():
    x = torch.randn(1, 70, 1, 4, requires_grad=True)
    pooled = pool_blocks(x, 32)["mean"]
    (grad,) = torch.autograd.grad(pooled.sum(), x)
    expected = torch.full((70,), 1 / 32)
    expected[64:] = 1 / 6
    torch.testing.assert_close(grad[0, :, 0], expected[:, None].expand(70, 4))


def test_scores_with_shared_key_heads():
    q, k = torch.randn(2, 6, 5, 16), torch.randn(2, 2, 7, 16)
    expected = torch.einsum("bhmd,bhnd->bhmn", q.double(), k.double().repeat_interleave(3, 1))
    torch.testing.assert_close(score_blocks(q, k).double(), expected / 4, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score_blocks(q, k, 0.1).double(), expected * 0.1, rtol=1e-5, atol=1e-5)


@st.composite
def rows_of_scores(draw):
    """Scores `[1, 2, 2, n]` in few steps, so that many are equal; some forced; sizes or none."""
    n = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scores = (torch.randn(1, 2, 2, n, generator=generator) * 2).round(decimals=draw(st.sampled_from([0, 1, 4])))
    forced = sizes = None
    if draw(st.booleans()):
        forced = torch.rand(1, 2, draw(st.sampled_from([1, 2])), n, generator=generator) < 0.2
    if draw(st.booleans()):
        sizes = torch.randint(1, 100, (1, 2, n), generator=generator)
    return scores, forced, sizes


def order_of(scores, forced, sizes, h, m):
    """The definition: forced first, then by falling weight, then by index."""
    n = scores.shape[-1]
    weight = scores[0, h, m] if sizes is None else scores[0, h, m] + sizes[0, h].float().log()
    taken_first = [forced is not None and bool(forced[0, h, m % forced.shape[2], j]) for j in range(n)]
    order = sorted(range(n), key=lambda j: (not taken_first[j], -float(weight[j]), j))
    return order, sum(taken_first), weight


def lists_of(counts, indices, h, m):
    count = int(counts[0, h, m])
    assert not indices[0, h, m, count:].any()
    return indices[0, h, m, :count].tolist()


@settings(deadline=None, max_examples=200)
@given(rows_of_scores(), st.integers(1, 45), st.integers(1, 5))
def test_top_k_is_the_definition(case, top_k, min_blocks):
    """Also: forced blocks always in, lists ascending, never empty, ties towards the lower index."""
    scores, forced, sizes = case
    counts, indices = select_block_lists(
        scores, top_k=top_k, min_blocks=min_blocks, forced=forced, kv_block_sizes=sizes
    )
    assert counts.dtype == indices.dtype == torch.int32
    for h in range(2):
        for m in range(2):
            order, num_forced, _ = order_of(scores, forced, sizes, h, m)
            number = min(max(top_k, min_blocks, num_forced), scores.shape[-1])
            assert lists_of(counts, indices, h, m) == sorted(order[:number])


@settings(deadline=None, max_examples=200)
@given(rows_of_scores(), st.floats(0.01, 0.999), st.integers(1, 5))
def test_top_p_is_the_smallest_set_that_reaches_the_mass(case, top_p, min_blocks):
    scores, forced, sizes = case
    counts, indices = select_block_lists(
        scores, top_p=top_p, min_blocks=min_blocks, forced=forced, kv_block_sizes=sizes
    )
    for h in range(2):
        for m in range(2):
            order, num_forced, weight = order_of(scores, forced, sizes, h, m)
            mass = torch.softmax(weight.double(), -1)
            got = lists_of(counts, indices, h, m)
            assert got == sorted(order[: len(got)])
            assert float(mass[got].sum()) >= top_p - 1e-6
            if len(got) > max(num_forced, min(min_blocks, scores.shape[-1])):
                assert float(mass[order[: len(got) - 1]].sum()) < top_p + 1e-6


@settings(deadline=None, max_examples=50)
@given(rows_of_scores(), st.floats(0.01, 1.0))
def test_density_is_exact(case, density):
    scores, _, _ = case
    counts, _ = select_block_lists(scores, density=density)
    n = scores.shape[-1]
    assert bool((counts == math.ceil(density * n - 1e-9)).all())
    assert int(counts.max()) == 1 or int(counts.max()) - 1 < density * n


@pytest.mark.parametrize(
    ("top_p", "min_blocks", "expected"),
    [(0.9, 1, 3), (0.79, 1, 2), (0.81, 1, 3), (0.4, 1, 1), (0.4, 2, 2), (0.96, 1, 4), (1.0, 1, 4)],
)
def test_top_p_on_a_known_row(top_p, min_blocks, expected):
    """The clusters of Sparse VideoGen 2's selection (arXiv 2505.18875): masses 0.5, 0.3, 0.15, 0.05."""
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().view(1, 1, 1, 4)
    counts, indices = select_block_lists(scores, top_p=top_p, min_blocks=min_blocks)
    assert lists_of(counts, indices, 0, 0) == list(range(expected))
    # The same masses through sizes: equal scores, sizes in the same proportions.
    sizes = torch.tensor([50, 30, 15, 5])
    counts, _ = select_block_lists(torch.zeros(1, 1, 1, 4), top_p=top_p, min_blocks=min_blocks, kv_block_sizes=sizes)
    assert int(counts) == expected


def test_scores_that_are_no_numbers():
    """NaN counts as -inf; rows of nothing else still have blocks; +inf takes all the mass."""
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[nan, 1.0, 2.0, -inf], [nan, nan, nan, nan], [-inf] * 4, [0.0, inf, nan, inf]])[None, None]
    _, indices = select_block_lists(scores, top_k=2)
    assert indices[0, 0].tolist() == [[1, 2], [0, 1], [0, 1], [1, 3]]
    counts, indices = select_block_lists(scores, top_p=0.6)
    assert counts.tolist() == [[[1, 3, 3, 2]]]
    assert indices[0, 0].tolist() == [[2, 0, 0], [0, 1, 2], [0, 1, 2], [1, 3, 0]]


def test_zero_and_minus_zero_are_equal():
    counts, indices = select_block_lists(torch.tensor([-0.0, 0.0, -0.0]).view(1, 1, 1, 3), top_k=1)
    assert indices.tolist() == [[[[0]]]]


def test_nothing_waits_for_the_device():
    """Tensors without data have no values to read; the room of the lists is known from the arguments."""
    scores, forced = torch.empty(1, 2, 3, 50, device="meta"), torch.empty(1, 50, dtype=torch.bool, device="meta")
    cases: list[tuple[dict[str, Any], int]] = [
        (dict(top_k=7), 7), (dict(density=0.1), 5), (dict(top_p=0.9), 50), (dict(top_k=7, forced=forced), 50),
        (dict(top_k=7, forced=forced, max_forced=10), 10), (dict(top_k=7, forced=forced, max_forced=3), 7),
    ]  # fmt: skip
    for options, room in cases:
        counts, indices = select_block_lists(scores, **options)
        assert counts.shape == (1, 2, 3) and indices.shape == (1, 2, 3, room)


@pytest.mark.parametrize("lengths", [(300, 300), (63, 517), (128, 64)], ids=str)
def test_select_from_qk_gives_a_mask_for_attention(lengths):
    q, k, v = make_qkv(batch=2, seq_len_q=lengths[0], seq_len_kv=lengths[1], num_heads=4, num_kv_heads=2, head_dim=32)
    forced = torch.zeros(-(-lengths[1] // 32), dtype=torch.bool)
    forced[0] = True
    mask = select_from_qk(q, k, q_block_size=64, kv_block_size=32, density=0.3, forced=forced)
    assert mask.kv_num_blocks.shape == (2, 4, -(-lengths[0] // 64))
    assert mask.density == pytest.approx(math.ceil(0.3 * len(forced)) / len(forced))
    assert bool(mask.to_dense()[..., 0].all())
    best = score_blocks(pool_blocks(q, 64)["mean"], pool_blocks(k, 32)["mean"])[..., 1:]
    if len(forced) > 2:
        assert bool(mask.to_dense()[..., 1:].gather(-1, best.argmax(-1, keepdim=True)).all())
    out = block_sparse_attention(q, k, v, mask, backend="reference")
    assert_close_to_oracle(
        out, *(masked_attention_oracle(q, k, v, mask, dtype=d)[0] for d in (torch.float32, torch.float64))
    )


def test_selection_has_no_gradient():
    q, k, _ = (x.requires_grad_() for x in make_qkv(seq_len_q=100))
    scores = score_blocks(pool_blocks(q, 32)["mean"], pool_blocks(k, 32)["mean"])
    assert scores.requires_grad
    counts, indices = select_block_lists(scores, top_p=0.5)
    assert not counts.requires_grad and not indices.requires_grad


def test_wrong_arguments_are_named():
    x, scores = torch.randn(1, 20, 2, 4), torch.randn(1, 2, 3, 5)
    fraction: dict[str, Any] = dict(top_k=0.2)
    sizes: dict[str, Any] = dict(seq_len_q=30, seq_len_kv=50, q_block_size=10, kv_block_size=10)
    wrong = [
        (lambda: pool_blocks(x[0], 4), "`x` must be floating point"),
        (lambda: pool_blocks(x, 0), "`block_size` must be a whole number of at least 1, got 0"),
        (lambda: pool_blocks(x, 4, kinds=("median",)), "`kinds` must name some of mean, max, min"),
        (lambda: pool_blocks(x, 4, kinds=()), "`kinds` must name some of mean, max, min"),
        (lambda: pool_blocks(x, 4, offsets=torch.zeros(1, 1, 3)), r"`offsets` must be int32 \[1 or 1, 1 or 2"),
        (lambda: pool_blocks(x, 4, offsets=torch.tensor([[[0, 21]]]).int()), "`offsets` must ascend .* at most 20"),
        (lambda: pool_blocks(x, 4, offsets=torch.tensor([[[5, 3]]]).int()), "`offsets` must ascend"),
        (lambda: pool_blocks(x, 4, backend="cuda"), '`backend` must be "auto" or one of reference, triton'),
        (lambda: score_blocks(scores, scores[:, :, :, :2]), "`k_pooled` must have the batch and head_dim"),
        (lambda: score_blocks(scores[0], scores), "`q_pooled` must be"),
        (lambda: select_block_lists(scores), "Exactly one of `top_k`, `density` and `top_p` must be given, got none"),
        (lambda: select_block_lists(scores, top_k=1, top_p=0.5), r"must be given, got \['top_k', 'top_p'\]"),
        (lambda: select_block_lists(scores, top_k=0), "`top_k` must be a whole number of at least 1, got 0"),
        (lambda: select_block_lists(scores, **fraction), "`top_k` must be a whole number of at least 1, got 0.2"),
        (lambda: select_block_lists(scores, density=1.3), r"`density` must be in \(0, 1\], got 1.3"),
        (lambda: select_block_lists(scores, top_p=0.0), r"`top_p` must be in \(0, 1\], got 0.0"),
        (lambda: select_block_lists(scores, top_k=1, min_blocks=0), "`min_blocks` must be a whole number"),
        (lambda: select_block_lists(scores[0], top_k=1), "`scores` must be floating point"),
        (lambda: select_block_lists(scores, top_k=1, forced=torch.ones(5)), "`forced` must be boolean"),
        (lambda: select_block_lists(scores, top_k=1, forced=torch.ones(4).bool()), "`forced` must be broadcastable"),
        (
            lambda: select_block_lists(scores, top_k=1, forced=torch.ones(5).bool(), max_forced=4),
            r"`max_forced` must bound the forced blocks of every row \(5\), got 4",
        ),
        (
            lambda: select_block_lists(scores, top_k=1, kv_block_sizes=torch.ones(5)),
            "`kv_block_sizes` must be integer",
        ),
        (
            lambda: select_blocks(scores, top_k=1, **{**sizes, "seq_len_q": 31}),
            r"num_heads, 4, 5\] for 31 x 50 tokens",
        ),
        (lambda: select_blocks(scores, top_k=1, **{**sizes, "kv_block_size": 0}), "`kv_block_size` must be a whole"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(UnsupportedBackendError, match='"triton" needs'):
        pool_blocks(x, 4, backend="triton")
    with pytest.raises(UnsupportedBackendError, match='"triton" needs'):
        select_block_lists(scores, top_k=1, backend="triton")


INTERPRETED = """
import torch
from vidsparse_kernels import pool_blocks, select_block_lists
from vidsparse_kernels.testing import make_qkv

KINDS = ("mean", "max", "min")
for seq_len, block_size, head_dim, dtype, contiguous in (
    (63, 16, 40, torch.float32, False), (130, 200, 64, torch.float16, True), (160, 80, 128, torch.float32, True)):
    x, _, _ = make_qkv(batch=2, seq_len_q=seq_len, num_heads=3, head_dim=head_dim, dtype=dtype, contiguous=contiguous)
    offsets = torch.tensor([[[0, 9, 9, 50, 61]], [[3, 4, 20, 60, 63]]], dtype=torch.int32)
    for options in (dict(), dict(offsets=offsets), dict(offsets=offsets[:1].expand(1, 3, 5).contiguous())):
        want = pool_blocks(x, block_size, kinds=KINDS, backend="reference", **options)
        got = pool_blocks(x, block_size, kinds=KINDS, backend="triton", **options)
        torch.testing.assert_close(got["mean"], want["mean"], rtol=1e-6, atol=1e-6)
        assert all(torch.equal(got[kind], want[kind]) for kind in ("max", "min")), (seq_len, options)
only = pool_blocks(x, 80, kinds=("min",), backend="triton")
assert list(only) == ["min"]
assert torch.equal(only["min"], pool_blocks(x, 80, kinds=("min",), backend="reference")["min"])

counts_seen = set()
for seed in range(48):
    generator = torch.Generator().manual_seed(seed)
    n = (1, 2, 7, 33, 64)[seed % 5]
    scores = torch.randn(1, 2, 2, n, generator=generator) * 2
    if seed % 3 == 0:
        scores = scores.round()
    if seed % 4 == 0:
        scores[0, 0, 0] = -torch.inf
        scores[0, 1, 1, 0] = torch.nan
    if seed % 8 == 0:
        scores[0, 1, 0, -1] = torch.inf
    options = (dict(top_k=3), dict(density=0.3), dict(top_p=0.7), dict(top_p=0.9, min_blocks=5), dict(top_p=0.01),
               dict(top_p=1.0))[seed // 2 % 6]
    if seed % 7 > 1:
        options["forced"] = torch.rand(1, 2, 1 + seed % 2, n, generator=generator) < 0.2
    if seed % 2:
        options["kv_block_sizes"] = torch.randint(0, 100, (1, 2, n), generator=generator)
    counts, indices = select_block_lists(scores, backend="reference", **options)
    got_counts, got = select_block_lists(scores, backend="triton", **options)
    assert torch.equal(got_counts, counts), (seed, options)
    longest = indices.shape[-1]
    assert torch.equal(got[..., :longest], indices) and not got[..., longest:].any(), (seed, options)
    counts_seen.add(int(counts.max()))
assert len(counts_seen) > 5
print("checked")
"""

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidsparse_kernels.block_selection.pooling import pool_kernel
from vidsparse_kernels.block_selection.select import select_kernel

def compiled(kernel, constants, pointers):
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if signature[name].startswith("*") or "stride" in name and signature[name] == "i32":
            attributes[(position,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))

pointers = dict(x_ptr="*bf16", offsets_ptr="*i32", mean_ptr="*fp32", max_ptr="*fp32", min_ptr="*fp32")
variant = dict(HEAD_DIM=128, BLOCK_D=128, ROWS=32, HAS_OFFSETS=False, MEAN=True, MAX=False, MIN=False, x_stride_d=1)
print("ld.global.v4" in compiled(pool_kernel, variant, pointers).asm["ptx"])
pointers = dict(scores_ptr="*fp32", forced_ptr="*u8", sizes_ptr="*i64", counts_ptr="*i32", indices_ptr="*i32", top_p="fp32")
variant = dict(BLOCK=512, HAS_FORCED=True, HAS_SIZES=True, TOP_P=True)
print(compiled(select_kernel, variant, pointers).metadata.shared < 48 * 1024)
"""


def run(code: str, *arguments: str, **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT), **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split()


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_interpreted_kernels_agree_with_the_reference():
    assert run(INTERPRETED, TRITON_INTERPRET="1") == ["checked"]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.parametrize("capability", ["80", "90", "100", "120"])
def test_compiles_without_a_gpu(capability, tmp_path):
    """Expected: whether pooling loads 16 bytes at a time, and whether selection fits any shared memory."""
    printed = run(COMPILED, capability, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert printed == ["True", "True"]
