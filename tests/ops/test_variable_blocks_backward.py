"""The Triton backward with blocks of variable size under the interpreter, against float64 autograd of the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"

# NaN in everything that torch.empty hands out: a result that is not written, or a row read before, shows.
PRELUDE = """
import sys
import torch
from vidsparse_kernels import BlockMask, block_sparse_attention
from vidsparse_kernels.block_sparse_attention import tiles as tiles_module
from vidsparse_kernels.block_sparse_attention.backward import triton_backward
from vidsparse_kernels.block_sparse_attention.configs import BackwardConfig, BackwardTiles
from vidsparse_kernels.block_sparse_attention.forward import triton_forward
from vidsparse_kernels.block_sparse_attention.tiles import own_tiles
from vidsparse_kernels.testing import (
    assert_close_to_oracle, make_qkv, make_variable_block_mask, masked_attention_oracle)

torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[4]) if len(sys.argv) > 4 else 0)
# What a GPU allocates, with programs that have nothing to do.
tiles_module._capacity = lambda ends, *shape: tiles_module.most_tiles(*shape)
real_empty = torch.empty
def poisoned_empty(*args, **kwargs):
    x = real_empty(*args, **kwargs)
    return x.fill_(float("nan")) if x.dtype.is_floating_point else x
torch.empty = poisoned_empty

def oracle(q, k, v, mask, grad_out, grad_lse, dtype, bias=None):
    tensors = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = masked_attention_oracle(*tensors, mask, dtype=dtype, key_bias=bias)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.autograd.grad((out * grad_out.to(dtype)).sum() + (lse * grad_lse.to(dtype)).sum(), tensors)

def gradients(q, k, v, mask, grad_out, grad_lse, *, descriptors=False, bias=None, query=(32, 16), key_value=(16, 32)):
    scale = q.shape[-1] ** -0.5
    config = BackwardConfig(BackwardTiles(*query, 4, 2, descriptors), BackwardTiles(*key_value, 4, 2, descriptors))
    out, lse = triton_forward(q, k, v, mask, scale=scale, key_bias=bias, return_lse=True)
    # What arrives through a row that attends to nothing counts for nothing, whatever it is.
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, float("nan"))
    return triton_backward(grad_out, grad_lse, q, k, v, out, lse, mask, scale=scale, key_bias=bias, config=config)

def assert_gradients(grads, q, k, v, mask, grad_out, grad_lse, name, bias=None):
    truth, eager = (oracle(q, k, v, mask, grad_out, grad_lse, d, bias) for d in (torch.float64, q.dtype))
    for which, got, e, t in zip(("query", "key", "value"), grads, eager, truth):
        assert got.dtype == q.dtype and got.is_contiguous()
        assert_close_to_oracle(got, e, t, name=f"gradient of {which}, {name}")
    return max(float(t.abs().max()) for t in truth)
"""

RANDOM = """
descriptors, seed, cases = sys.argv[1] == "descriptors", int(sys.argv[2]), int(sys.argv[3])
generator = torch.Generator().manual_seed(seed)

def pick(*options):
    return options[int(torch.randint(len(options), (), generator=generator))]

largest = 0.0
for number in range(cases):
    batch, group, kv_heads = pick(1, 2), pick(1, 2), pick(1, 2)
    heads = group * kv_heads
    mask = make_variable_block_mask(
        seq_len_q=pick(1, 33, 63, 90), seq_len_kv=pick(16, 40, 111), num_q_blocks=pick(None, 1, 3, 12),
        num_kv_blocks=pick(None, 1, 4, 12), q_block_size=32, kv_block_size=32, batch=pick(1, batch),
        num_heads=pick(1, heads), offsets_batch=pick(1, batch), offsets_heads=pick(1, heads),
        density=pick(0.0, 0.4, 0.7, 1.0), empty_rows=pick(True, False), full_rows=pick(True, False),
        seed=1000 * seed + number)
    dtype = pick(torch.float32, torch.float16)
    q, k, v = make_qkv(
        batch=batch, seq_len_q=mask.seq_len_q, seq_len_kv=mask.seq_len_kv, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=pick(16, 40), dtype=dtype, contiguous=pick(True, False), seed=number)
    bias = pick(None, torch.linspace(-2, 2, k.shape[1]).expand(1, 1, -1).clone())
    if bias is not None:
        bias[..., ::3] = -torch.inf
    query, key_value = pick((32, 16), (16, 32)), pick((16, 32), (32, 16))
    if mask.variable and pick(True, False):
        # Programs run in order here: a tile that wrote past its end would be covered up by the next one.
        for size, transposed in ((query[0], False), (key_value[1], True)):
            own_tiles(mask, size, transposed=transposed)
            name = f"own_tiles {size} {transposed}"
            mask._cache[name] = tuple(x.flip(-1) for x in mask._cache[name])
    # As strided as the gradient of a transposed projection.
    grad_out = torch.randn(q.transpose(1, 2).shape, generator=generator).to(dtype).transpose(1, 2)
    grad_lse = torch.randn(batch, heads, q.shape[1], generator=generator)
    grads = gradients(
        q, k, v, mask, grad_out, grad_lse, descriptors=descriptors, bias=bias, query=query, key_value=key_value)
    case = f"case {number}: {mask} {dtype} group {group} tiles {query} {key_value} bias {bias is not None}"
    largest = max(largest, assert_gradients(grads, q, k, v, mask, grad_out, grad_lse, case, bias))
