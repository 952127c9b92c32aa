"""From `--output` to the file each prompt gets."""

from __future__ import annotations

from pathlib import Path

from vidsparse.errors import OutputError

from .prompts import slug
from .video import target_of


def is_folder(output: str) -> bool:
    """Whether `output` names a folder for automatically named files: it exists as one, ends in a slash or has no suffix."""
    return output.endswith(("/", "\\")) or Path(output).is_dir() or not Path(output).suffix


def name_output(output: str | None, prompt: str, seed: int, num_frames: int, index: int | None = None) -> Path:
    """The path for one prompt.

    Args:
        output: what the user gave: a file, a folder, or None for the current folder.
        prompt: names the file inside a folder.
        seed: part of the automatic name.
        num_frames: one frame becomes a PNG.
        index: position among several prompts; None for a single one.

    An automatic name that is taken gets a number; a file named by the user is replaced.

    Raises:
        OutputError: several prompts, one file.
    """
    if output is not None and not is_folder(output):
        if index is not None:
            raise OutputError(f"Several prompts cannot share the file {output!r}; give --output a folder.")
        return Path(output).expanduser()
    folder = Path(output or ".").expanduser()
    stem = f"{slug(prompt)}-seed{seed}"
    if index is not None:
        stem = f"{index:03d}-{stem}"
    suffix = ".png" if num_frames == 1 else ".mp4"
    path, number = folder / (stem + suffix), 2
    while target_of(path, num_frames).exists() or path.with_suffix(".json").exists():
        path = folder / f"{stem}-{number}{suffix}"
        number += 1
    return path
