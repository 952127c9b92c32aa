"""What a generation costs, from a model's configuration alone: tokens, FLOPs, memory. No weight is loaded.

The transformer is built without storage (torch's "meta" device) from its configuration, so that its parameters and
layers are counted, not looked up. Times are estimates: products and attention at the rates of `rates`, everything else
as passes over memory.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError, ModelLoadError, UnsupportedModelError
from vidsparse.layout import LatentGrid

from .bundled import BUNDLED_MODEL
from .model_info import ModelInfo, _read_json, inspect_model, locate
from .presets import Preset, preset_for

ELEMENTWISE_PASSES = 150
"""Reads and writes of the hidden states in a block beside products and attention: norms, rotary, modulation, residuals.

Fitted to blocks of Wan and Flux on an H200 (benchmarks/results/2026-11-25-h200-models.json): eager, much of it in fp32.
"""

MASKED_DENSE = 1.64
"""Time of torch's dense attention with a mask over keys over that without, from HunyuanVideo in the same file."""


@dataclass(frozen=True)
class ClassFacts:
    """What the configuration of a transformer class does not say.

    Attributes:
        pipeline_class: its plain pipeline.
        temporal, spatial: pixel frames and pixels per latent (Wan says so in its VAE's configuration).
        packs: latents that the pipeline packs into one side of a token, beside the patch size.
        text: (before, after) text tokens in the sequence of the video.
        cross: text tokens of cross-attention.
        joint: weights of blocks that text and video share, by the start of their path; "" for all.
        masked: the dense call has a mask over keys, for which torch has no fast kernel.
        batched_guidance: both guidance branches in one forward; None: guidance costs no second pass.
        encoder_parameters: of the text encoders.
    """

    pipeline_class: str
    temporal: int
    spatial: int
    packs: int = 1
    text: tuple[int, int] = (0, 0)
    cross: int = 0
    joint: str | None = None
    masked: bool = False
    batched_guidance: bool | None = True
    encoder_parameters: float = 4.76e9


CLASSES: dict[str, ClassFacts] = {
    "WanTransformer3DModel": ClassFacts(
        "WanPipeline", 4, 8, cross=512, batched_guidance=False, encoder_parameters=5.68e9
    ),
    "HunyuanVideoTransformer3DModel": ClassFacts(
        "HunyuanVideoPipeline", 4, 8, text=(0, 256), joint="single_transformer_blocks.", batched_guidance=None, masked=True,
        encoder_parameters=8.15e9,
    ),
    "CogVideoXTransformer3DModel": ClassFacts("CogVideoXPipeline", 4, 8, text=(226, 0), joint=""),
    "MochiTransformer3DModel": ClassFacts("MochiPipeline", 6, 8, text=(0, 256)),
    "LTXVideoTransformer3DModel": ClassFacts("LTXPipeline", 8, 32, cross=128),
    "FluxTransformer2DModel": ClassFacts(
        "FluxPipeline", 1, 8, packs=2, text=(512, 0), joint="single_transformer_blocks.", batched_guidance=None,
        encoder_parameters=4.88e9,
    ),
}  # fmt: skip

PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wan-1.3b": (
        "Wan2.1-T2V-1.3B-Diffusers",
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    "wan-14b": ("Wan2.1-T2V-14B-Diffusers", "WanTransformer3DModel", {}),
    "wan2.2-5b": (
        "Wan2.2-TI2V-5B-Diffusers",
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
    ),
    "wan2.2-a14b": ("Wan2.2-T2V-A14B-Diffusers", "WanTransformer3DModel", {}),
    "hunyuan": ("HunyuanVideo", "HunyuanVideoTransformer3DModel", {}),
    "cogvideox-2b": ("CogVideoX-2b", "CogVideoXTransformer3DModel", {}),
    "cogvideox-5b": (
        "CogVideoX-5b",
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    ),
    "mochi": ("mochi-1-preview", "MochiTransformer3DModel", {}),
    "ltx": ("LTX-Video", "LTXVideoTransformer3DModel", {}),
    "flux": ("FLUX.1-dev", "FluxTransformer2DModel", {"guidance_embeds": True}),
}
"""Short name -> (name on the Hub, transformer class, what differs from the class's defaults in diffusers)."""

