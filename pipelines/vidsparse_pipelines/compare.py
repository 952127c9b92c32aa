"""Recipes against dense attention on the same prompts and noise: quality by clip, paired; time by stage; resumable.

Every clip is kept without loss in the folder under a name made from all that determines it, and is not made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

import vidsparse
from vidsparse.errors import ConfigError, OutOfMemory, OutputError
from vidsparse.methods import method_options, processor_class

from .bundled import BUNDLED_MODEL
from .clips.grammar import ClipSpec, caption, sample_split
from .clips.metrics import psnr, ssim
from .environment import device_name, environment
from .generation import _attach, _explain, _frames, _Run, _Stages, resolve_settings
from .load import LoadedPipeline, load_pipeline
from .model_info import inspect_model
from .progress import Observer
from .provenance import model_identity
from .recipe_file import check_recipe, read_recipe
from .runfile import compact_report, write_json
from .settings import GenerateSettings
from .video import output_error

FORMAT, FORMAT_VERSION = "vidsparse-compare", 1
RESULTS, REPORT, CLIPS = "compare.json", "report.html", "clips"
DENSE, FLOOR = "dense", "dense, other kernel"
MATH_TOKENS = 8192
"""Up to this length the floor's kernel is torch's plain one, which stores all pairs; above, the memory-efficient one."""
CHECKER_FRAMES = 49
"""Shorter clips the checker of adherence cannot judge."""
LPIPS_FRAMES = 8
STAGES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        label: as the user wrote it.
        name: of the method.
        options: of the method and its schedule.
        backend: dense attention backend of diffusers, None for its default.
        recipe: of a file, in its plain form, in place of name and options.
    """

    label: str
    name: str
    options: dict[str, Any]
    backend: str | None = None
    recipe: dict[str, Any] | None = None


@dataclass(frozen=True)
class Clip:
    """One prompt with one seed.

    Attributes:
        prompt, seed: of the generation.
        spec: what it should show, where the prompt is of the bundled model's grammar.
    """

    prompt: str
    seed: int
    spec: ClipSpec | None = None


