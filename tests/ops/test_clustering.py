"""k-means per head: the reference against independent float64 arithmetic, and the kernels against the reference."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vidsparse_kernels import BlockMask, UnsupportedBackendError
from vidsparse_kernels.clustering import (
    Clusters,
    arrange_clusters,
    assign_clusters,
    cluster,
    order_by_label,
    score_tiles,
    update_centroids,
)
from vidsparse_kernels.clustering.configs import assign_config
from vidsparse_kernels.testing import make_qkv

SOURCE_ROOT = Path(__file__).parents[2] / "kernels" / "torch-ext"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")


def squared_distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """`[N, D]` and `[K, D]` -> `[N, K]`, by differences."""
    return np.square(x[:, None, :] - centroids[None, :, :]).sum(-1)


def lloyd(x: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Textbook k-means of one head in float64: labels, centroids, and the inertia of each assignment."""
    centroids, inertia, labels = centroids.copy(), [], np.zeros(len(x), np.int64)
    for _ in range(iterations):
        distances = squared_distances(x, centroids)
        labels = distances.argmin(1)
        inertia.append(float(distances.min(1).sum()))
        for k in range(len(centroids)):
            if (labels == k).any():
                centroids[k] = x[labels == k].mean(0)
    return labels, centroids, inertia


def inertia_of(x: torch.Tensor, clusters: Clusters) -> torch.Tensor:
    """`[B, H]`: squared distances of tokens to the centroid of their cluster."""
    own = clusters.centroids.gather(2, clusters.labels.long().unsqueeze(-1).expand(-1, -1, -1, x.shape[3]))
    return (x.transpose(1, 2).to(own) - own).square().sum((2, 3))


def blobs(seed: int = 0, *, per_blob: int = 40, count: int = 9, head_dim: int = 16) -> torch.Tensor:
    """`[1, count * per_blob, 2, head_dim]` in float64: far apart, so that the best clustering is known."""
    generator = torch.Generator().manual_seed(seed)
    centres = 20 * torch.eye(count, head_dim, dtype=torch.float64)
    component = torch.randperm(count * per_blob, generator=generator) % count
    noise = torch.randn(1, count * per_blob, 2, head_dim, generator=generator, dtype=torch.float64)
    return centres[component].view(1, -1, 1, head_dim) + 0.1 * noise


@pytest.mark.parametrize("seed", range(12))
def test_assignment_is_the_nearest_centroid(seed):
    generator = torch.Generator().manual_seed(seed)
    seq_len, count, head_dim = (int(torch.randint(1, n, (), generator=generator)) for n in (200, 40, 50))
    x, _, _ = make_qkv(
        batch=2, seq_len_q=seq_len, num_heads=3, head_dim=head_dim, dtype=torch.float64, contiguous=bool(seed % 2),
        seed=seed,
    )  # fmt: skip
    centroids = torch.randn(2, 3, count, head_dim, generator=generator, dtype=torch.float64)
    labels = assign_clusters(x, centroids)
    assert labels.dtype == torch.int32 and labels.shape == (2, 3, seq_len)
    for b in range(2):
        for h in range(3):
            want = squared_distances(x[b, :, h].numpy(), centroids[b, h].numpy()).argmin(1)
            assert np.array_equal(labels[b, h].numpy(), want)


def test_equal_scores_take_the_smallest_index():
    centroids = torch.randn(1, 1, 5, 8).round()
    centroids[:, :, 3:] = centroids[:, :, 1:3]
    x = torch.randn(1, 100, 1, 8).mul(3).round()
    labels = assign_clusters(x, centroids)
    assert int(labels.max()) < 3
    assert not assign_clusters(x, torch.ones(1, 1, 7, 8)).any()


