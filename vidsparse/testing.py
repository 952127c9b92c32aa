"""One tiny random model of each family's real class, its inputs, and where its tokens stand, said by hand.

`tests/core/test_model_families.py` runs every case through the same checks; a new family needs a new case here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A family's model and one call of it.

    Attributes:
        build: makes the model.
        inputs: (batch size, generator) -> arguments of its forward.
        grid: frames, height, width in tokens.
        text: text tokens (before, after) the video, one pair per distinct length among the calls of one forward.
        targets: number of attention modules that become sparse.
        dense: names of attention modules, by the end of their path, that must keep the family's own processor.
        batches: batch sizes that the model takes.
        regional: the model has `compile_repeated_blocks`.
        checkpointing: the model supports gradient checkpointing.
    """

    build: Callable[[], Any]
    inputs: Callable[[int, torch.Generator], Inputs]
    grid: tuple[int, int, int]
    text: tuple[tuple[int, int], ...] = ((0, 0),)
    targets: int = 2
    dense: tuple[str, ...] = field(default_factory=tuple)
    batches: tuple[int, ...] = (1, 2)
    regional: bool = True
    checkpointing: bool = True


def model_class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def prefix_mask(batch: int, length: int, *valid: int) -> torch.Tensor:
    """A mask over text whose sample i has its first valid[i] tokens."""
    counts = torch.tensor([valid[i % len(valid)] for i in range(batch)])
    return (torch.arange(length)[None] < counts[:, None]).long()


def _wan(cls: str = "WanTransformer3DModel", **config: Any) -> Any:
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return model_class(cls)(**{**settings, **config})


def _wan_inputs(batch: int, g: torch.Generator, channels: int = 4) -> Inputs:
    return {
        "hidden_states": randn(g, batch, channels, 5, 12, 14),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(g, batch, 6, 16),
    }


def _hunyuan() -> Any:
    return model_class("HunyuanVideoTransformer3DModel")(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )


def _hunyuan_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 5, 6, 7),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(g, batch, 11, 16),
        "encoder_attention_mask": prefix_mask(batch, 11, 7, 11),
        "pooled_projections": randn(g, batch, 8),
        "guidance": torch.full((batch,), 6000.0),
    }


def _hunyuan_15() -> Any:
    return model_class("HunyuanVideo15Transformer3DModel")(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type="t2v",
    )


def _hunyuan_15_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 5, 6, 7),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(g, batch, 6, 16),
        "encoder_attention_mask": prefix_mask(batch, 6, 4, 6),
        "encoder_hidden_states_2": randn(g, batch, 4, 12),
        "encoder_attention_mask_2": prefix_mask(batch, 4, 2, 4),
        "image_embeds": torch.zeros(batch, 3, 12),
    }


def _cogvideox(**config: Any) -> Any:
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 2,
        "sample_width": 14,
        "sample_height": 12,
        "sample_frames": 17,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 7,
    }
    return model_class("CogVideoXTransformer3DModel")(**{**settings, **config})


def _cogvideox_inputs(batch: int, g: torch.Generator, frames: int = 5, rotary: int = 0) -> Inputs:
    extra = {"image_rotary_emb": (randn(g, rotary, 16), randn(g, rotary, 16))} if rotary else {}
    return {
        "hidden_states": randn(g, batch, frames, 4, 12, 14),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(g, batch, 7, 16),
        **extra,
    }


def _mochi() -> Any:
    model = model_class("MochiTransformer3DModel")(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=11,
    )
    torch.nn.init.normal_(model.pos_frequencies)
    return model


def _mochi_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 5, 12, 14),
        "encoder_hidden_states": randn(g, batch, 11, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": prefix_mask(batch, 11, 9, 5).bool(),
    }


def _ltx() -> Any:
    return model_class("LTXVideoTransformer3DModel")(
        in_channels=4,
        out_channels=4,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )


