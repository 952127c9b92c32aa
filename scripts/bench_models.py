"""Time transformer blocks and whole forwards of real models at their true sizes, stock beside sparse, in one run.

    python scripts/bench_models.py --output models.json
    python scripts/bench_models.py --cases wan-14b-720p81,flux-4096 --seconds 150 --output models.json
    python scripts/bench_models.py --cases wan-14b-720p81 --methods radial,pisa:density=0.25,vidsparse --output models.json

Weights are random, in bf16, and one block of each kind stands for all (its module is called as often as the model has
such blocks), so the memory is that of a small model and the time that of the real one. "stock" is the model as diffusers
gives it. Each variant runs eager and with its blocks compiled one by one (what `compile_repeated_blocks` does), so
compiled is to be compared with compiled. A row counts everything inside a block; making the mask of a static method is
timed apart (`mask_s`), and `video_speedup` counts it once in 50 steps of two guidance branches. Dense steps and layers
are off: a row says what one sparse step costs. "dense, our kernel" is what a dense step of a sparse method runs: the model's
dense attention, through our kernel where that is faster. `video_with_dense_steps` is a generation with the method's own
schedule, a quarter of the steps and for most methods the first layer dense: its speed-up with our kernel for dense calls, and
with the model's own attention for them. With `--methods` the sparse rows are of these methods.

Every forward is one step further, so that what a method keeps from step to step is kept: clusters go on from the centroids
of the step before. What clustering from nothing takes longer is timed apart (`first_step_s`, all layers and both branches)
and counted once in a video. With `refresh_every` above 1 a row is the mean over so many steps, and no whole forward is run,
as one module stands for all layers and would keep the selection for them. Activations of random weights do not cluster as
those of a trained model do: their scores are all but equal, so the largest clusters of keys are taken, and "vidsparse" at
`density=0.15` computes about 0.19 of all pairs of tokens, where it computes 0.16 of a trained model's
(`bench_method_parts.py --record`); `density=0.12` comes to that. "density" is what the timed calls computed, of whole blocks
for a static mask and else in tokens; `dense_calls` says how many calls ran dense and why.

What would not end within `--seconds` is left out, and said; a forward of more than `--forward-seconds` is measured with a
half, a quarter or an eighth of the blocks (`part_forward`).

    torchrun --nproc-per-node 2 scripts/bench_models.py --cases wan-14b-720p81 --output two.json

Each case then runs on one GPU and on all, the heads shared out by Ulysses.
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
from importlib.metadata import version
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


def tiny() -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, ffn_dim=128, num_layers=1, text_dim=4096
    )


WAN_1B, WAN_14B = {"blocks": 30}, {"blocks": 40}
TWO = {"transformer_blocks": 20, "single_transformer_blocks": 40}
FLUX_BLOCKS = {"transformer_blocks": 19, "single_transformer_blocks": 38}
IMAGE = ("pooled", {"density": 0.2})
TINY = "tiny"
"""Case that shows on a CPU that the script runs."""
CASES: dict[str, Case] = {
    "wan-14b-720p81": Case(wan(40, 13824), wan_inputs(21, 45, 80), WAN_14B, RADIAL_WAN),
    "wan-14b-720p321": Case(wan(40, 13824), wan_inputs(81, 45, 80), WAN_14B, RADIAL_WAN),
    "wan-1.3b-480p81": Case(wan(12, 8960), wan_inputs(21, 30, 52), WAN_1B, RADIAL_WAN),
    "wan-14b-480p81": Case(wan(40, 13824), wan_inputs(21, 30, 52), WAN_14B, RADIAL_WAN),
    "hunyuan-720p129": Case(hunyuan, hunyuan_inputs, TWO, RADIAL_HUNYUAN),
    "cogvideox1.5-81": Case(cogvideox, cogvideox_inputs, {"transformer_blocks": 42}, None),
    "flux-1024": Case(flux, flux_inputs(64), FLUX_BLOCKS, None, IMAGE),
    "flux-4096": Case(flux, flux_inputs(256), FLUX_BLOCKS, None, IMAGE),
    "wan-1.3b-720p81": Case(wan(12, 8960), wan_inputs(21, 45, 80), WAN_1B, RADIAL_WAN),
    "wan-1.3b-720p321": Case(wan(12, 8960), wan_inputs(81, 45, 80), WAN_1B, RADIAL_WAN),
    TINY: Case(tiny, wan_inputs(5, 8, 10), {"blocks": 3}, ("radial", {"block_size": 16})),
}


PARTS = (1, 2, 4, 8)
"""A forward too long for `--forward-seconds` is measured with this part of the blocks."""

STEPS, BRANCHES = 50, 2
FORWARDS = STEPS * BRANCHES
"""Of a generation, with two guidance branches."""

OUR_DENSE = "dense, our kernel"

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
"""Processes that torchrun started, one for each GPU."""

COMPILE_SECONDS = 20.0
"""Kept back for compiling a block or a method's kernels, from experience."""


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    cases = ",".join(name for name in CASES if name != TINY)
    parser.add_argument("--cases", default=cases, help="comma-separated, most important first, of " + ", ".join(CASES))
    parser.add_argument(
        "--methods", type=given_methods, help="comma-separated, NAME:OPTION=VALUE:..., in place of a case's own"
    )
    parser.add_argument("--modes", default="eager,compiled", help="eager, compiled or both")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
    parser.add_argument("--device", default="cuda", help="only the case tiny is for a CPU")
    parser.add_argument("--forward-seconds", type=float, default=13.0, help="longer forwards in part")
    parser.add_argument("--seconds", type=float, default=500.0, help="end within this time")
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU; --device cpu --cases tiny shows that it runs.", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python scripts/bench_models.py " + " ".join(given if given is not None else sys.argv[1:]),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU",
        "versions": {"torch": torch.__version__, "diffusers": version("diffusers"), "triton": version("triton")},
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "rows": [],
    }
    deadline = time.monotonic() + arguments.seconds
    if WORLD > 1:
        rank = int(os.environ["LOCAL_RANK"])
        if arguments.device == "cuda":
            torch.cuda.set_device(rank)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo")
        arguments.output = arguments.output if rank == 0 else None
    for name in arguments.cases.split(","):
        for row in run_case(name, CASES[name], arguments, deadline):
            result["rows"].append(row)
            if WORLD > 1 and torch.distributed.get_rank():
                continue
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    return 0


