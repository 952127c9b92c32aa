"""Generate videos: load once, then encode, denoise, decode and write each prompt."""

from __future__ import annotations

import functools
import inspect
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vidsparse
from vidsparse.errors import ConfigError, OutOfMemory, OutputError, UnsupportedModelError
from vidsparse.recipe import Recipe

from .bundled import BUNDLED_MODEL
from .decode import can_stream, stream_frames, to_uint8
from .device import resolve_device
from .load import LoadedPipeline, is_out_of_memory, load_pipeline
from .lora import check_lora_files
from .model_info import ModelInfo, inspect_model
from .outputs import is_folder, name_output
from .progress import Observer, StepClock
from .prompts import prompt_notes
from .provenance import input_hashes, model_identity, with_absolute_paths
from .ranks import check_processes, indivisible, is_first, joined, with_same_seeds
from .recipe_file import check_recipe
from .runfile import FORMAT, FORMAT_VERSION, compact_report, json_path, versions, write_json
from .settings import GenerateSettings
from .video import VideoWriter, check_output, target_of

DENSE = "dense"
MAX_TOKENS = 512


@dataclass(frozen=True)
class Result:
    """One finished generation.

    Args:
        path: the video, image or folder of frames.
        json_path: the JSON beside it.
        settings: what was used, with nothing left to be chosen: seed, sizes, dtype and so on.
        document: the content of the JSON.
        report: the sparse attention report, None for a dense run.
        timings: seconds per stage.
        notes: what the user was told.
    """

    path: Path
    json_path: Path
    settings: GenerateSettings
    document: dict[str, Any]
    report: Any
    timings: dict[str, float]
    notes: tuple[str, ...] = ()


@dataclass
class _Run:
    """State of one generation in progress."""

    settings: GenerateSettings
    path: Path
    notes: list[str] = field(default_factory=list)
    name_again: Callable[[], Path] | None = None  # None where the user named the file
    timings: dict[str, float] = field(default_factory=dict)


class _Stages:
    """Announces stages to the observer and adds up their seconds."""

    def __init__(self, observer: Observer, timings: dict[str, float]) -> None:
        self.observer, self.timings = observer, timings
        self.current = ""
        self._since = time.perf_counter()

    def enter(self, name: str, total: int | None = None) -> None:
        self.leave()
        self.current = name
        self.observer.stage(name, total)
        self._since = time.perf_counter()

    def leave(self) -> None:
        if self.current:
            self.timings[self.current] = self.timings.get(self.current, 0.0) + time.perf_counter() - self._since
        self.current = ""


def resolve_settings(settings: GenerateSettings, info: ModelInfo) -> tuple[GenerateSettings, list[str]]:
    """Fill in the preset's defaults, snap the frame count, check sizes, draw the seed.

    Returns:
        The complete settings and notes for the user.

    Raises:
        ConfigError: the size or length does not fit the model; an image is missing or not taken.
    """
    preset, notes = info.preset, []
    changes: dict[str, Any] = {}
    for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "fps", "flow_shift"):
        if getattr(settings, name) is None:
            changes[name] = getattr(preset, name)
    if settings.negative_prompt is None:
        changes["negative_prompt"] = preset.negative_prompt
    full = settings.with_(**changes)
    assert full.num_frames is not None and full.height is not None and full.width is not None
    info.check_size(full.height, full.width)
    snapped = info.snap_frames(full.num_frames)
    if snapped != full.num_frames:
        notes.append(f"{full.num_frames} frames became {snapped}: {info.frame_reason()}.")
    info.check_length(snapped, full.height, full.width)
    if info.takes_image and full.image is None:
        raise ConfigError(f"The model {info.name!r} makes videos from an image; give one with --image.")
    if not info.takes_image and full.image is not None:
        raise ConfigError(f"The model {info.name!r} takes no image; leave --image out or use an image-to-video model.")
    seed = full.seed
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    return full.with_(num_frames=snapped, seed=seed), notes


