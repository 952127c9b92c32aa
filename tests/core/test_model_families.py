"""Every family through the same checks, against masked dense attention that knows nothing of our binding."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import types
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import vidsparse
from vidsparse.errors import DenseFallbackError, UnsupportedModelError
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.processors.delegate import ATTENTION_MASK
from vidsparse.processors.families import REFUSED
from vidsparse.processors.families.hidream import HIDREAM
from vidsparse.processors.families.kandinsky import NABLA
from vidsparse.processors.families.minimax import MINIMAX_H3
from vidsparse.processors.families.z_image import Z_IMAGE
from vidsparse.testing import CASES, Case
from vidsparse_kernels import BlockMask

BLOCK = 16


class RandomBlocks(vidsparse.RadialProcessor):
    """Radial attention's processor with a mask of random blocks, text dense: images have something to drop too."""

    keep = 0.4

    def layout(self, grid: LatentGrid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        return TokenLayout(grid, text_before, text_after, block_size=BLOCK)

    def build_mask(self, layout: TokenLayout, device: Any) -> tuple[BlockMask, str | None]:
        blocks = random_blocks((layout.text_before, layout.text_after), layout.grid.num_tokens, self.keep)
        mask = BlockMask.from_dense(
            blocks[None, None],
            seq_len_q=layout.seq_len,
            seq_len_kv=layout.seq_len,
            q_block_size=BLOCK,
            kv_block_size=BLOCK,
        )
        return mask.to(device), None


class AllBlocks(RandomBlocks):
    keep = 1.0


def random_blocks(text: tuple[int, int], video: int, keep: float) -> torch.Tensor:
    """Which blocks are kept: a random share, the diagonal, and whatever holds a text token."""
    before, after = text
    count = -(-(before + video + after) // BLOCK)
    kept = torch.rand(count, count, generator=torch.Generator().manual_seed(count)) < keep
    kept |= torch.eye(count, dtype=torch.bool)
    for tokens in (range(before), range(before + video, before + video + after)):
        for block in {token // BLOCK for token in tokens}:
            kept[block] = True
            kept[:, block] = True
    return kept


class MaskedAttention(TorchFunctionMode):
    """Adds a token mask to each scaled_dot_product_attention of the lengths that self-attention has."""

    def __init__(self, case: Case, keep: float) -> None:
        super().__init__()
        self.masks = {}
        video = case.grid[0] * case.grid[1] * case.grid[2]
        for text in case.text:
            length = video + sum(text)
            blocks = random_blocks(text, video, keep)
            tokens = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            self.masks[length] = tokens[:length, :length]
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            kwargs |= dict(zip(names, args, strict=False))
            args = ()
            query, key = kwargs["query"], kwargs["key"]
            mask = self.masks.get(query.shape[2])
            if mask is not None and key.shape[2] == query.shape[2]:
                self.calls += 1
                given = kwargs.get("attn_mask")
                bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
                if given is not None and given.dtype == torch.bool:
                    # Rows of padding that would see nothing see everything: nobody reads them.
                    seen = given | ~given.any(-1, keepdim=True)
                    bias = bias + torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
                elif given is not None:
                    bias = bias + given
                kwargs["attn_mask"] = bias
        return func(*args, **kwargs)


PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj"),
    *("to_query", "to_key", "to_value", "out_layer", "to_qkv_mlp_proj"),
)


def sharpen(model: Any) -> Any:
    """Larger attention weights, so that what attention does matters for the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for name in PROJECTIONS:
                linear = getattr(module, name, None)
                linear = linear[0] if isinstance(linear, torch.nn.ModuleList) else linear
                if isinstance(linear, torch.nn.Linear):
                    spread = 2.0 / linear.weight.shape[1] ** 0.5
                    linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * spread)
        # Zero-initialised output layers would hide everything.
        for parameter in model.parameters():
            if parameter.ndim >= 2 and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@functools.cache
def built(name: str) -> Any:
    torch.manual_seed(0)
    return sharpen(CASES[name].build()).eval()


@pytest.fixture(params=CASES, name="family")
def _family(request):
    """Case and model; whatever a test binds is taken off again."""
    case, model = CASES[request.param], built(request.param)
    yield case, model
    vidsparse.processors.binding.unbind(model)


def run(model: Any, case: Case, batch: int = 1) -> torch.Tensor:
    out = model(**case.inputs(batch, torch.Generator().manual_seed(0)), return_dict=False)
    out = out[0] if isinstance(out, tuple) else out
    return torch.stack(list(out)) if isinstance(out, list) else out


OPTIONS = {"warmup_steps": 0, "dense_layers": 0, "min_tokens": 0}


def bind(model: Any, keep: float = 0.4, **options: Any) -> Any:
    cls = AllBlocks if keep == 1.0 else RandomBlocks
    processor = cls(**{**OPTIONS, **options})
    model.set_attn_processor(processor)
    return processor


@torch.no_grad()
def test_full_mask_equals_stock(family):
    case, model = family
    for batch in case.batches:
        stock = run(model, case, batch)
        processor = bind(model, keep=1.0)
        torch.testing.assert_close(run(model, case, batch), stock, atol=3e-5, rtol=1e-4)
        report = processor.report()
        assert report.num_sparse_calls == report.num_calls == case.targets
        vidsparse.processors.binding.unbind(model)
        assert torch.equal(run(model, case, batch), stock)


@torch.no_grad()
def test_sparse_equals_masked_dense(family):
    case, model = family
    for batch in case.batches:
        stock = run(model, case, batch)
        with MaskedAttention(case, RandomBlocks.keep) as reference:
            want = run(model, case, batch)
        assert reference.calls >= case.targets
        assert (want - stock).abs().max() > 1e-2 * stock.abs().max(), "the mask must matter"
        processor = bind(model)
        torch.testing.assert_close(run(model, case, batch), want, atol=3e-5, rtol=1e-4)
        tokens = case.grid[0] * case.grid[1] * case.grid[2] + max(map(sum, case.text))
        assert {row.tokens for row in processor.report().rows} == {tokens}
        vidsparse.processors.binding.unbind(model)


def test_text_and_conditions_keep_the_familys_processors(family):
    case, model = family
    own = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    bind(model)
    taken = {name for name, module in model.named_modules() if name in own and module.processor is not own[name]}
    assert len(taken) == case.targets
    for ending in case.dense:
        untouched = [name for name in own if name.endswith(ending)]
        assert untouched and not taken.intersection(untouched)


QUERY_WEIGHTS = ("to_q.weight", "to_query.weight")


def test_gradient_checkpointing_gives_the_same_gradients(family):
    case, model = family
    if case.no_checkpointing:
        pytest.skip(case.no_checkpointing)
    bind(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        run(model.train(), case).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    try:
        plain = gradients()
        model.enable_gradient_checkpointing()
        replayed = gradients()
    finally:
        model.disable_gradient_checkpointing()
        model.eval().zero_grad()
    assert plain.keys() == replayed.keys()
    assert any(name.endswith(QUERY_WEIGHTS) and grad.any() for name, grad in plain.items())
    for name, grad in plain.items():
        torch.testing.assert_close(replayed[name], grad, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_compiled_gives_the_same(family):
    case, model = family
    if not case.regional:
        pytest.skip("diffusers names no repeated blocks for this model")
    bind(model)
    eager = run(model, case)
    torch._dynamo.reset()
    blocks = [module for module in model.modules() if type(module).__name__ in model._repeated_blocks]
    try:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(run(model, case), eager, atol=1e-6, rtol=1e-5)
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()


def dense_reasons(processor: Any) -> set[str | None]:
    return {row.reason for row in processor.report().rows}


@contextlib.contextmanager
def bound(model: Any, **options: Any):
    try:
        yield bind(model, **options)
    finally:
        vidsparse.processors.binding.unbind(model)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_say_why_in_one_sentence(name):
    cls = getattr(diffusers, name)
    with pytest.raises(UnsupportedModelError, match=re.escape(REFUSED[name])) as refusal:
        vidsparse.apply(cls.__new__(cls))
    assert str(refusal.value).startswith(name) and str(refusal.value).count(". ") == 0


def test_key_value_processors_of_flux_2_are_refused():
    from diffusers.models.transformers import transformer_flux2

    model = CASES["Flux 2"].build()
    own = model.single_transformer_blocks[0].attn
    own.processor = transformer_flux2.Flux2KVParallelSelfAttnProcessor()
    before = dict(model.attn_processors)
    with pytest.raises(UnsupportedModelError, match="key-value processors"):
        bind(model)
    assert model.attn_processors == before


@torch.no_grad()
def test_kandinskys_own_sparse_attention_is_left_alone():
    model = built("Kandinsky 5")
    generator = torch.Generator().manual_seed(0)
    inputs = CASES["Kandinsky 5"].inputs(1, generator) | {
        "hidden_states": torch.randn(1, 3, 32, 32, 4, generator=generator),
        "visual_rope_pos": (torch.arange(3), torch.arange(16), torch.arange(16)),
        "sparse_params": {"to_fractal": True, "P": 0.5, "sta_mask": torch.eye(12, dtype=torch.bool)[None, None]},
        "return_dict": False,
    }
    for block in model.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = "flex"
    try:
        stock = model(**inputs)
        with bound(model) as processor:
            assert torch.equal(model(**inputs), stock)
            assert dense_reasons(processor) == {NABLA}
        assert not torch.equal(model(**(inputs | {"sparse_params": None})), stock)
    finally:
        for block in model.visual_transformer_blocks:
            block.self_attention.processor._attention_backend = None


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("Lumina 2", {"encoder_attention_mask": torch.tensor([[1] * 8 + [0] * 3, [1] * 5 + [0] * 6])}),
        ("Z-Image", {"x": [torch.ones(4, 1, 24, 28), torch.ones(4, 1, 28, 24)]}),
    ],
)
def test_batches_of_several_layouts_run_dense_and_say_so(name, changed):
    case, model = CASES[name], built(name)
    case = dataclasses.replace(case, inputs=lambda batch, g: CASES[name].inputs(batch, g) | changed)
    inputs = case.inputs(2, torch.Generator().manual_seed(0))
    stock = model(**inputs, return_dict=False)[0]
    with bound(model) as processor:
        for ours, theirs in zip(model(**inputs, return_dict=False)[0], stock, strict=True):
            assert torch.equal(ours, theirs)
        (reason,) = dense_reasons(processor)
        assert "of a batch" in str(reason) or "in one batch" in str(reason)
    with bound(model, strict=True), pytest.raises(DenseFallbackError, match=re.escape(str(reason))):
        model(**inputs, return_dict=False)


@torch.no_grad()
@pytest.mark.parametrize(("name", "timestep"), [("Z-Image", "t"), ("Lumina 2", "timestep")])
def test_steps_are_counted_where_time_rises(name, timestep):
    case, model = CASES[name], built(name)
    inputs = case.inputs(1, torch.Generator().manual_seed(0))
    with bound(model, warmup_steps=1) as processor:
        for time in (0.0, 0.2, 0.7):
            model(**(inputs | {timestep: torch.tensor([time])}), return_dict=False)
        steps = [(row.step, row.reason is None) for row in processor.report().rows if row.layer == 0]
        assert steps == [(0, False), (1, True), (2, True)]
        # A second generation starts over.
        model(**(inputs | {timestep: torch.tensor([0.0])}), return_dict=False)
        assert {row.step for row in processor.report().rows} == {0}


@torch.no_grad()
def test_a_boolean_mask_over_pairs_keeps_padding_out():
    case, model = CASES["Chroma"], built("Chroma")

    def inputs(batch: int, g: torch.Generator) -> dict[str, Any]:
        arguments = CASES["Chroma"].inputs(batch, g)
        return arguments | {"attention_mask": arguments["attention_mask"].bool()}

    case = dataclasses.replace(case, inputs=inputs)
    with MaskedAttention(case, RandomBlocks.keep):
        want = run(model, case, batch=2)
    with bound(model) as processor:
        torch.testing.assert_close(run(model, case, batch=2), want, atol=3e-5, rtol=1e-4)
        assert dense_reasons(processor) == {None}
    assert not torch.allclose(want, run(model, CASES["Chroma"], batch=2), atol=1e-3)


def test_packed_video_is_found_without_conditions_and_sound():
    """MiniMax-H3 without a first frame and sound: the video follows the text at once."""
    inputs = CASES["MiniMax-H3"].inputs(1, torch.Generator().manual_seed(0))
    rows = torch.cat([torch.arange(9), torch.arange(57, 267)])
    arguments = {"position_ids": inputs["position_ids"][rows], "video_indices": torch.arange(9, 219)}
    assert MINIMAX_H3.grid(arguments, None) == LatentGrid(5, 6, 7)
    assert MINIMAX_H3.text(arguments, None) == ((9, 0),)


@torch.no_grad()
def test_cosmos_with_the_mask_of_padded_pixels(monkeypatch):
    """The released models need torchvision, for one resize; torch's own stands in for it here."""
    from diffusers.models.transformers import transformer_cosmos

    torchvision = types.SimpleNamespace(
        functional=types.SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size)),
        InterpolationMode=types.SimpleNamespace(NEAREST="nearest"),
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", torchvision, raising=False)
    model = sharpen(
        CASES["Cosmos"].build().from_config(CASES["Cosmos"].build().config, concat_padding_mask=True)
    ).eval()

    def inputs(batch: int, g: torch.Generator) -> dict[str, Any]:
        return CASES["Cosmos"].inputs(batch, g) | {"padding_mask": torch.zeros(1, 1, 24, 28)}

    case = dataclasses.replace(CASES["Cosmos"], inputs=inputs)
    with MaskedAttention(case, RandomBlocks.keep):
        want = run(model, case, batch=2)
    with bound(model) as processor:
        torch.testing.assert_close(run(model, case, batch=2), want, atol=3e-5, rtol=1e-4)
        assert dense_reasons(processor) == {None}


@torch.no_grad()
def test_ltx_2_skips_attention_where_its_guidance_says_so():
    case, model = CASES["LTX-2.3"], built("LTX-2.3")

    def inputs(batch: int, g: torch.Generator) -> dict[str, Any]:
        skip = {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": torch.tensor([1.0, 0.0])}
        return CASES["LTX-2.3"].inputs(batch, g) | skip

    skipping = dataclasses.replace(case, inputs=inputs)
    with MaskedAttention(case, RandomBlocks.keep):
        want = run(model, skipping, batch=2)
    with bound(model):
        ours = run(model, skipping, batch=2)
        torch.testing.assert_close(ours, want, atol=3e-5, rtol=1e-4)
        assert not torch.allclose(ours[1], run(model, case, batch=2)[1], atol=1e-3)


def test_square_images_of_hidream_have_no_empty_places():
    arguments = {
        "hidden_states": torch.zeros(1, 4, 24, 24),
        "encoder_hidden_states_t5": torch.zeros(1, 7, 16),
        "encoder_hidden_states_llama3": torch.zeros(2, 1, 5, 12),
    }
    config = CASES["HiDream"].build().config
    assert HIDREAM.grid(arguments, config) == LatentGrid(1, 12, 12)
    assert HIDREAM.text(arguments, config) == ((0, 17),)


def test_packed_images_of_hidream_say_their_sizes():
    arguments = {
        "hidden_states": torch.zeros(2, 256, 16),
        "encoder_hidden_states_t5": torch.zeros(2, 7, 16),
        "encoder_hidden_states_llama3": torch.zeros(2, 2, 5, 12),
        "img_sizes": torch.tensor([[12, 14], [12, 14]]),
    }
    assert HIDREAM.grid(arguments, None) == LatentGrid(1, 12, 14)
    assert HIDREAM.text(arguments, None) == ((0, 88 + 17),)
    assert HIDREAM.obstacle(arguments, None) is None
    assert HIDREAM.obstacle(arguments | {"img_sizes": [(12, 14), (14, 12)]}, None) is not None


def test_several_images_of_z_image_stay_dense():
    arguments = {"x": [[torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 24, 28)]], "cap_feats": [[torch.zeros(9, 16)] * 2]}
    assert Z_IMAGE.grid(arguments, None) == LatentGrid(1, 12, 14)
    assert Z_IMAGE.obstacle(arguments, None) is not None


@torch.no_grad()
def test_causal_blocks_of_skyreels_stay_dense():
    model = sharpen(
        CASES["SkyReels-V2"].build().from_config(built("SkyReels-V2").config, num_frame_per_block=5)
    ).eval()
    stock = run(model, CASES["SkyReels-V2"])
    with bound(model) as processor:
        assert torch.equal(run(model, CASES["SkyReels-V2"]), stock)
        assert dense_reasons(processor) == {ATTENTION_MASK}
