"""The Hopper kernel over blocks of variable size: compiled without a GPU here, checked on one there."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vidsparse_kernels import BlockMask, block_sparse_attention, select_backend
from vidsparse_kernels.testing import (
    assert_close_to_oracle,
    make_qkv,
    make_variable_block_mask,
    masked_attention_oracle,
)

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from vidsparse_kernels.block_sparse_attention import hopper, hopper_packed

head_dim = int(sys.argv[1])
kernel = hopper_packed.packed_forward_hopper_kernel
constants = dict(
    HEAD_DIM=head_dim, BLOCK_D=head_dim,
    STAGES=hopper.num_stages(hopper_packed.KEYS.value, head_dim), Q_BLOCK=int(sys.argv[2]), SIZES=hopper_packed.PIECES,
    STORE_LSE=True, LARGEST_MASS=hopper.LARGEST_MASS, AHEAD=head_dim <= hopper.MAX_AHEAD,
    CONSUMER_REGISTERS=hopper_packed.consumer_registers(head_dim), PRODUCER_REGISTERS=hopper.PRODUCER_REGISTERS)
layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
others = dict(out_ptr="*bf16", lse_ptr="*fp32", bodies_ptr="*i64", qk_scale_log2="fp32")
signature = {}
for name in kernel.arg_names:
    if name in constants:
        signature[name] = "constexpr"
    elif name == "query":
        signature[name] = f"tensordesc<bf16[1, 1, 64, {head_dim}],{layout!r}>"
    elif name.startswith(("keys_", "values_")):
        signature[name] = f"tensordesc<bf16[1, 1, {name.split('_')[1]}, 64],{layout!r}>"
    else:
        signature[name] = others.get(name, "*i32" if name.endswith("_ptr") else "i32")
attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")}
places = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
source = GluonASTSource(kernel, signature, places, attributes)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, enable_fp_fusion=True))
assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
# Two tiles of queries; for keys and values the last pieces, 16 to a tile, and each size of the others; all 64 dims at a
# time.
copies = (2 + 2 * (16 + len(hopper_packed.PIECES))) * (head_dim // 64)
assert compiled.asm["ptx"].count("cp.async.bulk.tensor") == copies, compiled.asm["ptx"].count("cp.async.bulk.tensor")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.parametrize(("head_dim", "q_block"), [(64, 0), (128, 0), (128, 128)])
def test_compiles_without_a_gpu(head_dim, q_block, tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED, str(head_dim), str(q_block)],
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


RUNS = """
import torch
from vidsparse_kernels.block_sparse_attention.runs import block_runs, query_tiles, tile_order
from vidsparse_kernels.block_sparse_attention.tiles import own_tiles
from vidsparse_kernels.testing import make_variable_block_mask

