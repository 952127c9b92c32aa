"""Progress of a generation: stages, steps, and an estimate that knows dense from sparse steps."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("load", "encode", "denoise", "decode", "write")


class Observer:
    """Receives progress. The default does nothing; the CLI draws it."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage of `STAGES` begins; `total` units of work if known."""

    def advance(self, done: int, remaining: Estimate | None = None, note: str = "") -> None:
        """`done` units of the current stage are finished."""

    def note(self, text: str) -> None:
        """Something the user should know, such as a snapped frame count."""


@dataclass(frozen=True)
class Estimate:
    """Seconds left. `at_most`: a kind of step not seen yet was counted at the cost of the slowest kind seen."""

    seconds: float
    at_most: bool = False


class StepClock:
    """Running mean of the step time per kind (`dense`, `sparse`), and the time left for a list of kinds to come.

    The very first step pays for caches and compilation; it is left out as soon as another step of its kind is known.
    """

    def __init__(self) -> None:
        self._first: tuple[str, float] | None = None
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, seconds: float) -> None:
        """Record one finished step."""
        if self._first is None:
            self._first = (kind, seconds)
            return
        self._sums[kind] = self._sums.get(kind, 0.0) + seconds
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def mean(self, kind: str) -> float | None:
        """Mean seconds of a step of `kind`, None if none was seen."""
        if self._counts.get(kind):
            return self._sums[kind] / self._counts[kind]
        return self._first[1] if self._first is not None and self._first[0] == kind else None

    def estimate(self, kinds_left: list[str]) -> Estimate | None:
        """Time for the steps in `kinds_left`; None before the first step."""
        if self._first is None:
            return None
        known = [m for m in (self.mean(kind) for kind in {*self._counts, self._first[0]}) if m is not None]
        total, at_most = 0.0, False
        for kind in kinds_left:
            mean = self.mean(kind)
            at_most = at_most or mean is None
            total += max(known) if mean is None else mean
        return Estimate(total, at_most)
