"""Time k-means of tokens and token reordering on one GPU, and choose among the ways of compiling them.

    python scripts/bench_clustering.py --output clustering.json

Checks the kernels against float64 and against stable sorting first and prints no speed if that fails. Every number is
the median of CUDA graph replays with the L2 cache flushed between them. Tokens are a mixture of 64 Gaussians of very
unequal size, centroids those of two earlier iterations. Kernels are compiled beforehand in parallel processes that
share Triton's cache on disk.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from vidsparse_kernels.clustering import assign_clusters, cluster, order_by_label, update_centroids
from vidsparse_kernels.clustering.assign import triton_assign, triton_prepare
from vidsparse_kernels.clustering.configs import AssignConfig, SortConfig, UpdateConfig
from vidsparse_kernels.clustering.sort import triton_order
from vidsparse_kernels.clustering.update import triton_means, triton_update
from vidsparse_kernels.permutation import permute_tokens, unpermute_tokens
from vidsparse_kernels.permutation.gather import MoveConfig, triton_move

SHAPES = ((32_760, 12), (32_760, 40), (75_600, 12), (75_600, 40), (118_800, 24))
CLUSTERS = (100, 300, 1000)
HEAD_DIM = 128
COPY_BYTES_PER_MS = 4.26e9
"""Device copy of an H200, bytes read and written."""
PRODUCT_FLOPS_PER_MS = 780e9
"""Matrix product 8192^3 in bf16 on an H200."""

ASSIGN = [
    AssignConfig(128, 64, 8, 3, True),
    AssignConfig(128, 64, 8, 2, True),
    AssignConfig(128, 64, 8, 4, True),
    AssignConfig(128, 64, 8, 3, True, heads_fastest=True),
    AssignConfig(128, 64, 8, 3, False),
    AssignConfig(128, 64, 4, 3, True),
    AssignConfig(128, 64, 4, 2, True),
    AssignConfig(128, 32, 4, 3, True),
    AssignConfig(64, 64, 4, 3, True),
    AssignConfig(64, 64, 4, 2, True),
    AssignConfig(64, 128, 4, 2, True),
    AssignConfig(256, 64, 8, 3, True),
    AssignConfig(128, 128, 8, 3, True),
    AssignConfig(128, 64, 8, 3, True, running=False),
    AssignConfig(128, 64, 4, 3, True, running=False),
    AssignConfig(128, 128, 8, 3, True, running=False),
    AssignConfig(128, 128, 8, 2, True, running=False),
    AssignConfig(256, 64, 8, 3, True, running=False),
]
SORT = [SortConfig(tile, rows) for tile, rows in ((256, 64), (256, 32), (128, 32), (512, 32), (512, 64), (1024, 64))]
UPDATE = [
    UpdateConfig(),
    UpdateConfig(rows=16),
    UpdateConfig(rows=64),
    UpdateConfig(rows=16, num_warps=2),
    UpdateConfig(rows=32, num_warps=2),
    UpdateConfig(chunk=256),
    UpdateConfig(chunk=1024),
]
MOVE = [
    MoveConfig(rows, warps, fastest)
    for rows, warps in ((16, 4), (32, 4), (64, 4), (64, 8), (128, 8))
    for fastest in (True, False)
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each row (default 15)")
    parser.add_argument("--compile-workers", type=int, default=8, help="processes that compile ahead (default 8)")
    parser.add_argument("--defaults", action="store_true", help="iterations and flash-kmeans alone, at every shape")
    parser.add_argument("--warm", metavar="I/N", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 2
    if arguments.warm:
        number, workers = (int(part) for part in arguments.warm.split("/"))
        for job in compile_jobs()[number::workers]:
            job()
        torch.cuda.synchronize()
        return 0
    machine = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
    }
    print("  ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    started = time.monotonic()
    if not arguments.defaults:
        compile_ahead(arguments.compile_workers)
        print(f"compiled ahead in {time.monotonic() - started:.0f} s", flush=True)
    try:
        check_correctness(variants=not arguments.defaults)
    except AssertionError as error:
        print(f"Wrong result, so no speed is reported: {error}", file=sys.stderr)
        return 1
    table = Table(arguments.repeats)
    if not arguments.defaults:
        bench_variants(table)
    for seq_len, num_heads in SHAPES:
        (bench_iterations if arguments.defaults else bench_shape)(table, seq_len, num_heads)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"machine": machine, "rows": table.rows}, indent=1) + "\n")
    return 0


def make_tokens(seq_len: int, num_heads: int, seed: int = 0) -> Tensor:
    """bf16 `[1, seq_len, num_heads, HEAD_DIM]`: a mixture whose components have weights 1, 1/2, 1/3, ..."""
    generator = torch.Generator("cuda").manual_seed(seed)
    centres = torch.randn(64, num_heads, HEAD_DIM, generator=generator, device="cuda")
    weights = 1 / torch.arange(1, 65, device="cuda").float()
    component = torch.multinomial(weights, seq_len, replacement=True, generator=generator)
    x = torch.randn(1, seq_len, num_heads, HEAD_DIM, generator=generator, device="cuda", dtype=torch.bfloat16)
    return x.add_(centres.bfloat16()[component])


def compile_jobs() -> list[Callable[[], Any]]:
    """One call of every kernel variant, on few tokens."""
    x = make_tokens(1024, 40)
    jobs: list[Callable[[], Any]] = []
    for count in CLUSTERS:
        labels = torch.randint(0, count, (1, 40, 1024), dtype=torch.int32, device="cuda")
        previous = x[:, :count].transpose(1, 2).float()
        jobs.append(lambda c=count: cluster(x, c, iterations=1))
        if count > 100:
            jobs += [lambda n=labels, c=count, s=s: triton_order(n, c, config=s) for s in SORT]
            jobs += [lambda n=labels, c=count, p=previous, u=u: triton_update(x, n, c, p, config=u) for u in UPDATE]
    centroids = x[:, :300].transpose(1, 2).float()
    jobs += [lambda a=a: triton_assign(x, centroids, config=a) for a in ASSIGN]
    order = torch.arange(1024, dtype=torch.int32, device="cuda").expand(1, 40, -1).contiguous()
    jobs += [
        lambda m=m, two=two, inverse=inverse: move((x,) * two, order, inverse=inverse, config=m)
        for m in MOVE
        for two in (1, 2)
        for inverse in (False, True)
    ]
    return jobs


def compile_ahead(workers: int) -> None:
    command = [sys.executable, os.path.abspath(__file__), "--warm"]
    running = [subprocess.Popen([*command, f"{i}/{workers}"]) for i in range(workers)]
    for process in running:
        if process.wait() != 0:
            raise SystemExit("A kernel variant did not compile or run; see the message above.")


def move(
    tensors: tuple[Tensor, ...],
    order: Tensor,
    *,
    inverse: bool = False,
    heads_first: bool = False,
    config: MoveConfig | None = None,
) -> tuple[Tensor, ...]:
    return triton_move(tensors, order, text_before=0, inverse=inverse, heads_first=heads_first, config=config)


def check_correctness(*, variants: bool) -> None:
    """The defaults, or every variant, on a ragged shape; the order also at full size."""
    x = make_tokens(5003, 4)
    for count in (290, 1000):
        centroids = x[:, :count].transpose(1, 2).float() + 0.01
        rounded = centroids.bfloat16().double()
        scores = x.transpose(1, 2).double() @ rounded.transpose(2, 3) - rounded.square().sum(-1).unsqueeze(2) / 2
        best = scores.amax(-1)
        for config in ASSIGN if variants else [None]:
            labels = triton_assign(x, centroids, config=config)
            assert 0 <= int(labels.min()) and int(labels.max()) < count, f"labels out of range: {config}"
            lost = best - scores.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
            assert float(lost.max()) < 1e-4 * float(best.abs().max()), f"not the nearest centroid: {config}"
        labels = assign_clusters(x, centroids)
        want = order_by_label(labels, count, backend="reference")
        for sort in SORT if variants else [None]:
            got = triton_order(labels, count, config=sort)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=False)), f"order: {sort}"
        truth, counts = update_centroids(x.double(), labels, count, centroids.double())
        for update in UPDATE if variants else [None]:
            means, got_counts, _ = triton_update(x, labels, count, centroids, config=update)
            assert torch.equal(got_counts, counts), f"counts: {update}"
            assert float((means.double() - truth).abs().max()) < 1e-5, f"means: {update}"
    order = want[0]
    for config in MOVE if variants else [None]:
        for inverse, reference in ((False, permute_tokens), (True, unpermute_tokens)):
            wanted = reference(x, order, backend="reference")
            for heads_first in (False, True):
                moved = move((x, x), order, inverse=inverse, heads_first=heads_first, config=config)
                assert all(torch.equal(y, wanted) for y in moved), f"moved: {config}"
    labels = torch.randint(0, 1000, (1, 40, 75_600), dtype=torch.int32, device="cuda")
    for got, want_ in zip(
        order_by_label(labels, 1000), order_by_label(labels, 1000, backend="reference"), strict=True
    ):
        assert torch.equal(got, want_), "order at full size"
    x = make_tokens(75_600, 40)
    first, second = (cluster(x, 300, iterations=2) for _ in range(2))
    assert torch.equal(first.labels, second.labels) and torch.equal(first.centroids, second.centroids), "two runs"


class Table:
    """Prints rows while it collects them."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: list[dict[str, Any]] = []

    def time(
        self,
        what: str,
        columns: dict[str, Any],
        run: Callable[[], Any],
        *,
        flops: float = 0,
        moved: float = 0,
        config: Any = None,
        graph: bool = True,
    ) -> None:
        """Measure one row. `flops` of products and bytes `moved` become rates."""
        self.add(what, columns, measure(run, self.repeats, graph=graph), flops=flops, moved=moved, config=config)

    def add(
        self, what: str, columns: dict[str, Any], ms: float, *, flops: float = 0, moved: float = 0, config: Any = None
    ) -> None:
        row: dict[str, Any] = {"what": what, "ms": ms, **columns}
        notes = []
        if flops:
            row["tflops"] = flops / ms / 1e9
            notes.append(
                f"{row['tflops']:5.0f} TFLOP/s ({100 * flops / ms / PRODUCT_FLOPS_PER_MS:.0f} % of a product)"
            )
        if moved:
            row["gb_per_s"] = moved / ms / 1e6
            notes.append(f"{row['gb_per_s']:5.0f} GB/s ({100 * moved / ms / COPY_BYTES_PER_MS:.0f} % of a copy)")
        if config is not None:
            row["config"] = asdict(config)
            notes.append(" ".join(f"{name}={value}" for name, value in row["config"].items()))
        self.rows.append(row)
        where = " ".join(f"{name}={value}" for name, value in columns.items())
        print(f"{what:28s} {where:48s} {ms:8.4f} ms  {'  '.join(notes)}", flush=True)