def generate(
    settings: GenerateSettings,
    output: str | Path | None = None,
    *,
    observer: Observer | None = None,
    loaded: LoadedPipeline | None = None,
) -> Result:
    """Generate one video.

    Args:
        settings: what to generate.
        output: file, or folder for an automatic name; None for the current folder.
        observer: receives progress.
        loaded: a pipeline to reuse; it must have been loaded for the same model.

    Raises:
        VidsparseError: one of its subclasses, one sentence, with nothing written.

    Example:
        >>> generate(GenerateSettings(prompt="a red circle moves right", seed=1), "clip.mp4").path
    """
    return next(generate_many([settings], output, observer=observer, loaded=loaded))


def generate_many(
    batch: Sequence[GenerateSettings],
    output: str | Path | None = None,
    *,
    observer: Observer | None = None,
    loaded: LoadedPipeline | None = None,
) -> Generator[Result, None, None]:
    """Generate several videos that share model and method, loading once. Yields each as soon as it is written.

    All settings and outputs are checked before the weights are loaded. With `ulysses_degree`, every process must call
    this; all yield results, and the first process writes them.
    """
    if not batch:
        return
    degree, device = batch[0].ulysses_degree, batch[0].device
    check_processes(degree, device)
    with joined(degree, resolve_device(device)):
        if degree > 1:
            batch = with_same_seeds(batch)
        yield from _generate_many(batch, output, observer or Observer(), loaded)


def _generate_many(
    batch: Sequence[GenerateSettings], output: str | Path | None, observer: Observer, loaded: LoadedPipeline | None
) -> Generator[Result, None, None]:
    info = loaded.info if loaded is not None else inspect_model(batch[0].model)
    runs = _prepare(batch, info, str(output) if output is not None else None)
    first = runs[0].settings
    check_lora_files(first.loras)
    load_timings: dict[str, float] = {}
    stages = _Stages(observer, load_timings)
    stages.enter("load")
    with _explain(stages, first, info):
        if loaded is None:
            loaded = load_pipeline(
                info,
                dtype=first.dtype,
                device=first.device,
                offload=first.offload,
                vae_tiling=first.vae_tiling,
                compile=first.compile,
                loras=first.loras,
                flow_shift=first.flow_shift,
                ulysses_degree=first.ulysses_degree,
            )
        handle = _attach(loaded.pipe, first)
    stages.leave()
    loaded.pipe.set_progress_bar_config(disable=True)
    try:
        for run in runs:
            run.timings.update(load_timings)
            load_timings = {"load": 0.0}
            yield _run_one(run, loaded, handle, observer)
    finally:
        if handle is not None:
            handle.remove()


def _prepare(batch: Sequence[GenerateSettings], info: ModelInfo, output: str | None) -> list[_Run]:
    runs: list[_Run] = []
    resolve_device(batch[0].device)
    for index, settings in enumerate(batch):
        full, notes = resolve_settings(_check_method(settings), info)
        notes += check_recipe(full, info)
        assert full.seed is not None and full.num_frames is not None
        place = index if len(batch) > 1 else None
        path = name_output(output, full.prompt, full.seed, full.num_frames, place)
        check_output(path, full.num_frames)
        json_path(path)
        target = target_of(path, full.num_frames)
        if target.exists():
            notes.append(f"{str(target)!r} exists and is replaced.")
        chosen = output is not None and not is_folder(output)
        again = (
            None if chosen else functools.partial(name_output, output, full.prompt, full.seed, full.num_frames, place)
        )
        runs.append(_Run(full, path, notes, again))
    return runs


def _check_method(settings: GenerateSettings) -> GenerateSettings:
    """Build the method's processor once to check its options; returns the settings with every option spelt out."""
    from vidsparse.methods import method_options, processor_class

    if settings.recipe is not None:
        return settings.with_(sparse=Recipe.from_dict(settings.recipe).method)
    processor_class(settings.sparse)(**settings.method_options)
    if settings.sparse == DENSE:
        return settings
    return settings.with_(method_options={**method_options(settings.sparse), **settings.method_options})


def _attach(pipe: Any, settings: GenerateSettings) -> Any:
    """Attach the method. None for dense on a family that vidsparse cannot attach to: it needs nothing from us."""
    try:
        if settings.recipe is not None:
            return vidsparse.apply(pipe, Recipe.from_dict(settings.recipe), strict=settings.strict)
        return vidsparse.apply(pipe, settings.sparse, strict=settings.strict, **settings.method_options)
    except UnsupportedModelError:
        if settings.sparse == DENSE:
            return None
        raise


