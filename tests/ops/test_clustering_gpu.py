"""k-means per head and token reordering on a real GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidsparse_kernels.clustering import (
    arrange_clusters,
    assign_clusters,
    cluster,
    order_by_label,
    score_tiles,
    update_centroids,
)
from vidsparse_kernels.clustering.assign import triton_assign
from vidsparse_kernels.clustering.configs import AssignConfig
from vidsparse_kernels.permutation import permute_tokens, unpermute_tokens
from vidsparse_kernels.testing import make_qkv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

FIELDS = ("labels", "centroids", "counts", "order", "ranks", "offsets")


def poison() -> None:
    """Leave memory full of large values where the next small arrays will be."""
    junk = [torch.full((1 << size,), 2**31 - 1, dtype=torch.int32, device="cuda") for size in range(8, 24)]
    del junk


def assert_nearest(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> None:
    """By float64 scores, up to the rounding of fp32 sums."""
    rounded = centroids.to(x.dtype).double()
    tokens = x.transpose(1, 2).double()
    half_norms = rounded.square().sum(-1).unsqueeze(2) / 2
    scores = tokens @ rounded.transpose(2, 3) - half_norms
    assert labels.dtype == torch.int32 and int(labels.min()) >= 0 and int(labels.max()) < centroids.shape[2]
    size = tokens.abs() @ rounded.abs().transpose(2, 3) + half_norms
    chosen, best = labels.long().unsqueeze(-1), scores.argmax(-1, keepdim=True)
    lost = scores.gather(-1, best) - scores.gather(-1, chosen)
    # The magnitudes of what is added up for the two, times a few units in the last place of fp32.
    assert bool((lost <= 8 * torch.finfo(torch.float32).eps * (size.gather(-1, best) + size.gather(-1, chosen))).all())


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Every test compiles kernels of its own, so these are lists in which each dtype meets each head_dim and each number of
# clusters, not products of all of them.
ASSIGNED = [
    (BF16, 40, 300), (BF16, 64, 1), (BF16, 128, 7), (BF16, 128, 1000), (BF16, 256, 100),
    (FP16, 40, 1000), (FP16, 64, 7), (FP16, 128, 1), (FP16, 128, 300), (FP16, 256, 7),
    (FP32, 40, 100), (FP32, 64, 300), (FP32, 128, 1000), (FP32, 256, 7), (FP32, 256, 1),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "head_dim", "count"), ASSIGNED, ids=str)
def test_assignment_and_update(dtype, head_dim, count):
    for contiguous in (True, False):
        x, _, _ = make_qkv(
            batch=2, seq_len_q=1333, num_heads=3, head_dim=head_dim, dtype=dtype, device="cuda", contiguous=contiguous
        )
        centroids = torch.randn(2, 3, count, head_dim, device="cuda")
        if count > 2:
            centroids[:, :, 1] = 1000.0
        poison()
        labels = assign_clusters(x, centroids, backend="triton")
        assert_nearest(x, centroids, labels)
        poison()
        got, counts = update_centroids(x, labels, count, centroids, backend="triton")
        truth, want = update_centroids(x.double(), labels, count, centroids.double(), backend="reference")
        assert torch.equal(counts, want)
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
        if count > 2:
            assert torch.equal(got[:, :, 1], centroids[:, :, 1])


@pytest.mark.parametrize(
    "config",
    [
        AssignConfig(128, 64, 8, 3, True),
        AssignConfig(128, 64, 8, 3, False),
        AssignConfig(64, 64, 4, 2, True, heads_fastest=True),
        AssignConfig(128, 128, 8, 2, True, running=False),
        AssignConfig(64, 32, 4, 2, False, running=False),
    ],
    ids=str,
)
def test_equal_scores_take_the_smallest_index(config):
    """Whole numbers, so that all scores are exact and there are many ties."""
    if config.descriptors and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs TMA")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(1, 2000, 4, 128, generator=generator, device="cuda").round().to(torch.bfloat16)
    centroids = torch.randn(1, 4, 300, 128, generator=generator, device="cuda").round()
    centroids[:, :, 150:] = centroids[:, :, :150]
    # The same columns of a later tile, whatever its size.
    centroids[:, :, 128:150] = centroids[:, :, :22]
    centroids[:, :, 256:] = centroids[:, :, :44]
    labels = triton_assign(x, centroids, config=config)
    assert int(labels.max()) < 128
    wide = centroids.double()
    scores = x.transpose(1, 2).double() @ wide.transpose(2, 3) - wide.square().sum(-1).unsqueeze(2) / 2
    indices = torch.arange(300, device="cuda")
    first = torch.where(scores == scores.amax(-1, keepdim=True), indices, 300).amin(-1)
    assert torch.equal(labels, first.int())


@pytest.mark.parametrize(("seq_len", "count"), [(1, 1), (256, 256), (5003, 3), (32_760, 1000), (9999, 4097)])
@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
def test_order_equals_stable_sort(seq_len, count, skewed):
    generator = torch.Generator("cuda").manual_seed(seq_len)
    draws = torch.rand(2, 3, seq_len, generator=generator, device="cuda")
    labels = ((draws**8 if skewed else draws) * count).clamp(max=count - 1).int()
    poison()
    got = order_by_label(labels, count, backend="triton")
    for name, a, b in zip(FIELDS[3:], got, order_by_label(labels, count, backend="reference"), strict=True):
        assert torch.equal(a, b), name


def test_update_with_everything_in_one_cluster():
    x, _, _ = make_qkv(seq_len_q=20_000, num_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    labels = torch.full((1, 2, 20_000), 5, dtype=torch.int32, device="cuda")
    previous = torch.randn(1, 2, 9, 128, device="cuda")
    centroids, counts = update_centroids(x, labels, 9, previous)
    torch.testing.assert_close(centroids[:, :, 5].double(), x.double().mean(1), rtol=1e-5, atol=1e-6)
    assert counts[0, 1].tolist() == [0] * 5 + [20_000] + [0] * 3
    rest = [0, 1, 2, 3, 4, 6, 7, 8]
    assert torch.equal(centroids[:, :, rest], previous[:, :, rest])


@pytest.mark.parametrize(
    "options",
    [dict(), dict(initialization="frames", frames=20), dict(initialization="kmeans++")],
    ids=["strided", "frames", "kmeans++"],
)
def test_two_runs_are_equal(options: dict[str, Any]):
    x, _, _ = make_qkv(seq_len_q=8000, num_heads=6, head_dim=128, dtype=torch.bfloat16, device="cuda")
    first = cluster(x, 100, iterations=4, **options)
    poison()
    second = cluster(x, 100, iterations=4, **options)
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert int(first.counts.sum()) == first.labels.numel()
    assert torch.equal(first.labels.gather(-1, first.order.long()), first.labels.sort(-1).values)


def test_inertia_falls_as_in_float64():
    """Rounding the centroids to bf16 may cost two thousandths of the inertia; one was seen at most, either way."""
    x, _, _ = make_qkv(seq_len_q=4000, num_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda")
    first = x[:, ::40].transpose(1, 2).float()
    ours = cluster(x, 100, iterations=10, centroids=first)
    exact = cluster(x.double(), 100, iterations=10, centroids=first.double())
    assert exact.centroids.dtype == torch.float64
    inertia = []
    for clusters in (ours, exact):
        own = clusters.centroids.double().gather(2, clusters.labels.long().unsqueeze(-1).expand(-1, -1, -1, 64))
        inertia.append((x.transpose(1, 2).double() - own).square().sum((2, 3)))
    assert bool((inertia[0] <= 1.002 * inertia[1]).all())


def test_no_wait_for_the_device_and_graph_capture():
    x, _, _ = make_qkv(seq_len_q=2016, num_heads=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    cold = cluster(x, 50, iterations=2)
    warm = cluster(x, 50, iterations=2, centroids=cold.centroids)
    permute_tokens((x, x), warm.order)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ways: list[dict[str, Any]] = [{}, dict(initialization="frames", frames=8), dict(initialization="kmeans++")]
        for options in ways:
            cluster(x, 50, iterations=1, **options)
        permute_tokens((x, x), warm.order)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        start = cluster(x, 50, iterations=2)
        captured = cluster(x, 50, iterations=2, centroids=start.centroids)
        moved = unpermute_tokens(permute_tokens(x, captured.order), captured.order)
    graph.replay()
    for name in FIELDS:
        assert torch.equal(getattr(captured, name), getattr(warm, name)), name
    assert torch.equal(moved, x)


@pytest.mark.parametrize("count", [1, 300, 1000])
def test_arranged_clusters_and_scores_of_tiles(count):
    x, y, _ = make_qkv(
        batch=2, seq_len_q=5003, seq_len_kv=4001, num_heads=3, head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    queries, keys = cluster(x, count, iterations=2), cluster(y, count, iterations=2)
    keys.counts[:, 0, 0] = 0
    poison()
    ours, theirs = (arrange_clusters(queries, backend=backend) for backend in ("triton", "reference"))
    for name in FIELDS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        arrange_clusters(queries)
        scores = score_tiles(x, ours.order, keys.centroids, keys.counts, 128, shift=77)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    truth = score_tiles(
        x.double(), ours.order, keys.centroids.double(), keys.counts, 128, shift=77, backend="reference"
    )
    torch.testing.assert_close(scores.double(), truth, atol=1e-4, rtol=1e-4)


def test_beyond_int32():
    x = torch.randn(1, 140_000, 128, 128, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    last = x[:, :, 120:]
    clusters = cluster(x, 32, iterations=1)
    alone = cluster(last.contiguous(), 32, iterations=1)
    for name in FIELDS:
        assert torch.equal(getattr(clusters, name)[:, 120:], getattr(alone, name)), name
    y = permute_tokens(x, clusters.order)
    assert torch.equal(y[:, :, 120:], permute_tokens(last, alone.order, backend="reference"))
    assert torch.equal(unpermute_tokens(y, clusters.order), x)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "text"),
    [(BF16, 7, (0, 0)), (BF16, 64, (0, 226)), (BF16, 72, (77, 3)), (BF16, 128, (0, 0)), (FP16, 72, (0, 226)),
     (FP16, 128, (77, 3)), (FP32, 7, (77, 3)), (FP32, 64, (0, 0)), (FP32, 128, (0, 226))],
    ids=str,
)  # fmt: skip
def test_permutation(dtype, head_dim, text):
    before, after = text
    for contiguous, lead in ((True, (1, 3)), (False, (2, 3)), (True, (2, 1))):
        _, k, v = make_qkv(
            batch=2, seq_len_q=before + 1001 + after, num_heads=3, head_dim=head_dim, dtype=dtype, device="cuda",
            contiguous=contiguous,
        )  # fmt: skip
        order = torch.rand(*lead, 1001, device="cuda").argsort(-1).int()
        options = dict(text_before=before, text_after=after)
        for move in (permute_tokens, unpermute_tokens):
            want = [move(x, order, backend="reference", **options) for x in (k, v)]
            for heads_first in (False, True):
                poison()
                got = move((k, v), order, backend="triton", heads_first=heads_first, **options)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        k.requires_grad_()
        weights = torch.randn_like(k)
        (grad,) = torch.autograd.grad((permute_tokens(k, order, **options) * weights).sum(), k)
        assert torch.equal(grad, unpermute_tokens(weights, order, backend="reference", **options))
        k.requires_grad_(False)
