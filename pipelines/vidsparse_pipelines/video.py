"""Write frames to a video, image or folder as they come; read them back; draw a contact sheet.

Everything is written under a temporary name in the target's folder and renamed when complete, so a crash, an interrupt
or a full disk never leaves a half file behind.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from PIL import Image

from vidsparse.errors import OutputError

VIDEO_SUFFIXES = (".mp4", ".webm", ".gif")
SUFFIXES = (*VIDEO_SUFFIXES, ".png")

# RGB is converted with the BT.709 matrix and tagged as such: untagged small videos are shown with other colours by
# players that guess the matrix from the height.
_BT709 = ("-color_primaries", "bt709", "-color_trc", "bt709", "-colorspace", "bt709")
_TO_YUV = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p"
_ENCODERS: dict[str, tuple[str, ...]] = {
    ".mp4": ("-vf", _TO_YUV, "-c:v", "libx264", "-crf", "16", "-preset", "medium", *_BT709)
    + ("-movflags", "+faststart", "-f", "mp4"),
    ".webm": ("-vf", _TO_YUV, "-c:v", "libvpx-vp9", "-crf", "18", "-b:v", "0", "-row-mt", "1", *_BT709, "-f", "webm"),
    # One palette per frame keeps the filter streaming; a palette for the whole clip would buffer every frame.
    ".gif": ("-vf", "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1", "-f", "gif"),
}


def _ffmpeg() -> str:
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def output_error(path: Path, error: OSError) -> OutputError:
    """Turn an OSError met while writing `path` into one sentence with the remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"The disk is full while writing {str(path)!r}; free some space or choose another --output."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{str(path.parent)!r} is not writable; choose another --output.")
    reason = error.strerror or str(error) or type(error).__name__
    return OutputError(f"Cannot write {str(path)!r} ({reason}); choose another --output.")


def png_folder(path: Path) -> Path:
    """Where several PNGs asked for as `NAME.png` go: the folder `NAME`."""
    return path.with_suffix("")


def target_of(path: Path, num_frames: int) -> Path:
    """What really appears on disk for `path`: itself, or the folder `NAME` when `NAME.png` gets several frames."""
    return png_folder(path) if path.suffix.lower() == ".png" and num_frames > 1 else path


def check_output(path: Path, num_frames: int) -> None:
    """Fail early, before any work, if `path` cannot be written. Creates nothing that stays.

    Raises:
        OutputError: unknown suffix, a folder in the way, or the nearest existing folder is not writable.
    """
    if path.suffix.lower() not in SUFFIXES:
        allowed = ", ".join(SUFFIXES)
        raise OutputError(
            f"--output {str(path)!r} has no known format; end it with one of {allowed}, or name a folder."
        )
    target = target_of(path, num_frames)
    if target == path and target.is_dir():
        raise OutputError(f"--output {str(path)!r} is a folder; remove it or choose another name.")
    if target != path and target.exists() and not _is_frame_folder(target):
        raise OutputError(
            f"The folder {str(target)!r} for the frames exists and holds other files; choose another --output."
        )
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{str(folder)!r} is a file, not a folder; choose another --output.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise output_error(folder / target.name, error) from error


def _is_frame_folder(path: Path) -> bool:
    return path.is_dir() and all(p.name.startswith("frame_") and p.suffix == ".png" for p in path.iterdir())


def _make_even(frame: np.ndarray) -> np.ndarray:
    """Repeat the last row and column of an odd-sized frame: 4:2:0 chroma needs even sizes."""
    pad = (frame.shape[0] % 2, frame.shape[1] % 2)
    return np.pad(frame, ((0, pad[0]), (0, pad[1]), (0, 0)), mode="edge") if any(pad) else frame


