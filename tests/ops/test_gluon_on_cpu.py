"""The Gluon kernels, run on the CPU by `gluon_simulator` and compared with float64, and what the simulator notices."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from vidsparse_kernels import BlockMask
from vidsparse_kernels.testing import (
    assert_close_to_oracle,
    make_block_mask,
    make_qkv,
    make_variable_block_mask,
    masked_attention_oracle,
)

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"
LONG: dict[str, Any] = dict(seq_len_q=400, seq_len_kv=515, num_heads=2)
"""More q tiles than programs, a cut tile of keys."""


def in_a_process_of_its_own(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """The simulator takes Gluon's place for good."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", __file__, name, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "TRITON_INTERPRET": "1"},
        timeout=300,
    )


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
SIZES = [(128, 128, "bfloat16"), (64, 64, "float16"), (72, 64, "bfloat16")]


@needs_triton
@pytest.mark.parametrize(("head_dim", "kv_block_size", "dtype"), SIZES)
@pytest.mark.parametrize("name", ["forward", "backward", "packed", "tail", "pools"])
def test_agrees_with_float64(name, head_dim, kv_block_size, dtype):
    result = in_a_process_of_its_own(name, head_dim, kv_block_size, dtype)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "checked" in result.stdout


@needs_triton
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("none", ""),
        ("used before the wait", "used before it has been waited for"),
        ("freed before the wait", "wrong result"),
        ("a tile never freed", "deadlock"),
        ("an arrival too many", "more have arrived"),
    ],
)
def test_the_simulator_notices(mistake, message):
    result = in_a_process_of_its_own("multiply_tiles", mistake)
    assert (result.returncode == 0) == (mistake == "none"), result.stderr[-3000:]
    assert message in result.stderr


