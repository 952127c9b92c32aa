"""The streamed decode must give the pixels of the pipeline's own decode, bit for bit."""

import numpy as np
import pytest
import torch

from vidsparse_pipelines.decode import can_stream, stream_clips, stream_frames, to_uint8
from vidsparse_pipelines.testing import tiny_wan_pipeline

CALL = {"prompt": "a red circle", "num_inference_steps": 2, "max_sequence_length": 16, "guidance_scale": 1.0}


def _vary_latent_statistics(pipe: object) -> None:
    """Distinct per-channel statistics, so that a forgotten mean or deviation shows."""
    vae = pipe.vae  # pyright: ignore[reportAttributeAccessIssue]
    vae.register_to_config(latents_mean=[0.1 * i for i in range(16)], latents_std=[1.0 + 0.2 * i for i in range(16)])


def _both(pipe: object, num_frames: int, height: int, width: int) -> tuple[list[np.ndarray], np.ndarray]:
    def call(kind: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        shape = {"num_frames": num_frames, "height": height, "width": width}
        return pipe(**CALL, **shape, generator=generator, output_type=kind).frames  # pyright: ignore[reportCallIssue]

    chunks = list(stream_frames(pipe, call("latent"), torch.device("cpu")))
    return chunks, to_uint8(np.asarray(call("np"))[0])


@pytest.mark.parametrize("vae_patch", [None, 2])
@pytest.mark.parametrize("num_frames", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_stream_equals_pipeline(vae_patch: int | None, num_frames: int, dtype: torch.dtype) -> None:
    pipe = tiny_wan_pipeline(vae_patch).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    _vary_latent_statistics(pipe)
    assert can_stream(pipe)
    chunks, expected = _both(pipe, num_frames, 16, 32)
    assert [len(chunk) for chunk in chunks] == [1] + [4] * ((num_frames - 1) // 4)
    assert expected.std() > 1
    assert np.array_equal(np.concatenate(chunks), expected)


@pytest.mark.parametrize("vae_patch", [None, 2])
def test_tiled_stream_equals_tiled_pipeline(vae_patch: int | None) -> None:
    pipe = tiny_wan_pipeline(vae_patch)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=16, tile_sample_stride_width=16
    )
    chunks, tiled = _both(pipe, 5, 32, 48)
    assert [len(chunk) for chunk in chunks] == [1, 4]
    assert np.array_equal(np.concatenate(chunks), tiled)
    pipe.vae.use_tiling = False
    assert not np.array_equal(_both(pipe, 5, 32, 48)[1], tiled)


def test_clips_together_are_the_clips_alone() -> None:
    pipe = tiny_wan_pipeline()
    latents = torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    together = np.concatenate(list(stream_clips(pipe, latents, torch.device("cpu"))), 1)
    assert together.shape == (2, 9, 32, 48, 3)
    for clip, own in zip(together, latents, strict=True):
        alone = np.concatenate(list(stream_frames(pipe, own[None], torch.device("cpu"))))
        # Sums over a batch may round differently.
        assert np.abs(clip.astype(int) - alone).max() <= 1 and alone.std() > 1


def test_one_latent_frame_is_decoded_at_a_time() -> None:
    """Asking for the first frame must not decode the rest."""
    pipe = tiny_wan_pipeline()
    calls = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[2]))
    stream = stream_frames(pipe, torch.zeros(1, 16, 6, 4, 6), torch.device("cpu"))
    next(stream)
    assert calls == [1]
    next(stream)
    assert calls == [1, 1]
