"""The shapes that people run, on narrow models of the real classes: every layer gets the grid and the text it really has.

The attention call itself stands in: the tokens are those of the released models, the channels few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import vidsparse
from vidsparse.processors import delegate
from vidsparse.testing import CASES, image_ids, prefix_mask


@dataclass(frozen=True)
class Shape:
    """A released model at one of its sizes.

    Attributes:
        family: name of the case.
        grid: tokens by frame, row and column.
        inputs: what differs from the case's inputs.
        text: text tokens before and after.
        config: what differs from the case's model.
    """

    family: str
    grid: tuple[int, int, int]
    inputs: Callable[[], dict[str, Any]]
    text: tuple[int, int] = (0, 0)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns + sum(self.text)


def wan(frames: int, height: int, width: int, family: str = "Wan") -> Shape:
    """Of so many latent frames, rows and columns."""
    return Shape(
        family,
        (frames, height // 2, width // 2),
        lambda: {"hidden_states": torch.zeros(1, 4, frames, height, width)},
        config={"rope_max_seq_len": 1024},
    )


def latents(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"hidden_states": torch.zeros(1, *shape)}


def flux(side: int) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "hidden_states": torch.zeros(1, side * side, 4),
        "img_ids": image_ids(side, side),
        "encoder_hidden_states": torch.zeros(1, 512, 16),
        "txt_ids": torch.zeros(512, 3),
    }


def cogvideox(frames: int, height: int, width: int, tokens: int) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "hidden_states": torch.zeros(1, frames, 4, height, width),
        "encoder_hidden_states": torch.zeros(1, 226, 16),
        "image_rotary_emb": (torch.zeros(tokens, 16), torch.zeros(tokens, 16)),
    }


def ltx(family: str, frames: int, height: int, width: int) -> Shape:
    sizes = {"num_frames": frames, "height": height, "width": width}
    grid = (frames, height, width)
    return Shape(family, grid, lambda: {"hidden_states": torch.zeros(1, frames * height * width, 4), **sizes})


HUNYUAN_TEXT = {"encoder_hidden_states": torch.zeros(1, 256, 16), "encoder_attention_mask": prefix_mask(1, 256, 60)}
SHAPES = {
    "Wan 2.1, 480p, 81 frames": wan(21, 60, 104),
    "Wan 2.1, 720p, 81 frames": wan(21, 90, 160),
    "Wan 2.1, 720p, 321 frames": wan(81, 90, 160),
    "Wan 2.2 5B, 704p, 121 frames": wan(31, 44, 80),
    "Wan 2.1 I2V, 480p, 81 frames": wan(21, 60, 104, "Wan I2V"),
    "ChronoEdit, 720p": wan(2, 90, 160, "ChronoEdit"),
    "SkyReels-V2, 540p, 97 frames": wan(25, 68, 120, "SkyReels-V2"),
    "HunyuanVideo, 720p, 129 frames": Shape(
        "HunyuanVideo",
        (33, 45, 80),
        lambda: {**latents(4, 33, 90, 160)(), **HUNYUAN_TEXT},
        (0, 256),
        {"patch_size": 2},
    ),
    "Framepack, 480p, 9 frames at a time": Shape(
        "HunyuanVideo Framepack",
        (9, 30, 52),
        lambda: {
            **latents(4, 9, 60, 104)(),
            **HUNYUAN_TEXT,
            "indices_latents": torch.arange(20, 29),
            "latents_clean": torch.zeros(1, 4, 2, 60, 104),
            "latents_history_2x": torch.zeros(1, 4, 2, 60, 104),
            "latents_history_4x": torch.zeros(1, 4, 16, 60, 104),
            "indices_latents_history_4x": torch.arange(16),
        },
        # History in patches of (1, 2, 2), (2, 4, 4) and (4, 8, 8); 60 tokens of the prompt and 3 of the image.
        (2 * 30 * 52 + 15 * 26 + 4 * 8 * 13, 63),
    ),
    "CogVideoX 5B, 480p, 49 frames": Shape(
        "CogVideoX-5B",
        (13, 30, 45),
        cogvideox(13, 60, 90, 17_550),
        (226, 0),
        {"max_text_seq_length": 226, "sample_width": 90, "sample_height": 60, "sample_frames": 49},
    ),
    "CogVideoX 1.5, 768p, 81 frames": Shape(
        "CogVideoX-1.5",
        (11, 48, 85),
        cogvideox(22, 96, 170, 44_880),
        (226, 0),
        {"max_text_seq_length": 226, "sample_width": 170, "sample_height": 96, "sample_frames": 81},
    ),
    "Mochi, 480p, 163 frames": Shape(
        "Mochi",
        (28, 30, 53),
        lambda: {
            **latents(4, 28, 60, 106)(),
            "encoder_hidden_states": torch.zeros(1, 256, 16),
            "encoder_attention_mask": prefix_mask(1, 256, 100).bool(),
        },
        (0, 100),
        {"max_sequence_length": 256},
    ),
    "LTX-Video, 480p, 161 frames": ltx("LTX-Video", 21, 15, 22),
    "LTX-2, 512p, 121 frames": ltx("LTX-2", 16, 16, 24),
    "Cosmos, 704p, 121 frames": Shape(
        "Cosmos", (16, 44, 80), latents(4, 16, 88, 160), config={"max_size": (128, 240, 240)}
    ),
    "Kandinsky 5, 512p, 5 s": Shape(
        "Kandinsky 5",
        (31, 32, 48),
        lambda: {
            "hidden_states": torch.zeros(1, 31, 64, 96, 4),
            "visual_rope_pos": (torch.arange(31), torch.arange(32), torch.arange(48)),
        },
    ),
    "Flux, 1024": Shape("Flux", (1, 64, 64), flux(64), (512, 0)),
    "Flux, 4096": Shape("Flux", (1, 256, 256), flux(256), (512, 0)),
    "Qwen-Image, 1328": Shape(
        "Qwen-Image",
        (1, 83, 83),
        lambda: {"hidden_states": torch.zeros(1, 6889, 16), "img_shapes": [[(1, 83, 83)]]},
        (9, 0),
    ),
    "SD3, 1024": Shape(
        "SD3",
        (1, 64, 64),
        lambda: {**latents(4, 128, 128)(), "encoder_hidden_states": torch.zeros(1, 333, 16)},
        (0, 333),
        {"sample_size": 128, "pos_embed_max_size": 192},
    ),
    "Z-Image, 1024": Shape(
        "Z-Image",
        (1, 64, 64),
        lambda: {"x": [torch.zeros(4, 1, 128, 128)]},
        (0, 64),
        {"axes_lens": [1536, 512, 512]},
    ),
    "Lumina 2, 1024": Shape("Lumina 2", (1, 64, 64), latents(4, 128, 128), (8, 0), {"axes_lens": (300, 512, 512)}),
    "PixArt, 1024": Shape(
        "PixArt",
        (1, 64, 64),
        lambda: {**latents(4, 128, 128)(), "attention_mask": None},
        config={"sample_size": 128},
    ),
    "CogView 4, 1024": Shape("CogView 4", (1, 64, 64), latents(4, 128, 128), (9, 0), {"pos_embed_max_size": 128}),
    "HiDream, 1024": Shape("HiDream", (1, 64, 64), latents(4, 128, 128), (0, 17), {"max_resolution": (128, 128)}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_layers_get_the_grid_they_have(name, monkeypatch):
    shape = SHAPES[name]
    case, seen = CASES[shape.family], []

    def stand_in(query, key, value, context, **options):
        seen.append((query.shape[1], key.shape[1], context.layout))
        return value.clone(), None

    monkeypatch.setattr(delegate, "attend", stand_in)
    model: Any = case.build()
    model = type(model)(**{**model.config, **shape.config}).eval()
    video = shape.grid[0] > 1
    # A static mask is made for the tokens; an image's blocks would be chosen at the call.
    handle = vidsparse.apply(
        model, "radial" if video else "pooled", strict=True, warmup_steps=0, dense_layers=0, min_tokens=0
    )
    model(**{**case.inputs(1, torch.Generator().manual_seed(0)), **shape.inputs()}, return_dict=False)
    assert len(seen) == case.targets
    for query_len, key_len, layout in seen:
        grid = layout.grid
        assert (grid.frames, grid.height, grid.width) == shape.grid
        assert (layout.text_before, layout.text_after) == shape.text
        assert query_len == key_len == layout.seq_len == shape.tokens
    rows = handle.report().rows
    assert {row.tokens for row in rows} == {shape.tokens} and {row.reason for row in rows} == {None}
    if shape.grid[0] > 2:
        assert all(row.density < 0.9 for row in rows), "radial leaves most of a long video out"


def test_the_lengths_are_those_of_the_papers():
    found = {name: shape.tokens for name, shape in SHAPES.items()}
    assert found["Wan 2.1, 480p, 81 frames"] == 32_760 and found["Wan 2.1, 720p, 81 frames"] == 75_600
    assert found["Wan 2.1, 720p, 321 frames"] == 291_600 and found["HunyuanVideo, 720p, 129 frames"] == 119_056
    assert found["CogVideoX 1.5, 768p, 81 frames"] == 45_106 and found["Flux, 4096"] == 66_048
