"""Token reordering per head: against indexing in Python, its inverse, its gradients, and the kernel in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vidsparse_kernels import UnsupportedBackendError
from vidsparse_kernels.permutation import permute_tokens, unpermute_tokens
from vidsparse_kernels.testing import make_qkv

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")


def random_order(lead: tuple[int, int], num_video: int, seed: int = 0) -> torch.Tensor:
    draws = torch.rand(*lead, num_video, generator=torch.Generator().manual_seed(seed))
    return draws.argsort(-1).to(torch.int32)


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("text", [(0, 0), (5, 0), (0, 7), (3, 4)], ids=str)
def test_moves_video_tokens_only(lead, text):
    before, after = text
    x, _, _ = make_qkv(batch=2, seq_len_q=before + 31 + after, num_heads=3, head_dim=6, contiguous=False)
    order = random_order(lead, 31)
    y = permute_tokens(x, order, text_before=before, text_after=after)
    for b in range(2):
        for h in range(3):
            own = order[b % lead[0], h % lead[1]].tolist()
            sources = [*range(before), *(before + i for i in own), *range(before + 31, before + 31 + after)]
            assert torch.equal(y[b, :, h], torch.stack([x[b, s, h] for s in sources]))
    assert torch.equal(unpermute_tokens(y, order, text_before=before, text_after=after), x)


def test_two_tensors_and_layout():
    _, k, v = make_qkv(batch=2, seq_len_q=40, num_heads=3, head_dim=8)
    order = random_order((2, 3), 40)
    moved = permute_tokens((k, v), order, heads_first=True)
    assert isinstance(moved, tuple) and all(x.transpose(1, 2).is_contiguous() for x in moved)
    assert torch.equal(moved[0], permute_tokens(k, order)) and torch.equal(moved[1], permute_tokens(v, order))
    back = unpermute_tokens(moved, order)
    assert torch.equal(back[0], k) and torch.equal(back[1], v)


def test_gradients():
    x = torch.randn(1, 9, 2, 3, dtype=torch.float64, requires_grad=True)
    order = random_order((1, 2), 6)
    for move in (permute_tokens, unpermute_tokens):
        assert torch.autograd.gradcheck(lambda x, move=move: move(x, order, text_before=1, text_after=2), (x,))


def test_wrong_arguments_are_named():
    x, order = torch.randn(1, 10, 2, 4), random_order((1, 2), 10)
    wrong = [
        (lambda: permute_tokens(x[0], order), "`x` must be floating point"),
        (lambda: permute_tokens((x, x, x), order), "`x` must be one tensor or a sequence of one or two, got 3"),
        (lambda: permute_tokens((x, x[:, :5]), order), "All tensors of `x` must have the same shape"),
        (lambda: permute_tokens(x, order.long()), r"`order` must be int32 \[1 or 1, 1 or 2, 10\] on cpu"),
        (lambda: permute_tokens(x, order, text_before=1), r"`order` must be int32 \[1 or 1, 1 or 2, 9\]"),
        (lambda: permute_tokens(x, order, text_after=-1), "`text_after` must be at least 0, got -1"),
        (lambda: unpermute_tokens(x, torch.zeros_like(order)), "must be a permutation of 0 .. 9"),
        (lambda: unpermute_tokens(x, order, backend="cuda"), '`backend` must be "auto" or one of reference, triton'),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(UnsupportedBackendError, match='"triton" needs'):
        permute_tokens(x, order, backend="triton")


INTERPRETED = """
import torch
from vidsparse_kernels.permutation import permute_tokens, unpermute_tokens
from vidsparse_kernels.permutation.gather import MoveConfig, triton_move
from vidsparse_kernels.testing import make_qkv

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
for seq_len, head_dim, dtype, contiguous, lead, before, after in (
    (63, 40, torch.float32, False, (2, 3), 5, 0), (50, 64, torch.float16, True, (1, 3), 3, 20),
    (33, 7, torch.float16, False, (2, 1), 0, 1)):
    _, k, v = make_qkv(
        batch=2, seq_len_q=seq_len, num_heads=3, head_dim=head_dim, dtype=dtype, contiguous=contiguous)
    order = torch.rand(*lead, seq_len - before - after).argsort(-1).to(torch.int32)
    text = dict(text_before=before, text_after=after)
    for move, inverse in ((permute_tokens, False), (unpermute_tokens, True)):
        want = [move(x, order, backend="reference", **text) for x in (k, v)]
        for heads_first in (False, True):
            got = move((k, v), order, backend="triton", heads_first=heads_first, **text)
            assert all(torch.equal(a, b) for a, b in zip(got, want)), (seq_len, inverse)
            assert got[0].transpose(1, 2).is_contiguous() == heads_first
            assert torch.equal(move(k, order, backend="triton", heads_first=heads_first, **text), want[0])
        for fastest in (True, False):
            config = MoveConfig(16, 4, fastest)
            got, = triton_move((v,), order, text_before=before, inverse=inverse, heads_first=False, config=config)
            assert torch.equal(got, want[1])
x, y = (torch.randn(1, 6, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
order = torch.tensor([[[2, 0, 1]]], dtype=torch.int32)
for move in (permute_tokens, unpermute_tokens):
    def call(*tensors):
        return move(tensors, order, text_before=1, text_after=2, backend="triton")
    assert torch.autograd.gradcheck(call, (x, y)) and torch.autograd.gradgradcheck(call, (x, y), fast_mode=True)
    for grad in torch.autograd.grad(call(x, y)[1].sum(), (x, y), allow_unused=True):
        assert grad is None or grad.shape == x.shape
print("checked")
"""

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidsparse_kernels.permutation.gather import MoveConfig, move_kernel

default = MoveConfig()
constants = dict(
    HEAD_DIM=128, BLOCK_D=128, ROWS=default.rows, TWO=True, SCATTER=bool(int(sys.argv[2])),
    HEADS_FASTEST=default.heads_fastest, x_stride_d=1, x2_stride_d=1)
signature, attributes = {}, {}
for position, name in enumerate(move_kernel.arg_names):
    pointer = "*i32" if name == "order_ptr" else "*bf16"
    signature[name] = "constexpr" if name in constants else pointer if name.endswith("_ptr") else "i32"
    if signature[name].startswith("*") or name[0] in "xy" and "stride" in name and signature[name] == "i32":
        attributes[(position,)] = [["tt.divisibility", 16]]
constants = {(move_kernel.arg_names.index(name),): value for name, value in constants.items()}
source = ASTSource(move_kernel, signature, constants, attributes)
ptx = triton.compile(
    source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=dict(num_warps=default.num_warps)).asm["ptx"]
print("ld.global.v4" in ptx, "st.global.v4" in ptx)
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


@needs_triton
def test_interpreted_kernel_agrees_with_the_reference():
    assert run(INTERPRETED, TRITON_INTERPRET="1") == ["checked"]


@needs_triton
@pytest.mark.parametrize(("capability", "scatter"), [("80", "0"), ("90", "1")], ids=["sm80-gather", "sm90-scatter"])
def test_compiles_without_a_gpu(capability, scatter, tmp_path):
    """Expected: loads and stores of 16 bytes."""
    printed = run(COMPILED, capability, scatter, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert printed == ["True", "True"]