def bench_variants(table: Table) -> None:
    """Every way of compiling, at the largest shape."""
    seq_len, num_heads = 75_600, 40
    x = make_tokens(seq_len, num_heads)
    size = x.numel() * x.element_size()
    shape: dict[str, Any] = dict(seq_len=seq_len, num_heads=num_heads)
    order = None
    for count in (300, 1000):
        columns = dict(clusters=count, **shape)
        clusters = cluster(x, count, iterations=2)
        centroids, labels = clusters.centroids, clusters.labels
        for config in ASSIGN:
            run = partial(triton_assign, x, centroids, config=config)
            table.time("assign variant", columns, run, flops=2.0 * x.numel() * count, config=config)
        for sort in SORT:
            table.time("sort variant", columns, partial(triton_order, labels, count, config=sort), config=sort)
        for update in UPDATE:
            order, _, *rest = triton_order(labels, count, max_chunk=update.chunk)
            run = partial(triton_means, x, order, *rest, centroids, config=update)
            table.time("sums and means variant", columns, run, moved=size, config=update)
    assert order is not None
    for heads_first in (False, True):
        for inverse in (False, True):
            columns = dict(heads_first=heads_first, inverse=inverse, **shape)
            for config in MOVE:
                run = partial(move, (x,), order, inverse=inverse, heads_first=heads_first, config=config)
                table.time("permute variant", columns, run, moved=2 * size, config=config)