def parse_recipe(text: str) -> Method:
    """`NAME:OPTION=VALUE:...`, such as `radial:density=0.3:warmup_steps=4`, or the path of a recipe's .json file.

    Raises:
        ConfigError: another form, an unknown method or option, or a value out of range.
    """
    if text.strip().endswith(".json"):
        recipe = read_recipe(text.strip())
        return Method(text.strip(), recipe["method"], {}, recipe=recipe)
    name, *pairs = text.strip().split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found:
            raise ConfigError(f"A recipe is NAME:OPTION=VALUE:..., got {pair!r} in {text!r}.")
        try:
            options[key.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            options[key.replace("-", "_")] = value
    processor_class(name)(**options)
    return Method(text.strip(), name, options)


def held_out_prompts(count: int, seed: int = 0) -> list[tuple[str, ClipSpec]]:
    """Prompts that the bundled model has not seen, one and two objects in turn."""
    rng = Random(f"compare {seed}")
    specs = [sample_split(rng, held_out=True, two_objects=i % 2 == 1) for i in range(count)]
    return [(caption(spec), spec) for spec in specs]


def bootstrap(values: Sequence[float], resamples: int = 2000) -> dict[str, Any]:
    """Mean with the 95 % percentile interval over clips."""
    if not values:
        return {"clips": 0}
    rng = np.random.default_rng(0)
    data = np.asarray(values)
    means = data[rng.integers(0, len(data), (resamples, len(data)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return {
        "clips": len(data),
        "mean": round(float(data.mean()), 4),
        "bootstrap95": [round(float(low), 4), round(float(high), 4)],
        "median": round(float(np.median(data)), 4),
        "least": round(float(data.min()), 4),
    }


def open_folder(folder: Path) -> None:
    """Make the folder of a comparison, or check that it is one of this version.

    Raises:
        OutputError: it belongs to something else or cannot be made.
        ConfigError: it was made by another version.
    """
    results = folder / RESULTS
    if results.exists():
        try:
            data = json.loads(results.read_text(encoding="utf-8"))
            made_by = (data["format"], data["format_version"], data["environment"]["vidsparse"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{str(results)!r} is no comparison; choose another --output.") from error
        if made_by != (FORMAT, FORMAT_VERSION, vidsparse.__version__):
            raise ConfigError(
                f"The folder {str(folder)!r} was made by vidsparse {made_by[2]}, this is {vidsparse.__version__}; "
                "choose another --output or delete that folder."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{str(folder)!r} is there and is no comparison; choose another --output.")
    try:
        (folder / CLIPS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error


@dataclass
class Comparison:
    """Makes what is missing and measures.

    Attributes:
        folder: of clips and results.
        settings: everything but prompt, seed, method; complete.
        clips: prompts x seeds.
        methods: dense first, then its floor, where there is one, then the recipes.
        observer: receives progress.
    """

    folder: Path
    settings: GenerateSettings
    clips: list[Clip]
    methods: list[Method]
    observer: Observer

    def __post_init__(self) -> None:
        self.info = inspect_model(self.settings.model)
        self._identity = model_identity(self.info)
        self._loaded: LoadedPipeline | None = None
        self._notes: list[str] = []
        self._lpips: Any = None

    def run(self) -> dict[str, Any]:
        """Make missing clips, method by method, and return the results; written after each method and at the end."""
        self._write(complete=False)
        for method in list(self.methods):
            missing = [clip for clip in self.clips if self._kept(method, clip) is None]
            if missing:
                self._make(method, missing)
            self._write(complete=False)
        return self._write(complete=True)

    def key(self, method: Method, clip: Clip) -> str:
        """Name of a clip's files: readable, and with a hash over all that determines it."""
        settings = self._of(method, clip).to_dict()
        if method.name != DENSE and method.recipe is None:
            settings["method_options"] = {**method_options(method.name), **method.options}
        whole = [settings, self._identity, method.backend, device_name(self._device())]
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:12]
        slug = re.sub(r"[^a-z0-9]+", "-", method.label.lower()).strip("-")[:40]
        return f"{slug}-seed{clip.seed}-{digest}"

    def frames(self, method: Method, clip: Clip) -> np.ndarray:
        """A finished clip, uint8 `[frames, height, width, 3]`."""
        with np.load(self.folder / CLIPS / f"{self.key(method, clip)}.npz") as data:
            return data["frames"]

    def _device(self) -> torch.device:
        from .device import resolve_device

        return resolve_device(self.settings.device)

    def _of(self, method: Method, clip: Clip) -> GenerateSettings:
        return self.settings.with_(
            prompt=clip.prompt, seed=clip.seed, sparse=method.name, method_options=dict(method.options),
            recipe=method.recipe,
        )  # fmt: skip

    def _kept(self, method: Method, clip: Clip) -> dict[str, Any] | None:
        """What is known of a finished clip; None where it has to be made."""
        path = self.folder / CLIPS / f"{self.key(method, clip)}.json"
        if not path.with_suffix(".npz").is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _make(self, method: Method, clips: list[Clip]) -> None:
        if self._loaded is None:
            self.observer.stage("load")
            s = self.settings
            with _explain(_Stages(Observer(), {}), s, self.info):
                self._loaded = load_pipeline(
                    self.info, dtype=s.dtype, device=s.device, offload=s.offload, vae_tiling=s.vae_tiling,
                    compile=s.compile, flow_shift=s.flow_shift,
                )  # fmt: skip
            self._loaded.pipe.set_progress_bar_config(disable=True)
        loaded = self._loaded
        # Dense runs are the model as diffusers gives it, with nothing of ours attached.
        handle = None if method.name == DENSE else _attach(loaded.pipe, self._of(method, clips[0]))
        try:
            with dense_backend(method.backend):
                if loaded.device.type == "cuda":
                    # Kernels compile and memory is taken in the first run.
                    self._generate(self._of(method, clips[0]).with_(num_inference_steps=2), handle, Observer())
                for number, clip in enumerate(clips, 1):
                    self.observer.note(f"{method.label}: clip {number} of {len(clips)}")
                    self._finish(method, clip, *self._generate(self._of(method, clip), handle, self.observer))
        except (RuntimeError, ValueError, ImportError, OutOfMemory) as error:
            if method.label != FLOOR:
                raise
            self.methods.remove(method)
            self._notes.append(
                f"There is no floor: {method.backend} does not run here ({str(error).splitlines()[0]})."
            )
        finally:
            if handle is not None:
                handle.remove()

    def _generate(
        self, settings: GenerateSettings, handle: Any, observer: Observer
    ) -> tuple[np.ndarray, dict[str, float], dict[str, Any] | None]:
        assert self._loaded is not None
        if handle is not None:
            handle.reset()
        run = _Run(settings, self.folder)
        stages = _Stages(observer, run.timings)
        with _explain(stages, settings, self.info):
            frames = np.concatenate(list(_frames(run, self._loaded, handle, stages)))
            stages.leave()
        return frames, run.timings, None if handle is None else compact_report(handle.report())

    def _finish(
        self,
        method: Method,
        clip: Clip,
        frames: np.ndarray,
        timings: dict[str, float],
        report: dict[str, Any] | None,
    ) -> None:
        path = self.folder / CLIPS / f"{self.key(method, clip)}.npz"
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".npz", delete=False) as file:
            try:
                np.savez_compressed(file, frames=frames)
                file.close()
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except OSError as error:
                raise output_error(path, error) from error
            finally:
                Path(file.name).unlink(missing_ok=True)
        # Last: where it is, the clip is whole.
        document = {
            "prompt": clip.prompt,
            "seed": clip.seed,
            "method": method.label,
            "timings_s": {stage: round(timings.get(stage, 0.0), 4) for stage in STAGES},
            "report": report,
        }
        write_json(path.with_suffix(".json"), document)

    def _measured(self, method: Method, clip: Clip, document: dict[str, Any]) -> dict[str, Any]:
        """Metrics of a clip against dense; kept in its file."""
        frames = dense = None
        wanted = self._wanted(method, clip)
        metrics = {k: v for k, v in document.get("metrics", {}).items() if k in wanted}
        if set(metrics) == wanted:
            return metrics
        frames = as_tensor(self.frames(method, clip))
        if method.name != DENSE or method.backend is not None:
            dense = as_tensor(self.frames(self.methods[0], clip))
            metrics["psnr"] = round(float(psnr(frames, dense)), 4)
            metrics["ssim"] = round(float(ssim(frames, dense)), 5)
            if "lpips" in wanted:
                metrics["lpips"] = round(self._lpips(frames, dense), 5)
        if "right" in wanted and clip.spec is not None:
            from .clips.checker import load_checker, score

            self._checker = getattr(self, "_checker", None) or load_checker()
            metrics["right"] = bool(score(self._checker, frames, [clip.spec]).right[0])
        path = self.folder / CLIPS / f"{self.key(method, clip)}.json"
        write_json(path, {**document, "metrics": metrics})
        return metrics

    def _wanted(self, method: Method, clip: Clip) -> set[str]:
        against = {"psnr", "ssim"} | ({"lpips"} if self._has_lpips() else set())
        wanted = set() if method.name == DENSE and method.backend is None else against
        frames = self.settings.num_frames or 1
        return wanted | ({"right"} if clip.spec is not None and frames >= CHECKER_FRAMES else set())

    def _has_lpips(self) -> bool:
        if self._lpips is None:
            self._lpips = load_lpips(self._notes)
        return callable(self._lpips)

    def _write(self, complete: bool) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        kept: dict[str, dict[int, dict[str, Any]]] = {method.label: {} for method in self.methods}
        for number, clip in enumerate(self.clips):
            row: dict[str, Any] = {"prompt": clip.prompt, "seed": clip.seed, "methods": {}}
            for method in self.methods:
                document = self._kept(method, clip)
                if document is None or self._kept(self.methods[0], clip) is None:
                    continue
                entry = {"timings_s": document["timings_s"], **self._measured(method, clip, document)}
                if document["report"]:
                    entry["density"] = document["report"]["mean_density"]
                    entry["dense_calls"] = document["report"]["dense_calls"]
                row["methods"][method.label] = kept[method.label][number] = entry
            rows.append(row)
        dense = kept[self.methods[0].label]
        data = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "complete": complete,
            "environment": environment(),
            "device": device_name(self._device()),
            "model": self._identity,
            "settings": {k: v for k, v in self.settings.to_dict().items() if k not in ("prompt", "seed", "sparse")},
            "notes": list(dict.fromkeys(self._notes)),
            "methods": {m.label: summary(m, kept[m.label], dense) for m in self.methods},
            "clips": rows,
        }
        write_json(self.folder / RESULTS, data)
        return data


def summary(method: Method, entries: dict[int, dict[str, Any]], dense: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Means over the clips of a method, paired with dense clip by clip."""
    found: dict[str, Any] = {"clips": len(entries), "options": method.options, "backend": method.backend}
    for name in ("psnr", "ssim", "lpips"):
        values = [entry[name] for entry in entries.values() if name in entry]
        if values:
            found[name] = bootstrap(values)
    if not entries:
        return found
    found["seconds"] = {s: bootstrap([e["timings_s"][s] for e in entries.values()]) for s in STAGES}
    pairs = [(dense[i]["timings_s"]["denoise"], e["timings_s"]["denoise"]) for i, e in entries.items()]
    found["denoise_speedup"] = bootstrap([a / b for a, b in pairs if b > 0])
    densities = [entry["density"] for entry in entries.values() if entry.get("density") is not None]
    if densities:
        found["density"] = round(sum(densities) / len(densities), 4)
    judged = [(entry["right"], dense[i]["right"]) for i, entry in entries.items() if "right" in entry]
    if judged:
        from .clips.checker import Share

        share = Share(sum(mine for mine, _ in judged), len(judged))
        found["adherence"] = {
            "right": share.right,
            "count": share.count,
            "share": round(share.value, 4),
            "wilson95": [round(v, 4) for v in share.interval],
            "only_this_right": sum(mine and not other for mine, other in judged),
            "only_dense_right": sum(other and not mine for mine, other in judged),
        }
    return found


def as_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 `[frames, height, width, 3]` as `[1, 3, frames, height, width]` in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@contextmanager
def dense_backend(name: str | None) -> Iterator[None]:
    """Another dense attention kernel of diffusers for a while.

    Not by `set_attention_backend` of the model: that also changes the process's default, and its reset leaves it so.
    """
    if name is None:
        yield
        return
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend(name):
        yield


def floor_method(tokens: int) -> Method:
    """Dense attention by another kernel than the default: what rounding alone changes."""
    return Method(FLOOR, DENSE, {}, "_native_math" if tokens <= MATH_TOKENS else "_native_efficient")


def load_lpips(notes: list[str]) -> Any:
    """LPIPS (AlexNet) as (clip, clip) -> mean over a few frames, where the package and its weights are there; else False."""
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError:
        notes.append("There is no LPIPS: pip install lpips.")
        return False
    try:
        network = lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception as error:
        notes.append(f"There is no LPIPS: its weights cannot be loaded ({type(error).__name__}).")
        return False

    @torch.no_grad()
    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        chosen = np.linspace(0, a.shape[2] - 1, min(LPIPS_FRAMES, a.shape[2])).round().astype(int)
        parts = [float(network(a[:, :, t], b[:, :, t])) for t in chosen]
        return sum(parts) / len(parts)

    return distance


def prepare(
    folder: str | Path,
    recipes: Sequence[str],
    *,
    prompts: Sequence[tuple[str, ClipSpec | None]] | None = None,
    num_prompts: int = 4,
    seeds: int = 1,
    first_seed: int = 0,
    floor: bool = True,
    observer: Observer | None = None,
    **settings: Any,
) -> Comparison:
    """Check everything and open the folder; nothing is loaded yet.

    Args:
        folder: new, or of an earlier comparison that is continued.
        recipes: as for `parse_recipe`.
        prompts: with what each shows, or None; None: `num_prompts` held-out ones of the bundled model.
        num_prompts, seeds, first_seed: sizes of the comparison.
        floor: also run dense attention by another kernel.
        observer: receives progress.
        settings: fields of `GenerateSettings`.

    Raises:
        VidsparseError: one sentence.
    """
    for name, value in (("prompts", num_prompts), ("seeds", seeds)):
        if value < 1:
            raise ConfigError(f"--{name} must be a whole number of at least 1, got {value}.")
    methods = [parse_recipe(text) for text in recipes]
    labels = [method.label for method in methods]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"The recipes must differ, got {', '.join(labels)}.")
    methods = [method for method in methods if method.label != DENSE]
    if not methods:
        raise ConfigError(
            "There is nothing to compare with dense; give --recipe, such as --recipe radial:density=0.4."
        )
    model = settings.get("model", BUNDLED_MODEL)
    info = inspect_model(model)
    if info.takes_image:
        raise ConfigError(f"The model {model!r} makes videos from an image, which `compare` cannot give it yet.")
    if prompts is None:
        if model != BUNDLED_MODEL:
            raise ConfigError("Prompts are made up for the bundled model only; give --prompt or --prompt-file.")
        prompts = list(held_out_prompts(num_prompts))
    full, notes = resolve_settings(GenerateSettings(prompt=prompts[0][0], **{**settings, "seed": first_seed}), info)
    for method in methods:
        notes += check_recipe(full.with_(recipe=method.recipe), info)
    clips = [Clip(text, first_seed + seed, spec) for text, spec in prompts for seed in range(seeds)]
    if len({(clip.prompt, clip.seed) for clip in clips}) < len(clips):
        raise ConfigError("A prompt is given twice.")
    dense = Method(DENSE, DENSE, {})
    latents = math.prod(((full.num_frames or 1) // info.temporal + 1, *_latents(full, info.multiple)))
    folder = Path(folder).expanduser()
    open_folder(folder)
    comparison = Comparison(
        folder, full, clips, [dense, *([floor_method(latents)] if floor else []), *methods], observer or Observer()
    )
    comparison._notes += notes
    return comparison


def _latents(settings: GenerateSettings, multiple: tuple[int, int]) -> tuple[int, int]:
    return (settings.height or 0) // multiple[0], (settings.width or 0) // multiple[1]
