"""The linear branch without a GPU: the reference, the Triton kernels under the interpreter, and compiled for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse_kernels import BlockMask, UnsupportedBackendError
from vidsparse_kernels.linear_branch import add_linear_branch, linear_branch
from vidsparse_kernels.linear_branch.oracle import linear_branch_oracle
from vidsparse_kernels.testing import (
    assert_close_to_oracle,
    make_block_mask,
    make_qkv,
    make_variable_block_mask,
)

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"
FEATURE_MAPS = ["softmax", "elu", "relu"]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")


def make_mask(q, k, *, variable=False, **options):
    if variable:
        return make_variable_block_mask(
            seq_len_q=q.shape[1], seq_len_kv=k.shape[1], num_q_blocks=4, num_kv_blocks=6, q_block_size=16,
            kv_block_size=16, num_heads=q.shape[2], offsets_heads=q.shape[2], **options,
        )  # fmt: skip
    return make_block_mask(
        seq_len_q=q.shape[1], seq_len_kv=k.shape[1], q_block_size=32, kv_block_size=16, num_heads=q.shape[2], **options
    )  # fmt: skip


def with_gradients(function, inputs, grad_out):
    tensors = [x.detach().requires_grad_() for x in inputs]
    out = function(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad_out.to(out.dtype))


@pytest.mark.parametrize("coverage", ["all", "non_selected", "variable"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_reference_in_float64(feature_map, coverage):
    inputs = [x.double() for x in make_qkv(batch=2, seq_len_q=63, seq_len_kv=111, num_heads=4, num_kv_heads=2)]
    q, k, _ = inputs
    mask = make_mask(q, k, variable=coverage == "variable", empty_rows=True, full_rows=True)
    excluded = None if coverage == "all" else mask
    option = "all" if coverage == "all" else "non_selected"
    grad_out = torch.randn(q.shape, dtype=torch.float64)
    got = with_gradients(
        lambda *x: linear_branch(*x, block_mask=mask, feature_map=feature_map, coverage=option, eps=1e-5),
        inputs,
        grad_out,
    )
    expected = with_gradients(
        lambda *x: linear_branch_oracle(*x, excluded=excluded, feature_map=feature_map, eps=1e-5), inputs, grad_out
    )
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)
        assert e.abs().max() > 1e-4


@settings(max_examples=15, deadline=None)
@given(
    seq_len_q=st.integers(1, 90), seq_len_kv=st.integers(1, 90), block=st.sampled_from([1, 7, 16, 64]),
    density=st.floats(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_reference_on_any_shape(seq_len_q, seq_len_kv, block, density, seed):
    inputs = make_qkv(seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, head_dim=8, seed=seed)
    mask = make_block_mask(
        seq_len_q=seq_len_q, seq_len_kv=seq_len_kv, q_block_size=block, kv_block_size=16, density=density, seed=seed
    )
    out = linear_branch(*inputs, block_mask=mask, coverage="non_selected")
    truth, eager = (
        linear_branch_oracle(*inputs, excluded=mask, feature_map="softmax", eps=0.0, dtype=d)
        for d in (torch.float64, torch.float32)
    )
    assert_close_to_oracle(out, eager, truth)


def test_as_the_public_code_writes_it():
    """Coverage "all" of thu-ml/SLA in its own words, with its 1e-5."""
    q, k, v = (x.double() for x in make_qkv(seq_len_q=50))
    c_q, c_k = (torch.softmax(x.transpose(1, 2), -1) for x in (q, k))
    state, mass = c_k.transpose(-1, -2) @ v.transpose(1, 2), c_k.sum(-2, keepdim=True)
    expected = (c_q @ state) / (1e-5 + (c_q * mass).sum(-1, keepdim=True))
    torch.testing.assert_close(linear_branch(q, k, v), expected.transpose(1, 2))


def test_coverages_agree_where_nothing_is_selected():
    inputs = make_qkv(seq_len_q=70)
    nothing = make_block_mask(seq_len_q=70, density=0.0)
    full = BlockMask.full(70, 70, q_block_size=64, kv_block_size=64)
    everywhere = linear_branch(*inputs, eps=0.0)
    torch.testing.assert_close(linear_branch(*inputs, block_mask=nothing, coverage="non_selected"), everywhere)
    torch.testing.assert_close(linear_branch(*inputs, block_mask=full, coverage="all", eps=0.0), everywhere)
    assert not linear_branch(*inputs, block_mask=full, coverage="non_selected").any()
    assert not linear_branch(*inputs, block_mask=full, coverage="non_selected", eps=1e-5).any()


def test_skipped_blocks_count_for_neither():
    inputs = make_qkv(seq_len_q=150)
    mask, skipped = (make_block_mask(seq_len_q=150, q_block_size=32, kv_block_size=16, seed=s) for s in (1, 2))
    both = BlockMask.from_dense(
        mask.to_dense() | skipped.to_dense(), seq_len_q=150, seq_len_kv=150, q_block_size=32, kv_block_size=16
    )
    for expected, coverage in ((both, "non_selected"), (skipped, "all")):
        out = linear_branch(*inputs, block_mask=mask, skipped=skipped, coverage=coverage, eps=0.0)
        torch.testing.assert_close(out, linear_branch(*inputs, block_mask=expected, coverage="non_selected"))


def test_gradient_of_a_row_without_keys_is_zero():
    inputs = [x.requires_grad_() for x in make_qkv(seq_len_q=64)]
    full = BlockMask.full(64, 64, q_block_size=32, kv_block_size=32)
    out = linear_branch(*inputs, block_mask=full, coverage="non_selected", eps=1e-5)
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("coverage", ["all", "non_selected"])
def test_added_through_a_projection(coverage):
    q, k, v = (x.double() for x in make_qkv(seq_len_q=70, head_dim=32))
    mask = make_mask(q, k)
    out, weight, bias = torch.randn_like(q), torch.randn(32, 32).double(), torch.randn(32)
    branch = linear_branch(q, k, v, mask, coverage=coverage)
    want = out + branch @ weight.t() + bias
    got = add_linear_branch(out, q, k, v, weight, bias, mask, coverage=coverage)
    torch.testing.assert_close(got, want)
    got = add_linear_branch(out, q, k, v, weight, None, mask, coverage=coverage)
    torch.testing.assert_close(got, want - bias)
    assert (branch @ weight.t()).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(1, 64, 2, 16)}, "`out` must be like `query`"),
        (
            {"weight": torch.zeros(32, 16)},
            "`weight` must be floating point .32, 32. on cpu, got torch.float32 .32, 16.",
        ),
        ({"bias": torch.zeros(32, dtype=torch.int32)}, "`bias` must be floating point .32,. on cpu, got torch.int32"),
        ({"feature_map": "hedgehog"}, "`feature_map` must be one of"),
    ],
)
def test_projections_that_do_not_fit_are_refused(change, message):
    q, k, v = make_qkv(seq_len_q=64, head_dim=32)
    arguments = {"out": q, "query": q, "key": k, "value": v, "weight": torch.eye(32), "bias": torch.ones(32), **change}
    with pytest.raises(ValueError, match=message):
        add_linear_branch(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_map": "hedgehog"}, '`feature_map` must be one of softmax, elu, relu, got "hedgehog"'),
        ({"coverage": "some"}, '`coverage` must be one of all, non_selected, got "some"'),
        ({"coverage": "non_selected"}, '`block_mask` must be given for coverage "non_selected", got None'),
        ({"eps": -1.0}, "`eps` must be at least 0 and finite, got -1.0"),
        ({"backend": "cuda"}, '`backend` must be "auto" or one of reference, triton, got "cuda"'),
        (
            {"skipped": BlockMask.full(64, 64, q_block_size=64, kv_block_size=64)},
            "`skipped` was built for seq_len_q 64",
        ),
        ({"value": torch.zeros(1, 70, 2, 32)}, "`value` must have the shape of `key`"),
        ({"key": torch.zeros(1, 70, 2, 64, dtype=torch.float16)}, "`key` must have the dtype and device of `query`"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments(change, message):
    query, key, value = make_qkv(seq_len_q=70)
    arguments = {"query": query, "key": key, "value": value, **change}
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        linear_branch(**arguments)


@needs_triton
def test_triton_says_what_it_cannot_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q, k, v = make_qkv(seq_len_q=70)
    with pytest.raises(UnsupportedBackendError, match='backend "triton" needs a GPU; use backend="reference"'):
        linear_branch(q, k, v, backend="triton")
    with pytest.raises(UnsupportedBackendError, match="float64"):
        linear_branch(q.double(), k.double(), v.double(), backend="triton")
    mask = make_block_mask(seq_len_q=70, kv_block_size=10)
    with pytest.raises(UnsupportedBackendError, match="multiple of 16, got 10"):
        linear_branch(q, k, v, mask, coverage="non_selected", backend="triton")


# NaN in everything that torch.empty hands out: a result that is not written, or a row read before, shows.
PRELUDE = """
import sys
import torch
from vidsparse_kernels import BlockMask
from vidsparse_kernels.block_sparse_attention.configs import BackwardConfig, BackwardTiles, ForwardConfig
from vidsparse_kernels.linear_branch.backward import triton_backward
from vidsparse_kernels.linear_branch.forward import triton_forward
from vidsparse_kernels.linear_branch.oracle import linear_branch_oracle
from vidsparse_kernels.testing import (
    assert_close_to_oracle, make_block_mask, make_qkv, make_variable_block_mask)

