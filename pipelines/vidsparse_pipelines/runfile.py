"""The JSON beside each video: everything needed to make it again."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from .video import output_error

FORMAT = "vidsparse-run"
FORMAT_VERSION = 1


def versions() -> dict[str, str]:
    """Versions of what shapes the result."""
    import diffusers
    import torch
    import transformers

    import vidsparse

    return {
        "vidsparse": vidsparse.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write `document` to a temporary file in the same folder and rename it.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary: str | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.stem}.", suffix=".json", delete=False
        ) as file:
            temporary = file.name
            json.dump(document, file, indent=2, ensure_ascii=False)
            file.write("\n")
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
