"""One error budget spent over all cells (layer x step range, heads apart): the multiple-choice knapsack behind `tune`.

Errors and costs of cells add up, so for a price L of a unit of time the best table takes in every cell, by itself, the
choice with the least error + L * cost (Lagrange). Raising L walks along the convex hull of what can be had; between the
last two tables cells are switched greedily, by saved time for added error. The result is optimal but for the gap of one
cell, and one pass over the cells costs nothing, so L is bisected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vidsparse.methods.tuned import DENSE, SKIP

MIX_COST = 0.02
"""Joining the lists of several methods in one call, as a share of a dense call: an estimate from its launches."""

Choice = str | tuple[str, ...]
"""Label of what a whole layer does, or one label for each head."""
Table = list[list[Choice]]
"""Choice by layer and step range."""


@dataclass(frozen=True)
class CellErrors:
    """What was measured in one layer and step range.

    Attributes:
        by_head: for each label, squared error of each head's attention output over the squared norm of the whole
            layer's, so that heads add up.
        l1_by_head: for each label, mean absolute error over mean absolute output of each head.
        density: of each label.
        weight: squared change of the model's prediction for a unit of relative squared error here.
    """

    by_head: dict[str, list[float]]
    l1_by_head: dict[str, list[float]]
    density: dict[str, float]
    weight: float

    def error(self, choice: Choice) -> float:
        """Relative squared error of the layer's attention output."""
        if isinstance(choice, str):
            return 0.0 if choice == DENSE else sum(self.by_head[choice])
        return sum(0.0 if label == DENSE else self.by_head[label][head] for head, label in enumerate(choice))


@dataclass
class Problem:
    """All cells with the prices of the choices.

    Attributes:
        cells: by layer and step range.
        steps: denoising steps of each range.
        gains: for each range and method, mean squared error of the video for a unit of weighted error.
        prices: for each label, time of a call over that of a dense one; by cell where it depends on the density.
        full_price: of heads that are dense inside a sparse call.
        whole: labels that a whole layer may have.
        heads: labels that single heads may have, empty for none.
        methods: of each label.
    """

    cells: list[list[CellErrors]]
    steps: list[int]
    gains: list[dict[str, float]]
    prices: list[list[dict[str, float]]]
    full_price: float
    whole: Sequence[str]
    heads: Sequence[str]
    methods: dict[str, str]
    _scale: float = field(init=False)

    def __post_init__(self) -> None:
        self._scale = 1.0 / (len(self.cells) * sum(self.steps))

    @property
    def num_heads(self) -> int:
        return len(next(iter(self.cells[0][0].by_head.values())))

    def gain(self, step_range: int, label: str) -> float:
        """Video error for a unit of weighted error; the mean of the measured methods for another one."""
        known = self.gains[step_range]
        return known.get(self.methods[label], sum(known.values()) / len(known))

    def error(self, layer: int, step_range: int, choice: Choice) -> float:
        """Share of the video's mean squared error that a choice causes."""
        cell = self.cells[layer][step_range]
        if choice == DENSE:
            return 0.0
        if isinstance(choice, str):
            return self.gain(step_range, choice) * cell.weight * sum(cell.by_head[choice])
        return sum(self.head_error(layer, step_range, head, label) for head, label in enumerate(choice))

    def head_error(self, layer: int, step_range: int, head: int, label: str) -> float:
        if label == DENSE:
            return 0.0
        cell = self.cells[layer][step_range]
        return self.gain(step_range, label) * cell.weight * cell.by_head[label][head]

    def price(self, layer: int, step_range: int, label: str, beside: bool = False) -> float:
        """Time of a label over that of a dense call; `beside` heads of another label."""
        if label == SKIP:
            return 0.0
        if label == DENSE:
            return self.full_price if beside else 1.0
        return self.prices[layer][step_range][label]

    def cost(self, layer: int, step_range: int, choice: Choice) -> float:
        """Share of the dense run's attention time."""
        if isinstance(choice, str):
            price = self.price(layer, step_range, choice)
        else:
            price = MIX_COST + sum(self.price(layer, step_range, x, True) for x in choice) / len(choice)
        return price * self.steps[step_range] * self._scale

    def total(self, table: Table) -> tuple[float, float]:
        """Predicted mean squared error of the video, and share of the dense run's attention time."""
        places = [(i, r, choice) for i, row in enumerate(table) for r, choice in enumerate(row)]
        return sum(self.error(*place) for place in places), sum(self.cost(*place) for place in places)

    def at_price(self, price: float) -> Table:
        """The best table where a dense run's attention time is worth `price` of squared error."""
        return [[self._best(layer, r, price) for r in range(len(self.steps))] for layer in range(len(self.cells))]

    def _best(self, layer: int, step_range: int, price: float) -> Choice:
        candidates: list[Choice] = [DENSE, *self.whole]
        if self.heads:
            mixed = tuple(self._best_head(layer, step_range, head, price) for head in range(self.num_heads))
            candidates.append(mixed if len(set(mixed)) > 1 or mixed[0] == SKIP else mixed[0])

        def value(choice: Choice) -> tuple[float, float]:
            error = self.error(layer, step_range, choice)
            return error + price * self.cost(layer, step_range, choice), error

        return min(candidates, key=value)

    def _best_head(self, layer: int, step_range: int, head: int, price: float) -> str:
        share = self.steps[step_range] * self._scale / self.num_heads

        def value(label: str) -> float:
            cost = self.price(layer, step_range, label, True) * share
            return self.head_error(layer, step_range, head, label) + price * cost

        return min((DENSE, *self.heads), key=value)


