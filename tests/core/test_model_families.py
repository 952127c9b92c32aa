"""Every family through the same checks, against masked dense attention that knows nothing of our binding."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import vidsparse
from vidsparse.layout import LatentGrid, TokenLayout
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
        size = {"q_block_size": BLOCK, "kv_block_size": BLOCK}
        return BlockMask.from_dense(
            blocks[None, None], seq_len_q=layout.seq_len, seq_len_kv=layout.seq_len, **size
        ).to(device), None


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
                if given is not None:
                    # Rows of padding that would see nothing see everything: nobody reads them.
                    seen = given if given.dtype == torch.bool else given > -1e4
                    seen = seen | ~seen.any(-1, keepdim=True)
                    bias = bias + torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
                kwargs["attn_mask"] = bias
        return func(*args, **kwargs)


def sharpen(model: Any) -> Any:
    """Larger attention weights, so that what attention does matters for the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for name in ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj"):
                linear = getattr(module, name, None)
                linear = linear[0] if isinstance(linear, torch.nn.ModuleList) else linear
                if isinstance(linear, torch.nn.Linear) and hasattr(module, "to_q"):
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
    out = model(**case.inputs(batch, torch.Generator().manual_seed(0)), return_dict=False)[0]
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


def test_gradient_checkpointing_gives_the_same_gradients(family):
    case, model = family
    if not case.checkpointing:
        pytest.skip("the model has no gradient checkpointing")
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
    assert any(name.endswith("to_q.weight") and grad.any() for name, grad in plain.items())
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
