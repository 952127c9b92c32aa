"""Draw what each method gives for its work and for its time, and print both as tables.

    python scripts/plot_fronts.py --evaluation RESULTS.json --parts PARTS.json --output docs/fronts.png

RESULTS.json is of scripts/evaluate_tiny_model.py with --baseline, PARTS.json of scripts/bench_method_parts.py. A method
stands in the pictures of time where both files have it with the same options; where a choice of blocks serves several
steps, the mean call is reckoned from the parts: one whole call, and the others without cluster and select. Needs
`pip install .[plot]`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vidsparse.plots import pyplot

STYLES = {
    "random": ("#9aa4b1", "x"),
    "radial": ("#d98a1f", "D"),
    "svg1": ("#b0552d", "v"),
    "pooled": ("#7db3e8", "s"),
    "pisa": ("#2f6db5", "o"),
    "semantic": ("#6aa84f", "^"),
    "vidsparse": ("#c2185b", "*"),
    "sla": ("#7e57c2", "P"),
}
DENSE = "radial:density=1"
"""Dense attention through our kernel: how far rounding alone moves a clip."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    evaluation = json.loads(arguments.evaluation.read_text())
    timings = [row for row in json.loads(arguments.parts.read_text())["rows"] if "error" not in row]
    points = measured(evaluation)
    print(quality_table(points))
    print(time_table(timings))
    draw(points, timings, evaluation, arguments.output)


