"""Run block_sparse_attention on random cases against float64 until a number of cases or seconds is reached.

    python scripts/soak_block_sparse.py --cases 10000 --seconds 300 --workers 16 --output soak.json
    python scripts/soak_block_sparse.py --device cpu --backends reference,sdpa --seconds 30
    python scripts/soak_block_sparse.py --case 0:17            # only case 17 of seed 0, as a failure prints it

A case is drawn from (seed, index) alone (`soak_cases.py`): lengths, heads, strides, mask, bias, scale, and whether
gradients go through the output, the LSE or both. Every backend asked for computes it, and every result has to be as
near to float64 as eager attention at the same dtype, by `assert_close_to_oracle`. What a backend does not do is counted
with its reason. All memory that torch hands out during a call holds NaN, so that an element nobody wrote shows.

With `--workers N` the cases are shared out to N processes, all cases of one combination to the same one, so that each
kernel is compiled once and the processes compile in parallel.

Exit code: 0 all right, 1 something is wrong, 2 the arguments are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from soak_cases import LARGE_DIMS, LARGE_ELEMENTS, Case, make_case, make_pool, number_of_combination
from soak_checks import attend, budget_used, dense_sdpa, oracle
from torch import Tensor

from vidsparse_kernels import available_backends
from vidsparse_kernels.testing import assert_close_to_oracle

REPEAT_EVERY = 50
MAX_FAILURES = 20
DEFAULT_MAX_TOKENS = {"cuda": 1500, "cpu": 200}
DEFAULT_BACKENDS = {"cuda": ("triton", "hopper"), "cpu": ("reference", "sdpa")}
GRACE_SECONDS = 60
"""What a worker gets beyond `--seconds` for the case that it is in, which may be compiling."""


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments is None:
        return 2
    if arguments.workers and arguments.share is None and arguments.index is None:
        result = run_workers(arguments)
    else:
        soak = Soak(arguments)
        soak.run()
        result = soak.report()
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "command": command_line(arguments),
        "workers": arguments.workers,
        "dtypes": arguments.dtypes,
        **result,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.share is None:
        print_report(report)
    return 1 if report["num_failures"] or report["stopped"] or not report["cases"] else 0


def parse(argv: list[str] | None) -> argparse.Namespace | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="stop after so many (default 10000)")
    parser.add_argument("--seconds", type=float, default=300, help="stop after so long, compiling included (300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backends", help="comma-separated; default: triton,hopper on cuda, reference,sdpa on cpu")
    parser.add_argument("--kind", choices=("all", "uniform", "variable"), default="all", help="of block sizes")
    parser.add_argument("--dtypes", help="run only the cases of these, as bfloat16,float32; default all")
    parser.add_argument("--max-tokens", type=int, help="longest sequence; default 1500 on cuda, 200 on cpu")
    parser.add_argument("--combinations", type=int, default=40, help="size of the pool (default 40)")
    parser.add_argument("--large", action="store_true", help="also strides that lead beyond int32; 5 GB a worker")
    parser.add_argument("--workers", type=int, default=0, help="processes to share the cases out to (default none)")
    parser.add_argument("--case", metavar="SEED:INDEX", help="run this case only")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    problem = None
    if arguments.device == "cuda" and not torch.cuda.is_available():
        problem = "--device cuda needs a CUDA GPU"
    if arguments.max_tokens is None:
        arguments.max_tokens = DEFAULT_MAX_TOKENS[arguments.device]
    if arguments.large and arguments.device != "cuda":
        problem = "--large needs --device cuda"
    if arguments.workers < 0:
        problem = f"--workers must be at least 0, got {arguments.workers}"
    installed = available_backends()
    if arguments.backends is None:
        arguments.backends = [name for name in DEFAULT_BACKENDS[arguments.device] if name in installed]
    else:
        arguments.backends = arguments.backends.split(",")
    for name in arguments.backends:
        if name not in installed:
            problem = f'--backends must name some of {", ".join(installed)}, got "{name}"'
    arguments.index = None
    if arguments.case is not None:
        seed, _, index = arguments.case.partition(":")
        if not (seed.isdigit() and index.isdigit()):
            problem = f'--case must be SEED:INDEX, got "{arguments.case}"'
        else:
            arguments.seed, arguments.index = int(seed), int(index)
    for name in arguments.dtypes.split(",") if arguments.dtypes else ():
        if name not in ("bfloat16", "float16", "float32"):
            problem = f'--dtypes must name some of bfloat16, float16, float32, got "{name}"'
    if problem:
        print(problem, file=sys.stderr)
        return None
    return arguments


def command_line(arguments: argparse.Namespace) -> str:
    """The options that decide what a case of a given number is."""
    words = [
        "python scripts/soak_block_sparse.py", f"--device {arguments.device}",
        f"--backends {','.join(arguments.backends)}", f"--kind {arguments.kind}",
        f"--max-tokens {arguments.max_tokens}", f"--combinations {arguments.combinations}",
    ]  # fmt: skip
    return " ".join(words + ["--large"] * arguments.large)


class Soak:
    """Runs the cases of this process and keeps count."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.pool = arguments, make_pool(arguments)
        self.cases, self.seconds, self.num_failures = 0, 0.0, 0
        self.failures: list[dict[str, Any]] = []
        self.stopped: str | None = None
        self.backends = {
            name: {
                "forward": 0, "backward": 0, "repeated": 0, "variable": 0, "by_dtype": Counter(),
                "by_head_dim": Counter(), "not_done": Counter(), "worst": {},
            }
            for name in arguments.backends
        }  # fmt: skip
        self.buffer: Tensor | None = None

    def indices(self) -> list[int]:
        arguments = self.arguments
        if arguments.index is not None:
            return [arguments.index]
        if arguments.share is None:
            return list(range(arguments.cases))
        mine, shares = (int(x) for x in arguments.share.split("/"))
        return [i for i in range(arguments.cases) if number_of_combination(arguments, self.pool, i) % shares == mine]

    def run(self) -> None:
        arguments, started = self.arguments, time.monotonic()
        wanted = arguments.dtypes.split(",") if arguments.dtypes else None
        for index in self.indices():
            dtype = self.pool[number_of_combination(arguments, self.pool, index)].dtype
            if wanted and str(dtype).removeprefix("torch.") not in wanted:
                continue
            self.seconds = time.monotonic() - started
            if self.seconds > arguments.seconds and arguments.index is None or self.stopped:
                break
            self.cases += 1
            # Whatever a case dies of is a finding, and the next one still counts.
            try:
                case = make_case(arguments, self.pool, index, self.large_buffer(index))
                truth = oracle(case, torch.float64)
                eager = oracle(case, case.combination.dtype)
            except Exception as error:
                self.fail("none: inputs or oracle", index, {}, error)
                continue
            for name in arguments.backends:
                try:
                    self.check(name, case, truth, eager, repeat=index % REPEAT_EVERY == 0)
                except Exception as error:
                    self.fail(name, index, case.about, error)
            for view in case.views:
                view.fill_(torch.nan)
        self.seconds = time.monotonic() - started

    def large_buffer(self, index: int) -> Tensor | None:
        """Memory for strides beyond int32, once a case needs it."""
        combination = self.pool[number_of_combination(self.arguments, self.pool, index)]
        if self.buffer is None and combination.layouts[0] in LARGE_DIMS:
            self.buffer = torch.full((LARGE_ELEMENTS,), torch.nan, dtype=torch.bfloat16, device="cuda")
        return self.buffer

    def check(self, name: str, case: Case, truth: dict, eager: dict, *, repeat: bool) -> None:
        counts = self.backends[name]
        got, refusals = attend(name, case)
        counts["not_done"].update(refusals)
        if not got:
            return
        if name == "sdpa":
            eager = {"output": dense_sdpa(case)}
        with_gradients = "gradient of query" in got
        counts["backward" if with_gradients else "forward"] += 1
        counts["variable"] += case.combination.num_blocks != (None, None)
        counts["by_dtype"][str(case.combination.dtype).removeprefix("torch.")] += 1
        counts["by_head_dim"][str(case.combination.head_dim)] += 1
        for quantity, actual in got.items():
            expected = torch.float32 if quantity == "lse" else case.combination.dtype
            assert actual.dtype == expected, f"{quantity}: {actual.dtype}, expected {expected}"
            assert_close_to_oracle(actual, eager[quantity], truth[quantity], name=quantity)
            ratio = budget_used(actual, eager[quantity], truth[quantity])
            if ratio > counts["worst"].get(quantity, {"ratio": -1})["ratio"]:
                counts["worst"][quantity] = {"ratio": ratio, "case": case.name}
        if repeat:
            counts["repeated"] += 1
            again, _ = attend(name, case)
            for quantity, actual in got.items():
                assert torch.equal(actual, again[quantity]), f"{quantity}: other bits when run again"

    def fail(self, backend: str, index: int, about: dict[str, Any], error: Exception) -> None:
        self.num_failures += 1
        case = f"{self.arguments.seed}:{index}"
        if len(self.failures) < MAX_FAILURES:
            self.failures.append(
                {
                    "backend": backend,
                    "error": f"{type(error).__name__}: {str(error)[:500]}",
                    "reproduce": f"{command_line(self.arguments)} --case {case}",
                    **about,
                }
            )
        if self.arguments.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                self.stopped = f"the GPU does nothing more after case {case}: {str(lost)[:200]}"

    def report(self) -> dict[str, Any]:
        return {
            "seed": self.arguments.seed,
            "cases": self.cases,
            "seconds": round(self.seconds, 1),
            "combinations": len(self.pool),
            "stopped": self.stopped,
            "num_failures": self.num_failures,
            "failures": self.failures,
            "backends": self.backends,
        }


