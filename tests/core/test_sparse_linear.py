"""The method "sla": blocks that it skips, and weights under the names of public checkpoints."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from vidsparse import LatentGrid, PooledProcessor, Recipe, SparseLinearProcessor, TokenLayout, make_context
from vidsparse.attention import attend
from vidsparse.errors import ConfigError, ModelLoadError
from vidsparse.methods.sla_weights import check_selection, from_public_names, load_public
from vidsparse.methods.sparse_linear import SparseLinearConfig
from vidsparse_kernels import block_sparse_attention, linear_branch

LAYOUT = TokenLayout(LatentGrid(4, 6, 10), text_after=7)
ALWAYS: dict[str, Any] = dict(warmup_steps=0, dense_layers=0, min_tokens=0)


@pytest.mark.parametrize("coverage", ["all", "non_selected"])
def test_skipped_blocks_count_in_neither_branch(coverage):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, LAYOUT.seq_len, 3, 16, generator=generator).double() for _ in range(3))
    projection = torch.nn.Linear(16, 16).double()
    outputs = {}
    for skip in (0.0, 0.3):
        context = make_context(LAYOUT, Recipe.from_options("sla", density=0.4, skip=skip, coverage=coverage), "cpu")
        out, selection = attend(q, k, v, dataclasses.replace(context, projection=projection))
        outputs[skip] = out.detach()
    assert selection is not None and selection.skipped is not None
    listed, skipped = selection.block_mask.to_dense(), selection.skipped.to_dense()
    assert not (listed & skipped).any()
    # Rows that touch text compute everything and skip nothing, and no row skips text.
    text_rows = listed.all(-1)
    assert text_rows.any() and not skipped[text_rows].any() and not skipped[..., -1].any()
    assert (skipped.sum(-1)[~text_rows] == round(0.3 * listed.shape[-1])).all()
    assert all(any(x is tensor for x in selection.tensors()) for tensor in (selection.skipped.kv_indices,))

    q_size, kv_size = selection.block_mask.q_block_size, selection.block_mask.kv_block_size

    def by_token(table: torch.Tensor) -> torch.Tensor:
        rows = table.repeat_interleave(q_size, 2)[:, :, : LAYOUT.seq_len]
        return rows.repeat_interleave(kv_size, 3)[..., : LAYOUT.seq_len]

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    sparse = (q @ k.mT / 4).masked_fill(~by_token(listed), -torch.inf).softmax(-1) @ v
    pairs = (q.softmax(-1) @ k.softmax(-1).mT).masked_fill(by_token(skipped), 0.0)
    if coverage == "non_selected":
        pairs = pairs.masked_fill(by_token(listed), 0.0)
    mass = pairs.sum(-1, keepdim=True)
    eps = 1e-5 if coverage == "all" else 0.0
    linear = torch.where(mass > 0, pairs @ v / (mass + eps), 0.0)
    want = (sparse + projection(linear)).transpose(1, 2).detach()
    torch.testing.assert_close(outputs[0.3], want, atol=1e-8, rtol=1e-6)
    assert (outputs[0.3] - outputs[0.0]).abs().max() > 1e-3


@pytest.mark.parametrize(("skip", "most"), [(0.8, "0.6"), (-0.1, "0.6"), (True, "0.6"), ("x", "0.6")])
def test_more_skipped_than_is_left_is_refused(skip, most):
    with pytest.raises(ConfigError, match=f"`skip` must be from 0 to {most}, .*got {re.escape(repr(skip))}"):
        SparseLinearConfig(density=0.4, skip=skip)


@pytest.mark.parametrize("coverage", ["all", "non_selected"])
def test_a_linear_branch_on_a_radial_mask(coverage):
    """The mask of "radial", the correction of "sla", and with projections of zero the mask alone."""
    layout = TokenLayout(LatentGrid(6, 8, 8), text_after=5, block_size=32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, layout.seq_len, 2, 16, generator=generator).double() for _ in range(3))
    context = make_context(layout, Recipe.from_options("radial-linear", block_size=32, coverage=coverage), "cpu")
    radial = make_context(layout, Recipe.from_options("radial", block_size=32), "cpu")
    assert context.parts is not None and context.parts.block_mask is not None
    mask = context.parts.block_mask
    assert mask.density < 0.9
    projection = torch.nn.Linear(16, 16).double()
    out, _ = attend(q, k, v, dataclasses.replace(context, projection=projection))
    branch = linear_branch(q, k, v, mask, coverage=coverage)
    want = block_sparse_attention(q, k, v, mask) + projection(branch)
    torch.testing.assert_close(out, want, atol=1e-10, rtol=1e-8)
    assert branch.abs().max() > 0.1
    for parameter in projection.parameters():
        torch.nn.init.zeros_(parameter)
    out, _ = attend(q, k, v, dataclasses.replace(context, projection=projection))
    torch.testing.assert_close(out, attend(q, k, v, radial)[0])
    with pytest.raises(ConfigError, match="`coverage` must be one of all, non_selected, got 'some'"):
        Recipe.from_options("radial-linear", coverage="some")


def build() -> Any:
    torch.manual_seed(0)
    model: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    model.set_attn_processor(SparseLinearProcessor(**ALWAYS))
    return model


def public_state(prefix: str = "net.") -> dict[str, torch.Tensor]:
    """All tensors of TurboDiffusion's `WanModel` (rcm/networks/wan2pt1.py) with its `SparseLinearAttention`, at tiny sizes."""
    dim, ffn, text, freq, head = 24, 32, 16, 16, 12
    linears = {
        "patch_embedding": (dim, 16 * 4), "text_embedding.0": (dim, text), "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, freq), "time_embedding.2": (dim, dim), "time_projection.1": (6 * dim, dim),
        "head.head": (64, dim),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"head.modulation": (1, 2, dim)}
    for block in ("blocks.0.", "blocks.1."):
        for attention in ("self_attn.", "cross_attn."):
            linears |= {f"{block}{attention}{name}": (dim, dim) for name in "qkvo"}
            shapes |= {f"{block}{attention}norm_{name}.weight": (dim,) for name in "qk"}
        linears |= {f"{block}ffn.0": (ffn, dim), f"{block}ffn.2": (dim, ffn)}
        linears[f"{block}self_attn.attn_op.local_attn.proj_l"] = (head, head)
        shapes |= {f"{block}norm3.weight": (dim,), f"{block}norm3.bias": (dim,), f"{block}modulation": (1, 6, dim)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(1)
    return {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["net.", ""])
def test_a_public_checkpoint_fills_the_whole_model(prefix):
    model, state = build(), public_state(prefix)
    assert load_public(model, state) == 2
    own = model.state_dict()
    assert own.keys() == from_public_names(state).keys()
    for block in range(2):
        for kind in ("weight", "bias"):
            public = state[f"{prefix}blocks.{block}.self_attn.attn_op.local_attn.proj_l.{kind}"]
            assert torch.equal(own[f"blocks.{block}.attn1.proj_l.{kind}"], public)
    assert torch.equal(own["blocks.1.attn1.to_out.0.weight"], state[f"{prefix}blocks.1.self_attn.o.weight"])
    assert torch.equal(own["blocks.1.norm2.weight"], state[f"{prefix}blocks.1.norm3.weight"])
    # Public code cuts patches as `c (t 1) (h 2) (w 2) -> t h w (c 2 2)` and multiplies; a convolution is the same.
    latents = torch.randn(1, 16, 1, 4, 6)
    patches = latents.unflatten(3, (2, 2)).unflatten(5, (3, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(1, 3).flatten(2)
    weight, bias = state[f"{prefix}patch_embedding.weight"], state[f"{prefix}patch_embedding.bias"]
    want = torch.nn.functional.linear(patches, weight, bias)
    torch.testing.assert_close(model.patch_embedding(latents).flatten(2).mT, want, atol=1e-5, rtol=1e-5)


def test_projections_alone_fill_the_projections():
    model, state = build(), {name: x for name, x in public_state().items() if "proj_l" in name}
    before = model.patch_embedding.weight.clone()
    assert load_public(model, state) == 2 and torch.equal(model.patch_embedding.weight, before)
    assert model.blocks[1].attn1.proj_l.bias.any()


def test_checkpoints_that_do_not_fit_are_refused():
    model, state = build(), public_state()
    untouched = {name: x.clone() for name, x in model.state_dict().items()}
    name = "net.blocks.1.self_attn.attn_op.local_attn.proj_l.weight"
    cases = [
        ({k: v for k, v in state.items() if k != name}, "lacks 'blocks.1.attn1.proj_l.weight'"),
        (state | {"net.blocks.2.ffn.0.bias": torch.zeros(3)}, "has 'blocks.2.ffn.net.0.proj.bias', which the model lacks"),
        (state | {name: torch.zeros(13, 13)}, r"has shape \[13, 13\], the model \[12, 12\]"),
        (state | {"net.blocks.0.ffn.0.int8_weight": torch.zeros(3)}, "is quantised .*int8"),
    ]  # fmt: skip
    for broken, sentence in cases:
        with pytest.raises(ModelLoadError, match=sentence):
            load_public(model, broken)
    for options, sentence in (
        ({"coverage": "non_selected"}, "trained with `coverage` 'all', and the recipe has 'non_selected'"),
        ({"feature_map": "elu"}, "trained with `feature_map` 'softmax', and the recipe has 'elu'"),
        ({"skip": 0.1}, "trained with `skip` 0.0, and the recipe has 0.1"),
        ({"kv_block_size": 128}, "trained with blocks of 64 keys, and the recipe has `kv_block_size` 128"),
    ):
        model.set_attn_processor(SparseLinearProcessor(**options, **ALWAYS))
        with pytest.raises(ConfigError, match=sentence):
            load_public(model, state)
    with pytest.raises(
        ConfigError, match="128 queries and 64 keys, and 4,000 tokens are cut into blocks of 64 and 32"
    ):
        check_selection(SparseLinearConfig(), 4000)
    check_selection(SparseLinearConfig(), 4096)
    assert all(torch.equal(x, untouched[name]) for name, x in model.state_dict().items())
    model.set_attn_processor(PooledProcessor(**ALWAYS))
    with pytest.raises(ConfigError, match="needs a transformer with the method 'sla', got 'pooled'"):
        load_public(model, state)
