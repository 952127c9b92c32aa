"""Tuned recipes: a choice by layer, step range and head, against the methods they choose from."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from vidsparse import LatentGrid, Recipe, TokenLayout, apply, make_context
from vidsparse.attention import attend
from vidsparse.errors import ConfigError
from vidsparse.methods.tuned import TunedConfig, TunedProcessor
from vidsparse.processors.context import AttentionContext
from vidsparse.recipe import TunedFor
from vidsparse.schedule import BY_RECIPE, GUARDED, Schedule
from vidsparse.selection.heads import join_heads, refine
from vidsparse_kernels import BlockMask
from vidsparse_pipelines.testing import tiny_wan_pipeline

GRID = LatentGrid(5, 8, 12)
HEADS = 4
CHOICES = (
    {"method": "dense"},
    {"method": "radial", "block_size": 32},
    {"method": "pooled", "density": 0.3},
    {"method": "vidsparse", "density": 0.3},
    {"method": "svg1", "density": 0.4, "kind": "temporal"},
    {"method": "skip"},
)


def recipe(table: list[list[Any]], ends: tuple[float, ...] = (0.5, 1.0), **tuned: Any) -> Recipe:
    config = TunedConfig(CHOICES, ends, tuple(tuple(row) for row in table))
    return Recipe("tuned", config, TunedFor(**tuned) if tuned else None)


def call(processor: TunedProcessor, layer: int, step: int, q, k, v, layers: int) -> torch.Tensor:
    layout = processor.layout(GRID)
    parts, _ = processor.parts(layout, "cpu")
    return attend(q, k, v, AttentionContext(layer, layers, step, 4, None, layout, parts=parts))[0]


def alone(choice: int, q, k, v) -> torch.Tensor:
    name, options = CHOICES[choice]["method"], {n: x for n, x in CHOICES[choice].items() if n != "method"}
    return attend(q, k, v, make_context(TokenLayout(GRID), Recipe.from_options(str(name), **options), "cpu"))[0]


@pytest.fixture
def qkv() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, GRID.num_tokens, HEADS, 16, generator=generator) for _ in range(3))


def test_a_cell_is_its_method(qkv) -> None:
    processor = TunedProcessor(recipe([[1, 2], [3, 4]]))
    for layer, step, choice in ((0, 0, 1), (0, 3, 2), (1, 1, 3), (1, 2, 4)):
        torch.testing.assert_close(call(processor, layer, step, *qkv, layers=2), alone(choice, *qkv))


def test_heads_of_one_call_are_their_methods(qkv) -> None:
    """Blocks of three sizes joined in one call give what each method gives to its own heads."""
    choices = (1, 2, 4, 5)
    out = call(TunedProcessor(recipe([[list(choices), 0]])), 0, 0, *qkv, layers=1)
    for head, choice in enumerate(choices):
        own = [x[:, :, head : head + 1] for x in qkv]
        expected = torch.zeros_like(own[0]) if choice == 5 else alone(choice, *own)
        torch.testing.assert_close(out[:, :, head : head + 1], expected)


def test_dense_heads_beside_sparse_ones(qkv) -> None:
    out = call(TunedProcessor(recipe([[[0, 2, 0, 2], 0]])), 0, 0, *qkv, layers=1)
    q, k, v = (x[:, :, 2].double() for x in qkv)
    expected = (q @ k.transpose(1, 2) / 4).softmax(-1) @ v
    torch.testing.assert_close(out[:, :, 2].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("length", "sizes"), [(100, (16, 32)), (128, (32, 16)), (33, (16, 16))])
def test_refined_blocks_are_the_same_pairs(length: int, sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(length)
    blocks = -(-length // 32)
    dense = torch.rand(1, 2, blocks, blocks, generator=generator) < 0.4
    mask = BlockMask.from_dense(dense, seq_len_q=length, seq_len_kv=length, q_block_size=32, kv_block_size=32)
    fine = refine(mask, *sizes)
    expected = mask.to_dense().repeat_interleave(32 // sizes[0], 2).repeat_interleave(32 // sizes[1], 3)
    assert torch.equal(fine.to_dense(), expected[:, :, : -(-length // sizes[0]), : -(-length // sizes[1])])


def test_clusters_do_not_share_a_call_with_other_heads(qkv) -> None:
    with pytest.raises(ConfigError, match="clusters cannot share a call"):
        call(TunedProcessor(recipe([[[3, 2, 2, 2], 0]])), 0, 0, *qkv, layers=1)
    mask = BlockMask.full(64, 64, q_block_size=32, kv_block_size=32)
    assert join_heads([mask, mask], [[0], [1]], 2, 1).density == 1


def test_a_generation_follows_the_table() -> None:
    pipe = tiny_wan_pipeline(num_layers=2)
    settings = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}

    def latents() -> torch.Tensor:
        return pipe("a red cat", generator=torch.Generator().manual_seed(0), **settings).frames

    stock = latents()
    handle = apply(pipe, recipe([[0, 2], [0, 0]]))
    sparse = latents()
    by_cell = {(row.layer, row.step): row.reason for row in handle.report().rows}
    assert by_cell == {(i, s): None if i == 0 and s >= 2 else BY_RECIPE for i in range(2) for s in range(4)}
    assert not handle.report().fallbacks and (stock - sparse).abs().max() > 0.01
    plan = handle.describe(LatentGrid(3, 4, 4), 4)
    assert [[cell < 1 for cell in row] for row in plan.density] == [[False, False, True, True], [False] * 4]
    handle.remove()
    handle = apply(pipe, recipe([[0, 0], [0, 0]]))
    assert torch.equal(latents(), stock)
    handle.remove()
    assert torch.equal(latents(), stock)


def test_a_guarded_layer_that_falls_short_goes_dense() -> None:
    """A table has no one density to raise."""
    pipe = tiny_wan_pipeline(num_layers=2)
    config = TunedConfig(CHOICES, (1.0,), ((2,), (0,)), Schedule(warmup_steps=0, guard=0.9999))
    handle = apply(pipe, Recipe("tuned", config))
    pipe(
        "a",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=4,
        output_type="latent",
        generator=torch.Generator(),
    )
    reasons = {row.step: row.reason for row in handle.report().rows if row.layer == 0}
    assert reasons[0] is None and reasons[3] == GUARDED


def test_whole_layers_may_change_from_clusters_to_blocks_and_back() -> None:
    pipe = tiny_wan_pipeline(num_layers=2)
    other = ({"method": "vidsparse", "density": 0.5, "q_clusters": 2, "k_clusters": 3}, *CHOICES)
    table = ((0, 2, 4), (4, 0, 4))
    handle = apply(pipe, Recipe("tuned", TunedConfig(other, (0.34, 0.67, 1.0), table)), strict=True)
    pipe(
        "a",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=6,
        output_type="latent",
        generator=torch.Generator(),
    )
    report = handle.report()
    assert report.num_sparse_calls == report.num_calls == 24


def test_one_graph_serves_all_cells() -> None:
    """Under torch.compile a tuned call is one opaque operator, whatever its cell, so no cell compiles again."""
    pipe = tiny_wan_pipeline(num_layers=2)
    settings = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "output_type": "latent"}
    apply(pipe, recipe([[1, 2], [3, [2, 4]]]))
    eager = pipe("a cat", generator=torch.Generator().manual_seed(0), **settings).frames
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # Other tests of the same process have graphs too.
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    compiled = pipe("a cat", generator=torch.Generator().manual_seed(0), **settings).frames
    torch.testing.assert_close(compiled, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (1, 2)
    torch._dynamo.reset()


def test_json_round_trip() -> None:
    made = recipe([[0, [1, 2]], [3, 0]], model="m", grid=GRID, num_steps=4, device="CPU", psnr=28.5)
    again = Recipe.from_json(made.to_json())
    assert again == made and json.loads(made.to_json())["config"]["table"] == [[0, [1, 2]], [3, 0]]


def test_another_shape_or_model_is_refused(qkv) -> None:
    made = recipe([[1, 2]], model="m", grid=LatentGrid(5, 16, 16), num_steps=4)
    with pytest.raises(ConfigError, match=r"tuned for 640 to 2,560 video tokens \(grid 5x16x16\), this video has 480"):
        TunedProcessor(made).layout(GRID)
    with pytest.raises(ConfigError, match="tuned for 1 layers, this model has 3"):
        call(TunedProcessor(recipe([[1, 2]])), 0, 0, *qkv, layers=3)
    with pytest.raises(ConfigError, match="tuned for 2 heads, this model has 4"):
        call(TunedProcessor(recipe([[[1, 2], 2]])), 0, 0, *qkv, layers=1)
    with pytest.raises(ConfigError, match="tuned for 1 layers, this model has more"):
        TunedProcessor(recipe([[1, 2]])).dense_reason(0, 4, 1, 480)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": ((0,),)}, "an entry for each of the 2 step ranges"),
        ({"table": ((0, 9),)}, "must be a choice from 0 to 5"),
        ({"table": ((0, (1, 7)),)}, "must be a choice from 0 to 5"),
        ({"step_ends": (0.5, 0.4)}, "must ascend from above 0 to 1"),
        ({"choices": ({"density": 1},)}, "is an object with a `method`"),
        ({"table": 3}, "`table` must be a list"),
    ],
)
def test_a_wrong_table_is_named(change: dict[str, object], message: str) -> None:
    good = {"choices": CHOICES, "step_ends": (0.5, 1.0), "table": ((0, 1),)}
    with pytest.raises(ConfigError, match=message):
        TunedConfig(**{**good, **change})  # type: ignore[arg-type]


def test_without_a_table_there_is_nothing_to_run() -> None:
    with pytest.raises(ConfigError, match="make one with `vidsparse tune`"):
        TunedProcessor()
    with pytest.raises(ConfigError, match="`kind` must be one of spatial, temporal"):
        Recipe.from_options("svg1", kind="both")
