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
        no_checkpointing: why gradient checkpointing cannot be tried, None where it can.
    """

    build: Callable[[], Any]
    inputs: Callable[[int, torch.Generator], Inputs]
    grid: tuple[int, int, int]
    text: tuple[tuple[int, int], ...] = ((0, 0),)
    targets: int = 2
    dense: tuple[str, ...] = field(default_factory=tuple)
    batches: tuple[int, ...] = (1, 2)
    regional: bool = True
    no_checkpointing: str | None = None


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


def _framepack() -> Any:
    return model_class("HunyuanVideoFramepackTransformer3DModel")(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )


def _framepack_inputs(batch: int, g: torch.Generator) -> Inputs:
    def frames(first: int, count: int) -> torch.Tensor:
        return torch.arange(first, first + count)

    # Earlier frames in patches of (4, 8, 8), (2, 4, 4) and (1, 2, 2): 4, 12 and 84 tokens. The prompt of a batch of one
    # is cut to its length, so that is the whole here.
    return {
        "hidden_states": randn(g, batch, 4, 5, 12, 14),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(g, batch, 11, 16),
        "encoder_attention_mask": prefix_mask(batch, 11, 11, 7),
        "pooled_projections": randn(g, batch, 8),
        "image_embeds": randn(g, batch, 3, 8),
        "indices_latents": frames(8, 5),
        "guidance": torch.full((batch,), 6000.0),
        "latents_clean": randn(g, batch, 4, 2, 12, 14),
        "indices_latents_clean": frames(6, 2),
        "latents_history_2x": randn(g, batch, 4, 2, 12, 14),
        "indices_latents_history_2x": frames(4, 2),
        "latents_history_4x": randn(g, batch, 4, 4, 12, 14),
        "indices_latents_history_4x": frames(0, 4),
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


def _wan_i2v_inputs(batch: int, g: torch.Generator) -> Inputs:
    # Diffusers takes all but the last 512 tokens for those of the image.
    return _wan_inputs(batch, g) | {
        "encoder_hidden_states": randn(g, batch, 512, 16),
        "encoder_hidden_states_image": randn(g, batch, 5, 8),
    }


def _wan_animate() -> Any:
    return _wan(
        "WanAnimateTransformer3DModel",
        in_channels=12,
        latent_channels=4,
        image_dim=8,
        added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def _wan_animate_inputs(batch: int, g: torch.Generator) -> Inputs:
    return _wan_i2v_inputs(batch, g) | {
        "hidden_states": randn(g, batch, 12, 5, 12, 14),
        "pose_hidden_states": randn(g, batch, 4, 4, 12, 14),
        "face_pixel_values": randn(g, batch, 3, 13, 16, 16),
    }


def _consisid() -> Any:
    return model_class("ConsisIDTransformer3DModel")(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=14,
        sample_height=12,
        sample_frames=17,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )


def _ltx_2(**config: Any) -> Any:
    return model_class("LTX2VideoTransformer3DModel")(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
        **config,
    )


def _ltx_2_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 5 * 6 * 7, 4),
        "audio_hidden_states": randn(g, batch, 12, 4),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "audio_encoder_hidden_states": randn(g, batch, 9, 16),
        "encoder_attention_mask": prefix_mask(batch, 9, 6, 9),
        "audio_encoder_attention_mask": prefix_mask(batch, 9, 6, 9),
        "timestep": torch.full((batch,), 500.0),
        "num_frames": 5,
        "height": 6,
        "width": 7,
        "audio_num_frames": 12,
    }


def _ltx_23_inputs(batch: int, g: torch.Generator) -> Inputs:
    # A keyframe of 42 tokens follows the video.
    inputs = _ltx_2_inputs(batch, g)
    times = torch.full((batch,), 500.0)
    return inputs | {
        "hidden_states": randn(g, batch, 210 + 42, 4),
        "video_coords": torch.rand(batch, 3, 210 + 42, 2, generator=g) * 10,
        "sigma": times,
        "audio_sigma": times,
    }


def _cosmos(**config: Any) -> Any:
    # The mask of padded pixels is resized by torchvision; without it the model needs none.
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (8, 16, 16),
        "concat_padding_mask": False,
    }
    return model_class("CosmosTransformer3DModel")(**{**settings, **config})


def _cosmos_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 5, 12, 14),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "attention_mask": prefix_mask(batch, 9, 6, 9).bool(),
        "fps": 24,
    }


def _cosmos_25_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 5, 12, 14),
        "timestep": torch.full((batch, 1, 5, 1, 1), 0.5),
        "encoder_hidden_states": (randn(g, batch, 9, 16), randn(g, batch, 4, 8)),
    }


def _kandinsky() -> Any:
    return model_class("Kandinsky5Transformer3DModel")(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )


def _kandinsky_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 5, 12, 14, 4),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": randn(g, batch, 8),
        "visual_rope_pos": (torch.arange(5), torch.arange(6), torch.arange(7)),
        "text_rope_pos": torch.arange(9),
    }


def _allegro() -> Any:
    return model_class("AllegroTransformer3DModel")(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=12,
        sample_width=14,
        sample_frames=5,
        caption_channels=16,
    )


def _allegro_inputs(batch: int, g: torch.Generator) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    rotary = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (6, 7)), (6, 7), 5, (1.0, 1.0, 1.0))
    positions = torch.cartesian_prod(*(axis.long() for axis in rotary[3:])).T.reshape(3, 1, -1)
    return {
        "hidden_states": randn(g, batch, 4, 5, 12, 14),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": prefix_mask(batch, 9, 6, 9),
        "image_rotary_emb": (rotary[:3], tuple(positions)),
    }


def _easyanimate() -> Any:
    return model_class("EasyAnimateTransformer3DModel")(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=14,
        sample_height=12,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
        text_embed_dim_t5=12,
    )


def _easyanimate_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 5, 12, 14),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(g, batch, 7, 16),
        "encoder_hidden_states_t5": randn(g, batch, 4, 12),
    }


def _motif() -> Any:
    return model_class("MotifVideoTransformer3DModel")(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        text_embed_dim=16,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


def _motif_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 5, 12, 14),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "encoder_attention_mask": prefix_mask(batch, 9, 6, 9),
        "image_embeds": randn(g, batch, 3, 8),
    }


def _helios() -> Any:
    return model_class("HeliosTransformer3DModel")(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(4, 4, 4),
    )


def _helios_inputs(batch: int, g: torch.Generator) -> Inputs:
    def frames(first: int, count: int) -> torch.Tensor:
        return torch.arange(first, first + count).expand(batch, -1)

    # History in patches of (1, 2, 2), (2, 4, 4) and (4, 8, 8): 84, 12 and 4 tokens.
    return {
        "hidden_states": randn(g, batch, 4, 5, 12, 14),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "indices_hidden_states": frames(8, 5),
        "latents_history_short": randn(g, batch, 4, 2, 12, 14),
        "indices_latents_history_short": frames(6, 2),
        "latents_history_mid": randn(g, batch, 4, 2, 12, 14),
        "indices_latents_history_mid": frames(4, 2),
        "latents_history_long": randn(g, batch, 4, 4, 12, 14),
        "indices_latents_history_long": frames(0, 4),
    }


def _minimax_h3() -> Any:
    return model_class("MiniMaxH3Transformer3DModel")(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=64,
        in_channels=4,
        audio_in_channels=4,
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    )


def _minimax_h3_inputs(batch: int, g: torch.Generator) -> Inputs:
    """Text, a first frame as condition, sound, and the video, packed as diffusers' pipeline does."""
    text, frame, sound, video = 9, 42, 6, 210
    ids = torch.zeros(text + frame + sound + video, 3, dtype=torch.float64)
    grid = torch.cartesian_prod(torch.arange(5.0) * 1.7 + text, torch.arange(6.0) * 0.8, torch.arange(7.0) * 0.8)
    ids[:text, 0] = torch.arange(text)
    ids[text : text + frame] = grid[:42]
    ids[text + frame : -video, 0] = text + torch.arange(sound)
    ids[-video:] = grid
    tags = torch.tensor([0] * text + [1] * frame + [2] * sound + [1] * video)
    order = torch.arange(len(ids))
    return {
        "hidden_states": randn(g, batch, frame + video, 16),
        "audio_hidden_states": randn(g, batch, sound, 4),
        "encoder_hidden_states": randn(g, batch, text, 16),
        "timestep": torch.tensor([0.0, 500.0]),
        "timestep_indices": (order >= text + frame).long(),
        "token_tags": tags,
        "position_ids": ids,
        "video_indices": order[tags == 1],
        "audio_indices": order[tags == 2],
        "text_indices": order[tags == 0],
    }


