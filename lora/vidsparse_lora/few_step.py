"""A sparse student of a few steps, by matching distributions (DMD2, arXiv 2405.14867, section 4), from prompts alone.

One base model: the student is its adapter with sparse attention, the teacher the plain model, the critic another adapter;
teacher and critic are dense. The student makes clean latents by the steps it will make in use, and learns at one of them.
The critic learns what the student makes, and the student moves from where the critic points to where the teacher does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vidsparse_lora.config import DistillConfig
from vidsparse_lora.objective import (
    add_noise,
    distribution_gradient,
    distribution_loss,
    flow_loss,
    sample_sigma,
    to_clean,
)
from vidsparse_lora.roles import CRITIC, STUDENT
from vidsparse_lora.session import Session
from vidsparse_pipelines.lora import few_step_scheduler

SIGMA_RANGE = (0.02, 0.98)
"""Noise levels at which distributions are matched: at the ends the scores say nothing, or too much."""


def train_few_step(config: DistillConfig, echo: Callable[[str], None] | None = None) -> Path:
    """Train student and critic, and return the student's file."""
    session = Session(config, echo)
    session.add_role(CRITIC, config.critic_learning_rate)
    session.backbone.pipe.scheduler = few_step_scheduler(session.flow_shift)
    distiller = FewStep(session)

    def train_step() -> dict[str, Tensor]:
        figures: dict[str, Tensor] = {}
        if session.step % config.student_every == 0:
            losses = []
            for micro in range(config.gradient_accumulation):
                loss, size = distiller.student_loss(micro)
                session.backward(loss)
                losses.append(size)
            figures["student_grad_norm"] = session.update(STUDENT)
            figures["distance"] = torch.stack(losses).mean()
        losses = []
        for micro in range(config.gradient_accumulation):
            loss = distiller.critic_loss(micro)
            session.backward(loss)
            losses.append(loss.detach())
        figures["critic_grad_norm"] = session.update(CRITIC)
        session.roles.student()
        return figures | {"critic_loss": torch.stack(losses).mean()}

    return session.run(train_step)


class FewStep:
    """The two losses, on a session whose model has both adapters."""

    def __init__(self, session: Session) -> None:
        assert isinstance(session.config, DistillConfig)
        self.session, self.config = session, session.config
        scheduler = few_step_scheduler(session.flow_shift)
        scheduler.set_timesteps(self.config.steps)
        self.sigmas: list[float] = scheduler.sigmas.tolist()

    def _sigma(self, level: float, count: int) -> Tensor:
        return torch.full((count,), level, device=self.session.device)

    def generate(self, micro: int, purpose: str, with_grad: bool) -> tuple[Tensor, Tensor]:
        """The student's clean latents as seen from one of its steps, drawn at random, and the text.

        The steps before it run without gradients, as in use: each goes along the velocity to the next noise level.
        """
        session = self.session
        session.roles.student()
        session.roles.handle.reset()
        text = session.prompt_text(micro)
        latents = session.noise(session.latent_shape(len(text)), micro, f"{purpose} start")
        draws = session.generator(f"{purpose} step", micro)
        last = int(torch.randint(len(self.sigmas) - 1, (), generator=draws))
        with torch.no_grad():
            for here, following in zip(self.sigmas[:last], self.sigmas[1 : last + 1], strict=True):
                velocity = session.backbone.velocity(latents, self._sigma(here, len(text)), text)
                latents = latents + (following - here) * velocity
        sigma = self._sigma(self.sigmas[last], len(text))
        with torch.set_grad_enabled(with_grad):
            clean = to_clean(latents, session.backbone.velocity(latents, sigma, text), sigma)
        return clean, text

    def _noised(self, clean: Tensor, micro: int, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        session = self.session
        draws = session.generator(f"{purpose} sigma", micro)
        sigma = sample_sigma(len(clean), session.flow_shift, "uniform", draws).clamp(*SIGMA_RANGE).to(session.device)
        noise = session.noise(clean.shape, micro, f"{purpose} noise")
        return add_noise(clean.detach(), noise, sigma), sigma, noise

    def student_loss(self, micro: int) -> tuple[Tensor, Tensor]:
        """The loss whose gradient moves the student's latents, and the size of that gradient. Leaves the student on."""
        session, roles, velocity = self.session, self.session.roles, self.session.backbone.velocity
        clean, text = self.generate(micro, "student", with_grad=True)
        noisy, sigma, _ = self._noised(clean, micro, "student")
        with roles.teacher():
            guided = session.guided_velocity(noisy, sigma, text, self.config.guidance)
        real = to_clean(noisy, guided, sigma)
        roles.critic()
        with torch.no_grad():
            fake = to_clean(noisy, velocity(noisy, sigma, text), sigma)
        roles.student()
        gradient = distribution_gradient(clean.detach(), real, fake)
        return distribution_loss(clean, gradient), gradient.abs().mean()

    def critic_loss(self, micro: int) -> Tensor:
        """The critic's flow-matching loss on what the student makes. Leaves the critic on."""
        clean, text = self.generate(micro, "critic", with_grad=False)
        noisy, sigma, noise = self._noised(clean, micro, "critic")
        self.session.roles.critic()
        return flow_loss(self.session.backbone.velocity(noisy, sigma, text), clean, noise)
