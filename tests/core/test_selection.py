"""Methods that select from query and key: the path, reuse from step to step, and compilation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import vidsparse
from vidsparse.attention import attend, make_context
from vidsparse.cli.method_options import attribute_help
from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.methods import processor_class
from vidsparse.parts import LayerMemory, MemoryBudget, Selection, token_density
from vidsparse.processors.context import AttentionContext
from vidsparse.recipe import Recipe
from vidsparse.selection.blocks import PooledSelector, block_sizes, forced_blocks
from vidsparse.selection.clusters import ClusterSelector
from vidsparse_kernels import BlockMask
from vidsparse_kernels.testing import masked_attention_oracle

LAYOUT = TokenLayout(LatentGrid(5, 7, 9), text_before=3, text_after=11)
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SELECTING = (
    ("pooled", {"density": 0.3}),
    ("random", {"density": 0.3}),
    ("svg1", {"density": 0.3}),
    ("semantic", {"density": 0.3}),
    ("semantic", {"top_p": 0.4}),
    ("semantic", {"density": 0.3, "query_tiles": True}),
    ("semantic", {"top_p": 0.4, "query_tiles": True, "q_clusters": 3}),
)
ALWAYS: dict[str, Any] = {"warmup_steps": 0, "dense_layers": 0, "min_tokens": 0}


def tensors(layout: TokenLayout = LAYOUT, batch: int = 2, heads: int = 2, seed: int = 0) -> Three:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, layout.seq_len, heads, 16, generator=generator) for _ in range(3))
    return q, k, v


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def context_of(method: str, layout: TokenLayout = LAYOUT, **options: Any) -> AttentionContext:
    return make_context(layout, Recipe.from_options(method, **options), "cpu")


def token_mask(selection: Selection) -> torch.Tensor:
    """`[batch, heads, seq_len, seq_len]` over tokens as the model has them."""
    mask = selection.block_mask
    blocks, batch, heads = mask.to_dense(), 2, 2
    which = []
    for side, order in (("q", selection.q_order), ("kv", selection.kv_order)):
        offsets = mask.offsets(side).expand(batch, heads, -1)
        seq_len = mask.seq_len_q
        block_of_place = (
            torch.searchsorted(offsets.contiguous(), torch.arange(seq_len).expand(batch, heads, -1), right=True) - 1
        )
        if order is not None:
            places = torch.arange(seq_len).expand(batch, heads, -1).clone()
            start = selection.text_before
            video = torch.arange(start, start + order.shape[-1]).expand(batch, heads, -1)
            places.scatter_(2, order.expand(batch, heads, -1).long() + start, video)
            block_of_place = block_of_place.gather(2, places)
        which.append(block_of_place)
    rows = blocks.expand(batch, heads, -1, -1).gather(2, which[0][..., None].expand(-1, -1, -1, blocks.shape[-1]))
    return rows.gather(3, which[1][:, :, None, :].expand(-1, -1, rows.shape[2], -1))


@pytest.mark.parametrize(("method", "options"), SELECTING, ids=str)
def test_output_is_exact_on_the_selection(method, options):
    q, k, v = tensors()
    context = context_of(method, **options)
    out, selection = attend(q, k, v, context)
    assert selection is not None
    mask = token_mask(selection)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 4
    want = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v.double())
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    video = slice(LAYOUT.text_before, LAYOUT.text_before + LAYOUT.grid.num_tokens)
    text = torch.ones(LAYOUT.seq_len, dtype=torch.bool)
    text[video] = False
    assert mask[:, :, text].all() and mask[:, :, :, text].all(), "text is dense as rows and as columns"
    assert float(selection.density) == pytest.approx(float(mask.float().mean()), abs=0.02)
    assert 0.2 < float(selection.density) < 0.9
    assert torch.equal(attend(q, k, v, context)[0], out), "the same input selects the same"


@pytest.mark.parametrize("method", ["pisa", "vidsparse"])
def test_a_tail_brings_the_output_nearer_to_dense(method):
    q, k, v = tensors()
    dense = dense_attention(q, k, v)
    plain = {"pisa": "pooled", "vidsparse": "semantic"}[method]
    errors = [float((attend(q, k, v, context_of(name, density=0.2))[0] - dense).norm()) for name in (method, plain)]
    assert errors[0] < 0.6 * errors[1]
    everything = attend(q, k, v, context_of(method, density=1.0))[0]
    torch.testing.assert_close(everything, dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep", ["state", "residual"])
@pytest.mark.parametrize(
    ("method", "options"), [("pooled", {"density": 0.3}), ("semantic", {"density": 0.3}), ("radial", {})]
)
def test_kept_states_are_exact_while_nothing_changes(method, options, keep):
    q, k, v = tensors()
    dense = dense_attention(q, k, v)
    context = context_of(method, refresh_every=3, keep=keep, **options)
    memory = LayerMemory(MemoryBudget())
    context = dataclasses.replace(context, memory=memory, refresh_every=3)
    first, second = (attend(q, k, v, at_step(context, step))[0] for step in (4, 5))
    torch.testing.assert_close(first, dense, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second, dense, atol=1e-5, rtol=1e-4)
    assert memory.get("state") is not None and memory.budget.used > 2 * q.numel()
    # Other inputs in a later step: near the truth, not equal to it; and exact again after the refresh.
    other = tensors(seed=7)
    changed = q + 0.1 * other[0], k + 0.1 * other[1], v + 0.1 * other[2]
    truth = dense_attention(*changed)
    stale = attend(*changed, at_step(context, 6))[0]
    bare = attend(*changed, context_of(method, **options))[0]
    assert 1e-3 < float((stale - truth).norm()) < 0.7 * float((bare - truth).norm())
    torch.testing.assert_close(attend(*changed, at_step(context, 7))[0], truth, atol=1e-5, rtol=1e-4)


def test_a_kept_state_needs_room_and_a_free_correction():
    context = context_of("pooled", density=0.3, refresh_every=2, keep="state")
    budget = MemoryBudget(20_000)
    context = dataclasses.replace(context, memory=LayerMemory(budget), refresh_every=2)
    bare = attend(*tensors(), context_of("pooled", density=0.3))[0]
    for step in (1, 2):
        torch.testing.assert_close(attend(*tensors(), at_step(context, step))[0], bare)
    assert budget.refused == 2
    with pytest.raises(ConfigError, match="would both stand for the dropped blocks"):
        vidsparse.PisaProcessor(refresh_every=2, keep="state")
    with pytest.raises(ConfigError, match="needs `refresh_every` of at least 2"):
        vidsparse.PooledProcessor(keep="state")
    with pytest.raises(ConfigError, match="`keep` must be one of nothing, state, residual, got 'all'"):
        vidsparse.PooledProcessor(keep="all")


def test_linear_branch_trains_saves_and_leaves(build_transformer, forward):
    model = build_transformer()
    with torch.no_grad():
        stock = forward(model)
        model.set_attn_processor(vidsparse.PooledProcessor(density=0.3, **ALWAYS))
        pooled = forward(model)
        model.set_attn_processor(vidsparse.SparseLinearProcessor(density=0.3, **ALWAYS))
        torch.testing.assert_close(forward(model), pooled)
    names = [name for name in model.state_dict() if name.endswith("proj_l.weight")]
    assert names == [f"blocks.{index}.attn1.proj_l.weight" for index in range(3)]
    forward(model).square().mean().backward()
    weights = [model.get_parameter(name) for name in names]
    assert all(weight.grad is not None and weight.grad.any() for weight in weights)
    with torch.no_grad():
        for weight in weights:
            torch.nn.init.eye_(weight)
        changed = forward(model)
        assert (changed - pooled).abs().max() > 1e-3
        vidsparse.processors.binding.unbind(model)
        assert torch.equal(forward(model), stock)
    assert not [name for name in model.state_dict() if "proj_l" in name]


def test_forced_blocks_hold_exactly_what_they_should():
    forced, most = forced_blocks(LAYOUT, 32, 16, 1, "cpu")
    seq_len, frame = LAYOUT.seq_len, LAYOUT.grid.tokens_per_frame
    video = range(LAYOUT.text_before, LAYOUT.text_before + LAYOUT.grid.num_tokens)
    first_frame = range(video.start, video.start + frame)
    for row in range(forced.shape[2]):
        queries = range(row * 32, min(row * 32 + 32, seq_len))
        for column in range(forced.shape[3]):
            keys = range(column * 16, min(column * 16 + 16, seq_len))
            text = any(token not in video for token in (*queries, *keys))
            expected = text or any(key in first_frame for key in keys) or bool(set(queries) & set(keys))
            assert bool(forced[0, 0, row, column]) == expected, (row, column)
    video_rows = [row for row in range(forced.shape[2]) if not forced[0, 0, row].all()]
    assert max(int(forced[0, 0, row].sum()) for row in video_rows) <= most


def test_density_counts_real_tokens():
    q_offsets = torch.tensor([[[0, 5, 5, 20]]], dtype=torch.int32)
    kv_offsets = torch.tensor([[[0, 12, 20]]], dtype=torch.int32)
    dense = torch.tensor([[[[True, False], [True, True], [False, True]]]])
    mask = BlockMask.from_dense(
        dense,
        seq_len_q=20,
        seq_len_kv=20,
        q_block_size=16,
        kv_block_size=16,
        q_offsets=q_offsets,
        kv_offsets=kv_offsets,
    )
    assert float(token_density(mask)) == pytest.approx((5 * 12 + 15 * 8) / 400)


class Counting:
    """A selector that counts its calls."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, 0

    def select(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> Selection:
        self.calls += 1
        return self.inner.select(query, key, context)


def at_step(context: AttentionContext, step: int, **changes: Any) -> AttentionContext:
    return dataclasses.replace(context, step_index=step, step_count=10, **changes)


def counted(budget: MemoryBudget | None = None, **changes: Any) -> tuple[AttentionContext, Counting]:
    context = context_of("pooled", density=0.3)
    assert context.parts is not None
    counting = Counting(context.parts.selector)
    parts = dataclasses.replace(context.parts, selector=counting)
    memory = LayerMemory(budget or MemoryBudget())
    return dataclasses.replace(context, parts=parts, memory=memory, **changes), counting


@pytest.mark.parametrize(("every", "calls"), [(1, 8), (3, 3), (100, 1)])
def test_refresh_every(every, calls):
    context, counting = counted(refresh_every=every)
    used = []
    for step in range(2, 10):
        _, selection = attend(*tensors(seed=step), at_step(context, step))
        used.append(selection)
    assert counting.calls == calls
    assert len({id(selection) for selection in used}) == calls
    # Outside a generation every call stands for itself.
    attend(*tensors(), dataclasses.replace(context, step_index=None))
    assert counting.calls == calls + 1


def test_another_shape_or_an_earlier_step_forgets():
    context, counting = counted(refresh_every=100)
    attend(*tensors(), at_step(context, 3))
    attend(*tensors(batch=1), at_step(context, 4))
    attend(*tensors(batch=1), at_step(context, 2))
    assert counting.calls == 3
    attend(*tensors(batch=1), at_step(context, 3))
    assert counting.calls == 3


def test_the_budget_holds_and_is_given_back():
    budget = MemoryBudget(10)
    context, counting = counted(budget, refresh_every=100)
    for step in range(3):
        attend(*tensors(), at_step(context, step))
    assert counting.calls == 3 and budget.used == 0 and budget.refused == 3
    budget.limit = None
    attend(*tensors(), at_step(context, 3))
    assert budget.used > 0 and context.memory is not None
    context.memory.clear()
    assert budget.used == 0


def test_a_generation_reuses_per_branch_and_the_next_one_starts_anew(build_pipeline, generate):
    pipe = build_pipeline()
    handle = vidsparse.apply(pipe, "pooled", density=0.4, refresh_every=2, **ALWAYS)
    run, during = handle._run, []

    def look(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        during.append((set(run._memories), run.budget.used))
        return kwargs

    first = generate(pipe, callback_on_step_end=look)
    keys, used = during[1]
    assert {branch for _, branch in keys} == {"cond", "uncond"} and len(keys) == 3 * 2 and used > 0
    assert run.budget.used == 0, "after the last step nothing is kept while the video is decoded"
    assert torch.equal(generate(pipe), first), "nothing of the first video reaches the second"
    report = handle.report()
    assert report.num_sparse_calls == report.num_calls == 3 * 4 * 2
    assert report.sparse_density is not None and 0.4 <= report.sparse_density < 0.7
    handle.remove()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vidsparse", {"refresh_every": 2, "q_clusters": 3, "k_clusters": 4, "first_iterations": 2}),
        ("vidsparse", {"refresh_every": 2, "q_clusters": 3, "k_clusters": 4, "query_tiles": True}),
        ("pooled", {"refresh_every": 3, "keep": "state"}),
    ],
)
def test_what_is_kept_never_leaves_its_generation(build_pipeline, generate, method, options):
    """The same video after another size, two at once, no guidance, one broken off, and one inside it on another pipeline."""
    pipe, other = build_pipeline(), build_pipeline()
    processor = processor_class(method)(density=0.4, **options, **ALWAYS)
    for each in (pipe, other):
        each.transformer.set_attn_processor(processor)
    first = generate(pipe)

    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise InterruptedError
        return kwargs

    def within(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            assert torch.equal(generate(other), first)
        return kwargs

    for changes in ({"height": 96}, {"num_videos_per_prompt": 2}, {"guidance_scale": 1.0}):
        assert not torch.equal(generate(pipe, **changes), first)
        assert torch.equal(generate(pipe), first)
    with pytest.raises(InterruptedError):
        generate(pipe, callback_on_step_end=stop)
    assert torch.equal(generate(pipe, callback_on_step_end=within), first)


def test_dense_early_then_one_choice_for_all_steps(build_pipeline, generate, monkeypatch):
    """SparseD's schedule: warm-up steps, then blocks chosen once for each layer and branch."""
    pipe, calls = build_pipeline(), []
    chosen = PooledSelector.select
    monkeypatch.setattr(PooledSelector, "select", lambda self, *args: calls.append(1) or chosen(self, *args))
    settings: dict[str, Any] = ALWAYS | {"warmup_steps": 1, "refresh_every": 100}
    for video in (1, 2):
        handle = vidsparse.apply(pipe, "pooled", density=0.4, **settings)
        generate(pipe)
        report = handle.report()
        assert report.dense_calls == {"warm-up step": 3 * 2} and report.num_sparse_calls == 3 * 3 * 2
        assert len(calls) == video * 3 * 2
        handle.remove()


def test_too_little_memory_is_said(build_pipeline, generate):
    pipe = build_pipeline()
    handle = vidsparse.apply(pipe, "pooled", refresh_every=2, reuse_gib=1e-9, **ALWAYS)
    generate(pipe)
    assert any("reuse_gib" in note for note in handle.report().notes)
    handle.remove()


@pytest.mark.parametrize("method", ["pooled", "svg1", "semantic", "pisa", "vidsparse", "sla"])
def test_images_and_videos_of_every_text_position(method):
    from vidsparse.testing import CASES

    for name in ("Flux Kontext", "HunyuanVideo", "Mochi"):
        case = CASES[name]
        torch.manual_seed(0)
        model = case.build().eval()
        inputs = case.inputs(1, torch.Generator().manual_seed(0))
        with torch.no_grad():
            stock = model(**inputs, return_dict=False)[0]
            processor = processor_class(method)(density=1.0, **ALWAYS)
            model.set_attn_processor(processor)
            torch.testing.assert_close(model(**inputs, return_dict=False)[0], stock, atol=3e-5, rtol=1e-4)
            assert processor.report().num_sparse_calls == case.targets


@torch.no_grad()
def test_compiled_blocks_share_one_graph(build_transformer, forward):
    model = build_transformer(num_layers=12)
    model.set_attn_processor(vidsparse.PooledProcessor(density=0.3, **ALWAYS))
    eager = forward(model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        compiled = forward(model)
    torch.testing.assert_close(compiled, eager, atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()


@pytest.mark.break_even
@torch.no_grad()
def test_on_a_cpu_it_runs_dense_and_says_so(build_transformer, forward):
    model = build_transformer()
    stock = forward(model)
    processor = vidsparse.PooledProcessor(density=0.3, warmup_steps=0)
    model.set_attn_processor(processor)
    assert torch.equal(forward(model), stock)
    assert any("costs more on a CPU" in reason for reason in processor.report().dense_calls)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"density": 0}, r"`density` must be in \(0, 1\], got 0"),
        ({"top_p": 1.5}, r"`top_p` must be in \(0, 1\], got 1.5"),
        ({"top_p": 0.9, "density": 0.2}, "not both"),
        ({"sink_frames": -1}, "`sink_frames` must be a whole number of at least 0, got -1"),
        ({"refresh_every": 0}, "`refresh_every` must be a whole number of at least 1 step, got 0"),
        ({"reuse_gib": -1}, "`reuse_gib` must be at least 0, got -1"),
    ],
)
def test_bad_settings(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        vidsparse.PooledProcessor(**options)


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("semantic", {"k_clusters": 10**6}, "`k_clusters` must be at most the [0-9]+ video tokens there are, got 1000000"),
        ("vidsparse", {"q_clusters": 10**6}, "`q_clusters` must be at most the [0-9]+ video tokens there are"),
        ("pooled", {"refresh_every": 2, "reuse_gib": 1e9}, "`reuse_gib` must be at most the [0-9]+ GiB of memory of cpu"),
    ],
)  # fmt: skip
def test_more_than_there_is_is_refused_before_any_work(build_transformer, forward, method, options, sentence):
    """In a dense warm-up step already, and before the first layer."""
    model, ran = build_transformer(), []
    model.patch_embedding.register_forward_hook(lambda *_: ran.append(1))
    model.set_attn_processor(processor_class(method)(warmup_steps=2, **options))
    with pytest.raises(ConfigError, match=sentence):
        forward(model)
    assert not ran


