"""Videos in: captions, lengths, sizes, what is skipped and why; the cache; the order of batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vidsparse.errors import ConfigError, ModelLoadError, OutputError
from vidsparse_lora import files
from vidsparse_lora.data import Batches, LatentCache, drawn_clips, folder_videos
from vidsparse_lora.data.cache import Skipped
from vidsparse_lora.data.folder import fit, nearest_size
from vidsparse_lora.session import Session
from vidsparse_pipelines.clips.grammar import is_held_out
from vidsparse_pipelines.video import write_video


class FakeEncoder:
    """Latents are the mean over 8 x 8 pixels of every fourth frame; a text is its length."""

    def __init__(self) -> None:
        self.videos = 0

    def encode_video(self, clips: Tensor) -> Tensor:
        self.videos += len(clips)
        return torch.nn.functional.avg_pool3d(clips[:, :, ::4], (1, 8, 8))

    def encode_text(self, captions: Any) -> list[Tensor]:
        return [torch.full((len(c.split()), 2), float(len(c))) for c in captions]

    def encode_first_frame(self, clips: Tensor) -> None:
        return None


def video(path: Path, frames: int, height: int = 32, width: int = 48, shade: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, [np.full((height, width, 3), shade, np.uint8)] * frames, fps=16)


def fill(cache: LatentCache, sources: Any, **options: Any) -> FakeEncoder:
    encoder = FakeEncoder()
    cache.fill(sources, encoder, **options)
    return encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good videos of different lengths, one of them in a subfolder, and one of each kind that is skipped."""
    root = tmp_path_factory.mktemp("videos")
    video(root / "long.mp4", 12)
    (root / "long.txt").write_text("a long one\n")
    video(root / "sub/short.mp4", 5, height=48, width=32)
    (root / "sub/short.txt").write_text("a short one")
    video(root / "tiny.mp4", 3)
    (root / "tiny.txt").write_text("too short")
    video(root / "silent.mp4", 9)
    (root / "broken.mp4").write_bytes(b"no video at all" * 50)
    (root / "broken.txt").write_text("broken")
    (root / "notes.md").write_text("not a video")
    return root


SIZES = [(32, 48), (48, 32)]


