"""Check safetensors files before a loader meets them: a truncated download is named, not half loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from vidsparse.errors import ModelLoadError

_MAX_HEADER = 100 * 1024 * 1024


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file is whole: readable header, and exactly as many bytes as the header promises.

    Raises:
        ModelLoadError: names the file and what is wrong with it.
    """

    def broken(what: str) -> ModelLoadError:
        return ModelLoadError(f"The weights file {str(path)!r} {what}; download it again.")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if head.startswith(b"version "):
                raise broken("is a Git LFS pointer, not the weights themselves")
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(_MAX_HEADER, size - 8):
                raise broken("is truncated or no safetensors file")
            header = json.loads(file.read(length))
            end = max(
                (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
            )
    except OSError as error:
        raise ModelLoadError(f"The weights file {str(path)!r} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise broken("is corrupt (its header cannot be parsed)") from error
    if size != 8 + length + end:
        raise broken(f"is truncated ({size} bytes, its header promises {8 + length + end})")


def check_weights(folder: Path, components: Iterable[str]) -> None:
    """Check every safetensors file of the named component folders, and that no listed shard is missing.

    Raises:
        ModelLoadError: names the first broken or missing file.
    """
    for component in sorted(components):
        part = folder / component
        for index in sorted(part.glob("*.safetensors.index.json")):
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise ModelLoadError(f"The weights index {str(index)!r} cannot be read; download it again.") from error
            for shard in sorted(shards):
                if not (part / shard).is_file():
                    raise ModelLoadError(f"The weights file {str(part / shard)!r} is missing; download it again.")
        for file in sorted(part.glob("*.safetensors")):
            check_safetensors(file)