def run_workers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Share the cases out to processes of this script and add up their reports."""
    started = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), *command_line(arguments).split()[2:]]
    command += ["--seed", str(arguments.seed), "--cases", str(arguments.cases), "--seconds", str(arguments.seconds)]
    command += ["--dtypes", arguments.dtypes] if arguments.dtypes else []
    reports, lost = [], []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{i}.json" for i in range(arguments.workers)]
        workers = [
            subprocess.Popen(
                [*command, "--share", f"{i}/{arguments.workers}", "--output", str(output)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            for i, output in enumerate(outputs)
        ]
        for number, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
            try:
                worker.wait(max(1.0, arguments.seconds + GRACE_SECONDS - (time.monotonic() - started)))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            if output.exists():
                reports.append(json.loads(output.read_text()))
            else:
                lost.append(f"worker {number} ended with code {worker.returncode} and reported nothing")
    result = merge(reports, arguments.backends)
    result["seconds"] = round(time.monotonic() - started, 1)
    result["stopped"] = "; ".join([*([result["stopped"]] if result["stopped"] else []), *lost]) or None
    return result


def merge(reports: list[dict[str, Any]], backends: list[str]) -> dict[str, Any]:
    """One report of several processes."""
    total: dict[str, Any] = {name: sum(r[name] for r in reports) for name in ("cases", "num_failures")}
    total["combinations"] = max((r["combinations"] for r in reports), default=0)
    total["seed"] = reports[0]["seed"] if reports else None
    total["stopped"] = "; ".join(r["stopped"] for r in reports if r["stopped"])
    total["failures"] = [failure for r in reports for failure in r["failures"]][:MAX_FAILURES]
    total["backends"] = {}
    for name in backends:
        parts = [r["backends"][name] for r in reports]
        merged: dict[str, Any] = {
            key: sum(part[key] for part in parts) for key in ("forward", "backward", "repeated", "variable")
        }
        total["backends"][name] = merged
        for key in ("by_dtype", "by_head_dim", "not_done"):
            merged[key] = sum((Counter(part[key]) for part in parts), Counter())
        merged["worst"] = {}
        for part in parts:
            for quantity, worst in part["worst"].items():
                if worst["ratio"] > merged["worst"].get(quantity, {"ratio": -1})["ratio"]:
                    merged["worst"][quantity] = worst
    return total


def print_report(report: dict[str, Any]) -> None:
    print("  ".join(f"{name} {report[name]}" for name in ("date", "gpu", "torch", "triton", "commit")))
    print(f"{report['cases']} cases in {report['seconds']} s, {report['num_failures']} failures")
    for name, counts in report["backends"].items():
        print(
            f"{name:10s} {counts['forward']} forward only, {counts['backward']} with gradients, "
            f"{counts['repeated']} repeated, {counts['variable']} with blocks of variable size"
        )
        for quantity, worst in counts["worst"].items():
            print(f"    {quantity:18s} at most {worst['ratio']:.3f} of the error budget, case {worst['case']}")
        for reason, number in counts["not_done"].most_common():
            print(f"    {number} times not done: {reason}")
    for failure in report["failures"]:
        print(f"FAILED {failure['backend']}: {failure['error']}\n    {failure['reproduce']}", file=sys.stderr)
    if report["stopped"]:
        print(f"STOPPED: {report['stopped']}", file=sys.stderr)


def _triton_version() -> str | None:
    if find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


if __name__ == "__main__":
    sys.exit(main())
