"""Where the tokens of a sequence stand: the latent grid, the text beside it, and the blocks over both."""

from __future__ import annotations

from dataclasses import dataclass

from vidsparse.checks import is_whole
from vidsparse.errors import ConfigError


@dataclass(frozen=True)
class LatentGrid:
    """Size of the video after VAE and patchify, in tokens; the order of tokens is time, height, width.

    Attributes:
        frames: latent frames, at least 1.
        height: token rows per frame, at least 1.
        width: token columns per frame, at least 1.

    Raises:
        ConfigError: a size is below 1.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            size = getattr(self, name)
            if not is_whole(size) or size < 1:
                raise ConfigError(f"`{name}` of a latent grid must be a whole number of at least 1, got {size!r}.")

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class TokenLayout:
    """The sequence that one attention call sees: text, video and the blocks over them.

    Blocks run over the whole sequence, text included; the last block may be shorter.

    Attributes:
        grid: the video tokens, contiguous, frame after frame.
        text_before: text tokens that stand before the video.
        text_after: text tokens that stand after the video.
        block_size: tokens per block, for queries and keys alike.

    Raises:
        ConfigError: a count is negative or the block size is below 1.
    """

    grid: LatentGrid
    text_before: int = 0
    text_after: int = 0
    block_size: int = 128

    def __post_init__(self) -> None:
        for name in ("text_before", "text_after"):
            count = getattr(self, name)
            if not is_whole(count) or count < 0:
                raise ConfigError(f"`{name}` must be a whole number of at least 0, got {count!r}.")
        if not is_whole(self.block_size) or self.block_size < 1:
            raise ConfigError(f"`block_size` must be a whole number of at least 1 token, got {self.block_size!r}.")

    @property
    def text_len(self) -> int:
        return self.text_before + self.text_after

    @property
    def seq_len(self) -> int:
        return self.text_before + self.grid.num_tokens + self.text_after

    @property
    def num_blocks(self) -> int:
        return -(-self.seq_len // self.block_size)
