"""Decode latents to frames as a stream, with exactly the pixels of the pipeline's own decode.

AutoencoderKLWan is causal in time: each latent frame needs only its predecessors' cached features. So frames can leave as
they are made, and a long video is never held in memory. The pipeline's own decode grows one tensor for the whole clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

# Pipelines whose `output_type="latent"` result is the normalised latent that a plain Wan decode takes.
_STREAMED = ("WanPipeline", "WanImageToVideoPipeline")


def can_stream(pipe: Any) -> bool:
    """Whether `stream_frames` can decode this pipeline's latents."""
    return type(pipe).__name__ in _STREAMED and type(pipe.vae).__name__ == "AutoencoderKLWan"


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] to uint8, rounded like diffusers' PIL output."""
    return (frames * 255).round().astype(np.uint8)


def stream_frames(pipe: Any, latents: torch.Tensor, device: torch.device) -> Iterator[np.ndarray]:
    """Decode `latents` `[1, channels, num_latent_frames, height, width]`; yields uint8 RGB `[n, height, width, 3]`.

    `n` is 1 for the first latent frame and the VAE's temporal factor for every later one.
    """
    for frames in stream_clips(pipe, latents, device):
        yield frames[0]


@torch.no_grad()
def stream_clips(pipe: Any, latents: torch.Tensor, device: torch.device) -> Iterator[np.ndarray]:
    """`stream_frames` of several clips at once: `[clips, channels, ...]` to uint8 `[clips, n, height, width, 3]`."""
    vae = pipe.vae
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)  # what `vae.decode` does first: brings an offloaded VAE to the device
    shape = (1, vae.config.z_dim, 1, 1, 1)
    latents = latents.to(device, vae.dtype)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
    for chunk in _decode_chunks(vae, latents / inverse_std + mean):
        yield to_uint8(np.asarray(pipe.video_processor.postprocess_video(chunk, output_type="np")))


def _decode_chunks(vae: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    height, width = latents.shape[-2:]
    ratio = vae.spatial_compression_ratio
    tiled = vae.use_tiling and (
        height > vae.tile_sample_min_height // ratio or width > vae.tile_sample_min_width // ratio
    )
    chunks = _tiled_chunks(vae, latents) if tiled else _plain_chunks(vae, latents)
    for chunk in chunks:
        if vae.config.patch_size is not None:
            chunk = unpatchify(chunk, patch_size=vae.config.patch_size)
        yield torch.clamp(chunk, min=-1.0, max=1.0)


def _new_cache(vae: Any) -> list[Any]:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())


def _plain_chunks(vae: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    cache = _new_cache(vae)
    hidden = vae.post_quant_conv(latents)
    for i in range(hidden.shape[2]):
        yield vae.decoder(hidden[:, :, i : i + 1], feat_cache=cache, feat_idx=[0], first_chunk=i == 0)


def _tiled_chunks(vae: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """One feature cache per tile, so that tiles can be blended and let go latent frame by latent frame."""
    patch = vae.config.patch_size or 1
    ratio = vae.spatial_compression_ratio
    tile = (vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio)
    step = (vae.tile_sample_stride_height // ratio, vae.tile_sample_stride_width // ratio)
    kept = (vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch)
    blend = (vae.tile_sample_min_height // patch - kept[0], vae.tile_sample_min_width // patch - kept[1])
    height, width = latents.shape[-2:]
    size = (height * ratio // patch, width * ratio // patch)
    tops, lefts = range(0, height, step[0]), range(0, width, step[1])
    caches = [[_new_cache(vae) for _ in lefts] for _ in tops]
    for k in range(latents.shape[2]):
        rows: list[list[torch.Tensor]] = []
        for top, row_caches in zip(tops, caches, strict=True):
            row = []
            for left, cache in zip(lefts, row_caches, strict=True):
                part = latents[:, :, k : k + 1, top : top + tile[0], left : left + tile[1]]
                row.append(vae.decoder(vae.post_quant_conv(part), feat_cache=cache, feat_idx=[0], first_chunk=k == 0))
            rows.append(row)
        strips = []
        for i, row in enumerate(rows):
            strip = []
            for j, piece in enumerate(row):
                if i > 0:
                    piece = vae.blend_v(rows[i - 1][j], piece, blend[0])
                if j > 0:
                    piece = vae.blend_h(row[j - 1], piece, blend[1])
                strip.append(piece[:, :, :, : kept[0], : kept[1]])
            strips.append(torch.cat(strip, dim=-1))
        yield torch.cat(strips, dim=3)[:, :, :, : size[0], : size[1]]
