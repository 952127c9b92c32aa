"""Pictures of a block mask: its blocks, its density by row and by head, and what one token sees. Needs matplotlib."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vidsparse.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from vidsparse.layout import LatentGrid, TokenLayout
    from vidsparse_kernels import BlockMask

MAX_FRAMES_DRAWN = 24
BLUE, GREY = "#2f6db5", "#9aa4b1"


def pyplot() -> Any:
    """matplotlib without a screen.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "Pictures need matplotlib, which is not installed; run pip install 'vidsparse[plot]' or pip install "
            "matplotlib."
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


@dataclass(frozen=True)
class View:
    """A mask with what is needed to say which tokens its blocks hold.

    Attributes:
        mask: of one sample, on the CPU.
        layout: the tokens.
        q_order, kv_order: token orders `[1, num_heads, video tokens]`, None for the model's own.
    """

    mask: BlockMask
    layout: TokenLayout
    q_order: torch.Tensor | None = None
    kv_order: torch.Tensor | None = None

    @property
    def num_heads(self) -> int:
        """Heads that differ; 1 where all have the same mask."""
        return self.mask.to_dense().shape[1]

    def dense(self, head: int) -> torch.Tensor:
        """Blocks of a head, bool `[num_q_blocks, num_kv_blocks]`."""
        return _of_head(self.mask.to_dense(), head)

    def row_density(self, head: int) -> torch.Tensor:
        """Share of the keys that each q-block computes, in tokens, `[num_q_blocks]`."""
        sizes = self._offsets("kv", head).diff().double()
        return (self.dense(head) * sizes).sum(-1) / sizes.sum()

    def head_density(self) -> list[float]:
        """Share of all (query, key) pairs by head."""
        found = []
        for head in range(self.num_heads):
            sizes = self._offsets("q", head).diff().double()
            found.append(float((self.row_density(head) * sizes).sum() / sizes.sum()))
        return found

    def reach(self, token: int, head: int = 0) -> torch.Tensor:
        """The video tokens that one video token computes attention with.

        Args:
            token: position among the video tokens.
            head: which head.

        Returns:
            Bool `[frames, height, width]`.
        """
        import torch

        grid, before = self.layout.grid, self.layout.text_before
        position = token
        if self.q_order is not None:
            position = int((_of_head(self.q_order, head) == token).nonzero()[0, 0])
        offsets = self._offsets("q", head)
        row = int(torch.searchsorted(offsets, torch.tensor(position + before), right=True)) - 1
        seen = self.dense(head)[row].repeat_interleave(self._offsets("kv", head).diff())
        seen = seen[before : before + grid.num_tokens]
        if self.kv_order is not None:
            seen = torch.empty_like(seen).scatter_(0, _of_head(self.kv_order, head).long(), seen)
        return seen.view(grid.frames, grid.height, grid.width)

    def blocks_of_tokens(self, head: int = 0) -> torch.Tensor:
        """Which kv-block each video token is in, `[frames, height, width]`: the clusters, where tokens are ordered."""
        import torch

        grid, before = self.layout.grid, self.layout.text_before
        sizes = self._offsets("kv", head).diff()
        block = torch.arange(len(sizes)).repeat_interleave(sizes)[before : before + grid.num_tokens]
        if self.kv_order is not None:
            block = torch.empty_like(block).scatter_(0, _of_head(self.kv_order, head).long(), block)
        return block.view(grid.frames, grid.height, grid.width)

    def _offsets(self, side: str, head: int) -> torch.Tensor:
        return _of_head(self.mask.offsets(side), head).long().contiguous()  # pyright: ignore[reportArgumentType]


def _of_head(x: torch.Tensor, head: int) -> torch.Tensor:
    return x[0, head if x.shape[1] > 1 else 0].cpu()


