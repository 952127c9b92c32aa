"""Time and memory of one LoRA training step at Wan's true shapes, sparse beside dense, with random weights.

    python scripts/bench_training.py --output training.json
    python scripts/bench_training.py --cases tiny,tiny:sparse:offloaded --device cpu
    torchrun --nproc-per-node 2 scripts/bench_training.py --cases wan-14b-321:sparse --output training.json

A step is what `vidsparse train length-extension` does: forward under autocast, flow-matching loss, backward with
gradient checkpointing, AdamW; LoRA of rank 32 on q, k, v and out of the self-attention, batch 1. Blocks are alike, and a
model holds one input per checkpointed block, so time and memory grow by the same amount with each: a model of one block
and one of two are measured, `block_*` is their difference, and `model_*` is one block plus as many differences as the
real model has blocks beyond it. The cases `…-whole` measure all blocks, to check that. Text encoder and VAE are not on
the GPU in training and not counted; no running average. `offloaded`: what is kept for each block waits in the CPU's
memory (`offload_activations`); `compiled`: blocks by torch.compile (`compile`); `plain`: no gradient checkpointing.
`attention_s` is one block's attention alone. The first step at each shape builds the mask and compiles kernels and is
not counted, except for dense steps of more than `--long` seconds (expected from the shape), which are timed at once.
What would not end within `--seconds` is left out, and said. `--profile` adds one more step of the first model, by kind of
kernel. Under torchrun all processes share the sequence, as `context_parallel` does, and time and memory are of the first.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()

import argparse  # noqa: E402
import datetime  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from vidsparse_kernels import block_sparse_attention  # noqa: E402
from vidsparse_lora.checkpointing import OffloadedCheckpoint  # noqa: E402
from vidsparse_lora.config import TrainConfig  # noqa: E402
from vidsparse_lora.distribution import Distribution, share_sequences  # noqa: E402
from vidsparse_lora.objective import add_noise, flow_loss  # noqa: E402
from vidsparse_lora.roles import STUDENT, Roles  # noqa: E402

GIB = 2**30
RADIAL = {"decay_factor": 0.2}
"""Radial Attention's own setting for Wan."""


