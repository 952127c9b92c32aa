"""The Triton kernel without a GPU: run under the interpreter, and compiled for several GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vidsparse_kernels.block_sparse_attention.configs import forward_config

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"

INTERPRETED = """
import sys
import torch
from vidsparse_kernels import block_sparse_attention
from vidsparse_kernels.testing import (
    assert_close_to_oracle, make_block_mask, make_qkv, make_variable_block_mask, masked_attention_oracle)
from vidsparse_kernels.block_sparse_attention.configs import ForwardConfig
from vidsparse_kernels.block_sparse_attention.forward import triton_forward
from vidsparse_kernels.block_sparse_attention.reference import _Blocks, reference

torch.manual_seed(0)
descriptors = sys.argv[1] == "descriptors"
cases = [
    dict(seq_len_q=63, seq_len_kv=111, num_heads=4, num_kv_heads=2, batch=2, head_dim=72),
    dict(seq_len_q=128, head_dim=32, contiguous=False),
    dict(seq_len_q=65, seq_len_kv=40, head_dim=96, dtype=torch.float16),
]
masks = [dict(q_block_size=32, kv_block_size=32), dict(q_block_size=64, kv_block_size=48), dict(per_head=True)]
for shape in cases:
    q, k, v = make_qkv(**shape)
    for number, options in enumerate(masks if shape is cases[0] else masks[1:2]):
        options = dict(options)
        heads = q.shape[2] if options.pop("per_head", False) else 1
        sizes = dict(q_block_size=32, kv_block_size=64) | options
        mask = make_block_mask(seq_len_q=q.shape[1], seq_len_kv=k.shape[1], num_heads=heads, batch=q.shape[0] if heads > 1 else 1,
                               empty_rows=True, full_rows=True, seed=number, **sizes)
        bias = None
        if number == 2:
            bias = torch.randn(1, 1, k.shape[1])
            bias[..., ::2] = -torch.inf
        truth, truth_lse = masked_attention_oracle(q, k, v, mask, key_bias=bias)
        eager, eager_lse = masked_attention_oracle(q, k, v, mask, key_bias=bias, dtype=q.dtype)
        config = ForwardConfig(32, 16, 4, 2, descriptors)
        out, lse = triton_forward(
            q, k, v, mask, scale=q.shape[-1] ** -0.5, key_bias=bias, return_lse=True, config=config)
        assert_close_to_oracle(out, eager, truth, name=f"{shape} {options}")
        assert_close_to_oracle(lse, eager_lse, truth_lse, name=f"lse {shape} {options}")
out = block_sparse_attention(q, k, v, mask, backend="triton")
assert_close_to_oracle(out, *[masked_attention_oracle(q, k, v, mask, dtype=d)[0] for d in (q.dtype, torch.float64)])
mask = make_block_mask(seq_len_q=90, seq_len_kv=111, q_block_size=32, kv_block_size=16, num_heads=4, density=0.8, empty_rows=True)
variable = make_variable_block_mask(
    seq_len_q=90, seq_len_kv=111, num_q_blocks=4, num_kv_blocks=12, q_block_size=32, kv_block_size=16, density=0.8,
    offsets_heads=4)
q, k, v = make_qkv(seq_len_q=90, seq_len_kv=111, num_heads=4, num_kv_heads=2, head_dim=16)
# All rows agree on which keys matter, as they must for a tile to be left out.
q[..., 0] += 4
k[..., 0] += 4 * torch.sin(torch.arange(111) / 15).view(1, -1, 1)
for mask in (mask, variable):
    for bias in (None, torch.randn(1, 1, 111)):
        options = dict(scale=0.25, key_bias=bias, skip_threshold=0.5)
        out, lse = triton_forward(q, k, v, mask, return_lse=True, config=config, **options)
        truth, truth_lse = reference(q.double(), k.double(), v.double(), mask, **options)
        # Eager attention sums its products in fp32, where the reference does so in fp64.
        in_fp64, _Blocks.product = _Blocks.product, lambda self, a, b: a @ b
        eager, eager_lse = reference(q, k, v, mask, **options)
        _Blocks.product = in_fp64
        assert_close_to_oracle(out, eager, truth, name=f"skip {mask}")
        assert_close_to_oracle(lse, eager_lse, truth_lse, name=f"lse skip {mask}")
        exact, _ = reference(q, k, v, mask, scale=0.25, key_bias=bias)
        assert (exact - eager).abs().max() > 1e-3, "nothing was skipped"