for seed in range(12):
    heads = 1 + seed % 3
    mask = make_variable_block_mask(
        seq_len_q=300, seq_len_kv=700, num_q_blocks=5 if seed % 2 else None, num_kv_blocks=80, num_heads=heads,
        offsets_heads=heads if seed % 4 else 1, density=0.1 + 0.07 * seed, empty_rows=True, full_rows=True, seed=seed)
    runs = block_runs(mask, 8, 16)
    offsets, dense = mask.offsets("kv"), mask.to_dense()
    for head in range(heads):
        edges = offsets[0, head % offsets.shape[1]].tolist()
        for row in range(dense.shape[2]):
            listed = [i for i in range(80) if dense[0, head, row, i] and edges[i] < edges[i + 1]]
            want = []
            for i in listed:
                if want and want[-1][2] == i:
                    want[-1] = want[-1][0], edges[i + 1], i + 1
                else:
                    want.append((edges[i], edges[i + 1], i + 1))
            n = runs.num_runs[0, head, row].item()
            assert n == len(want)
            bodies = runs.bodies[0, head, row, :n].tolist()
            assert [(x & 0xFFFFFFFF, x >> 32) for x in bodies] == [(a, (b - a - 1) // 8) for a, b, _ in want]
            pieces = sum(-(-(b - a) // 8) for a, b, _ in want)
            assert runs.slots[0, head, row].item() == 8 * pieces
            zeros = -pieces % 16
            first = zeros + n
            last = [(a + (b - a - 1) // 8 * 8) for a, b, _ in want]
            assert runs.sources[0, head, row, :first].tolist() == last + [700] * zeros
            valid = [(b - a - 1) % 8 + 1 for a, b, _ in want] + [0] * zeros + [8] * (-first % 16)
            assert runs.valid[0, head, row, : len(valid)].tolist() == valid
    assert block_runs(mask, 8, 16) is runs
    blocks, tiles = own_tiles(mask, 64)
    got_blocks, got_tiles = query_tiles(mask, 64)
    there = tiles.shape[-1]
    assert (got_tiles[..., there:] == -1).all() and (got_blocks[..., there:] == 0).all()
    assert torch.equal(got_tiles[..., :there], tiles)
    assert torch.equal(got_blocks[..., :there], blocks)
    order = tile_order(mask, 64, runs.slots)
    for head in range(heads):
        if seed % 2:
            own = got_tiles[0, head % got_tiles.shape[1]]
            block = got_blocks[0, head % got_tiles.shape[1]].long()
            queries = torch.where(own < 0, 0, (own & 255) + 1)
        else:
            block = torch.arange(5)
            queries = torch.tensor([64, 64, 64, 64, 44])
        length = torch.where(queries > 0, runs.slots[0, head % runs.slots.shape[1], block], 0)
        mean = length.sum() / (queries > 0).sum()
        level = torch.where(queries > 32, 1, torch.where(queries > 0, 2, 3))
        level = torch.where(length > 1.5 * mean, 0, level)
        assert torch.equal(order[0, head % order.shape[1]].long(), torch.argsort(level, stable=True))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_runs_are_those_of_the_lists():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNS],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT), "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)


def check(q, k, v, mask):
    truth, truth_lse = masked_attention_oracle(q, k, v, mask)
    eager, eager_lse = masked_attention_oracle(q, k, v, mask, dtype=q.dtype)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="hopper")
    assert_close_to_oracle(out, eager, truth)
    assert_close_to_oracle(lse, eager_lse, truth_lse, name="lse")
    assert torch.equal(block_sparse_attention(q, k, v, mask, backend="hopper"), out)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("blocks", [(7, 40), (40, 300), (None, 90), (11, None)], ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 72, 96, 128])
def test_shapes(head_dim, blocks):
    """Clusters of a few tokens to some hundred, empty ones among them, on one side or both."""
    dtype = torch.float16 if head_dim == 72 else torch.bfloat16
    for number, (seq_len_q, seq_len_kv, num_heads, num_kv_heads, batch) in enumerate(
        [(1, 1, 1, 1, 1), (63, 111, 2, 2, 2), (640, 1280, 6, 2, 2), (1000, 77, 3, 1, 1), (4097, 2016, 4, 2, 1)]
    ):
        q, k, v = make_qkv(
            batch=batch, seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim, dtype=dtype, device="cuda", contiguous=number % 2 == 0, seed=number,
        )  # fmt: skip
        mask = make_variable_block_mask(
            seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, num_q_blocks=blocks[0], num_kv_blocks=blocks[1],
            batch=batch if number % 2 else 1, num_heads=num_heads if number > 1 else 1,
            offsets_batch=batch if number == 2 else 1, offsets_heads=num_heads if number > 1 else 1,
            empty_rows=number > 1, full_rows=True, device="cuda", seed=number,
        )  # fmt: skip
        check(q, k, v, mask)


@pytest.mark.gpu
@on_hopper
def test_more_q_tiles_than_multiprocessors():
    """Every program then takes several, of very different lengths, some of them none."""
    q, k, v = make_qkv(seq_len_q=30_000, seq_len_kv=1500, num_heads=2, dtype=torch.bfloat16, device="cuda")
    mask = make_variable_block_mask(
        seq_len_q=30_000, seq_len_kv=1500, num_q_blocks=400, num_kv_blocks=60, num_heads=2, offsets_heads=2,
        density=0.3, empty_rows=True, full_rows=True, device="cuda",
    )  # fmt: skip
    check(q, k, v, mask)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_q_blocks", [None, 9], ids=["uniform", "variable"])
def test_logits_that_grow_along_the_list(head_dim, num_q_blocks):
    """They leave the peak of the first tile behind by far more than fp32 has room for, so rows are done again."""
    for number, dtype in enumerate((torch.bfloat16, torch.float16)):
        q, k, v = make_qkv(
            batch=2, seq_len_q=1000, seq_len_kv=2100, num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype,
            device="cuda", seed=number,
        )  # fmt: skip
        # Half of the queries turn away from the keys that grow.
        direction = torch.nn.functional.normalize(torch.randn(head_dim, device="cuda"), dim=0)
        side = torch.where(torch.arange(1000, device="cuda") % 2 > 0, 1, -1)[:, None, None]
        q = (q + 4 * direction * side).to(dtype)
        growth = torch.linspace(0, 60 if head_dim == 64 else 120, 2100, device="cuda")
        k = (k + growth[:, None, None] * direction * 4).to(dtype)
        mask = make_variable_block_mask(
            seq_len_q=1000, seq_len_kv=2100, num_q_blocks=num_q_blocks, num_kv_blocks=70, q_block_size=128, batch=2,
            num_heads=4, offsets_heads=4, empty_rows=True, full_rows=True, device="cuda", seed=number,
        )  # fmt: skip
        check(q, k, v, mask)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_large_logits(head_dim):
    """60 times as large: peaks of first tiles are far from those of whole rows."""
    for seed in range(20):
        q, k, v = make_qkv(
            seq_len_q=700, seq_len_kv=900, num_heads=3, num_kv_heads=1, head_dim=head_dim, dtype=torch.bfloat16,
            device="cuda", seed=seed,
        )  # fmt: skip
        mask = make_variable_block_mask(
            seq_len_q=700, seq_len_kv=900, num_q_blocks=None if seed % 2 else 6, num_kv_blocks=60, q_block_size=128,
            num_heads=3, offsets_heads=3, empty_rows=True, full_rows=True, device="cuda", seed=seed,
        )  # fmt: skip
        check(60 * q, k, v, mask)


@pytest.mark.gpu
@on_hopper
def test_numbers_that_are_not_finite_stay_in_their_rows():
    q, k, v = make_qkv(seq_len_q=512, seq_len_kv=600, num_heads=1, head_dim=128, dtype=torch.bfloat16, device="cuda")
    mask = make_variable_block_mask(seq_len_q=512, seq_len_kv=600, num_q_blocks=5, num_kv_blocks=20, device="cuda")
    (truth, _), (eager, _) = (masked_attention_oracle(q, k, v, mask, dtype=d) for d in (torch.float64, q.dtype))
    q[0, 300] = float("nan")
    out = block_sparse_attention(q, k, v, mask, backend="hopper")
    others = torch.arange(512, device="cuda") != 300
    assert out[0, 300].isnan().all()
    assert_close_to_oracle(out[:, others], eager[:, others], truth[:, others])


@pytest.mark.gpu
@on_hopper
def test_offsets_beyond_int32():
    """Views into one array; each q-block lists the kv-block of its own tokens."""
    seq_len, num_heads, head_dim = 150_000, 128, 128
    fused = torch.randn(1, seq_len, num_heads, 3 * head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.split(head_dim, -1)
    assert q.numel() > 2**31
    blocks = 1500
    offsets = (torch.arange(blocks + 1, device="cuda", dtype=torch.int32) * 100)[None, None]
    mask = BlockMask.from_indices(
        torch.ones(1, 1, blocks, device="cuda", dtype=torch.int32),
        torch.arange(blocks, device="cuda").view(1, 1, -1, 1),
        seq_len_q=seq_len, seq_len_kv=seq_len, q_block_size=128, kv_block_size=128,
        q_offsets=offsets, kv_offsets=offsets,
    )  # fmt: skip
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="hopper")
    tail = slice(seq_len - 100, None)
    local = BlockMask.full(100, 100, q_block_size=128, kv_block_size=128, device="cuda")
    (truth, truth_lse), (eager, eager_lse) = (
        masked_attention_oracle(q[:, tail], k[:, tail], v[:, tail], local, dtype=d) for d in (torch.float64, q.dtype)
    )
    assert_close_to_oracle(out[:, tail], eager, truth)
    assert_close_to_oracle(lse[:, :, tail], eager_lse, truth_lse, name="lse")


@pytest.mark.gpu
@on_hopper
def test_auto_takes_it_where_the_work_is_large():
    q, k, v = make_qkv(seq_len_q=32_760, num_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    mask = make_variable_block_mask(seq_len_q=32_760, num_q_blocks=100, num_kv_blocks=400, density=0.1, device="cuda")
    assert select_backend(q, k, v, mask) == ("hopper", "inference on a Hopper GPU")
    assert select_backend(q, k, v, mask, key_bias=torch.zeros(1, 1, 32_760, device="cuda"))[0] == "triton"
