"""Judge trained adapters of the bundled model beside the model without them, on the same prompts and the same noise.

    python scripts/evaluate_lora.py --output runs/lora-evaluation --clips 128 --device cuda \\
        untuned-dense=dense@321 untuned-radial=radial:density=0.3:block_size=32@321 radial-lora=runs/tiny-321/pytorch_lora_weights.safetensors

Each row is LABEL=METHOD@FRAMES[x STEPS][g GUIDANCE], the model as it comes (`teacher=dense@81x30g4`), or LABEL=FILE, an
adapter with the method, steps, guidance and frames of its header, or LABEL=FILE@81x30g4; what neither says is the model's
preset (20 steps, guidance 4). Written are results.json (adherence by window of 81
frames with Wilson 95 % intervals, drift, restart, seconds of denoising, and on a GPU those of its kernels by kind, cross
attention included, PSNR of the early frames and of all against the first row of equal length) and a contact sheet, both
after each row; the run ends within --seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_training import profiled
from evaluate_tiny_model import Sheet, versions

import vidsparse
from vidsparse_lora.validation import WINDOW, held_out_specs, measure
from vidsparse_pipelines.clips import caption
from vidsparse_pipelines.clips.checker import Share
from vidsparse_pipelines.clips.metrics import psnr
from vidsparse_pipelines.compare import bootstrap, parse_recipe
from vidsparse_pipelines.load import load_pipeline
from vidsparse_pipelines.lora import LoraSpec, load_loras, read_training
from vidsparse_pipelines.model_info import BUNDLED_MODEL, inspect_model
from vidsparse_pipelines.runfile import write_json

PRESET = inspect_model(BUNDLED_MODEL).preset
FEW = 8
"""Up to so many steps the model as it comes has no dense warm-up steps and a scheduler for few steps."""
ROW = re.compile(r"(?P<method>.+)@(?P<frames>\d+)(x(?P<steps>\d+))?(g(?P<guidance>[\d.]+))?")


def parse_row(text: str) -> tuple[str, dict[str, Any]]:
    """Label, and `method` (None for dense), `options`, `frames`, `steps`, `guidance`, `file`."""
    label, equals, what = text.partition("=")
    if not equals or not label:
        raise SystemExit(f"A row must be LABEL=METHOD@FRAMES or LABEL=FILE, got {text!r}.")
    match = ROW.fullmatch(what)
    given = {
        name: kind(match[name])
        for name, kind in (("frames", int), ("steps", int), ("guidance", float))
        if match is not None and match[name]
    }
    file = match["method"] if match is not None else what
    if file.endswith(".safetensors"):
        training = read_training(file)
        if training is None:
            raise SystemExit(f"{file!r} was not written by `vidsparse train`.")
        recipe = training["recipe"]
        options = {k: v for k, v in recipe["config"].items() if k != "schedule"} | recipe["config"]["schedule"]
        return label, {
            "file": file,
            "method": None if recipe["method"] == "dense" else recipe["method"],
            "options": options,
            "frames": max(training["num_frames"]),
            "steps": training["num_inference_steps"] or PRESET.num_inference_steps,
            "guidance": training["guidance_scale"] or PRESET.guidance_scale,
            "trained_steps": training["trained_steps"],
            "training_seconds": training["seconds"],
            **given,
        }
    if match is None:
        raise SystemExit(f"A row must be LABEL=METHOD@FRAMES or LABEL=FILE, got {text!r}.")
    method = parse_recipe(match["method"])
    few = given.get("steps", PRESET.num_inference_steps) <= FEW
    return label, {
        "file": None,
        "method": None if method.name == "dense" else method.name.partition(":")[0],
        "options": {"min_tokens": 0, **({"warmup_steps": 0} if few else {}), **method.options},
        "steps": PRESET.num_inference_steps,
        "guidance": PRESET.guidance_scale,
        **given,
    }


class Evaluation:
    """Rows on one pipeline after another, each loaded anew so that nothing of an adapter stays."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.specs = held_out_specs(args.clips, args.seed)
        self.prompts = [caption(spec) for spec in self.specs]
        self.seconds = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.no_grad()
    def clips(self, row: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """`[clips, 3, frames, height, width]` uint8 of one row on the CPU, and the attention report."""
        pipe = load_pipeline(
            inspect_model(BUNDLED_MODEL), dtype=self.args.dtype, device=str(self.device), offload="none"
        ).pipe
        pipe.set_progress_bar_config(disable=True)
        if row["file"] is not None:
            load_loras(pipe, (LoraSpec(row["file"]),))
        elif row["steps"] <= FEW:
            from vidsparse_pipelines.lora import few_step_scheduler

            pipe.scheduler = few_step_scheduler(pipe.scheduler.config.flow_shift)
        handle = vidsparse.apply(pipe, row["method"], **row["options"]) if row["method"] else None

        def denoise(prompts: list[str], first: int) -> Any:
            return pipe(
                prompt=prompts,
                height=PRESET.height,
                width=PRESET.width,
                num_frames=row["frames"],
                num_inference_steps=row["steps"],
                guidance_scale=row["guidance"],
                generator=[
                    torch.Generator("cpu").manual_seed(self.args.seed + first + i) for i in range(len(prompts))
                ],
                max_sequence_length=PRESET.max_sequence_length,
                output_type="latent",
            ).frames

        found, self.seconds = [], 0.0
        batch = self.args.batch
        for start in range(-batch if self.device.type == "cuda" else 0, len(self.prompts), batch):
            # The first batch is made twice: kernels are compiled and masks built outside of the measured time.
            at = max(start, 0)
            prompts = self.prompts[at : at + batch]
            before = self._now()
            latents = denoise(prompts, at)
            if start >= 0:
                self.seconds += self._now() - before
                found.append(self._decode(pipe, latents))
        report: dict[str, Any] = {}
        if handle is not None:
            report["density"] = handle.report().sparse_density
        if self.device.type == "cuda":
            prompts = self.prompts[:batch]
            kinds = profiled(lambda: denoise(prompts, 0))["kinds_s"]
            report["kernel_seconds_per_clip"] = {kind: round(s / len(prompts), 5) for kind, s in kinds.items()}
        return torch.cat(found), report

    def _decode(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        config = pipe.vae.config
        mean, std = (
            torch.tensor(v, device=latents.device, dtype=torch.float32).view(1, -1, 1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )
        pixels = pipe.vae.decode((latents.float() * std + mean).to(pipe.vae.dtype)).sample
        return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def interval(share: float, count: int) -> list[float]:
    """Wilson's 95 % interval of a share of `count` clips."""
    return [round(v, 4) for v in Share(round(share * count), count).interval]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate every row that time allows; returns the document of results.json."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet-clips", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=600.0)
    args = parser.parse_args(argv)
    started = time.monotonic()
    rows = [parse_row(text) for text in args.rows]
    evaluation, results = Evaluation(args), {}
    made: dict[str, torch.Tensor] = {}
    args.output.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python scripts/evaluate_lora.py", *argv]),
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "versions": versions(),
        "complete": False,
        "rows": results,
    }
    last = 0.0
    for label, row in rows:
        if time.monotonic() - started + last > args.seconds:
            print(f"{label} and what follows left out: the time is over", flush=True)
            break
        begun = time.monotonic()
        clips, report = evaluation.clips(row)
        figures = measure(clips.float() / 127.5 - 1, evaluation.specs, evaluation.device)
        if figures:
            figures["adherence_first_wilson95"] = interval(figures["adherence_first"], args.clips)
            figures["adherence_last_wilson95"] = interval(figures["adherence_last"], args.clips)
        base = next((name for name, other in made.items() if other.shape == clips.shape), None)
        if base is not None:
            for name, frames in (("psnr_early", WINDOW), ("psnr", clips.shape[2])):
                values = [
                    float(psnr(a[None, :, :frames].float() / 255, b[None, :, :frames].float() / 255, 1.0).mean())
                    for a, b in zip(clips, made[base], strict=True)
                ]
                figures[f"{name}_against_{base}"] = bootstrap(values)
        results[label] = {
            **row,
            **report,
            **figures,
            "denoise_seconds_per_clip": round(evaluation.seconds / args.clips, 5),
        }
        made[label] = clips
        document["complete"] = len(results) == len(rows)
        write_json(args.output / "results.json", json.loads(json.dumps(document, default=str)))
        sheet(made, evaluation.prompts[: args.sheet_clips], args.output / "sheet.png")
        last = time.monotonic() - begun
        print(label, {k: v for k, v in results[label].items() if k != "options"}, f"{last:.0f} s", flush=True)
    return document


def sheet(made: dict[str, torch.Tensor], prompts: list[str], path: Path) -> None:
    """Twelve frames of each clip under its prompt, one line a row of the table."""
    picture = Sheet(12)
    for i, prompt in enumerate(prompts):
        chosen = {
            label: clips[i][:, np.linspace(0, clips.shape[2] - 1, 12).round().astype(int)]
            for label, clips in made.items()
        }
        picture.add(prompt, chosen)
    picture.save(path)


if __name__ == "__main__":
    main()