def _latte() -> Any:
    return model_class("LatteTransformer3DModel")(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=32,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=16,
        video_length=3,
    )


def _latte_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 3, 26, 26),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(g, batch, 9, 16),
    }


def _flux_2() -> Any:
    return model_class("Flux2Transformer2DModel")(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def _flux_2_inputs(batch: int, g: torch.Generator) -> Inputs:
    inputs = _flux_inputs(batch, g, references=True)
    ids = torch.nn.functional.pad(inputs["img_ids"] * torch.tensor([10.0, 1, 1]), (0, 1))
    del inputs["pooled_projections"]
    guidance = torch.full((batch,), 4.0)
    return inputs | {"img_ids": ids.expand(batch, -1, -1), "txt_ids": torch.zeros(9, 4), "guidance": guidance}


def _chroma() -> Any:
    return model_class("ChromaTransformer2DModel")(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )


def _chroma_inputs(batch: int, g: torch.Generator, dtype: torch.dtype = torch.float32) -> Inputs:
    # The pipeline's mask is of floats.
    mask = torch.nn.functional.pad(prefix_mask(batch, 9, 6, 9), (0, 168), value=1).to(dtype)
    inputs = _flux_inputs(batch, g) | {"attention_mask": mask}
    del inputs["pooled_projections"]
    return inputs


def _longcat_image() -> Any:
    return model_class("LongCatImageTransformer2DModel")(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


def _longcat_image_inputs(batch: int, g: torch.Generator) -> Inputs:
    inputs = _flux_inputs(batch, g)
    del inputs["pooled_projections"]
    return inputs | {"img_ids": inputs["img_ids"] + torch.tensor([1.0, 9, 9])}


def _ovis_image() -> Any:
    return model_class("OvisImageTransformer2DModel")(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def _ovis_image_inputs(batch: int, g: torch.Generator) -> Inputs:
    inputs = _flux_inputs(batch, g)
    del inputs["pooled_projections"]
    return inputs


def _bria() -> Any:
    return model_class("BriaTransformer2DModel")(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 4, 8],
    )


def _z_image() -> Any:
    model = model_class("ZImageTransformer2DModel")(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    torch.nn.init.normal_(model.x_pad_token)
    torch.nn.init.normal_(model.cap_pad_token)
    return model


def _z_image_inputs(batch: int, g: torch.Generator) -> Inputs:
    # 168 tokens are filled up to 192, captions of 40 and 9 to 64 and 32.
    return {
        "x": [randn(g, 4, 1, 24, 28) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [randn(g, (40, 9)[i % 2], 16) for i in range(batch)],
    }


def _lumina_2() -> Any:
    return model_class("Lumina2Transformer2DModel")(
        sample_size=32,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )


def _lumina_2_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 24, 28),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(g, batch, 11, 16),
        "encoder_attention_mask": prefix_mask(batch, 11, 8),
    }


def _hidream() -> Any:
    return model_class("HiDreamImageTransformer2DModel")(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[16, 12],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=[0, 1],
        force_inference_output=True,
    )


def _hidream_inputs(batch: int, g: torch.Generator) -> Inputs:
    # 168 tokens that are not square stand in 256 places; then come T5 and two layers of Llama.
    return {
        "hidden_states": randn(g, batch, 4, 24, 28),
        "timesteps": torch.full((batch,), 500.0),
        "encoder_hidden_states_t5": randn(g, batch, 7, 16),
        "encoder_hidden_states_llama3": randn(g, 2, batch, 5, 12),
        "pooled_embeds": randn(g, batch, 8),
    }


def _hunyuan_image() -> Any:
    return model_class("HunyuanImageTransformer2DModel")(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        rope_axes_dim=(8, 8),
    )


def _hunyuan_image_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 12, 14),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(g, batch, 8, 16),
        "encoder_attention_mask": prefix_mask(batch, 8, 5, 8),
        "encoder_hidden_states_2": randn(g, batch, 4, 12),
        "encoder_attention_mask_2": prefix_mask(batch, 4, 2, 4),
    }


