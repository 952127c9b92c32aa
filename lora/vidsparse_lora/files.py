"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from vidsparse.errors import OutputError
from vidsparse_pipelines.video import output_error


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_bytes(path: Path, data: bytes, wait: bool = True) -> None:
    """Write under a temporary name, wait for the disk, rename. What had the name before stays until then.

    Args:
        path: the file.
        data: its content.
        wait: False for files that are checked when read and can be made again, where waiting costs more than it saves.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            if wait:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        sentence = str(output_error(path, error)).replace("--output", "`output_dir`")
        raise OutputError(sentence) from error
