"""Writing and reading videos: formats, sizes, and that nothing half done is left behind."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from vidsparse.errors import OutputError
from vidsparse_pipelines import video
from vidsparse_pipelines.video import (
    VideoWriter,
    check_output,
    contact_sheet,
    iter_video,
    output_error,
    read_video,
    write_video,
)


def clip(num_frames: int = 6, height: int = 64, width: int = 96) -> np.ndarray:
    """A red square that moves over a blue-to-black ramp."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 2] = np.linspace(0, 255, width).astype(np.uint8)
    for i, frame in enumerate(frames):
        frame[8:24, 4 * i : 4 * i + 16] = (220, 30, 40)
    return frames


@pytest.mark.parametrize(("suffix", "error"), [(".mp4", 6.0), (".webm", 6.0), (".gif", 8.0)])
def test_round_trip_keeps_frames_and_colours(tmp_path: Path, suffix: str, error: float) -> None:
    frames = clip()
    path = write_video(tmp_path / f"clip{suffix}", frames, fps=10)
    back = read_video(path)
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < error
    square = back[0, 12:20, 6:14].reshape(-1, 3).mean(0)
    assert np.abs(square - (220, 30, 40)).max() < 25
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_png_round_trip_is_exact(tmp_path: Path) -> None:
    frames = clip(1)
    path = write_video(tmp_path / "one.png", frames)
    assert path == tmp_path / "one.png"
    assert np.array_equal(read_video(path), frames)


def test_several_pngs_become_a_folder(tmp_path: Path) -> None:
    frames = clip(3)
    path = write_video(tmp_path / "many.png", frames)
    assert path == tmp_path / "many"
    assert sorted(p.name for p in path.iterdir()) == ["frame_00000.png", "frame_00001.png", "frame_00002.png"]
    assert np.array_equal(read_video(path), frames)
    write_video(tmp_path / "many.png", frames[:2])
    assert len(list(iter_video(path))) == 2


def test_foreign_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="holds other files"):
        check_output(tmp_path / "many.png", 3)
    assert (tmp_path / "many" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(("height", "width"), [(17, 31), (63, 96)])
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sizes_are_padded_to_even(tmp_path: Path, height: int, width: int, suffix: str) -> None:
    frames = clip(2, height, width)
    back = read_video(write_video(tmp_path / f"odd{suffix}", frames))
    assert back.shape == (2, height + height % 2, width + width % 2, 3)
    assert np.abs(back[:, :height, :width].astype(int) - frames).mean() < 8


def test_mp4_is_h264_yuv420p_and_tagged(tmp_path: Path) -> None:
    import subprocess

    import imageio_ffmpeg

    path = write_video(tmp_path / "clip.mp4", clip(), fps=16)
    run = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True)
    assert (
        "h264" in run.stderr and "yuv420p(tv, bt709" in run.stderr and "96x64" in run.stderr and "16 fps" in run.stderr
    )


def test_result_has_ordinary_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        path = write_video(tmp_path / "clip.gif", clip(2))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["new/deep/clip.mp4", "new/clip.gif", "new/clip.png"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_nothing(tmp_path: Path, name: str, kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        with VideoWriter(tmp_path / name) as writer:
            writer.add(clip(1)[0])
            raise kind
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_survives_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        with VideoWriter(path) as writer:
            writer.add(clip(1)[0])
            raise RuntimeError
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_no_frame_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No frame"):
        write_video(tmp_path / "clip.mp4", [])
    assert list(tmp_path.iterdir()) == []


def test_wrong_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "clip.mp4", clip().astype(np.float32))
    with pytest.raises(ValueError, match="like the first"):
        write_video(tmp_path / "clip.mp4", [clip()[0], clip(1, 32, 32)[0]])
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_saving_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video.Image.Image, "save", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_video(tmp_path / "many.png", clip(3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_full_disk_while_encoding(tmp_path: Path, suffix: str) -> None:
    """The encoder writes into a device that is always full: the exit code must be noticed, not only broken pipes."""
    writer = VideoWriter(tmp_path / f"clip{suffix}")
    assert writer._temporary is not None
    writer._temporary.unlink()
    writer._temporary.symlink_to("/dev/full")
    with pytest.raises(OutputError, match="disk is full"):
        with writer:
            for frame in clip(4):
                writer.add(frame)
    assert list(tmp_path.iterdir()) == []


def test_encoder_that_dies_is_reported(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    with pytest.raises(OutputError, match="encoder failed"):
        with VideoWriter(tmp_path / "clip.mp4") as writer:
            writer.add(noise)
            assert writer._process is not None
            writer._process.kill()
            for _ in range(20):
                writer.add(noise)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "not writable"), (errno.EIO, "Cannot write")]
)
def test_error_sentences(code: int, words: str) -> None:
    assert words in str(output_error(Path("out/clip.mp4"), OSError(code, os.strerror(code))))


def test_check_output_finds_trouble_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken.mp4").mkdir()
    for path, words in [
        (tmp_path / "clip.avi", "no known format"),
        (tmp_path / "file" / "clip.mp4", "is a file, not a folder"),
        (tmp_path / "taken.mp4", "is a folder"),
    ]:
        with pytest.raises(OutputError, match=words):
            check_output(path, 5)
    check_output(tmp_path / "not" / "yet" / "there.mp4", 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.mp4"]


def test_check_output_on_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(video.tempfile, "TemporaryFile", refuse)  # as root, permissions alone would not refuse
    with pytest.raises(OutputError, match="is not writable"):
        check_output(tmp_path / "clip.mp4", 5)


def test_contact_sheet_layout() -> None:
    frames = np.stack([np.full((4, 6, 3), 20 * i, np.uint8) for i in range(9)])
    sheet = np.asarray(contact_sheet(frames, columns=3, rows=1, gap=1))
    assert sheet.shape == (4, 20, 3)
    assert [sheet[0, x, 0] for x in (0, 7, 14)] == [0, 80, 160]
    assert (sheet[:, 6] == 255).all()
    assert contact_sheet(frames, columns=2, rows=2, scale=2, gap=0).size == (24, 16)
    assert contact_sheet(frames[:1], columns=8).size == (6, 4)