torch.set_num_threads(1)
torch.manual_seed(0)
real_empty = torch.empty
def poisoned_empty(*args, **kwargs):
    x = real_empty(*args, **kwargs)
    return x.fill_(float("nan")) if x.dtype.is_floating_point else x
torch.empty = poisoned_empty

def check(inputs, mask, feature_map, eps=1e-5, descriptors=False, name=""):
    q, k, v = inputs
    forward = ForwardConfig(32, 16, 4, 2, descriptors)
    backward = BackwardConfig(BackwardTiles(32, 16, 4, 2, descriptors), BackwardTiles(16, 16, 4, 2, descriptors))
    grad_out = torch.randn(q.transpose(1, 2).shape).to(q.dtype).transpose(1, 2)
    saved = triton_forward(q, k, v, mask, feature_map=feature_map, eps=eps, config=forward)
    def grads():
        return triton_backward(grad_out, q, k, v, *saved, mask, feature_map=feature_map, eps=eps, config=backward)
    got = (saved[0], *grads())
    results = []
    for dtype in (q.dtype, torch.float64):
        tensors = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = linear_branch_oracle(*tensors, excluded=mask, feature_map=feature_map, eps=eps, dtype=dtype)
        results.append((out.detach(), *torch.autograd.grad(out, tensors, grad_out.to(dtype))))
    for which, g, e, t in zip(("output", "grad query", "grad key", "grad value"), got, *results):
        assert g.dtype == q.dtype and g.is_contiguous()
        assert_close_to_oracle(g, e, t, name=f"{which} {feature_map} {name}")
    return got, grads
