"""Prompt files, and words that a model's tokenizer does not know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError

SHOWN_WORDS = 12


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
    # Words, and runs of symbols beyond ASCII such as emoji; ASCII punctuation carries no meaning worth a note.
    words = dict.fromkeys(re.findall(r"\w+(?:['-]\w+)*|[^\w\s\x00-\x7f]+", prompt))
    return [word for word in words if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]


def prompt_notes(tokenizer: Any, prompt: str, max_tokens: int | None = None, bundled: bool = False) -> list[str]:
    """What the user should know about how the model reads `prompt`.

    Args:
        tokenizer: the model's.
        prompt: the prompt.
        max_tokens: how many tokens the model reads; None if not known.
        bundled: the model is the bundled one, whose colours are either an object's or a background's.
    """
    notes = []
    unknown = unknown_words(tokenizer, prompt)
    if unknown:
        named = ", ".join(unknown[:SHOWN_WORDS]) + (", …" if len(unknown) > SHOWN_WORDS else "")
        notes.append(f"The model does not know these words of the prompt: {named}.")
    number = len(tokenizer(prompt)["input_ids"])
    if max_tokens is not None and number > max_tokens:
        notes.append(f"The prompt has {number} tokens; the model reads only the first {max_tokens}.")
    return notes + (misplaced_colors(prompt) if bundled else [])


def misplaced_colors(prompt: str) -> list[str]:
    """Notes on colours that the bundled model knows, but not in the place where the prompt has them."""
    from .clips.grammar import BACKGROUNDS, COLORS, SHAPES

    words = re.findall(r"[a-z]+", prompt.lower())
    notes = []
    for word, *following in zip(words, [*words[1:], ""], [*words[2:], "", ""], strict=False):
        # At most one word stands between a colour and its noun: "white dotted background", "navy striped star".
        stop = following[0] in (*COLORS, *BACKGROUNDS, *SHAPES, "background")
        noun = following[0] if stop else following[1]
        if word in COLORS and noun == "background":
            notes.append(f"The model was never shown a {word} background; it knows {', '.join(BACKGROUNDS)}.")
        if word in BACKGROUNDS and noun in SHAPES:
            notes.append(f"The model was never shown a {word} {noun}; it knows {', '.join(COLORS)}.")
    return list(dict.fromkeys(notes))


def slug(prompt: str, length: int = 48) -> str:
    """A file name from a prompt: lower-case words joined by dashes, at most `length` characters."""
    text = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))
    if len(text) > length:
        text = text[: length + 1].rpartition("-")[0] or text[:length]
    return text or "video"
