"""Norm and rotary embedding on a GPU: the kernel against the reference, in bf16."""

from typing import Any

import pytest
import torch

from vidsparse_kernels.qk_norm_rope import qk_norm_rope_pair
from vidsparse_kernels.qk_norm_rope.testing import assert_rounded_alike


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("norm", "head_dim", "early", "pairing"),
    [
        ("rms_all", 128, False, "interleaved"),
        ("rms_heads", 128, False, "interleaved"),
        ("rms_heads", 128, True, "interleaved"),
        ("rms_heads", 72, True, "half"),
        ("rms_all", 96, True, "half"),
        ("layer_heads", 64, False, "interleaved"),
        ("none", 80, False, "interleaved"),
    ],
)
def test_kernel_is_the_reference(norm: str, head_dim: int, early: bool, pairing: str) -> None:
    torch.manual_seed(head_dim)
    heads, seq_len = 40, 1013
    width = heads * head_dim if norm == "rms_all" else head_dim
    qkv = torch.randn(2, seq_len, 3 * heads * head_dim, device="cuda", dtype=torch.bfloat16)
    weights: Any = tuple(torch.randn(width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    angle = torch.rand(seq_len - 77, head_dim // 2, device="cuda") * 6
    rotary: Any = tuple(
        t.repeat_interleave(2, -1) if pairing == "interleaved" else torch.cat([t, t], -1)
        for t in (angle.cos(), angle.sin())
    )
    query, key, _ = qkv.chunk(3, dim=-1)

    def run(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        return qk_norm_rope_pair(
            query, key, num_heads=heads, weights=weights, norm=norm, round_before_weight=early, rotary=rotary,
            rope_start=77, pairing=pairing, backend=backend,
        )  # fmt: skip

    first, second, want = run("triton"), run("triton"), run("reference")
    for got, again, expected in zip(first, second, want, strict=True):
        assert torch.equal(got, again)
        assert_rounded_alike(got, expected, roundings=1 if norm == "none" else 3 if early else 2, pairing=pairing)


@pytest.mark.gpu
def test_tokens_beyond_32_bits() -> None:
    """More than 2^31 elements in a tensor; the last tokens are the first ones again."""
    heads, head_dim, seq_len = 40, 128, 430_000
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    x = torch.randn(1, 100, heads * head_dim, device="cuda", dtype=torch.bfloat16).repeat(1, seq_len // 100, 1)
    weight = torch.randn(heads * head_dim, device="cuda", dtype=torch.bfloat16)
    out, _ = qk_norm_rope_pair(x, x, num_heads=heads, weights=(weight, weight), norm="rms_all", backend="triton")
    assert torch.equal(out[:, -100:], out[:, :100]) and float(out[:, -1].float().std()) > 0.1
