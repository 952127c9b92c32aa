"""What ran: one row per layer, step, branch and way of running, for one generation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from vidsparse.schedule import ASKED_FOR

MAX_ROWS = 200_000
"""Rows kept per generation (40 layers x 50 steps x 2 branches are 4,000); calls beyond are only counted."""

DENSE_ON = "dense on "
"""Before the name of our kernel: the backend of a dense call that ran on it."""

MAX_UNSETTLED = 20_000
"""Rows whose densities may wait on a device."""


@dataclass(frozen=True)
class Row:
    """Attention calls of one layer in one step and branch that ran in the same way.

    Attributes:
        layer: index among the layers that may be sparse.
        name: module path of the layer.
        step: denoising step, None outside a generation (training).
        branch: guidance branch as the pipeline names it ("cond", "uncond"), None where it does not.
        backend: "dense", the model's own attention; "dense on hopper", all blocks by our kernel; or the backend of the
            block-sparse call.
        density: computed blocks / all blocks; 1.0 when dense. A tensor on the device until the report is read.
        tokens: sequence length.
        reason: why it ran dense, None when sparse.
        backend_reason: why this backend; of a sparse call in the words of the kernels package.
        calls: number of calls.
        agreement: least agreement with exact attention that the guard measured, None where it did not. Something with
            an `agreement()` until the report is read.
    """

    layer: int
    name: str
    step: int | None
    branch: str | None
    backend: str
    density: float
    tokens: int
    reason: str | None = None
    backend_reason: str | None = None
    calls: int = 1
    agreement: Any = None

    @property
    def is_fallback(self) -> bool:
        """Dense for a reason that the recipe did not ask for."""
        return self.reason is not None and self.reason not in ASKED_FOR


@dataclass(frozen=True)
class Raised:
    """A layer that the guard made attend more.

    Attributes:
        layer, name: as in `Row`.
        step: from which on.
        agreement: in the step before, which fell short.
        action: "density 0.50", "attends more" (where the density depends on the video) or "dense".
    """

    layer: int
    name: str
    step: int | None
    agreement: float
    action: str


class Report:
    """Rows of one generation, newest settings last; memory is bounded.

    Attributes:
        guard: the agreement that the guard asks for, None without one.
        raised: what it did.
        notes: sentences about the run as a whole, such as a density that could not be reached.
        dropped_calls: calls that are counted but have no row of their own.
    """

    def __init__(self, rows: Iterable[Row] = (), notes: Iterable[str] = ()) -> None:
        self._rows: dict[tuple[Any, ...], Row] = {}
        self._unsettled: list[Row] = []
        self.notes: list[str] = list(dict.fromkeys(notes))
        self.guard: float | None = None
        self.raised: list[Raised] = []
        self.dropped_calls = 0
        for row in rows:
            self.add(row)

    @property
    def rows(self) -> list[Row]:
        self._settle()
        return list(self._rows.values())

    def _settle(self) -> None:
        """Read what was left on the device: the densities all at once."""
        if not self._unsettled:
            return
        import torch

        rows, self._unsettled = self._unsettled, []
        rows = [row if row.agreement is None else replace(row, agreement=row.agreement.agreement()) for row in rows]
        by_device: dict[Any, list[Row]] = {}
        for row in rows:
            by_device.setdefault(torch.as_tensor(row.density).device, []).append(row)
        for together in by_device.values():
            densities = torch.stack([torch.as_tensor(row.density) for row in together]).tolist()
            for row, density in zip(together, densities, strict=True):
                settled = isinstance(row.density, int | float)
                self.add(row if settled else replace(row, density=round(density, 4)))

    def add(self, row: Row) -> None:
        """Add a row, or its calls to the row that is equal but for the number of calls."""
        if not isinstance(row.density, int | float) or not isinstance(row.agreement, float | None):
            self._unsettled.append(row)
            if len(self._unsettled) >= MAX_UNSETTLED:
                self._settle()
            return
        identity = (row.layer, row.name, row.step, row.branch, row.backend, row.density, row.tokens, row.reason)
        present = self._rows.get(identity)
        if present is not None:
            agreements = [x.agreement for x in (present, row) if x.agreement is not None]
            self._rows[identity] = replace(
                present, calls=present.calls + row.calls, agreement=min(agreements, default=None)
            )
        elif len(self._rows) < MAX_ROWS:
            self._rows[identity] = row
        else:
            self.dropped_calls += row.calls

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def clear(self) -> None:
        self._rows.clear()
        self._unsettled.clear()
        self.notes.clear()
        self.guard = None
        self.raised.clear()
        self.dropped_calls = 0

    @property
    def num_calls(self) -> int:
        return sum(row.calls for row in self.rows) + self.dropped_calls

    @property
    def num_sparse_calls(self) -> int:
        return sum(row.calls for row in self.rows if row.reason is None)

    @property
    def sparse_density(self) -> float | None:
        """Mean density of the sparse calls, None when there were none."""
        calls = self.num_sparse_calls
        if calls == 0:
            return None
        return sum(row.density * row.calls for row in self.rows if row.reason is None) / calls

    @property
    def mean_density(self) -> float | None:
        """Mean density of all calls, dense ones as 1.0; None when there were none."""
        calls = sum(row.calls for row in self.rows)
        return sum(row.density * row.calls for row in self.rows) / calls if calls else None

    @property
    def dense_calls(self) -> dict[str, int]:
        """Number of dense calls by reason, most frequent first."""
        counts: dict[str, int] = {}
        for row in self.rows:
            if row.reason is not None:
                counts[row.reason] = counts.get(row.reason, 0) + row.calls
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def dense_kernels(self) -> dict[str, int]:
        """Number of dense calls by the kernel of ours that they ran on; the others were the model's own attention."""
        counts: dict[str, int] = {}
        for row in self.rows:
            if row.backend.startswith(DENSE_ON):
                name = row.backend.removeprefix(DENSE_ON)
                counts[name] = counts.get(name, 0) + row.calls
        return counts

    @property
    def fallbacks(self) -> list[Row]:
        """Rows that ran dense although the recipe did not ask for it."""
        return [row for row in self.rows if row.is_fallback]

    @property
    def backends(self) -> dict[str, int]:
        """Number of calls by backend."""
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row.backend] = counts.get(row.backend, 0) + row.calls
        return counts

    def matrix(self) -> tuple[list[int], list[int | None], list[list[float | None]]]:
        """Mean density as layers x steps.

        Returns:
            Layer indices, step indices, and one list per layer with one density per step (None: not called).
        """
        layers, steps = self._places()
        sums: dict[tuple[int, int | None], tuple[float, int]] = {}
        for row in self.rows:
            total, calls = sums.get((row.layer, row.step), (0.0, 0))
            sums[row.layer, row.step] = (total + row.density * row.calls, calls + row.calls)
        cells: list[list[float | None]] = [
            [sums[layer, step][0] / sums[layer, step][1] if (layer, step) in sums else None for step in steps]
            for layer in layers
        ]
        return layers, steps, cells

    def _places(self) -> tuple[list[int], list[int | None]]:
        layers = sorted({row.layer for row in self.rows})
        return layers, sorted({row.step for row in self.rows}, key=lambda step: -1 if step is None else step)

    @property
    def least_agreement(self) -> float | None:
        """The least that the guard measured, None where it measured nothing."""
        return min((row.agreement for row in self.rows if row.agreement is not None), default=None)

    def guard_dict(self) -> dict[str, Any] | None:
        """What the guard saw and did, as plain values; None without a guard.

        Its `agreement` is a list per layer with one value per step, in the order of `matrix`: the least of the calls
        there, None where nothing was sparse.
        """
        if self.guard is None:
            return None
        layers, steps = self._places()
        least: dict[tuple[int, int | None], float] = {}
        for row in self.rows:
            if row.agreement is not None:
                least[row.layer, row.step] = min(row.agreement, least.get((row.layer, row.step), 1.0))
        seen = [row for row in self.rows if row.agreement is not None]
        return {
            "target": self.guard,
            "least": self.least_agreement,
            "calls": sum(row.calls for row in seen),
            "calls_below": sum(row.calls for row in seen if row.agreement < self.guard),
            "agreement": [[least.get((layer, step)) for step in steps] for layer in layers],
            "raised": [asdict(raised) for raised in self.raised],
        }

    def summary(self) -> str:
        """One line: "density 0.46 in 450 of 600 calls; dense: warm-up step 120 calls, dense layer 30 calls"."""
        if self.num_calls == 0:
            return "no attention call yet"
        density = self.sparse_density
        parts = [
            f"no sparse call among {self.num_calls} calls"
            if density is None
            else f"density {density:.2f} in {self.num_sparse_calls} of {self.num_calls} calls"
        ]
        if self.dense_calls:
            parts.append(
                "dense: "
                + ", ".join(f"{reason} {calls} calls" for reason, calls in self.dense_calls.items())
                + "".join(f" ({calls} on {name})" for name, calls in self.dense_kernels.items())
            )
        guard = self.guard_dict()
        if guard is not None and guard["least"] is not None:
            raised = len({raised.name for raised in self.raised})
            parts.append(
                f"guard {self.guard:g}: agreement at least {guard['least']:.3f}, "
                f"{raised} layer{'' if raised == 1 else 's'} raised"
            )
        return "; ".join(parts + self.notes)

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """Plain values: summary, totals, matrix and rows."""
        layers, steps, cells = self.matrix()
        return {
            "summary": self.summary(),
            "num_calls": self.num_calls,
            "num_sparse_calls": self.num_sparse_calls,
            "sparse_density": self.sparse_density,
            "mean_density": self.mean_density,
            "dense_calls": self.dense_calls,
            "dense_kernels": self.dense_kernels,
            "backends": self.backends,
            "notes": list(self.notes),
            "dropped_calls": self.dropped_calls,
            "guard": self.guard_dict(),
            "matrix": {"layers": layers, "steps": steps, "density": cells},
            "rows": [asdict(row) for row in self.rows],
        }

    @classmethod
    def merged(cls, reports: Iterable[Report]) -> Report:
        """One report with the rows and notes of several."""
        reports = list(reports)
        merged = cls((row for report in reports for row in report.rows), (n for r in reports for n in r.notes))
        merged.dropped_calls += sum(report.dropped_calls for report in reports)
        merged.guard = next((report.guard for report in reports if report.guard is not None), None)
        merged.raised = [raised for report in reports for raised in report.raised]
        return merged
