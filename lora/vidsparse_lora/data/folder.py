"""A folder of videos with captions, read by ffmpeg, cut and scaled to the lengths and sizes that are trained."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vidsparse.errors import ConfigError
from vidsparse_lora.data.cache import Clip, Skipped

SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CORRUPT, SHORT, NO_CAPTION, MISSING = "unreadable", "too short", "without a caption", "missing"


@dataclass(frozen=True)
class FolderVideo:
    """One video of a folder.

    lengths: allowed numbers of frames; the longest that the video fills is taken.
    sizes: allowed `(height, width)`; the one nearest to the video's shape is taken, edges beyond it are cut off.
    """

    path: Path
    name: str
    caption: str | None
    lengths: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    fps: float | None

    @property
    def identity(self) -> str:
        try:
            status = self.path.stat()
            content = (status.st_size, status.st_mtime_ns)
        except OSError:
            content = None
        return repr((self.name, content, self.caption, self.lengths, self.sizes, self.fps))

    def read(self) -> Clip:
        if not self.path.is_file():
            raise Skipped(MISSING)
        if not self.caption:
            raise Skipped(NO_CAPTION)
        frames = read_frames(self.path, max(self.lengths), self.fps)
        fitting = [length for length in self.lengths if length <= len(frames)]
        if not fitting:
            raise Skipped(SHORT)
        pixels = torch.from_numpy(np.stack(frames[: max(fitting)])).permute(3, 0, 1, 2)
        return Clip(self.caption, fit(pixels, nearest_size(pixels.shape[2], pixels.shape[3], self.sizes)))


def read_frames(path: Path, most: int, fps: float | None) -> list[np.ndarray]:
    """Up to `most` first frames, uint8 `[height, width, 3]`, at `fps` frames per second (None: all there are).

    Raises:
        Skipped: ffmpeg cannot read the file.
    """
    import imageio_ffmpeg

    options = ["-fps_mode", "passthrough"] if fps is None else ["-vf", f"fps={fps:g}"]
    frames: list[np.ndarray] = []
    try:
        reader = imageio_ffmpeg.read_frames(str(path), output_params=options)
        try:
            width, height = next(reader)["size"]
            for data in reader:
                frames.append(np.frombuffer(data, np.uint8).reshape(height, width, 3))
                if len(frames) == most:
                    break
        finally:
            reader.close()
    except Exception as error:
        # imageio-ffmpeg has no error of its own: broken files give OSError, RuntimeError, IndexError or StopIteration.
        raise Skipped(CORRUPT) from error
    if not frames:
        raise Skipped(CORRUPT)
    return frames


def nearest_size(height: int, width: int, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The size of the nearest shape, among equal shapes the largest that needs no enlarging, else the smallest."""
    shape = math.log(width / height)

    def distance(size: tuple[int, int]) -> tuple[float, bool, int]:
        enlarges = size[0] > height or size[1] > width
        area = size[0] * size[1]
        return (round(abs(math.log(size[1] / size[0]) - shape), 3), enlarges, area if enlarges else -area)

    return min(sizes, key=distance)


def fit(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scale uint8 `[3, frames, h, w]` to cover `size`, cut the middle out; float in [-1, 1]."""
    height, width = size
    frames = pixels.transpose(0, 1).float() / 127.5 - 1
    factor = max(height / frames.shape[2], width / frames.shape[3])
    covering = (max(height, round(frames.shape[2] * factor)), max(width, round(frames.shape[3] * factor)))
    if covering != frames.shape[2:]:
        frames = F.interpolate(frames, covering, mode="bilinear", antialias=True)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return frames[:, :, top : top + height, left : left + width].transpose(0, 1).clamp(-1, 1).contiguous()


def folder_videos(
    folder: str | Path, lengths: tuple[int, ...], sizes: list[tuple[int, int]], fps: float | None
) -> list[FolderVideo]:
    """The videos of a folder with their captions, by name.

    Captions come from `metadata.jsonl` or `metadata.csv` (`file_name`, and `text` or `caption`), which then lists the
    videos; else from a `.txt` of the same name beside each video, in subfolders too. For lengths of one frame images count
    as videos.

    Raises:
        ConfigError: there is no such folder, or its metadata cannot be read.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ConfigError(f"`data` must be 'clips' or a folder of videos; there is no folder {str(folder)!r}.")
    captions = _metadata(root)
    if captions is None:
        known = SUFFIXES + (IMAGE_SUFFIXES if min(lengths) == 1 else ())
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in known and p.is_file())
        captions = {str(p.relative_to(root)): _text_beside(p) for p in files}
    return [
        FolderVideo(root / name, name, caption, tuple(sorted(lengths)), tuple(sizes), fps)
        for name, caption in sorted(captions.items())
    ]


def _text_beside(path: Path) -> str | None:
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _metadata(root: Path) -> dict[str, str | None] | None:
    for name in ("metadata.jsonl", "metadata.csv"):
        path = root / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
            if name.endswith(".csv"):
                rows = list(csv.DictReader(text.splitlines()))
            else:
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            return {str(row["file_name"]): (row.get("text") or row.get("caption") or None) for row in rows}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{str(path)!r} cannot be read; every row needs `file_name`, and `text` or `caption`."
            ) from error
    return None