"""

SHAPES = """
descriptors = sys.argv[1] == "descriptors"
shapes = [
    ("softmax", dict(seq_len_q=45, seq_len_kv=61, num_heads=2, num_kv_heads=1, head_dim=72), 0.2),
    ("elu", dict(seq_len_q=64, head_dim=32, contiguous=False, num_heads=1, batch=2), 0.3),
    ("relu", dict(seq_len_q=75, seq_len_kv=47, head_dim=80, num_heads=1, dtype=torch.float16), 0.2),
    ("elu", dict(seq_len_q=65, seq_len_kv=70, head_dim=24, num_heads=1, dtype=torch.float16), 0.8),
    ("relu", dict(seq_len_q=1, seq_len_kv=3, head_dim=16, num_heads=1), 0.0),
]
if descriptors:
    shapes = shapes[1:3]
for number, (feature_map, shape, density) in enumerate(shapes):
    inputs = make_qkv(**shape)
    lengths = dict(seq_len_q=inputs[0].shape[1], seq_len_kv=inputs[1].shape[1])
    rows = dict(density=density, empty_rows=lengths["seq_len_q"] > 64, full_rows=number < 4, seed=number)
    heads = inputs[0].shape[2]
    mask = make_block_mask(**lengths, q_block_size=32, kv_block_size=32, num_heads=heads, **rows)
    check(inputs, mask, feature_map, descriptors=descriptors, name=f"{shape}")
    if not descriptors:
        check(inputs, None, feature_map, name=f"{shape} all")
    if number < 2:
        mask = make_variable_block_mask(
            **lengths, num_q_blocks=3, num_kv_blocks=5, num_heads=heads, offsets_heads=heads, q_block_size=32,
            kv_block_size=32, **rows)
        check(inputs, mask, feature_map, descriptors=descriptors, name=f"{shape} variable")
