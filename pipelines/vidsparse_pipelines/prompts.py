"""Prompt files, and words that a model's tokenizer does not know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a text file, one per line; blank lines and lines starting with `#` are skipped.

    Raises:
        ConfigError: the file is missing, unreadable or has no prompt.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"The prompt file {str(path)!r} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The prompt file {str(path)!r} is not UTF-8 text.") from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ConfigError(f"The prompt file {str(path)!r} has no prompt; write one prompt per line.")
    return prompts


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words of `prompt` that the tokenizer maps to its unknown token, in order, each once."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return []
    words = dict.fromkeys(re.findall(r"[\w'-]+", prompt))
    return [word for word in words if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]


def slug(prompt: str, length: int = 48) -> str:
    """A file name from a prompt: lower-case words joined by dashes, at most `length` characters."""
    text = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))
    if len(text) > length:
        text = text[: length + 1].rpartition("-")[0] or text[:length]
    return text or "video"
