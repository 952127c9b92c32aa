"""Pictures of one recorded attention call: its map, its energy against distance, and over the frames one token and clusters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vidsparse.plots import BLUE, GREY, place_of, pyplot

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vidsparse.attention_maps import Call
    from vidsparse.plots import View

MAX_FRAMES = 10
MAX_HEADS = 16
RECALL_TOKENS = 24


def recall(call: Call, view: View, head: int) -> float:
    """Share of the video's softmax mass in the computed blocks, mean over evenly sampled query tokens."""
    import torch

    grid = call.layout.grid
    count = min(RECALL_TOKENS, grid.num_tokens)
    tokens = torch.arange(count) * grid.num_tokens // count
    shares = []
    for token in tokens.tolist():
        weights = call.token_map(token, head)
        seen = view.reach(token, head if view.num_heads > 1 else 0)
        shares.append(float(weights[seen].sum() / weights.sum()))
    return sum(shares) / len(shares)


def draw_run(
    call: Call, view: View | None, frames: np.ndarray, title: str, *, token: int, head: int, recalls: Sequence[float]
) -> Any:
    """One figure.

    Args:
        call: what was recorded.
        view: the mask of the call, None where it was dense.
        frames: uint8 `[latent frames, height, width, 3]`, as made.
        title: above all.
        token: whose row is drawn over the frames.
        head: of maps and clusters.
        recalls: by head, empty without a mask.
    """
    plt = pyplot()
    grid = call.layout.grid
    figure = plt.figure(figsize=(13, 12.5), dpi=110)
    outer = figure.add_gridspec(4, 1, height_ratios=[4.0, 2.6, 1.3, 2.6], hspace=0.42)
    top = outer[0].subgridspec(1, 2, wspace=0.15)
    _draw_map(figure, figure.add_subplot(top[0]), call.attention_map(head), head)
    right = figure.add_subplot(top[1])
    if view is None:
        right.set_axis_off()
        right.text(0.5, 0.5, "this call was dense", ha="center", fontsize=10)
    else:
        of_mask = head if view.num_heads > 1 else 0
        right.imshow(view.dense(of_mask).numpy(), cmap="Blues", interpolation="nearest", aspect="equal")
        order = "" if view.q_order is None else ", tokens in the order of their clusters"
        right.set_title(f"blocks computed: {view.head_density()[of_mask]:.0%} of all pairs{order}", fontsize=9)
    middle = outer[1].subgridspec(1, 3, wspace=0.3)
    _draw_energy(
        [figure.add_subplot(middle[i]) for i in (0, 1)], [call.energy(h) for h in _heads(call, head)],
        _heads(call, head), head,
    )  # fmt: skip
    _draw_recall(figure.add_subplot(middle[2]), recalls, head)
    place = place_of(grid, token)
    chosen = _chosen(grid.frames, place[0])
    _draw_strip(figure, outer[2], frames, chosen, "the video, first pixel frame of each latent frame", None, None)
    bottom = outer[3].subgridspec(2, 1, hspace=0.35)
    heat = call.token_map(token, head).clamp(min=1e-3).log10().numpy()
    mine = f"what the token at frame {place[0]}, row {place[1]}, column {place[2]} looks at (log, head {head})"
    _draw_strip(
        figure, bottom[0], frames, chosen, mine, (heat, "inferno", float(heat.min()), float(heat.max())), place
    )
    groups, words = _clusters(call, view, head)
    _draw_strip(figure, bottom[1], frames, chosen, words, (groups, "tab20", 0, int(groups.max())), None)
    figure.suptitle(title, fontsize=11, y=0.93)
    return figure


def _heads(call: Call, head: int) -> list[int]:
    """Those that are drawn: all, or some of many and `head`."""
    count = min(call.num_heads, MAX_HEADS)
    return sorted({i * call.num_heads // count for i in range(count)} | {head})


def _chosen(frames: int, keep: int) -> list[int]:
    """Evenly spaced frames, the nearest of them replaced by `keep`."""
    count = min(frames, MAX_FRAMES)
    chosen = [round(i * (frames - 1) / max(count - 1, 1)) for i in range(count)]
    nearest = min(range(count), key=lambda i: abs(chosen[i] - keep))
    return [keep if i == nearest else frame for i, frame in enumerate(chosen)]


def _clusters(call: Call, view: View | None, head: int) -> tuple[np.ndarray, str]:
    if view is not None and view.kv_order is not None:
        return view.blocks_of_tokens(head).numpy() % 20, f"clusters of the keys, as the method made them (head {head})"
    return call.clusters(head).numpy(), f"clusters of the keys (k-means, head {head})"


def _draw_map(figure: Any, axes: Any, values: torch.Tensor, head: int) -> None:
    image = axes.imshow(values.clamp(min=1e-3).log10().numpy(), cmap="inferno", interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.045, label="log10 of weight, 0 is uniform")
    axes.set_title(f"attention, head {head}: mean weight by position", fontsize=9)
    axes.set_xlabel("key, through the video", fontsize=8)
    axes.set_ylabel("query, through the video", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_energy(
    both: list[Any], energies: list[tuple[torch.Tensor, torch.Tensor]], heads: list[int], head: int
) -> None:
    names = ("distance in latent frames", "distance within the frame, tokens")
    for number, (axes, name) in enumerate(zip(both, names, strict=True)):
        for index, energy in zip(heads, energies, strict=True):
            line = energy[number].numpy()
            mine = index == head
            axes.plot(line, color=BLUE if mine else GREY, linewidth=2 if mine else 0.8, zorder=2 if mine else 1)
        axes.axhline(1, color="black", linewidth=0.5, linestyle=":")
        axes.set_yscale("log")
        axes.set_title("weight of a key by its distance, 1 is uniform" if number == 0 else "", fontsize=9)
        axes.set_xlabel(name, fontsize=8)


def _draw_recall(axes: Any, recalls: Sequence[float], head: int) -> None:
    if not recalls:
        axes.set_axis_off()
        return
    axes.bar(range(len(recalls)), recalls, color=[BLUE if i == head else GREY for i in range(len(recalls))])
    axes.set_ylim(0, 1)
    axes.set_title("softmax mass in the computed blocks (recall), by head", fontsize=9)


def _draw_strip(
    figure: Any,
    place: Any,
    frames: np.ndarray,
    chosen: Sequence[int],
    title: str,
    over: tuple[np.ndarray, str, float, float] | None,
    mark: tuple[int, int, int] | None,
) -> None:
    """Frames in a row, with values laid over them."""
    strip = place.subgridspec(1, len(chosen), wspace=0.05)
    height, width = frames.shape[1:3]
    for i, frame in enumerate(chosen):
        axes = figure.add_subplot(strip[i])
        if over is None:
            axes.imshow(frames[frame])
        else:
            values, colors, low, high = over
            axes.imshow(frames[frame].mean(-1), cmap="gray", vmin=0, vmax=255)
            axes.imshow(values[frame], cmap=colors, vmin=low, vmax=max(high, low + 1e-6), alpha=0.65,
                        interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))  # fmt: skip
            if mark is not None and frame == mark[0]:
                across = [(at + 0.5) * size / n for at, size, n in zip(
                    mark[1:], (height, width), values.shape[1:], strict=True)]  # fmt: skip
                axes.plot(across[1], across[0], "+", color="cyan", markersize=9, markeredgewidth=2)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"{frame}", fontsize=6, labelpad=1)
        if i == 0:
            axes.set_title(title, fontsize=9, loc="left")