def bench_shape(table: Table, seq_len: int, num_heads: int) -> None:
    """The defaults at one shape, and other people's ways."""
    query, key = make_tokens(seq_len, num_heads), make_tokens(seq_len, num_heads, seed=1)
    size = query.numel() * query.element_size()
    shape: dict[str, Any] = dict(seq_len=seq_len, num_heads=num_heads)
    started: dict[int, Tensor] = {}
    for count in CLUSTERS:
        clusters = cluster(key, count, iterations=2)
        started[count], labels = clusters.centroids, clusters.labels
        columns = dict(clusters=count, **shape)
        flops = 2.0 * key.numel() * count
        table.time("prepare", columns, partial(triton_prepare, started[count], torch.bfloat16))
        table.time("assign", columns, partial(assign_clusters, key, started[count]), flops=flops)
        table.time("sort", columns, partial(order_by_label, labels, count))
        for keys in (labels, labels.to(torch.int16)):
            run = partial(torch.sort, keys, dim=-1, stable=True)
            table.time(f"torch.sort, stable, {str(keys.dtype)[6:]}", columns, run, graph=False)
        run = partial(update_centroids, key, labels, count, started[count])
        table.time("update (sort included)", columns, run, moved=size)
        run = partial(cluster, key, count, iterations=1, centroids=started[count])
        table.time("iteration", columns, run, flops=flops)
        bench_flash_kmeans(table, columns, key, started[count])
    query_centroids = cluster(query, 300, iterations=2).centroids

    def both() -> None:
        cluster(query, 300, iterations=1, centroids=query_centroids)
        cluster(key, 1000, iterations=1, centroids=started[1000])

    flops = 2.0 * key.numel() * 1300
    table.time("iteration, q 300 + k 1000", shape, both, flops=flops)
    table.time("the same, launch by launch", shape, both, flops=flops, graph=False)
    order = cluster(key, 1000, iterations=1, centroids=started[1000]).order
    table.time("clone", shape, query.clone, moved=2 * size)
    for heads_first in (False, True):
        columns = dict(heads_first=heads_first, **shape)
        run = partial(permute_tokens, query, order, heads_first=heads_first)
        table.time("permute q", columns, run, moved=2 * size)
        run = partial(permute_tokens, (query, key), order, heads_first=heads_first)
        table.time("permute k and v", columns, run, moved=4 * size)
    moved = permute_tokens(query, order, heads_first=True)
    table.time("unpermute, heads first in", shape, partial(unpermute_tokens, moved, order), moved=2 * size)
    table.time("unpermute", shape, partial(unpermute_tokens, query, order), moved=2 * size)


