"""Fine-tune a video model on longer videos with sparse attention and a LoRA.

    vidsparse train length-extension lora/vidsparse_lora/configs/tiny_length_extension.yaml --set max_steps=500
    accelerate launch lora/vidsparse_lora/length_extension.py --config CONFIG.yaml --set key=value

Run the same command again to go on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vidsparse_lora.config import LengthExtensionConfig
from vidsparse_lora.objective import window_loss
from vidsparse_lora.roles import STUDENT
from vidsparse_lora.session import Session


def train(config: LengthExtensionConfig, echo: Callable[[str], None] | None = None) -> Path:
    """Train, and return the adapter's file.

    Raises:
        VidsparseError: one sentence.
    """
    session = Session(config, echo)
    backbone, roles = session.backbone, session.roles
    teacher_window = (config.teacher_frames - 1) // backbone.info.temporal + 1

    def train_step() -> dict[str, Tensor]:
        losses: dict[str, list[Tensor]] = {}
        for micro in range(config.gradient_accumulation):
            _, clean, text = session.batch(micro)
            draws = session.generator("sigma", micro)
            sigma = session.sample_sigma(len(clean), draws)
            noise = session.noise(clean.shape, micro)
            noisy = backbone.add_noise(clean, noise, sigma)
            start, target = 0, None
            if config.teacher_weight:
                window = min(teacher_window, clean.shape[2])
                if not backbone.from_image:  # there the picture is the first frame of every window
                    start = int(torch.randint(clean.shape[2] - window + 1, (), generator=draws))
                with roles.teacher():
                    target = backbone.velocity(noisy[:, :, start : start + window], sigma, text)
            velocity = backbone.velocity(noisy, sigma, text)
            loss = backbone.loss(velocity, clean, noise, sigma)
            losses.setdefault("loss", []).append(loss.detach())
            if target is not None:
                match = window_loss(velocity, target, start)
                losses.setdefault("teacher_loss", []).append(match.detach())
                loss = loss + config.teacher_weight * match
            session.backward(loss)
        norm = session.update(STUDENT)
        return {name: torch.stack(values).mean() for name, values in losses.items()} | {"grad_norm": norm}

    return session.run(train_step)


if __name__ == "__main__":
    from vidsparse_lora.launch import main

    main(LengthExtensionConfig, train, __doc__)
