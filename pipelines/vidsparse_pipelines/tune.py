"""Quality as the knob: a calibration, one budget spent over all cells, rounds that check it, and the recipe file."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from vidsparse.errors import ConfigError
from vidsparse.methods.tuned import DENSE

from .bundled import BUNDLED_MODEL
from .clips.grammar import caption, sample_split
from .compare import Clip, parse_recipe
from .device import resolve_device
from .environment import environment
from .generation import resolve_settings
from .model_info import inspect_model
from .progress import Observer
from .runfile import write_json
from .settings import GenerateSettings
from .tune_budget import Problem, Table, within_cost, within_error
from .tune_calibration import Calibration, clip_psnrs, error_of, psnr_of
from .tune_probe import Option
from .tune_rules import RULES

TOLERANCE_DB, TOLERANCE_TIME = 0.3, 0.03
MAX_ROUNDS = 4
BANDS = tuple(f"svg1:density={d}:kind={k}" for k in ("spatial", "temporal") for d in (0.15, 0.3, 0.5))
MENUS = {
    # On a CPU selecting from query and key costs more than it saves.
    "cpu": (
        *(f"radial{size}{sink}" for size in ("", ":block_size=32") for sink in ("", ":sink_frames=0")),
        *BANDS,
    ),
    "cuda": (
        "radial",
        *(f"radial:density={d}" for d in (0.45, 0.6)),
        *(f"pooled:density={d}" for d in (0.1, 0.2, 0.35, 0.5, 0.7)),
        *BANDS,
        *(f"semantic:density={d}" for d in (0.1, 0.2, 0.35)),
        *(f"vidsparse:density={d}" for d in (0.05, 0.1, 0.15, 0.25, 0.4)),
    ),
}
RULE_MENUS = {
    "sparse-vdit": BANDS,
    "sparge": tuple(f"pooled:top_p={p}" for p in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)),
}


@dataclass(frozen=True)
class Target:
    """What the recipe shall reach; one of them is given.

    Attributes:
        psnr: against dense, mean over clips, in dB.
        seconds: of denoising one clip of the calibration on this device.
        share: of the dense run's attention time.
    """

    psnr: float | None = None
    seconds: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("psnr", "seconds", "share") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError("Give one target: --target-psnr DB, --max-time SECONDS or --max-attention SHARE.")
        value = getattr(self, given[0])
        if not math.isfinite(value) or value <= 0:
            raise ConfigError(f"The target must be a number above 0, got {value:g}.")
        if self.share is not None and self.share > 1:
            raise ConfigError(f"--max-attention must be in (0, 1], got {self.share:g}.")


def calibration_prompts(count: int) -> list[str]:
    """Prompts of the bundled model's training split, one and two objects in turn: none of them is held out."""
    rng = Random("tune")
    return [caption(sample_split(rng, held_out=False, two_objects=i % 2 == 1)) for i in range(count)]


def make_options(labels: Sequence[str]) -> list[Option]:
    """The choices from their text, each once.

    Raises:
        ConfigError: as for `parse_recipe`; or a choice that reuses something between steps.
    """
    options = []
    for label in dict.fromkeys(labels):
        method = parse_recipe(label)
        if method.name in (DENSE, "tuned", "sla", "radial-linear") or "refresh_every" in method.options:
            raise ConfigError(
                f"{label!r} cannot be a choice: give a method such as radial or pooled, without what it reuses between "
                "steps; dense always is one."
            )
        options.append(Option(label, method.name, method.options))
    return options


