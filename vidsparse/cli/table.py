"""The table at the end: layers x steps, density, what ran dense and why."""

from __future__ import annotations

from typing import Any

DENSE = "dense"
MAX_COLUMNS = 12
MAX_RAISED = 12


def _cells(report: dict[str, Any]) -> tuple[list[int], list[int | None], list[list[str]]]:
    matrix = report["matrix"]
    dense = {(layer, step) for group in report["dense"] for layer in group["layers"] for step in group["steps"]}
    cells = [
        [
            # Below 1 some calls of the cell were sparse, whatever the others were.
            "" if value is None else DENSE if value == 1 and (layer, step) in dense else f"{value:.2f}"
            for step, value in zip(matrix["steps"], line, strict=True)
        ]
        for layer, line in zip(matrix["layers"], matrix["density"], strict=True)
    ]
    return matrix["layers"], matrix["steps"], cells


def runs(items: list[Any]) -> list[tuple[int, int]]:
    """Index ranges `[first, last]` of equal neighbours."""
    result: list[tuple[int, int]] = []
    for i, item in enumerate(items):
        if result and items[result[-1][0]] == item:
            result[-1] = (result[-1][0], i)
        else:
            result.append((i, i))
    return result


def _span(labels: list[Any], first: int, last: int) -> str:
    low, high = ("-" if labels[i] is None else str(labels[i]) for i in (first, last))
    return low if low == high else f"{low}-{high}"


def condense(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The report's matrix with equal neighbouring layers and steps merged.

    Returns:
        The header (`layers`, then step ranges) and one list of cells per range of layers. A cell is `dense` or a density;
        a range of densities `low..high` where more than `MAX_COLUMNS` columns had to be merged.
    """
    layers, steps, cells = _cells(report)
    columns = runs([[line[i] for line in cells] for i in range(len(steps))])
    if len(columns) > MAX_COLUMNS:
        size = -(-len(steps) // MAX_COLUMNS)
        columns = [(i, min(i + size, len(steps)) - 1) for i in range(0, len(steps), size)]
    header = [
        "layers",
        *(f"steps {_span(steps, *c)}" if c[0] != c[1] else f"step {_span(steps, *c)}" for c in columns),
    ]
    merged = [[_merge(line[first : last + 1]) for first, last in columns] for line in cells]
    body = [[_span(layers, first, last), *merged[first]] for first, last in runs(merged)]
    return header, body


def _merge(values: list[str]) -> str:
    distinct = sorted(set(values) - {""})
    if len(distinct) <= 1:
        return distinct[0] if distinct else ""
    return f"{distinct[0]}..{distinct[-1]}"


def print_report(console: Any, report: dict[str, Any]) -> None:
    """Print the condensed table, how many calls were sparse, and why the others were not."""
    from rich import box
    from rich.table import Table

    header, body = condense(report)
    console.print("Attention computed, by layer and step (1 is all of it):")
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    if body:
        console.print(table)
    for line in sentences(report):
        console.print(line, markup=False, soft_wrap=True)


def sentences(report: dict[str, Any]) -> list[str]:
    """How many calls were sparse and at what density, why others were dense, and the report's notes, a line each."""
    calls, sparse, density = report["num_calls"], report["num_sparse_calls"], report["sparse_density"]
    lines = [f"sparse: {sparse} of {calls} attention calls" + ("" if not sparse else f", density {density:.2f}")]
    if report["dense_calls"]:
        # Reports saved before dense calls had kernels of ours have none.
        kernels = "".join(f"; {count} of them on {name}" for name, count in report.get("dense_kernels", {}).items())
        reasons = ", ".join(f"{count} ({reason})" for reason, count in report["dense_calls"].items())
        lines.append(f"dense: {reasons}{kernels}")
    return lines + guard_lines(report) + [f"note: {note}" for note in report["notes"]]


def guard_lines(report: dict[str, Any]) -> list[str]:
    """What the guard saw, and what it did to which layers from which step on; nothing without a guard."""
    guard = report.get("guard")
    if guard is None:
        return []
    if guard["least"] is None:
        return [f"guard {guard['target']:g}: nothing was sparse"]
    below, calls = guard["calls_below"], guard["calls"]
    lines = [f"guard {guard['target']:g}: agreement at least {guard['least']:.3f}; below in {below} of {calls} calls"]
    groups: dict[tuple[int | None, str], list[dict[str, Any]]] = {}
    for raised in guard["raised"]:
        groups.setdefault((raised["step"], raised["action"]), []).append(raised)
    for (step, action), of in list(groups.items())[:MAX_RAISED]:
        names = ", ".join(f"{raised['layer']} ({raised['agreement']:.2f})" for raised in of)
        lines.append(f"  from step {step} {action}: layer{'s' if len(of) > 1 else ''} {names}")
    if len(groups) > MAX_RAISED:
        lines.append(f"  and {len(groups) - MAX_RAISED} more, in the JSON")
    return lines
