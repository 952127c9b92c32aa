"""Clips that the model itself makes from prompts, with its dense attention and before it has an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from vidsparse_lora.data.cache import Clip
from vidsparse_pipelines.prompts import read_prompts

SELF = "self:"
"""Begins the `data` that names a file of prompts to make clips from."""

Maker = Callable[[str, int, int, int, int], Tensor]
"""Prompt, seed, frames, height, width -> pixels `[3, frames, height, width]` in [-1, 1]."""


@dataclass(frozen=True)
class SelfMade:
    """A clip that follows from the model, the prompt, the seed and how it is made."""

    prompt: str
    seed: int
    num_frames: int
    height: int
    width: int
    how: str
    make: Maker = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"seed {self.seed}: {self.prompt}"

    @property
    def identity(self) -> str:
        return f"self {self.how} {self.seed} {self.num_frames} {self.height} {self.width} {self.prompt}"

    def read(self) -> Clip:
        return Clip(self.prompt, self.make(self.prompt, self.seed, self.num_frames, self.height, self.width))


def self_made(
    file: str, count: int, lengths: tuple[int, ...], sizes: list[tuple[int, int]], seed: int, how: str, make: Maker
) -> list[SelfMade]:
    """`count` clips, the prompts of a file in turn, each time with another seed; lengths and sizes in turn too.

    Raises:
        ConfigError: the file is missing or holds no prompt.
    """
    prompts = read_prompts(file)
    kinds = [(length, size) for length in lengths for size in sizes]
    made = []
    for index in range(count):
        turn, place = divmod(index, len(prompts))
        # Each prompt meets every kind, however many there are of both.
        length, size = kinds[(place + turn) % len(kinds)]
        made.append(SelfMade(prompts[place], seed + index, length, *size, how, make))
    return made