def measured(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each method that ran sparse or through our kernel."""
    points = []
    for label, entry in evaluation["methods"].items():
        if "report" not in entry or "psnr_against_dense" not in entry:
            continue
        name = label.removesuffix(":min_tokens=0")
        psnr, right = entry["psnr_against_dense"], entry["adherence"]["all_right"]
        points.append(
            {
                "name": name,
                "method": name.split(":")[0],
                "plain": name.count(":") == 1,
                "density": entry["report"]["sparse_density"],
                "psnr": psnr["mean"],
                "interval": psnr["bootstrap95"],
                "median": psnr["median"],
                "ssim": entry["ssim_against_dense"]["mean"],
                "minus": entry.get("minus_baseline"),
                "right": f"{right['right']} of {right['count']}" if "right" in right else str(right["share"]),
            }
        )
    return points


def quality_table(points: list[dict[str, Any]]) -> str:
    lines = [
        "| method | density | PSNR, mean (95 %) | median | minus the baseline, clip by clip (95 %) | SSIM | all right |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in sorted(points, key=lambda p: p["psnr"]):
        minus = "" if p["minus"] is None else spread(p["minus"]["psnr"], "+.1f")
        lines.append(
            f"| `{p['name']}` | {p['density']:.2f} | {p['psnr']:.1f} ({p['interval'][0]:.1f}–{p['interval'][1]:.1f}) | "
            f"{p['median']:.1f} | {minus} | {p['ssim']:.3f} | {p['right']} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: dict[str, Any], form: str) -> str:
    low, high = values["bootstrap95"]
    return f"{values['mean']:{form}} ({low:{form}} to {high:{form}})"


def time_table(timings: list[dict[str, Any]]) -> str:
    names = ("cluster", "select", "permute", "attend", "correct", "restore")
    lines = [
        f"| shape | method | density | call, ms | of dense | {' | '.join(names)} | overhead | of uniform's rate |",
        "|---|---|---|---|---|" + "---|" * (len(names) + 2),
    ]
    for row in timings:
        parts = " | ".join(f"{row['parts'][name]:.2f}" if name in row["parts"] else "" for name in names)
        lines.append(
            f"| {row['shape']} | `{row['method']}` | {row['density']:.2f} | {row['ms']:.2f} | {row['ratio']:.2f} | "
            f"{parts} | {row['overhead']:.1%} | {row.get('rate_of_uniform', '')} |"
        )
    return "\n".join(lines) + "\n"


def call_ms(name: str, timings: list[dict[str, Any]], shape: str) -> float | None:
    """Milliseconds of a mean call at a shape, where measured."""
    head, *pairs = name.split(":")
    options = dict(pair.split("=") for pair in pairs)
    every = int(options.pop("refresh_every", 1))
    if "keep" in options:
        return None
    plain = ":".join([head, *(f"{key}={value}" for key, value in options.items())])
    for row in timings:
        if row["shape"] == shape and row["method"] == plain:
            chosen = row["parts"].get("cluster", 0) + row["parts"].get("select", 0)
            return row["ms"] - chosen * (every - 1) / every
    return None


def draw(points: list[dict[str, Any]], timings: list[dict[str, Any]], evaluation: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    shapes = list(dict.fromkeys(row["shape"] for row in timings))
    figure, axes = plt.subplots(1, 1 + len(shapes), figsize=(5.2 * (1 + len(shapes)), 5), dpi=110, sharey=True)
    axes = [axes] if not shapes else list(axes)
    floor = next((p for p in points if p["name"] == DENSE), None)
    sparse = [p for p in points if p["name"] != DENSE]
    series(axes[0], [(p, p["density"]) for p in sparse])
    axes[0].set_xlabel("density: computed share of the (query, key) pairs")
    axes[0].set_ylabel("PSNR against stock dense attention, dB")
    axes[0].set_xlim(0, None)
    for ax, shape in zip(axes[1:], shapes, strict=True):
        dense = next(row["dense_ms"] for row in timings if row["shape"] == shape)
        found = [(p, call_ms(p["name"], timings, shape)) for p in sparse]
        series(ax, [(p, ms) for p, ms in found if ms is not None])
        ax.axvline(dense, color="black", linewidth=1)
        ax.text(dense, ax.get_ylim()[0], " dense", va="bottom", fontsize=8)
        ax.set_xlim(0, None)
        ax.set_xlabel(f"milliseconds of one call, all counted, {shape}")
    for ax in axes:
        if floor is not None:
            ax.axhline(floor["psnr"], color="#9aa4b1", linestyle="--", linewidth=1)
            ax.text(ax.get_xlim()[1] * 0.97, floor["psnr"], "dense, other kernel", ha="right", va="bottom", fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.02, 0.93))
    clips = max(entry["clips"] for entry in evaluation["methods"].values())
    figure.suptitle(
        f"Bundled model, 160x96, 81 frames, {clips} prompts, {evaluation['device']}: means with 95 % intervals; hollow "
        "marks: with the option beside",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path)


def series(ax: Any, points: list[tuple[dict[str, Any], float]]) -> None:
    """A line for each method's plain form; its other forms as hollow marks."""
    for method, (color, marker) in STYLES.items():
        plain = sorted(((p, x) for p, x in points if p["method"] == method and p["plain"]), key=lambda pair: pair[1])
        if plain:
            y = [p["psnr"] for p, _ in plain]
            low, high = ([abs(p["interval"][i] - p["psnr"]) for p, _ in plain] for i in (0, 1))
            ax.errorbar(
                [x for _, x in plain], y, (low, high), color=color, marker=marker, markersize=7, label=method,
                linewidth=1.5, elinewidth=0.5,
            )  # fmt: skip
        others = sorted(
            ((p, x) for p, x in points if p["method"] == method and not p["plain"]), key=lambda t: t[0]["psnr"]
        )
        for number, (p, x) in enumerate(others):
            ax.plot(x, p["psnr"], color=color, marker=marker, markerfacecolor="white", markersize=8, linestyle="")
            left = p["density"] > 0.4
            place = (-7, -3) if left else (7, 10 * number - 16)
            text = p["name"].split(":", 2)[-1].replace(":", ", ")
            ax.annotate(
                text,
                (x, p["psnr"]),
                xytext=place,
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=7,
            )


if __name__ == "__main__":
    main()
