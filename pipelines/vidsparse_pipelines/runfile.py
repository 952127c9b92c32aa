"""The JSON beside each video: everything needed to make it again."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError, OutputError

from .model_info import ModelInfo
from .provenance import input_hashes, model_identity
from .settings import GenerateSettings
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


def json_path(path: Path) -> Path:
    """Where the JSON of what was asked for as `path` goes: `clip.json` for `clip.mp4`.

    Where that name belongs to something else, such as the user's config or a `clip.gif`, it is `clip.mp4.json`.

    Raises:
        OutputError: both names belong to something else.
    """
    for name in (path.with_suffix(".json"), path.with_name(path.name + ".json")):
        if not name.exists() or _is_json_of(name, path):
            return name
    raise OutputError(f"{path.name + '.json'!r} is there and is not of a {path.name!r}; choose another --output.")


def read_run(path: str | Path) -> dict[str, Any]:
    """The JSON beside a video.

    Raises:
        ConfigError: it cannot be read, or is no run file of this version.
    """
    try:
        document = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"The run file {str(path)!r} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"The run file {str(path)!r} is not JSON; give the .json beside a video.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT or "settings" not in document:
        raise ConfigError(f"{str(path)!r} is no run file; give the .json that `vidsparse generate` left by a video.")
    check_version(document, path)
    return document


def check_version(document: dict[str, Any], path: str | Path) -> None:
    """Raise ConfigError where a run file has another form than this version writes."""
    if document.get("format_version") != FORMAT_VERSION:
        made_by = document.get("versions", {}).get("vidsparse", "another version")
        raise ConfigError(
            f"The run file {str(path)!r} has version {document.get('format_version')!r} of the format (vidsparse "
            f"{made_by}), this reads version {FORMAT_VERSION}; make the video anew, or use that version of vidsparse."
        )


def run_document(path: str | Path) -> dict[str, Any] | None:
    """The content of a run file, None where the path holds something else."""
    try:
        document = json.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and document.get("format") == FORMAT else None


def changes(document: dict[str, Any], settings: GenerateSettings, info: ModelInfo) -> list[str]:
    """A sentence for the model, the image and every LoRA whose content is not what it was when a run was made."""
    notes, was, now = [], document.get("model"), model_identity(info)
    if isinstance(was, dict) and was.get("name") == info.name and was.get("covers") == now.get("covers"):
        # What a hash covers depends on the size of the weights; hashes of different things say nothing.
        if any(was.get(name) != now.get(name) for name in ("commit", "sha256")):
            notes.append(
                f"The model {info.name!r} has changed since this run was made; the video will not be the same."
            )
    hashes = document.get("inputs_sha256")
    for path, digest in input_hashes(settings).items():
        if isinstance(hashes, dict) and hashes.get(path, digest) != digest:
            notes.append(f"The file {path!r} has changed since this run was made; the video will not be the same.")
    return notes


def _is_json_of(file: Path, path: Path) -> bool:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("format") == FORMAT and document.get("output") == path.name


def compact_report(report: Any) -> dict[str, Any]:
    """A report without its row per layer, step and branch: what they say in a few lines.

    Returns:
        `Report.to_dict()` without `rows`, and `dense`: for every reason, the layers and steps that ran dense for it, as
        groups `{"reason", "layers", "steps", "calls"}` in which every layer has all the steps. A cell of `matrix` with
        sparse calls is not dense, even at density 1.
    """
    data = report.to_dict()
    data.pop("rows", None)
    matrix = data["matrix"]
    matrix["density"] = [[None if v is None else round(v, 4) for v in line] for line in matrix["density"]]
    steps: dict[tuple[str, int], set[int | None]] = {}
    calls: dict[tuple[str, int], int] = {}
    for row in report.rows:
        if row.reason is not None:
            steps.setdefault((row.reason, row.layer), set()).add(row.step)
            calls[row.reason, row.layer] = calls.get((row.reason, row.layer), 0) + row.calls
    groups: dict[tuple[str, frozenset[int | None]], dict[str, Any]] = {}
    for (reason, layer), of_layer in sorted(steps.items(), key=lambda item: item[0]):
        empty = {"reason": reason, "layers": [], "steps": [s for s in matrix["steps"] if s in of_layer], "calls": 0}
        group = groups.setdefault((reason, frozenset(of_layer)), empty)
        group["layers"].append(layer)
        group["calls"] += calls[reason, layer]
    data["dense"] = list(groups.values())
    data["tokens"] = sorted({row.tokens for row in report.rows})
    data["backend_reasons"] = {row.backend: row.backend_reason for row in report.rows if row.backend_reason}
    return data


def _dump(document: dict[str, Any]) -> str:
    """Indented JSON with lists of plain values on one line. Only real line breaks match: those in strings are escaped."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda found: "[" + re.sub(r",\n\s+", ", ", found[1]) + "]", text)


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
            file.write(_dump(document) + "\n")
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
