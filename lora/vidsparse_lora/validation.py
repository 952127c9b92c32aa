"""Videos of the student while it trains, and for drawn clips the figures that can be measured on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from vidsparse_lora.config import CLIPS, few_steps, without_guidance
from vidsparse_pipelines.clips import caption
from vidsparse_pipelines.clips.grammar import ClipSpec, sample_split
from vidsparse_pipelines.runfile import write_json
from vidsparse_pipelines.video import write_video

if TYPE_CHECKING:
    from vidsparse_lora.session import Session

WINDOW = 81
"""Frames that the checker looks at: the length that it was trained on."""
LEAST_FRAMES = 49
"""Clips below this length the checker cannot judge."""
BATCH = 8


def held_out_specs(count: int, seed: int) -> list[ClipSpec]:
    """Captions that no training clip has. Without "in front of": in a long clip the objects part again."""
    rng, specs = Random(f"lora validation {seed}"), []
    while len(specs) < count:
        spec = sample_split(rng, held_out=True)
        if spec.relation != "in front of":
            specs.append(spec)
    return specs


def validate(session: Session) -> dict[str, Any]:
    """Make and write the videos of `validation/step-N`; returns the figures, empty where nothing can be measured.

    Where each process has a share of the model all must call this, and the first one writes.
    """
    config, backbone, writes = session.config, session.backbone, session.accelerator.is_main_process
    specs: list[ClipSpec] = []
    prompts = list(config.validation_prompts)
    if not prompts and config.data == CLIPS:
        specs = held_out_specs(config.validation_clips, config.validation_seed)
        prompts = [caption(spec) for spec in specs]
    if not prompts:
        prompts = session.captions[: config.validation_clips]
    folder = session.folder / "validation" / f"step-{session.step:06d}"
    height, width = session.sizes[-1]
    clips: list[Tensor] = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = [config.validation_seed + start + i for i in range(len(part))]
        pixels = generate(session, part, seeds, max(config.num_frames), height, width)
        for seed, clip in zip(seeds, pixels, strict=True) if writes else ():
            frames = (clip.permute(1, 2, 3, 0) * 255).round().to(torch.uint8).cpu().numpy()
            if backbone.images:
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(frames[0]).save(folder / f"seed-{seed}.png")
            else:
                write_video(folder / f"seed-{seed}.mp4", list(frames), backbone.info.preset.fps)
        clips.append(pixels.cpu())
    if not writes:
        return {}
    figures = measure(torch.cat(clips) * 2 - 1, specs, session.device) if specs else {}
    if session.roles.handle.report().sparse_density is not None:
        figures["validation_density"] = round(session.roles.handle.report().sparse_density or 1.0, 4)
    write_json(folder / "figures.json", {"prompts": prompts, **json.loads(json.dumps(figures))})
    return figures


def generate(
    session: Session, prompts: Sequence[str], seeds: Sequence[int], num_frames: int, height: int, width: int
) -> Tensor:
    """Clips `[batch, 3, frames, height, width]` in [0, 1] by the pipeline, as it stands."""
    config, preset, pipe = session.config, session.backbone.info.preset, session.backbone.pipe
    few = few_steps(config)
    guidance = config.validation_guidance or (1.0 if without_guidance(config) else preset.guidance_scale)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    length = {} if session.backbone.images else {"num_frames": num_frames}
    with torch.no_grad():
        output = pipe(
            prompt=list(prompts),
            height=height,
            width=width,
            **length,
            num_inference_steps=config.validation_steps or few or preset.num_inference_steps,
            guidance_scale=guidance,
            generator=generators,
            max_sequence_length=session.backbone.text_length,
            output_type="pt",
        )
    if session.backbone.images:
        return output.images.float()[:, :, None]
    return output.frames.float().transpose(1, 2)


def measure(clips: Tensor, specs: Sequence[ClipSpec], device: torch.device) -> dict[str, Any]:
    """How well long clips follow their captions from window to window, and how much they drift.

    Args:
        clips: `[batch, 3, frames, height, width]` in [-1, 1].
        specs: what each should show.
        device: where the checker runs.

    Returns:
        `adherence` (share of clips with every attribute right, mean over windows of 81 frames), `adherence_first` and
        `adherence_last` window, `attributes` (share of attributes right, over all windows), `color_drift` (distance of
        the mean colours of last and first window, in [0, 2]) and, for clips of two windows and more, `restart` (mean
        difference of frames one window apart over that of frames half a window further: near 0 where the clip begins
        again after a window). Nothing for clips too short to judge.
    """
    frames = clips.shape[2]
    if frames < LEAST_FRAMES:
        return {}
    from vidsparse_pipelines.clips.checker import load_checker, score

    checker = load_checker(device=device)
    starts = list(range(0, frames - WINDOW + 1, WINDOW - 1)) or [0]
    windows = [clips[:, :, start : start + WINDOW] for start in starts]
    scores = [score(checker, window, list(specs)) for window in windows]
    shares = [s.all_right.value for s in scores]
    right = sum(a.right for s in scores for name, a in s.attributes.items() if name != "order")
    count = sum(a.count for s in scores for name, a in s.attributes.items() if name != "order")
    drift = (windows[-1].mean((2, 3, 4)) - windows[0].mean((2, 3, 4))).abs().mean().item()
    figures: dict[str, Any] = {
        "adherence": round(sum(shares) / len(shares), 4),
        "adherence_first": round(shares[0], 4),
        "adherence_last": round(shares[-1], 4),
        "attributes": round(right / count, 4),
        "color_drift": round(drift, 4),
    }
    if len(windows) > 1:
        figures["restart"] = round(_apart(clips, WINDOW - 1) / max(_apart(clips, WINDOW + WINDOW // 2), 1e-6), 4)
    return figures


def _apart(clips: Tensor, lag: int) -> float:
    """Mean difference of frames `lag` apart."""
    return (clips[:, :, lag:] - clips[:, :, :-lag]).abs().mean().item()
