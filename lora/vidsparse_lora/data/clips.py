"""Clips that the project's own renderer draws from captions, for the bundled model."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch

from vidsparse_lora.data.cache import Clip
from vidsparse_pipelines.clips import caption, render, sample_params
from vidsparse_pipelines.clips.grammar import sample_split


@dataclass(frozen=True)
class DrawnClip:
    """A clip that follows from the seed and its index; never one of the held-out captions."""

    seed: int
    index: int
    num_frames: int
    height: int
    width: int
    device: torch.device

    @property
    def name(self) -> str:
        return f"clip {self.index}"

    @property
    def identity(self) -> str:
        return f"clip {self.seed} {self.index} {self.num_frames} {self.height} {self.width}"

    def read(self) -> Clip:
        rng = Random(f"lora clips {self.seed} {self.index}")
        spec = sample_split(rng, held_out=False)
        params = sample_params([spec], rng, self.height, self.width).to(self.device)
        return Clip(caption(spec, rng), render(params, self.num_frames, self.height, self.width)[0])


def drawn_clips(
    count: int, lengths: tuple[int, ...], sizes: list[tuple[int, int]], seed: int, device: torch.device
) -> list[DrawnClip]:
    """`count` clips, those of one length and size after each other, so that they are encoded together."""
    kinds = [(length, size) for length in lengths for size in sizes]
    return [
        DrawnClip(seed, index, length, *size, device)
        for place, (length, size) in enumerate(kinds)
        for index in range(place, count, len(kinds))
    ]
