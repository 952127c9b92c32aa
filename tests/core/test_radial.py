from __future__ import annotations

import hashlib
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse.errors import ConfigError
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.masks.radial import paper_radii, radial_block_mask, radial_dense_blocks, solve_decay_factor


def sha(dense: np.ndarray) -> str:
    return hashlib.sha256(dense.astype(np.uint8).tobytes()).hexdigest()[:16]


def release(frames: int, size: int, decay: float, block: int, sink: int = 1) -> np.ndarray:
    layout = TokenLayout(LatentGrid(frames, 1, size), block_size=block)
    return radial_dense_blocks(layout, decay_factor=decay, variant="release", sink_frames=sink)


def eq4_tokens(frames: int, size: int, sink: int) -> np.ndarray:
    """Eq. 4 of arXiv 2506.19852, written out token by token."""
    frame, position = np.divmod(np.arange(frames * size), size)
    distance = np.abs(frame[:, None] - frame)
    gap = np.abs(position[:, None] - position)
    span = 2 ** np.floor(np.log2(np.maximum(distance, 1))).astype(int)
    near = (span <= size) & (gap + 1 <= size / span)
    far = (span > size) & (distance % np.ceil(span / size).astype(int) == 0) & (gap == 0)
    return near | far | (frame < sink)[None, :]


WORKED_EXAMPLE = [
    (64, 1.0, 1, 828, "8b798d02515f8917"),
    (64, 0.5, 1, 748, "e710ec044d20c552"),
    (64, 0.2, 1, 748, "e710ec044d20c552"),
    (64, 1.0, 0, 780, "4f86ba549fc31ffe"),
    (64, 0.5, 0, 692, "af483b4252092694"),
    (64, 0.2, 0, 692, "af483b4252092694"),
    (128, 1.0, 1, 232, "e32b6166edbdfea7"),
    (128, 1.0, 0, 224, "4f822520698f98f2"),
]


@pytest.mark.parametrize(("block", "decay", "sink", "count", "digest"), WORKED_EXAMPLE)
def test_release_worked_example(block, decay, sink, count, digest):
    dense = release(8, 256, decay, block, sink)
    assert (int(dense.sum()), sha(dense)) == (count, digest)


def test_release_worked_example_rows():
    wan = "18,22,22,18,22,26,26,22,24,27,27,24,27,31,31,27,28,32,32,28,27,31,31,27,24,27,27,24,22,26,26,22"
    hunyuan = "18,22,22,18,22,26,26,22,23,27,27,23,26,31,31,26,26,31,31,26,23,27,27,23,22,26,26,22,18,22,22,18"
    for sink, rows in ((1, wan), (0, hunyuan)):
        assert release(8, 256, 1.0, 64, sink).sum(1).tolist() == [int(x) for x in rows.split(",")]


TABLE_480P = [
    (8, 1.0, 6905, "1318b1f8f0e5d772"),
    (8, 0.2, 5389, "60415492fd1572c1"),
    (21, 1.0, 29442, "c223956056287eea"),
    (21, 0.2, 22534, "56aea9361c3d8795"),
    (41, 1.0, 74721, "50e50646a04b8345"),
    (41, 0.2, 59503, "b96593c8ea3b102d"),
    (81, 1.0, 182836, "f0e6ff78025fe8ca"),
    (81, 0.2, 151009, "e47c30cded0e1cc6"),
    (161, 1.0, 437155, "92ec0bd775083808"),
    (161, 0.2, 372108, "3e2ce25d00d470e8"),
]


@pytest.mark.parametrize(("frames", "decay", "count", "digest"), TABLE_480P)
def test_release_at_480p(frames, decay, count, digest):
    dense = release(frames, 1560, decay, 128)
    assert (int(dense.sum()), sha(dense)) == (count, digest)