def test_folder_with_everything_that_can_be_wrong(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    cache = LatentCache(tmp_path, {"model": "m"}, said.append)
    encoder = fill(cache, folder_videos(folder, (5, 9), SIZES, None))
    assert {entry.caption: entry.shape for entry in cache.entries} == {
        "a long one": (3, 3, 4, 6),  # 9 of its 12 frames
        "a short one": (3, 2, 6, 4),
    }
    assert encoder.videos == 2
    listed = json.loads((tmp_path / "skipped.json").read_text())
    assert listed == {"broken.mp4": "unreadable", "silent.mp4": "without a caption", "tiny.mp4": "too short"}
    assert "skipped 3 of 5 videos: 1 unreadable, 1 without a caption, 1 too short" in said[0]
    sample = cache.load(cache.entries[0])
    assert sample.latents.abs().max() < 0.05 and sample.text.shape == (3, 2)


def test_what_is_cached_is_not_encoded_again(folder: Path, tmp_path: Path) -> None:
    sources = folder_videos(folder, (5, 9), SIZES, None)
    assert fill(LatentCache(tmp_path, {"model": "m"}, print), sources).videos == 2
    again = LatentCache(tmp_path, {"model": "m"}, print)
    assert fill(again, sources).videos == 0 and len(again.entries) == 2
    assert fill(LatentCache(tmp_path, {"model": "another"}, print), sources).videos == 2
    # A file that was cut off, by a disk that lied for instance, is made anew; the other is kept.
    path = again.entries[0].path
    path.write_bytes(path.read_bytes()[:-4])
    assert fill(LatentCache(tmp_path, {"model": "m"}, print), sources).videos == 1


def test_encoding_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    sources = drawn_clips(6, (5,), [(32, 48)], 0, torch.device("cpu"))

    class Stops(FakeEncoder):
        def encode_video(self, clips: Tensor) -> Tensor:
            if self.videos == 4:
                raise KeyboardInterrupt
            return super().encode_video(clips)

    with pytest.raises(KeyboardInterrupt):
        LatentCache(tmp_path, {}, print).fill(sources, Stops(), 2)
    assert fill(LatentCache(tmp_path, {}, print), sources, batch_size=2).videos == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_damaged_sample_is_named(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, {}, print)
    fill(cache, drawn_clips(1, (5,), [(32, 48)], 0, torch.device("cpu")))
    path = cache.entries[0].path
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # the size is right, one bit is not
    path.write_bytes(data)
    again = LatentCache(tmp_path, {}, print)
    fill(again, drawn_clips(1, (5,), [(32, 48)], 0, torch.device("cpu")))
    with pytest.raises(ModelLoadError, match=f"{path.name}' is damaged; remove it"):
        again.load(again.entries[0])


def test_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.bin"
    files.write_bytes(target, b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match="The disk is full"):
        files.write_bytes(target, b"after")
    assert target.read_bytes() == b"before" and list(tmp_path.iterdir()) == [target]


def test_metadata_files(folder: Path, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes((folder / "long.mp4").read_bytes())
    rows = [{"file_name": "a.mp4", "text": "from jsonl"}, {"file_name": "gone.mp4", "text": "x"}]
    (tmp_path / "metadata.csv").write_text('file_name,caption\na.mp4,"from csv, with a comma"\nb.mp4,\n')
    by_csv = folder_videos(tmp_path, (5,), SIZES, None)
    assert [(v.name, v.caption) for v in by_csv] == [("a.mp4", "from csv, with a comma"), ("b.mp4", None)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cache = LatentCache(tmp_path / "cache", {}, print)
    fill(cache, folder_videos(tmp_path, (5,), SIZES, None))
    assert [e.caption for e in cache.entries] == ["from jsonl"] and cache.skipped == {"gone.mp4": "missing"}
    (tmp_path / "metadata.jsonl").write_text('{"name": "a.mp4"}')
    with pytest.raises(ConfigError, match="every row needs `file_name`"):
        folder_videos(tmp_path, (5,), SIZES, None)


def test_rate_of_reading(folder: Path) -> None:
    """Half the rate takes every other frame, so 12 frames fill 5 and not 9."""
    (half,) = (v for v in folder_videos(folder, (5, 9), SIZES, 8.0) if v.name == "long.mp4")
    assert half.read().pixels.shape == (3, 5, 32, 48)
    (quarter,) = (v for v in folder_videos(folder, (5,), SIZES, 4.0) if v.name == "long.mp4")
    with pytest.raises(Skipped, match="too short"):
        quarter.read()


def test_empty_sets(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"The data set is empty: there is no video\."):
        fill(LatentCache(tmp_path / "c", {}, print), folder_videos(tmp_path / "none", (5,), SIZES, None))
    with pytest.raises(ConfigError, match="all 5 were skipped, 'broken.mp4' because it is unreadable"):
        fill(LatentCache(tmp_path / "c", {}, print), folder_videos(folder, (99,), SIZES, None))
    with pytest.raises(ConfigError, match="there is no folder '/nowhere'"):
        folder_videos("/nowhere", (5,), SIZES, None)


def test_sizes() -> None:
    sizes = ((480, 832), (832, 480), (240, 416))
    assert nearest_size(1080, 1920, sizes) == (480, 832)
    assert nearest_size(1920, 1080, sizes) == (832, 480)
    assert nearest_size(300, 520, sizes) == (240, 416)  # the larger one of this shape would be blown up
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 2, 32, 64)
    out = fit(ramp, (32, 32))
    assert out.shape == (3, 2, 32, 32)
    assert torch.allclose((out[0, 0, 0] + 1) * 127.5, torch.arange(16.0, 48.0), atol=1e-3)  # the middle
    assert fit(ramp, (16, 16)).shape == (3, 2, 16, 16)


def test_drawn_clips_are_never_held_out_and_the_same_every_time() -> None:
    from random import Random

    from vidsparse_pipelines.clips.grammar import sample_split

    clips = drawn_clips(3, (5, 9), [(32, 48)], 7, torch.device("cpu"))
    assert [(c.index, c.num_frames) for c in clips] == [(0, 5), (2, 5), (1, 9)]
    assert torch.equal(clips[0].read().pixels, clips[0].read().pixels)
    assert clips[0].read().pixels.shape == (3, 5, 32, 48)
    assert not any(is_held_out(sample_split(Random(f"lora clips 7 {c.index}"), held_out=False)) for c in clips)


def test_order_of_batches(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, {}, print)
    fill(cache, drawn_clips(10, (5, 9), [(32, 48)], 0, torch.device("cpu")))
    batches = Batches(cache, 2, seed=3)
    assert batches.per_epoch == 6  # 5 of each length
    first = [[e.path for e in batches.entries(i)] for i in range(6)]
    assert {p for batch in first for p in batch} == {e.path for e in cache.entries}
    assert all(len({e.shape for e in batches.entries(i)}) == 1 for i in range(12))
    second = [[e.path for e in batches.entries(6 + i)] for i in range(6)]
    assert second != first
    # Another object, asked in another order, says the same: there is no state.
    fresh = Batches(cache, 2, seed=3)
    assert [e.path for e in fresh.entries(8)] == second[2] and [e.path for e in fresh.entries(1)] == first[1]
    assert [[e.path for e in Batches(cache, 2, seed=4).entries(i)] for i in range(6)] != first
    assert batches[0].latents.shape[0] == 2


def test_clips_that_the_model_makes(
    lengthen: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stock diffusers makes from the prompts; kept, gone on with after a stop, and not made again."""
    import diffusers

    from vidsparse_lora import length_extension, validation

    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n# no prompt\na blue star\n")
    config = lengthen(
        data=f"self:{file}", num_clips=3, validation_steps=2, max_steps=1, cache_dir=str(tmp_path / "own")
    )
    made: list[tuple[str, int]] = []
    original = validation.generate

    def generate(session: Any, prompts: Any, seeds: Any, *size: int) -> torch.Tensor:
        if len(made) == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        made.append((prompts[0], seeds[0]))
        return original(session, prompts, seeds, *size)

    stopped: list[bool] = []
    monkeypatch.setattr(validation, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        length_extension.train(config, lambda _: None)
    length_extension.train(config, lambda _: None)
    assert made == [("a red circle", 0), ("a blue star", 1), ("a red circle", 2)]
    monkeypatch.setattr(validation, "generate", None)  # must not be called any more
    session = Session(config, lambda _: None)
    assert session.batches is not None and len(made) == 3
    cache = session.batches.cache
    assert sorted(entry.caption for entry in cache.entries) == ["a blue star", "a red circle", "a red circle"]
    pipe: Any = diffusers.WanPipeline.from_pretrained(tiny_model)  # pyright: ignore[reportPrivateImportUsage]
    guidance = session.backbone.info.preset.guidance_scale
    video = pipe(
        prompt="a blue star",
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(1)],
        max_sequence_length=32,
        output_type="pt",
    ).frames.transpose(1, 2)
    expected = session.backbone.encode_video(video * 2 - 1)[0]
    (entry,) = (entry for entry in cache.entries if entry.caption == "a blue star")
    assert torch.allclose(cache.load(entry).latents, expected, atol=1e-4)
    with pytest.raises(ConfigError, match="prompt file .* cannot be read"):
        Session(lengthen(data="self:/nowhere.txt", output_dir=str(tmp_path / "other")), lambda _: None)