def _run_one(run: _Run, loaded: LoadedPipeline, handle: Any, observer: Observer) -> Result:
    settings, stages = run.settings, _Stages(observer, run.timings)
    bundled = loaded.info.name == BUNDLED_MODEL
    run.notes += prompt_notes(loaded.pipe.tokenizer, settings.prompt, _max_tokens(loaded), bundled)
    for note in run.notes:
        observer.note(note)
    if handle is not None:
        handle.reset()
    with _explain(stages, settings, loaded.info):
        frames = _frames(run, loaded, handle, stages)
        report = None
        if not is_first(settings.ulysses_degree):
            for _ in frames:
                pass
            report = vidsparse.Report.merged([handle.report()]) if handle is not None else None
            document = _document(run, loaded, report)
            return Result(run.path, json_path(run.path), settings, document, report, run.timings, tuple(run.notes))
        with VideoWriter(run.path, settings.fps or 16, settings.num_frames) as writer:
            _write_stream(writer, frames, stages, run.timings)
            stages.enter("write")
            writer.finish()
            stages.leave()
            if run.name_again is not None:
                run.path = run.name_again()  # another run may have taken the name meanwhile
                writer.rename(run.path)
            # A copy: the handle's own report is cleared by the next generation.
            report = vidsparse.Report.merged([handle.report()]) if handle is not None else None
            document = _document(run, loaded, report)
            beside = json_path(run.path)
            write_json(beside, document)
            try:
                path = writer.commit()
            except OutputError:
                beside.unlink(missing_ok=True)
                raise
    return Result(path, beside, settings, document, report, run.timings, tuple(run.notes))


def _write_stream(
    writer: VideoWriter, frames: Iterable[np.ndarray], stages: _Stages, timings: dict[str, float]
) -> None:
    """Hand chunks of frames to the writer as they are decoded; its time counts as `write`, not as `decode`."""
    writing = 0.0
    for chunk in frames:
        since = time.perf_counter()
        for frame in chunk:
            writer.add(frame)
        writing += time.perf_counter() - since
        stages.observer.advance(writer.count)
    stages.leave()
    timings["decode"] = max(0.0, timings.get("decode", 0.0) - writing)
    timings["write"] = timings.get("write", 0.0) + writing


def _max_tokens(loaded: LoadedPipeline) -> int | None:
    """How many text tokens the model reads, None if its pipeline does not say."""
    if loaded.info.preset.max_sequence_length is not None:
        return MAX_TOKENS
    parameter = inspect.signature(type(loaded.pipe).__call__).parameters.get("max_sequence_length")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


def _text_length(pipe: Any, settings: GenerateSettings, minimum: int) -> int:
    """`minimum` text tokens, or the next multiple of it that holds the longer prompt, at most 512."""
    texts = [settings.prompt, settings.negative_prompt or ""]
    needed = max(len(pipe.tokenizer(text)["input_ids"]) for text in texts)
    return min(MAX_TOKENS, -(-max(needed, 1) // minimum) * minimum)


def _call_arguments(run: _Run, loaded: LoadedPipeline) -> dict[str, Any]:
    """Arguments for the pipeline, limited to those that this pipeline class takes."""
    settings, pipe = run.settings, loaded.pipe
    arguments: dict[str, Any] = {
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "frame_rate": settings.fps,
        # Noise from the CPU is the same on every device.
        "generator": torch.Generator("cpu").manual_seed(settings.seed or 0),
    }
    if loaded.info.preset.max_sequence_length is not None:
        arguments["max_sequence_length"] = _text_length(pipe, settings, loaded.info.preset.max_sequence_length)
    if settings.image is not None:
        arguments["image"] = _read_image(settings.image, settings.height or 0, settings.width or 0)
    taken = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in arguments.items() if name in taken}


def _read_image(path: str, height: int, width: int) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(Path(path).expanduser()) as image:
            return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (width, height))
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"The image {path!r} cannot be read; give a PNG or JPEG file.") from error


