"""Norm and rotary embedding: the reference against diffusers bit for bit, the kernel against the reference."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vidsparse_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_pair

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"

INTERPRETED = """
import torch
from vidsparse_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_pair
from vidsparse_kernels.qk_norm_rope.testing import assert_rounded_alike
torch.manual_seed(0)
checked = 0
for norm in ("rms_heads", "rms_all", "layer_heads", "none"):
    for head_dim, heads, pairing, dtype in (
        (72, 3, "interleaved", torch.float16), (80, 5, "half", torch.float16), (96, 30, "interleaved", torch.float32)
    ):
        qkv = torch.randn(2, 7, 3 * heads * head_dim).to(dtype)
        q, k, _ = qkv.chunk(3, dim=-1)
        width = heads * head_dim if norm == "rms_all" else head_dim
        weights = tuple(torch.randn(width).to(dtype) for _ in range(2))
        angle = torch.rand(4, head_dim // 2) * 6
        spread = (lambda t: t.repeat_interleave(2, -1)) if pairing == "interleaved" else (lambda t: torch.cat([t, t], -1))
        for early in (False, True):
            args = dict(num_heads=heads, weights=weights, norm=norm, pairing=pairing, rope_start=2,
                        rotary=(spread(angle.cos()), spread(angle.sin())), round_before_weight=early)
            got = qk_norm_rope_pair(q, k, backend="triton", **args)
            want = qk_norm_rope_pair(q, k, backend="reference", **args)
            for g, w in zip(got, want, strict=True):
                assert_rounded_alike(g, w, roundings=1 if norm == "none" else 3 if early else 2, pairing=pairing)
                checked += 1
assert checked == 48
# Any strides, biases, a table for each sample and head; written among other tokens.
x = torch.randn(2, 40, 6, 9).permute(0, 3, 1, 2)
angle = torch.rand(2, 5, 40, 3) * 6
rotary = tuple(t.repeat_interleave(2, -1) for t in (angle.cos(), angle.sin()))
args = dict(weights=(torch.randn(6),) * 2, biases=(torch.randn(6),) * 2, norm="layer_heads", rotary=rotary, rope_start=4)
want = qk_norm_rope_pair(x, 2 - x, backend="reference", **args)
for backend in ("triton", "reference"):
    joined = [torch.full((2, 14, 40, 6), 7.0) for _ in range(2)]
    inside = tuple(t[:, 3:12] for t in joined)
    assert qk_norm_rope_pair(x, 2 - x, backend=backend, out=inside, **args)[0] is inside[0]
    for whole, part, w in zip(joined, inside, want, strict=True):
        assert_rounded_alike(part, w, roundings=3)
        assert (whole[:, :3] == 7).all() and (whole[:, 12:] == 7).all()
assert not torch.equal(*want)
rotary = torch.polar(torch.ones(9, 3), angle.flatten()[:27].view(9, 3))
turned, want = (qk_norm_rope(x, norm="none", rotary=rotary, backend=name) for name in ("triton", "reference"))
assert_rounded_alike(turned, want, roundings=1)
assert (turned - x).abs().max() > 0.1
assert qk_norm_rope(x[:0], backend="triton").shape == (0, 9, 40, 6)
print("checked")
"""

COMPILED = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidsparse_kernels.qk_norm_rope.forward import norm_rope_kernel as kernel

capability, norm, interleaved = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "interleaved"
constants = dict(
    HEAD_DIM=128, BLOCK_D=128, BLOCK_H=16, NORM=norm, EARLY=norm == "rms_heads", HAS_WEIGHT=True, HAS_BIAS=False,
    HAS_ROPE=True, TABLE_PER_HEAD=False, INTERLEAVED=interleaved, PACKED=True, x0_d=1, x1_d=1, cos_h=0, sin_h=0)
signature, attributes = {}, {}
for position, name in enumerate(kernel.arg_names):
    if name in constants:
        signature[name] = "constexpr"
    elif name in ("cos", "sin"):
        signature[name] = "*fp32"
    elif name[:-1] in ("x", "out", "weight", "bias"):
        signature[name] = "*bf16"
    else:
        signature[name] = "fp32" if name.startswith("eps") else "i32"
    if signature[name].startswith("*") and name != "sin" or re.fullmatch("(x.|out|cos|sin)_[bs]|x._h", name):
        attributes[(position,)] = [["tt.divisibility", 16]]
constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
source = ASTSource(kernel, signature, constants, attributes)
options = dict(num_warps=4, enable_fp_fusion=False)
ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
loads, stores = ("".join(set(re.findall(rf"{way}\\.global\\.(v4)\\.", ptx))) for way in ("ld", "st"))
# 16-bit numbers are loaded and stored by eights only: fp32 tables and weights are all that may go one by one.
print(loads, stores, len(re.findall(r"st\\.global\\.(?!v4)", ptx)), "fma.rn.f32" in ptx)
"""


def rotary_tables(seq_len: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(seq_len, head_dim // 2) * 6
    return angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)


@pytest.mark.parametrize("head_dim", [16, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_diffusers_per_head(head_dim: int, dtype: torch.dtype) -> None:
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    torch.manual_seed(head_dim)
    norm = RMSNorm(head_dim, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.get_parameter("weight"))
    x = torch.randn(2, 9, 3 * head_dim).to(dtype)
    rotary: Any = rotary_tables(6, head_dim)
    with torch.no_grad():
        want = norm(x.unflatten(2, (3, -1)))
        rotated: Any = apply_rotary_emb(want[:, :6], rotary, sequence_dim=1)
        want = torch.cat([rotated, want[:, 6:]], dim=1)
        got = qk_norm_rope(
            x, num_heads=3, weight=norm.weight, rotary=rotary, round_before_weight=dtype == torch.bfloat16
        )
    assert torch.equal(got, want)


def test_complex_tables_are_the_pairs() -> None:
    x = torch.randn(2, 5, 3, 16)
    cos, sin = rotary_tables(5, 16)
    got = qk_norm_rope(x, norm="none", rotary=torch.complex(cos[:, ::2], sin[:, ::2]))
    assert torch.equal(got, qk_norm_rope(x, norm="none", rotary=(cos, sin)))


def test_gradients() -> None:
    q, k = (torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = tuple(torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = (t.double() for t in rotary_tables(2, 4))
    assert torch.autograd.gradcheck(
        lambda a, b, *w: qk_norm_rope_pair(a, b, weights=w, norm="rms_all", rotary=(cos, sin), rope_start=1),
        (q, k, *weights),
    )


def test_errors() -> None:
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="rotary"):
        qk_norm_rope(x, rotary=rotary_tables(5, 8))
    with pytest.raises(ValueError, match="norm"):
        qk_norm_rope(x, norm="rms")
    with pytest.raises(ValueError, match="weight"):
        qk_norm_rope(x, weight=torch.ones(16))


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_kernel_in_the_interpreter() -> None:
    """bf16 is left to the GPU tests: the interpreter cuts fp32 off where the GPU rounds to bf16."""
    pytest.importorskip("triton")
    assert run(INTERPRETED, TRITON_INTERPRET="1") == "checked"


@pytest.mark.parametrize(
    ("capability", "norm", "pairing"),
    [("90", "rms_all", "interleaved"), ("90", "rms_heads", "half"), ("80", "rms_heads", "interleaved")],
)
def test_compiles_to_wide_loads_and_stores(capability: str, norm: str, pairing: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    printed = run(COMPILED, capability, norm, pairing, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert printed == "v4 v4 0 False"