def test_release_rows_at_480p():
    video = release(21, 1560, 1.0, 128)[:255, :255]
    rows = video.sum(1)
    assert (rows.min(), round(rows.mean(), 2), rows.max()) == (70, 113.45, 132)
    assert (rows[:4].tolist(), rows[-4:].tolist()) == ([70, 78, 81, 83], [94, 93, 91, 88])


@pytest.mark.parametrize(
    ("frames", "size", "decay", "sink", "density"),
    [
        (21, 3600, 1.0, 1, 0.3986),
        (21, 3600, 0.2, 1, 0.2647),
        (81, 3600, 0.2, 1, 0.1165),
        (21, 1560, 1.0, 0, 0.4146),
        (21, 1560, 0.95, 0, 0.4097),
        (41, 3600, 0.95, 0, 0.2368),
    ],
)
def test_release_densities(frames, size, decay, sink, density):
    assert release(frames, size, decay, 128, sink).mean() == pytest.approx(density, abs=5e-5)


@pytest.mark.parametrize(
    ("frames", "decay", "block", "sink", "count"),
    [(18, 0.2, 128, 1, 83728), (30, 0.95, 128, 0, 222452), (20, 0.8, 64, 1, 502720)],
    ids=["wan-69f", "hunyuan-117f", "wan22-77f"],
)
def test_release_script_settings(frames, decay, block, sink, count):
    assert int(release(frames, 3840, decay, block, sink).sum()) == count


@pytest.mark.parametrize(
    ("frames", "size", "sink", "count"),
    [(8, 256, 0, 3_089_920), (8, 256, 1, 3_271_168), (12, 4, 0, 1180), (12, 4, 1, 1296)],
)
def test_paper_token_counts(frames, size, sink, count):
    assert int(eq4_tokens(frames, size, sink).sum()) == count
    radii = paper_radii(frames, size, 1.0)
    position = np.arange(size)
    kept = 0
    for i in range(frames):
        for j in range(frames):
            radius = size - 1 if j < sink else radii[abs(i - j)]
            kept += int((np.abs(position[:, None] - position) <= radius).sum())
    assert kept == count