def _ltx_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 5 * 6 * 7, 4),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": prefix_mask(batch, 9, 6, 9),
        "num_frames": 5,
        "height": 6,
        "width": 7,
    }


def _flux() -> Any:
    return model_class("FluxTransformer2DModel")(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


def image_ids(height: int, width: int, image: int = 0) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, image), rows, columns], -1).reshape(-1, 3).float()


def _flux_inputs(batch: int, g: torch.Generator, references: bool = False) -> Inputs:
    ids = torch.cat([image_ids(12, 14), image_ids(4, 5, image=1)]) if references else image_ids(12, 14)
    return {
        "hidden_states": randn(g, batch, len(ids), 4),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "pooled_projections": randn(g, batch, 8),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(9, 3),
    }


def _qwen_image() -> Any:
    return model_class("QwenImageTransformer2DModel")(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def _qwen_image_inputs(batch: int, g: torch.Generator, references: bool = False) -> Inputs:
    shapes = [(1, 12, 14)] + ([(1, 4, 5)] if references else [])
    return {
        "hidden_states": randn(g, batch, sum(h * w for _, h, w in shapes), 16),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "encoder_hidden_states_mask": prefix_mask(batch, 9, 6, 9).bool(),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [shapes] * batch,
    }


def _sd3(dual: bool = False) -> Any:
    return model_class("SD3Transformer2DModel")(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=32,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )


def _sd3_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 24, 28),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "pooled_projections": randn(g, batch, 8),
        "timestep": torch.full((batch,), 500.0),
    }


CASES: dict[str, Case] = {
    "Wan": Case(_wan, _wan_inputs, (5, 6, 7), dense=("attn2",)),
    "HunyuanVideo": Case(
        _hunyuan, _hunyuan_inputs, (5, 6, 7), text=((0, 11),), dense=("token_refiner.refiner_blocks.0.attn",)
    ),
    "HunyuanVideo-1.5": Case(
        _hunyuan_15, _hunyuan_15_inputs, (5, 6, 7), text=((0, 13),), dense=("token_refiner.refiner_blocks.0.attn",)
    ),
    "CogVideoX-2B": Case(_cogvideox, _cogvideox_inputs, (5, 6, 7), text=((7, 0),), regional=False),
    "CogVideoX-5B": Case(
        lambda: _cogvideox(use_rotary_positional_embeddings=True),
        lambda batch, g: _cogvideox_inputs(batch, g, rotary=210),
        (5, 6, 7),
        text=((7, 0),),
        regional=False,
    ),
    "CogVideoX-1.5": Case(
        lambda: _cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
        lambda batch, g: _cogvideox_inputs(batch, g, frames=6, rotary=126),
        (3, 6, 7),
        text=((7, 0),),
        regional=False,
    ),
    "Mochi": Case(_mochi, _mochi_inputs, (5, 6, 7), text=((0, 9), (0, 5)), targets=3, regional=False),
    "LTX-Video": Case(_ltx, _ltx_inputs, (5, 6, 7), dense=("attn2",)),
    "Flux": Case(_flux, _flux_inputs, (1, 12, 14), text=((9, 0),)),
    "Flux Kontext": Case(
        _flux, lambda batch, g: _flux_inputs(batch, g, references=True), (1, 12, 14), text=((9, 20),)
    ),
    "Qwen-Image": Case(_qwen_image, _qwen_image_inputs, (1, 12, 14), text=((9, 0),)),
    "Qwen-Image-Edit": Case(
        _qwen_image, lambda batch, g: _qwen_image_inputs(batch, g, references=True), (1, 12, 14), text=((9, 20),)
    ),
    "SD3": Case(_sd3, _sd3_inputs, (1, 12, 14), text=((0, 9),), regional=False),
    "SD3.5": Case(lambda: _sd3(dual=True), _sd3_inputs, (1, 12, 14), text=((0, 9), (0, 0)), targets=3, regional=False),
}