def middle_token(grid: LatentGrid) -> int:
    """The token in the middle of the middle frame."""
    return (grid.frames // 2) * grid.tokens_per_frame + (grid.height // 2) * grid.width + grid.width // 2


def draw(view: View, title: str, *, token: int, head: int = 0) -> Any:
    """One figure: the mask, its density by row and by head, the reach of a token, and clusters where there are any."""
    plt = pyplot()
    grid = view.layout.grid
    frames = _chosen_frames(grid.frames)
    rows = 2 if view.kv_order is None else 3
    strips = -(-len(frames) // 12)
    figure = plt.figure(figsize=(12, 5.2 + (rows - 1) * (0.4 + 1.0 * strips)), dpi=110)
    outer = figure.add_gridspec(rows, 1, height_ratios=[4.2, *[0.3 + 1.0 * strips] * (rows - 1)], hspace=0.45)
    top = outer[0].subgridspec(1, 2, width_ratios=(1, 1), wspace=0.18)
    _draw_mask(figure.add_subplot(top[0]), view, head)
    right = top[1].subgridspec(2, 1, hspace=0.55)
    _draw_rows(figure.add_subplot(right[0]), view, head)
    _draw_heads(figure.add_subplot(right[1]), view, head)
    place = place_of(grid, token)
    seen = view.reach(token, head)
    share = float(seen.double().mean())
    caption = f"what the token at frame {place[0]}, row {place[1]}, column {place[2]} sees: {share:.0%} of the video"
    _draw_frames(figure, outer[1], seen.numpy(), frames, caption, "Blues", place)
    if view.kv_order is not None:
        blocks = view.blocks_of_tokens(head)
        _draw_frames(figure, outer[2], blocks.numpy(), frames, "cluster of each key token", "prism", None)
    figure.suptitle(title, fontsize=11, y=0.98)
    return figure


def place_of(grid: LatentGrid, token: int) -> tuple[int, int, int]:
    """Frame, row and column of a video token."""
    frame, rest = divmod(token, grid.tokens_per_frame)
    return (frame, *divmod(rest, grid.width))


def _chosen_frames(frames: int) -> list[int]:
    count = min(frames, MAX_FRAMES_DRAWN)
    return [round(i * (frames - 1) / max(count - 1, 1)) for i in range(count)]


def _draw_mask(axes: Any, view: View, head: int) -> None:
    axes.imshow(view.dense(head).numpy(), cmap="Blues", interpolation="nearest", aspect="equal")
    which = "" if view.num_heads == 1 else f", head {head}"
    axes.set_title(f"blocks computed: {view.head_density()[head]:.1%} of all pairs{which}", fontsize=9)
    axes.set_xlabel("key block", fontsize=8)
    axes.set_ylabel("query block", fontsize=8)


def _draw_rows(axes: Any, view: View, head: int) -> None:
    density = view.row_density(head).numpy()
    axes.fill_between(range(len(density)), density, step="mid", color=BLUE, linewidth=0)
    axes.set_ylim(0, 1)
    axes.set_title("share of the keys by query block", fontsize=9)
    axes.set_xlabel("query block", fontsize=8)


def _draw_heads(axes: Any, view: View, head: int) -> None:
    density = view.head_density()
    axes.bar(range(len(density)), density, color=[BLUE if i == head else GREY for i in range(len(density))])
    axes.set_ylim(0, 1)
    axes.set_xticks(range(len(density)))
    axes.set_title(
        "share of all pairs by head" if len(density) > 1 else "share of all pairs, alike in all heads", fontsize=9
    )


def _draw_frames(
    figure: Any,
    place: Any,
    data: Any,
    frames: Sequence[int],
    title: str,
    colors: str,
    mark: tuple[int, int, int] | None,
) -> None:
    columns = min(12, len(frames))
    grid = place.subgridspec(-(-len(frames) // columns), columns, wspace=0.08, hspace=0.25)
    for i, frame in enumerate(frames):
        axes = figure.add_subplot(grid[i // columns, i % columns])
        axes.imshow(data[frame], cmap=colors, vmin=0, vmax=max(1, int(data.max())), interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"{frame}", fontsize=6, labelpad=1)
        if i == 0:
            axes.set_title(title, fontsize=9, loc="left")
        if mark is not None and frame == mark[0]:
            axes.plot(mark[2], mark[1], "+", color="red", markersize=6)


def to_png(figure: Any) -> bytes:
    """The figure as PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    pyplot().close(figure)
    return buffer.getvalue()


def to_html(title: str, png: bytes, facts: Sequence[tuple[str, str]]) -> str:
    """One page with the picture inside and a table of facts; it needs no other file and no network."""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts)
    image = base64.b64encode(png).decode()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:14px sans-serif;margin:2em}th{text-align:left;padding-right:1em;font-weight:600}"
        "img{max-width:100%}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><table>{rows}</table>"
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{image}"></body></html>\n'
    )
