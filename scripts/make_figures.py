"""Draw the pictures of the README and docs from real runs: frames, the mask, the kernel's time.

    python scripts/make_figures.py --output docs --benchmark benchmarks/results/2026-12-01-h200-block-sparse.json

Needs `pip install .[plot]`. The clips are made by the bundled model on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from vidsparse import LatentGrid, RadialProcessor
from vidsparse_pipelines import GenerateSettings, generate, read_video

PROMPTS = (
    "a large red star spins on a checkered navy background",
    "a yellow circle bounces on a teal gradient background",
    "a small white square moves right quickly on a dotted maroon background, the camera pans left",
    "a large blue cross pulses slowly on a black background",
    "a pink striped triangle swings left and right on a gray gradient background",
    "a small green circle moves in a circle in front of a large purple square that stays still on a brown background",
)
FRAMES = (0, 10, 20, 30, 40, 50, 60, 70, 80)
SEQ_LEN = 32_760
"""Tokens of Wan at 480p, 81 frames: the attention call whose time is drawn."""


def clips(size: tuple[int, int], seed: int) -> list[np.ndarray]:
    """One clip a prompt, uint8 `[frames, height, width, 3]`."""
    out = []
    with tempfile.TemporaryDirectory() as folder:
        for i, prompt in enumerate(PROMPTS):
            settings = GenerateSettings(prompt=prompt, seed=seed, height=size[0], width=size[1])
            out.append(np.asarray(read_video(generate(settings, Path(folder) / f"{i}.mp4").path)))
            print(f"{i + 1} of {len(PROMPTS)}: {prompt}", flush=True)
    return out


def contact_sheet(videos: list[np.ndarray], scale: int) -> Image.Image:
    height, width = videos[0].shape[1] * scale, videos[0].shape[2] * scale
    sheet = Image.new("RGB", (len(FRAMES) * (width + 4), len(videos) * (height + 22)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (prompt, video) in enumerate(zip(PROMPTS, videos, strict=True)):
        y = row * (height + 22)
        pen.text((2, y + 4), prompt, fill="black")
        for column, frame in enumerate(FRAMES):
            image = Image.fromarray(video[frame]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (column * (width + 4), y + 20))
    return sheet


def picture(videos: list[np.ndarray], benchmark: dict) -> Figure:
    figure = plt.figure(figsize=(12, 6.2), dpi=120)
    grid = figure.add_gridspec(3, 12, height_ratios=(1, 1, 2.3), hspace=0.25, wspace=0.3)
    for row, index in enumerate((0, 3)):
        for column, frame in enumerate((0, 16, 32, 48, 64, 80)):
            axes = figure.add_subplot(grid[row, 2 * column : 2 * column + 2])
            axes.imshow(videos[index][frame], interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_title(f"“{PROMPTS[index]}”", loc="left", fontsize=8)
            axes.set_xlabel(f"frame {frame}", fontsize=6, labelpad=1)
    latent = LatentGrid(21, 30, 52)
    processor = RadialProcessor()
    mask, _ = processor.build_mask(processor.layout(latent), None)
    axes = figure.add_subplot(grid[2, :5])
    axes.imshow(mask.to_dense()[0, 0].numpy(), cmap="Blues", interpolation="nearest")
    axes.set_title(f"radial mask, Wan 480p, 81 frames: {mask.density:.0%} of the blocks", fontsize=9)
    axes.set_xlabel("key block (128 tokens)", fontsize=8)
    axes.set_ylabel("query block", fontsize=8)
    axes = figure.add_subplot(grid[2, 6:])
    rows = [r for r in benchmark["rows"] if r["seq_len"] == SEQ_LEN and r["head_dim"] == 128]
    rows = [r for r in rows if r["direction"] == "forward"]
    bars = []
    for kernel in ("dense cuDNN", "dense FlashAttention-4"):
        times = [r["ms"] for r in rows if r["kernel"] == kernel]
        if times:
            bars.append((kernel, statistics.median(times), "#9aa4b1"))
    for mask, color in (("radial", "#7db3e8"), ("random 0.20 128x128", "#2f6db5"), ("random 0.10 128x128", "#1d4a80")):
        ours = [r for r in rows if r["mask"] == mask and r["kernel"] in ("triton", "hopper")]
        best = min(ours, key=lambda r: r["ms"])
        bars.append((f"{mask.split()[0]} mask, density {best['density']:.2f}", best["ms"], color))
    for i, (name, ms, color) in enumerate(bars):
        axes.barh(i, ms, color=color)
        axes.text(ms, i, f" {name}: {ms:.1f} ms", va="center", fontsize=8)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * bars[0][1])
    axes.set_xlabel(
        f"one attention call, {SEQ_LEN:,} tokens, {benchmark['machine']['gpu']}, bf16, milliseconds", fontsize=8
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    parser.add_argument("--benchmark", type=Path, required=True, help="output of scripts/bench_block_sparse.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=("small", "large"), default="large")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    videos = clips({"small": (64, 96), "large": (96, 160)}[args.size], args.seed)
    contact_sheet(videos, 1 if args.size == "large" else 2).save(args.output / "contact_sheet.png", optimize=True)
    figure = picture(videos, json.loads(args.benchmark.read_text()))
    figure.savefig(args.output / "picture.png", bbox_inches="tight")


if __name__ == "__main__":
    main()