class VideoWriter:
    """Writes uint8 RGB frames one by one; the file appears only when `close` has succeeded.

    Args:
        path: target ending in .mp4 (H.264, yuv420p), .webm (VP9), .gif or .png. `.png` with more than one frame
            becomes the folder `NAME/` of `frame_00000.png`, ….
        fps: frames per second (ignored for PNG).
        num_frames: how many frames will come; only .png needs it to choose between one image and a folder.

    Use as a context manager: leaving it normally finishes the file, leaving it by an exception removes every trace.
    `finish()` completes the temporary file, `commit()` renames it; `close()` does both.

    Example:
        >>> with VideoWriter("clip.mp4", fps=16) as writer:
        ...     for frame in frames:
        ...         writer.add(frame)

    Raises:
        OutputError: the file cannot be written (no permission, disk full, encoder failed).
    """

    def __init__(self, path: str | Path, fps: float = 16.0, num_frames: int | None = None) -> None:
        self.path = Path(path)
        self.fps = fps
        self.count = 0
        self._suffix = self.path.suffix.lower()
        if self._suffix not in SUFFIXES:
            raise OutputError(f"{str(path)!r} has no known format; end it with one of {', '.join(SUFFIXES)}.")
        self.target = target_of(self.path, num_frames if num_frames is not None else 2)
        self._folder = self.target != self.path
        self._temporary: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._size: tuple[int, int] | None = None
        self._finished = False
        self._created: list[Path] = []
        try:
            self._open()
        except OSError as error:
            self.abort()
            raise output_error(self.target, error) from error

    def _open(self) -> None:
        missing = [p for p in (self.target.parent, *self.target.parent.parents) if not p.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            self._created.append(folder)
        if self._folder:
            self._temporary = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=self.target.parent))
        else:
            handle, name = tempfile.mkstemp(
                prefix=f".{self.target.stem}.", suffix=self._suffix, dir=self.target.parent
            )
            os.close(handle)
            self._temporary = Path(name)

    def _start_encoder(self, height: int, width: int) -> None:
        command = [_ffmpeg(), "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{width}x{height}", "-r", f"{self.fps:g}", "-i", "-", "-an"]
        command += [*_ENCODERS[self._suffix], str(self._temporary)]
        self._log = tempfile.TemporaryFile()
        # A session of its own: Ctrl-C in the terminal reaches us only, and we end the encoder ourselves.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._log, start_new_session=True
        )

    def add(self, frame: np.ndarray) -> None:
        """Append one frame: uint8 RGB `[height, width, 3]`."""
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"`frame` must be uint8 [height, width, 3], got {frame.dtype} {list(frame.shape)}.")
        if self._size is not None and frame.shape[:2] != self._size:
            raise ValueError(f"`frame` must be {self._size} like the first one, got {frame.shape[:2]}.")
        self._size = (frame.shape[0], frame.shape[1])
        try:
            self._write(frame)
        except OSError as error:
            failure = self._encoder_failure() or output_error(self.target, error)
            self.abort()
            raise failure from error
        self.count += 1

    def _write(self, frame: np.ndarray) -> None:
        assert self._temporary is not None
        if self._suffix == ".png":
            target = self._temporary / f"frame_{self.count:05d}.png" if self._folder else self._temporary
            Image.fromarray(frame).save(target, format="PNG")
            return
        if self._suffix != ".gif":
            frame = _make_even(frame)
        if self._process is None:
            self._start_encoder(frame.shape[0], frame.shape[1])
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(np.ascontiguousarray(frame).data)

    def _encoder_failure(self) -> OutputError | None:
        """What ffmpeg said, if it ended by itself with an error."""
        if self._process is None or self._log is None:
            return None
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return None
        if code == 0:
            return None
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace")
        if "No space left" in text:
            return output_error(self.target, OSError(errno.ENOSPC, "No space left on device"))
        if "Permission denied" in text:
            return output_error(self.target, OSError(errno.EACCES, "Permission denied"))
        last = text.strip().splitlines()[-1] if text.strip() else f"exit code {code}"
        return OutputError(f"The video encoder failed on {str(self.target)!r}: {last}")

    def finish(self) -> None:
        """Complete the temporary file. Nothing is visible under the final name yet."""
        if self._finished:
            return
        if self.count == 0:
            self.abort()
            raise OutputError(f"No frame was written to {str(self.target)!r}.")
        if self._process is not None:
            assert self._process.stdin is not None
            try:
                self._process.stdin.close()
            except OSError:
                pass  # the exit code below says what happened
            self._process.wait()
            failure = self._encoder_failure()
            if failure is not None:
                self.abort()
                raise failure
            self._close_log()
        self._finished = True

    def rename(self, path: Path) -> None:
        """Choose another name in the same folder, of the same format, before `commit`."""
        assert path.parent == self.path.parent and path.suffix == self.path.suffix
        self.target = path if self.target == self.path else png_folder(path)
        self.path = path

    def commit(self) -> Path:
        """Rename the finished temporary file to its final name and return that name."""
        assert self._finished and self._temporary is not None
        try:
            # mkstemp and mkdtemp make private files; a result should have the permissions of any other file.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(self._temporary, (0o777 if self._folder else 0o666) & ~mask)
            if self._folder and self.target.exists():
                shutil.rmtree(self.target)
            os.replace(self._temporary, self.target)
        except OSError as error:
            self.abort()
            raise output_error(self.target, error) from error
        self._temporary = None
        return self.target

    def close(self) -> Path:
        """`finish` and `commit`."""
        self.finish()
        return self.commit()

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def abort(self) -> None:
        """Stop the encoder and remove the temporary file and the folders made for it. Safe to call twice."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                try:
                    self._process.stdin.close()
                except OSError:
                    pass
            self._process = None
        self._close_log()
        if self._temporary is not None:
            if self._temporary.is_dir():
                shutil.rmtree(self._temporary, ignore_errors=True)
            else:
                self._temporary.unlink(missing_ok=True)
            self._temporary = None
        for folder in reversed(self._created):
            try:
                folder.rmdir()
            except OSError:
                break
        self._created = []

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._temporary is not None:
            self.close()


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float = 16.0) -> Path:
    """Write uint8 RGB frames `[height, width, 3]` to `path` (see `VideoWriter`) and return what was created."""
    num_frames = len(frames) if isinstance(frames, Sequence | np.ndarray) else None
    with VideoWriter(path, fps, num_frames) as writer:
        for frame in frames:
            writer.add(frame)
        writer.finish()
        return writer.commit()


def iter_video(path: str | Path) -> Iterator[np.ndarray]:
    """Yield the uint8 RGB frames `[height, width, 3]` of a video, image, or folder of PNGs."""
    path = Path(path)
    if path.is_dir():
        names = sorted(path.glob("*.png"))
    elif path.suffix.lower() == ".png":
        names = [path]
    else:
        yield from _decode_with_ffmpeg(path)
        return
    for name in names:
        with Image.open(name) as image:
            yield np.asarray(image.convert("RGB"))


def _decode_with_ffmpeg(path: Path) -> Iterator[np.ndarray]:
    import imageio_ffmpeg

    # Without "passthrough" ffmpeg repeats or drops frames to reach a constant rate, which GIF's 1/100 s clock provokes.
    reader = imageio_ffmpeg.read_frames(str(path), output_params=["-fps_mode", "passthrough"])
    width, height = next(reader)["size"]
    for data in reader:
        yield np.frombuffer(data, np.uint8).reshape(height, width, 3)


def read_video(path: str | Path) -> np.ndarray:
    """Read a video, image or folder of PNGs as uint8 RGB `[num_frames, height, width, 3]`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist.")
    frames = list(iter_video(path))
    if not frames:
        raise ValueError(f"{str(path)!r} has no frames.")
    return np.stack(frames)


def contact_sheet(
    frames: np.ndarray | Sequence[np.ndarray], columns: int = 8, rows: int = 1, scale: int = 1, gap: int = 2
) -> Image.Image:
    """Lay `columns * rows` evenly spaced frames (first and last included) out on one image, in reading order.

    Args:
        frames: uint8 RGB frames `[num_frames, height, width, 3]`, or a list of such frames.
        columns: pictures in a row.
        rows: number of rows.
        scale: whole-number enlargement of each frame, nearest neighbour.
        gap: white pixels between frames.
    """
    if len(frames) == 0 or columns < 1 or rows < 1 or scale < 1:
        raise ValueError("`contact_sheet` needs at least one frame, and `columns`, `rows` and `scale` of at least 1.")
    wanted = min(columns * rows, len(frames))
    picks = np.linspace(0, len(frames) - 1, wanted).round().astype(int)
    columns = min(columns, wanted)
    height, width = frames[0].shape[0] * scale, frames[0].shape[1] * scale
    rows = -(-wanted // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for place, pick in enumerate(picks):
        tile = Image.fromarray(np.asarray(frames[pick])).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (place % columns * (width + gap), place // columns * (height + gap)))
    return sheet