def test_centroids_are_rounded_to_the_dtype_of_the_tokens():
    """1 + 2^-9 is 1 in bf16, so both centroids are the same there and differ in fp32."""
    centroids = torch.tensor([1 + 2**-9, 1.0]).view(1, 1, 2, 1)
    x = torch.full((1, 4, 1, 1), 1.0)
    assert assign_clusters(x, centroids).tolist() == [[[1] * 4]]
    assert assign_clusters(x.bfloat16(), centroids).tolist() == [[[0] * 4]]


def test_update_is_the_mean_and_empty_clusters_stay():
    x, _, _ = make_qkv(batch=2, seq_len_q=77, num_heads=3, head_dim=10, contiguous=False)
    labels = torch.randint(0, 6, (2, 3, 77), dtype=torch.int32)
    labels[labels == 2] = 5
    previous = torch.randn(2, 3, 7, 10)
    centroids, counts = update_centroids(x, labels, 7, previous)
    assert centroids.dtype == torch.float32 and counts.dtype == torch.int32
    assert torch.equal(centroids[:, :, [2, 6]], previous[:, :, [2, 6]]) and not counts[:, :, [2, 6]].any()
    for b in range(2):
        for h in range(3):
            for k in range(7):
                mine = x[b, labels[b, h] == k, h].double()
                assert int(counts[b, h, k]) == len(mine)
                if len(mine):
                    torch.testing.assert_close(centroids[b, h, k].double(), mine.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("seq_len", "count"), [(1, 1), (63, 5), (200, 300), (333, 1), (512, 17)])
def test_order_is_stable_by_label(seq_len, count):
    labels = torch.randint(0, count, (2, 3, seq_len), dtype=torch.int32)
    order, ranks, offsets = order_by_label(labels, count)
    assert all(x.dtype == torch.int32 for x in (order, ranks, offsets)) and offsets.shape == (2, 3, count + 1)
    for b in range(2):
        for h in range(3):
            row = labels[b, h].tolist()
            want = sorted(range(seq_len), key=lambda token: (row[token], token))
            assert order[b, h].tolist() == want
            assert ranks[b, h][order[b, h].long()].tolist() == list(range(seq_len))
            assert offsets[b, h].tolist() == [sum(label < k for label in row) for k in range(count + 1)]