def bench_iterations(table: Table, seq_len: int, num_heads: int) -> None:
    """Warm iterations with the defaults, and of flash-kmeans where it is installed."""
    x = make_tokens(seq_len, num_heads)
    started = {count: cluster(x, count, iterations=2).centroids for count in CLUSTERS}
    for count, centroids in started.items():
        columns: dict[str, Any] = dict(clusters=count, seq_len=seq_len, num_heads=num_heads)
        run = partial(cluster, x, count, iterations=1, centroids=centroids)
        table.time("iteration", columns, run, flops=2.0 * x.numel() * count)
        bench_flash_kmeans(table, columns, x, centroids)

    def both() -> None:
        cluster(x, 300, iterations=1, centroids=started[300])
        cluster(x, 1000, iterations=1, centroids=started[1000])

    columns = dict(seq_len=seq_len, num_heads=num_heads)
    table.time("iteration, q 300 + k 1000", columns, both, flops=2.0 * x.numel() * 1300)


def bench_flash_kmeans(table: Table, columns: dict[str, Any], x: Tensor, centroids: Tensor) -> None:
    """The package flash-kmeans, where installed: what ten more iterations take, divided by ten."""
    if find_spec("flash_kmeans") is None:
        return
    from flash_kmeans import batch_kmeans_Euclid  # pyright: ignore[reportMissingImports]

    tokens = x[0].transpose(0, 1).contiguous()
    first = centroids[0].to(x.dtype).contiguous()
    count = centroids.shape[2]
    short, long = (
        measure(
            partial(batch_kmeans_Euclid, tokens, count, max_iters=number, tol=0.0, init_centroids=first),
            3,
            graph=False,
        )
        for number in (1, 11)
    )
    table.add("flash_kmeans iteration", columns, (long - short) / 10, flops=2.0 * x.numel() * count)


def measure(run: Callable[[], Any], repeats: int, *, graph: bool) -> float:
    """Median milliseconds by CUDA events; L2 is flushed between runs, as a model's other layers would."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        run = captured.replay
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in pairs)[repeats // 2]


if __name__ == "__main__":
    sys.exit(main())
