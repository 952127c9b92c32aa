"""Loading: what goes wrong is named in one sentence; LoRAs attach whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vidsparse.errors import ConfigError, ModelLoadError, UnsupportedModelError
from vidsparse_pipelines.bundled import bundled_model_path
from vidsparse_pipelines.device import resolve_device, resolve_dtype, resolve_offload
from vidsparse_pipelines.load import load_pipeline
from vidsparse_pipelines.lora import LoraSpec, load_loras
from vidsparse_pipelines.model_info import inspect_model
from vidsparse_pipelines.testing import save_tiny_wan
from vidsparse_pipelines.weights import check_safetensors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("models") / "tiny", vae_patch=2)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def pipe(tiny: Path) -> Iterator[Any]:
    yield load_pipeline(str(tiny), dtype="float32", device="cpu").pipe


def one_sentence(text: str) -> bool:
    return "\n" not in text and text.endswith(".") and len(text) < 400


def test_rules_come_from_the_config_files(tiny: Path) -> None:
    info = inspect_model(str(tiny))
    assert (info.pipeline_class, info.multiple, info.temporal, info.max_position) == ("WanPipeline", (16, 16), 4, 128)
    assert set(info.components) == {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert not info.takes_image


@pytest.mark.parametrize("model", ["no/such/folder", "./missing", "missing"])
def test_missing_folder(model: str) -> None:
    with pytest.raises(ModelLoadError, match="give --model the path of a diffusers folder") as caught:
        inspect_model(model)
    assert one_sentence(str(caught.value))


def test_unknown_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="give --model the path of a local diffusers folder") as caught:
        inspect_model("nobody/nothing-at-all")
    assert one_sentence(str(caught.value))


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no model_index.json") as caught:
        inspect_model(str(tmp_path))
    assert one_sentence(str(caught.value))
    (tmp_path / "model_index.json").write_text("{broken")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        inspect_model(str(tmp_path))


def test_unsupported_family_lists_the_supported(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UnsupportedModelError, match="WanPipeline") as caught:
        inspect_model(str(tmp_path))
    assert one_sentence(str(caught.value))


def test_bundled_model_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelLoadError, match="reinstall vidsparse"):
        bundled_model_path("vidsparse-none")


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "pointer"])
def test_damaged_weights_are_named(copy: Path, component: str, damage: str) -> None:
    file = next((copy / component).glob("*.safetensors"))
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    header = (20).to_bytes(8, "little") + b"{not json at all    " + whole[28:]
    file.write_bytes({"truncated": whole[:-7], "empty": b"", "header": header, "pointer": pointer}[damage])
    with pytest.raises(ModelLoadError) as caught:
        load_pipeline(str(copy), dtype="float32", device="cpu")
    assert str(file) in str(caught.value) and one_sentence(str(caught.value))


def test_missing_shard_is_named(copy: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "part-2.safetensors"}}
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="part-2.safetensors' is missing"):
        load_pipeline(str(copy), dtype="float32", device="cpu")


def test_missing_component_is_one_sentence(copy: Path) -> None:
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(ModelLoadError, match="cannot be loaded") as caught:
        load_pipeline(str(copy), dtype="float32", device="cpu")
    assert one_sentence(str(caught.value))


def test_whole_weights_pass(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, tmp_path / "w.safetensors", metadata={"x": "y"})
    check_safetensors(tmp_path / "w.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    check_safetensors(tmp_path / "empty.safetensors")


def test_dtype_and_scheduler_are_applied(tiny: Path) -> None:
    loaded = load_pipeline(str(tiny), dtype="bf16", device="cpu", flow_shift=7.5, vae_tiling=True)
    assert loaded.pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16 == loaded.dtype
    assert loaded.pipe.vae.dtype == loaded.vae_dtype == torch.bfloat16
    assert loaded.pipe.scheduler.config.flow_shift == loaded.flow_shift == 7.5
    assert loaded.pipe.vae.use_tiling and loaded.offload == "none"
    assert load_pipeline(str(tiny), dtype="float32", device="cpu").flow_shift == 3.0


def test_device_errors() -> None:
    for name in ("gpu", "mps", "cuda:x"):
        with pytest.raises(ConfigError, match="auto, cpu, cuda or cuda:N"):
            resolve_device(name)
    with pytest.raises(ConfigError, match="needs a GPU"):
        resolve_offload("model", CPU, {}, None)
    with pytest.raises(ConfigError, match="float16 is not supported on the CPU"):
        resolve_dtype("fp16", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda() -> None:
    with pytest.raises(ConfigError, match="use --device cpu or auto"):
        resolve_device("cuda")


def test_cpu_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    from vidsparse_pipelines import device

    monkeypatch.setattr(device, "cpu_has_fast_bfloat16", lambda: True)
    assert resolve_dtype("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(device, "cpu_has_fast_bfloat16", lambda: False)
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(("free", "mode"), [(200, "none"), (100, "model"), (85, "model"), (50, "group")])
def test_offload_auto_follows_memory(free: int, mode: str) -> None:
    parts = {"transformer": 58, "text_encoder": 40, "vae": 2}
    assert resolve_offload("auto", torch.device("cuda"), parts, free) == mode
    assert resolve_offload("sequential", torch.device("cuda"), parts, free) == "sequential"


def make_lora(pipe: Any, folder: Path, seed: int = 0) -> Path:
    """A LoRA on self-attention with alpha different from rank, saved the way diffusers saves it."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    targets = r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets), adapter_name="default")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in pipe.transformer.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    layers = get_peft_model_state_dict(pipe.transformer)
    metadata = _collate_lora_metadata({"transformer": pipe.transformer})
    type(pipe).save_lora_weights(folder, transformer_lora_layers=layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def predict(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 3, 2, 2, generator=generator)
    text = torch.randn(1, 4, 32, generator=generator)
    with torch.no_grad():
        return pipe.transformer(latents, torch.tensor([500.0]), text, return_dict=False)[0]


def has_adapter(pipe: Any) -> bool:
    return any("lora_" in name for name, _ in pipe.transformer.named_parameters())


def test_lora_round_trip(tiny: Path, tmp_path: Path) -> None:
    trained = load_pipeline(str(tiny), dtype="float32", device="cpu").pipe
    plain = predict(trained)
    file = make_lora(trained, tmp_path / "lora")
    with_lora = predict(trained)
    assert (with_lora - plain).abs().max() > 1e-2
    for name in (file, file.parent):
        fresh = load_pipeline(str(tiny), dtype="float32", device="cpu", loras=(LoraSpec(str(name)),)).pipe
        assert torch.equal(predict(fresh), with_lora)


@pytest.mark.parametrize("layout", ["transformer", "peft"])
def test_lora_saved_without_the_pipeline(tiny: Path, tmp_path: Path, layout: str) -> None:
    """A transformer's own `save_lora_adapter`, and peft's prefix with its settings in a file beside it."""
    import json

    from safetensors.torch import load_file, save_file

    trained = load_pipeline(str(tiny), dtype="float32", device="cpu").pipe
    make_lora(trained, tmp_path / "pipeline")
    want = predict(trained)
    folder = tmp_path / layout
    trained.transformer.save_lora_adapter(folder, adapter_name="default")
    if layout == "peft":
        (name,) = folder.glob("*.safetensors")
        state = {f"base_model.model.{k}": v for k, v in load_file(name).items()}
        name.unlink()
        save_file(state, folder / "adapter_model.safetensors")
        with pytest.raises(ModelLoadError, match="adapter_config.json is not beside it"):
            load_pipeline(str(tiny), dtype="float32", device="cpu", loras=(LoraSpec(str(folder)),))
        config = trained.transformer.peft_config["default"].to_dict()
        (folder / "adapter_config.json").write_text(json.dumps(config, default=list))
    fresh = load_pipeline(str(tiny), dtype="float32", device="cpu", loras=(LoraSpec(str(folder)),)).pipe
    assert torch.equal(predict(fresh), want)


def test_lora_scales(tiny: Path, tmp_path: Path) -> None:
    def load(*texts: str) -> torch.Tensor:
        specs = tuple(LoraSpec.parse(text) for text in texts)
        return predict(load_pipeline(str(tiny), dtype="float32", device="cpu", loras=specs).pipe)

    plain, trained = load(), load_pipeline(str(tiny), dtype="float32", device="cpu").pipe
    file = make_lora(trained, tmp_path / "lora")
    assert torch.equal(load(f"{file}:0"), plain)
    once, twice = load(f"{file}:0.5", f"{file}:0.5"), load(f"{file}:1")
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-5)
    assert (load(f"{file}:0.5") - twice).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("transformer.blocks.7.attn1.to_q.lora_A.weight", (4, 24), "'blocks.7.attn1.to_q', which the model lacks"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", (4, 99), "has 24 inputs here, the LoRA was made for 99"),
        ("transformer.blocks.0.attn1.to_q.lora_B.weight", (99, 4), "has 24 outputs here, the LoRA was made for 99"),
        ("text_encoder.layer.lora_A.weight", (4, 24), "which the model lacks"),
    ],
)
def test_lora_that_does_not_fit(pipe: Any, tmp_path: Path, key: str, shape: tuple[int, int], words: str) -> None:
    good = make_lora(load_pipeline(pipe.config._name_or_path, dtype="float32", device="cpu").pipe, tmp_path / "good")
    save_file({key: torch.zeros(shape)}, tmp_path / "bad.safetensors")
    before = predict(pipe)
    with pytest.raises(ModelLoadError) as caught:
        load_loras(pipe, (LoraSpec(str(good)), LoraSpec(str(tmp_path / "bad.safetensors"))))
    assert words in str(caught.value) and one_sentence(str(caught.value))
    assert not has_adapter(pipe) and torch.equal(predict(pipe), before)


def test_lora_files_are_checked_before_the_model(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidsparse_pipelines import load

    monkeypatch.setattr(load, "_read_pipeline", lambda *_: pytest.fail("the weights were loaded first"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{}")
    (tmp_path / "w.bin").touch()
    (tmp_path / "none").mkdir()
    for path, words in [
        (tmp_path / "cut.safetensors", "truncated"),
        (tmp_path / "gone.safetensors", "does not exist"),
        (tmp_path / "w.bin", "no .safetensors file"),
        (tmp_path / "none", "holds 0 safetensors files"),
    ]:
        with pytest.raises(ModelLoadError, match=words) as caught:
            load_pipeline(str(tiny), device="cpu", loras=(LoraSpec(str(path)),))
        assert one_sentence(str(caught.value))


def test_file_without_lora_weights(pipe: Any, tmp_path: Path) -> None:
    save_file({"transformer.blocks.0.attn1.to_q.weight": torch.zeros(24, 24)}, tmp_path / "full.safetensors")
    with pytest.raises(ModelLoadError, match="holds no LoRA weights"):
        load_loras(pipe, (LoraSpec(str(tmp_path / "full.safetensors")),))
    assert not has_adapter(pipe)
