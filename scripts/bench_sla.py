"""Time whole calls of sparse-linear attention on one GPU: selection, feature maps, both branches and the projection.

    python scripts/bench_sla.py --output sla.json
    python scripts/bench_sla.py --public SLA/sparse_linear_attention --public SLA-1/sparse_linear_attention

Ours is what a layer with the method "sla" runs, selecting included. `--public` takes the package of a checkout of
github.com/thu-ml/SLA (its main branch: linear attention over all keys; its branch SLA-1: over those not selected) and may be
given twice. FlexAttention computes the blocks that ours selected, dense is cuDNN: attention alone, nothing selected. Values
are checked against float64 first, ours and the public ones, each for the blocks that it selected; where ours are wrong no
speed is reported.

All calls of a shape and density are timed in turns. "gpu" is the time on the device with the host far ahead; "call" that of
one call after another, which waits for the host where that is slower. The backward is timed right after its own forward, so
that everything made once per selection (transposed lists) is in it. The public module gets tensors in the layout that it
wants, `[batch, heads, tokens, head_dim]`; ours `[batch, tokens, heads, head_dim]`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from vidsparse import LatentGrid, Recipe, TokenLayout, make_context
from vidsparse.attention import attend
from vidsparse_kernels import add_linear_branch, block_sparse_attention, select_backend
from vidsparse_kernels.block_sparse_attention.convert import to_flex_block_mask

SHAPES = {"480p": (LatentGrid(21, 30, 52), 12), "720p": (LatentGrid(21, 45, 80), 10)}
"""Wan at 81 frames: 32,760 tokens of Wan 1.3B, 75,600 of a quarter of the heads of Wan 14B."""
DENSITIES = (0.05, 0.1, 0.2)
HEAD_DIM = 128
DEVICE = "cuda"
DTYPE = torch.bfloat16
COVERAGES = ("all", "non_selected")
REPEATS = 7
SLEEP_CYCLES = 20_000_000
"""About 10 ms in which the host gets ahead."""
Tensors = list[Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write, after every density")
    parser.add_argument("--public", type=Path, action="append", default=[], help="package of a thu-ml/SLA checkout")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention, which takes long to compile")
    parser.add_argument("--seconds", type=float, default=150.0, help="start no further density after this time")
    arguments = parser.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    started = time.perf_counter()
    machine = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "command": " ".join(sys.argv),
    }
    print("  ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    public = {path.resolve().parent.name: load_package(path) for path in arguments.public}
    errors = check(public)
    for row in errors:
        print(f"{row['what']:32} {row['of']:20} error {row['error']:.2e}, allowed {row['allowed']:.0e}", flush=True)
    wrong = [row for row in errors if row["error"] > row["allowed"] and not row["public"]]
    rows: list[dict[str, Any]] = []
    if not wrong:
        for name in arguments.shapes.split(","):
            grid, num_heads = SHAPES[name]
            inputs = random_inputs(grid.num_tokens, num_heads)
            for density in DENSITIES:
                if time.perf_counter() - started < arguments.seconds:
                    rows += bench(name, grid, density, inputs, public, not arguments.no_flex)
                if arguments.output:
                    arguments.output.write_text(
                        json.dumps({"machine": machine, "errors": errors, "rows": rows}, indent=1) + "\n"
                    )
    if wrong:
        print("Wrong values, so no speed is reported.", file=sys.stderr)
    return 1 if wrong else 0


def load_package(path: Path) -> ModuleType:
    """The package in a folder, under a name of its own: two branches of one repository have the same."""
    name = "public_" + path.resolve().parent.name.replace("-", "_").replace(".", "_")
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    importlib.import_module(f"{name}.core")
    return module


def random_inputs(seq_len: int, num_heads: int) -> Tensors:
    """Query, key, value and a gradient, `[1, seq_len, num_heads, HEAD_DIM]`; blocks of tokens have means of their own."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw() -> Tensor:
        shape = (1, num_heads, seq_len, HEAD_DIM)
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE).transpose(1, 2).contiguous()

    query, key, value, grad = (draw() for _ in range(4))
    blocks = -(-seq_len // 64)
    for x in (query, key):
        means = torch.randn(1, blocks, num_heads, HEAD_DIM, generator=generator, device=DEVICE, dtype=DTYPE) / 2
        x += means.repeat_interleave(64, 1)[:, :seq_len]
    return [query, key, value, grad]


def projection() -> torch.nn.Linear:
    """As a trained one: near 0.1 of the identity, with a bias, in fp32 as the public code has it."""
    linear = torch.nn.Linear(HEAD_DIM, HEAD_DIM, device=DEVICE, dtype=torch.float32)
    generator = torch.Generator(DEVICE).manual_seed(1)
    with torch.no_grad():
        linear.weight.copy_(0.1 * torch.eye(HEAD_DIM, device=DEVICE))
        linear.weight += 0.02 * torch.randn(HEAD_DIM, HEAD_DIM, generator=generator, device=DEVICE)
        linear.bias.fill_(0.01)
    return linear


class Ours:
    """A layer's call with the method "sla"; keeps its last selection."""

    def __init__(self, grid: LatentGrid, density: float, coverage: str) -> None:
        recipe = Recipe.from_options("sla", density=density, coverage=coverage)
        context = make_context(TokenLayout(grid), recipe, DEVICE)
        parts: Any = context.parts
        self.projection = projection()
        parts = replace(parts, correction=replace(parts.correction, backend="triton"))
        self.context = replace(context, projection=self.projection, parts=parts)
        self.parameters: Tensors = list(self.projection.parameters())
        self.mask: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, selection = attend(query, key, value, self.context)
        assert selection is not None
        self.mask = selection.block_mask
        return out


class Public:
    """The public module, for tensors in its own layout."""

    def __init__(self, package: ModuleType, density: float) -> None:
        self.module = package.core.SparseLinearAttention(HEAD_DIM, density, BLKQ=128, BLKK=64).to(DEVICE)
        self.module.proj_l.load_state_dict(projection().state_dict())
        self.parameters: Tensors = list(self.module.proj_l.parameters())
        self.package, self.density = package, density

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.module(query, key, value)

    def table(self, query: Tensor, key: Tensor) -> Tensor:
        """What it selects, bool `[1, heads, q blocks, kv blocks]`."""
        return self.package.core.get_block_map(query, key, self.density, BLKQ=128, BLKK=64)[0].bool()


def check(public: dict[str, ModuleType]) -> list[dict[str, Any]]:
    """Relative errors of output and gradients against float64, each for the blocks that were selected."""
    grid, rows = LatentGrid(3, 30, 46), []
    query, key, value, grad = random_inputs(grid.num_tokens, 2)
    cases: list[tuple[str, str, Any, Callable[[Tensor], Tensor]]] = [
        (f"ours, {coverage}", coverage, Ours(grid, 0.25, coverage), lambda x: x) for coverage in COVERAGES
    ]
    for name, package in public.items():
        cases.append((f"public {name}", coverage_of(package), Public(package, 0.25), swapped))
    for name, coverage, call, ordered in cases:
        tensors = [ordered(x).detach().requires_grad_() for x in (query, key, value)]
        try:
            out = call(*tensors)
            got = [out, *torch.autograd.grad(out, [*tensors, *call.parameters], ordered(grad))]
        except Exception as error:  # of others' code or a GPU that it does not know
            if isinstance(call, Ours):
                raise
            print(f"{name} did not run: {str(error).splitlines()[0]}", flush=True)
            continue
        table = call.mask.to_dense() if isinstance(call, Ours) else call.table(*tensors[:2])
        wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
        weights = [x.detach().double().requires_grad_() for x in call.parameters]
        truth = in_float64((wide[0], wide[1], wide[2]), weights[0], weights[1], table, coverage)
        want = [truth, *torch.autograd.grad(truth, [*wide, *weights], grad.double())]
        names = ("output", "gradient of query", "gradient of key", "gradient of value", "of weight", "of bias")
        for index, (which, a, b) in enumerate(zip(names, got, want, strict=True)):
            a = ordered(a) if index < 4 else a
            error = float((a.detach().double() - b.detach()).norm() / b.detach().norm())
            # Two roundings to bf16 of weights of size 1 and of the output are 0.4 %; eager bf16 makes about twice that.
            rows.append(
                {"what": name, "of": which, "error": error, "allowed": 2e-2, "public": isinstance(call, Public)}
            )
    return rows


def coverage_of(package: ModuleType) -> str:
    """Whether a public package's kernel takes features (SLA-1: keys not selected) or not (main: all keys)."""
    names = package.core._attention.forward.__code__.co_varnames
    return "non_selected" if "c_q" in names else "all"


def swapped(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def in_float64(
    tensors: tuple[Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor, table: Tensor, coverage: str
) -> Tensor:
    """SLA written out over all pairs of tokens."""
    q, k, v = (x.transpose(1, 2) for x in tensors)
    listed = table.repeat_interleave(128, 2)[:, :, : q.shape[2]].repeat_interleave(64, 3)[..., : k.shape[2]]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    sparse = scores.masked_fill(~listed, -torch.inf).softmax(-1) @ v
    pairs = q.softmax(-1) @ k.softmax(-1).transpose(-1, -2)
    if coverage == "non_selected":
        pairs = pairs.masked_fill(listed, 0.0)
    linear = pairs @ v / (pairs.sum(-1, keepdim=True) + (1e-5 if coverage == "all" else 0.0))
    return (sparse + F.linear(linear, weight, bias)).transpose(1, 2)


def bench(
    shape: str, grid: LatentGrid, density: float, inputs: Tensors, public: dict[str, ModuleType], with_flex: bool
) -> list[dict[str, Any]]:
    """Rows of one shape and density, printed too."""
    query, key, value, grad = inputs
    theirs = [swapped(x) for x in inputs]
    num_heads, seq_len = query.shape[2], query.shape[1]
    calls: dict[str, tuple[Any, Tensors, Tensors]] = {}
    for coverage in COVERAGES:
        ours = Ours(grid, density, coverage)
        calls[f"ours, {coverage}"] = ours, inputs, ours.parameters
    for name, package in public.items():
        call = Public(package, density)
        calls[f"public {name}, {coverage_of(package)}"] = call, theirs, call.parameters
    ours = calls["ours, all"][0]
    with torch.no_grad():
        ours(query, key, value)
    compiled: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    options: dict[str, Any] = {"BLOCK_M": 128, "BLOCK_N": 64, "IS_DIVISIBLE": False, "FORCE_USE_FLEX_ATTENTION": True}
    if with_flex:
        flex_mask = to_flex_block_mask(ours.mask)
        calls["flex"] = partial(compiled, block_mask=flex_mask, kernel_options=options), theirs, []
    if density == DENSITIES[0]:
        calls["dense, cuDNN"] = dense, theirs, []

    samples: dict[tuple[str, str], list[float]] = {}
    # torch 2.11 finds no tiles for FlexAttention's backward in blocks of 128 x 64.
    failed: set[tuple[str, str]] = {("flex", "backward")}
    for kind in ("gpu", "call", "gpu"):
        for name, (call, tensors, parameters) in calls.items():
            repeats = 3 if name.startswith("dense") else REPEATS
            leaves = [x.detach().requires_grad_() for x in tensors[:3]]
            back = partial(backward, [*leaves, *parameters], tensors[3])
            for direction in ("forward", "backward"):
                if (name, direction) in failed:
                    continue
                try:
                    if direction == "forward":
                        with torch.no_grad():
                            times = measure(partial(call, *tensors[:3]), repeats, kind == "gpu")
                    else:
                        times = measure(back, repeats, kind == "gpu", partial(call, *leaves))
                except Exception as error:  # of others' code, or memory
                    if isinstance(call, Ours):
                        raise
                    print(f"{name}, {direction}, did not run: {str(error).splitlines()[0][:160]}", flush=True)
                    failed.add((name, direction))
                    continue
                samples.setdefault((name, f"{direction} {kind}"), []).extend(times)
    shared = {}
    for name, run in parts_of(ours, inputs).items():
        with torch.no_grad():
            samples[name, "forward gpu"] = measure(run, REPEATS, True)
    for name, (call, tensors, _) in calls.items():
        if isinstance(call, Public) and (name, "forward") not in failed:
            theirs_listed = call.table(*tensors[:2])
            both = (ours.mask.to_dense() & theirs_listed).sum() / theirs_listed.sum()
            shared[name] = round(float(both), 3)

    rows = []
    for (name, what), times in samples.items():
        times.sort()
        row = {
            "shape": shape, "seq_len": seq_len, "num_heads": num_heads, "head_dim": HEAD_DIM, "density_asked": density,
            "density": round(ours.mask.density, 4), "what": name, "time": what, "ms": times[len(times) // 2],
            "ms_least": times[0], "ms_most": times[-1], "blocks_as_ours": shared.get(name),
        }  # fmt: skip
        rows.append(row)
    print(
        f"{shape}: {seq_len} tokens, {num_heads} heads, density {ours.mask.density:.3f}; ms on the device (from an idle one)"
    )
    for name in dict.fromkeys(name for name, _ in samples):
        cells = []
        for direction in ("forward", "backward"):
            found = {row["time"]: row["ms"] for row in rows if row["what"] == name}
            alone, called = (found.get(f"{direction} {kind}") for kind in ("gpu", "call"))
            if alone is not None:
                cells.append(f"{direction} {alone:8.3f}" + (f" ({called:8.3f})" if called is not None else ""))
        print(f"  {name:34} {'  '.join(cells)}", flush=True)
    return rows


def parts_of(ours: Ours, inputs: Tensors) -> dict[str, Callable[[], Any]]:
    """What a forward of ours is made of."""
    query, key, value, _ = inputs
    parts, mask = ours.context.parts, ours.mask
    assert parts is not None and parts.selector is not None and mask is not None
    backend, _ = select_backend(query, key, value, mask)
    return {
        "  select": partial(parts.selector.select, query, key, ours.context),
        f"  attend, {backend}": partial(block_sparse_attention, query, key, value, mask, backend=backend),
        **{
            f"  add linear branch, {coverage}": partial(
                add_linear_branch, query, query, key, value, ours.projection.weight, ours.projection.bias, mask,
                coverage=coverage, backend="triton",
            )
            for coverage in COVERAGES
        },
    }  # fmt: skip


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value)


def backward(leaves: Tensors, grad: Tensor, out: Tensor) -> Any:
    return torch.autograd.grad(out, leaves, grad)


def measure(
    run: Callable[..., Any], repeats: int, host_ahead: bool, prepare: Callable[[], Any] | None = None
) -> list[float]:
    """Milliseconds of single runs, by CUDA events, after a warm-up; `prepare` is not timed and its result is passed on."""
    found: list[float] = []
    for index in range(-1, repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if host_ahead:
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
        given = () if prepare is None else (prepare(),)
        start.record()
        run(*given)
        stop.record()
        del given
        stop.synchronize()
        if index >= 0:
            found.append(start.elapsed_time(stop))
    return found


if __name__ == "__main__":
    sys.exit(main())
