"""PSNR and SSIM against an independent implementation and their own definition."""

from __future__ import annotations

import math

import pytest
import torch

from vidsparse.errors import ConfigError
from vidsparse_pipelines.clips.metrics import psnr, ssim


def pair(noise: float = 0.1, shape=(3, 3, 4, 24, 33)):
    g = torch.Generator().manual_seed(0)
    a = torch.rand(shape, generator=g) * 2 - 1
    a = torch.nn.functional.avg_pool3d(a, (1, 3, 3), 1, (0, 1, 1))
    return a, (a + noise * torch.randn(shape, generator=g)).clamp(-1, 1)


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_ssim_equals_torchmetrics(noise):
    image = pytest.importorskip("torchmetrics.functional.image")
    a, b = pair(noise)
    frames = [v.transpose(1, 2).flatten(0, 1) for v in (a, b)]
    _, whole = image.structural_similarity_index_measure(
        *frames, sigma=1.5, data_range=2.0, reduction="none", return_full_image=True
    )
    wanted = whole[..., 5:-5, 5:-5].mean((1, 2, 3)).view(3, 4)  # only where the window fits, as in the paper
    torch.testing.assert_close(ssim(a, b, per_frame=True), wanted, atol=2e-5, rtol=0)
    torch.testing.assert_close(ssim(a, b), wanted.mean(1), atol=2e-5, rtol=0)


def test_psnr_by_its_definition():
    a = torch.zeros(1, 3, 2, 4, 4)
    b = a.clone()
    b[:, :, 1] = 0.2
    per_frame = psnr(a, b, per_frame=True)
    assert per_frame[0, 1].item() == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-4)
    assert psnr(a, b).item() == pytest.approx(10 * math.log10(4 / 0.02), abs=1e-4)
    assert psnr((a + 1) / 2, (b + 1) / 2, data_range=1.0).item() == pytest.approx(psnr(a, b).item(), abs=1e-3)


def test_equal_clips():
    a, _ = pair()
    assert torch.allclose(ssim(a, a), torch.ones(3), atol=1e-5)
    assert psnr(a, a).isfinite().all() and (psnr(a, a) > 100).all()


def test_low_precision_is_computed_in_float32():
    a, b = (v.bfloat16() for v in pair())
    torch.testing.assert_close(psnr(a, b), psnr(a.float(), b.float()))
    assert ssim(a, b).dtype == torch.float32


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bad_input(metric):
    a, b = pair()
    with pytest.raises(ConfigError, match="one shape"):
        metric(a, b[:, :, :2])
    with pytest.raises(ConfigError, match="frames, height, width"):
        metric(a[0], b[0])


def test_ssim_names_the_smallest_frame():
    with pytest.raises(ConfigError, match="at least 11 x 11 pixels, got 8 x 24"):
        ssim(torch.zeros(1, 3, 1, 8, 24), torch.zeros(1, 3, 1, 8, 24))
