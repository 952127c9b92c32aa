"""The knapsack of `tune` against every table there is, and the two published rules on tables worked out by hand."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from vidsparse_pipelines.tune import next_aim
from vidsparse_pipelines.tune_budget import MIX_COST, CellErrors, Problem, within_cost, within_error
from vidsparse_pipelines.tune_rules import sparge, sparse_vdit, uniform, warm_up_ranges

HEADS = 2


def problem(seed: int, layers: int = 2, ranges: int = 2, heads: tuple[str, ...] = ("a", "b")) -> Problem:
    rng = random.Random(seed)
    prices = {"a": 0.3, "b": 0.6, "whole": 0.2}

    def cell() -> CellErrors:
        rough = [rng.uniform(0.01, 1) for _ in range(HEADS)]
        by_head = {
            "a": rough,
            "b": [x * rng.uniform(0.05, 0.5) for x in rough],
            "whole": [0.3, 0.4],
            "skip": [0.5, 0.5],
        }
        return CellErrors(by_head, {}, {}, rng.uniform(0.1, 10))

    cells = [[cell() for _ in range(ranges)] for _ in range(layers)]
    gains = [{"a": rng.uniform(1, 5), "whole": rng.uniform(1, 5)} for _ in range(ranges)]
    methods = {"a": "a", "b": "a", "whole": "whole", "skip": "skip"}
    steps = [2, 6][:ranges]
    return Problem(cells, steps, gains, [[prices] * ranges] * layers, 1.05, ["a", "b", "whole"], heads, methods)


def every_table(p: Problem) -> list[Any]:
    single = ["dense", *p.whole]
    mixed = [c for c in itertools.product(("dense", *p.heads), repeat=HEADS) if len(set(c)) > 1] if p.heads else []
    rows = [list(row) for row in itertools.product([*single, *mixed], repeat=len(p.steps))]
    return [list(table) for table in itertools.product(rows, repeat=len(p.cells))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("heads", [(), ("a", "b")])
def test_close_to_the_best_of_all_tables(seed: int, heads: tuple[str, ...]) -> None:
    """What Lagrange leaves is at most what one cell can save."""
    p = problem(seed, heads=heads)
    totals = [p.total(table) for table in every_table(p)]
    largest = max(p.steps) / (len(p.cells) * sum(p.steps))
    for budget in (0.1, 1.0, 5.0, 20.0):
        error, cost = p.total(within_error(p, budget))
        best = min(cost for error, cost in totals if error <= budget)
        assert error <= budget and best - 1e-9 <= cost <= best + largest
    for budget in (0.25, 0.5, 0.8):
        error, cost = p.total(within_cost(p, budget))
        best = min(error for error, cost in totals if cost <= budget)
        assert cost <= budget and error >= best - 1e-9
        looser = min((error for error, cost in totals if cost <= budget - largest), default=float("inf"))
        assert error <= looser + 1e-9


def test_ends_of_the_scale() -> None:
    p = problem(0)
    assert within_error(p, 0.0) == [["dense", "dense"], ["dense", "dense"]]
    assert p.total(within_error(p, 0.0)) == (0, pytest.approx(1))
    fastest = p.total(within_error(p, 1e9))
    assert fastest[1] == pytest.approx(0.2) and p.total(within_cost(p, 1e-3)) == pytest.approx(fastest)


def test_heads_add_up() -> None:
    p = problem(1)
    cell, gain = p.cells[1][0], p.gains[0]["a"]
    expected = gain * cell.weight * (cell.by_head["a"][0] + cell.by_head["b"][1])
    assert p.error(1, 0, ("a", "b")) == pytest.approx(expected)
    assert p.cost(1, 0, ("a", "b")) == pytest.approx((MIX_COST + 0.45) * 2 / 16)
    assert p.cost(1, 0, ("dense", "a")) == pytest.approx((MIX_COST + (1.05 + 0.3) / 2) * 2 / 16)


def rules(by_head: dict[str, list[float]], l1: dict[str, list[float]], density: dict[str, float]) -> Problem:
    cells = [[CellErrors(by_head, l1, density, 1.0) for _ in range(4)] for _ in range(2)]
    labels = list(by_head)
    gains = [{"x": 1.0} for _ in range(4)]
    return Problem(cells, [1, 1, 2, 4], gains, [[density] * 4] * 2, 1.0, [], labels, dict.fromkeys(labels, "x"))


def test_sparse_vdit_takes_the_least_error_plus_density() -> None:
    bands = {"svg1:kind=spatial": [0.1, 0.02], "svg1:kind=temporal": [0.01, 0.3], "skip": [0.9, 0.5]}
    p = rules(bands, {}, {"svg1:kind=spatial": 0.3, "svg1:kind=temporal": 0.3, "skip": 0.0})
    dense = ["dense"] * 4
    assert sparse_vdit(p, 0.1) == [dense, ["dense", "dense", *[("svg1:kind=temporal", "svg1:kind=spatial")] * 2]]
    # The full pattern has error 0 and density 1; skipping, density 0.
    assert sparse_vdit(p, 0.02)[1][2:] == [("svg1:kind=temporal", "dense")] * 2 or sparse_vdit(p, 0.001) == [
        dense,
        dense,
    ]
    assert sparse_vdit(p, 5.0)[1][3] == ("skip", "skip")


def test_sparge_takes_the_sparsest_threshold_within_the_bound() -> None:
    labels = ["pooled:top_p=0.5", "pooled:top_p=0.9"]
    errors = {x: [0.0, 0.0] for x in labels}
    p = rules(errors, {labels[0]: [0.05, 0.2], labels[1]: [0.01, 0.06]}, {labels[0]: 0.2, labels[1]: 0.6})
    assert sparge(p, 0.07)[1] == ["dense", "dense", *[(labels[0], labels[1])] * 2]
    assert sparge(p, 0.03)[1][3] == (labels[1], "dense") and sparge(p, 0.3)[1][3] == labels[0]
    assert sparge(p, 0.07)[0] == ["dense"] * 4


def test_a_method_by_its_own_schedule() -> None:
    p = problem(0, ranges=2)
    assert warm_up_ranges(p.steps) == 1
    assert uniform(p, "a") == [["dense", "dense"], ["dense", "a"]]


def test_the_next_aim() -> None:
    assert next_aim([(28.0, 25.0)], 28.0) == 31.0
    assert next_aim([(28.0, 25.0), (31.0, 29.0)], 28.0) == pytest.approx(30.25)
    assert next_aim([(28.0, 27.0), (29.0, 27.0)], 28.0) == 30.0
