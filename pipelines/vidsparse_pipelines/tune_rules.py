"""The rules of two published methods, as tables over the same measurements: what `tune` is compared with.

Both choose for each head once and for all sparse steps, keep the first quarter of the steps and the first layer dense, and
weigh no head by what its error does to the video. Each has one knob, which `tune` turns until the target is met.
"""

from __future__ import annotations

from collections.abc import Callable

from vidsparse.methods.tuned import DENSE, SKIP

from .tune_budget import Choice, Problem, Table

WARM_UP = 0.25
DENSE_LAYERS = 1


def sparse_vdit(problem: Problem, knob: float) -> Table:
    """Sparse-vDiT (arXiv 2506.03065): the pattern with the least MSE(O_pattern, O_dense) + knob * density, by head.

    Patterns: full, skipped, spatial band, temporal band (as labelled). The paper keeps a head full where the least exceeds
    an epsilon it does not publish; here that is `knob`, the value of the full pattern itself.

    Args:
        problem: with the patterns as head labels; squared errors stand for the MSE, up to a factor for each layer.
        knob: the paper's lambda, from 0 (all dense).
    """
    patterns = [label for label in problem.heads if label == SKIP or "kind=" in label]

    def of(layer: int, head: int, ranges: list[int]) -> str:
        def value(label: str) -> float:
            if label == DENSE:
                return knob
            cells = [problem.cells[layer][r] for r in ranges]
            error = sum(cell.by_head[label][head] for cell in cells) / len(cells)
            density = sum(cell.density[label] for cell in cells) / len(cells)
            return error + knob * density

        return min((DENSE, *patterns), key=value)

    return _static(problem, of)


def sparge(problem: Problem, knob: float) -> Table:
    """SpargeAttn (arXiv 2502.18137): for each head the sparsest threshold whose relative L1 error stays below `knob`.

    Their tuning asks for less than 0.07. The candidates are the pooled choices by softmax mass (`top_p`); the test of
    blocks for self-similarity, their kernel's own skipping and quantisation are not part of it.

    Args:
        problem: with `pooled` choices by `top_p` as head labels.
        knob: bound on the L1 error.
    """
    thresholds = [label for label in problem.heads if "top_p=" in label]

    def of(layer: int, head: int, ranges: list[int]) -> str:
        cells = [problem.cells[layer][r] for r in ranges]
        fitting = [x for x in thresholds if max(cell.l1_by_head[x][head] for cell in cells) < knob]
        return min(fitting, key=lambda x: sum(cell.density[x] for cell in cells), default=DENSE)

    return _static(problem, of)


RULES: dict[str, Callable[[Problem, float], Table]] = {"sparse-vdit": sparse_vdit, "sparge": sparge}


def warm_up_ranges(steps: list[int]) -> int:
    """Ranges that lie in the dense warm-up."""
    done, total = 0, sum(steps)
    for index, count in enumerate(steps):
        if done + count > WARM_UP * total + 0.5:
            return index
        done += count
    return len(steps)


def _static(problem: Problem, of: Callable[[int, int, list[int]], str]) -> Table:
    first = warm_up_ranges(problem.steps)
    ranges = list(range(first, len(problem.steps)))
    table: Table = []
    for layer in range(len(problem.cells)):
        if layer < DENSE_LAYERS or not ranges:
            table.append([DENSE for _ in problem.steps])
            continue
        heads = tuple(of(layer, head, ranges) for head in range(problem.num_heads))
        same = len(set(heads)) == 1 and heads[0] != SKIP
        choice: Choice = heads[0] if same else heads
        table.append([DENSE] * first + [choice] * len(ranges))
    return table


def uniform(problem: Problem, label: str) -> Table:
    """What a method does by its own schedule: one choice everywhere but in the warm-up and the first layer."""
    first = warm_up_ranges(problem.steps)
    sparse: list[Choice] = [DENSE if r < first else label for r in range(len(problem.steps))]
    dense: list[Choice] = [DENSE for _ in problem.steps]
    return [dense if layer < DENSE_LAYERS else sparse for layer in range(len(problem.cells))]
