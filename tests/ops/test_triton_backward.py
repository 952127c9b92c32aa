"""The Triton backward without a GPU: run under the interpreter, and compiled for several GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vidsparse_kernels.block_sparse_attention.configs import backward_config, padded_head_dim, smallest_backward

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"

# NaN in everything that torch.empty hands out: a result that is not written, or a row read before, shows.
PRELUDE = """
import sys
import torch
from vidsparse_kernels import block_sparse_attention
from vidsparse_kernels.block_sparse_attention.backward import triton_backward
from vidsparse_kernels.block_sparse_attention.configs import BackwardConfig, BackwardTiles
from vidsparse_kernels.block_sparse_attention.forward import triton_forward
from vidsparse_kernels.testing import assert_close_to_oracle, make_block_mask, make_qkv, masked_attention_oracle

torch.set_num_threads(1)
torch.manual_seed(0)
real_empty = torch.empty
def poisoned_empty(*args, **kwargs):
    x = real_empty(*args, **kwargs)
    return x.fill_(float("nan")) if x.dtype.is_floating_point else x
torch.empty = poisoned_empty

def oracle(q, k, v, mask, grad_out, grad_lse, dtype, bias=None, scale=None):
    tensors = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = masked_attention_oracle(*tensors, mask, dtype=dtype, key_bias=bias, scale=scale)
    loss = (out * grad_out.to(dtype)).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0) * grad_lse.to(dtype)).sum()
    return torch.autograd.grad(loss, tensors)

def assert_gradients(grads, q, k, v, mask, grad_out, grad_lse, name, **options):
    truth, eager = (oracle(q, k, v, mask, grad_out, grad_lse, d, **options) for d in (torch.float64, q.dtype))
    for which, got, e, t in zip(("query", "key", "value"), grads, eager, truth):
        assert got.dtype == q.dtype and got.is_contiguous()
        assert t.abs().max() > 1e-3
        assert_close_to_oracle(got, e, t, name=f"gradient of {which}, {name}")

def tiles(query, key_value, descriptors):
    return BackwardConfig(BackwardTiles(*query, 4, 2, descriptors), BackwardTiles(*key_value, 4, 2, descriptors))

def gradients(q, k, v, mask, *, config, with_lse=True, bias=None, scale=None, seed=0):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    generator = torch.Generator().manual_seed(seed)
    # As strided as the gradient of a transposed projection.
    grad_out = torch.randn(q.transpose(1, 2).shape, generator=generator).to(q.dtype).transpose(1, 2)
    grad_lse = torch.randn(q.shape[0], q.shape[2], q.shape[1], generator=generator) if with_lse else None
    out, lse = triton_forward(q, k, v, mask, scale=scale, key_bias=bias, return_lse=True)
    if grad_lse is not None:
        # What arrives through a row that attends to nothing counts for nothing, whatever it is.
        grad_lse = grad_lse.masked_fill(lse == -torch.inf, float("nan"))
    grads = triton_backward(grad_out, grad_lse, q, k, v, out, lse, mask, scale=scale, key_bias=bias, config=config)
    if grad_lse is not None:
        grad_lse = torch.nan_to_num(grad_lse)
    return grads, grad_out, grad_lse
"""

SHAPES = """
descriptors = sys.argv[1] == "descriptors"
shapes = [
    dict(seq_len_q=63, seq_len_kv=111, num_heads=4, num_kv_heads=2, batch=2, head_dim=72),
    dict(seq_len_q=128, head_dim=32, contiguous=False),
    dict(seq_len_q=111, seq_len_kv=63, head_dim=80, num_heads=3, num_kv_heads=1),
    dict(seq_len_q=65, seq_len_kv=40, head_dim=96, dtype=torch.float16),
    dict(seq_len_q=1, seq_len_kv=1, head_dim=16),
]
masks = [
    (dict(q_block_size=32, kv_block_size=32), (32, 16), (16, 32)),
    (dict(q_block_size=64, kv_block_size=48, broadcast=True), (32, 16), (64, 16)),
    (dict(q_block_size=16, kv_block_size=64), (16, 32), (16, 64)),
]
for index, shape in enumerate(shapes):
    q, k, v = make_qkv(**shape)
    for number, (options, query_tiles, key_value_tiles) in enumerate(masks if index == 0 else masks[index % 3:][:1]):
        options = dict(options)
        heads = 1 if options.pop("broadcast", False) else q.shape[2]
        mask = make_block_mask(
            seq_len_q=q.shape[1], seq_len_kv=k.shape[1], num_heads=heads, batch=q.shape[0] if heads > 1 else 1,
            empty_rows=q.shape[1] > 64, full_rows=True, seed=number, **options)
        grads, grad_out, grad_lse = gradients(
            q, k, v, mask, config=tiles(query_tiles, key_value_tiles, descriptors), with_lse=number != 1)
        assert_gradients(grads, q, k, v, mask, grad_out, grad_lse, f"{shape} {options}")