def _frames(run: _Run, loaded: LoadedPipeline, handle: Any, stages: _Stages) -> Iterator[np.ndarray]:
    """Run the pipeline and yield its frames, uint8 `[n, height, width, 3]`."""
    pipe, steps = loaded.pipe, run.settings.num_inference_steps or 1
    kinds = ["dense" if handle is None or handle.is_dense_step(i, steps) else "sparse" for i in range(steps)]
    clock, since = StepClock(), 0.0

    def denoising_begins(*_: Any) -> None:
        nonlocal since
        if stages.current == "encode":
            stages.enter("denoise", steps)
            since = time.perf_counter()

    def step_ends(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal since
        if loaded.device.type == "cuda":
            torch.cuda.synchronize(loaded.device)  # kernels run behind Python; without this the times mean nothing
        now = time.perf_counter()
        clock.add(kinds[step], now - since)
        since = now
        stages.observer.advance(step + 1, clock.estimate(kinds[step + 1 :]), kinds[step])
        if step + 1 == steps:
            stages.enter("decode", run.settings.num_frames)
        return tensors

    first = is_first(run.settings.ulysses_degree)
    streamed = can_stream(pipe) or not first
    stages.enter("encode")
    models = [m for m in (getattr(pipe, "transformer", None), getattr(pipe, "transformer_2", None)) if m is not None]
    hooks = [model.register_forward_pre_hook(denoising_begins) for model in models]
    try:
        output = pipe(
            **_call_arguments(run, loaded),
            output_type="latent" if streamed else "np",
            callback_on_step_end=step_ends,
        )
    finally:
        for hook in hooks:
            hook.remove()
    if not first:
        stages.leave()  # The first process decodes.
    elif streamed:
        yield from stream_frames(pipe, output.frames, loaded.device)
        pipe.maybe_free_model_hooks()
    else:
        for frame in output.frames[0]:
            yield to_uint8(np.asarray(frame))[None]


def _document(run: _Run, loaded: LoadedPipeline, report: Any) -> dict[str, Any]:
    settings = with_absolute_paths(run.settings).with_(
        dtype=str(loaded.dtype).removeprefix("torch."), flow_shift=loaded.flow_shift
    )
    device = str(loaded.device)
    name = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "CPU"
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "output": run.path.name,
        "settings": settings.to_dict(),
        "model": model_identity(loaded.info),
        "inputs_sha256": input_hashes(settings),
        "resolved": {
            "pipeline_class": loaded.info.pipeline_class,
            "preset": loaded.info.preset.name,
            "device": device,
            "device_name": name,
            "vae_dtype": str(loaded.vae_dtype).removeprefix("torch."),
            "offload": loaded.offload,
        },
        "versions": versions(),
        "timings_s": {stage: round(seconds, 3) for stage, seconds in run.timings.items()},
        "notes": list(run.notes),
        "report": compact_report(report) if report is not None else None,
    }


@contextmanager
def _explain(stages: _Stages, settings: GenerateSettings, info: ModelInfo) -> Iterator[None]:
    """Turn running out of memory, or a failing compiler, into one sentence that says what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory):
            raise
        if is_out_of_memory(error):
            raise OutOfMemory(memory_advice(stages.current, settings, info)) from error
        if indivisible(error):
            raise ConfigError(
                f"The tokens of {settings.num_frames} frames of {settings.width}x{settings.height} cannot be shared "
                f"evenly by {settings.ulysses_degree} processes; choose another --size, --frames or --ulysses-degree."
            ) from error
        if settings.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"The model cannot be compiled here ({reason}); install a C++ compiler, or leave --compile out."
            ) from error
        raise


def memory_advice(stage: str, settings: GenerateSettings, info: ModelInfo) -> str:
    """One sentence: where memory ran out, and what to change, cheapest first."""
    frames = settings.num_frames or 1
    ways: list[str] = []
    harder = {"none": "model", "auto": "group", "model": "group", "group": "sequential"}.get(settings.offload)
    if settings.device != "cpu" and torch.cuda.is_available() and harder is not None:
        ways.append(f"--offload {harder}")
    if stage in ("decode", "write") and not settings.vae_tiling:
        ways.insert(0, "--vae-tiling")
    if stage != "load" and frames > 1:
        ways.append(f"--frames {info.snap_frames(frames // 2 + 1)}")
    if stage != "load":
        ways.append("a smaller --size")
    what = f"{frames} frames of {settings.width}x{settings.height}"
    where = {"load": "loading the model"}.get(stage, f"the {stage or 'first'} stage of {what}")
    return f"Memory ran out in {where}; try {' or '.join(ways) if ways else 'a smaller model'}."
