"""Latents and text embeddings on disk: one safetensors file a sample, written under a temporary name, with its hash.

A run that was stopped while encoding goes on where it was, and the next run with the same data encodes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from vidsparse.errors import ConfigError, ModelLoadError
from vidsparse_lora.files import sha256_of, write_bytes
from vidsparse_pipelines.runfile import write_json
from vidsparse_pipelines.weights import check_safetensors

IN_MEMORY_BYTES = 4 * 2**30
"""Samples are kept in memory up to this much."""


@dataclass(frozen=True)
class Clip:
    """One video, ready to be encoded.

    pixels: `[3, frames, height, width]` in [-1, 1].
    """

    caption: str
    pixels: Tensor


class Skipped(Exception):
    """A video that cannot be used; its text is the reason, in a few words that are the same for every such video."""


class Source(Protocol):
    """One video that may or may not have been encoded yet."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def read(self) -> Clip:
        """Raises Skipped."""
        ...


@dataclass(frozen=True)
class Sample:
    """One encoded video.

    latents: `[channels, latent frames, h, w]`, float32.
    text: `[tokens, dim]`, float32.
    image: `[tokens, dim]`, float32, what the model gets of a picture beside its latents; None for most.
    """

    caption: str
    latents: Tensor
    text: Tensor
    image: Tensor | None = None


@dataclass(frozen=True)
class Entry:
    """Where a sample lies and what shape its latents have."""

    path: Path
    caption: str
    shape: tuple[int, ...]


class Encoder(Protocol):
    def encode_video(self, clips: Tensor) -> Tensor: ...

    def encode_text(self, captions: Sequence[str]) -> list[Tensor]: ...

    def encode_first_frame(self, clips: Tensor) -> Tensor | None: ...


class LatentCache:
    """Samples of a data set.

    Args:
        folder: where they are kept; one folder may serve several data sets and models.
        model: identity of the model, part of every sample's name.
        log: told how the encoding goes.
    """

    def __init__(self, folder: Path, model: dict[str, Any], log: Callable[[str], None]) -> None:
        self.folder, self.model, self.log = folder, json.dumps(model, sort_keys=True), log
        self.entries: list[Entry] = []
        self.skipped: dict[str, str] = {}
        self._kept: dict[Path, Sample] = {}
        self._room = IN_MEMORY_BYTES

    def _path(self, identity: str) -> Path:
        name = hashlib.sha256(f"{self.model}\n{identity}".encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def fill(self, sources: Sequence[Source], encoder: Encoder, batch_size: int = 1) -> None:
        """Encode what is missing. What cannot be used is counted, listed in `skipped.json`, and left out.

        Raises:
            ConfigError: nothing is left.
            OutputError: a file cannot be written; those written stay good.
        """
        waiting: list[tuple[Path, Clip]] = []
        encoded = 0
        for source in sources:
            path = self._path(source.identity)
            entry = read_entry(path)
            if entry is None:
                try:
                    clip = source.read()
                except Skipped as reason:
                    self.skipped[source.name] = str(reason)
                    continue
                if waiting and waiting[0][1].pixels.shape != clip.pixels.shape:
                    encoded += self._encode(waiting, encoder)
                waiting.append((path, clip))
                if len(waiting) == batch_size:
                    encoded += self._encode(waiting, encoder)
                    if encoded % (32 * batch_size) == 0:
                        self.log(f"encoded {encoded} of at most {len(sources)} videos")
            else:
                self.entries.append(entry)
        encoded += self._encode(waiting, encoder)
        self.entries.sort(key=lambda entry: entry.path)
        self._say(encoded, len(sources))

    def _say(self, encoded: int, total: int) -> None:
        if self.skipped:
            reasons = Counter(self.skipped.values())
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "skipped.json", dict(self.skipped))
            self.log(
                f"skipped {len(self.skipped)} of {total} videos: {counts}; listed in {self.folder / 'skipped.json'}"
            )
        if not self.entries:
            first = next(iter(self.skipped.items()), None)
            why = f"all {total} were skipped, {first[0]!r} because it is {first[1]}" if first else "there is no video"
            raise ConfigError(f"The data set is empty: {why}.")
        self.log(f"{len(self.entries)} videos, {encoded} encoded now")

    def _encode(self, waiting: list[tuple[Path, Clip]], encoder: Encoder) -> int:
        if not waiting:
            return 0
        pixels = torch.stack([clip.pixels for _, clip in waiting])
        latents, images = encoder.encode_video(pixels).cpu(), encoder.encode_first_frame(pixels)
        texts = encoder.encode_text([clip.caption for _, clip in waiting])
        for index, (path, clip) in enumerate(waiting):
            latent = latents[index]
            tensors = {"latents": latent.contiguous(), "text": texts[index].contiguous()}
            if images is not None:
                tensors["image"] = images[index].cpu().contiguous()
            metadata = {
                "caption": clip.caption,
                "sha256": _content_hash(tensors),
                "shape": json.dumps(list(latent.shape)),
            }
            write_bytes(path, save(tensors, metadata), wait=False)
            self.entries.append(Entry(path, clip.caption, tuple(latent.shape)))
        count = len(waiting)
        waiting.clear()
        return count

    def load(self, entry: Entry) -> Sample:
        """Read a sample and check its hash.

        Raises:
            ModelLoadError: the file is damaged.
        """
        if entry.path in self._kept:
            return self._kept[entry.path]
        try:
            tensors = load(entry.path.read_bytes())
            with safe_open(entry.path, "pt") as file:
                expected = file.metadata()["sha256"]
            whole = _content_hash(tensors) == expected
        except Exception as error:
            raise _damaged(entry.path) from error
        if not whole:
            raise _damaged(entry.path)
        sample = Sample(entry.caption, tensors["latents"], tensors["text"], tensors.get("image"))
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if size <= self._room:
            self._room -= size
            self._kept[entry.path] = sample
        return sample


def _damaged(path: Path) -> ModelLoadError:
    return ModelLoadError(f"The cached sample {str(path)!r} is damaged; remove it and start again, it is made anew.")


def _content_hash(tensors: dict[str, Tensor]) -> str:
    return sha256_of(save({name: tensors[name] for name in sorted(tensors)}))


def read_entry(path: Path) -> Entry | None:
    """What a cached file holds, None where there is none or a broken one; only its header is read."""
    if not path.is_file():
        return None
    try:
        check_safetensors(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        return Entry(path, metadata["caption"], tuple(json.loads(metadata["shape"])))
    except (ModelLoadError, KeyError, TypeError, ValueError):
        return None