FLUX_PRESET = Preset("flux", 1024, 1024, 1, 1.0, 28, 3.5, None, sizes={"1024": (1024, 1024), "4096": (4096, 4096)})
WAN22_VAE_SPATIAL = 16
SECOND_EXPERT = ("wan2.2-a14b",)


@dataclass(frozen=True)
class ModelShape:
    """A model as far as its costs go.

    Attributes:
        info: frame and size rules, and the preset.
        facts: of the transformer's class.
        spatial: pixels per latent.
        patch: (time, height, width) in latents.
        num_layers: attention layers that may be sparse.
        num_heads, head_dim: of those.
        width: hidden size.
        widest: outputs of the widest linear layer.
        parameters: of the transformers (of both experts, where there are two).
        encoder_bytes: of the text encoders, None where not known.
        video_weights, text_weights, joint_weights: weights that every token of that kind is multiplied with.
    """

    info: ModelInfo
    facts: ClassFacts
    spatial: int
    patch: tuple[int, int, int]
    num_layers: int
    num_heads: int
    head_dim: int
    width: int
    widest: int
    parameters: int
    encoder_bytes: int | None
    video_weights: int
    text_weights: int
    joint_weights: int

    def grid(self, num_frames: int, height: int, width: int) -> LatentGrid:
        """Tokens of a legal shape (pixels)."""
        latent = (num_frames - 1) // self.info.temporal + 1
        rows, columns = (self.spatial * size for size in self.patch[1:])
        return LatentGrid(-(-latent // self.patch[0]), height // rows, width // columns)

    @property
    def text_tokens(self) -> int:
        """In the sequence of the video."""
        return sum(self.facts.text)

    @property
    def cross_tokens(self) -> int:
        """Text tokens of cross-attention."""
        return self.info.preset.max_sequence_length or self.facts.cross if self.facts.cross else 0

    def passes(self, guidance_scale: float) -> int:
        """Samples of the transformer per step."""
        return 1 if self.facts.batched_guidance is None or guidance_scale <= 1 else 2

    def linear_flops(self, grid: LatentGrid) -> float:
        """Of one sample: products with weights, and cross-attention."""
        video, text = grid.num_tokens, self.text_tokens + self.cross_tokens
        weights = self.video_weights * video + self.text_weights * text
        weights += self.joint_weights * (video + self.text_tokens)
        return 2.0 * weights + 4.0 * video * self.cross_tokens * self.width * self.num_layers

    def attention_flops(self, grid: LatentGrid) -> float:
        """Of one sample: all layers, dense, in the sequence of the video."""
        length = grid.num_tokens + self.text_tokens
        return 4.0 * length**2 * self.num_heads * self.head_dim * self.num_layers

    def elementwise_bytes(self, grid: LatentGrid, itemsize: int) -> float:
        """Memory traffic of one sample beside products and attention, roughly."""
        return (
            float(ELEMENTWISE_PASSES * (grid.num_tokens + self.text_tokens) * self.width * itemsize) * self.num_layers
        )

    def memory(self, grid: LatentGrid, itemsize: int, guidance_scale: float) -> dict[str, int | None]:
        """Bytes, roughly: weights of transformer and text encoder, and the largest activations of a block."""
        batch = self.passes(guidance_scale) if self.facts.batched_guidance else 1
        length = grid.num_tokens + self.text_tokens
        activations = batch * length * (3 * self.width + max(5 * self.width, 2 * self.widest)) * itemsize
        return {
            "transformer": self.parameters * itemsize,
            "text_encoder": self.encoder_bytes,
            "activations": activations,
        }


def known_models() -> tuple[str, ...]:
    """Names that need no folder and no download."""
    return (BUNDLED_MODEL, *PUBLISHED)


def read_shape(model: str) -> ModelShape:
    """The shape of a published model (short name or name on the Hub), the bundled one, a folder or a hub id.

    Raises:
        ModelLoadError: not found or not reachable.
        UnsupportedModelError: a transformer that is not known here.
        ConfigError: the configuration does not fit the class.
    """
    last = model.rstrip("/").rsplit("/", 1)[-1].lower()
    for short, (hub, cls, changes) in PUBLISHED.items():
        if model.lower() == short or (last == hub.lower() and not Path(model).exists()):
            return _published(short, hub, cls, changes)
    if "/" not in model and not Path(model).exists() and model != BUNDLED_MODEL:
        raise ModelLoadError(
            f"The model {model!r} is unknown; give one of {', '.join(known_models())}, a local diffusers folder or a "
            "hub id OWNER/NAME."
        )
    folder = locate(model)
    config = _read_json(folder / "transformer" / "config.json")
    cls = str(config.get("_class_name", ""))
    facts = _facts(cls)
    info = _flux_info(model, folder) if cls == "FluxTransformer2DModel" else inspect_model(model)
    counted = _count(cls, facts, config)
    if (folder / "transformer_2").is_dir():
        counted["parameters"] *= 2
    vae = folder / "vae" / "config.json"
    spatial = int(_read_json(vae).get("scale_factor_spatial", facts.spatial)) if vae.is_file() else facts.spatial
    files = [file for part in folder.glob("text_encoder*") for file in part.glob("*.safetensors")]
    encoder = sum(file.stat().st_size for file in files) if files else None
    return ModelShape(info, facts, spatial, encoder_bytes=encoder, **counted)


def _facts(cls: str) -> ClassFacts:
    if cls not in CLASSES:
        raise UnsupportedModelError(f"Costs are known for {', '.join(CLASSES)}, not for {cls or 'this model'!r}.")
    return CLASSES[cls]


def _flux_info(name: str, folder: Path) -> ModelInfo:
    return ModelInfo(name, folder, "FluxPipeline", FLUX_PRESET, (), (16, 16), 1, None, False)


def _published(short: str, hub: str, cls: str, changes: dict[str, Any]) -> ModelShape:
    facts = _facts(cls)
    counted = _count(cls, facts, changes)
    if short in SECOND_EXPERT:
        counted["parameters"] *= 2
    spatial = WAN22_VAE_SPATIAL if "5B" in hub else facts.spatial
    if cls == "FluxTransformer2DModel":
        info = _flux_info(hub, Path())
    else:
        preset = preset_for(hub, facts.pipeline_class)
        assert preset is not None, hub
        pixels = spatial * counted["patch"][1]
        info = ModelInfo(hub, Path(), facts.pipeline_class, preset, (), (pixels, pixels), facts.temporal, None, False)
    return ModelShape(info, facts, spatial, encoder_bytes=round(2 * facts.encoder_parameters), **counted)


def _count(cls: str, facts: ClassFacts, config: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ModelShape` counted on the transformer built without storage."""
    import torch

    from vidsparse.processors.families import family_of

    kind = getattr(importlib.import_module("diffusers"), cls)
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            model = kind(**config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The configuration does not fit {cls} ({str(error).splitlines()[0]}).") from error
    targets = [module for path, module in model.named_modules() if family_of(model).is_target(path, module)]
    video = text = joint = widest = 0
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or "blocks." not in path or "norm" in path or "refiner" in path:
            continue
        size = module.weight.numel()
        if facts.joint is not None and path.startswith(facts.joint):
            joint += size
        elif "add_" in path or "_context" in path or path.endswith(("attn2.to_k", "attn2.to_v")):
            text += size
        else:
            video += size
        widest = max(widest, module.out_features)
    heads = targets[0].heads
    width = targets[0].to_q.out_features
    patch = model.config.patch_size
    if isinstance(patch, int):
        patch = (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    return {
        "patch": tuple(size * (facts.packs if axis else 1) for axis, size in enumerate(patch)),
        "num_layers": len(targets),
        "num_heads": heads,
        "head_dim": width // heads,
        "width": width,
        "widest": widest,
        "parameters": sum(p.numel() for p in model.parameters()),
        "video_weights": video,
        "text_weights": text,
        "joint_weights": joint,
    }