@dataclass(frozen=True)
class Shape:
    """A Wan model and a video.

    Attributes:
        heads: of 128 channels (16 for tiny).
        ffn: width of the feed-forward layer.
        blocks: of the real model.
        frames: latent frames; pixel frames are 4 (frames - 1) + 1.
        counts: numbers of blocks to measure.
    """

    heads: int
    ffn: int
    blocks: int
    frames: int
    height: int = 60
    width: int = 104
    counts: tuple[int, ...] = (1, 2)

    @property
    def tokens(self) -> int:
        return self.frames * (self.height // 2) * (self.width // 2)


def small(frames: int, **changes: Any) -> Shape:
    return Shape(12, 8960, 30, frames, **changes)


def large(frames: int, **changes: Any) -> Shape:
    return Shape(40, 13824, 40, frames, **changes)


TINY = "tiny"
CASES = {
    "wan-1.3b-81": small(21),
    "wan-1.3b-321": small(81),
    "wan-14b-321": large(81),
    "wan-14b-81": large(21),
    "wan-1.3b-161": small(41),
    "wan-14b-161": large(41),
    "wan-1.3b-81-whole": small(21, counts=(30,)),
    "wan-1.3b-321-whole": small(81, counts=(30,)),
    "wan-14b-81-whole": large(21, counts=(40,)),
    "wan-14b-321-whole": large(81, counts=(40,)),
    "wan-14b-321-720p": large(81, height=90, width=160),
    TINY: Shape(2, 64, 3, 5, 16, 20),
}
ORDER = (
    "wan-14b-321:sparse wan-14b-321:dense wan-1.3b-321:sparse wan-1.3b-321:dense wan-14b-81:sparse wan-14b-81:dense "
    "wan-1.3b-81:sparse wan-1.3b-81:dense wan-14b-321:sparse:offloaded wan-1.3b-321:sparse:offloaded "
    "wan-1.3b-81:sparse:plain wan-14b-81:sparse:plain wan-14b-81-whole:sparse wan-14b-321-whole:sparse:offloaded "
    "wan-1.3b-321-whole:sparse wan-1.3b-81-whole:sparse wan-14b-321:sparse:compiled wan-14b-321:dense:compiled"
).split()
"""Most important first."""
MODES = ("checkpointed", "offloaded", "compiled", "plain")
KINDS = {
    "attention, backward": ("block_sparse_backward", "bprop", "flash_bwd", "bwd_dot", "bwd_convert"),
    "attention, forward": ("block_sparse_forward", "fprop", "flash_fwd"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma"),
}
"""Kinds of kernels by parts of their names; the first that fits."""


def build(shape: Shape, count: int, device: torch.device, mode: str = MODES[0]) -> Any:
    """The model with random weights in bf16, but for what diffusers keeps in fp32."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = WanTransformer3DModel(
                num_attention_heads=shape.heads,
                attention_head_dim=128 if shape.heads > 2 else 16,
                ffn_dim=shape.ffn,
                num_layers=count,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    kept = tuple(model._keep_in_fp32_modules or ())
    for path, parameter in model.named_parameters():
        if any(name in path for name in kept):
            parameter.data = parameter.data.float()
        parameter.data.normal_(std=0.02)
    if mode != "plain":
        model.enable_gradient_checkpointing(OffloadedCheckpoint() if mode == "offloaded" else None)
    return model.train()


def make_step(
    shape: Shape,
    count: int,
    sparse: bool,
    device: torch.device,
    rank: int,
    mode: str = MODES[0],
    shares: Distribution = Distribution(),  # noqa: B008 it is frozen
) -> tuple[Callable[[], None], Roles]:
    """One optimizer step as a function, its optimizer's state already there."""
    block = {"block_size": 16} if shape.heads == 2 else {}
    options = {"dense_layers": 0, "min_tokens": 0}
    model = build(shape, count, device, mode)
    roles = Roles(model, "radial" if sparse else "dense", {**RADIAL, **block, **options} if sparse else {})
    roles.add_adapter(STUDENT, rank=rank, alpha=rank, targets=TrainConfig.targets, dropout=0.0, seed=0)
    roles.student()
    parameters = roles.parameters(STUDENT)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    clean = torch.randn(1, 16, shape.frames, shape.height, shape.width, device=device)
    noise, text = torch.randn_like(clean), torch.randn(1, 512, 4096, device=device, dtype=torch.bfloat16)
    sigma = torch.tensor([0.7], device=device)
    share_sequences(model, shares, device)
    if mode == "compiled":
        model.compile_repeated_blocks()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            velocity = model(
                hidden_states=add_noise(clean, noise, sigma).to(torch.bfloat16),
                timestep=sigma * 1000,
                encoder_hidden_states=text,
                return_dict=False,
            )[0]
        flow_loss(velocity.float(), clean, noise).backward()
        shares.reduce_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, roles


def timed(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds and peak GiB of one step."""
    if device.type != "cuda":
        before = time.perf_counter()
        step()
        return time.perf_counter() - before, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - before, torch.cuda.max_memory_allocated() / GIB


def profiled(step: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of the GPU by kind of kernel in one step, and those of the ten longest by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kinds: dict[str, float] = dict.fromkeys([*KINDS, "rest"], 0.0)
    kernels = {event.key: event.self_device_time_total / 1e6 for event in profiler.key_averages()}
    for name, seconds in kernels.items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "rest")
        kinds[kind] += seconds
    longest = sorted(kernels, key=lambda name: -kernels[name])[:10]
    return {
        "kinds_s": {kind: round(seconds, 4) for kind, seconds in kinds.items()},
        "kernels_s": {name[:80]: round(kernels[name], 4) for name in longest},
    }


def clear(device: torch.device) -> None:
    """Free what the last model held: it and its binding point at each other, so only the collector does."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attention_seconds(shape: Shape, roles: Roles, sparse: bool, device: torch.device) -> float:
    """One block's attention in a step, as gradient checkpointing runs it: two forwards and a backward."""
    mask = None
    if sparse:
        ((parts, _),) = roles.handle._run.parts.values()
        mask = parts.block_mask
    size = (1, shape.tokens, shape.heads, 128 if shape.heads > 2 else 16)
    q, k, v, grad = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(4))

    def call() -> torch.Tensor:
        if mask is not None:
            return block_sparse_attention(q, k, v, mask)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def step() -> None:
        with torch.no_grad():
            call()
        call().backward(grad)

    for x in (q, k, v):
        x.requires_grad_()
    if sparse:
        step()  # compiles where the model's calls were of other strides
    return timed(step, device)[0]


def measure(
    shape: Shape,
    sparse: bool,
    device: torch.device,
    rank: int,
    cold: bool,
    mode: str,
    shares: Distribution = Distribution(),  # noqa: B008 it is frozen
    profile: bool = False,
) -> dict[str, Any]:
    """Rows of one shape; `cold`: no step before the one that is timed."""
    seconds, peaks, density, attention_s, kinds = [], [], 1.0, None, {}
    for count in shape.counts:
        step, roles = make_step(shape, count, sparse, device, rank, mode, shares)
        if not cold:
            step()
        each = [timed(step, device)]
        if each[0][0] < 0.4:
            each += [timed(step, device) for _ in range(2)]
        seconds.append(sorted(s for s, _ in each)[len(each) // 2])
        peaks.append(max(m for _, m in each))
        report = roles.handle.report()
        if sparse:
            ((parts, _),) = roles.handle._run.parts.values()
            density = parts.block_mask.density
            # A compiled block under a checkpoint writes no report.
            assert mode == "compiled" or report.sparse_density == density, "no call ran sparse"
        if count == shape.counts[0]:
            if profile and device.type == "cuda":
                kinds = profiled(step)
            if shares.world == 1:
                attention_s = attention_seconds(shape, roles, sparse, device)
        del step, roles, report
        clear(device)
    row: dict[str, Any] = {
        "tokens": shape.tokens,
        "pixel_frames": 4 * (shape.frames - 1) + 1,
        "density": round(density, 4),
        "attention_s": None if attention_s is None else round(attention_s, 4),
        "counts": list(shape.counts),
        "step_s": [round(s, 4) for s in seconds],
        "peak_gib": [round(m, 3) for m in peaks],
        **kinds,
    }
    if len(shape.counts) == 1:
        return row
    block_s, block_gib = seconds[1] - seconds[0], peaks[1] - peaks[0]
    row |= {"block_s": round(block_s, 4), "block_gib": round(block_gib, 3), "model_blocks": shape.blocks}
    row["model_step_s"] = round(seconds[0] + (shape.blocks - 1) * block_s, 2)
    row["model_peak_gib"] = round(peaks[0] + (shape.blocks - 1) * block_gib, 1)
    return row


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument(
        "--cases",
        default=",".join(ORDER),
        help="CASE, CASE:sparse, CASE:dense or CASE:sparse:MODE; CASE of "
        + ", ".join(CASES)
        + "; MODE of "
        + ", ".join(MODES),
    )
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    parser.add_argument("--device", default="cuda", help="only the case tiny is for a CPU")
    parser.add_argument("--seconds", type=float, default=500.0, help="end within this time, imports included")
    parser.add_argument(
        "--long", type=float, default=2.0, help="a dense step of more seconds is timed without one before"
    )
    parser.add_argument("--profile", action="store_true", help="one more step, its GPU time by kind of kernel")
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU; --device cpu --cases tiny shows that it runs.", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    shares = Distribution()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        world = torch.distributed.get_world_size()
        shares = Distribution(world, torch.distributed.get_rank(), sequence=world)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python scripts/bench_training.py " + " ".join(given if given is not None else sys.argv[1:]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "rank": arguments.rank,
        "sparse": {"method": "radial", **RADIAL},
        "processes": shares.world,
        "rows": [],
    }
    wanted = [
        (name, way, mode or MODES[0])
        for entry in arguments.cases.split(",")
        for name, only, mode in [(entry.split(":") + ["", ""])[:3]]
        for way in ([only] if only else ["sparse", "dense"])
    ]
    for name, way, mode in wanted:
        shape, sparse = CASES[name], way == "sparse"
        # One dense block: attention (4 n^2 d in the forward, computed twice, and 2.5 times in the backward), linear layers.
        wide = 128 * shape.heads
        flops = 4.5 * 4 * shape.tokens**2 * wide * (0.3 if sparse else 1) + 6 * shape.tokens * wide * (
            6 * wide + 2 * shape.ffn
        )
        expected = 1.2 * flops / 6e14 * sum(shape.counts)
        whole = len(shape.counts) == 1
        cold = mode != "compiled" and expected > (10 if whole else arguments.long) and (whole or not sparse)
        needed = expected * (1 if cold else 2) + (5.0 if whole else 1.0) + 30.0 * (mode == "compiled")
        passed = time.monotonic() - STARTED
        if device.type == "cuda" and shares.world == 1 and passed + needed > arguments.seconds:
            print(f"{name}, {way}, {mode}: not started at {passed:.1f} s, it would not end in time", flush=True)
            continue
        row: dict[str, Any] = {"case": name, "attention": way, "mode": mode}
        try:
            row |= measure(shape, sparse, device, arguments.rank, cold, mode, shares, arguments.profile)
        except torch.OutOfMemoryError as error:
            row["error"] = str(error).split("\n")[0][:200]
            clear(device)
        row["ended_at_s"] = round(time.monotonic() - STARTED, 1)
        result["rows"].append(row)
        if shares.rank:
            continue
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if shares.world > 1:
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