def check(function, query, key, value, mask, key_bias=None, **options):
    """Output and LSE of a call, made twice, against the error of eager attention."""
    truth, truth_lse = masked_attention_oracle(query, key, value, mask, key_bias=key_bias)
    eager, eager_lse = masked_attention_oracle(query, key, value, mask, key_bias=key_bias, dtype=query.dtype)
    options = {"key_bias": key_bias, "scale": query.shape[3] ** -0.5, "return_lse": True, **options}
    # The second call has the order of q tiles.
    first, second = (function(query, key, value, mask, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close_to_oracle(first[0], eager, truth)
    assert_close_to_oracle(first[1], eager_lse, truth_lse, name="lse")
    print("checked")


def peaked(query, key):
    """Logits that grow along the lists, so that some q tiles are done again with a running maximum."""
    query, key = query.clone(), key.clone()
    query[:, 130:200] *= 8.0
    key[:, :300] *= 12.0
    return query, key


def forward(head_dim: int, kv_block_size: int, dtype: str) -> None:
    from vidsparse_kernels.block_sparse_attention.hopper import hopper_forward

    q, k, v = make_qkv(batch=2, num_kv_heads=1, head_dim=head_dim, dtype=getattr(torch, dtype), **LONG)
    mask = make_block_mask(
        q_block_size=128, kv_block_size=kv_block_size, density=0.5, empty_rows=True, full_rows=True, **LONG
    )
    bias = torch.randn(1, 2, 515).masked_fill(torch.rand(1, 2, 515) < 0.3, -torch.inf)
    check(hopper_forward, q, k, v, mask)
    check(hopper_forward, q, k, v, mask, bias)
    check(hopper_forward, *peaked(q, k), v, mask)
    check(hopper_forward, *peaked(q, k), v, mask, bias)


def backward(head_dim: int, kv_block_size: int, dtype: str) -> None:
    """The gradient of query; those of key and value are another kernel's, left out here."""
    from vidsparse_kernels.block_sparse_attention.hopper_backward import hopper_grad_query

    q, k, v = make_qkv(batch=2, num_kv_heads=1, head_dim=head_dim, dtype=getattr(torch, dtype), **LONG)
    mask = make_block_mask(
        q_block_size=128, kv_block_size=kv_block_size, density=0.5, empty_rows=True, full_rows=True, **LONG
    )
    grad_out, scale = torch.randn_like(q), q.shape[3] ** -0.5

    def by_autograd(dtype):
        query, key, value = (x.to(dtype).requires_grad_() for x in (q, k, v))
        out, lse = masked_attention_oracle(query, key, value, mask, dtype=dtype)
        grad = torch.autograd.grad(out, query, grad_out.to(dtype))[0]
        return grad, out.detach(), lse.detach()

    truth, out, lse = by_autograd(torch.float64)
    rows = mask.num_q_blocks * mask.q_block_size
    lse_log2, delta = torch.full((2, 2, rows), torch.inf), torch.zeros(2, 2, rows)
    lse_log2[..., :400] = torch.where(lse == -torch.inf, torch.inf, lse * 1.4426950408889634)
    delta[..., :400] = (grad_out * out).sum(-1).transpose(1, 2)
    grads = [torch.full_like(q, torch.nan) for _ in range(2)]
    for grad in grads:
        hopper_grad_query(q, k, v, grad_out, grad, lse_log2, delta, mask, scale=scale)
    assert torch.equal(grads[0], grads[1])
    assert_close_to_oracle(grads[0], by_autograd(q.dtype)[0], truth)
    print("checked")


def packed(head_dim: int, kv_block_size: int, dtype: str) -> None:
    """Blocks of variable size on both sides, and on either."""
    from vidsparse_kernels.block_sparse_attention.hopper_packed import packed_forward

    q, k, v = make_qkv(num_kv_heads=1, head_dim=head_dim, dtype=getattr(torch, dtype), **LONG)
    for num_q_blocks, num_kv_blocks in ((5, 20), (None, 20), (5, None)):
        mask = make_variable_block_mask(
            num_q_blocks=num_q_blocks, num_kv_blocks=num_kv_blocks, q_block_size=128, kv_block_size=kv_block_size,
            offsets_heads=2, density=0.5, empty_rows=True, full_rows=True, **LONG,
        )  # fmt: skip
        check(packed_forward, q, k, v, mask)
        check(packed_forward, *peaked(q, k), v, mask)


def tail(head_dim: int, kv_block_size: int, dtype: str) -> None:
    """Attention with the pooled tail in one kernel; pools by the reference."""
    from vidsparse_kernels.pooled_tail import api

    api._obstacle_with_tail = lambda *arguments: None
    # Its head dims end at 65.
    size = max(head_dim, 72)
    q, k, v = make_qkv(batch=2, num_kv_heads=1, head_dim=size, dtype=getattr(torch, dtype), **LONG)
    blocks: dict[str, Any] = dict(q_block_size=128, kv_block_size=kv_block_size)
    some = make_block_mask(density=0.4, empty_rows=True, full_rows=True, **blocks, **LONG)
    none, every = (
        BlockMask.from_dense(torch.full_like(some.to_dense(), listed), seq_len_q=400, seq_len_kv=515, **blocks)
        for listed in (False, True)
    )
    check_tail(q, k, v, some, first_order=True)
    check_tail(*peaked(q, k), v, some, first_order=False)
    check_tail(*peaked(q, k), v, some, first_order=True)
    check_tail(q, k, v, none, first_order=True)
    check_tail(*peaked(q, k), v, every, first_order=True)
    # Several tiles of means, under lists of no, one, two and three blocks.
    lengths: dict[str, Any] = dict(seq_len_q=256, seq_len_kv=130 * kv_block_size + 3)
    q, k, v = make_qkv(num_heads=2, num_kv_heads=1, head_dim=size, dtype=getattr(torch, dtype), **lengths)
    listed = torch.zeros(1, 2, 2, 131, dtype=torch.bool)
    listed[0, 0, 1, 130] = listed[0, 1, 0, 1:3] = listed[0, 1, 1, ::60] = True
    few = BlockMask.from_dense(listed, **lengths, **blocks)
    check_tail(q, k, v, few, first_order=True)
    check_tail(*peaked(q, k), v, few, first_order=True)


def check_tail(query, key, value, mask, *, first_order: bool) -> None:
    from test_pooled_tail_hopper_gpu import oracle

    from vidsparse_kernels.pooled_tail import block_sparse_attention_with_tail

    truth, eager = (oracle(query, key, value, mask, kind, first_order) for kind in (torch.float64, query.dtype))
    options: dict[str, Any] = dict(first_order=first_order, return_lse=True, backend="hopper_with_tail")
    first, second = (block_sparse_attention_with_tail(query, key, value, mask, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close_to_oracle(first[0], eager[0], truth[0])
    assert_close_to_oracle(first[1], eager[1], truth[1], name="lse")
    print("checked")


def pools(head_dim: int, kv_block_size: int, dtype: str) -> None:
    from vidsparse_kernels.pooled_tail import pool_for_tail
    from vidsparse_kernels.pooled_tail.hopper_pooling import hopper_pool

    _, k, v = make_qkv(
        batch=2, seq_len_q=128, seq_len_kv=1111, num_kv_heads=2, head_dim=head_dim, dtype=getattr(torch, dtype)
    )
    mask = make_block_mask(seq_len_q=128, seq_len_kv=1111, q_block_size=128, kv_block_size=kv_block_size)
    for first_order in (True, False):
        got = hopper_pool(k, v, kv_block_size, first_order=first_order)
        truth, eager = (
            pool_for_tail(k.to(kind), v.to(kind), mask, first_order=first_order, backend="reference")
            for kind in (torch.float64, torch.float32)
        )
        assert (got[2] is None) == (not first_order)
        for name, pooled in zip(("keys", "values", "first_order"), got, strict=True):
            if pooled is not None:
                assert_close_to_oracle(pooled, getattr(eager, name), getattr(truth, name), name=name)
    print("checked")


def multiply_tiles(mistake: str) -> None:
    """A producer and a warpgroup that adds up the products of 20 tiles in two places, with one mistake."""
    import gluon_simulator
    from triton.experimental import gluon
    from triton.experimental.gluon import language
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    jit: Any = gluon.jit
    gl: Any = language
    multiply: Any = warpgroup_mma
    wait: Any = warpgroup_mma_wait
    described: Any = TensorDescriptor
    gluon_simulator.PATIENCE = 3.0

    @jit
    def produce(tiles, smem, full, empty):
        for i in range(20):
            mbarrier.wait(empty.index(i % 2), ((i // 2) & 1) ^ 1)
            mbarrier.expect(full.index(i % 2), tiles.block_type.nbytes)
            tma.async_copy_global_to_shared(tiles, [i * 16, 0], full.index(i % 2), smem.index(i % 2))

    @jit
    def consume(out, smem, full, empty):
        acc = gl.zeros([16, 16], gl.float32)
        ones = gl.full([16, 16], 1.0, gl.float16)
        for i in range(20):
            mbarrier.wait(full.index(i % 2), (i // 2) & 1)
            acc = multiply(ones, smem.index(i % 2), acc, is_async=True)
            if mistake == "freed before the wait":
                mbarrier.arrive(empty.index(i % 2), count=1)
                # Time in which the next copy arrives.
                gluon_simulator.time.sleep(0.01)
            if mistake != "used before the wait":
                acc = wait(0, deps=[acc])
            if mistake != "freed before the wait" and not (mistake == "a tile never freed" and i == 7):
                mbarrier.arrive(empty.index(i % 2), count=2 if mistake == "an arrival too many" and i == 5 else 1)
            acc = acc * 1.0
        places = out + gl.arange(0, 16)[:, None] * 16 + gl.arange(0, 16)[None, :]
        gl.store(places, acc)

    @jit
    def kernel(tiles, out):
        smem = gl.allocate_shared_memory(gl.float16, [2, 16, 16])
        full, empty = (gl.allocate_shared_memory(gl.int64, [2, 1]) for _ in range(2))
        for stage in gl.static_range(2):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=1)
        gl.warp_specialize(
            [(consume, (out, smem, full, empty)), (produce, (tiles, smem, full, empty))], [4, 1], [0, 0]
        )

    tiles, out = torch.randn(320, 16, dtype=torch.float16), torch.empty(16, 16)
    kernel[(1,)](described(tiles, [320, 16], [16, 1], [16, 16]), out)
    assert torch.allclose(out, tiles.float().sum(0).expand(16, 16), atol=1e-4), "wrong result"
    print("checked")


if __name__ == "__main__":
    import gluon_simulator

    torch.manual_seed(0)
    torch.set_num_threads(1)
    gluon_simulator.install()
    globals()[sys.argv[1]](*(int(word) if word.isdigit() else word for word in sys.argv[2:]))