print("checked")
"""

SEMANTICS = """
# No key at all counts for q-block 0, and eps 0 divides by 0.
dense = torch.zeros(1, 1, 3, 6, dtype=torch.bool)
dense[:, :, 0], dense[:, :, 1, 1] = True, True
sizes = dict(seq_len_q=70, seq_len_kv=85, q_block_size=32, kv_block_size=16)
mask = BlockMask.from_dense(dense, **sizes)
inputs = make_qkv(seq_len_q=70, seq_len_kv=85, num_heads=1, head_dim=16)
got, grads = check(inputs, mask, "softmax", eps=0.0, name="empty")
assert not got[0][:, :32].any() and not got[1][:, :32].any()
assert all(torch.equal(a, b) for a, b in zip(got[1:], grads()))

# The listed block holds nearly all of the weight: what is left must not drown in what was taken off.
q, k, v = inputs
k = k.clone()
k[:, :16] += 20.0
check((q, k, v), mask, "elu", eps=0.0, name="weak rows before")
dense[:, :, 0, 1:], dense[:, :, 1:, 0] = False, True
few = BlockMask.from_dense(dense, **sizes)
check(((q + 3) * 40, (k + 3) * torch.where(torch.arange(85) < 16, 1e4, 1.0).view(1, 85, 1, 1), v), few, "relu",
      eps=0.0, name="weak rows")

# Values with a mean: the gradient of query is what is left of two sums that it does not enter.
check([x.half() for x in (inputs[0], inputs[1], inputs[2] + 8)], mask, "softmax", name="mean")

# The last block of either side lacks whole tiles, and behind the last token stands what is no number.
long = [torch.cat([x, torch.full_like(x, torch.nan)], 1) for x in make_qkv(
    seq_len_q=144, seq_len_kv=176, num_heads=1, head_dim=16)]
blocks = make_block_mask(
    seq_len_q=144, seq_len_kv=176, q_block_size=64, kv_block_size=80, density=0.5, full_rows=True, empty_rows=True)
check([long[0][:, :144], long[1][:, :176], long[2][:, :176]], blocks, "softmax", name="short last blocks")

# Queries and keys without a positive number: no weight anywhere.
q = -q.abs()
got, _ = check((q, k, v), few, "relu", eps=0.0, name="dead")
assert not any(x.any() for x in got)
print("checked")
"""

PROJECTED = """
from vidsparse_kernels.linear_branch import add_linear_branch
shapes = [
    ("softmax", dict(seq_len_q=145, seq_len_kv=161, num_heads=2, num_kv_heads=1, head_dim=72)),
    ("elu", dict(seq_len_q=64, head_dim=32, contiguous=False, num_heads=1, batch=2)),
    ("relu", dict(seq_len_q=75, seq_len_kv=47, head_dim=80, num_heads=1)),
]
for number, (feature_map, shape) in enumerate(shapes):
    inputs = [x + 1 for x in make_qkv(**shape, dtype=torch.float16)]
    q, head_dim = inputs[0], inputs[0].shape[3]
    # Queries without a positive number have no weight under relu.
    q[:, :3] = -1
    tensors = [torch.randn(q.transpose(1, 2).shape).half().transpose(1, 2), *inputs]
    parameters = [torch.randn(head_dim, head_dim) / 8, *([torch.randn(head_dim)] if number else [])]
    grad_out = torch.randn(q.transpose(1, 2).shape).half().transpose(1, 2)
    def run(function, dtype, parameter_dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        leaves += [x.detach().to(parameter_dtype).requires_grad_() for x in parameters]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(dtype))
    def written_out(out, query, key, value, weight, *bias):
        mean = linear_branch_oracle(query, key, value, None, feature_map=feature_map, eps=1e-5, dtype=query.dtype)
        return out + torch.nn.functional.linear(mean, weight, *bias)
    def ours(*x):
        return add_linear_branch(*x, feature_map=feature_map, backend="triton")
    got = run(ours, torch.float16, torch.float32)
    eager, truth = run(written_out, torch.float16, torch.float16), run(written_out, torch.float64, torch.float64)
    names = ("output", "grad out", "grad query", "grad key", "grad value", "grad weight", "grad bias")
    for which, g, e, t in zip(names, got, eager, truth):
        assert_close_to_oracle(g, e.to(g.dtype), t, name=f"{which} {feature_map}")
    assert all(torch.equal(a, b) for a, b in zip(got, run(ours, torch.float16, torch.float32)))
    with torch.no_grad():
        assert torch.equal(got[0], ours(*tensors, *parameters))
