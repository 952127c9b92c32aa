"""Measure how well a clip model follows held-out prompts, and what sparse attention changes.

    python scripts/evaluate_tiny_model.py --model pipelines/vidsparse_pipelines/models/vidsparse-tiny \\
        --output runs/evaluation --size large --method dense,radial:density=0.3 --steps 30 --device cuda

Every method draws the same prompts from the same noise. Written are results.json (adherence by attribute with Wilson
95 % intervals, PSNR and SSIM against dense with bootstrap intervals, seconds, density) and one contact sheet each for
one and two objects. Beside the model's adherence stand the checker's own on real clips of the same prompts, and on
those after the VAE: nothing that the model draws can be expected to score higher. With --baseline every method's PSNR
and SSIM also stand as differences from that method's, clip by clip. The run ends within --seconds; what it has is
written after each method, so name the most important ones first.

A method may have options, as in radial:density=0.3:warmup_steps=4. "dense" means that nothing is attached.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from PIL import Image, ImageDraw
from torch import Tensor

import vidsparse
from vidsparse.errors import ConfigError
from vidsparse_pipelines.clips import caption, render, sample_params
from vidsparse_pipelines.clips.checker import Checker, Scores, load_checker, score
from vidsparse_pipelines.clips.grammar import ClipSpec, sample_split
from vidsparse_pipelines.clips.metrics import psnr, ssim
from vidsparse_pipelines.compare import Method, bootstrap, parse_recipe

SIZES = {"small": (64, 96), "large": (96, 160)}
OTHER_SEED = "dense, other seed"
MAX_SHEET_BYTES = 16 * 2**20


@dataclass
class Outcome:
    """What one method gave so far."""

    scores: list[Scores] = field(default_factory=list)
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0
    clips: int = 0
    report: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Clip:
    """One prompt and what became of it under each method."""

    spec: ClipSpec
    prompt: str
    seed: int
    right: dict[str, bool] = field(default_factory=dict)
    psnr: dict[str, float] = field(default_factory=dict)
    ssim: dict[str, float] = field(default_factory=dict)


def parse_methods(text: str) -> list[Method]:
    try:
        methods = [parse_recipe(item) for item in text.split(",")]
    except ConfigError as error:
        raise SystemExit(f"--method: {error}") from None
    if methods[0].name != "dense":
        methods.insert(0, Method("dense", "dense", {}))  # what the others are compared with
    return methods


def parse_size(text: str) -> tuple[int, int]:
    if text in SIZES:
        return SIZES[text]
    try:
        height, width = (int(v) for v in text.split("x"))
    except ValueError:
        raise SystemExit(f"--size must be small, large or HEIGHTxWIDTH, got {text!r}") from None
    return height, width


def draw_prompts(seed: int, num_prompts: int, num_pairs: int) -> tuple[list[Clip], list[Clip]]:
    kinds = []
    for kind, count in (("one", num_prompts), ("two", num_pairs)):
        rng = Random(f"evaluate {kind} {seed}")
        specs = [sample_split(rng, held_out=True, two_objects=kind == "two") for _ in range(count)]
        offset = 0 if kind == "one" else 500_000
        kinds.append([Clip(s, caption(s), seed * 1_000_000 + offset + i) for i, s in enumerate(specs)])
    return kinds[0], kinds[1]


def batches_of(one: list[Clip], two: list[Clip], size: int) -> list[list[Clip]]:
    """One kind after the other in turn, so that a run cut short has both."""
    parts = [[kind[i : i + size] for i in range(0, len(kind), size)] for kind in (one, two)]
    turns = [[p[i] for p in parts if i < len(p)] for i in range(max(map(len, parts)))]
    return [batch for turn in turns for batch in turn]


class Evaluator:
    def __init__(self, pipe: WanPipeline, checker: Checker, args: argparse.Namespace):
        self.pipe, self.checker, self.args = pipe, checker, args
        self.device = torch.device(args.device)
        self.height, self.width = parse_size(args.size)
        self.warmup: tuple[Tensor, Any] | None = None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.no_grad()
    def generate(
        self, method: Method, prompts: list[str], seeds: list[int]
    ) -> tuple[Tensor, float, float, dict | None]:
        """Clips `[B, 3, T, H, W]` uint8, seconds of denoising and of decoding, and the report."""
        what = method.name if method.recipe is None else vidsparse.Recipe.from_dict(method.recipe)
        options, scheduler = method.options, self.pipe.scheduler
        start_at: dict[str, Any] = {}
        if self.warmup is not None and method.name != "dense":
            latents, self.pipe.scheduler = self.warmup[0], resumed(self.warmup[1], self.args.share_warmup)
            options, start_at = {**options, "warmup_steps": 0}, {"latents": latents}
        elif self.args.share_warmup and method.name == "dense":
            start_at = {"callback_on_step_end": self._keep_warmup}
        handle = vidsparse.apply(self.pipe, what, **options) if method.name != "dense" else None
        try:
            start = self._now()
            output: Any = self.pipe(
                prompt=prompts,
                height=self.height,
                width=self.width,
                num_frames=self.args.frames,
                num_inference_steps=self.args.steps,
                guidance_scale=self.args.guidance_scale,
                # On the CPU, so that every device starts from the same noise.
                generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
                max_sequence_length=self.args.max_sequence_length,
                output_type="latent",
                **start_at,
            )
            middle = self._now()
            report = summary_of(handle.report()) if handle else None
        finally:
            self.pipe.scheduler = scheduler
            if handle:
                handle.remove()
        clips = self.decode(output.frames)
        return clips, middle - start, self._now() - middle, report

    def _keep_warmup(self, pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        if step == self.args.share_warmup - 1:
            self.warmup = kwargs["latents"].clone(), copy.deepcopy(pipe.scheduler)
        return {}

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        return tuple(
            torch.tensor(v, device=latents.device, dtype=torch.float32).view(1, -1, 1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )  # type: ignore[return-value]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        vae = self.pipe.vae
        parts = (latents.float() * std + mean).to(vae.dtype).split(self.args.decode_batch)
        return torch.cat([to_bytes(vae.decode(p, return_dict=False)[0]) for p in parts])

    @torch.no_grad()
    def through_vae(self, clips: Tensor) -> Tensor:
        vae = self.pipe.vae
        parts = clips.to(vae.dtype).split(self.args.decode_batch)
        return torch.cat([to_bytes(vae.decode(vae.encode(p).latent_dist.mode(), return_dict=False)[0]) for p in parts])

    def real(self, batch: list[Clip]) -> Tensor:
        """Clips of the same specs as the renderer draws them."""
        params = sample_params([c.spec for c in batch], Random(f"real {batch[0].seed}"), self.height, self.width)
        return render(params.to(self.device), self.args.frames, self.height, self.width)


def resumed(scheduler: Any, steps: int) -> Any:
    """A copy of a scheduler that goes on after its first `steps` steps, whatever it is asked to begin."""
    scheduler = copy.deepcopy(scheduler)
    whole, step = scheduler.timesteps, scheduler.step

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        scheduler.timesteps = whole[steps:]  # what the pipeline goes through

    def step_of_whole(*args: Any, **kwargs: Any) -> Any:
        scheduler.timesteps = whole  # a step's order depends on how many are left
        return step(*args, **kwargs)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step_of_whole
    return scheduler


def summary_of(report: Any) -> dict[str, Any]:
    data = report.to_dict()
    names = ("summary", "num_calls", "num_sparse_calls", "sparse_density", "mean_density", "dense_calls", "backends")
    return {k: data[k] for k in (*names, "notes")}


def to_bytes(clips: Tensor) -> Tensor:
    return ((clips.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_unit(clips: Tensor) -> Tensor:
    return clips.float() / 127.5 - 1


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "vidsparse": vidsparse.__version__}
    for name in ("torch", "triton", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


class Sheet:
    """Rows of frames under their captions, as one picture."""

    MARGIN, LINE = 92, 16

    def __init__(self, columns: int):
        self.columns, self.rows = columns, []

    def add(self, text: str, rows: dict[str, Tensor]) -> None:
        """`rows`: uint8 clips `[3, T, H, W]` by label."""
        self.rows.append((text, {k: v.cpu().numpy() for k, v in rows.items()}))

    def save(self, path: Path) -> None:
        if not self.rows:
            return
        clip = next(iter(self.rows[0][1].values()))
        frames, height, width = clip.shape[1:]
        chosen = np.linspace(0, frames - 1, self.columns).round().astype(int)
        total = sum(self.LINE + len(rows) * (height + 2) for _, rows in self.rows)
        picture = Image.new("RGB", (self.MARGIN + self.columns * (width + 2), total), "white")
        pen, y = ImageDraw.Draw(picture), 0
        for text, rows in self.rows:
            pen.text((2, y + 2), text, fill="black")
            y += self.LINE
            for label, pixels in rows.items():
                pen.text((2, y + 2), label[:14], fill="black")
                for i, t in enumerate(chosen):
                    image = Image.fromarray(np.ascontiguousarray(pixels[:, t].transpose(1, 2, 0)))
                    picture.paste(image, (self.MARGIN + i * (width + 2), y))
                y += height + 2
        temporary = path.with_name(path.name + ".tmp")
        picture.save(temporary, format="PNG", optimize=True)
        while temporary.stat().st_size > MAX_SHEET_BYTES:
            picture = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.Resampling.LANCZOS)
            picture.save(temporary, format="PNG", optimize=True)
        os.replace(temporary, path)


def results(
    args: argparse.Namespace,
    argv: Sequence[str],
    checker: Checker,
    outcomes: dict[str, Outcome],
    clips: list[Clip],
    complete: bool,
) -> dict[str, Any]:
    device = torch.device(args.device)
    methods = {}
    for label, outcome in outcomes.items():
        if not outcome.clips:
            continue
        done = [c for c in clips if label in c.right]
        entry: dict[str, Any] = {"clips": outcome.clips, "adherence": Scores.sum(outcome.scores).as_dict()}
        for name in ("psnr", "ssim"):
            values = [getattr(c, name)[label] for c in done if label in getattr(c, name)]
            if values:
                against = "real" if label == "reconstructed" else "dense"
                entry[f"{name}_against_{against}"] = bootstrap(values)
        if outcome.denoise_seconds:
            total = outcome.denoise_seconds + outcome.decode_seconds
            entry["seconds"] = {
                "denoise": round(outcome.denoise_seconds, 3),
                "decode": round(outcome.decode_seconds, 3),
                "total": round(total, 3),
                "denoise_per_clip": round(outcome.denoise_seconds / outcome.clips, 5),
                "total_per_clip": round(total / outcome.clips, 5),
            }
        if label not in ("dense", OTHER_SEED, "real", "reconstructed"):
            both = [c for c in done if "dense" in c.right]
            entry["paired_with_dense"] = {
                "both_right": sum(c.right[label] and c.right["dense"] for c in both),
                "only_this_right": sum(c.right[label] and not c.right["dense"] for c in both),
                "only_dense_right": sum(c.right["dense"] and not c.right[label] for c in both),
                "neither_right": sum(not c.right["dense"] and not c.right[label] for c in both),
            }
            base = args.baseline
            if base is not None and label != base:
                shared = [c for c in done if base in c.psnr and label in c.psnr]
                entry["minus_baseline"] = {
                    name: bootstrap([getattr(c, name)[label] - getattr(c, name)[base] for c in shared])
                    for name in ("psnr", "ssim")
                }
        if outcome.report:
            entry["report"] = outcome.report
        methods[label] = entry
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "scripts/evaluate_tiny_model.py", *argv]),
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "complete": complete,
        "checker": {
            "parameters": checker.num_parameters,
            "on_held_out_real_clips": checker.scores.as_dict() if checker.scores else "unknown: not validated",
        },
        "methods": methods,
        "clips": [
            {"prompt": c.prompt, "seed": c.seed, "objects": len(c.spec.objects), "right": c.right}
            | {name: {k: round(v, 3) for k, v in getattr(c, name).items()} for name in ("psnr", "ssim")}
            for c in clips
            if c.right
        ],
    }


def evaluate(
    ev: Evaluator, methods: list[Method], args: argparse.Namespace, argv: Sequence[str], started: float
) -> dict:
    one, two = draw_prompts(args.seed, args.num_prompts, args.num_pairs)
    outcomes = {"real": Outcome(), "reconstructed": Outcome()} | {m.label: Outcome() for m in methods}
    outcomes[OTHER_SEED] = Outcome()
    sheets = {1: Sheet(args.sheet_columns), 2: Sheet(args.sheet_columns)}
    warm: set[str] = set()
    slowest, longest, complete = 0.0, 0.0, True

    def left() -> float:
        return args.seconds - (time.monotonic() - started)

    def judge(label: str, batch: list[Clip], clips: Tensor) -> None:
        scores = score(ev.checker, to_unit(clips) if clips.dtype == torch.uint8 else clips, [c.spec for c in batch])
        outcomes[label].scores.append(scores)
        outcomes[label].clips += len(batch)
        for clip, right in zip(batch, scores.right, strict=True):
            clip.right[label] = right

    def compare(label: str, batch: list[Clip], clips: Tensor, with_: Tensor) -> None:
        for part in range(0, len(batch), 8):
            a, b = to_unit(clips[part : part + 8]), to_unit(with_[part : part + 8])
            for clip, p, s in zip(batch[part : part + 8], psnr(a, b).tolist(), ssim(a, b).tolist(), strict=True):
                clip.psnr[label], clip.ssim[label] = p, s

    def write(*, whole: bool = True) -> dict:
        data = results(args, argv, ev.checker, outcomes, one + two, complete and whole)
        path = args.output / "results.json"
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(temporary, path)
        return data

    for batch in batches_of(one, two, args.batch):
        if left() < 1.3 * slowest + args.reserve:
            complete = False
            break
        begun = time.monotonic()
        ev.warmup = None
        prompts, seeds = [c.prompt for c in batch], [c.seed for c in batch]
        real = ev.real(batch)
        judge("real", batch, real)
        rebuilt = ev.through_vae(real)
        judge("reconstructed", batch, rebuilt)
        compare("reconstructed", batch, rebuilt, to_bytes(real))
        rows = {"real": to_bytes(real)}
        dense: Tensor | None = None
        for number, method in enumerate(methods):
            if number > 1 and left() < 1.5 * longest + args.reserve:
                complete = False
                break
            method_begun = time.monotonic()
            if args.warm and method.label not in warm:  # compilation and first allocations are not timed
                ev.generate(method, prompts, seeds)
                warm.add(method.label)
                if left() < args.reserve:
                    complete = False
                    break
            clips, denoise, decode, report = ev.generate(method, prompts, seeds)
            outcome = outcomes[method.label]
            outcome.denoise_seconds += denoise
            outcome.decode_seconds += decode
            outcome.report = report
            judge(method.label, batch, clips)
            if dense is None:
                dense = clips
            else:
                compare(method.label, batch, clips, dense)
            rows[method.label] = clips
            longest = max(longest, time.monotonic() - method_begun)
            write(whole=False)
            print(f"{time.monotonic() - started:.1f} s: {method.label}, {len(batch)} clips", flush=True)
        if dense is not None and outcomes[OTHER_SEED].clips < args.other_seed:
            count = min(len(batch), args.other_seed - outcomes[OTHER_SEED].clips)
            other, *_ = ev.generate(methods[0], prompts[:count], [s + 250_000 for s in seeds[:count]])
            judge(OTHER_SEED, batch[:count], other)
            compare(OTHER_SEED, batch[:count], other, dense[:count])
        sheet = sheets[len(batch[0].spec.objects)]
        for i in range(min(len(batch), args.sheet_clips - len(sheet.rows))):
            sheet.add(batch[i].prompt, {k: v[i] for k, v in rows.items()})
        slowest = max(slowest, time.monotonic() - begun)
        write()
        done = outcomes[methods[0].label].clips
        print(f"{time.monotonic() - started:.0f} s: {done} of {len(one) + len(two)} prompts", flush=True)
    for count, name in ((1, "one_object.png"), (2, "two_objects.png")):
        sheets[count].save(args.output / name)
    return write()


def main(argv: Sequence[str] | None = None) -> dict:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--checker", type=Path, help="file of the prompt checker; default the one in the package")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--size", default="large", help="small (64x96), large (96x160) or HEIGHTxWIDTH")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--num-prompts", type=int, default=200, help="held-out prompts of one object")
    parser.add_argument("--num-pairs", type=int, default=200, help="held-out prompts of two objects")
    parser.add_argument("--method", default="dense,radial", help="comma-separated, NAME:OPTION=VALUE:...")
    parser.add_argument("--baseline", help="the method, as written in --method, that the others are compared with")
    parser.add_argument(
        "--share-warmup",
        type=int,
        default=0,
        metavar="N",
        help="draw the first N steps once, dense, and go on from there with every method; seconds are then of the rest",
    )
    parser.add_argument(
        "--no-warm-run",
        dest="warm",
        action="store_false",
        help="draw each method once; seconds then contain compilation",
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--max-sequence-length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="prompts denoised together")
    parser.add_argument("--decode-batch", type=int, default=8, help="clips decoded together")
    parser.add_argument(
        "--other-seed", type=int, default=64, help="prompts drawn again from other noise, for the floor"
    )
    parser.add_argument("--sheet-clips", type=int, default=6, help="clips in each contact sheet")
    parser.add_argument("--sheet-columns", type=int, default=9, help="frames of each clip in a contact sheet")
    parser.add_argument("--seconds", type=float, default=600.0, help="wall clock, loading included")
    parser.add_argument("--reserve", type=float, default=5.0, help="of these, seconds kept for writing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, choices=("bfloat16", "float32"), help="default bfloat16 on a GPU")
    args = parser.parse_args(argv)
    started = time.monotonic()
    methods = parse_methods(args.method)
    if min(args.num_prompts, args.num_pairs) < 0 or args.num_prompts + args.num_pairs < 1:
        parser.error(f"at least one prompt is needed, got {args.num_prompts} and {args.num_pairs}")
    if not 0 <= args.share_warmup < args.steps:
        parser.error(f"--share-warmup must be at least 0 and below the {args.steps} steps, got {args.share_warmup}")
    if args.share_warmup and any("warmup_steps" in m.options or m.recipe is not None for m in methods):
        parser.error("--share-warmup sets the dense steps: methods must not set warmup_steps or come from a file")
    if args.baseline is not None and args.baseline not in [m.label for m in methods]:
        parser.error(f"--baseline must be one of the methods, got {args.baseline!r}")
    args.output.mkdir(parents=True, exist_ok=True)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    checker = load_checker(args.checker, args.device)
    pipe = WanPipeline.from_pretrained(str(args.model), torch_dtype=getattr(torch, args.dtype)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    data = evaluate(Evaluator(pipe, checker, args), methods, args, argv, started)
    for label, entry in data["methods"].items():
        parts = [f"{k} {entry['adherence'][k]['share']}" for k in ("all_right", "one_object", "two_objects")]
        parts += [f"{k} {entry[k]['mean']}" for k in entry if k.startswith(("psnr", "ssim"))]
        parts += [f"{entry['seconds']['denoise_per_clip']} s a clip"] if "seconds" in entry else []
        print(f"{label}: {', '.join(parts)}")
    return data


if __name__ == "__main__":
    main()