@dataclass
class Tuning:
    """A target, and the recipe that meets it.

    Attributes:
        output: the recipe's file.
        calibration: what is known of every choice.
        target: what to reach.
        rule: "budget", or a baseline of `tune_rules`.
        by_head: whether heads may differ.
    """

    output: Path
    calibration: Calibration
    target: Target
    rule: str = "budget"
    by_head: bool = True

    def __post_init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []
        self._started = time.perf_counter()

    def solve(self, problem: Problem, psnr: float | None, share: float | None) -> Table:
        """The table of the rule in force for a predicted PSNR, or for a share of the dense attention time."""
        if self.rule == "budget":
            if psnr is not None:
                return within_error(problem, error_of(psnr))
            assert share is not None
            return within_cost(problem, share)
        low, high = 1e-9, 1e3
        rule = RULES[self.rule]

        def fits(knob: float) -> bool:
            error, cost = problem.total(rule(problem, knob))
            return error <= error_of(psnr) if psnr is not None else cost >= (share or 0)

        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if fits(middle) else (low, middle)
        return rule(problem, low)

    def run(self) -> dict[str, Any]:
        """Measure what is missing, find the table, check it and write the recipe.

        Raises:
            ConfigError: the target cannot be reached; the message has the best that can be had.
        """
        self.calibration.measure()
        problem = self.calibration.problem(self.by_head)
        rounds = self.rounds = self._rounds(problem)
        best = self._best(rounds)
        recipe = self.calibration.recipe(best["table"], round(best["psnr"], 2))
        write_json(self.output, recipe.to_dict())
        data = {
            "recipe": str(self.output),
            "target": {k: v for k, v in vars(self.target).items() if v is not None},
            "rule": self.rule,
            "clips": len(self.calibration.clips),
            "rounds": [{k: v for k, v in x.items() if k != "table"} for x in rounds],
            "best": {k: v for k, v in best.items() if k != "table"},
            "dense_seconds": self.calibration.clip_seconds(),
            "took_s": round(time.perf_counter() - self._started, 1),
            "environment": environment(),
        }
        return data

    def _share(self, problem: Problem) -> float | None:
        """The share of the dense attention time that the target leaves, None for a target in dB.

        Raises:
            ConfigError: the time cannot be reached, or dense attention reaches it.
        """
        target = self.target
        least = problem.total(problem.at_price(1e30))[1]
        if target.share is not None:
            if target.share < least:
                raise ConfigError(
                    f"An attention time of {target.share:.0%} cannot be reached; the fastest table here takes {least:.0%} "
                    f"of the dense one, at a predicted {psnr_of(problem.total(problem.at_price(1e30))[0]):.1f} dB."
                )
            return target.share
        if target.seconds is None:
            return None
        if self.calibration.price_tokens is not None:
            raise ConfigError("--max-time is in seconds of this device, so it cannot go with --price-tokens.")
        dense = self.calibration.clip_seconds()
        attention = self.calibration.attention_seconds()
        if target.seconds >= dense:
            raise ConfigError(
                f"Dense attention takes {dense:.2f} s here; give a --max-time below that, got {target.seconds:g}."
            )
        share = 1 - (dense - target.seconds) / attention
        if share < least:
            fastest = dense - attention * (1 - least)
            raise ConfigError(
                f"Denoising cannot take only {target.seconds:g} s here; the fastest table takes about {fastest:.2f} s of "
                f"the dense run's {dense:.2f} s."
            )
        return share

    def _rounds(self, problem: Problem) -> list[dict[str, Any]]:
        """Run tables on all clips until one meets the target; what each gave."""
        share, target, rounds = self._share(problem), self.target.psnr, []
        aim, seen, least = target, set(), problem.total(problem.at_price(1e30))[1]
        for number in range(MAX_ROUNDS):
            table = self.solve(problem, aim, share)
            error, cost = problem.total(table)
            if is_dense(table):
                self._refuse_dense(problem)
            if str(table) in seen or (number and self.calibration.late()):
                break
            seen.add(str(table))
            self.calibration.observer.stage(f"round {number + 1}", self.calibration.steps)
            frames, seconds, density = self.calibration.run_table(table, self.calibration.batches())
            psnrs = clip_psnrs(frames, self.calibration.dense())
            rounds.append(
                {
                    "aim": aim,
                    "predicted_psnr": psnr_of(error),
                    "psnr": statistics.fmean(psnrs),
                    "psnr_of_clips": [round(x, 2) for x in psnrs],
                    "attention": cost,
                    "density": density,
                    "seconds": seconds / len(self.calibration.clips),
                    "table": table,
                }
            )
            last = rounds[-1]
            self.calibration.observer.note(
                f"Round {number + 1}: {last['predicted_psnr']:.1f} dB predicted, {last['psnr']:.1f} dB measured, "
                f"{cost:.0%} of the attention time."
            )
            if target is not None:
                if abs(last["psnr"] - target) <= TOLERANCE_DB:
                    break
                aim = next_aim([(x["aim"], x["psnr"]) for x in rounds], target)
                continue
            wanted = self.target.seconds
            if share is None or wanted is None or last["seconds"] <= wanted * (1 + TOLERANCE_TIME):
                break
            share = max(least, share - (last["seconds"] - wanted) / self.calibration.attention_seconds())
        return rounds

    def _refuse_dense(self, problem: Problem) -> None:
        """Raises ConfigError: what is asked for leaves nothing but dense attention."""
        table = within_cost(problem, 0.98)
        error, cost = problem.total(table)
        if cost >= 1 or is_dense(table):
            raise ConfigError("No choice is faster than dense attention here, so there is nothing to tune.")
        raise ConfigError(
            f"A target of {self.target.psnr:g} dB leaves every call dense; the most that can be had with something saved is "
            f"about {psnr_of(error):.1f} dB at {cost:.0%} of the attention time."
        )

    def _best(self, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """The round nearest to the target."""
        target = self.target.psnr
        if target is None:
            return min(rounds, key=lambda x: x["seconds"]) if self.target.seconds is not None else rounds[-1]
        return min(rounds, key=lambda x: abs(x["psnr"] - target))


def next_aim(tried: list[tuple[float, float]], target: float) -> float:
    """The PSNR to predict next, from pairs of (predicted aim, measured): between two that enclose the target, else on."""
    below = max((pair for pair in tried if pair[1] <= target), key=lambda pair: pair[1], default=None)
    above = min((pair for pair in tried if pair[1] > target), key=lambda pair: pair[1], default=None)
    if below is not None and above is not None and above[1] > below[1]:
        return below[0] + (above[0] - below[0]) * (target - below[1]) / (above[1] - below[1])
    aim, measured = tried[-1]
    return aim + target - measured


def is_dense(table: Table) -> bool:
    """Whether a table leaves every call as it is."""
    return all(choice == DENSE for row in table for choice in row)


def prepare(
    output: str | Path,
    target: Target,
    *,
    choices: Sequence[str] = (),
    rule: str = "budget",
    prompts: Sequence[str] = (),
    num_prompts: int | None = None,
    seed: int = 0,
    by_head: bool = True,
    probe_clips: int | None = None,
    price_tokens: int | None = None,
    budget_seconds: float | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> Tuning:
    """Check everything; nothing is loaded yet.

    Args:
        output: the recipe's file, ending in .json.
        target: what to reach.
        choices: as for `compare.parse_recipe`; none: a menu for the device.
        rule: "budget", or a baseline: "sparse-vdit", "sparge".
        prompts: of the calibration; none: the bundled model's own.
        num_prompts: how many of those, default 4 on a CPU and 16 on a GPU.
        seed: of the first clip.
        by_head, probe_clips, price_tokens, budget_seconds, observer: as in `Tuning` and `Calibration`.
        settings: fields of `GenerateSettings`.

    Raises:
        VidsparseError: one sentence.
    """
    output = Path(output).expanduser()
    if output.suffix != ".json":
        raise ConfigError(f"A recipe is a .json file, got --output {str(output)!r}.")
    if rule not in ("budget", *RULES):
        raise ConfigError(f"The rule {rule!r} is unknown; use one of budget, {', '.join(RULES)}.")
    for name, value in (
        ("--prompts", num_prompts),
        ("--budget-seconds", budget_seconds),
        ("--price-tokens", price_tokens),
    ):
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be above 0, got {value:g}.")
    model = settings.get("model", BUNDLED_MODEL)
    info = inspect_model(model)
    if info.takes_image:
        raise ConfigError(f"The model {model!r} makes videos from an image, which `tune` cannot give it yet.")
    gpu = resolve_device(settings.get("device", "auto")).type == "cuda"
    texts = list(dict.fromkeys(prompts))
    if not texts:
        if model != BUNDLED_MODEL:
            raise ConfigError("Prompts are made up for the bundled model only; give --prompt or --prompt-file.")
        texts = calibration_prompts(num_prompts or (16 if gpu else 4))
    texts = texts[:num_prompts]
    full, notes = resolve_settings(GenerateSettings(prompt=texts[0], **{**settings, "seed": seed}), info)
    options = make_options(choices or (RULE_MENUS.get(rule) or MENUS["cuda" if gpu else "cpu"]))
    if probe_clips is None:
        probe_clips = (8 if gpu else 2) if model == BUNDLED_MODEL else 1
    clips = [Clip(text, seed + 10_000 + i) for i, text in enumerate(texts)]
    calibration = Calibration(
        output.parent, full, clips, options, probe_clips=min(probe_clips, len(clips)), price_tokens=price_tokens,
        budget_seconds=budget_seconds, observer=observer or Observer(),
    )  # fmt: skip
    for note in notes:
        calibration.observer.note(note)
    return Tuning(output, calibration, target, rule, by_head or rule != "budget")
