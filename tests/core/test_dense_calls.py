"""Dense calls through our kernel over all blocks: where, with which result, and what the report says.

On a CPU the plain computation of the kernels package stands in for the Hopper kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vidsparse
from vidsparse import Recipe
from vidsparse.break_even import CallShape, every_block_cost
from vidsparse.errors import ConfigError
from vidsparse.methods import DenseProcessor, PooledProcessor, processor_class
from vidsparse.processors import binding, delegate, dense_calls
from vidsparse.processors.dense_calls import DenseChoice, EveryBlock, choose_dense, every_block
from vidsparse.report import Report
from vidsparse.testing import CASES
from vidsparse_kernels import BlockMask, block_sparse_attention

WHY = "as this test says"


@pytest.fixture(name="stand_in")
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[CallShape, torch.dtype]]:
    """Our kernel is taken for every dense call, on a CPU; returns the shapes that were asked for."""
    asked = []

    def choose(shape: CallShape, dtype: torch.dtype, device: torch.device) -> DenseChoice:
        asked.append((shape, dtype))
        return DenseChoice(every_block(shape.seq_len, shape.num_heads, shape.head_dim, dtype, device), 0.7, WHY)

    monkeypatch.setattr(binding, "choose_dense", choose)
    monkeypatch.setattr(delegate, "KERNEL", "reference")
    return asked


@pytest.fixture(name="no_sdpa")
def _no_sdpa(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the self-attention calls that reach torch."""
    seen, plain = [], F.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.shape[2] == key.shape[2]:
            seen.append(query.shape[2])
        return plain(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return seen


def test_warm_up_and_dense_layers(build_pipeline: Callable, generate: Callable, stand_in: list, no_sdpa: list) -> None:
    pipe = build_pipeline()
    handle = vidsparse.apply(pipe, block_size=16, dense_backend="stock")
    want = generate(pipe)
    stock = handle.report()
    assert {row.backend for row in stock.rows if row.reason} == {"dense"} and not stand_in
    assert no_sdpa.count(320) > 0
    no_sdpa.clear()
    handle = vidsparse.apply(pipe, block_size=16)
    torch.testing.assert_close(generate(pipe), want, atol=1e-4, rtol=1e-3)
    report = handle.report()
    assert no_sdpa.count(320) == 0 and set(stand_in) == {(CallShape(1, 2, 320, 12), torch.float32)}
    assert report.dense_calls == stock.dense_calls == {"warm-up step": 6, "dense layer": 6}
    assert report.num_sparse_calls == stock.num_sparse_calls
    assert {(r.backend, r.backend_reason) for r in report.rows if r.reason} == {("dense on hopper", WHY)}
    assert report.dense_kernels == {"hopper": 12} and report.backends["dense on hopper"] == 12
    assert "dense: warm-up step 6 calls, dense layer 6 calls (12 on hopper)" in report.summary()


def test_the_baseline_is_stock_unless_asked(build_pipeline: Callable, generate: Callable, stand_in: list) -> None:
    pipe = build_pipeline()
    want = generate(pipe)
    handle = vidsparse.apply(pipe, "dense")
    assert torch.equal(generate(pipe), want) and not stand_in
    assert {row.backend for row in handle.report().rows} == {"dense"}
    handle = vidsparse.apply(pipe, "dense", dense_backend="auto")
    torch.testing.assert_close(generate(pipe), want, atol=1e-4, rtol=1e-3)
    report = handle.report()
    assert {row.backend for row in report.rows} == {"dense on hopper"}
    assert report.dense_calls == {"method dense": report.num_calls} and report.fallbacks == []


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_every_family(name: str, stand_in: list) -> None:
    """Where the model gives its self-attention a mask, its own attention runs, and the report says so."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()

    def run() -> torch.Tensor:
        out = model(**case.inputs(1, torch.Generator().manual_seed(0)), return_dict=False)
        out = out[0] if isinstance(out, tuple) else out
        return torch.stack(list(out)) if isinstance(out, list) else out

    want = run()
    processor = DenseProcessor(dense_backend="auto")
    model.set_attn_processor(processor)
    torch.testing.assert_close(run(), want, atol=3e-5, rtol=1e-3)
    rows = processor.report().rows
    assert sum(row.calls for row in rows) == case.targets
    ways = {(row.backend, row.backend_reason) for row in rows}
    assert ways <= {("dense on hopper", WHY), ("dense", dense_calls.OF_THE_CALL)} and ways
    binding.unbind(model)
    assert torch.equal(run(), want)


@pytest.mark.parametrize("name", ["Wan", "Flux", "CogVideoX-2B", "Mochi"])
def test_compiled(name: str, stand_in: list) -> None:
    """One graph without breaks, with our operator in it; only where lengths are known while compiling."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()
    given = case.inputs(1, torch.Generator().manual_seed(0))
    processor = DenseProcessor(dense_backend="auto")
    model.set_attn_processor(processor)
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        want = model(**given, return_dict=False)
        for block in getattr(model, "blocks", None) or model.transformer_blocks:
            block.compile(fullgraph=True, backend=backend)
        got = model(**given, return_dict=False)
    torch._dynamo.reset()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    ours = any("block_sparse_attention" in target for target in found)
    assert ours == (name != "Mochi")
    assert {row.backend for row in processor.report().rows} == {
        "dense on hopper" if ours else "dense",
        "dense on hopper",
    }


def test_compiled_generation_makes_two_graphs(build_pipeline: Callable, generate: Callable, stand_in: list) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    pipe = build_pipeline(num_layers=10)
    handle = vidsparse.apply(pipe, block_size=16)
    want, kernels = generate(pipe), handle.report().backends
    counter = CompileCounterWithBackend("eager")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(generate(pipe), want, atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 2 and handle.report().backends == kernels
    torch._dynamo.reset()


def test_gradients_keep_the_models_own(build_transformer: Callable, forward: Callable, stand_in: list) -> None:
    model = build_transformer()
    handle = vidsparse.apply(model, "dense", dense_backend="auto")
    forward(model).sum().backward()
    assert {(r.backend, r.backend_reason) for r in handle.report().rows} == {("dense", dense_calls.GRADIENTS)}
    with torch.no_grad():
        forward(model)
    # A replay of the forward with gradients, after one without, finds blocks but records gradients.
    blocks = model.blocks[0].attn1.processor.context.every_block
    query = torch.zeros(1, 320, 2, 12)
    assert not blocks.fits(query, query, query, False)


def test_a_chosen_backend_stays(build_pipeline: Callable, generate: Callable, stand_in: list, no_sdpa: list) -> None:
    pipe = build_pipeline()
    pipe.transformer.set_attention_backend("native")
    handle = vidsparse.apply(pipe, "dense", dense_backend="auto")
    generate(pipe)
    assert {(r.backend, r.backend_reason) for r in handle.report().rows} == {("dense", dense_calls.CHOSEN)}
    assert no_sdpa.count(320) == handle.report().num_calls and not stand_in
    pipe.transformer.reset_attention_backend()
    generate(pipe)
    assert {row.backend for row in handle.report().rows} == {"dense on hopper"}


@torch.no_grad()
@pytest.mark.parametrize(("name", "ours"), [("LTX-Video", True), ("HunyuanVideo", False)])
def test_a_sparse_call_has_to_beat_ours_where_no_mask_reaches_attention(
    name: str, ours: bool, stand_in: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LTX gives the mask of its text to an attention of its own, HunyuanVideo to that of the video."""
    case = CASES[name]
    torch.manual_seed(0)
    model, costs = case.build().eval(), []
    processor = PooledProcessor(warmup_steps=0)
    monkeypatch.setattr(PooledProcessor, "slow_reason", lambda *args: costs.append(args[-1]))
    model.set_attn_processor(processor)
    given = case.inputs(1, torch.Generator().manual_seed(0))
    if "encoder_attention_mask" not in given:
        given["encoder_attention_mask"] = torch.ones(given["encoder_hidden_states"].shape[:2])
    model(**given, return_dict=False)
    assert costs == [0.7 if ours else 1.0]


def test_skipped_scores_reach_torch(build_transformer: Callable, forward: Callable, stand_in: list) -> None:
    """Perturbed-attention guidance stands over torch's function alone, in dense steps too."""
    from diffusers.hooks.hooks import HookRegistry
    from diffusers.hooks.layer_skip import AttentionProcessorSkipHook

    model = build_transformer()
    registry = HookRegistry.check_if_exists_or_initialize(model.blocks[1].attn1)
    registry.register_hook(AttentionProcessorSkipHook(lambda *args: None, skip_attention_scores=True), "skip")
    with torch.no_grad():
        want = forward(model)
        handle = vidsparse.apply(model, "dense", dense_backend="auto")
        torch.testing.assert_close(forward(model), want, atol=1e-5, rtol=1e-4)
    backends = [row.backend for row in handle.report().rows]
    assert backends == ["dense on hopper", "dense", "dense on hopper"]


def test_a_slow_sparse_call_is_judged_against_the_faster_dense_one() -> None:
    processor = PooledProcessor(density=0.6)
    layout = processor.layout(vidsparse.LatentGrid(21, 30, 52))
    parts, _ = processor.parts(layout, "cpu")
    shape = CallShape(1, 12, layout.seq_len, 128)
    assert processor.slow_reason(parts, shape, "cuda", torch.bfloat16) is None
    reason = processor.slow_reason(parts, shape, "cuda", torch.bfloat16, 0.4)
    assert reason is not None and reason.startswith("dense is faster at 32,760 tokens and density 0.60")
    assert processor.dense_cost(shape, True) == every_block_cost(shape) < 1
    assert processor.dense_cost(shape, False) == processor.dense_cost(CallShape(1, 12, 1024, 128), True) == 1
    assert PooledProcessor(dense_backend="stock").dense_cost(shape, True) == 1
    assert DenseProcessor().dense_cost(shape, True) == 1


def test_a_plan_counts_on_our_kernel_in_bf16_only() -> None:
    """A call between our kernel's dense time and torch's: most blocks of 32,760 tokens, and a tail."""
    processor = processor_class("pisa")(density=0.85, warmup_steps=0, dense_layers=0)

    def runs_sparse(dtype: torch.dtype, is_hopper: bool) -> bool:
        plan = processor.plan(vidsparse.LatentGrid(21, 30, 52), 1, 1, "cuda", dtype, (12, 128), is_hopper)
        return plan.mean_density < 1

    assert runs_sparse(torch.bfloat16, False) and runs_sparse(torch.float16, True)
    assert not runs_sparse(torch.bfloat16, True)


class Device:
    """A Hopper GPU that is not there."""

    type = "cuda"


@pytest.fixture(name="hopper")
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Choosing as on a Hopper GPU: blocks and probes are on the CPU, and the kernels package says what it would there."""
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, device=None, **kwargs: real(*args, **kwargs))
    made = EveryBlock(BlockMask.full(256, 256, q_block_size=128, kv_block_size=128), 12, 128, torch.bfloat16)
    monkeypatch.setattr(dense_calls, "every_block", lambda *args: made)
    monkeypatch.setattr(dense_calls, "select_backend", lambda *args, **kwargs: ("hopper", "inference on a Hopper GPU"))
    return Device()


def test_long_calls_are_chosen(hopper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = CallShape(1, 12, 32_760, 128), CallShape(1, 12, 1_024, 128)
    choice = choose_dense(long, torch.bfloat16, hopper)
    assert choice.blocks is not None and choice.cost == every_block_cost(long) < 1
    assert choice.reason == f"all blocks, an estimated {choice.cost:.2f} of the time of the model's own attention"
    choice = choose_dense(short, torch.bfloat16, hopper)
    assert choice == (None, 1.0, "the model's own attention: our kernel is not faster at 1,024 tokens")
    monkeypatch.setattr(dense_calls, "select_backend", lambda *args, **kwargs: ("triton", "inference on cuda"))
    choice = choose_dense(long, torch.bfloat16, hopper)
    assert choice.blocks is None and choice.reason.endswith("would be triton (inference on cuda)")


def test_what_the_user_chose_is_kept(hopper: Any) -> None:
    from diffusers.models.attention_dispatch import attention_backend
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = CallShape(1, 12, 32_760, 128)
    with attention_backend("_native_math"):
        assert choose_dense(shape, torch.bfloat16, hopper) == (None, 1.0, dense_calls.CHOSEN)
    with sdpa_kernel(SDPBackend.MATH):
        assert choose_dense(shape, torch.bfloat16, hopper) == (None, 1.0, dense_calls.CHOSEN)
    assert choose_dense(shape, torch.bfloat16, hopper).blocks is not None
    assert choose_dense(shape, torch.bfloat16, torch.device("cpu")) == (None, 1.0, dense_calls.NO_GPU)
    assert choose_dense(shape, torch.float16, hopper) == (None, 1.0, dense_calls.DTYPE)


def test_it_is_part_of_the_recipe() -> None:
    for method, default in (("radial", "auto"), ("dense", "stock")):
        recipe = Recipe.from_options(method)
        assert recipe.schedule.dense_backend == default
        data = recipe.to_dict()
        assert data["config"]["schedule"].pop("dense_backend") == default
        assert Recipe.from_dict(data) == recipe, "a recipe from before the option"
    recipe = Recipe.from_options("radial", dense_backend="stock")
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(ConfigError, match="`dense_backend` must be one of auto, stock, got 'triton'"):
        Recipe.from_options("radial", dense_backend="triton")


@pytest.fixture(name="on_a_gpu")
def _on_a_gpu() -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    yield


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "tokens", "batch", "dtype"),
    [
        pytest.param(12, 12, 128, 8_191, 1, torch.bfloat16, id="B1-T8191-H12-D128-bf16"),
        pytest.param(24, 6, 64, 8_221, 1, torch.bfloat16, id="B1-T8221-H24of6-D64-bf16"),
        pytest.param(12, 12, 96, 6_007, 2, torch.float16, id="B2-T6007-H12-D96-fp16"),
    ],
)
def test_error_of_a_call_on_a_gpu(
    on_a_gpu: None, heads: int, kv_heads: int, head_dim: int, tokens: int, batch: int, dtype: torch.dtype
) -> None:
    """Our kernel is no further from float64 than torch's own attention, within rounding of the output."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(batch, tokens, of, head_dim, device="cuda", generator=generator).to(dtype)
        for of in (heads, kv_heads, kv_heads)
    )
    query *= 3
    blocks = every_block(tokens, heads, head_dim, dtype, query.device)
    assert blocks.fits(query, key, value, True)
    ours = block_sparse_attention(query, key, value, blocks.mask, backend="hopper").transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    stock = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)
    rows = torch.arange(0, tokens, 97, device="cuda")
    k, v = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    exact = F.scaled_dot_product_attention(q[:, :, rows].double(), k, v)
    errors = [(x[:, :, rows].double() - exact).norm() / exact.norm() for x in (ours, stock)]
    assert errors[0] <= 1.1 * errors[1] + torch.finfo(dtype).eps / 16, errors


@pytest.fixture(name="wan")
def _wan() -> Any:
    """Two blocks of Wan with heads of 128, in bf16."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = WanTransformer3DModel(num_attention_heads=12, ffn_dim=256, num_layers=2, text_dim=64).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    return model.to(torch.bfloat16)


def latents() -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16()

    return {
        "hidden_states": randn(1, 16, 11, 60, 104),
        "timestep": torch.full((1,), 500, device="cuda"),
        "encoder_hidden_states": randn(1, 32, 64),
    }


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_on_a_gpu(on_a_gpu: None, wan: Any, compiled: bool) -> None:
    """17,160 tokens: dense through our kernel is as near to fp32 as the model's own attention is; the same twice."""
    given = latents()

    def run() -> torch.Tensor:
        return wan(**given, return_dict=False)[0].float()

    with torch.autocast("cuda", enabled=False):
        exact = wan.float()(**{k: v if k == "timestep" else v.float() for k, v in given.items()}, return_dict=False)[0]
    wan.bfloat16()
    if compiled:
        torch._dynamo.reset()
        wan.compile_repeated_blocks(fullgraph=True)
    stock = run()
    processor = DenseProcessor(dense_backend="auto")
    wan.set_attn_processor(processor)
    ours = run()
    report: Report = processor.report()
    assert report.backends == {"dense on hopper": 2}, report.to_dict()
    assert {row.reason for row in report.rows} == {"method dense"}
    assert all("of the time of the model's own attention" in (row.backend_reason or "") for row in report.rows)
    assert torch.equal(run(), ours)
    errors = [(x - exact).norm() / exact.norm() for x in (ours, stock)]
    assert errors[0] <= 1.2 * errors[1], errors
    assert not torch.equal(ours, stock)
    torch._dynamo.reset()


@pytest.mark.gpu
@torch.no_grad()
def test_what_stays_stock_on_a_gpu(on_a_gpu: None, wan: Any) -> None:
    """The baseline to the bit; and where somebody chose torch's kernel, with the reason."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    given = latents()

    def run(processor: DenseProcessor) -> torch.Tensor:
        wan.set_attn_processor(processor)
        out = wan(**given, return_dict=False)[0]
        row = processor.report().rows[0]
        reasons.append((row.backend, row.backend_reason))
        return out

    reasons: list[tuple[str, str | None]] = []
    stock = run(DenseProcessor())
    assert torch.equal(run(DenseProcessor(dense_backend="stock")), stock)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        run(DenseProcessor(dense_backend="auto"))
    assert reasons == [("dense", dense_calls.SWITCHED_OFF)] * 2 + [("dense", dense_calls.CHOSEN)]


@pytest.mark.gpu
@torch.no_grad()
def test_no_synchronisation_on_a_gpu(on_a_gpu: None, wan: Any) -> None:
    given = latents()
    wan.set_attn_processor(DenseProcessor(dense_backend="auto"))
    wan(**given, return_dict=False)
    processors = [block.attn1.processor for block in wan.blocks]
    query = torch.randn(1, 17_160, 12, 128, device="cuda").bfloat16()
    assert all(processor.context.every_block is not None for processor in processors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        processors[0].attend(query, query, query)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert processors[0].dense_runs == "hopper"