def within_error(problem: Problem, budget: float) -> Table:
    """The fastest table whose predicted mean squared error is at most `budget`."""

    def fits(error: float, cost: float) -> bool:
        return error <= budget

    low, high = 0.0, 1e-12
    while fits(*problem.total(problem.at_price(high))) and high < 1e30:
        low, high = high, high * 10
    for _ in range(80):
        middle = (low + high) / 2
        if fits(*problem.total(problem.at_price(middle))):
            low = middle
        else:
            high = middle
    return _fill(problem, problem.at_price(low), problem.at_price(high), fits, by_error=False)


def within_cost(problem: Problem, budget: float) -> Table:
    """The most exact table whose share of the dense attention time is at most `budget`, or the fastest there is."""
    # Seen from the other end: the price must be high enough.
    low, high = 0.0, 1.0
    while problem.total(problem.at_price(high))[1] > budget and high < 1e30:
        low, high = high, high * 10
    for _ in range(80):
        middle = (low + high) / 2
        if problem.total(problem.at_price(middle))[1] > budget:
            low = middle
        else:
            high = middle
    table = problem.at_price(high)
    return _fill(problem, table, problem.at_price(low), lambda error, cost: cost <= budget, by_error=True)


def _fill(
    problem: Problem, table: Table, towards: Table, fits: Callable[[float, float], bool], by_error: bool
) -> Table:
    """Switch cells to their choice in another table as long as the whole fits, best exchange first."""
    table = [list(row) for row in table]
    moves = []
    for layer, row in enumerate(towards):
        for r, choice in enumerate(row):
            if choice == table[layer][r]:
                continue
            now = problem.error(layer, r, table[layer][r]), problem.cost(layer, r, table[layer][r])
            then = problem.error(layer, r, choice), problem.cost(layer, r, choice)
            gain = abs(now[1] - then[1]) / max(abs(now[0] - then[0]), 1e-30)
            moves.append((1 / gain if by_error and gain else gain, layer, r, choice))
    for _, layer, r, choice in sorted(moves, key=lambda move: -move[0]):
        kept, table[layer][r] = table[layer][r], choice
        if not fits(*problem.total(table)):
            table[layer][r] = kept
    return table
