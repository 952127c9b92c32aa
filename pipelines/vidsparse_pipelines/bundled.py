"""Where the model that ships with the package lives."""

from __future__ import annotations

from pathlib import Path

from vidsparse.errors import ModelLoadError

BUNDLED_MODEL = "vidsparse-tiny"


def bundled_model_path(name: str = BUNDLED_MODEL) -> Path:
    """Folder of the bundled model.

    Raises:
        ModelLoadError: this installation lacks the files.
    """
    path = Path(__file__).parent / "models" / name
    if not (path / "model_index.json").is_file():
        raise ModelLoadError(
            f"The bundled model {name!r} is missing from this installation; reinstall vidsparse, "
            "or give another model with --model (a hub id or a local diffusers folder)."
        )
    return path


def bundled_adapters() -> dict[str, Path]:
    """The adapters of the bundled model that ship with the package, by name; `docs/lora.md` has what they give."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "models" / "adapters").glob("*.safetensors"))}
