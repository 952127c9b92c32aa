"""The Hopper kernel: compiled without a GPU here, checked on one there."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vidsparse_kernels import BlockMask, UnsupportedBackendError, block_sparse_attention, select_backend
from vidsparse_kernels.testing import assert_close_to_oracle, make_block_mask, make_qkv, masked_attention_oracle

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from vidsparse_kernels.block_sparse_attention import hopper

head_dim, block_n = (int(x) for x in sys.argv[1:3])
biased, quantized = sys.argv[3] == "biased", sys.argv[3] == "int8"
kernel = hopper.block_sparse_forward_hopper_kernel
stages = hopper.num_stages(block_n, head_dim)
constants = dict(
    BLOCK_D=head_dim, BLOCK_N=block_n, Q_BLOCK=128, KV_BLOCK=block_n, STAGES=stages, RAGGED_KV=True,
    HAS_BIAS=biased, STORE_LSE=not quantized, QUANTIZED=quantized, LARGEST_MASS=hopper.LARGEST_MASS,
    AHEAD=head_dim <= hopper.MAX_AHEAD and not biased and not quantized,
    CONSUMER_REGISTERS=hopper.CONSUMER_REGISTERS, PRODUCER_REGISTERS=hopper.PRODUCER_REGISTERS)
rows = dict(query=64, key=block_n, value=block_n, out=64)
others = dict(lse_ptr="*fp32", counts_ptr="*i32", indices_ptr="*i32", bias_ptr="*fp32",
    query_scale_ptr="*fp32", key_scale_ptr="*fp32", order_ptr="*i32", counter_ptr="*i32", qk_scale_log2="fp32")
signature = {}
for name in kernel.arg_names:
    if name in constants:
        signature[name] = "constexpr"
    elif name in rows:
        short = quantized and name in ("query", "key")
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows[name], head_dim], gl.int8 if short else gl.bfloat16)
        signature[name] = f"tensordesc<{'i8' if short else 'bf16'}[1, 1, {rows[name]}, {head_dim}],{layout!r}>"
    else:
        signature[name] = others.get(name, "i32")
attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")}
places = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
source = GluonASTSource(kernel, signature, places, attributes)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, enable_fp_fusion=True))
ptx = compiled.asm["ptx"]
assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
for word in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "mbarrier.try_wait"):
    assert word in ptx, word
assert ("k32.s32.s8.s8" in ptx) == quantized
# A thread loads two numbers of the bias at once; nothing else in the kernel does.
print("biased" if "ld.global.v2.b32" in ptx else "plain")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.parametrize(
    ("head_dim", "block_n", "kind"),
    [
        (128, 128, "plain"),
        (128, 64, "plain"),
        (64, 128, "plain"),
        (64, 64, "plain"),
        (128, 128, "biased"),
        (64, 64, "biased"),
        (128, 128, "int8"),
    ],
)
def test_compiles_without_a_gpu(head_dim, block_n, kind, tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED, str(head_dim), str(block_n), kind],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(SOURCE_ROOT),
            "TRITON_CACHE_DIR": str(tmp_path),
            "TRITON_INTERPRET": "0",
        },
    )
    assert result.returncode == 0, result.stderr[:3000]
    assert result.stdout.strip() == ("biased" if kind == "biased" else "plain")


COMPILED_BACKWARD = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from vidsparse_kernels.block_sparse_attention import hopper, hopper_backward

kernel = hopper_backward.block_sparse_backward_query_hopper_kernel
constants = dict(
    BLOCK_D=128, Q_BLOCK=128, KV_BLOCK=64, STAGES=hopper_backward.STAGES, RAGGED_KV=True,
    CONSUMER_REGISTERS=hopper.CONSUMER_REGISTERS, PRODUCER_REGISTERS=hopper.PRODUCER_REGISTERS)
layout = gl.NVMMASharedLayout.get_default_for([1, 1, 64, 128], gl.bfloat16)
signature = {name: "i32" for name in kernel.arg_names} | {name: "constexpr" for name in constants}
signature |= dict.fromkeys(("query", "grad_out", "key", "value", "grad_query"), f"tensordesc<bf16[1, 1, 64, 128],{layout!r}>")
signature |= dict(
    lse_ptr="*fp32", delta_ptr="*fp32", counts_ptr="*i32", indices_ptr="*i32", order_ptr="*i32", counter_ptr="*i32",
    scale="fp32", qk_scale_log2="fp32")
attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")}
places = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
source = GluonASTSource(kernel, signature, places, attributes)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, enable_fp_fusion=True))
ptx = compiled.asm["ptx"]
assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
for word in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "mbarrier.try_wait"):
    assert word in ptx, word
assert "local" not in ptx
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_backward_compiles_without_a_gpu(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED_BACKWARD],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(SOURCE_ROOT),
            "TRITON_CACHE_DIR": str(tmp_path),
            "TRITON_INTERPRET": "0",
        },
    )
    assert result.returncode == 0, result.stderr[:3000]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.parametrize("q_block_size", [128, 256])
def test_q_tiles_with_the_longest_lists_come_first_from_the_second_call_on(q_block_size):
    from vidsparse_kernels.block_sparse_attention.hopper_schedule import longest_first

    mask = make_block_mask(seq_len_q=1300, q_block_size=q_block_size, num_heads=3, density=0.5, full_rows=True)
    assert longest_first(mask, 128) is None
    order = longest_first(mask, 128)
    assert order is not None and order.shape == (1, 3, 11) and order.dtype == torch.int32
    assert torch.equal(order.sort(-1).values, torch.arange(11, dtype=torch.int32).expand(1, 3, 11))
    lengths = mask.kv_num_blocks.gather(-1, (order * 128 // q_block_size).long())
    assert bool((lengths.diff(dim=-1) <= 0).all()) and bool((lengths.diff(dim=-1) < 0).any())
    assert longest_first(mask, 128) is order


def test_refused_without_a_gpu():
    q, k, v = make_qkv(seq_len_q=128)
    mask = make_block_mask(seq_len_q=128, q_block_size=128, kv_block_size=128)
    with pytest.raises(UnsupportedBackendError, match='backend "hopper" needs a CUDA GPU'):
        block_sparse_attention(q, k, v, mask, backend="hopper")


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)


def check(q, k, v, mask, key_bias=None):
    truth, truth_lse = masked_attention_oracle(q, k, v, mask, key_bias=key_bias)
    eager, eager_lse = masked_attention_oracle(q, k, v, mask, key_bias=key_bias, dtype=q.dtype)
    options = {"key_bias": key_bias, "backend": "hopper"}
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, **options)
    assert_close_to_oracle(out, eager, truth)
    assert_close_to_oracle(lse, eager_lse, truth_lse, name="lse")
    assert torch.equal(block_sparse_attention(q, k, v, mask, **options), out)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (256, 64), (128, 256), (256, 192)], ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 72, 96, 128])
def test_shapes(head_dim, blocks):
    dtype = torch.float16 if head_dim == 72 else torch.bfloat16
    for number, (seq_len_q, seq_len_kv, num_heads, num_kv_heads, batch) in enumerate(
        [(1, 1, 1, 1, 1), (63, 111, 2, 2, 2), (640, 1280, 6, 2, 2), (1000, 77, 3, 1, 1), (4097, 2016, 4, 2, 1)]
    ):
        q, k, v = make_qkv(
            batch=batch, seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim, dtype=dtype, device="cuda", contiguous=number % 2 == 0, seed=number,
        )  # fmt: skip
        mask = make_block_mask(
            seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, q_block_size=blocks[0], kv_block_size=blocks[1],
            batch=batch if number % 2 else 1, num_heads=num_heads if number > 1 else 1,
            empty_rows=number > 1, full_rows=True, device="cuda", seed=number,
        )  # fmt: skip
        check(q, k, v, mask)


@pytest.mark.gpu
@on_hopper
def test_more_q_tiles_than_multiprocessors():
    """Every program then takes several, of very different lengths."""
    q, k, v = make_qkv(seq_len_q=30_000, seq_len_kv=1500, num_heads=2, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(
        seq_len_q=30_000, seq_len_kv=1500, q_block_size=128, kv_block_size=128, num_heads=2, density=0.3,
        empty_rows=True, full_rows=True, device="cuda",
    )  # fmt: skip
    check(q, k, v, mask)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_logits_far_above_those_of_the_first_tile(head_dim, dtype):
    """Lists are walked from their end: there the logits are small, and weights of the others overflow unless the tile is
    done again with a running maximum."""
    q, k, v = make_qkv(seq_len_q=3000, num_heads=3, head_dim=head_dim, dtype=dtype, device="cuda")
    mask = make_block_mask(
        seq_len_q=3000, q_block_size=128, kv_block_size=128, num_heads=3, density=0.6, full_rows=True, device="cuda"
    )
    # In some q tiles only, so that others follow and precede what comes again.
    q[:, 700:1500] *= 8.0
    k[:, :2000] *= 12.0
    q[:, -100:] *= 8.0
    check(q, k, v, mask)
    check(q, k, v, mask, torch.randn(1, 3, 3000, device="cuda"))
    # Sums that overflow although no weight does.
    check(q, k, v * (2.0**100 if dtype == torch.bfloat16 else 16.0), mask)


@pytest.mark.gpu
@on_hopper
def test_the_order_of_q_tiles_changes_no_bit():
    q, k, v = make_qkv(seq_len_q=20_000, num_heads=2, dtype=torch.bfloat16, device="cuda")
    dense = torch.rand(1, 2, 157, 157, device="cuda") < torch.linspace(0.05, 0.9, 157, device="cuda")[:, None]
    mask = BlockMask.from_dense(dense, seq_len_q=20_000, seq_len_kv=20_000, q_block_size=128, kv_block_size=128)
    first, *others = (block_sparse_attention(q, k, v, mask, backend="hopper") for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.gpu
@on_hopper
def test_offsets_beyond_int32():
    """Views into one array; each q-block lists the kv-block of its own tokens."""
    seq_len, num_heads, head_dim = 150_000, 128, 128
    fused = torch.randn(1, seq_len, num_heads, 3 * head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.split(head_dim, -1)
    assert q.numel() > 2**31
    blocks = -(-seq_len // 128)
    mask = BlockMask.from_indices(
        torch.ones(1, 1, blocks, device="cuda", dtype=torch.int32),
        torch.arange(blocks, device="cuda").view(1, 1, -1, 1),
        seq_len_q=seq_len, seq_len_kv=seq_len, q_block_size=128, kv_block_size=128,
    )  # fmt: skip
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="hopper")
    tail = slice(seq_len - seq_len % 128, None)
    local = BlockMask.full(seq_len % 128, seq_len % 128, q_block_size=128, kv_block_size=128, device="cuda")
    (truth, truth_lse), (eager, eager_lse) = (
        masked_attention_oracle(q[:, tail], k[:, tail], v[:, tail], local, dtype=d) for d in (torch.float64, q.dtype)
    )
    assert_close_to_oracle(out[:, tail], eager, truth)
    assert_close_to_oracle(lse[:, :, tail], eager_lse, truth_lse, name="lse")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (256, 192)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_gradients(head_dim, blocks, monkeypatch):
    """Of query by the kernel for Hopper from head_dim 65 on, of key and value by the portable one."""
    from vidsparse_kernels.block_sparse_attention import hopper_backward

    calls = []
    launch = hopper_backward.hopper_grad_query
    monkeypatch.setattr(
        hopper_backward, "hopper_grad_query", lambda *args, **more: calls.append(launch(*args, **more))
    )
    dtype = torch.float16 if head_dim == 72 else torch.bfloat16
    shapes = [
        (63, 111, 2, 2, 2),
        (640, 1280, 6, 2, 2),
        (1000, 77, 3, 1, 1),
        (4097, 2016, 4, 2, 1),
        (20_000, 300, 2, 2, 1),
    ]
    for number, (seq_len_q, seq_len_kv, num_heads, num_kv_heads, batch) in enumerate(shapes):
        q, k, v = make_qkv(
            batch=batch, seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim, dtype=dtype, device="cuda", contiguous=number % 2 == 0, seed=number,
        )  # fmt: skip
        inputs = [x.requires_grad_() for x in (q, k, v)]
        mask = make_block_mask(
            seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, q_block_size=blocks[0], kv_block_size=blocks[1],
            batch=batch if number % 2 else 1, num_heads=num_heads if number > 1 else 1,
            empty_rows=number > 0, full_rows=True, device="cuda", seed=number,
        )  # fmt: skip
        out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="hopper")
        seen = lse != -torch.inf
        grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)

        def gradients(out, lse, inputs=inputs, seen=seen, grad_out=grad_out, grad_lse=grad_lse):
            losses = (out * grad_out.to(out.dtype)).sum(), (lse * grad_lse.to(lse.dtype))[seen].sum()
            return torch.autograd.grad(losses, inputs, retain_graph=True)

        # Freed memory is handed out again: what is not written holds NaN.
        poison = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        del poison
        actual = gradients(out, lse)
        assert all(torch.equal(a, b) for a, b in zip(actual, gradients(out, lse), strict=True))
        truth = gradients(*masked_attention_oracle(q, k, v, mask))
        eager = gradients(*masked_attention_oracle(q, k, v, mask, dtype=q.dtype))
        for name, a, e, t in zip("qkv", actual, eager, truth, strict=True):
            assert_close_to_oracle(a, e, t, name=name)
    assert len(calls) == (0 if head_dim == 64 else 2 * len(shapes))


@pytest.mark.gpu
@on_hopper
def test_auto_takes_it_where_the_work_is_large():
    q, k, v = make_qkv(seq_len_q=32_760, num_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    mask = make_block_mask(seq_len_q=32_760, q_block_size=128, kv_block_size=128, density=0.1, device="cuda")
    assert select_backend(q, k, v, mask) == ("hopper", "inference on a Hopper GPU")
    bias = torch.zeros(1, 1, 32_760, device="cuda")
    assert select_backend(q, k, v, mask, key_bias=bias)[0] == "hopper"
    small = make_block_mask(seq_len_q=32_760, q_block_size=64, kv_block_size=64, density=0.1, device="cuda")
    assert select_backend(q, k, v, small)[0] == "triton"
    with pytest.raises(UnsupportedBackendError, match="q_block_size that is a multiple of 128, got 64"):
        block_sparse_attention(q, k, v, small, backend="hopper")
