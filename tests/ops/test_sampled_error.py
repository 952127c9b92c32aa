"""Error on sampled rows: the reference against row-by-row attention, and the kernels in the interpreter and compiled."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse_kernels import UnsupportedBackendError, sampled_error
from vidsparse_kernels.testing import make_qkv

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_row_by_row(data: st.DataObject) -> None:
    """In float64, head by head and row by row, with a bias that shuts keys."""
    draw = data.draw
    batch, kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    length, heads = draw(st.integers(3, 40)), kv_heads * groups
    first = draw(st.integers(0, length - 2))
    among = draw(st.integers(1, length - first))
    count, offset = draw(st.integers(1, among)), draw(st.integers(0, among - 1))
    begin = draw(st.integers(0, heads - 1))
    end = draw(st.integers(begin + 1, heads))
    q, k, v = make_qkv(batch=batch, seq_len_q=length, num_heads=heads, num_kv_heads=kv_heads, head_dim=8,
                       dtype=torch.float64, contiguous=False)  # fmt: skip
    out = torch.randn(batch, length, heads, 8, dtype=torch.float64)
    bias = torch.zeros(batch, draw(st.sampled_from([1, heads])), length)
    bias[:, :, :2] = -math.inf
    found = sampled_error(
        q, k, v, out, first=first, among=among, count=count, offset=offset, heads=(begin, end), key_bias=bias
    )
    rows = [first + (i * among + offset) // count for i in range(count)]
    assert len(set(rows)) == count and first <= min(rows) and max(rows) < first + among
    for b in range(batch):
        wanted = []
        for head in range(begin, end):
            logits = q[b, :, head] @ k[b, :, head // groups].T / math.sqrt(8)
            logits = logits + bias[b, head if bias.shape[1] > 1 else 0].double()
            exact = logits.softmax(-1) @ v[b, :, head // groups]
            error = (out[b, rows, head] - exact[rows]).square().sum(-1)
            wanted.append(torch.stack([error, exact[rows].square().sum(-1)], 1))
        assert torch.allclose(found[b].double(), torch.cat(wanted), rtol=1e-5)


def test_exact_output_has_no_error() -> None:
    q, k, v = make_qkv(seq_len_q=100, dtype=torch.float64)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    x = torch.nn.functional.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2]).transpose(
        1, 2
    )
    error, norm = sampled_error(q, k, v, x)[0].unbind(-1)
    assert bool((error < 1e-25 * norm).all() and (norm > 0).all())
    assert torch.equal(sampled_error(q, k, v, x), sampled_error(q, k, v, x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 101}, "must lie among 100 rows"),
        ({"offset": 100}, "must lie among"),
        ({"first": 60, "among": 50}, "must lie among 50 rows from 60 on"),
        ({"heads": (1, 3)}, "range of the 2 heads"),
        ({"backend": "hopper"}, "must be one of auto, reference, triton"),
    ],
)
def test_bad_arguments(options: dict, words: str) -> None:
    q, k, v = make_qkv(seq_len_q=100)
    with pytest.raises(ValueError, match=words):
        sampled_error(q, k, v, q, **options)


def test_the_kernel_takes_no_float64() -> None:
    q, k, v = make_qkv(seq_len_q=100, dtype=torch.float64)
    with pytest.raises(UnsupportedBackendError, match='use backend="reference"'):
        sampled_error(q, k, v, q, backend="triton")


INTERPRETED = """
import torch
from vidsparse_kernels import sampled_error
from vidsparse_kernels.testing import make_qkv

for batch, length, heads, kv_heads, head_dim, biased, count, sampled, first in [
    (1, 300, 4, 4, 64, False, 32, (1, 3), 0), (2, 700, 6, 2, 40, True, 7, (1, 5), 30), (1, 40, 2, 2, 128, True, 17, (0, 2), 3)
]:
    q, k, v = make_qkv(
        batch=batch, seq_len_q=length, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, contiguous=False)
    out, bias = torch.randn(q.shape), None
    if biased:
        bias = torch.zeros(batch, 1, length)
        bias[:, :, length // 2 :] = -torch.inf
        bias[:, :, 3] = 1.5
        bias[-1] = -torch.inf if length == 40 else bias[-1]  # rows without any key
    options = dict(first=first, among=length - first - 5, count=count, offset=17, heads=sampled, key_bias=bias)
    got, want = (sampled_error(q, k, v, out, backend=name, **options) for name in ("triton", "reference"))
    assert torch.allclose(got, want, rtol=2e-5, atol=0), (got, want)
print("checked")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidsparse_kernels.sampled_error.forward import _compare, _partial

for kernel, constants, warps in (
    (_partial, dict(HEAD_DIM=128, BLOCK_D=128, ROWS=32, TILE=64, HAS_BIAS=True, q_d=1, k_d=1, v_d=1, bias_s=1), 4),
    (_compare, dict(HEAD_DIM=128, BLOCK_D=128, ROWS=32, RUNS=128, STEP=16, o_d=1), 2),
):
    halves = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
    signature = {}
    for name in kernel.arg_names:
        kind = "*bf16" if name in halves else "*fp32" if name.endswith("_ptr") else "fp32" if "scale" in name else "i32"
        signature[name] = "constexpr" if name in constants else kind
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name[2:] in ("b", "s", "h")
    }
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps, num_stages=3))
    print("mma" in compiled.asm["ptx"], compiled.metadata.shared < 100_000)
"""


def run(code: str, **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT), **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split()


@needs_triton
def test_interpreted_kernels_agree_with_the_reference() -> None:
    """bf16 is left to the GPU test: the interpreter computes with numpy, which has no bf16."""
    assert run(INTERPRETED, TRITON_INTERPRET="1") == ["checked"]


@needs_triton
def test_compiles_without_a_gpu(tmp_path: Path) -> None:
    assert run(COMPILED, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0") == ["True", "True", "False", "True"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_on_a_gpu(dtype: torch.dtype, head_dim: int) -> None:
    """The exact rows against float64, at the error of the number format; twice the same to the bit."""
    for batch, length, count, offset in ((1, 77, 13, 5), (2, 4097, 32, 4000), (1, 32_760, 32, 0)):
        q, k, v = make_qkv(batch=batch, seq_len_q=length, num_heads=6, num_kv_heads=3, head_dim=head_dim, dtype=dtype,
                           device="cuda", contiguous=False)  # fmt: skip
        out = torch.zeros_like(q)
        options = {"count": count, "offset": offset, "heads": (1, 4)}
        first, second = (sampled_error(q, k, v, out, backend="triton", **options) for _ in range(2))
        truth = sampled_error(*(x.double() for x in (q, k, v, out)), **options)
        assert torch.equal(first, second)
        # Zeros for the output: error and norm are both the norm of the exact rows. A row alone has the error of its logits.
        eps = torch.finfo(dtype).eps
        assert torch.allclose(first.sum(1), truth.sum(1), rtol=8 * eps), (first, truth)
        assert torch.allclose(first, truth, rtol=16 * eps)
