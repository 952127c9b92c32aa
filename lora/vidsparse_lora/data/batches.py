"""Which samples make the batch at a position: a function of seed and position, so that there is no state to save."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from vidsparse_lora.data.cache import Entry, LatentCache


@dataclass(frozen=True)
class Batch:
    """Samples of one shape.

    latents: `[batch, channels, latent frames, h, w]`, float32, on the CPU.
    texts: embeddings `[tokens, dim]`.
    images: embeddings `[batch, tokens, dim]` of the pictures, for models that have them.
    """

    captions: list[str]
    latents: Tensor
    texts: list[Tensor]
    images: Tensor | None = None


class Batches:
    """Endless batches; every epoch sees every sample once or, to fill the last batch of a shape, twice.

    Args:
        cache: filled.
        batch_size: samples in a batch.
        seed: of the order.
    """

    def __init__(self, cache: LatentCache, batch_size: int, seed: int) -> None:
        self.cache, self.batch_size, self.seed = cache, batch_size, seed
        self.groups: dict[tuple[int, ...], list[Entry]] = {}
        for entry in cache.entries:
            self.groups.setdefault(entry.shape, []).append(entry)
        self.per_epoch = sum(-(-len(group) // batch_size) for group in self.groups.values())
        self._epoch: tuple[int, list[list[Entry]]] = (-1, [])

    def entries(self, position: int) -> list[Entry]:
        """The samples of the batch at a position, counted from the beginning of the training."""
        epoch, index = divmod(position, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][index]

    def _order(self, epoch: int) -> list[list[Entry]]:
        rng = Random(f"order {self.seed} {epoch}")
        batches = []
        for shape in sorted(self.groups):
            group = list(self.groups[shape])
            rng.shuffle(group)
            while len(group) % self.batch_size:
                group.append(rng.choice(self.groups[shape]))
            batches += [group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)]
        rng.shuffle(batches)
        return batches

    def __getitem__(self, position: int) -> Batch:
        samples = [self.cache.load(entry) for entry in self.entries(position)]
        images = [s.image for s in samples if s.image is not None]
        return Batch(
            [s.caption for s in samples],
            torch.stack([s.latents for s in samples]),
            [s.text for s in samples],
            torch.stack(images) if images else None,
        )
