"""How close two clips are, pixel by pixel: PSNR and SSIM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsparse.errors import ConfigError

#: Mean squared errors below this (100 dB for a range of 1) count as it, so that equal clips have a finite PSNR.
_LEAST_ERROR = 1e-10


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ConfigError(f"clips to compare must have one shape, got {list(a.shape)} and {list(b.shape)}")
    if a.ndim != 5:
        raise ConfigError(f"clips must be [batch, channels, frames, height, width], got {list(a.shape)}")


def psnr(a: Tensor, b: Tensor, data_range: float = 2.0, *, per_frame: bool = False) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10(range² / mean squared error), in dB.

    Args:
        a, b: `[B, C, T, H, W]`.
        data_range: Distance from the least to the greatest possible value: 2 for [-1, 1].
        per_frame: One value for each frame rather than for each clip. The value of a clip is that of its mean
            squared error, not the mean over its frames.

    Returns:
        `[B]`, or `[B, T]`; float32. Equal clips have `100 + 20 log10(range)` dB.

    Raises:
        ConfigError: the shapes differ or have not five dimensions.
    """
    _check(a, b)
    error = (a.float() - b.float()).square().mean((1, 3, 4) if per_frame else (1, 2, 3, 4))
    return 10 * torch.log10(data_range**2 / error.clamp(min=_LEAST_ERROR))


def ssim(a: Tensor, b: Tensor, data_range: float = 2.0, *, per_frame: bool = False) -> Tensor:
    """Structural similarity of the frames (Wang et al. 2004, eq. 13): 1 for equal clips.

    Gaussian window of 11 x 11 with sigma 1.5, k1 = 0.01, k2 = 0.03, only where the window fits in the frame; mean
    over pixels and channels.

    Args:
        a, b: `[B, C, T, H, W]`, H and W at least 11.
        data_range: Distance from the least to the greatest possible value: 2 for [-1, 1].
        per_frame: One value for each frame rather than their mean.

    Returns:
        `[B]`, or `[B, T]`; float32.

    Raises:
        ConfigError: the shapes differ, have not five dimensions, or the frames are smaller than the window.
    """
    _check(a, b)
    batch, channels, frames, height, width = a.shape
    if min(height, width) < 11:
        raise ConfigError(f"ssim needs frames of at least 11 x 11 pixels, got {height} x {width}")
    x, y = (v.float().transpose(1, 2).reshape(batch * frames * channels, 1, height, width) for v in (a, b))
    offsets = torch.arange(11, device=x.device) - 5.0
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    line = (line / line.sum()).view(1, 1, 1, 11)

    def blur(v: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(v, line), line.transpose(2, 3))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    value = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    value = value / ((mean_x.square() + mean_y.square() + c1) * (var_x.clamp(min=0) + var_y.clamp(min=0) + c2))
    value = value.mean((1, 2, 3)).view(batch, frames, channels).mean(2)
    return value if per_frame else value.mean(1)
