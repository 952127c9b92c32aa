"""What the user sees while a video is made, on stderr."""

from __future__ import annotations

import sys
import time

from vidsparse_pipelines.progress import Estimate, Observer


def duration(seconds: float) -> str:
    """`0.4 s`, `7 s`, `2 min 05 s`, `1 h 03 min`."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def describe(remaining: Estimate | None) -> str:
    """The time left in words; `at most` while a kind of step has not been timed yet."""
    if remaining is None:
        return ""
    return f"{'at most ' if remaining.at_most else ''}{duration(remaining.seconds)} left"


class Screen(Observer):
    """Draws one line for each stage: live on a terminal, printed once when it ends elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal
        self._name, self._total, self._since = "", None, 0.0
        self._done, self._remaining, self._note = 0, "", ""

    def stage(self, name: str, total: int | None = None) -> None:
        self._end_line()
        self._name, self._total, self._since = name, total, time.perf_counter()
        self._done, self._remaining, self._note = 0, "", ""
        self._draw()

    def advance(self, done: int, remaining: Estimate | None = None, note: str = "") -> None:
        self._done, self._note = done, note
        self._remaining = describe(remaining) if done != self._total else ""
        self._draw()

    def note(self, text: str) -> None:
        self._clear()
        self._console.print(text, style="yellow", markup=False, soft_wrap=True)
        self._draw()

    def close(self) -> None:
        """Finish the last line."""
        self._end_line()

    def _line(self) -> str:
        parts = [f"{self._name:8}"]
        if self._total:
            filled = 24 * self._done // self._total
            parts.append("━" * filled + "╌" * (24 - filled) + f" {self._done}/{self._total}")
        parts.append(duration(time.perf_counter() - self._since))
        parts += [part for part in (self._remaining, self._note and f"({self._note} step)") if part]
        return "  ".join(parts)

    def _clear(self) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()

    def _draw(self) -> None:
        if self._live and self._name:
            self._clear()
            sys.stderr.write(self._line()[: max(20, self._console.width - 1)])
            sys.stderr.flush()

    def _end_line(self) -> None:
        if not self._name:
            return
        self._note = ""
        self._clear()
        sys.stderr.write(self._line() + "\n")
        sys.stderr.flush()
        self._name = ""
