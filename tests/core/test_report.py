from __future__ import annotations

import json

import pytest

from vidsparse import report as module
from vidsparse.report import Report, Row


def row(layer: int = 0, step: int | None = 0, branch: str | None = "cond", **changes) -> Row:
    values = {"backend": "sdpa", "density": 0.5, "tokens": 64, **changes}
    return Row(layer, f"blocks.{layer}.attn1", step, branch, **values)


def dense(layer: int, step: int, reason: str, branch: str = "cond") -> Row:
    return row(layer, step, branch, backend="dense", density=1.0, reason=reason)


def test_summary_and_matrix():
    report = Report()
    for step in range(3):
        for branch in ("cond", "uncond"):
            for layer in range(2):
                if step == 0:
                    report.add(dense(layer, step, "warm-up step", branch))
                elif layer == 0:
                    report.add(dense(layer, step, "dense layer", branch))
                else:
                    report.add(row(layer, step, branch))
    assert report.summary() == "density 0.50 in 4 of 12 calls; dense: warm-up step 4 calls, dense layer 4 calls"
    assert str(report) == report.summary()
    assert report.mean_density == pytest.approx((8 + 4 * 0.5) / 12)
    assert report.matrix() == ([0, 1], [0, 1, 2], [[1.0, 1.0, 1.0], [1.0, 0.5, 0.5]])
    assert report.backends == {"dense": 8, "sdpa": 4}
    assert report.fallbacks == []


def test_equal_calls_share_a_row():
    report = Report([row(), row(), row(calls=2), row(step=7)])
    assert [(r.step, r.calls) for r in report.rows] == [(0, 4), (7, 1)]


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 2)
    report = Report(row(layer) for layer in range(5))
    assert (len(report.rows), report.num_calls, report.dropped_calls) == (2, 5, 3)


def test_fallbacks_are_what_the_recipe_did_not_ask_for():
    asked = [dense(0, 0, "warm-up step"), dense(0, 1, "dense layer"), dense(0, 2, "method dense")]
    fallback = dense(0, 3, "sequence below min_tokens")
    assert Report([*asked, fallback]).fallbacks == [fallback]


def test_to_dict_is_json():
    report = Report([row(), row(step=None)], notes=["a note", "a note"])
    data = json.loads(json.dumps(report.to_dict()))
    assert data["summary"].endswith("a note") and data["notes"] == ["a note"]
    assert data["matrix"]["steps"] == [None, 0]
    assert len(data["rows"]) == 2


def test_empty_and_merged():
    assert Report().summary() == "no attention call yet"
    assert (Report().mean_density, Report().sparse_density) == (None, None)
    merged = Report.merged([Report([row()]), Report([row(), row(1)], notes=["x"])])
    assert (merged.num_calls, len(merged.rows), merged.notes) == (3, 2, ["x"])


def test_only_dense():
    assert (
        Report([dense(0, 0, "warm-up step")]).summary() == "no sparse call among 1 calls; dense: warm-up step 1 calls"
    )