def given_methods(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name and settings by the words that gave them."""
    methods = {}
    for words in text.split(","):
        name, *pairs = words.split(":")
        try:
            options = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in pairs)}
            Recipe.from_options(name, **options)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{words!r}: {error}") from error
        methods[words] = name, options
    return methods


def agreed(value: bool) -> bool:
    """What the first process says, so that all do the same."""
    if WORLD == 1:
        return value
    said = [value]
    torch.distributed.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    return said[0]


def share_out(model: Any) -> None:
    """Tokens and heads of a model over all GPUs."""
    from diffusers import ContextParallelConfig  # pyright: ignore[reportPrivateImportUsage]

    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD))


def build(case: Case, device: torch.device) -> Any:
    """The model with random weights in bf16, but for what diffusers keeps in fp32."""
    torch.manual_seed(0)
    with device:
        model = case.build().eval()
    kept = tuple(model._keep_in_fp32_modules or ())
    for path, parameter in model.named_parameters():
        parameter.data.normal_(std=0.02)
        if not any(name in path for name in kept):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


@torch.no_grad()
def run_case(name: str, case: Case, arguments: argparse.Namespace, deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of one case: stock, at density 0.2 and as published or as given, first eager and then compiled."""
    variants: list[tuple[str, tuple[str, dict[str, Any]] | None]] = [("stock", None)]
    if WORLD == 1:
        variants.append((OUR_DENSE, ("dense", {"dense_backend": "auto"})))
    variants += arguments.methods.items() if arguments.methods else [("density 0.2", case.sparse)]
    if case.published is not None and not arguments.methods:
        variants.append(("published", case.published))
    if case.sparse == IMAGE and not arguments.methods:
        # What a user gets who leaves `min_tokens` alone: dense, where selecting does not pay.
        variants.append(("min_tokens as by default", (IMAGE[0], {**IMAGE[1], "min_tokens": None})))
    clock = Clock(torch.device(arguments.device))
    model, inputs, mask_seconds = None, None, {}
    # Seconds of all blocks by number of GPUs and mode, and of the blocks as measured first.
    stock: dict[Any, Any] = {}
    ours: dict[bool, float] = {}
    modes = [(gpus, mode == "compiled") for gpus in sorted({1, WORLD}) for mode in arguments.modes.split(",")]
    shared = False
    for gpus, compiled in modes:
        for label, method in variants:
            row = {"case": name, "variant": label, "compiled": compiled, "gpus": gpus}
            recipe = None if method is None else Recipe.from_options(method[0], **{**TIMED, **method[1]})
            every = 1 if recipe is None else recipe.schedule.refresh_every
            # Six forwards of one block of each kind, or three and three in each step that a selection serves; how long
            # they take is known after the first row.
            needed = (3 + 3 * every) * sum(stock.get("blocks", {"": 5000.0}).values()) / 1000
            compiles = compiled or (recipe is not None and label not in mask_seconds)
            if agreed(time.monotonic() + needed + (COMPILE_SECONDS if compiles else 0) > deadline):
                print(f"{name}, {label}, {'compiled' if compiled else 'eager'}: not started, it would not end in time")
                continue
            if model is None:
                model, inputs = build(case, clock.device), case.inputs(clock.device)
            if gpus > 1 and not shared:
                share_out(model)
                shared = True
            handle = None
            try:
                if recipe is not None:
                    handle = vidsparse.apply(model, recipe)
                    if agreed(label not in mask_seconds):
                        mask_seconds[label] = seconds_of_mask(model, inputs, handle, clock)
                before = time.perf_counter()
                if gpus > 1 and compiled:
                    # In their first call the hooks of diffusers do what cannot be traced.
                    one_forward(model, inputs, clock)
                for block in (block for key in case.repeats for block in getattr(model, key) if compiled):
                    block.compile(fullgraph=True, backend=arguments.backend)
                one_forward(model, inputs, clock)
                first = time.perf_counter() - before
                blocks = block_times(model, inputs, case, clock, every)
                total = sum(case.repeats[key] * value for key, value in blocks.items()) / 1000
                # On several GPUs the first block is where diffusers splits the tokens, so it cannot stand for the others.
                part = next((n for n in PARTS if total / n < arguments.forward_seconds), None)
                part = part if gpus == 1 and every == 1 else None
                forward, counts, expected = None, {}, 0.0
                if agreed(part is not None and time.monotonic() + total / (part or 1) < deadline):
                    counts = {key: max(1, count // (part or 1)) for key, count in case.repeats.items()}
                    forward = whole_forward(model, counts, inputs, clock, compiled, short=total < 1)
                    expected = sum(counts[key] * value for key, value in blocks.items()) / 1000
            except Exception as error:
                yield row | {"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
                continue
            finally:
                for block in (block for key in case.repeats for block in getattr(model, key)):
                    block._compiled_call_impl = None
                if compiled:
                    torch._dynamo.reset()
                report = handle.report() if handle is not None else None
                if handle is not None:
                    handle.remove()
            if method is None:
                stock |= {(gpus, compiled): total, "blocks": stock.get("blocks", blocks)}
            if label == OUR_DENSE:
                ours[compiled] = total
            against = stock.get((gpus, compiled))
            mask = mask_seconds.get(label, 0.0)
            # Methods that cluster start anew in a first step.
            clusters = recipe is not None and hasattr(recipe.config, "first_iterations")
            if clusters:
                # A mask serves all layers and branches; each clusters for itself. One block of each kind was timed.
                mask *= BRANCHES * sum(case.repeats.values()) / len(case.repeats)
            whole = {}
            if method is not None and label != OUR_DENSE and against:
                whole = {
                    name: with_dense_steps(method, case, against, dense, total, mask)
                    # Eager dense steps have norms and rotary embedding in one kernel, which stock blocks have not.
                    for name, dense in (("our kernel", ours.get(compiled)), ("the model's own", compiled and against))
                    if dense
                }
            yield row | {
                "density": 1.0 if report is None else round(report.sparse_density or 1.0, 4),
                "backend": "default" if report is None else "+".join(sorted({r.backend for r in report.rows})),
                **({"dense_calls": report.dense_calls} if report is not None and report.dense_calls else {}),
                **({"notes": report.notes} if report is not None and report.notes else {}),
                "block_ms": {key: round(value, 2) for key, value in blocks.items()},
                "all_blocks_s": round(total, 3),
                "forward_s": None if forward is None or part != 1 else round(forward, 3),
                **({} if forward is None else {"forward_over_blocks": round(forward / expected, 3)}),
                **(
                    {}
                    if forward is None or part == 1
                    else {"part_forward": {"blocks": counts, "s": round(forward, 3)}}
                ),
                "speedup_over_stock": against and round(against / total, 2),
                "video_speedup": against and round(FORWARDS * against / (FORWARDS * total + mask), 2),
                **({"video_with_dense_steps": whole} if whole else {}),
                "first_step_s" if clusters else "mask_s": round(mask, 2),
                "first_forward_s": round(first, 2),
                "peak_gib": clock.peak_gib(),
            }


def with_dense_steps(
    method: tuple[str, dict[str, Any]], case: Case, stock: float, dense: float, sparse: float, mask: float
) -> float:
    """Speed-up of a generation in which the method's own schedule leaves steps and layers dense.

    Args:
        method: its name and settings.
        case: the model.
        stock, dense, sparse: seconds of all blocks: of the model as it is, in a dense step, in a sparse one.
        mask: seconds of making the mask or of clustering from nothing, once.
    """
    schedule = Recipe.from_options(*method[:1], **method[1]).schedule
    warm_up = schedule.warmup(STEPS) / STEPS
    first = schedule.dense_layers / sum(case.repeats.values())
    step = warm_up * dense + (1 - warm_up) * (first * dense + (1 - first) * sparse)
    return round(FORWARDS * stock / (FORWARDS * step + mask), 2)


class Clock:
    """Time on a device: events of a GPU, the host's clock for a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds."""
        return start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1000

    def peak_gib(self) -> float | None:
        """Most memory since the last question."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 1)


def next_step(model: Any, inputs: Any) -> None:
    """One forward at a lower timestep than the last: where no pipeline says so, that is how a bound model knows a new step."""
    timestep = inputs["timestep"]
    timestep -= 1 / 256 if timestep.is_floating_point() else 1
    model(**inputs, return_dict=False)


def one_forward(model: Any, inputs: Any, clock: Clock) -> float:
    """Seconds of one forward."""
    clock.wait()
    before = time.perf_counter()
    next_step(model, inputs)
    clock.wait()
    return time.perf_counter() - before


def seconds_of_mask(model: Any, inputs: Any, handle: Any, clock: Clock) -> float:
    """How much longer a forward takes that must build its mask or cluster from nothing, kernels being compiled."""
    every = handle.recipe.schedule.refresh_every
    for _ in range(every + 1):
        one_forward(model, inputs, clock)
    handle.reset()
    # The last one selects again.
    first, *_, later = [one_forward(model, inputs, clock) for _ in range(every + 1)]
    return max(0.0, first - later)


def block_times(model: Any, inputs: Any, case: Case, clock: Clock, every: int) -> dict[str, float]:
    """Milliseconds of the one block of each kind, the median of five; of one where that takes seconds.

    Where a selection serves `every` steps, the mean over these, as they cost differently.
    """
    with timed_blocks(model, case, clock) as times:
        long = agreed(one_forward(model, inputs, clock) > 1)
        for _ in range(every * (1 if long else 5) - 1):
            # Without waiting, so that a block of a short sequence does not wait for the host more than in a generation.
            next_step(model, inputs)
        clock.wait()
    milliseconds = {key: [clock.between(a, b) for a, b in pairs] for key, pairs in times.items()}
    return {
        key: statistics.mean(statistics.median(of[first::every]) for first in range(every))
        for key, of in milliseconds.items()
    }


@contextmanager
def timed_blocks(model: Any, case: Case, clock: Clock) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """Marks around the one block of each kind; around what torch.compile made of it, not in it as a hook would be."""
    times: dict[str, list[tuple[Any, Any]]] = {key: [] for key in case.repeats}
    saved = {key: getattr(model, key)[0]._compiled_call_impl for key in case.repeats}
    for key, compiled in saved.items():
        block = getattr(model, key)[0]

        def timed(*args: Any, key: str = key, call: Any = compiled or block._call_impl, **kwargs: Any) -> Any:
            start = clock.mark()
            output = call(*args, **kwargs)
            times[key].append((start, clock.mark()))
            return output

        block._compiled_call_impl = timed
    try:
        yield times
    finally:
        for key, compiled in saved.items():
            getattr(model, key)[0]._compiled_call_impl = compiled


def whole_forward(model: Any, counts: dict[str, int], inputs: Any, clock: Clock, compiled: bool, short: bool) -> float:
    """Seconds of a forward with so many blocks of each kind, all of them the same module."""
    saved = {key: getattr(model, key) for key in counts}

    def forward(counts: dict[str, int]) -> float:
        for key, count in counts.items():
            setattr(model, key, torch.nn.ModuleList([saved[key][0]] * count))
        return one_forward(model, inputs, clock)

    try:
        if compiled:
            # A block may be compiled once more for its own output as input.
            forward(dict.fromkeys(counts, 2))
        return min(forward(counts) for _ in range(4 if short else 1))
    finally:
        for key, blocks in saved.items():
            setattr(model, key, blocks)


if __name__ == "__main__":
    sys.exit(main())