def _pixart() -> Any:
    return model_class("PixArtTransformer2DModel")(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=32,
        caption_channels=16,
        use_additional_conditions=False,
    )


def _pixart_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 24, 28),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "attention_mask": prefix_mask(batch, 168, 150, 168),
        "encoder_attention_mask": prefix_mask(batch, 9, 6, 9),
    }


def _cogview_4() -> Any:
    return model_class("CogView4Transformer2DModel")(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=32,
        rope_axes_dim=(32, 32),
    )


def _cogview_4_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 24, 28),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "timestep": torch.full((batch,), 500),
        "original_size": torch.tensor([[192.0, 224.0]] * batch),
        "target_size": torch.tensor([[192.0, 224.0]] * batch),
        "crop_coords": torch.zeros(batch, 2),
        "attention_mask": prefix_mask(batch, 9, 6, 9),
    }


def _auraflow() -> Any:
    model = model_class("AuraFlowTransformer2DModel")(
        sample_size=32,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    # Fresh gates let next to nothing of attention through.
    for name, weight in model.named_parameters():
        if name.endswith("norm1.linear.weight"):
            torch.nn.init.normal_(weight)
    return model


def _auraflow_inputs(batch: int, g: torch.Generator) -> Inputs:
    return {
        "hidden_states": randn(g, batch, 4, 24, 28),
        "encoder_hidden_states": randn(g, batch, 9, 16),
        "timestep": torch.full((batch,), 0.5),
    }


VIDEO, IMAGE = (5, 6, 7), (1, 12, 14)

CASES: dict[str, Case] = {
    "Wan": Case(_wan, _wan_inputs, VIDEO, dense=("attn2",)),
    "Wan I2V": Case(lambda: _wan(image_dim=8, added_kv_proj_dim=24), _wan_i2v_inputs, VIDEO, dense=("attn2",)),
    "Wan VACE": Case(
        lambda: _wan("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=6),
        lambda batch, g: _wan_inputs(batch, g) | {"control_hidden_states": randn(g, batch, 6, 5, 12, 14)},
        VIDEO,
        targets=3,
        dense=("attn2",),
    ),
    "Wan-Animate": Case(_wan_animate, _wan_animate_inputs, VIDEO, dense=("attn2", "face_adapter.0")),
    "ChronoEdit": Case(lambda: _wan("ChronoEditTransformer3DModel"), _wan_inputs, VIDEO, dense=("attn2",)),
    "SkyReels-V2": Case(lambda: _wan("SkyReelsV2Transformer3DModel"), _wan_inputs, VIDEO, dense=("attn2",)),
    "HunyuanVideo": Case(
        _hunyuan, _hunyuan_inputs, VIDEO, text=((0, 11),), dense=("token_refiner.refiner_blocks.0.attn",)
    ),
    "HunyuanVideo-1.5": Case(
        _hunyuan_15, _hunyuan_15_inputs, VIDEO, text=((0, 13),), dense=("token_refiner.refiner_blocks.0.attn",)
    ),
    "HunyuanVideo Framepack": Case(
        _framepack,
        _framepack_inputs,
        VIDEO,
        text=((100, 14),),
        dense=("token_refiner.refiner_blocks.0.attn",),
        regional=False,
    ),
    "CogVideoX-2B": Case(_cogvideox, _cogvideox_inputs, VIDEO, text=((7, 0),), regional=False),
    "CogVideoX-5B": Case(
        lambda: _cogvideox(use_rotary_positional_embeddings=True),
        lambda batch, g: _cogvideox_inputs(batch, g, rotary=210),
        VIDEO,
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
    "ConsisID": Case(
        _consisid, lambda batch, g: _cogvideox_inputs(batch, g, rotary=210), VIDEO, text=((7, 0),), regional=False
    ),
    "Mochi": Case(_mochi, _mochi_inputs, VIDEO, text=((0, 9), (0, 5)), targets=3, regional=False),
    "LTX-Video": Case(_ltx, _ltx_inputs, VIDEO, dense=("attn2",)),
    "LTX-2": Case(
        _ltx_2,
        _ltx_2_inputs,
        VIDEO,
        dense=("attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
    ),
    "LTX-2.3": Case(
        lambda: _ltx_2(gated_attn=True, audio_gated_attn=True, perturbed_attn=True, rope_type="split"),
        _ltx_23_inputs,
        VIDEO,
        text=((0, 42),),
        dense=("attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
    ),
    "Cosmos": Case(_cosmos, _cosmos_inputs, VIDEO, dense=("attn2",), regional=False),
    "Cosmos 2.5": Case(
        lambda: _cosmos(img_context_dim_in=8, img_context_num_tokens=4, img_context_dim_out=32),
        _cosmos_25_inputs,
        VIDEO,
        dense=("attn2",),
        regional=False,
    ),
    "Kandinsky 5": Case(
        _kandinsky, _kandinsky_inputs, VIDEO, dense=("text_transformer_blocks.0.self_attention", "cross_attention")
    ),
    "Allegro": Case(_allegro, _allegro_inputs, VIDEO, dense=("attn2",), regional=False),
    "EasyAnimate": Case(_easyanimate, _easyanimate_inputs, VIDEO, text=((11, 0),), regional=False),
    "Motif-Video": Case(
        _motif, _motif_inputs, VIDEO, text=((0, 210), (0, 12)), targets=3, dense=("transformer_blocks.0.cross_attn",)
    ),
    "Helios": Case(_helios, _helios_inputs, VIDEO, text=((100, 0),), dense=("attn2",)),
    "MiniMax-H3": Case(
        _minimax_h3, _minimax_h3_inputs, VIDEO, text=((57, 0),), dense=("token_refiner.refiner_blocks.0.attn",)
    ),
    "Latte": Case(
        _latte,
        _latte_inputs,
        (1, 13, 13),
        dense=("attn2", "temporal_transformer_blocks.0.attn1"),
        regional=False,
    ),
    "Flux": Case(_flux, _flux_inputs, IMAGE, text=((9, 0),)),
    "Flux Kontext": Case(_flux, lambda batch, g: _flux_inputs(batch, g, references=True), IMAGE, text=((9, 20),)),
    "Flux 2": Case(_flux_2, _flux_2_inputs, IMAGE, text=((9, 20),)),
    "Chroma": Case(
        _chroma,
        _chroma_inputs,
        IMAGE,
        text=((9, 0),),
        no_checkpointing="diffusers forgets the prompt's mask in half of the layers then",
    ),
    "LongCat-Image": Case(_longcat_image, _longcat_image_inputs, IMAGE, text=((9, 0),)),
    "Ovis-Image": Case(_ovis_image, _ovis_image_inputs, IMAGE, text=((9, 0),)),
    "Bria": Case(
        _bria,
        lambda batch, g: _ovis_image_inputs(batch, g) | {"timestep": torch.full((batch,), 500.0)},
        IMAGE,
        text=((9, 0),),
        regional=False,
    ),
    "Qwen-Image": Case(_qwen_image, _qwen_image_inputs, IMAGE, text=((9, 0),)),
    "Qwen-Image-Edit": Case(
        _qwen_image, lambda batch, g: _qwen_image_inputs(batch, g, references=True), IMAGE, text=((9, 20),)
    ),
    "SD3": Case(_sd3, _sd3_inputs, IMAGE, text=((0, 9),), regional=False),
    "SD3.5": Case(lambda: _sd3(dual=True), _sd3_inputs, IMAGE, text=((0, 9), (0, 0)), targets=3, regional=False),
    "Z-Image": Case(
        _z_image,
        _z_image_inputs,
        IMAGE,
        text=((0, 88),),
        dense=("noise_refiner.0.attention", "context_refiner.0.attention"),
    ),
    "Lumina 2": Case(
        _lumina_2,
        _lumina_2_inputs,
        IMAGE,
        text=((8, 0),),
        dense=("noise_refiner.0.attn", "context_refiner.0.attn"),
        regional=False,
    ),
    "HiDream": Case(_hidream, _hidream_inputs, IMAGE, text=((0, 88 + 7 + 2 * 5),), regional=False),
    "HunyuanImage": Case(
        _hunyuan_image,
        _hunyuan_image_inputs,
        IMAGE,
        text=((0, 12),),
        dense=("token_refiner.refiner_blocks.0.attn",),
        no_checkpointing="diffusers raises a TypeError in gradient checkpointing, with its own processors too",
    ),
    "PixArt": Case(_pixart, _pixart_inputs, IMAGE, dense=("attn2",), regional=False),
    "CogView 4": Case(_cogview_4, _cogview_4_inputs, IMAGE, text=((9, 0),), regional=False),
    "AuraFlow": Case(_auraflow, _auraflow_inputs, IMAGE, text=((8 + 9, 0),), regional=False),
}
