"""Is the target met on prompts that the tuning never saw, and what do tuned recipes gain over untuned ones and over rules?

    python scripts/evaluate_tuning.py --output runs/tuning --targets 26,30,34 --price-tokens 32760 --device cuda

On the bundled model. One calibration serves all: the budget rule at each target, the two published rules at the same
share of the attention time, and every method by its own schedule (a quarter of the steps and the first layer dense). All
make the same held-out prompts from the same noise. Written are results.json, with the cost of each as a share of the
dense attention time at the prices in force, and the recipes. The run ends within --seconds and writes what it has.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from vidsparse_pipelines.compare import Clip, bootstrap, held_out_prompts
from vidsparse_pipelines.environment import environment
from vidsparse_pipelines.progress import Observer
from vidsparse_pipelines.tune import MENUS, RULE_MENUS, Target, prepare
from vidsparse_pipelines.tune_calibration import clip_psnrs, psnr_of
from vidsparse_pipelines.tune_rules import RULES, uniform


class Notes(Observer):
    def stage(self, name: str, total: int | None = None) -> None:
        print(f"{time.perf_counter() - STARTED:6.1f} s  {name}", flush=True)

    def note(self, text: str) -> None:
        print(f"          {text}", flush=True)


STARTED = time.perf_counter()
LAYERS = "layers"
"""The budget rule with all heads of a layer alike."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--targets", default="26,30,34")
    parser.add_argument("--size", default="160x96", help="WIDTHxHEIGHT")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=16, help="of the calibration")
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--price-tokens", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--menu", default="cuda", help=f"{' or '.join(sorted(MENUS))}, or choices, comma-separated")
    parser.add_argument("--rules", default=",".join([*RULES, LAYERS]), help="baselines; may be empty")
    parser.add_argument(
        "--untuned", default="", help="methods by their own schedule, default all choices but the rules'"
    )
    parser.add_argument("--seconds", type=float, default=240)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    width, height = map(int, args.size.split("x"))
    choices, rules = (
        list(MENUS.get(args.menu) or args.menu.split(",")),
        [rule for rule in args.rules.split(",") if rule],
    )
    for rule in rules:
        choices += [label for label in RULE_MENUS.get(rule, ()) if label not in choices]

    def tuning(target: Target, name: str, rule: str = "budget", by_head: bool = True) -> Any:
        return prepare(
            args.output / f"{name}.json", target, choices=choices, rule=rule, num_prompts=args.prompts,
            by_head=by_head, probe_clips=args.batch, price_tokens=args.price_tokens, observer=Notes(),
            width=width, height=height, num_frames=args.frames, num_inference_steps=args.steps, device=args.device,
            dtype=args.dtype,
        )  # fmt: skip

    first = None
    clips = [Clip(text, 90_000 + i) for i, (text, _) in enumerate(held_out_prompts(args.held_out, seed=1))]
    batches = [clips[i : i + args.batch] for i in range(0, len(clips), args.batch)]
    rows: dict[str, Any] = {}
    tables: list[tuple[str, Any, dict[str, Any]]] = []
    for text in args.targets.split(","):
        one = tuning(Target(psnr=float(text)), f"budget-{text}")
        if first is not None:
            one.calibration = first.calibration
        data = one.run()
        first = first or one
        best = data["best"]
        table = next(x["table"] for x in one.rounds if x["psnr"] == best["psnr"])
        facts = {
            "target": float(text),
            "calibration": [{k: v for k, v in x.items() if k != "table"} for x in one.rounds],
        }
        tables.append((f"budget {text} dB", table, facts))
    assert first is not None
    problem = first.calibration.problem()
    dense = np.concatenate([first.calibration.generate(batch)[0] for batch in batches])

    def evaluate(name: str, table: Any, facts: dict[str, Any]) -> None:
        if time.perf_counter() - STARTED > args.seconds:
            return
        error, cost = problem.total(table)
        frames, seconds, density = first.calibration.run_table(table, batches)
        psnrs = clip_psnrs(frames, dense)
        rows[name] = {
            **facts, "attention": cost, "predicted_psnr": psnr_of(error), "psnr": bootstrap(psnrs),
            "clips": [round(x, 2) for x in psnrs], "density": density, "seconds": seconds / len(clips),
        }  # fmt: skip
        print(
            f"{name:40} cost {cost:.3f}  {statistics.fmean(psnrs):5.2f} dB  predicted {psnr_of(error):5.2f}",
            flush=True,
        )
        document = {
            "command": shlex.join(["python", *sys.argv]), "environment": environment(), "settings": vars(args),
            "choices": choices, "calibration": first.calibration.state, "held_out": rows,
        }  # fmt: skip
        (args.output / "results.json").write_text(json.dumps(document, indent=1, default=str) + "\n")

    for name, table, facts in tables:
        evaluate(name, table, facts)
    for name, table, _ in list(tables):
        cost = problem.total(table)[1]
        for rule in rules:
            first.rule = "budget" if rule == LAYERS else rule
            known = first.calibration.problem(by_head=rule != LAYERS)
            evaluate(f"{rule} at the time of {name}", first.solve(known, None, cost), {"rule": rule})
        first.rule = "budget"
    for label in [] if args.untuned == "none" else args.untuned.split(",") if args.untuned else choices:
        if args.untuned or ("kind=" not in label and "top_p=" not in label):
            evaluate(f"untuned {label}", uniform(problem, label), {"rule": "untuned"})


if __name__ == "__main__":
    main()