@pytest.mark.parametrize(
    ("sizes", "clusters"),
    [((21, 30, 52), (200, 1000)), ((21, 45, 80), (300, 1000)), ((33, 45, 80), (400, 1000)), ((33, 30, 52), (200, 1000)),
     ((5, 8, 8), (10, 10))],
)  # fmt: skip
def test_published_clusters_by_default(sizes, clusters):
    """Wan and HunyuanVideo at 480p and 720p in the scripts of Sparse VideoGen 2; small videos at most a 32nd."""
    for method in ("semantic", "vidsparse"):
        parts, note = processor_class(method)().parts(TokenLayout(LatentGrid(*sizes)), "cpu")
        assert isinstance(parts.selector, ClusterSelector) and note is not None
        counts = (parts.selector.clustering.q_clusters, parts.selector.clustering.k_clusters)
        # The tail of "vidsparse" has clusters of half as many tokens where there are few.
        assert counts == ((10, 20) if method == "vidsparse" and clusters == (10, 10) else clusters)
        assert f"{counts[0]} clusters of queries and {counts[1]} of keys" in note


def test_full_tiles_of_queries():
    """Rows are cut from the order of the clusters; text keeps its place, and a tile that holds text is dense."""
    q, k, v = tensors()
    selections = {}
    for tiles in (False, True):
        context = context_of("vidsparse", density=0.3, q_clusters=5, query_tiles=tiles)
        assert ("full tiles of 32 queries" in (processor_class("vidsparse")(
            q_clusters=5, query_tiles=tiles).parts(LAYOUT, "cpu")[1] or "")) == tiles  # fmt: skip
        _, selections[tiles] = attend(q, k, v, context)
    clusters, tiles = selections[False], selections[True]
    assert clusters is not None and tiles is not None
    assert torch.equal(clusters.q_order, tiles.q_order) and torch.equal(clusters.kv_order, tiles.kv_order)
    mask = tiles.block_mask
    assert (
        mask.q_offsets is None
        and mask.q_block_size == 32
        and torch.equal(mask.kv_offsets, clusters.block_mask.kv_offsets)
    )
    assert mask.num_q_blocks == -(-LAYOUT.seq_len // 32)
    dense = mask.kv_num_blocks == mask.num_kv_blocks
    # Text stands in places 0 to 2 and 318 to 328.
    assert dense[:, :, [0, 9, 10]].all() and not dense[:, :, 1:9].any()
    # From step to step the numbers of the clusters stay, and with them what is a neighbour.
    memory = LayerMemory(MemoryBudget())
    context = dataclasses.replace(context_of("vidsparse", density=0.3, query_tiles=True), memory=memory)
    first, second = (attend(q, k, v, at_step(context, step)) for step in (3, 4))
    assert first[1] is not None and second[1] is not None
    assert torch.nn.functional.cosine_similarity(first[0].flatten(), second[0].flatten(), 0) > 0.95


def test_full_tiles_where_clusters_are_large_enough():
    for sizes, expected in (((21, 45, 80), True), ((21, 30, 52), True), ((33, 45, 80), True), ((21, 12, 20), False)):
        layout = TokenLayout(LatentGrid(*sizes))
        cases: tuple[tuple[str, dict[str, Any], bool], ...] = (
            ("vidsparse", {}, expected), ("vidsparse", {"query_tiles": False}, False), ("semantic", {}, False),
            ("semantic", {"query_tiles": True}, True),
        )  # fmt: skip
        for method, options, tiles in cases:
            parts, _ = processor_class(method)(**options).parts(layout, "cpu")
            assert isinstance(parts.selector, ClusterSelector) and parts.selector.query_tiles == tiles
    for value in (2, 1, "true"):
        with pytest.raises(ConfigError, match="`query_tiles` must be True, False or None, got "):
            processor_class("semantic")(query_tiles=value)


def test_settings_of_a_method_made_of_another_are_described():
    texts = attribute_help(processor_class("vidsparse").config_class)
    assert "160 queries" in texts["query_tiles"]
    assert "200 up to 60,000" in texts["q_clusters"] and "16th" in texts["k_clusters"] and "0.15" in texts["density"]


def test_what_is_kept_is_reported(build_pipeline, generate):
    pipe = build_pipeline()
    notes = {}
    for every in (1, 2):
        handle = vidsparse.apply(pipe, "pooled", refresh_every=every, **ALWAYS)
        generate(pipe)
        notes[every] = [note for note in handle.report().notes if "kept from step to step" in note]
        handle.remove()
    assert notes[1] == [] and len(notes[2]) == 1 and float(notes[2][0].split()[-2]) > 0


def test_oracle_agrees_on_top_p():
    q, k, v = tensors(TokenLayout(LatentGrid(4, 8, 8)))
    layout = TokenLayout(LatentGrid(4, 8, 8))
    out, selection = attend(q, k, v, context_of("pooled", layout, top_p=0.6))
    assert selection is not None
    want = masked_attention_oracle(q, k, v, selection.block_mask)
    want = want[0] if isinstance(want, tuple) else want
    torch.testing.assert_close(out.double(), want.double(), atol=1e-5, rtol=1e-5)


def one_model(name: str) -> tuple[Any, Any]:
    from vidsparse.testing import CASES

    torch.manual_seed(0)
    return CASES[name].build().eval(), CASES[name]


@torch.no_grad()
@pytest.mark.parametrize("keep", ["nothing", "state"])
def test_samples_of_a_batch_never_meet(keep):
    """Mochi attends sample by sample, so both samples of a batch pass through one layer in one step."""
    model, case = one_model("Mochi")
    both = case.inputs(2, torch.Generator().manual_seed(0))
    both["encoder_attention_mask"][:] = both["encoder_attention_mask"][:1]
    processor = vidsparse.PooledProcessor(density=0.3, refresh_every=2, keep=keep, **ALWAYS)
    model.set_attn_processor(processor)

    def steps(inputs: dict[str, Any]) -> torch.Tensor:
        model._vidsparse_binding.run.reset()
        out = []
        for timestep in (900, 800):
            with model.cache_context("cond_uncond"):
                inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
                out.append(model(**inputs, return_dict=False)[0])
        return torch.stack(out)

    together = steps(dict(both))
    assert any("sample by sample" in note for note in processor.report().notes)
    bare = vidsparse.PooledProcessor(density=0.3, **ALWAYS)
    model.set_attn_processor(bare)
    second = steps({name: value[1:] for name, value in both.items()})
    torch.testing.assert_close(together[:, 1:], second, atol=1e-5, rtol=1e-4)


def test_trained_projections_stay(build_transformer):
    model = build_transformer()
    own = torch.nn.Linear(12, 12, bias=False)
    model.blocks[1].attn1.add_module("proj_l", own)
    model.set_attn_processor(vidsparse.SparseLinearProcessor(**ALWAYS))
    for block in model.blocks:
        torch.nn.init.eye_(block.attn1.proj_l.weight)
    model.fuse_qkv_projections()
    model.set_attn_processor(vidsparse.SparseLinearProcessor(density=0.1, **ALWAYS))
    assert all(float(block.attn1.proj_l.weight.detach().sum()) == 12 for block in model.blocks)
    vidsparse.processors.binding.unbind(model)
    assert [hasattr(block.attn1, "proj_l") for block in model.blocks] == [False, True, False]
    assert model.blocks[1].attn1.proj_l is own


@pytest.mark.parametrize("name", ["Kandinsky 5", "Flux 2"])
def test_projections_on_models_with_other_names(name):
    model, case = one_model(name)
    model.set_attn_processor(vidsparse.SparseLinearProcessor(**ALWAYS))
    with torch.no_grad():
        model(**case.inputs(1, torch.Generator().manual_seed(0)), return_dict=False)
    assert sum("proj_l.weight" in key for key in model.state_dict()) == case.targets


@pytest.mark.parametrize("method", ["pooled", "svg1", "semantic"])
def test_a_mask_over_video_keys_moves_with_them(method):
    q, k, v = tensors()
    bias = torch.zeros(2, 1, LAYOUT.seq_len)
    bias[0, 0, 20:120] = bias[1, 0, 200:230] = -torch.inf
    got = attend(q, k, v, context_of(method, density=1.0), key_bias=bias)[0]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4 + bias[:, :, None]
    torch.testing.assert_close(got, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_masked_video_and_a_tail_run_dense():
    model, case = one_model("Allegro")
    inputs = case.inputs(1, torch.Generator().manual_seed(0))
    processor = vidsparse.PisaProcessor(density=0.2, **ALWAYS)
    model.set_attn_processor(processor)
    model(**inputs, return_dict=False)
    if any(row.backend == "dense" for row in processor.report().rows):
        assert any("video tokens masked" in reason for reason in processor.report().dense_calls)
    else:
        assert inputs.get("attention_mask") is None


@pytest.mark.parametrize(
    ("method", "options"),
    [("semantic", {"first_iterations": 1, "step_iterations": 3}), ("pooled", {"refresh_every": 2, "keep": "state"})],
)
def test_checkpointed_gradients_in_eval_mode(build_transformer, forward, method, options):
    model = build_transformer()
    model.set_attn_processor(processor_class(method)(density=0.3, **options, **ALWAYS))

    def gradient() -> torch.Tensor:
        model.zero_grad()
        with model.cache_context("cond"):
            out = forward(model)
        out.square().mean().backward()
        return model.blocks[0].attn1.to_q.weight.grad.clone()

    plain = gradient()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain)


@torch.no_grad()
def test_one_step_videos_are_told_apart(build_transformer, forward):
    model = build_transformer()
    model.set_attn_processor(vidsparse.SemanticProcessor(density=0.3, refresh_every=2, **ALWAYS))

    def video(size: float) -> torch.Tensor:
        with model.cache_context("cond"):
            return forward(model, timestep=size)

    first = video(999.0)
    for _ in range(3):
        assert torch.equal(video(999.0), first)
    assert len(model._vidsparse_binding.run._memories) <= 3
    # Without a pipeline that names branches, forwards at one timestep are not kept for ever.
    for _ in range(12):
        forward(model, timestep=500.0)
    assert len(model._vidsparse_binding.run._memories) <= 3 * 5


def test_a_refresh_needs_no_more_room_than_one_state():
    q, k, v = tensors()
    size = q.numel() * 4 + 2 * 2 * LAYOUT.seq_len * 4
    budget = MemoryBudget(int(1.5 * size))
    context = context_of("pooled", density=0.3, refresh_every=2, keep="state")
    context = dataclasses.replace(context, memory=LayerMemory(budget), refresh_every=2)
    dense = dense_attention(q, k, v)
    for step in range(5):
        torch.testing.assert_close(attend(q, k, v, at_step(context, step))[0], dense, atol=1e-5, rtol=1e-4)
    assert budget.refused == 0


def test_a_backend_that_is_asked_for_is_used():
    with pytest.raises(ValueError, match="nonsense"):
        vidsparse.sparse_attention(*tensors(), context_of("pisa"), backend="nonsense")


def test_spread_prefers_blocks_whose_logits_differ():
    """Two blocks of keys with the same mean: the one whose keys differ along the query is taken."""
    layout = TokenLayout(LatentGrid(1, 32, 32))
    q_size, kv_size = block_sizes(1024)
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 1024, 1, 16)
    q[..., 0] = 1.0
    k = torch.randn(1, 1024, 1, 16, generator=generator) * 0.01
    wide = 1024 // kv_size - 3
    signs = torch.tensor([1.0, -1.0]).repeat(kv_size // 2)
    k[0, wide * kv_size : (wide + 1) * kv_size, 0, 0] += 3 * signs
    # Along a channel that no query has, a spread changes nothing.
    k[0, (wide - 2) * kv_size : (wide - 1) * kv_size, 0, 1] += 3 * signs
    chosen = {}
    for spread in (False, True):
        selector = PooledSelector(layout, "cpu", 4 * kv_size / 1024, None, spread=spread)
        context = make_context(layout, Recipe.from_options("pooled", density=0.2), "cpu")
        chosen[spread] = selector.select(q, k, context).block_mask.to_dense()[0, 0]
    rows = [row for row in range(1024 // q_size) if row != wide * kv_size // q_size]
    assert chosen[True][rows, wide].all() and not chosen[False][rows, wide].all()
    with pytest.raises(ConfigError, match="`spread` must be True or False, got 1"):
        vidsparse.PooledProcessor(spread=1)


@pytest.mark.parametrize("method", ["pooled", "pisa", "sla"])
@pytest.mark.parametrize("size", [64, 128])
def test_blocks_of_keys_have_the_size_that_is_asked_for(method, size):
    layout = TokenLayout(LatentGrid(3, 20, 20))
    context = make_context(layout, Recipe.from_options(method, density=0.3, kv_block_size=size), "cpu")
    context = dataclasses.replace(context, projection=torch.nn.Linear(16, 16))
    q, k, v = (torch.randn(1, 1200, 2, 16) for _ in range(3))
    out, selection = attend(q, k, v, context)
    assert selection is not None
    mask = selection.block_mask
    assert (mask.q_block_size, mask.kv_block_size) == (128, size)
    # The share that was asked for, rounded up to whole blocks, and a q-block's own keys.
    asked = math.ceil(0.3 * mask.num_kv_blocks)
    assert bool((mask.kv_num_blocks >= asked).all()) and bool((mask.kv_num_blocks <= asked + 128 // size).all())
    exact = masked_attention_oracle(q, k, v, BlockMask.full(1200, 1200, q_block_size=128, kv_block_size=64))[0]
    if method == "pisa":
        assert (out - exact).norm() < 0.9 * (vidsparse.sparse_attention(q, k, v, mask) - exact).norm()


def test_sizes_of_key_blocks_that_there_are_not_are_refused():
    for value in (32, 96, 64.0, True):
        with pytest.raises(ConfigError, match=f"`kv_block_size` must be 64, 128 or None, got {value}"):
            vidsparse.PooledProcessor(kv_block_size=value)