print("checked")
"""

SEMANTICS = """
from vidsparse_kernels import BlockMask
config = tiles((16, 16), (16, 16), False)
q, k, v = make_qkv(seq_len_q=70, seq_len_kv=85, num_heads=2, head_dim=16, batch=2)

# q-block 1 is empty, and nobody lists kv-block 2.
dense = torch.ones(1, 2, 3, 3, dtype=torch.bool)
dense[:, :, 1], dense[:, :, :, 2] = False, False
mask = BlockMask.from_dense(dense, seq_len_q=70, seq_len_kv=85, q_block_size=32, kv_block_size=32)
grads, grad_out, grad_lse = gradients(q, k, v, mask, config=config)
assert_gradients(grads, q, k, v, mask, grad_out, grad_lse, "empty row and column")
assert not grads[0][:, 32:64].any() and not grads[1][:, 64:].any() and not grads[2][:, 64:].any()
again, _, _ = gradients(q, k, v, mask, config=config)
assert all(torch.equal(a, b) for a, b in zip(grads, again))

# No list has an entry.
none = BlockMask.from_indices(
    torch.zeros(1, 1, 3, dtype=torch.int32), torch.zeros(1, 1, 3, 0, dtype=torch.int32),
    seq_len_q=70, seq_len_kv=85, q_block_size=32, kv_block_size=32)
assert not any(g.any() for g in gradients(q, k, v, none, config=config)[0])

# A bias per head that shuts keys out, and one that shuts out all that a row may see.
bias = torch.randn(1, 2, 85)
bias[..., ::2] = -torch.inf
grads, grad_out, grad_lse = gradients(q, k, v, mask, config=config, bias=bias, scale=0.4)
assert_gradients(grads, q, k, v, mask, grad_out, grad_lse, "bias", bias=bias, scale=0.4)
assert not grads[1][:, ::2].any()
bias[..., :64] = -torch.inf
assert not any(g.any() for g in gradients(q, k, v, mask, config=config, bias=bias)[0])

# So small an LSE that the keys past the end, whose logits would be 0, would weigh infinitely much.
full = BlockMask.full(70, 85, q_block_size=32, kv_block_size=32)
far = ((q + 5.5).half(), (k - 5.5).half(), v.half())
grads, grad_out, grad_lse = gradients(*far, full, config=config)
assert_gradients(grads, *far, full, grad_out, grad_lse, "small LSE")

# Through the public function: LSE only, output only, one tensor only; a sum's gradient is one stored number.
tensors = [x.clone().requires_grad_() for x in (q, k, v)]
zeros, ones = torch.zeros_like(q), torch.ones(2, 2, 70)
out, lse = block_sparse_attention(*tensors, mask, backend="triton", return_lse=True)
got = torch.autograd.grad(lse.masked_fill(lse == -torch.inf, 0.0).sum(), tensors)
truth, eager = (oracle(q, k, v, mask, zeros, ones, d) for d in (torch.float64, torch.float32))
for which, g, e, t in zip("qk", got, eager, truth):
    assert_close_to_oracle(g, e, t, name=f"lse only, {which}")
