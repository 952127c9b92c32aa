"""Fused norm and rotary embedding: whole models against the families' own code, and what makes them step aside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import vidsparse
from vidsparse.processors import fused
from vidsparse.testing import CASES

FAMILIES = {
    "Wan": 2,
    "HunyuanVideo": 2,
    "Flux": 2,
    "Chroma": 2,
    "LongCat-Image": 2,
    "Ovis-Image": 2,
    "Bria": 2,
    "HunyuanImage": 2,
    "Qwen-Image": 2,
}
"""Fused layers of each case; Wan's cross-attention and the refiners are none."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Turns the fused forms on without a GPU, where the reference computes; one entry for each launch."""
    made = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["norm"])
        return qk_norm_rope_pair(*args, **kwargs)

    qk_norm_rope_pair = fused.qk_norm_rope_pair
    monkeypatch.setattr(fused, "_has_kernel", lambda device: True)
    monkeypatch.setattr(fused, "qk_norm_rope_pair", counted)
    return made


def build(name: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()
    for path, parameter in model.named_parameters():
        # Random norm weights, and attention that moves the output.
        if "norm" in path and ".attn" in path and parameter.ndim == 1:
            parameter.data.normal_()
    model = model.to(dtype)
    if hasattr(model, "rope"):
        # As `from_pretrained` leaves it in Wan.
        model.rope.float()
    inputs = case.inputs(2, torch.Generator().manual_seed(1))
    floating = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value
        for key, value in inputs.items()
        if "ids" not in key
    }
    return model, inputs | floating


def attach(model: Any, **options: Any) -> vidsparse.RadialProcessor:
    processor = vidsparse.RadialProcessor(**options)
    model.set_attn_processor(processor)
    return processor


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(
    ("name", "device"),
    [(name, "cpu") for name in FAMILIES]
    + [
        pytest.param(name, "cuda", marks=pytest.mark.gpu)
        for name in ("Wan", "HunyuanVideo", "Flux", "Bria", "Qwen-Image")
    ],
)
def test_models_are_the_stock_ones(name: str, device: str, calls: list[str]) -> None:
    """In fp32 within its rounding; in bf16 as near to fp32 as the stock model is."""
    exact: torch.Tensor | None = None
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = build(name, dtype)
        model = model.to(device)
        inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        with torch.no_grad():
            stock = run(model, inputs)
            attach(model, min_tokens=10**9)
            calls.clear()
            got = run(model, inputs)
        assert len(calls) >= FAMILIES[name]
        if exact is None:
            exact = stock
            # On the CPU they are equal bit for bit; a GPU adds up in another order.
            assert relative(got, stock) < (2e-6 if device == "cpu" else 1e-5)
        else:
            assert relative(got, stock) < 0.5 * relative(stock, exact)
            assert relative(got, exact) < 1.2 * relative(stock, exact)


@pytest.mark.parametrize("name", ["Wan", "Flux"])
def test_fused_projections(name: str, calls: list[str]) -> None:
    model, inputs = build(name, torch.float32)
    model.fuse_qkv_projections()
    with torch.no_grad():
        stock = run(model, inputs)
        attach(model, min_tokens=10**9)
        assert relative(run(model, inputs), stock) < 2e-6
    assert len(calls) >= FAMILIES[name]


def test_a_sparse_layer_is_fused_too(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("Wan", torch.float32)
    processor = attach(model, min_tokens=0, warmup_steps=0, dense_layers=0, block_size=16)
    with torch.no_grad():
        got = run(model, inputs)
        assert len(calls) == FAMILIES["Wan"] and processor.report().num_sparse_calls == FAMILIES["Wan"]
        note = f"qk-norm and rotary embedding in one kernel in {FAMILIES['Wan']} layers"
        assert note in processor.report().notes
        monkeypatch.setattr(fused, "_has_kernel", lambda device: False)
        assert relative(got, run(model, inputs)) < 2e-6
    assert len(calls) == FAMILIES["Wan"]


@contextlib.contextmanager
def hooked(model: Any) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda module, args, output: 2 * output)
        for path, module in model.named_modules()
        if path.endswith("attn1.norm_k")
    ]
    yield
    for handle in handles:
        handle.remove()


STEPS_ASIDE: dict[str, Callable[[Any], Any]] = {
    "hooks": hooked,
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16),
    "gradients": lambda model: torch.enable_grad(),
}


@pytest.mark.parametrize("why", STEPS_ASIDE)
def test_steps_aside(why: str, calls: list[str]) -> None:
    """Then the result is the stock one bit for bit."""
    model, inputs = build("Wan", torch.float32)
    with torch.no_grad(), STEPS_ASIDE[why](model):
        want = run(model, inputs)
        attach(model, min_tokens=10**9)
        assert torch.equal(run(model, inputs), want)
    assert not calls
    with torch.no_grad():
        run(model, inputs)
    assert len(calls) == FAMILIES["Wan"]


@pytest.mark.parametrize("change", ["weight dtype", "wrapped norm", "subclass", "replaced forward"])
def test_norms_that_are_not_plain(change: str, calls: list[str]) -> None:
    model, inputs = build("Wan", torch.float32)
    for block in model.blocks:
        norm = block.attn1.norm_q
        if change == "weight dtype":
            norm.half()
        elif change == "wrapped norm":
            block.attn1.norm_q = torch.nn.Sequential(norm)
        elif change == "subclass":
            norm.__class__ = type("Norm", (torch.nn.RMSNorm,), {"forward": lambda self, x: x})
        else:
            norm.forward = lambda x: 2 * x
    attach(model, min_tokens=10**9)
    with torch.no_grad():
        run(model, inputs)
    assert not calls


def test_steps_aside_while_compiling(calls: list[str]) -> None:
    model, inputs = build("Wan", torch.float32)
    attach(model, min_tokens=10**9)
    with torch.no_grad():
        want = run(model, inputs)
        calls.clear()
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
        assert relative(run(model, inputs), want) < 2e-6
    assert not calls


def test_off_the_gpu_the_stock_code() -> None:
    model, inputs = build("Wan", torch.float32)
    with torch.no_grad():
        want = run(model, inputs)
        attach(model, min_tokens=10**9)
        assert torch.equal(run(model, inputs), want)


def test_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(fused, "find_spec", lambda name: object())
    assert fused._has_kernel(cuda) and not fused._has_kernel(torch.device("cpu"))
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert not fused._has_kernel(cuda)


def test_code_that_nobody_read_is_not_fused() -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

    assert fused.fused_form(FluxAttnProcessor.__call__) is not None
    assert fused.fused_form(FluxIPAdapterAttnProcessor.__call__) is None
