"""What softmax attention of one recorded call looks at: maps, energy against distance, one token's row, key clusters.

All of it from query and key on the CPU, in fp32, on evenly sampled query rows, so that long videos take seconds. Weights
are given relative to uniform attention: 1 is a key that gets 1 / seq_len of a row's softmax mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vidsparse.layout import TokenLayout

MAP_BINS = 160
SAMPLED_ROWS = 512
CHUNK = 64
NUM_CLUSTERS = 12


@dataclass(frozen=True)
class Call:
    """One attention call.

    Attributes:
        query, key: fp32 `[seq_len, num_heads, head_dim]`, of one sample, after norm and rotary embedding.
        layout: the tokens.
    """

    query: torch.Tensor
    key: torch.Tensor
    layout: TokenLayout

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    def rows(self, tokens: torch.Tensor, head: int) -> torch.Tensor:
        """Softmax weights of some video tokens, `[len(tokens), seq_len]`."""
        q = self.query[tokens + self.layout.text_before, head]
        return (q @ self.key[:, head].T * self.query.shape[-1] ** -0.5).softmax(-1)

    def _sampled(self, head: int, count: int = SAMPLED_ROWS):
        """Chunks of evenly spaced video tokens and their weights."""
        num_tokens = self.layout.grid.num_tokens
        tokens = torch.arange(min(count, num_tokens)) * num_tokens // min(count, num_tokens)
        for chunk in tokens.split(CHUNK):
            yield chunk, self.rows(chunk, head)

    def attention_map(self, head: int) -> torch.Tensor:
        """Mean weight by position of query and key, `[bins, bins]`; video tokens only."""
        grid, before = self.layout.grid, self.layout.text_before
        num_tokens, seq_len = grid.num_tokens, self.layout.seq_len
        bins = min(MAP_BINS, num_tokens)
        of_key = torch.arange(num_tokens) * bins // num_tokens
        per_bin = torch.bincount(of_key, minlength=bins).float()
        sums, counts = torch.zeros(bins, bins), torch.zeros(bins, 1)
        for tokens, weights in self._sampled(head, 4 * bins):
            video = weights[:, before : before + num_tokens]
            by_key = torch.zeros(len(tokens), bins).index_add_(1, of_key, video) / per_bin
            of_query = tokens * bins // num_tokens
            sums.index_add_(0, of_query, by_key)
            counts.index_add_(0, of_query, torch.ones(len(tokens), 1))
        return sums / counts.clamp(min=1) * seq_len

    def energy(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean weight of a key by its distance from the query.

        Returns:
            By distance in latent frames, `[frames]`, over all places of a frame; and by distance within the frame in
            tokens, rounded down, `[diagonal]`, over all frames. NaN where no pair has that distance.
        """
        grid, before = self.layout.grid, self.layout.text_before
        time, row, column = _places(torch.arange(grid.num_tokens), grid)
        steps = grid.frames
        reach = int(((grid.height - 1) ** 2 + (grid.width - 1) ** 2) ** 0.5) + 1
        sums = [torch.zeros(n, dtype=torch.float64) for n in (steps, reach)]
        counts = [torch.zeros(n, dtype=torch.float64) for n in (steps, reach)]
        for tokens, weights in self._sampled(head):
            t, r, c = (x[:, None] for x in _places(tokens, grid))
            video = weights[:, before : before + grid.num_tokens].double().flatten()
            space = ((row - r) ** 2 + (column - c) ** 2).double().sqrt().long()
            for number, distance in enumerate(((time - t).abs(), space)):
                sums[number].index_add_(0, distance.flatten(), video)
                counts[number].index_add_(0, distance.flatten(), torch.ones_like(video))
        by_time, by_space = (s / n * self.layout.seq_len for s, n in zip(sums, counts, strict=True))
        return by_time, by_space

    def token_map(self, token: int, head: int) -> torch.Tensor:
        """Weights of the video tokens for one video token, `[frames, height, width]`."""
        grid, before = self.layout.grid, self.layout.text_before
        weights = self.rows(torch.tensor([token]), head)[0, before : before + grid.num_tokens]
        return (weights * self.layout.seq_len).view(grid.frames, grid.height, grid.width)

    def clusters(self, head: int) -> torch.Tensor:
        """k-means clusters of the keys of a head, `[frames, height, width]`."""
        from vidsparse_kernels import cluster

        grid, before = self.layout.grid, self.layout.text_before
        keys = self.key[None, before : before + grid.num_tokens, head : head + 1].contiguous()
        found = cluster(keys, min(NUM_CLUSTERS, grid.num_tokens), iterations=10)
        return found.labels[0, 0].long().view(grid.frames, grid.height, grid.width)


def _places(tokens: torch.Tensor, grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frame, row and column."""
    within = tokens % grid.tokens_per_frame
    return tokens // grid.tokens_per_frame, within // grid.width, within % grid.width