assert not got[2].any()
got = torch.autograd.grad(block_sparse_attention(*tensors, mask, backend="triton").sum(), tensors)
truth, eager = (oracle(q, k, v, mask, torch.ones_like(q), None, d) for d in (torch.float64, torch.float32))
assert_close_to_oracle(got[2], eager[2], truth[2], name="gradient of value of a sum")
query = q.clone().requires_grad_()
out = block_sparse_attention(query, k, v, mask, backend="triton")
(grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
assert grad.abs().max() > 1e-3
try:
    grad.sum().backward()
except RuntimeError as error:
    assert "once_differentiable" in str(error), error
else:
    raise AssertionError("a second derivative")
print("checked")
"""

CHAINS = """
import numpy as np
from triton.runtime import interpreter
from vidsparse_kernels import BlockMask

def one_term_at_a_time(self, a, b, start, *options):
    # As a GPU's plain cores do: fused, from the start value on. numpy would add up blocks.
    total = start.data
    for i in range(a.data.shape[1]):
        term = a.data[:, i:i + 1].astype(np.float64) * b.data[i:i + 1].astype(np.float64)
        total = (total.astype(np.float64) + term).astype(np.float32)
    return interpreter.TensorHandle(total, start.dtype.scalar)

interpreter.InterpreterBuilder.create_dot = one_term_at_a_time
for seed in range(3):
    q, k, v = make_qkv(seq_len_q=640, seq_len_kv=64, num_heads=6, num_kv_heads=1, head_dim=32, seed=seed)
    mask = BlockMask.full(640, 64, q_block_size=64, kv_block_size=64)
    grads, grad_out, grad_lse = gradients(q, k, v, mask, config=tiles((64, 32), (32, 64), False), seed=seed)
    assert_gradients(grads, q, k, v, mask, grad_out, grad_lse, f"seed {seed}")
    truth, eager = (oracle(q, k, v, mask, grad_out, grad_lse, d) for d in (torch.float64, torch.float32))
    for which, got, e, t in zip(("query", "key", "value"), grads, eager, truth):
        error, own = ((x.double() - t).abs().max() for x in (got, e))
        budget = own + 4 * torch.finfo(torch.float32).eps * t.abs().max()
        print(seed, which, f"{float(error / budget):.2f}", file=sys.stderr)
        assert error < 0.8 * budget, (seed, which, float(error / budget))
print("checked")
"""

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidsparse_kernels.block_sparse_attention import backward
from vidsparse_kernels.block_sparse_attention.configs import backward_config, padded_head_dim

capability, shared_memory, head_dim, variable = (int(x) for x in sys.argv[1:])
config = backward_config(
    capability=(capability // 10, capability % 10), shared_memory=shared_memory, head_dim=head_dim, itemsize=2,
    q_block_size=128, kv_block_size=128, descriptors_possible=True)
block_d = padded_head_dim(head_dim)

def compiled(kernel, constants, tiles, options):
    pointers = dict(
        lse_ptr="*fp32", delta_ptr="*fp32", inverse_ptr="*fp32", grad_lse_ptr="*fp32", lse_log2_ptr="*fp32", bias_ptr="*fp32",
        counts_ptr="*i32", indices_ptr="*i32", own_blocks_ptr="*i32", own_tiles_ptr="*i32", scale="fp32",
        qk_scale_log2="fp32", out="*bf16", grad_out="*bf16", grad_query="*bf16", grad_key="*bf16",
        grad_value="*bf16")
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else tiles.get(name, pointers.get(name, "i32"))
        aligned = ("stride" in name or name == "num_rows") and name not in kernel.do_not_specialize
        if signature[name].startswith("*") or signature[name] == "i32" and aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert result.metadata.shared <= shared_memory, result.metadata.shared
    return result.asm["ptx"]

units = dict(query_stride_d=1, key_stride_d=1, value_stride_d=1, grad_out_stride_d=1)
for kernel, tiles, ragged in (
    (backward.block_sparse_backward_query_kernel, config.grad_query, "RAGGED_KV"),
    (backward.block_sparse_backward_key_value_kernel, config.grad_key_value, "RAGGED_Q"),
):
    constants = dict(
        units, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, Q_BLOCK=128,
        KV_BLOCK=128, GROUP_SIZE=1, HAS_BIAS=False, DESCRIPTORS=tiles.descriptors,
        VARIABLE=bool(variable), REFINE=False, PRECISION="ieee")
    constants[ragged] = not variable and (ragged == "RAGGED_KV" or not tiles.descriptors)
    if ragged == "RAGGED_Q":
        constants["MEMBERS"] = 1
    rows = dict(query=tiles.block_m, key=tiles.block_n, value=tiles.block_n, grad_out=tiles.block_m)
    arrays = {
        name: f"tensordesc<bf16[1, 1, {size}, {block_d}]>" if tiles.descriptors else "*bf16"
        for name, size in rows.items()}
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True)
    ptx = compiled(kernel, constants, arrays, options)
    print("wgmma" in ptx, "cp.async.bulk.tensor" in ptx, end=" ")
constants = dict(
    HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK=64, HAS_GRAD_LSE=True, grad_out_stride_d=1, out_stride_d=1)
compiled(backward.block_sparse_backward_rows_kernel, constants, {}, dict(num_warps=4))
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT), **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@pytest.mark.parametrize("variant", ["descriptors", "pointers"])
def test_interpreted_gradients_are_exact(variant):
    """bf16 is left to the GPU tests: the interpreter computes with numpy, which has no bf16."""
    assert run(PRELUDE + SHAPES, variant, TRITON_INTERPRET="1") == "checked"


def test_interpreted_semantics():
    assert run(PRELUDE + SEMANTICS, TRITON_INTERPRET="1") == "checked"


def test_long_sums_of_fp32_do_not_drift():
    """A key's gradient adds up 3,840 terms of six heads."""
    assert run(PRELUDE + CHAINS, TRITON_INTERPRET="1") == "checked"


@pytest.mark.parametrize("variable", [False, True], ids=["uniform", "variable"])
@pytest.mark.parametrize(
    ("capability", "shared_memory", "head_dim", "expected"),
    [
        (80, 163 * 1024, 128, "False False False False"),
        (80, 163 * 1024, 256, "False False False False"),
        (90, 227 * 1024, 128, "True True True True"),
        (90, 227 * 1024, 256, "True True True True"),
        (100, 227 * 1024, 64, "False True False True"),
        (120, 99 * 1024, 128, "False False False True"),
    ],
)
def test_compiles_without_a_gpu(capability, shared_memory, head_dim, expected, variable, tmp_path):
    """Expected, for query and for key and value: Hopper's warpgroup products, and loads through TMA."""
    arguments = (str(x) for x in (capability, shared_memory, head_dim, int(variable)))
    assert run(COMPILED, *arguments, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0") == expected


@pytest.mark.parametrize("shared_memory", [48 * 1024, 64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("head_dim", [16, 72, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("blocks", [(128, 128), (64, 32), (48, 80)], ids=str)
def test_every_configuration_fits(shared_memory, head_dim, itemsize, blocks):
    for capability in (None, (8, 0), (9, 0), (10, 0), (12, 0), (13, 7)):
        config = backward_config(
            capability=capability,
            shared_memory=shared_memory,
            head_dim=head_dim,
            itemsize=itemsize,
            q_block_size=blocks[0],
            kv_block_size=blocks[1],
            descriptors_possible=True,
        )
        for tiles in (config.grad_query, config.grad_key_value):
            assert blocks[0] % tiles.block_m == 0 and blocks[1] % tiles.block_n == 0
            assert tiles.block_m >= 16 and tiles.block_n >= 16
            assert not tiles.descriptors or (capability is not None and capability >= (9, 0))
        owned_and_looped = (
            (config.grad_query.block_m, config.grad_query.block_n, config.grad_query.num_stages),
            (config.grad_key_value.block_n, config.grad_key_value.block_m, config.grad_key_value.num_stages),
        )
        for owned, looped, num_stages in owned_and_looped:
            if smallest_backward(head_dim, itemsize) <= shared_memory:
                rows = 2 * owned + 2 * num_stages * looped
                assert rows * padded_head_dim(head_dim) * itemsize <= shared_memory
            else:
                assert head_dim == 256 and itemsize == 4 and shared_memory <= 64 * 1024
