"""Run block_sparse_attention on random cases against float64 until a number of cases or seconds is reached.

    python scripts/soak_block_sparse.py --cases 10000 --seconds 150 --compile-workers 12 --output soak.json
    python scripts/soak_block_sparse.py --device cpu --backends reference,sdpa --seconds 30
    python scripts/soak_block_sparse.py --case 0:17            # only case 17 of seed 0, as a failure prints it

A case is drawn from (seed, index) alone: lengths, heads, strides, mask, bias, scale, and whether gradients go through
the output, the LSE or both. Every backend asked for computes it, and every result has to be as near to float64 as
eager attention at the same dtype, by `assert_close_to_oracle`. What a backend does not do is counted with its reason.
All memory that torch hands out during a call holds NaN, so that an element nobody wrote shows.

In fp32 that budget is one evaluation's largest rounding error. A failure there also says how the error compares with
what the formulas of fused kernels lose in eager fp32; that is a hint and does not change the verdict.

Triton compiles again for other head sizes, dtypes, block sizes and flags, and wherever a length or a stride becomes 1
or starts or stops being a multiple of 16. So these come from a pool of combinations, and the rest is drawn freely
within one: a run of 10,000 cases compiles about as often as there are combinations. `--compile-workers` compiles them
beforehand, in parallel processes that share Triton's cache on disk.

Exit code: 0 all right, 1 something is wrong, 2 the arguments are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsparse_kernels import BlockMask, UnsupportedBackendError, available_backends, block_sparse_attention
from vidsparse_kernels.testing import assert_close_to_oracle, masked_attention_oracle, token_mask

HEAD_DIMS = (64, 128, 64, 128, 64, 128, 16, 32, 40, 72, 80, 96, 160, 192, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_SIZES = (16, 32, 64, 128, 256)
HEADS = ((1, 1), (2, 1), (3, 1), (2, 2), (1, 4), (2, 3))
"""(kv heads, query heads per kv head)."""
LAYOUTS = (
    "contiguous", "heads first", "fused", "gaps", "padded dim", "odd", "dim not innermost", "expanded batch",
    "expanded heads", "expanded tokens",
)  # fmt: skip
LARGE_DIMS = {"large batch": 0, "large tokens": 1, "large heads": 2}
LARGE_ELEMENTS = (1 << 31) + (1 << 28)
GRADIENTS = ("both", "none", "out", "both", "lse", "none")
PATTERNS = {"random": 8, "empty and full rows": 5, "one per row": 2, "one": 1, "none": 1, "all": 2}
FP32_ORDERS = 6
DRAWS = 8000
MAX_LENGTHS = 200
"""Of lengths per combination; those that would compile anew are dropped."""
REPEAT_EVERY = 50
MAX_FAILURES = 20
WARM_SECONDS = 240
DEFAULT_MAX_TOKENS = {"cuda": 1500, "cpu": 200}
DEFAULT_BACKENDS = {"cuda": ("triton", "hopper"), "cpu": ("reference", "sdpa")}


@dataclass(frozen=True)
class Combination:
    """What kernels are compiled for, with the sizes and strides that the cases of it resemble.

    Attributes:
        num_blocks: blocks of variable size on the side of query and of key; None: uniform.
        mask_lead, offsets_lead, bias_lead: stored batch and heads; `bias_lead` None: no key_bias.
        gradient: "none", or what it comes through: "out", "lse", "both".
        descriptors: use TMA descriptors wherever they are possible, not only where they pay.
        layouts: of query, key, value and the gradient of the output.
    """

    head_dim: int
    dtype: torch.dtype
    q_block_size: int
    kv_block_size: int
    batch: int
    num_kv_heads: int
    num_heads: int
    num_blocks: tuple[int | None, int | None]
    mask_lead: tuple[int, int]
    offsets_lead: tuple[int, int]
    bias_lead: tuple[int, int] | None
    gradient: str
    return_lse: bool
    descriptors: bool
    seq_len_q: int
    seq_len_kv: int
    layouts: tuple[str, str, str, str]

    def shapes(self, seq_len_q: int, seq_len_kv: int) -> list[tuple[int, int, int, int]]:
        """Of query, key, value and the gradient of the output."""
        q = (self.batch, seq_len_q, self.num_heads, self.head_dim)
        kv = (self.batch, seq_len_kv, self.num_kv_heads, self.head_dim)
        return [q, kv, kv, q]


@dataclass(frozen=True)
class Case:
    name: str
    combination: Combination
    tensors: list[Tensor]
    """Query, key, value, each with its strides."""
    grad_out: Tensor
    grad_lse: Tensor
    mask: BlockMask
    key_bias: Tensor | None
    scale: float
    gradient: str
    about: dict[str, Any]
    views: list[Tensor] = field(default_factory=list)
    """Into the large buffer."""


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments is None:
        return 2
    pool = make_pool(arguments)
    if arguments.warm:
        warm(arguments, pool)
        return 0
    started = time.monotonic()
    if arguments.compile_workers and arguments.case is None:
        run_workers(arguments)
    warmed = time.monotonic() - started
    soak = Soak(arguments, pool)
    soak.run()
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "command": command_line(arguments),
        "seconds_compiling_ahead": round(warmed, 1),
        **soak.report(),
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)
    return 1 if report["num_failures"] or not report["cases"] else 0


def parse(argv: list[str] | None) -> argparse.Namespace | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="stop after so many (default 10000)")
    parser.add_argument("--seconds", type=float, default=150, help="stop after so long (default 150)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backends", help="comma-separated; default: triton,hopper on cuda, reference,sdpa on cpu")
    parser.add_argument("--kind", choices=("all", "uniform", "variable"), default="all", help="of block sizes")
    parser.add_argument("--max-tokens", type=int, help="longest sequence; default 1500 on cuda, 200 on cpu")
    parser.add_argument("--combinations", type=int, default=40, help="size of the pool (default 40)")
    parser.add_argument("--large", action="store_true", help="also strides that lead beyond int32; needs 5 GB")
    parser.add_argument("--compile-workers", type=int, default=0, help="processes that compile ahead (default none)")
    parser.add_argument("--case", metavar="SEED:INDEX", help="run this case only")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    problem = None
    if arguments.device == "cuda" and not torch.cuda.is_available():
        problem = "--device cuda needs a CUDA GPU"
    if arguments.max_tokens is None:
        arguments.max_tokens = DEFAULT_MAX_TOKENS[arguments.device]
    if arguments.large and arguments.device != "cuda":
        problem = "--large needs --device cuda"
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
    """Runs cases and keeps count."""

    def __init__(self, arguments: argparse.Namespace, pool: list[Combination]) -> None:
        self.arguments, self.pool = arguments, pool
        self.cases, self.seconds, self.num_failures = 0, 0.0, 0
        self.failures: list[dict[str, Any]] = []
        self.stopped = None
        self.backends = {
            name: {
                "forward": 0, "backward": 0, "repeated": 0, "variable": 0, "by_dtype": Counter(),
                "by_head_dim": Counter(), "not_done": Counter(), "worst": {},
            }
            for name in arguments.backends
        }  # fmt: skip
        self.buffer: Tensor | None = None
        if arguments.large:
            self.buffer = torch.full((LARGE_ELEMENTS,), torch.nan, dtype=torch.bfloat16, device="cuda")

    def run(self) -> None:
        arguments, started = self.arguments, time.monotonic()
        indices = range(arguments.cases) if arguments.index is None else [arguments.index]
        for index in indices:
            self.seconds = time.monotonic() - started
            if self.seconds > arguments.seconds and arguments.index is None or self.stopped:
                break
            self.cases += 1
            # Whatever a case dies of is a finding, and the next one still counts.
            try:
                case = make_case(arguments, self.pool, index, self.buffer)
                truth = oracle(case, torch.float64)
                eager = oracle(case, case.combination.dtype)
            except Exception as error:
                self.fail("none: inputs or oracle", f"{arguments.seed}:{index}", {}, error)
                continue
            for name in arguments.backends:
                try:
                    self.check(name, case, truth, eager, repeat=index % REPEAT_EVERY == 0)
                except Exception as error:
                    self.fail(name, case.name, case.about, error)
            for view in case.views:
                view.fill_(torch.nan)
        self.seconds = time.monotonic() - started

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
        counts["by_head_dim"][case.combination.head_dim] += 1
        for quantity, actual in got.items():
            expected = torch.float32 if quantity == "lse" else case.combination.dtype
            assert actual.dtype == expected, f"{quantity}: {actual.dtype}, expected {expected}"
            try:
                assert_close_to_oracle(actual, eager[quantity], truth[quantity], name=quantity)
            except AssertionError as error:
                if case.combination.dtype != torch.float32 or not bool(torch.isfinite(truth[quantity]).any()):
                    raise
                fused = budget_used(actual, fused_formulas(case, eager, truth)[quantity], truth[quantity])
                raise AssertionError(
                    f"{error}; {fused:.2f} of what fused formulas in eager fp32 would allow"
                ) from error
            ratio = budget_used(actual, eager[quantity], truth[quantity])
            if ratio > counts["worst"].get(quantity, {"ratio": -1})["ratio"]:
                counts["worst"][quantity] = {"ratio": ratio, "case": case.name}
        if repeat:
            counts["repeated"] += 1
            again, _ = attend(name, case)
            for quantity, actual in got.items():
                assert torch.equal(actual, again[quantity]), f"{quantity}: other bits when run again"

    def fail(self, backend: str, case: str, about: dict[str, Any], error: Exception) -> None:
        self.num_failures += 1
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


def make_pool(arguments: argparse.Namespace) -> list[Combination]:
    """Combinations in which every head size, dtype and block size occurs about as often as it is listed."""
    rng = random.Random(f"{arguments.seed} pool")
    number = arguments.combinations

    def column(values: Any) -> list[Any]:
        repeated = [values[i % len(values)] for i in range(number)]
        rng.shuffle(repeated)
        return repeated

    # Triton's interpreter multiplies the bits of bf16 as if they were integers.
    possible = DTYPES[1:] if os.environ.get("TRITON_INTERPRET") == "1" else DTYPES
    head_dims, dtypes, heads, gradients = (column(x) for x in (HEAD_DIMS, possible, HEADS, GRADIENTS))
    q_block_sizes, kv_block_sizes, batches = column(BLOCK_SIZES), column(BLOCK_SIZES), column((1, 2, 3))
    variable = column({"all": (0, 0, 1), "uniform": (0,), "variable": (1,)}[arguments.kind])
    pool = []
    for i in range(number):
        settings = dict(
            head_dim=head_dims[i],
            dtype=dtypes[i],
            q_block_size=q_block_sizes[i],
            kv_block_size=kv_block_sizes[i],
            batch=batches[i],
            heads=heads[i],
            gradient=gradients[i],
            variable=bool(variable[i]),
        )
        if i % 4 == 0:
            # What video models use, and all that the kernels for one kind of GPU can do.
            settings.update(
                head_dim=rng.choice((64, 128, 64, 128, 72, 80, 96)),
                dtype=rng.choice(possible[:-1]),
                q_block_size=rng.choice((128, 256)),
                kv_block_size=rng.choice((64, 128)),
                descriptors=True,
                layouts=tuple(rng.choice(("contiguous", "heads first", "fused", "gaps")) for _ in range(4)),
            )
        pool.append(make_combination(rng, arguments.max_tokens, **settings))
    if arguments.large:
        for layout in LARGE_DIMS:
            for gradient in ("none", "both"):
                pool.append(
                    make_combination(
                        rng, arguments.max_tokens, head_dim=128, dtype=torch.bfloat16, q_block_size=128,
                        kv_block_size=64, batch=2, heads=(2, 2), gradient=gradient, variable=False, bias=False,
                        descriptors=layout == "large tokens", layouts=(layout,) * 4,
                    )
                )  # fmt: skip
    return pool


def make_combination(
    rng: random.Random,
    max_tokens: int,
    *,
    head_dim: int,
    dtype: torch.dtype,
    q_block_size: int,
    kv_block_size: int,
    batch: int,
    heads: tuple[int, int],
    gradient: str,
    variable: bool,
    bias: bool | None = None,
    descriptors: bool | None = None,
    layouts: tuple[str, ...] | None = None,
) -> Combination:
    """Fill in at random what is not given."""
    num_kv_heads, num_heads = heads[0], heads[0] * heads[1]

    def lead() -> tuple[int, int]:
        return rng.choice((1, batch)), rng.choice((1, num_heads))

    num_blocks: tuple[int | None, int | None] = (None, None)
    if variable:
        counts = rng.choice((1, 3, 7, 13, 30)), rng.choice((1, 3, 7, 13, 30))
        num_blocks = rng.choice(((counts[0], counts[1]), (counts[0], None), (None, counts[1])))
    large = layouts is not None and layouts[0] in LARGE_DIMS
    seq_len_q, seq_len_kv = draw_lengths(rng, max_tokens, batch * num_heads, dtype)
    if bias is None:
        bias = rng.random() < 0.3
    if layouts is None:
        # Half of the time as models pass them.
        plain = rng.random() < 0.5
        layouts = tuple(rng.choice(LAYOUTS[:3] if plain else LAYOUTS) for _ in range(4))
    if gradient != "none":
        # Equal keys or values have gradients that cancel to 0, of which only the rounding could be compared.
        layouts = (layouts[0], *(x.replace("expanded tokens", "expanded batch") for x in layouts[1:]))
    return Combination(
        head_dim=head_dim,
        dtype=dtype,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
        batch=batch,
        num_kv_heads=num_kv_heads,
        num_heads=num_heads,
        num_blocks=num_blocks,
        mask_lead=lead(),
        offsets_lead=lead(),
        bias_lead=lead() if bias else None,
        gradient=gradient,
        return_lse=rng.random() < 0.5,
        descriptors=rng.random() < 0.5 if descriptors is None else descriptors,
        seq_len_q=max(2, seq_len_q) if large else seq_len_q,
        seq_len_kv=max(2, seq_len_kv) if large else seq_len_kv,
        layouts=(layouts[0], layouts[1], layouts[2], layouts[3]),
    )


def draw_lengths(
    rng: random.Random, max_tokens: int, maps: int, dtype: torch.dtype, like: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Tokens of query and key: mostly ragged, now and then 1 or a whole number of blocks; bounded scores in all."""
    # Eager attention in fp32 sums the products of few tokens by another algorithm with smaller errors than it has for
    # many, which says nothing about what a tile of them may have.
    least = 32 if dtype == torch.float32 else 1

    def draw(example: int | None) -> int:
        kind = rng.random()
        if example == least or example is None and kind < 0.06:
            return least
        if max_tokens >= 128 and (example % 128 == 0 if example else kind < 0.2):
            return 128 * rng.randint(1, max_tokens // 128)
        return rng.randint(least, min(80, max_tokens) if kind > 0.8 else max_tokens)

    q, kv = (draw(None if like is None else like[side]) for side in (0, 1))
    while maps * q * kv > 4 * max_tokens**2 and max(q, kv) > least:
        q, kv = (max(least, q // 2), kv) if q > kv else (q, max(least, kv // 2))
    return q, kv


def compile_key(combination: Combination, seq_len_q: int, seq_len_kv: int) -> list[Any]:
    """Everything about the lengths and strides that Triton may compile differently for.

    It treats an integer as 1, as a multiple of 16, as any other, or as wider than 32 bits. Which numbers kernels take
    is guessed: lengths, blocks, tiles of any size, and the strides of inputs, results and lists that follow from them.
    """
    c, numbers = combination, []
    sides = ((seq_len_q, c.q_block_size, c.num_blocks[0]), (seq_len_kv, c.kv_block_size, c.num_blocks[1]))
    blocks = [-(-length // size) if count is None else count for length, size, count in sides]
    tiles = (16, 32, 64, 128)
    whole = []
    for (length, size, count), other in zip(sides, reversed(blocks), strict=True):
        rows = [length, other, length * c.num_heads * c.head_dim, length * c.num_kv_heads * c.head_dim]
        rows += [-(-length // tile) for tile in tiles if tile <= max(size, 32)]
        whole += [length % tile == 0 for tile in tiles]
        if count is not None:
            # Room for tiles of variable blocks: see `tiles.py`.
            own = [(length + count * (tile - 1)) // tile for tile in tiles[1:]]
            listed = [(length + (count + 1) // 2 * (tile - 1)) // tile for tile in tiles[1:]]
            rows += own + listed + [n * other for n in listed]
        numbers += rows
    numbers += [blocks[0] * blocks[1]]
    numbers += [n * c.num_heads for n in (*blocks, blocks[0] * blocks[1], seq_len_q, seq_len_kv)]
    shapes = c.shapes(seq_len_q, seq_len_kv)
    return [*map(_kind, numbers), whole, [layout_key(*x, c.dtype) for x in zip(c.layouts, shapes, strict=True)]]


@cache
def lengths_alike(combination: Combination, max_tokens: int) -> list[tuple[int, int]]:
    """Lengths of query and key that compile to the same as those of the combination, which come first."""
    c, lengths = combination, [(combination.seq_len_q, combination.seq_len_kv)]
    rng = random.Random(repr(c))
    key = compile_key(c, *lengths[0])
    for _ in range(DRAWS):
        if len(lengths) == MAX_LENGTHS:
            break
        drawn = draw_lengths(rng, max_tokens, c.batch * c.num_heads, c.dtype, lengths[0])
        if compile_key(c, *drawn) == key:
            lengths.append(drawn)
    return lengths


def layout_key(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    strides, offset = strides_of(layout, shape)
    steps = [stride for stride, size in zip(strides[:3], shape, strict=False) if size > 1]
    # TMA reads rows of 16 bytes and nothing that is repeated.
    aligned = all(step > 0 and step * dtype.itemsize % 16 == 0 for step in (*steps, offset or 16))
    return [*map(_kind, strides), aligned, offset * dtype.itemsize % 16 == 0]


def _kind(number: int) -> str:
    if number > 2**31 - 1:
        return "wide"
    return "1" if number == 1 else "multiple" if number % 16 == 0 else "other"


def strides_of(layout: str, shape: tuple[int, ...]) -> tuple[tuple[int, int, int, int], int]:
    """Strides of `[batch, seq_len, heads, head_dim]` in elements, and the offset of the first one."""
    b, s, h, d = shape
    if layout in LARGE_DIMS:
        sizes, strides = [b, s, h], [s * h * d, h * d, d]
        dim = LARGE_DIMS[layout]
        inner = d
        for other in reversed([i for i in range(3) if i != dim]):
            strides[other], inner = inner, inner * sizes[other]
        # The last index lies beyond int32, the first not.
        strides[dim] = -(-((1 << 31) + (1 << 20)) // max(1, sizes[dim] - 1) // 16) * 16
        return (strides[0], strides[1], strides[2], 1), 0
    padded = {"gaps": d + 16, "padded dim": d + 8, "odd": d + 3}.get(layout, d)
    strides, offset = [s * h * padded, h * padded, padded, 1], 0
    if layout == "heads first":
        strides[1], strides[2] = d, s * d
    elif layout == "fused":
        strides[0], strides[1], offset = 3 * s * h * d, 3 * h * d, h * d
    elif layout == "gaps":
        strides[0], strides[1] = 2 * s * (h + 1) * padded, 2 * (h + 1) * padded
    elif layout == "odd":
        strides[0], offset = strides[0] + 1, 1
    elif layout == "dim not innermost":
        strides[2], strides[3] = 1, h
    elif layout.startswith("expanded"):
        strides[("expanded batch", "expanded tokens", "expanded heads").index(layout)] = 0
    return (strides[0], strides[1], strides[2], strides[3]), offset


def make_case(
    arguments: argparse.Namespace,
    pool: list[Combination],
    index: int,
    buffer: Tensor | None = None,
    combination: Combination | None = None,
) -> Case:
    rng = random.Random(f"{arguments.seed} {index}")
    device = arguments.device
    c = combination or rng.choice(pool)
    lengths = rng.choice(lengths_alike(c, arguments.max_tokens))
    layouts = [
        alike(rng, layout, shape, c, equal_tokens=i == 0)
        for i, (layout, shape) in enumerate(zip(c.layouts, c.shapes(*lengths), strict=True))
    ]
    pattern = rng.choices(list(PATTERNS), list(PATTERNS.values()))[0]
    mask = draw_mask(rng, c, lengths, pattern, device)
    generator = torch.Generator(device).manual_seed(rng.getrandbits(48))
    bias = None
    if c.bias_lead is not None:
        bias = torch.randn(*c.bias_lead, lengths[1], generator=generator, device=device)
        shut = torch.rand(bias.shape, generator=generator, device=device)
        bias.masked_fill_(shut < rng.choice((0.0, 0.2, 0.7, 1.0)), -torch.inf)
    keys = token_mask(mask) if bias is None else token_mask(mask) & (bias > -torch.inf).unsqueeze(2)
    counts = keys.sum(-1)
    # In fp16 the products of larger values overflow in eager attention, which then allows nothing.
    large = 4.0 if c.dtype == torch.float16 else 30.0
    gradient, factors = c.gradient, [1.0, 1.0, *(rng.choice((1.0, 1.0, 0.01, large)) for _ in range(2))]
    if gradient != "none" and bool(((counts > 0) & (counts < 4)).any()):
        # A row with one key has no gradient through its output. Eager attention finds that exactly, which leaves no
        # budget for rounding; a gradient through the LSE that outweighs the output's makes one.
        gradient = "both" if gradient == "out" else gradient
        factors[2:] = 1.0, 0.1
    made = [
        strided(layout, shape, c.dtype, generator, factor, rng.choice((0, 0, 16, 4096)), buffer, i)
        for i, (layout, shape, factor) in enumerate(zip(layouts, c.shapes(*lengths), factors, strict=True))
    ]
    grad_lse = torch.randn(c.batch, c.num_heads, lengths[0], generator=generator, device=device)
    # Nothing may come through a row that attends to nothing, whatever it is.
    grad_lse.masked_fill_(counts == 0, torch.nan)
    about = {
        "head_dim": c.head_dim,
        "dtype": str(c.dtype).removeprefix("torch."),
        "batch": c.batch,
        "heads": [c.num_heads, c.num_kv_heads],
        "seq_len": list(lengths),
        "block_size": [c.q_block_size, c.kv_block_size],
        "num_variable_blocks": list(c.num_blocks),
        "mask": f"{pattern}, stored {c.mask_lead}, offsets {c.offsets_lead}",
        "layouts": list(layouts),
        "key_bias": c.bias_lead,
        "gradient": gradient,
        "descriptors": c.descriptors,
    }
    scale = rng.uniform(0.3, 2.0) / math.sqrt(c.head_dim)
    views = [x for x, layout in zip(made, layouts, strict=True) if layout in LARGE_DIMS]
    name = f"{arguments.seed}:{index}"
    return Case(name, c, made[:3], made[3], grad_lse, mask, bias, scale, gradient, about, views)


def alike(
    rng: random.Random, layout: str, shape: tuple[int, ...], combination: Combination, *, equal_tokens: bool
) -> str:
    """A layout that compiles to the same as this one."""
    if layout in LARGE_DIMS:
        return layout
    key = layout_key(layout, shape, combination.dtype)
    allowed = [x for x in LAYOUTS if equal_tokens or combination.gradient == "none" or x != "expanded tokens"]
    return rng.choice([x for x in allowed if layout_key(x, shape, combination.dtype) == key])


def strided(
    layout: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    factor: float,
    shift: int,
    buffer: Tensor | None,
    number: int,
) -> Tensor:
    """Random normal values in a layout, NaN in every gap."""
    strides, offset = strides_of(layout, shape)
    stored = [1 if stride == 0 else size for size, stride in zip(shape, strides, strict=True)]
    if layout in LARGE_DIMS:
        assert buffer is not None
        # Tensors of one case lie behind each other, or interleaved where a step leaves little room.
        offset = number * (1 << (14 if layout == "large tokens" else 23))
    else:
        offset += shift
        size = offset + 1 + sum((n - 1) * stride for n, stride in zip(stored, strides, strict=True))
        buffer = torch.full((size,), torch.nan, dtype=dtype, device=generator.device)
    view = buffer.as_strided(stored, strides, offset)
    view.copy_(torch.randn(stored, generator=generator, device=generator.device) * factor)
    return view.expand(shape)


def draw_mask(rng: random.Random, c: Combination, lengths: tuple[int, int], pattern: str, device: str) -> BlockMask:
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    sizes = (c.q_block_size, c.kv_block_size)
    blocks, offsets = [], {}
    for side, length, size, count in zip(("q", "kv"), lengths, sizes, c.num_blocks, strict=True):
        blocks.append(-(-length // size) if count is None else count)
        if count is not None:
            cuts = torch.randint(0, length + 1, (*c.offsets_lead, count + 1), generator=generator)
            cuts[..., 0], cuts[..., -1] = 0, length
            offsets[f"{side}_offsets"] = cuts.sort(-1).values.to(torch.int32).to(device)
    shape = (*c.mask_lead, *blocks)
    dense = torch.rand(shape, generator=generator) < rng.random()
    rows = torch.rand(shape[:3], generator=generator)
    if pattern == "empty and full rows":
        dense[rows < 0.25], dense[rows > 0.8] = False, True
    elif pattern == "one per row":
        dense = torch.zeros_like(dense).scatter_(
            -1, torch.randint(0, shape[3], (*shape[:3], 1), generator=generator), True
        )
    elif pattern == "one":
        dense = torch.zeros_like(dense)
        dense[..., rng.randrange(shape[2]), rng.randrange(shape[3])] = True
    elif pattern in ("none", "all"):
        dense.fill_(pattern == "all")
    return BlockMask.from_dense(
        dense.to(device), seq_len_q=lengths[0], seq_len_kv=lengths[1], q_block_size=c.q_block_size,
        kv_block_size=c.kv_block_size, **offsets,
    )  # fmt: skip


def oracle(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, LSE and gradients by dense attention in `dtype`."""
    with_gradients = case.gradient != "none"
    tensors = [x.detach().to(dtype).contiguous().requires_grad_(with_gradients) for x in case.tensors]
    query, key, value = tensors
    out, lse = masked_attention_oracle(
        query, key, value, case.mask, scale=case.scale, key_bias=case.key_bias, dtype=dtype
    )
    return {"output": out.detach(), "lse": lse.detach(), **gradients(case, out, lse, tensors)}


def fused_formulas(case: Case, eager: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """The worst of `eager` and of dense fp32 attention by fused kernels' formulas in several orders of summation.

    Never what a case is judged by, because these share what the formulas lose, such as the rounding of the LSE. It tells
    apart an error of that size from a larger one.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(FP32_ORDERS):
        order = torch.randperm(case.combination.head_dim, generator=generator).to(case.grad_out.device)
        eager = worse(eager, textbook(case, order), truth)
    return eager


def worse(one: dict[str, Tensor], other: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of two results, each quantity of the first as it is in the one with the larger error."""
    return {
        name: other[name]
        if name in other and largest_error(other[name], truth[name]) > largest_error(x, truth[name])
        else x
        for name, x in one.items()
    }


def textbook(case: Case, order: Tensor) -> dict[str, Tensor]:
    """Dense fp32 attention by the formulas that all fused kernels use, with the dims of a head summed in an order.

    They divide by the sum of the weights last, and take rowsum(dO * O) where autograd takes rowsum(P * dP).
    """
    back = order.argsort()
    q, k, v, grad_o = (x.float()[..., order].transpose(1, 2) for x in (*case.tensors, case.grad_out))
    num_kv_heads = k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // num_kv_heads, 1) for x in (k, v))
    logits = q @ k.mT * case.scale
    if case.key_bias is not None:
        logits = logits + case.key_bias.unsqueeze(2)
    logits = logits.masked_fill(token_mask(case.mask).logical_not(), -torch.inf)
    peak = logits.amax(-1, keepdim=True)
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(logits - peak)
    mass = weights.sum(-1, keepdim=True)
    out = weights @ v / torch.where(mass == 0, 1.0, mass)
    lse = (peak + torch.log(mass)).squeeze(-1)
    found = {"output": out, "lse": lse}
    if case.gradient != "none":
        empty = lse == -torch.inf
        weights = torch.exp(logits - torch.where(empty, torch.inf, lse).unsqueeze(-1))
        if case.gradient == "lse":
            grad_o = torch.zeros_like(grad_o)
        shift = -(grad_o * out).sum(-1)
        if case.gradient != "out":
            shift = shift + torch.where(empty, 0.0, case.grad_lse)
        grad_logits = weights * (grad_o @ v.mT + shift.unsqueeze(-1)) * case.scale
        found["gradient of query"] = grad_logits @ k
        for name, grad in (("key", grad_logits.mT @ q), ("value", weights.mT @ grad_o)):
            found[f"gradient of {name}"] = grad.unflatten(1, (num_kv_heads, -1)).sum(2)
    return {name: x if name == "lse" else x.transpose(1, 2)[..., back] for name, x in found.items()}


def largest_error(actual: Tensor, exact: Tensor) -> float:
    finite = exact != -torch.inf
    return float((actual.double() - exact)[finite].abs().amax()) if bool(finite.any()) else 0.0


def dense_sdpa(case: Case) -> Tensor:
    """torch's dense attention with a mask: what eager attention is to the backend made of it."""
    q, k, v = (x.transpose(1, 2) for x in case.tensors)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    bias = torch.zeros(1, 1, k.shape[2], device=k.device) if case.key_bias is None else case.key_bias
    # On a CPU a mask in fp32 goes with any dtype, elsewhere it has to have that of the query.
    bias = bias.to(torch.float32 if q.device.type == "cpu" else q.dtype).unsqueeze(2)
    bias = bias.masked_fill(token_mask(case.mask).logical_not(), -torch.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=case.scale)
    return torch.where((bias > -torch.inf).any(-1, keepdim=True), out, 0.0).transpose(1, 2)


def gradients(case: Case, out: Tensor, lse: Tensor | None, tensors: list[Tensor]) -> dict[str, Tensor]:
    if case.gradient == "none":
        return {}
    outputs, grads = [], []
    if case.gradient != "lse":
        outputs.append(out)
        grads.append(case.grad_out.to(out.dtype))
    if case.gradient != "out":
        assert lse is not None
        outputs.append(lse)
        grads.append(case.grad_lse.to(lse.dtype))
    found = torch.autograd.grad(outputs, tensors, grads, allow_unused=True)
    return {
        f"gradient of {name}": torch.zeros_like(x) if grad is None else grad
        for name, x, grad in zip(("query", "key", "value"), tensors, found, strict=True)
    }


def attend(backend: str, case: Case) -> tuple[dict[str, Tensor], list[str]]:
    """All that a backend does of a case, and why it does not do the rest."""
    refusals = []
    asked_lse = case.combination.return_lse or case.gradient in ("lse", "both")
    attempts = [(case.gradient != "none", asked_lse), (False, asked_lse), (False, False)]
    for with_gradients, return_lse in dict.fromkeys(attempts):
        query, key, value = tensors = [x.detach().requires_grad_(with_gradients) for x in case.tensors]
        try:
            with fresh_memory_holds_nan(), descriptors_everywhere(backend, case.combination.descriptors):
                result = block_sparse_attention(
                    query, key, value, case.mask, scale=case.scale, key_bias=case.key_bias, return_lse=return_lse,
                    backend=backend,
                )  # fmt: skip
                out, lse = result if isinstance(result, tuple) else (result, None)
                grads = gradients(case, out, lse, tensors) if with_gradients else {}
        except UnsupportedBackendError as error:
            refusals.append(str(error).split("; use backend=")[0].split(", got")[0])
            continue
        found = {"output": out.detach(), **grads}
        if lse is not None:
            found["lse"] = lse.detach()
        return found, refusals
    return {}, refusals


@contextmanager
def fresh_memory_holds_nan() -> Iterator[None]:
    """NaN (the largest number in integers) in all that torch allocates, which is what its deterministic mode does."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # About operations that have no deterministic form, and from numpy under Triton's interpreter.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def descriptors_everywhere(backend: str, wanted: bool) -> Iterator[None]:
    """TMA descriptors for small cases too, for which the kernels' table takes pointers."""
    if not wanted or backend not in ("triton", "hopper"):
        yield
        return
    from vidsparse_kernels.block_sparse_attention import backward, forward

    # Each holds the number under this name, as imported from the table.
    name, modules = "MIN_DESCRIPTOR_FLOPS", (forward, backward)
    before = [getattr(module, name) for module in modules]
    for module in modules:
        setattr(module, name, 0)
    try:
        yield
    finally:
        for module, flops in zip(modules, before, strict=True):
            setattr(module, name, flops)


def budget_used(actual: Tensor, eager: Tensor, oracle: Tensor) -> float:
    """The larger of the two errors over what `assert_close_to_oracle` allows for it; 0 where there is none."""
    finite = oracle != -torch.inf
    truth = oracle[finite].double()
    if truth.numel() == 0:
        return 0.0
    sizes = [
        torch.stack([x.abs().max(), x.square().mean().sqrt()])
        for x in (actual[finite].double() - truth, eager[finite].double() - truth, truth)
    ]
    error, allowed, size = torch.stack(sizes).tolist()
    band = 4 * torch.finfo(actual.dtype).eps
    return max(e / (a + band * s) if e else 0.0 for e, a, s in zip(error, allowed, size, strict=True))


def run_workers(arguments: argparse.Namespace) -> None:
    """Compile the combinations in parallel; what goes wrong here goes wrong, and is counted, in the run itself."""
    number = arguments.compile_workers
    command = [sys.executable, *command_line(arguments).split()[1:], "--seed", str(arguments.seed)]
    command[1] = str(Path(__file__).resolve())
    deadline = time.monotonic() + WARM_SECONDS
    workers = [subprocess.Popen([*command, "--warm", f"{i}/{number}"]) for i in range(number)]
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            print(f"A compile worker was stopped after {WARM_SECONDS} s.", file=sys.stderr)


def warm(arguments: argparse.Namespace, pool: list[Combination]) -> None:
    first, step = (int(x) for x in arguments.warm.split("/"))
    for index in range(first, len(pool), step):
        if pool[index].layouts[0] in LARGE_DIMS:
            continue
        case = make_case(arguments, pool, index, combination=pool[index])
        for name in arguments.backends:
            try:
                attend(name, case)
            except Exception as error:
                print(f"Compiling for {case.about}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)


def _triton_version() -> str | None:
    if find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


if __name__ == "__main__":
    sys.exit(main())
