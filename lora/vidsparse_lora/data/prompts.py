"""Prompts alone, for training without videos."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from torch import Tensor

from vidsparse.errors import ConfigError
from vidsparse_lora.config import CLIPS
from vidsparse_lora.data.cache import Encoder
from vidsparse_pipelines.clips import caption
from vidsparse_pipelines.clips.grammar import sample_split
from vidsparse_pipelines.prompts import read_prompts


def prompt_list(data: str, count: int, seed: int) -> list[str]:
    """Captions of the renderer's grammar (never held-out ones) where `data` is "clips", else the lines of a text file.

    Raises:
        ConfigError: there is no such file, or it holds no prompt.
    """
    if data != CLIPS:
        return read_prompts(data)
    rng = Random(f"lora prompts {seed}")
    return [caption(sample_split(rng, held_out=False), rng) for _ in range(count)]


class Prompts:
    """Endless batches of prompts with their embeddings; which one stands where follows from the seed."""

    def __init__(self, prompts: Sequence[str], encoder: Encoder, batch_size: int, seed: int) -> None:
        if not prompts:
            raise ConfigError("There is no prompt to train from.")
        self.captions = list(dict.fromkeys(prompts))
        self.batch_size, self.seed = batch_size, seed
        self._texts: list[Tensor] = []
        for start in range(0, len(self.captions), 64):
            self._texts += encoder.encode_text(self.captions[start : start + 64])

    def __getitem__(self, position: int) -> list[Tensor]:
        """Embeddings `[tokens, dim]` of the batch at a position."""
        rng = Random(f"prompts {self.seed} {position}")
        return [self._texts[rng.randrange(len(self._texts))] for _ in range(self.batch_size)]