print("checked")
"""

COMPILED = """
import sys, torch, triton
from dataclasses import replace
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidsparse_kernels.block_sparse_attention.configs import backward_config, forward_config, padded_head_dim
from vidsparse_kernels.linear_branch import backward, forward

capability, shared_memory, head_dim, variable = (int(x) for x in sys.argv[1:])
table = dict(
    capability=(capability // 10, capability % 10), shared_memory=shared_memory, head_dim=head_dim, itemsize=2,
    q_block_size=128, kv_block_size=128, descriptors_possible=True)
block_d = padded_head_dim(head_dim)
ours, theirs = forward_config(**table), backward_config(**table)

def compiled(kernel, tiles, streamed, step, lists=True, **constants):
    pointers = dict.fromkeys(
        ("denominator_ptr", "delta_ptr", "sum_ptr", "key_sum_ptr"), "*fp32") | dict.fromkeys(
        ("counts_ptr", "indices_ptr", "own_blocks_ptr", "own_tiles_ptr", "weak_ptr"), "*i32") | dict.fromkeys(
        ("state_scale", "row_scale", "eps", "min_share"), "fp32") | dict.fromkeys(
        ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value", "source", "key_features",
         "query_features", "scaled", "features_ptr", "rest", "scaled_ptr", "state_ptr"), "*bf16")
    descriptors = tiles.descriptors and lists
    if descriptors:
        pointers |= dict.fromkeys(streamed, f"tensordesc<bf16[1, 1, {step}, {block_d}]>")
    constants |= {name: 1 for name in kernel.arg_names if name.endswith("stride_d")}
    constants |= dict(HEAD_DIM=head_dim, BLOCK_D=block_d, FEATURES="softmax", PRECISION="ieee")
    constants |= dict(
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, Q_BLOCK=128, KV_BLOCK=128,
        CHUNK=forward.chunk_size(torch.empty(0, dtype=torch.bfloat16), block_d), STATE_PARTS=2, HAS_LISTS=lists,
        VARIABLE=bool(variable) and lists, DESCRIPTORS=descriptors, RAGGED=True, WEIGHT_SCALE=1.0)
    constants["STORE_REST"] = True
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        aligned = "stride" in name and name not in kernel.do_not_specialize
        if signature[name].startswith("*") or signature[name] == "i32" and aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=True)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert result.metadata.shared <= shared_memory, result.metadata.shared
    assert "wgmma" in result.asm["ptx"] or capability < 90
    print("cp.async.bulk.tensor" in result.asm["ptx"], end=" ")

compiled(forward.linear_forward_kernel, ours, ("key_features", "value"), ours.block_n)
tiles = theirs.grad_key_value
compiled(
    backward.linear_backward_key_value_kernel, tiles, ("query_features", "scaled"), tiles.block_m, GROUP_SIZE=2,
    MEMBERS=2)
# Without lists other branches are compiled.
compiled(
    forward.linear_all_kernel, replace(ours, block_m=forward.ALL_BLOCK_M, num_warps=forward.ALL_WARPS), (), 0, lists=False)
compiled(backward.linear_backward_query_kernel, theirs.grad_query, (), 0, lists=False, GROUP_SIZE=1)
compiled(backward.linear_backward_key_value_kernel, tiles, (), 0, lists=False, GROUP_SIZE=1, MEMBERS=1)
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


@needs_triton
@pytest.mark.parametrize("variant", ["descriptors", "pointers"])
def test_interpreted_kernels_are_exact(variant):
    """bf16 is left to the GPU tests: the interpreter computes with numpy, which has no bf16."""
    assert run(PRELUDE + SHAPES, variant, TRITON_INTERPRET="1") == "checked"


@needs_triton
def test_interpreted_semantics():
    assert run(PRELUDE + SEMANTICS, TRITON_INTERPRET="1") == "checked"


@needs_triton
def test_interpreted_projection():
    assert run(PRELUDE + PROJECTED, TRITON_INTERPRET="1") == "checked"


@needs_triton
def test_compiles_for_hopper(tmp_path):
    printed = run(COMPILED, "90", "232448", "128", "1", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert printed == "True True False False False"
