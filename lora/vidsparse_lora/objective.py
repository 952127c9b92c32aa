"""Noise levels, noisy latents and the losses on velocities (rectified flow: x_t = (1 - sigma) x_0 + sigma noise)."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor


def seed_of(*parts: object) -> int:
    """A seed that follows from what it is for, so that no state of a random generator needs to be saved."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def sample_sigma(
    count: int,
    shift: float,
    sampling: str,
    generator: torch.Generator,
    between: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """`[count]` noise levels in (0, 1), drawn on the CPU; `shift` moves them up, as the scheduler's flow shift does.

    between: draw from that part of the distribution alone.
    """
    if between != (0.0, 1.0):
        # Even in the distribution function of the levels, which maps the ends to 0 and 1 of what is left of it.
        low, high = (_share_below(torch.tensor(end, dtype=torch.float64), shift, sampling) for end in between)
        share = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
        u = share if sampling == "uniform" else torch.sigmoid(torch.special.ndtri(share))
        sigma = shift * u / (1 + (shift - 1) * u)
        return sigma.clamp(*between).float()
    if sampling == "uniform":
        u = torch.rand(count, generator=generator)
    else:
        u = torch.sigmoid(torch.randn(count, generator=generator))
    return shift * u / (1 + (shift - 1) * u)


def _share_below(sigma: Tensor, shift: float, sampling: str) -> Tensor:
    """Share of all noise levels that lie below `sigma`."""
    u = sigma / (shift - (shift - 1) * sigma)
    return u if sampling == "uniform" else torch.special.ndtr(torch.logit(u))


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t of each sample; sigma `[batch]`."""
    return torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))


def flow_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    return F.mse_loss(velocity, noise - clean)


def to_clean(noisy: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that a velocity points to: x_t - sigma v."""
    return noisy - sigma.view(-1, 1, 1, 1, 1) * velocity


def window_loss(student: Tensor, teacher: Tensor, start: int) -> Tensor:
    """Mismatch of the student's velocity with the teacher's on a window of latent frames.

    Args:
        student: `[batch, channels, frames, h, w]` over the whole video.
        teacher: `[batch, channels, window, h, w]`, of the window alone.
        start: first latent frame of the window. A window from the middle begins with a latent of several frames, where
            the teacher knows only first latents of one frame; that frame is left out.
    """
    skip = 1 if start and teacher.shape[2] > 1 else 0
    own = student[:, :, start + skip : start + teacher.shape[2]]
    return F.mse_loss(own, teacher[:, :, skip:])


def distribution_gradient(generated: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Gradient of the distribution-matching loss at the student's clean latents (DMD, arXiv 2311.18828, Eqs. 7 and 8).

    Args:
        generated: clean latents of the student.
        real: clean latents that the teacher sees in the noised student's.
        fake: those that the critic sees.
    """
    scale = (generated - real).abs().mean(dim=tuple(range(1, generated.ndim)), keepdim=True).clamp(min=1e-6)
    return (fake - real) / scale


def distribution_loss(generated: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient in `generated` is `gradient` / number of elements."""
    target = (generated - gradient).detach()
    return 0.5 * F.mse_loss(generated, target)