@pytest.mark.parametrize("seed", range(6))
def test_cluster_equals_lloyd_in_float64(seed):
    x, _, _ = make_qkv(batch=2, seq_len_q=150 + seed, num_heads=2, head_dim=5 + seed, dtype=torch.float64, seed=seed)
    count, iterations = 4 + 3 * seed, 1 + seed
    first = torch.randn(2, 2, count, 5 + seed, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    first[:, :, 0] = 100.0
    clusters = cluster(x, count, iterations=iterations, centroids=first)
    assert clusters.centroids.dtype == torch.float64
    for b in range(2):
        for h in range(2):
            labels, centroids, inertia = lloyd(x[b, :, h].numpy(), first[b, h].numpy(), iterations)
            assert np.array_equal(clusters.labels[b, h].numpy(), labels)
            np.testing.assert_allclose(clusters.centroids[b, h].numpy(), centroids, rtol=1e-10, atol=1e-12)
            assert np.array_equal(clusters.counts[b, h].numpy(), np.bincount(labels, minlength=count))
            assert inertia == sorted(inertia, reverse=True)
    assert not clusters.counts[:, :, 0].any() and bool((clusters.centroids[:, :, 0] == 100).all())


def test_cluster_is_its_parts_and_starts_again_where_it_stopped():
    x, _, _ = make_qkv(seq_len_q=300, num_heads=3, head_dim=32)
    whole = cluster(x, 12, iterations=5)
    part = cluster(x, 12, iterations=3)
    again = cluster(x, 12, iterations=2, centroids=part.centroids)
    for name in ("labels", "centroids", "counts", "order", "ranks", "offsets"):
        assert torch.equal(getattr(whole, name), getattr(again, name)), name
    for got, want in zip((whole.order, whole.ranks, whole.offsets), order_by_label(whole.labels, 12), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(whole.offsets.diff(dim=-1), whole.counts)
    mask = BlockMask.full(
        300, 300, q_block_size=64, kv_block_size=64, q_offsets=whole.offsets, kv_offsets=whole.offsets
    )
    assert mask.num_kv_blocks == 12


def test_kmeans_plus_plus_finds_separate_blobs():
    """Nine blobs 28 apart with deviation 0.1: any clustering but the true one has a far larger inertia."""
    for seed in range(5):
        x = blobs(seed)
        generator = torch.Generator().manual_seed(seed)
        clusters = cluster(x, 9, iterations=3, initialization="kmeans++", generator=generator)
        assert bool((clusters.counts == 40).all())
        expected = 0.01 * 16 * (x.shape[1] - 9)
        assert bool((inertia_of(x, clusters) < 1.3 * expected).all())


def test_inertia_like_scikit_learn():
    if find_spec("sklearn") is None:
        pytest.skip("needs the package scikit-learn")
    from sklearn.cluster import KMeans  # pyright: ignore[reportMissingImports]

    x, _, _ = make_qkv(seq_len_q=500, num_heads=1, head_dim=8, dtype=torch.float64)
    first = x[0, :20, 0]
    theirs = KMeans(20, init=first.numpy(), n_init=1, max_iter=25, tol=0, algorithm="lloyd").fit(x[0, :, 0].numpy())
    ours = cluster(x, 20, iterations=25, centroids=first[None, None])
    assert float(inertia_of(x, ours)) == pytest.approx(theirs.inertia_, rel=1e-3)


def test_strided_initialization_takes_evenly_spaced_tokens():
    x = torch.arange(100.0).view(1, 100, 1, 1).expand(1, 100, 2, 3)
    from vidsparse_kernels.clustering.initialize import strided_centroids

    assert strided_centroids(x, 4)[0, 1, :, 2].tolist() == [12, 37, 62, 87]
    assert strided_centroids(x, 100)[0, 0, :, 0].tolist() == list(range(100))


@pytest.mark.parametrize(("frames", "count"), [(5, 20), (4, 10), (20, 7), (1, 9), (10, 100)])
def test_frame_initialization_takes_as_many_of_every_frame(frames, count):
    from vidsparse_kernels.clustering.initialize import frame_centroids

    x = torch.arange(100.0).view(1, 100, 1, 1)
    tokens = frame_centroids(x, count, frames, torch.Generator().manual_seed(1)).flatten().long()
    assert len(tokens.unique()) == count
    per_frame = torch.bincount(tokens // (100 // frames), minlength=frames)
    assert int(per_frame.max() - per_frame.min()) <= 1


@pytest.mark.parametrize(
    "options", [dict(initialization="frames", frames=6), dict(initialization="kmeans++")], ids=str
)
def test_random_initialization_has_its_own_numbers(options: dict[str, Any]):
    x, _, _ = make_qkv(batch=2, seq_len_q=120, num_heads=2, head_dim=8)
    state = torch.get_rng_state()
    first, second = (cluster(x, 7, iterations=1, **options) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.centroids, second.centroids)
    other = cluster(x, 7, iterations=1, generator=torch.Generator().manual_seed(9), **options)
    assert not torch.equal(first.centroids, other.centroids)


def test_kmeans_plus_plus_never_takes_a_token_twice():
    from vidsparse_kernels.clustering.initialize import plus_plus_centroids

    x, _, _ = make_qkv(seq_len_q=40, num_heads=2, head_dim=4)
    chosen = plus_plus_centroids(x, 40, torch.Generator().manual_seed(0))
    for h in range(2):
        assert torch.equal(chosen[0, h].unique(dim=0), x[0, :, h].unique(dim=0))


def test_extremes():
    x, _, _ = make_qkv(seq_len_q=30, num_heads=1, head_dim=4)
    one = cluster(x, 1, iterations=2)
    assert not one.labels.any() and one.order.flatten().tolist() == list(range(30))
    torch.testing.assert_close(one.centroids[0, 0, 0], x.mean((0, 1, 2)))
    each = cluster(x, 30, iterations=2)
    assert bool((each.counts == 1).all()) and float(inertia_of(x, each)) == 0
    same = cluster(torch.ones(1, 30, 1, 4), 5, iterations=3)
    assert same.counts.flatten().tolist() == [30, 0, 0, 0, 0]
    assert not cluster(x.requires_grad_(), 3, iterations=1).centroids.requires_grad


def test_arranged_clusters_are_the_same_and_neighbours_are_alike():
    x, _, _ = make_qkv(batch=2, seq_len_q=600, num_heads=3, head_dim=8)
    start = torch.randn(2, 3, 30, 8, generator=torch.Generator().manual_seed(1))
    # Far from every token, so empty.
    start[:, :, 4] = 1e4
    found = cluster(x, 30, iterations=2, centroids=start)
    arranged = arrange_clusters(found)
    empty = found.counts == 0
    assert empty.any() and torch.equal(arranged.counts == 0, empty.sort(-1).values), "empty ones come last"
    for batch in range(2):
        for head in range(3):
            old, new = found.labels[batch, head].long(), arranged.labels[batch, head].long()
            old_of = torch.zeros(30, dtype=torch.long).scatter_(0, new, old)
            assert torch.equal(old_of[new], old), "a renumbering"
            live = int((~empty[batch, head]).sum())
            assert torch.equal(arranged.centroids[batch, head, :live], found.centroids[batch, head, old_of[:live]])
            points = arranged.centroids[batch, head, :live]
            for i in range(live - 1):
                distances = (points[i] - points[i + 1 :]).square().sum(-1)
                assert distances[0] <= distances.min() + 1e-4
    ordered = order_by_label(arranged.labels, 30)
    for name, want in zip(("order", "ranks", "offsets"), ordered, strict=True):
        assert torch.equal(getattr(arranged, name), want)
    broken = dataclasses.replace(found, centroids=found.centroids * torch.nan)
    assert torch.equal(arrange_clusters(broken).counts.sort(-1).values, found.counts.sort(-1).values)


@pytest.mark.parametrize(("tile", "shift"), [(64, 0), (64, 40), (16, 100), (128, 128)])
def test_scores_of_tiles_are_mean_shares_of_their_quarters(tile, shift):
    q, k, _ = make_qkv(batch=1, seq_len_q=333, seq_len_kv=200, num_heads=4, num_kv_heads=2, head_dim=16)
    order = torch.stack([torch.randperm(333, generator=torch.Generator().manual_seed(h)) for h in range(4)])[None]
    found = cluster(k, 11, iterations=1)
    found.counts[:, 0, 5] = 0
    scores = score_tiles(q, order.int(), found.centroids, found.counts, tile, shift=shift, scale=0.5)
    assert scores.shape == (1, 4, -(-(333 + shift) // tile), 11)
    for head in range(4):
        counts = found.counts[0, head // 2].double()
        for number in range(scores.shape[2]):
            total, tokens = torch.zeros(11, dtype=torch.float64), 0
            for part in range(4):
                first = number * tile + part * tile // 4 - shift
                places = range(max(first, 0), max(0, min(first + tile // 4, 333)))
                if len(places):
                    mean = q[0, order[0, head, list(places)], head].double().mean(0)
                    logits = 0.5 * found.centroids[0, head // 2].double() @ mean + counts.log()
                    total += len(places) * logits.softmax(0)
                    tokens += len(places)
            want = (total / max(tokens, 1)).log() - counts.log().masked_fill(counts == 0, 0)
            torch.testing.assert_close(scores[0, head, number].double(), want, atol=1e-5, rtol=1e-5)


def test_wrong_arguments_are_named():
    x = torch.randn(1, 20, 2, 4)
    labels, centroids = torch.zeros(1, 2, 20, dtype=torch.int32), torch.zeros(1, 2, 3, 4)
    counts = torch.ones(1, 2, 3, dtype=torch.int32)
    half: dict[str, Any] = dict(num_clusters=2.5)
    wrong = [
        (lambda: cluster(x[0], 3, iterations=1), "`x` must be floating point"),
        (lambda: cluster(x.int(), 3, iterations=1), "`x` must be floating point"),
        (lambda: cluster(x, 21, iterations=1), "`num_clusters` must be at most the 20 tokens there are, got 21"),
        (lambda: cluster(x, 0, iterations=1), "`num_clusters` must be a whole number of at least 1, got 0"),
        (lambda: cluster(x, **half, iterations=1), "`num_clusters` must be a whole number of at least 1, got 2.5"),
        (lambda: cluster(x, 3, iterations=0), "`iterations` must be a whole number of at least 1, got 0"),
        (lambda: cluster(x, 4, iterations=1, centroids=centroids), r"`centroids` must be .* \[1, 2, 4, 4\]"),
        (
            lambda: cluster(x, 3, iterations=1, initialization="best"),
            "`initialization` must be one of strided, frames",
        ),
        (lambda: cluster(x, 3, iterations=1, initialization="frames"), "`frames` must divide the 20 tokens"),
        (
            lambda: cluster(x, 3, iterations=1, initialization="frames", frames=3),
            '`frames` must divide the 20 tokens for initialization "frames", got 3',
        ),
        (lambda: cluster(x, 3, iterations=1, backend="cuda"), '`backend` must be "auto" or one of reference, triton'),
        (lambda: assign_clusters(x, centroids[:, :1]), r"`centroids` must be .* \[1, 2, num_clusters, 4\] on cpu"),
        (lambda: update_centroids(x, labels[:, :1], 3, centroids), r"`labels` must be int32 \[1, 2, 20\] on cpu"),
        (lambda: update_centroids(x, labels + 3, 3, centroids), r"`labels` must be in 0 .. 2, got 3 to 3"),
        (lambda: update_centroids(x, labels, 4, centroids), r"`previous` must be .* \[1, 2, 4, 4\]"),
        (lambda: order_by_label(labels.long(), 3), "`labels` must be int32"),
        (lambda: order_by_label(labels - 1, 3), "`labels` must be in 0 .. 2, got -1 to -1"),
        (
            lambda: score_tiles(x, labels, centroids, counts, 24),
            "`tile_size` must be a power of two of at least 16, got 24",
        ),
        (lambda: score_tiles(x, labels, centroids, counts, 16, shift=-1), "`shift` must be .* at least 0, got -1"),
        (lambda: score_tiles(x, labels.long(), centroids, counts, 16), "`order` must be int32"),
        (lambda: score_tiles(x, labels, centroids, counts[..., 1:], 16), r"`counts` must be \[1, 2, 3\]"),
        (lambda: score_tiles(x, labels, centroids[..., 1:], counts, 16), r"`centroids` must be \[1, .*, 4\]"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    assert cluster(torch.randn(1, 9000, 1, 1), 8192, iterations=1).counts.shape == (1, 1, 8192)
    with pytest.raises(UnsupportedBackendError, match='"triton" needs'):
        cluster(x, 3, iterations=1, backend="triton")


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_configurations_fit(capability, head_dim):
    for itemsize in (2, 4):
        for shared_memory in (64 * 1024, 99 * 1024, 227 * 1024):
            config = assign_config(
                capability=capability, shared_memory=shared_memory, head_dim=head_dim, itemsize=itemsize,
                num_clusters=1000,
            )  # fmt: skip
            used = (config.block_m + config.num_stages * config.block_n) * head_dim * itemsize
            assert used < shared_memory and config.block_m >= 16 and 16 <= config.block_n <= 128


INTERPRETED = """
import itertools
import torch
from vidsparse_kernels.clustering import arrange_clusters, assign_clusters, cluster, order_by_label, score_tiles
from vidsparse_kernels.clustering import update_centroids
from vidsparse_kernels.clustering.assign import triton_assign
from vidsparse_kernels.clustering.configs import AssignConfig, SortConfig, UpdateConfig
from vidsparse_kernels.clustering.sort import triton_order
from vidsparse_kernels.clustering.update import triton_update
from vidsparse_kernels.testing import make_qkv

# NaN where nothing was written, so that a hole shows.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
cases = [
    (2, 63, 2, 40, 7, torch.float32, False), (1, 150, 1, 32, 130, torch.float16, True),
    (1, 64, 2, 16, 64, torch.float16, False), (1, 5, 1, 72, 1, torch.float32, True)]
for batch, seq_len, heads, head_dim, count, dtype, contiguous in cases:
    x, _, _ = make_qkv(
        batch=batch, seq_len_q=seq_len, num_heads=heads, head_dim=head_dim, dtype=dtype, contiguous=contiguous)
    # Whole numbers: scores are exact, and so are ties.
    x = x.mul_(2).round_()
    assert x.is_contiguous() == contiguous
    centroids = torch.randn(batch, heads, count, head_dim).mul(2).round()
    # In other columns of a tile and in the same column of other tiles.
    centroids[:, :, -1] = centroids[:, :, 0]
    centroids[:, :, 16::16] = centroids[:, :, :1]
    labels = assign_clusters(x, centroids, backend="reference")
    for running, heads_fastest in itertools.product((True, False), repeat=2):
        got = triton_assign(x, centroids, config=AssignConfig(32, 16, 4, 2, False, heads_fastest, running))
        assert torch.equal(got, labels), (seq_len, running, heads_fastest)
    assert torch.equal(assign_clusters(x, centroids, backend="triton"), labels)
    want = order_by_label(labels, count, backend="reference")
    for sort in (SortConfig(), SortConfig(64, 32)):
        got = triton_order(labels, count, max_chunk=8, config=sort)
        for a, b in zip(got[:3], want):
            assert torch.equal(a, b), (seq_len, sort)
        assert torch.equal(got[4], ((got[3] + 7) // 8).cumsum(-1).int())
    want = update_centroids(x, labels, count, centroids, backend="reference")
    # Some clusters have many chunks, some one, some none.
    for config in (UpdateConfig(), UpdateConfig(chunk=6, rows=4)):
        means, counts, _ = triton_update(x, labels, count, centroids, config=config)
        assert torch.equal(counts, want[1])
        torch.testing.assert_close(means, want[0], rtol=1e-6, atol=1e-6)
    one = torch.zeros_like(labels)
    means, counts, _ = triton_update(x, one, count, centroids, config=UpdateConfig(chunk=16, rows=16))
    torch.testing.assert_close(means[:, :, 0], x.float().mean(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(means[:, :, 1:], centroids[:, :, 1:]) and int(counts.sum()) == labels.numel()
    ours, theirs = (cluster(x, count, iterations=1, centroids=centroids, backend=b) for b in ("triton", "reference"))
    for name in ("labels", "counts", "order", "ranks", "offsets"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
tokens = torch.randn(2, 300, 3, 40)
queries, keys = (cluster(y, 9, iterations=1, backend="reference") for y in (tokens, tokens.flip(1)))
keys.counts[:, 0, 3] = 0
ours, theirs = (arrange_clusters(queries, backend=b) for b in ("triton", "reference"))
for name in ("labels", "centroids", "counts", "order", "ranks", "offsets"):
    assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
arguments = (tokens, ours.order, keys.centroids, keys.counts, 64)
scores = [score_tiles(*arguments, shift=100, backend=b) for b in ("triton", "reference")]
torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)
broken = x.clone()
broken[0, 0] = torch.nan
broken[0, 1] = torch.inf
labels = assign_clusters(broken, centroids, backend="triton")
assert 0 <= int(labels.min()) and int(labels.max()) < count
print("checked")
"""

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidsparse_kernels.clustering import arrange, sort, update
from vidsparse_kernels.clustering.assign import assign_kernel, prepare_kernel
from vidsparse_kernels.clustering.configs import SortConfig, UpdateConfig, assign_config

capability, shared_memory = int(sys.argv[1]), int(sys.argv[2])
pointers = dict(
    centroids_ptr="*fp32", rounded_ptr="*bf16", bias_ptr="*fp32", labels_ptr="*i32", histograms_ptr="*i32",
    counts_ptr="*i32", offsets_ptr="*i32", chunk_ends_ptr="*i32", order_ptr="*i32", ranks_ptr="*i32", x_ptr="*bf16",
    sums_ptr="*fp32", previous_ptr="*fp32", distances_ptr="*fp32", starts_ptr="*i64", means_ptr="*fp32",
    scores_ptr="*fp32", sizes_ptr="*i32", shares_ptr="*fp32")

def compiled(kernel, constants, num_warps=4, num_stages=3, **special):
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else special.get(name, pointers.get(name, "i32"))
        if signature[name].startswith("*") or "stride" in name and signature[name] == "i32":
            attributes[(position,)] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    options = dict(num_warps=num_warps, num_stages=num_stages)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert result.metadata.shared <= shared_memory, result.metadata.shared
    return result

config = assign_config(
    capability=(capability // 10, capability % 10), shared_memory=shared_memory, head_dim=128, itemsize=2,
    num_clusters=1000)
result = compiled(
    assign_kernel,
    dict(HEAD_DIM=128, BLOCK_D=128, BLOCK_M=config.block_m, BLOCK_N=config.block_n, DESCRIPTORS=config.descriptors,
         HEADS_FASTEST=config.heads_fastest, RUNNING=config.running, PRECISION="ieee", x_stride_d=1),
    config.num_warps, config.num_stages,
    centroids=f"tensordesc<bf16[1, {config.block_n}, 128]>" if config.descriptors else "*bf16")
print("wgmma" in result.asm["ptx"], "cp.async.bulk.tensor" in result.asm["ptx"])
compiled(prepare_kernel, dict(HEAD_DIM=128, BLOCK_D=128, ROWS=32))
compiled(sort.histogram_kernel, dict(TILE=SortConfig().tile, BINS=1024))
compiled(sort.prefix_kernel, dict(ROWS=32, BLOCK=128))
compiled(sort.offsets_kernel, dict(BINS=1024))
compiled(sort.scatter_kernel, dict(TILE=SortConfig().tile, ROWS=SortConfig().rows), SortConfig().num_warps)
default = UpdateConfig()
sums = dict(HEAD_DIM=128, BLOCK_D=128, BINS=1024, CHUNK=default.chunk, ROWS=default.rows, x_stride_d=1)
print("v4" in compiled(update.chunk_sum_kernel, sums, default.num_warps).asm["ptx"])
compiled(update.mean_kernel, dict(HEAD_DIM=128, BLOCK_D=128, ROWS=16))
compiled(arrange.tour_kernel, dict(BLOCK=1024), order_ptr="*i64")
compiled(arrange.part_means_kernel, dict(HEAD_DIM=128, BLOCK_D=128, PART=32, ROWS=16, x_stride_d=1))
compiled(arrange.mean_shares_kernel, dict(PART=32, PARTS=4, BLOCK=1024))
"""


def run(code: str, *arguments: str, **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE_ROOT), **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split()


@needs_triton
def test_interpreted_kernels_agree_with_the_reference():
    """bf16 is left to the GPU tests: the interpreter computes with numpy, which has no bf16."""
    assert run(INTERPRETED, TRITON_INTERPRET="1") == ["checked"]


@needs_triton
@pytest.mark.parametrize(
    ("capability", "shared_memory", "expected"),
    [(80, 166912, "False False"), (90, 232448, "True True")],
)
def test_compiles_without_a_gpu(capability, shared_memory, expected, tmp_path):
    """Expected: whether the product uses Hopper's wgmma and centroids come through TMA; wide loads in the sums."""
    printed = run(COMPILED, str(capability), str(shared_memory), TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert printed == [*expected.split(), "True"]
