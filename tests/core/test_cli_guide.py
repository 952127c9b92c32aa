"""Every command and Python block of docs/guide.md, in one folder from top to bottom.

What is not here has a stand-in, as the page says: models of the Hub are tiny random ones of the same class, GPUs are
processes on a CPU, and videos have few frames, pixels and steps. Everything else of a line is run as it stands.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vidsparse.cli import OK, launch, main
from vidsparse_pipelines.testing import save_tiny_wan, tiny_tokenizer, tiny_wan_pipeline

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
SOURCES = [str(GUIDE.parents[1] / part) for part in (".", "kernels/torch-ext", "pipelines", "lora")]
TEXT_TO_VIDEO, IMAGE_TO_VIDEO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [line for line in lines if not line.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page is worked through, with the files that its reader has."""
    from PIL import Image

    path = tmp_path_factory.mktemp("guide")
    save_tiny_wan(path / TEXT_TO_VIDEO)
    save_tiny_wan(path / IMAGE_TO_VIDEO, from_image=True)
    Image.new("RGB", (80, 60), "green").save(path / "photo.png")
    make_lora(path)
    return path


def make_lora(folder: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = tiny_wan_pipeline()
    targets = r"blocks\.\d+\.attn1\.(to_q|to_k)"
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets), adapter_name="default")
    type(pipe).save_lora_weights(folder / "lora", transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    (folder / "lora" / "pytorch_lora_weights.safetensors").rename(folder / "style.safetensors")


def shrunk(words: list[str]) -> list[str]:
    """The words of a `generate` with what is too large for a test made small; of other commands as they are."""
    if words[0] != "generate" or "--config" in words:
        return words
    tiny = "--model" in words
    small = {"--frames": "17" if tiny else "9", "--steps": "2", "--device": "cpu"} | (
        {"--size": "64x64"} if tiny else {}
    )
    if "--offload" in words:
        small["--offload"] = "none"  # it needs a GPU
    for name, value in small.items():
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    # A model that is not where the Hub's name says is a folder of that name here.
    return [f"./{word}" if word.startswith("Wan-AI/") else word for word in words]


def test_there_is_something_to_run() -> None:
    assert all(line.startswith("vidsparse ") for line in commands())
    assert {shlex.split(line)[1] for line in commands()} >= {
        "generate",
        "doctor",
        "plan",
        "show",
        "compare",
        "bench",
        "tune",
    }
    assert len(blocks("python")) == 2


def test_help_of_every_command_is_light() -> None:
    """No command pays for torch before it runs."""
    names = [["--help"], *([name, "--help"] for name in ("doctor", "plan", "show", "compare", "tune", "bench"))]
    code = (
        f"import sys, vidsparse.cli as c\nassert [c.main(n) for n in {names}] == [0] * {len(names)}\n"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("[]") and run.stderr == ""


@pytest.mark.parametrize("command", commands())
def test_command(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if " show " in command:
        pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(SOURCES))
    threads, words = torch.get_num_threads(), shrunk(shlex.split(command)[1:])
    if "--num-gpus" in words:
        words[words.index("--num-gpus")] = "--ulysses-degree"
        assert launch.launch(words, 2) == OK
        assert (folder / words[words.index("--output") + 1]).is_file()
        return
    code = main(words)
    torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert code == OK, err
    assert out
    if "--output" in words:
        assert (folder / words[words.index("--output") + 1]).exists()


def tiny_flux() -> Any:
    """A random FluxPipeline."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from vidsparse.testing import CASES

    classes: Any = diffusers
    torch.manual_seed(0)
    transformer = CASES["Flux"].build()
    width, pooled = transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim
    vae = classes.AutoencoderKL(
        sample_size=32, block_out_channels=(4,), latent_channels=transformer.config.in_channels // 4, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip
    clip = CLIPTextConfig(
        hidden_size=pooled, intermediate_size=16, num_attention_heads=1, num_hidden_layers=1, vocab_size=600,
        projection_dim=pooled, eos_token_id=1, max_position_embeddings=77,
    )  # fmt: skip
    t5 = T5Config(d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=600)
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer()
    tokenizer.model_max_length = 77
    return classes.FluxPipeline(
        scheduler=classes.FlowMatchEulerDiscreteScheduler(), text_encoder=CLIPTextModel(clip), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5), tokenizer_2=tokenizer_2, vae=vae, transformer=transformer,
    )  # fmt: skip


class Small:
    """A pipeline that is always asked for little."""

    def __init__(self, pipe: Any, **call: Any) -> None:
        self.pipe, self.call = pipe, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def to(self, device: str) -> Small:
        assert device == "cuda"
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipe(*args, **{**kwargs, **self.call})


@pytest.mark.parametrize("code", blocks("python"), ids=["video", "image"])
def test_python(code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import diffusers

    name = "FluxPipeline" if "Flux" in code else "WanPipeline"
    shape: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
    pipe = tiny_flux() if name == "FluxPipeline" else tiny_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    shape |= {"max_sequence_length": 9} if name == "FluxPipeline" else {"num_frames": 9}
    monkeypatch.setattr(getattr(diffusers, name), "from_pretrained", lambda path: Small(pipe, **shape))
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["handle"].report().num_calls > 0 and "calls" in capsys.readouterr().out
    assert found.get("frames", found.get("image")) is not None
