"""The fused form of Wan's processor against the stock one."""

from typing import Any

import pytest
import torch

from vidsparse.processors.fused import fused_call, wan_fused, wan_is_usual

wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")


def dispatch(processor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    return wan.dispatch_attention_fn(*args, **kwargs)


def layer(head_dim: int, dtype: torch.dtype) -> tuple[Any, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(head_dim)
    heads = 3
    attn = wan.WanAttention(heads * head_dim, heads=heads, dim_head=head_dim, processor=wan.WanAttnProcessor())
    for parameter in attn.parameters():
        parameter.data.normal_(std=2 / parameter.shape[-1] ** 0.5)
    angle = torch.rand(1, 11, 1, head_dim // 2) * 6
    tables = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)
    return attn.to(dtype), torch.randn(2, 11, heads * head_dim).to(dtype), tables


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("head_dim", [12, 72, 80, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wan_is_the_stock_processor(head_dim: int, dtype: torch.dtype, fuse: bool) -> None:
    attn, x, tables = layer(head_dim, dtype)
    if fuse:
        attn.fuse_projections()
    with torch.no_grad():
        assert wan_is_usual(attn, x, None, tables)
        want = attn(x, None, None, tables)
        got = wan_fused(attn.processor, attn, x, None, tables, dispatch)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got - want).float().norm() <= tolerance * want.float().norm()
    assert want.float().std() > 0.1


def test_unusual_calls_are_refused() -> None:
    attn, x, tables = layer(16, torch.bfloat16)
    assert not wan_is_usual(attn, x, None, tables)  # Gradients.
    with torch.no_grad():
        assert wan_is_usual(attn, x, None, tables)
        assert not wan_is_usual(attn, x, x, tables)
        assert not wan_is_usual(attn, x, None, None)
        assert not wan_is_usual(attn, x, None, (tables[0].bfloat16(), tables[1].bfloat16()))
        handle = attn.norm_k.register_forward_hook(lambda *_: None)
        assert not wan_is_usual(attn, x, None, tables)
        handle.remove()
        attn.norm_q.float()
        assert not wan_is_usual(attn, x, None, tables)


def test_only_wan_and_off_the_gpu_the_stock_call() -> None:
    assert fused_call(object, dispatch, dispatch) is None
    called = []
    call = fused_call(wan.WanAttnProcessor, dispatch, lambda *args: called.append(args))
    attn, x, tables = layer(16, torch.float32)
    assert call is not None
    with torch.no_grad():
        call(attn.processor, attn, x, None, None, tables)
    assert len(called) == 1 and called[0][2] is x