assert largest > 0.1
print("checked")
"""

SEMANTICS = """
q, k, v = make_qkv(seq_len_q=70, seq_len_kv=85, num_heads=4, num_kv_heads=2, head_dim=16, batch=2)
grad_out, grad_lse = torch.randn_like(q), torch.randn(2, 4, 70)

# q-block 1 lists nothing, q-block 2 has no tokens, and nobody lists kv-block 2; query heads of one kv head disagree
# about where it starts.
dense = torch.ones(1, 1, 4, 4, dtype=torch.bool)
dense[:, :, 1], dense[:, :, :, 2] = False, False
offsets = torch.tensor([[[0, 5, 20, 31, 85], [0, 20, 21, 50, 85]]]).repeat(1, 2, 1)
mask = BlockMask.from_dense(
    dense, seq_len_q=70, seq_len_kv=85, q_block_size=32, kv_block_size=32,
    q_offsets=torch.tensor([[[0, 7, 40, 40, 70]]]), kv_offsets=offsets)
grads = gradients(q, k, v, mask, grad_out, grad_lse)
assert assert_gradients(grads, q, k, v, mask, grad_out, grad_lse, "empty row and column") > 0.1
assert not grads[0][:, 7:40].any() and not grads[1][:, 21:31].any() and not grads[2][:, 21:31].any()
assert grads[1][:, 20].any() and grads[1][:, 31].any()
again = gradients(q, k, v, mask, grad_out, grad_lse)
assert all(torch.equal(a, b) for a, b in zip(grads, again))

# Through pointers, what is not finite in tokens that are not listed reaches nobody.
poisoned = [x.clone() for x in (q, k, v, grad_out)]
poisoned[0][:, 7:40], poisoned[3][:, 7:40] = torch.nan, torch.inf
poisoned[1][:, 21:31], poisoned[2][:, 21:31] = torch.nan, torch.inf
for got, want in zip(gradients(*poisoned[:3], mask, poisoned[3], grad_lse), grads):
    assert torch.equal(got, want)

# No list has an entry.
none = BlockMask.from_indices(
    torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 0, dtype=torch.int32), seq_len_q=70, seq_len_kv=85,
    q_block_size=32, kv_block_size=32, q_offsets=torch.tensor([[[0, 9, 70]]]))
assert not any(g.any() for g in gradients(q, k, v, none, grad_out, grad_lse))

# So small an LSE that keys of other blocks, here with logits far above, would weigh infinitely much.
far = ((q + 5.5).half(), (k - 5.5).half(), v.half())
far[1][:, 21:31] += 11
grads = gradients(*far, mask, grad_out.half(), grad_lse, descriptors=True)
assert assert_gradients(grads, *far, mask, grad_out.half(), grad_lse, "small LSE") > 0.1

# Offsets that tell what uniform blocks are give the uniform gradients, bit for bit.
uniform = make_variable_block_mask(seq_len_q=70, seq_len_kv=85, q_block_size=32, kv_block_size=32, num_heads=4)
told = BlockMask.from_indices(
    uniform.kv_num_blocks, uniform.kv_indices, seq_len_q=70, seq_len_kv=85, q_block_size=32, kv_block_size=32,
    q_offsets=uniform.offsets("q"), kv_offsets=uniform.offsets("kv"))
assert told.variable and not uniform.variable
pairs = zip(gradients(q, k, v, told, grad_out, grad_lse), gradients(q, k, v, uniform, grad_out, grad_lse))
for got, want in pairs:
    assert torch.equal(got, want) and want.abs().max() > 0.1

# Through the public function, which chooses its tiles itself.
tensors = [x.clone().requires_grad_() for x in (q, k, v)]
out, lse = block_sparse_attention(*tensors, mask, backend="triton", return_lse=True)
loss = (out * grad_out).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * grad_lse).sum()
grads = torch.autograd.grad(loss, tensors)
assert assert_gradients(grads, q, k, v, mask, grad_out, grad_lse, "public function") > 0.1
print("checked")
"""


def run(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@pytest.mark.parametrize("variant", ["descriptors", "pointers"])
def test_random_cases_are_exact(variant):
    """bf16 is left to the GPU tests: the interpreter computes with numpy, which has no bf16."""
    assert run(PRELUDE + RANDOM, variant, "0", "15") == "checked"


def test_semantics():
    assert run(PRELUDE + SEMANTICS) == "checked"
