"""Generating with a tiny random pipeline: the whole path, and that a run can be repeated from its JSON."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vidsparse.errors import ConfigError, OutOfMemory, OutputError
from vidsparse_pipelines import generation, runfile
from vidsparse_pipelines.generation import generate, generate_many
from vidsparse_pipelines.load import LoadedPipeline, load_pipeline
from vidsparse_pipelines.progress import Estimate, Observer
from vidsparse_pipelines.settings import GenerateSettings
from vidsparse_pipelines.testing import save_tiny_wan
from vidsparse_pipelines.video import read_video


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("models") / "tiny", vae_patch=2)


@pytest.fixture(scope="module")
def shared(tiny: Path) -> LoadedPipeline:
    return load_pipeline(str(tiny), dtype="float32", device="cpu")


@pytest.fixture
def small(tiny: Path) -> GenerateSettings:
    """5 frames of 16x32, 2 steps, radial sparse in the second."""
    return GenerateSettings(
        prompt="a red circle moves",
        model=str(tiny),
        num_frames=5,
        height=16,
        width=32,
        num_inference_steps=2,
        guidance_scale=2.0,
        seed=5,
        dtype="float32",
        device="cpu",
        method_options={"warmup_steps": 1, "dense_layers": 1},
    )


class Recorder(Observer):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.steps: list[tuple[int, str]] = []
        self.decoded: list[int] = []
        self.estimates: list[Estimate | None] = []
        self.notes: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append((name, total))

    def advance(self, done: int, remaining: Estimate | None = None, note: str = "") -> None:
        if self.stages[-1][0] == "denoise":
            self.steps.append((done, note))
            self.estimates.append(remaining)
        else:
            self.decoded.append(done)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_whole_path(small: GenerateSettings, shared: LoadedPipeline, tmp_path: Path) -> None:
    recorder = Recorder()
    settings = small.with_(num_frames=6, num_inference_steps=4, prompt="a red zebra moves")
    result = generate(settings, tmp_path / "clip.mp4", observer=recorder, loaded=shared)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.json", "clip.mp4"]
    assert read_video(result.path).shape == (9, 16, 32, 3)
    assert recorder.stages == [("load", None), ("encode", None), ("denoise", 4), ("decode", 9), ("write", None)]
    assert recorder.steps == [(1, "dense"), (2, "sparse"), (3, "sparse"), (4, "sparse")]
    first = recorder.estimates[0]
    assert first is not None and first.at_most and first.seconds > 0
    assert recorder.decoded == [1, 5, 9]
    assert recorder.notes == list(result.notes)
    assert any("6 frames became 9" in note for note in result.notes) and any("zebra" in note for note in result.notes)
    assert set(result.timings) == {"load", "encode", "denoise", "decode", "write"}


def test_document_has_everything(small: GenerateSettings, shared: LoadedPipeline, tmp_path: Path) -> None:
    result = generate(small, tmp_path / "clip.gif", loaded=shared)
    document = json.loads(result.json_path.read_text())
    assert document == result.document
    assert document["settings"]["seed"] == 5 and document["settings"]["flow_shift"] == 3.0
    assert document["settings"]["method_options"]["decay_factor"] == 0.2
    assert None not in [document["settings"][k] for k in ("height", "width", "num_frames", "fps", "negative_prompt")]
    assert set(document["versions"]) == {"vidsparse", "torch", "diffusers", "transformers", "python"}
    assert document["resolved"]["device"] == "cpu" and document["resolved"]["pipeline_class"] == "WanPipeline"
    assert document["model"].keys() == {"name", "sha256", "covers"} and document["inputs_sha256"] == {}
    report = document["report"]
    assert "rows" not in report and report["tokens"] == [4]
    assert report["dense"] == [
        {"reason": "dense layer", "layers": [0], "steps": [1], "calls": 2},
        {"reason": "warm-up step", "layers": [0, 1], "steps": [0], "calls": 4},
    ]
    assert report["matrix"]["layers"] == [0, 1] and report["matrix"]["steps"] == [0, 1]
    assert report["num_sparse_calls"] == 2 and report["num_calls"] == 8
    assert report["dense_calls"] == {"warm-up step": 4, "dense layer": 2}


def test_json_is_short_and_readable(small: GenerateSettings, shared: LoadedPipeline, tmp_path: Path) -> None:
    """Its size must not grow with every layer times step times branch."""
    prompt = 'a "red" cat [\n1,\n2\n] é'
    sizes = []
    for steps in (2, 8):
        result = generate(small.with_(num_inference_steps=steps, prompt=prompt), tmp_path / "a.gif", loaded=shared)
        text = result.json_path.read_text(encoding="utf-8")
        assert json.loads(text) == result.document and result.document["settings"]["prompt"] == prompt
        sizes.append(len(text))
    assert '"layers": [0, 1]' in text
    assert sizes[1] - sizes[0] < 20 * 6 * 2, "a few characters for each further cell of the matrix"


def test_model_hash_follows_the_weights(tiny: Path, tmp_path: Path) -> None:
    import shutil

    from vidsparse_pipelines import provenance
    from vidsparse_pipelines.model_info import inspect_model

    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    first = provenance.model_identity(inspect_model(str(tiny)))
    assert first["covers"] == "configuration and weights"
    assert provenance.model_identity(inspect_model(str(copy)))["sha256"] == first["sha256"]
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert provenance.model_identity(inspect_model(str(copy)))["sha256"] != first["sha256"]


def test_large_weights_are_not_hashed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidsparse_pipelines import provenance
    from vidsparse_pipelines.model_info import inspect_model

    info = inspect_model(str(tiny))
    whole = provenance.model_identity(info)
    monkeypatch.setattr(provenance, "MAX_HASHED_WEIGHTS", 10)
    assert provenance.model_identity(info)["covers"] == "configuration"
    assert provenance.model_identity(info)["sha256"] != whole["sha256"]
    hub = provenance.model_identity(
        dataclasses.replace(info, name="owner/name", folder=Path("/cache/snapshots/c0ffee"))
    )
    assert hub == {"name": "owner/name", "commit": "c0ffee"}


def test_local_paths_in_the_json_are_absolute(
    small: GenerateSettings, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    result = generate(small.with_(model=f"./{tiny.name}"), tmp_path / "clip.gif")
    assert result.document["settings"]["model"] == str(tiny)
    monkeypatch.chdir(tmp_path)
    again = generate(GenerateSettings.from_dict(result.document["settings"]), tmp_path / "again.gif")
    assert np.array_equal(read_video(result.path), read_video(again.path))


def test_json_beside_a_name_with_dots(small: GenerateSettings, shared: LoadedPipeline, tmp_path: Path) -> None:
    result = generate(small, tmp_path / "a.b.png", loaded=shared)
    assert result.path == tmp_path / "a.b" and result.json_path == tmp_path / "a.b.json"


def test_two_runs_at_once_keep_both_videos(small: GenerateSettings, shared: LoadedPipeline, tmp_path: Path) -> None:
    """The other run takes the automatic name while this one decodes."""
    taken = tmp_path / "a-red-circle-moves-seed5.mp4"

    class Other(Observer):
        def stage(self, name: str, total: int | None = None) -> None:
            if name == "decode":
                taken.write_bytes(b"theirs")

    result = generate(small, tmp_path, loaded=shared, observer=Other())
    assert taken.read_bytes() == b"theirs"
    assert result.path == tmp_path / "a-red-circle-moves-seed5-2.mp4"
    assert result.json_path == result.path.with_suffix(".json")
    assert result.document["output"] == result.path.name
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failing_compiler_is_bad_input(small: GenerateSettings, shared: LoadedPipeline, tmp_path: Path) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def fail(*_: object) -> None:
        raise InvalidCxxCompiler()

    hook = shared.pipe.transformer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ConfigError, match="leave --compile out"):
            generate(small.with_(compile=True), tmp_path / "clip.mp4", loaded=shared)
    finally:
        hook.remove()
    assert list(tmp_path.iterdir()) == []


def test_repeat_from_json_is_bit_identical(small: GenerateSettings, tmp_path: Path) -> None:
    settings = small.with_(seed=None, dtype="auto", flow_shift=None, num_frames=4, guidance_scale=None)
    first = generate(settings, tmp_path / "first.png")
    again = GenerateSettings.from_dict(json.loads(first.json_path.read_text())["settings"])
    assert again == first.settings.with_(dtype=again.dtype, flow_shift=again.flow_shift)
    assert again.seed is not None
    second = generate(again, tmp_path / "second.png")
    assert np.array_equal(read_video(first.path), read_video(second.path))
    other = generate(again.with_(seed=again.seed + 1), tmp_path / "third.png")
    assert not np.array_equal(read_video(first.path), read_video(other.path))


def test_frames_equal_the_plain_diffusers_pipeline(
    small: GenerateSettings, shared: LoadedPipeline, tmp_path: Path
) -> None:
    """Dense generation must be exactly what diffusers makes without us."""
    result = generate(small.with_(sparse="dense", method_options={}), tmp_path / "clip.png", loaded=shared)
    plain = shared.pipe(
        prompt=small.prompt,
        negative_prompt="",
        num_frames=5,
        height=16,
        width=32,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(5),
    ).frames[0]
    frames = read_video(result.path)
    assert frames.std() > 1
    assert np.array_equal(frames, (plain * 255).round().astype(np.uint8))


def test_sparse_differs_from_dense_and_is_removed(
    small: GenerateSettings, shared: LoadedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents: list[torch.Tensor] = []

    def keep_latents(_pipe: Any, result: torch.Tensor, _device: torch.device) -> Iterator[np.ndarray]:
        latents.append(result)
        yield np.zeros((1, 16, 16, 3), np.uint8)

    monkeypatch.setattr(generation, "stream_frames", keep_latents)  # decoding is most of the time and not the point
    options = {"warmup_steps": 0, "dense_layers": 0, "decay_factor": 0.05, "variant": "paper", "block_size": 16}
    settings = small.with_(height=64, width=128, num_frames=17, method_options=options)
    dense = settings.with_(sparse="dense", method_options={})
    reports = [generate(s, tmp_path / "a.gif", loaded=shared).report for s in (dense, settings, dense)]
    assert [report.sparse_density is None for report in reports] == [True, False, True]
    assert reports[1].sparse_density < 0.9
    assert (latents[0] - latents[1]).abs().max() > 1e-3
    assert torch.equal(latents[0], latents[2])


def test_batch_loads_once_and_keeps_reports_apart(
    small: GenerateSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    real = generation.load_pipeline
    monkeypatch.setattr(generation, "load_pipeline", lambda *a, **k: loads.append(1) or real(*a, **k))
    batch = [small.with_(seed=5 + i, prompt=prompt) for i, prompt in enumerate(["a red circle", "a cat"])]
    first, second = generate_many(batch, tmp_path / "out")
    assert loads == [1]
    assert [first.path.name, second.path.name] == ["000-a-red-circle-seed5.mp4", "001-a-cat-seed6.mp4"]
    assert first.report is not second.report and first.report.num_calls == second.report.num_calls == 8
    alone = generate(batch[1], tmp_path / "alone.mp4")
    assert np.array_equal(read_video(alone.path), read_video(second.path))
    assert second.timings["load"] == 0


def test_single_frame_is_an_image(small: GenerateSettings, shared: LoadedPipeline, tmp_path: Path) -> None:
    result = generate(small.with_(num_frames=1), tmp_path, loaded=shared)
    assert result.path == tmp_path / "a-red-circle-moves-seed5.png"
    assert read_video(result.path).shape == (1, 16, 32, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": 17}, "use a height of 16 or 32"),
        ({"num_frames": 600}, "use at most 509"),
        ({"method_options": {"density": 1.5}}, "density"),
        ({"method_options": {"density": 0.0}}, "density"),
        ({"method_options": {"decay": 1}}, "decay"),
        ({"sparse": "nothing"}, "nothing"),
        ({"image": __file__}, "takes no image"),
    ],
)
def test_bad_input_is_found_before_loading(
    small: GenerateSettings, tmp_path: Path, change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "load_pipeline", lambda *_, **__: pytest.fail("the weights were loaded first"))
    with pytest.raises(ConfigError, match=words):
        generate(small.with_(**change), tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["transformer", "vae"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failure_leaves_nothing(
    small: GenerateSettings, shared: LoadedPipeline, tmp_path: Path, moment: str, error: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise error("boom")

    module = shared.pipe.transformer if moment == "transformer" else shared.pipe.vae.decoder
    hook = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(error):
            generate(small, tmp_path / "new" / "clip.mp4", loaded=shared)
    finally:
        hook.remove()
    assert list(tmp_path.iterdir()) == []
    assert type(shared.pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_failing_json_leaves_nothing(
    small: GenerateSettings, shared: LoadedPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runfile.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(OutputError, match="disk is full"):
        generate(small, tmp_path / "clip.mp4", loaded=shared)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def out_of_memory(shared: LoadedPipeline) -> Iterator[dict[str, Any]]:
    """Lets a module fail as torch does when memory runs out."""
    hooks: dict[str, Any] = {}

    def fail(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: not enough memory: you tried")

    hooks["denoise"] = lambda: shared.pipe.transformer.blocks[0].register_forward_pre_hook(fail)
    hooks["decode"] = lambda: shared.pipe.vae.decoder.register_forward_pre_hook(fail)
    yield hooks


@pytest.mark.parametrize(("stage", "words"), [("denoise", "--frames 17"), ("decode", "--vae-tiling or --frames 17")])
def test_out_of_memory_says_what_would_fit(
    small: GenerateSettings,
    shared: LoadedPipeline,
    tmp_path: Path,
    out_of_memory: dict[str, Any],
    stage: str,
    words: str,
) -> None:
    hook = out_of_memory[stage]()
    try:
        with pytest.raises(OutOfMemory) as caught:
            generate(small.with_(num_frames=33), tmp_path / "clip.mp4", loaded=shared)
    finally:
        hook.remove()
    assert words in str(caught.value) and stage in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_long_prompt_gets_more_text_tokens(small: GenerateSettings, shared: LoadedPipeline) -> None:
    assert generation._text_length(shared.pipe, small, 64) == 64
    assert generation._text_length(shared.pipe, small.with_(prompt="red " * 70), 64) == 128
    assert generation._text_length(shared.pipe, small.with_(prompt="red " * 900), 64) == 512
