"""Time transformer blocks and whole forwards of real models at their true sizes, stock beside sparse, in one run.

    python scripts/bench_models.py --output models.json
    python scripts/bench_models.py --cases wan-14b-720p81,flux-4096 --compile --output models.json

Weights are random, in bf16, and one block of each kind stands for all (its module is called as often as the model has
such blocks), so the memory is that of a small model and the time that of the real one. "stock" is the model as diffusers
gives it, "cuDNN" the same with the fastest dense kernel of an H200. A sparse row counts everything inside a block; the
mask of a static method is made once per shape and its seconds stand beside it. Dense steps and layers are off: a row says
what one sparse step costs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vidsparse
from vidsparse.recipe import Recipe

RADIAL_WAN = ("radial", {"decay_factor": 0.2})
RADIAL_HUNYUAN = ("radial", {"decay_factor": 0.95})
TIMED = {"warmup_steps": 0, "dense_layers": 0, "min_tokens": 0}


@dataclass(frozen=True)
class Case:
    """A model at one shape.

    Attributes:
        build: makes it with one block of each kind.
        inputs: device -> arguments of its forward.
        repeats: for each list of blocks, how many the real model has.
        published: method and settings of the method's authors for this model.
        sparse: method and settings at density 0.2.
    """

    build: Callable[[], Any]
    inputs: Callable[[torch.device], dict[str, Any]]
    repeats: dict[str, int]
    published: tuple[str, dict[str, Any]] | None
    sparse: tuple[str, dict[str, Any]] = ("radial", {"density": 0.2})


def randn(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def wan(heads: int, ffn: int) -> Callable[[], Any]:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return lambda: WanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, num_layers=1)


def wan_inputs(frames: int, height: int, width: int) -> Callable[[torch.device], dict[str, Any]]:
    return lambda device: {
        "hidden_states": randn(device, 1, 16, frames, 2 * height, 2 * width),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": randn(device, 1, 512, 4096),
    }


def hunyuan() -> Any:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1)


def hunyuan_inputs(device: torch.device) -> dict[str, Any]:
    return {
        "hidden_states": randn(device, 1, 16, 33, 90, 160),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": randn(device, 1, 256, 4096),
        "encoder_attention_mask": (torch.arange(256, device=device) < 60)[None].long(),
        "pooled_projections": randn(device, 1, 768),
        "guidance": torch.full((1,), 6000.0, device=device, dtype=torch.bfloat16),
    }


def cogvideox() -> Any:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=48,
        num_layers=1,
        patch_size_t=2,
        patch_bias=False,
        sample_height=96,
        sample_width=170,
        sample_frames=81,
        use_rotary_positional_embeddings=True,
    )


def cogvideox_inputs(device: torch.device) -> dict[str, Any]:
    return {
        "hidden_states": randn(device, 1, 22, 16, 96, 170),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": randn(device, 1, 226, 4096),
        "image_rotary_emb": tuple(torch.randn(11 * 48 * 85, 64, device=device) for _ in range(2)),
    }


def flux() -> Any:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def flux_inputs(side: int) -> Callable[[torch.device], dict[str, Any]]:
    def inputs(device: torch.device) -> dict[str, Any]:
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
        return {
            "hidden_states": randn(device, 1, side * side, 64),
            "encoder_hidden_states": randn(device, 1, 512, 4096),
            "pooled_projections": randn(device, 1, 768),
            "timestep": torch.full((1,), 0.5, device=device, dtype=torch.bfloat16),
            "img_ids": ids.to(device, torch.bfloat16 if side < 256 else torch.float32),
            "txt_ids": torch.zeros(512, 3, device=device),
            "guidance": torch.full((1,), 3.5, device=device, dtype=torch.bfloat16),
        }

    return inputs


WAN_1B, WAN_14B = {"blocks": 30}, {"blocks": 40}
TWO = {"transformer_blocks": 20, "single_transformer_blocks": 40}
FLUX_BLOCKS = {"transformer_blocks": 19, "single_transformer_blocks": 38}
IMAGE = ("pooled", {"density": 0.2})
CASES: dict[str, Case] = {
    "wan-1.3b-480p81": Case(wan(12, 8960), wan_inputs(21, 30, 52), WAN_1B, RADIAL_WAN),
    "wan-1.3b-720p81": Case(wan(12, 8960), wan_inputs(21, 45, 80), WAN_1B, RADIAL_WAN),
    "wan-1.3b-720p321": Case(wan(12, 8960), wan_inputs(81, 45, 80), WAN_1B, RADIAL_WAN),
    "wan-14b-480p81": Case(wan(40, 13824), wan_inputs(21, 30, 52), WAN_14B, RADIAL_WAN),
    "wan-14b-720p81": Case(wan(40, 13824), wan_inputs(21, 45, 80), WAN_14B, RADIAL_WAN),
    "wan-14b-720p321": Case(wan(40, 13824), wan_inputs(81, 45, 80), WAN_14B, RADIAL_WAN),
    "hunyuan-720p129": Case(hunyuan, hunyuan_inputs, TWO, RADIAL_HUNYUAN),
    "cogvideox1.5-81": Case(cogvideox, cogvideox_inputs, {"transformer_blocks": 42}, None),
    "flux-1024": Case(flux, flux_inputs(64), FLUX_BLOCKS, None, IMAGE),
    "flux-4096": Case(flux, flux_inputs(256), FLUX_BLOCKS, None, IMAGE),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated, of " + ", ".join(CASES))
    parser.add_argument("--compile", action="store_true", help="with torch.compile of the repeated blocks as well")
    parser.add_argument("--forward-seconds", type=float, default=30.0, help="no whole forward that would take longer")
    parser.add_argument("--seconds", type=float, default=500.0, help="start no further case after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "rows": [],
    }
    started = time.monotonic()
    for name in arguments.cases.split(","):
        if time.monotonic() - started > arguments.seconds:
            print(f"{name}: not started, {arguments.seconds:g} s are over")
            continue
        for row in run_case(name, CASES[name], arguments):
            result["rows"].append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        torch.cuda.empty_cache()
    return 0


@torch.no_grad()
def run_case(name: str, case: Case, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device("cuda")
    torch.manual_seed(0)
    with device:
        model = case.build().eval()
    kept = tuple(model._keep_in_fp32_modules or ())
    for path, parameter in model.named_parameters():
        parameter.data.normal_(std=0.02)
        if not any(name in path for name in kept):
            parameter.data = parameter.data.to(torch.bfloat16)
    inputs = case.inputs(device)
    variants: list[tuple[str, str | None, tuple[str, dict[str, Any]] | None]] = [
        ("stock", None, None),
        ("cuDNN", "_native_cudnn", None),
        ("density 0.2", None, case.sparse),
    ]
    if case.published is not None:
        variants.append(("published", None, case.published))
    baseline: dict[bool, float] = {}
    for compiled in (False, True) if arguments.compile else (False,):
        for label, backend, method in variants:
            handle, mask_seconds, density = None, 0.0, 1.0
            if backend is not None:
                try:
                    model.set_attention_backend(backend)
                except (ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
                    print(f"{name} {label}: {error}")
                    continue
            if method is not None:
                handle = vidsparse.apply(model, Recipe.from_options(method[0], **method[1], **TIMED))
                before = time.perf_counter()
                one_forward(model, inputs)
                torch.cuda.synchronize()
                mask_seconds = time.perf_counter() - before
            if compiled:
                model.compile_repeated_blocks(fullgraph=True)
            with timed_blocks(model, case) as times:
                for _ in range(4):
                    one_forward(model, inputs)
            torch.cuda.synchronize()
            # The first calls warm up.
            blocks = {key: statistics.median(a.elapsed_time(b) for a, b in pairs[2:]) for key, pairs in times.items()}
            total = sum(case.repeats[key] * value for key, value in blocks.items())
            forward = None
            if total / 1000 < arguments.forward_seconds:
                forward = whole_forward(model, case, inputs)
            if handle is not None:
                report = handle.report()
                density = report.sparse_density or 1.0
                rows = report.rows
                backends = sorted({row.backend for row in rows})
                handle.remove()
            else:
                backends = [backend or "default"]
                if backend is not None:
                    model.reset_attention_backend()
                    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

                    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
            if compiled:
                for key in case.repeats:
                    for block in getattr(model, key):
                        block._compiled_call_impl = None
                torch._dynamo.reset()
            baseline.setdefault(compiled, total)
            yield {
                "case": name,
                "variant": label,
                "compiled": compiled,
                "density": round(density, 4),
                "backend": "+".join(backends),
                "block_ms": {key: round(value, 2) for key, value in blocks.items()},
                "all_blocks_s": round(total / 1000, 3),
                "forward_s": None if forward is None else round(forward, 3),
                "speedup_over_stock": round(baseline[compiled] / total, 2),
                "first_forward_s": round(mask_seconds, 2),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
            }
            torch.cuda.reset_peak_memory_stats()


def one_forward(model: Any, inputs: dict[str, Any]) -> None:
    model(**inputs, return_dict=False)


@contextmanager
def timed_blocks(model: Any, case: Case) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """CUDA events around the one block of each kind."""
    times: dict[str, list[tuple[Any, Any]]] = {key: [] for key in case.repeats}
    hooks = []
    for key in case.repeats:
        block = getattr(model, key)[0]

        def before(module: Any, args: Any, key: str = key) -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            times[key].append((start, end))
            start.record()

        def after(module: Any, args: Any, output: Any, key: str = key) -> None:
            times[key][-1][1].record()

        hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    yield times
    for hook in hooks:
        hook.remove()


def whole_forward(model: Any, case: Case, inputs: dict[str, Any]) -> float:
    """Seconds of a forward with as many blocks as the real model has, all of them the same module."""
    saved = {key: getattr(model, key) for key in case.repeats}
    for key, count in case.repeats.items():
        setattr(model, key, torch.nn.ModuleList([saved[key][0]] * count))
    try:
        torch.cuda.synchronize()
        before = time.perf_counter()
        one_forward(model, inputs)
        torch.cuda.synchronize()
        return time.perf_counter() - before
    finally:
        for key, blocks in saved.items():
            setattr(model, key, blocks)


if __name__ == "__main__":
    sys.exit(main())