@pytest.mark.parametrize(("frames", "size"), [(8, 256), (12, 4), (5, 63), (9, 37), (3, 1), (1, 40), (40, 3)])
@pytest.mark.parametrize("blocks", [(16, 16), (32, 64), (64, 32)])
@pytest.mark.parametrize("text", [(0, 0), (7, 0), (0, 21)])
def test_paper_covers_every_kept_pair_and_no_block_more(frames, size, blocks, text):
    layout = TokenLayout(LatentGrid(frames, 1, size), *text)
    tokens = np.ones((layout.seq_len, layout.seq_len), dtype=bool)
    video = slice(text[0], text[0] + frames * size)
    tokens[video, video] = eq4_tokens(frames, size, 1)
    padding = [(0, -layout.seq_len % block) for block in blocks]
    padded = np.pad(tokens, padding)
    shape = (padded.shape[0] // blocks[0], padded.shape[1] // blocks[1])
    want = np.zeros(shape, dtype=bool)
    want |= padded.reshape(shape[0], blocks[0], shape[1], blocks[1]).any((1, 3))
    for row in range(shape[0]):
        first, last = row * blocks[0], min((row + 1) * blocks[0], layout.seq_len) - 1
        want[row, first // blocks[1] : last // blocks[1] + 1] = True
    got = radial_dense_blocks(layout, q_block_size=blocks[0], kv_block_size=blocks[1])
    assert np.array_equal(got, want)


grids = st.builds(LatentGrid, st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=60, deadline=None)
@given(
    grid=grids,
    block=st.sampled_from([16, 32, 48, 128]),
    before=st.integers(0, 40),
    after=st.integers(0, 40),
    decay=st.floats(0.01, 8.0),
    variant=st.sampled_from(["paper", "release"]),
    sink=st.integers(0, 2),
)
def test_any_grid(grid, block, before, after, decay, variant, sink):
    layout = TokenLayout(grid, before, after, block)
    mask = radial_block_mask(layout, decay_factor=decay, variant=variant, sink_frames=sink)
    dense = mask.to_dense()[0, 0].numpy()
    assert dense.shape == (layout.num_blocks, layout.num_blocks)
    assert mask.seq_len_q == mask.seq_len_kv == layout.seq_len
    assert dense.diagonal().all()
    assert np.array_equal(
        dense,
        radial_dense_blocks(layout, decay_factor=decay, variant=variant, sink_frames=sink),
    )
    is_text = np.ones(layout.seq_len, dtype=bool)
    is_text[before : before + grid.num_tokens] = False
    for index in range(layout.num_blocks):
        if is_text[index * block : (index + 1) * block].any():
            assert dense[index].all() and dense[:, index].all()
    wider = radial_dense_blocks(layout, decay_factor=decay * 1.7, variant=variant, sink_frames=sink)
    assert not (dense & ~wider).any(), "a larger decay factor must not drop a block"


def test_ragged_lengths_that_the_authors_code_refuses():
    for grid in (LatentGrid(21, 30, 52), LatentGrid(21, 45, 80), LatentGrid(13, 34, 60)):
        mask = radial_block_mask(grid, decay_factor=0.2, variant="release")
        assert mask.seq_len_q == grid.num_tokens
        assert int(mask.kv_num_blocks.min()) > 0


def test_mask_for_wan_720p_at_321_frames_is_quick_and_small():
    grid = LatentGrid(81, 45, 80)
    radial_block_mask(LatentGrid(2, 4, 4))
    start = time.perf_counter()
    mask = radial_block_mask(grid, decay_factor=0.2)
    # One second on an idle core; shared machines get three.
    assert time.perf_counter() - start < 3.0
    assert mask.seq_len_q == 291_600
    assert mask.density == pytest.approx(0.154, abs=0.001)
    tracemalloc.start()
    radial_block_mask(grid, decay_factor=1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_density_is_met(variant):
    grid = LatentGrid(21, 30, 52)
    factor, reached = solve_decay_factor(grid, 0.4, variant=variant)
    assert reached == pytest.approx(0.4, abs=0.01)
    assert radial_block_mask(grid, decay_factor=factor, variant=variant).density == reached


def test_density_below_the_floor_gives_the_floor():
    grid = LatentGrid(21, 30, 52)
    factor, reached = solve_decay_factor(grid, 0.01)
    assert reached == radial_block_mask(grid, decay_factor=1e-9).density
    assert 0.01 < reached < 0.4
    assert factor > 0


def test_density_one_is_dense():
    assert solve_decay_factor(LatentGrid(5, 8, 8), 1.0, q_block_size=16, kv_block_size=16)[1] == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"decay_factor": 0.0},
        {"decay_factor": math.inf},
        {"variant": "other"},
        {"sink_frames": -1},
        {"q_block_size": 0},
        {"variant": "release", "q_block_size": 64, "kv_block_size": 128},
    ],
)
def test_bad_arguments(options):
    with pytest.raises(ConfigError, match="got"):
        radial_block_mask(LatentGrid(4, 8, 8), **options)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
def test_bad_density(density):
    with pytest.raises(ConfigError, match=r"in \(0, 1\]"):
        solve_decay_factor(LatentGrid(4, 8, 8), density)


@pytest.mark.parametrize("grid", [LatentGrid(21, 8, 12), LatentGrid(21, 12, 20), LatentGrid(21, 30, 52)])
def test_the_processor_takes_the_variant_that_comes_nearest_to_a_density(grid):
    from vidsparse import RadialProcessor

    def density(**options):
        processor = RadialProcessor(**options)
        mask, note = processor.build_mask(processor.layout(grid), None)
        return mask.density, note

    by_itself = density()[0]
    assert by_itself == density(variant="release")[0]
    assert density(density=1.0) == (1.0, None)
    for target in (by_itself, 0.7):
        reached, note = density(density=target)
        assert reached == pytest.approx(target, abs=0.06)
        assert (note is None) == (abs(reached - target) <= 0.01)