print("checked")
"""

COMPILED = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidsparse_kernels.block_sparse_attention.configs import forward_config, padded_head_dim
from vidsparse_kernels.block_sparse_attention.forward import block_sparse_forward_kernel as kernel

capability, shared_memory, head_dim, descriptors, variable, skip, quantized, fp32 = (int(x) for x in sys.argv[1:])
config = forward_config(
    capability=(capability // 10, capability % 10), shared_memory=shared_memory, head_dim=head_dim,
    itemsize=4 if fp32 else 2, q_block_size=128, kv_block_size=128, descriptors_possible=bool(descriptors))
block_d = padded_head_dim(head_dim)
constants = dict(
    HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, Q_BLOCK=128, KV_BLOCK=128,
    RAGGED_KV=True, HAS_BIAS=False, STORE_LSE=not quantized, DESCRIPTORS=config.descriptors, VARIABLE=bool(variable), SKIP=bool(skip),
    SCALE_BLOCK=128 * quantized, REFINE=bool(fp32), PRECISION="ieee", query_stride_d=1, key_stride_d=1, value_stride_d=1)
tiles = dict(query=config.block_m, key=config.block_n, value=config.block_n, out=config.block_m)
pointers = dict(
    lse_ptr="*fp32", bias_ptr="*fp32", counts_ptr="*i32", indices_ptr="*i32", own_blocks_ptr="*i32",
    own_tiles_ptr="*i32", qk_scale_log2="fp32", skip_log2="fp32",
    query_scale_ptr="*fp32", key_scale_ptr="*fp32")
signature, attributes = {}, {}
for position, name in enumerate(kernel.arg_names):
    if name in constants:
        signature[name] = "constexpr"
    elif name in tiles:
        dtype = "i8" if quantized and name in ("query", "key") else "fp32" if fp32 else "bf16"
        tile = f"tensordesc<{dtype}[1, 1, {tiles[name]}, {block_d}]>"
        signature[name] = tile if config.descriptors and not (variable and name == "out") else f"*{dtype}"
    else:
        signature[name] = pointers.get(name, "i32")
    if signature[name].startswith("*") or "stride" in name and signature[name] == "i32":
        attributes[(position,)] = [["tt.divisibility", 16]]
source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
assert compiled.metadata.shared <= shared_memory, compiled.metadata.shared
ptx = compiled.asm["ptx"]
if fp32:
    # Chains that the compiler has joined would show as products that start from others.
    products = re.findall(r"(%[\\w#]+) = tt.dot %[\\w#]+, %[\\w#]+, (%[\\w#]+)", compiled.asm["ttir"])
    results = {result for result, _ in products}
    assert len(products) == 4 + 2, products
    assert not any(start in results for _, start in products), products
print("wgmma" in ptx, "cp.async.bulk.tensor" in ptx, compiled.metadata.shared)
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
def test_interpreted_kernel_is_exact(variant):
    """bf16 is left to the GPU tests: the interpreter computes with numpy, which has no bf16."""
    assert run(INTERPRETED, variant, TRITON_INTERPRET="1") == "checked"


@pytest.mark.parametrize(
    ("capability", "shared_memory", "head_dim", "descriptors", "expected", "kind"),
    [
        (*device, kind)
        for device in (
            (80, 163 * 1024, 128, False, "False False"),
            (90, 227 * 1024, 128, True, "True True"),
            (100, 227 * 1024, 128, True, "False True"),
            (120, 99 * 1024, 128, True, "False True"),
        )
        for kind in ("uniform", "variable", "skipping", "int8", "fp32")
        if kind != "int8" or device[0] in (80, 90)
    ],
)
def test_compiles_without_a_gpu(capability, shared_memory, head_dim, descriptors, expected, kind, tmp_path):
    """Expected: whether the code uses Hopper's warpgroup products, and whether it loads through TMA."""
    flags = (kind == "variable", kind == "skipping", kind == "int8", kind == "fp32")
    if kind == "fp32":
        expected = expected.replace("True True", "False True")  # its products are on the plain cores
    arguments = (str(int(x)) for x in (capability, shared_memory, head_dim, descriptors, *flags))
    printed = run(COMPILED, *arguments, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert printed.startswith(expected), printed


@pytest.mark.parametrize("shared_memory", [48 * 1024, 64 * 1024, 99 * 1024, 227 * 1024])
@pytest.mark.parametrize("head_dim", [16, 72, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("blocks", [(128, 128), (64, 32), (48, 80)], ids=str)
def test_every_configuration_fits(shared_memory, head_dim, itemsize, blocks):
    for capability in (None, (8, 0), (9, 0), (10, 0), (12, 0), (13, 7)):
        config = forward_config(
            capability=capability,
            shared_memory=shared_memory,
            head_dim=head_dim,
            itemsize=itemsize,
            q_block_size=blocks[0],
            kv_block_size=blocks[1],
            descriptors_possible=True,
        )
        assert blocks[0] % config.block_m == 0 and blocks[1] % config.block_n == 0
        assert config.block_m >= 16 and config.block_n >= 16
        padded = 1 << (head_dim - 1).bit_length()
        tiles = (config.block_m + 2 * config.num_stages * config.block_n) * padded * itemsize
        assert tiles <= shared_memory
        assert not config.descriptors or (capability is not None and capability >= (9, 0))
