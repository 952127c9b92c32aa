"""The network of the prompt checker.

Objects of one clip have distinct colours, so a colour names an object. `SceneNet` says which colours are there and
what the background does; `ObjectNet` is asked about one colour at a time and sees, beside the pixels, how much each
looks like that colour. Its weights are therefore shared by all colours.

Colour, place and outline of an object come from soft attention over each frame; a temporal network reads the motion
from how they change. Clips are looked at every fourth frame and at one frame height, whatever their own is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidsparse.errors import ConfigError
from vidsparse_pipelines.clips import grammar
from vidsparse_pipelines.clips.renderer import COLOR_RGB

if TYPE_CHECKING:
    from vidsparse_pipelines.clips.checker.scoring import Scores

#: Frames between two that the checker looks at.
FRAME_STRIDE = 4

#: Orders of an object: in front of the other, behind it, or never touching it.
ORDERS = ("front", "behind", "apart")
OBJECT_HEADS = {
    "shape": grammar.SHAPES,
    "size": grammar.SIZES,
    "texture": grammar.TEXTURES,
    "motion": grammar.MOTIONS,
    "speed": grammar.SPEEDS,
    "order": ORDERS,
}
SCENE_HEADS = {
    "background": grammar.BACKGROUNDS,
    "background_texture": grammar.BACKGROUND_TEXTURES,
    "pan": grammar.PANS,
}
OBJECT_ATTRIBUTES = ("shape", "size", "texture", "motion", "speed")
IGNORED = -100

#: A pixel of a shaded stripe has this share of its object's brightness (see the renderer).
_SHADED = 0.38


@dataclass(frozen=True)
class CheckerConfig:
    """Size of the network.

    height: frame height in pixels at which clips are looked at; other sizes are resampled, keeping the ratio.
    width: channels of the first object layer; the others follow from it.
    scene_width: the same for the scene network.
    temporal_width: channels of the temporal network.
    """

    height: int = 64
    width: int = 32
    scene_width: int = 32
    temporal_width: int = 160


class _Block(nn.Module):
    """Residual pair of 3x3 convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class _FrameMix(nn.Module):
    """Residual convolution over three neighbouring frames, `[clips * frames, channels, h, w]`."""

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        here, before, after = self.project(x).chunk(3, 1)
        t = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1, 1) % num_frames
        mixed = here + before.roll(1, 0) * (t > 0) + after.roll(-1, 0) * (t < num_frames - 1)
        return F.relu(x + self.norm(mixed))


def _down(width_in: int, width_out: int, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(width_in, width_out, kernel, stride=2, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width_out), nn.ReLU())


class _Temporal(nn.Module):
    """Dilated residual convolutions over frames, then mean and maximum: `[n, frames, c]` to `[n, 2 * width]`."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.scale = nn.BatchNorm1d(channels)  # places and areas count as much as the many pooled features
        self.project = nn.Conv1d(channels, width, 1)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.outs = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.project(self.scale(x.transpose(1, 2))))
        for norm, conv, out in zip(self.norms[1:], self.convs, self.outs, strict=True):  # type: ignore[arg-type]
            value, gate = conv(F.relu(norm(x))).chunk(2, 1)
            x = x + out(value * torch.sigmoid(gate))
        return torch.cat((x.mean(2), x.amax(2)), 1)


class _Heads(nn.Module):
    def __init__(self, channels: int, sizes: dict[str, int], hidden: int = 256):
        super().__init__()
        self.hidden = nn.Linear(channels, hidden)
        self.sizes = sizes
        self.out = nn.Linear(hidden, sum(sizes.values()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.out(F.relu(self.hidden(x))).float()
        return dict(zip(self.sizes, logits.split(list(self.sizes.values()), -1), strict=True))


def _coordinates(height: int, width: int, device: torch.device) -> Tensor:
    """x and y of each pixel in frame heights from the middle, `[2, height, width]`."""
    y = (torch.arange(height, device=device) + 0.5) / height - 0.5
    x = ((torch.arange(width, device=device) + 0.5) - width / 2) / height
    return torch.stack((x.expand(height, width), y.view(-1, 1).expand(height, width)))


def _moments(weights: Tensor, coordinates: Tensor) -> Tensor:
    """Centre and second moments of maps that sum to 1: `[n, maps, h, w]` to `[n, maps * 5]`, float32."""
    # Sums, not products of matrices: those may run in bf16 or TF32, too coarse for a difference of moments.
    weights = weights.float()
    x, y = coordinates[0, :1].flatten(), coordinates[1, :, :1].flatten()
    along_x, along_y = weights.sum(-2), weights.sum(-1)
    mx, my = (along_x * x).sum(-1, keepdim=True), (along_y * y).sum(-1, keepdim=True)
    xx, yy = (along_x * (x - mx).square()).sum(-1), (along_y * (y - my).square()).sum(-1)
    xy = ((weights * x).sum(-1) * (y - my)).sum(-1)
    mx, my = mx.squeeze(-1), my.squeeze(-1)
    # A standard deviation grows with the size; a variance would drown the small ones.
    sx, sy = xx.clamp(min=1e-6).sqrt(), yy.clamp(min=1e-6).sqrt()
    return torch.stack((mx, my, sx, sy, xy), -1).flatten(1)


def _attend(features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the pixels of each frame: pooled features `[n, maps * c]` and the maps `[n, maps, h, w]`."""
    maps = logits.float().flatten(2).softmax(-1)
    pooled = torch.einsum("nmp,ncp->nmc", maps.to(features.dtype), features.flatten(2))
    return pooled.flatten(1), maps.view(logits.shape)


class ObjectNet(nn.Module):
    """The object of one colour: shape, size, texture, motion, speed, order."""

    MAPS = 4

    def __init__(self, config: CheckerConfig):
        super().__init__()
        w = config.width
        self.stem = nn.Conv2d(8, w, 5, stride=2, padding=2, bias=False)
        self.stem_norm = nn.BatchNorm2d(w)
        self.color = nn.Embedding(len(grammar.COLORS), w)
        nn.init.zeros_(self.color.weight)
        self.block1 = _Block(w)
        self.down2 = _down(w, 2 * w)
        self.block2 = _Block(2 * w)
        self.mix2 = _FrameMix(2 * w)
        self.attend2 = nn.Conv2d(2 * w, 2, 1)
        self.down3 = _down(2 * w, 4 * w)
        self.mix3 = _FrameMix(4 * w)
        self.block3 = _Block(4 * w)
        self.attend3 = nn.Conv2d(4 * w, self.MAPS, 1)
        self.likeness2 = nn.Parameter(torch.full((2,), 4.0))
        self.likeness3 = nn.Parameter(torch.tensor([4.0, 4.0, 2.0, 0.0][: self.MAPS]))
        channels = 2 * 2 * w + self.MAPS * 4 * w + 4 * w + (2 + self.MAPS) * 5 + 2 * 6
        self.temporal = _Temporal(channels, config.temporal_width)
        self.heads = _Heads(2 * config.temporal_width, {k: len(v) for k, v in OBJECT_HEADS.items()})

    def forward(self, frames: Tensor, rgb: Tensor, color_index: Tensor) -> dict[str, Tensor]:
        """Logits of each head, `[n, classes]`.

        Args:
            frames: `[n, frames, 3, h, w]`, float32.
            rgb: Of the colour asked for, `[n, 3]` in [-1, 1].
            color_index: `[n]`.
        """
        n, t, _, h, w = frames.shape
        grid = _coordinates(h, w, frames.device)
        likeness = color_likeness(frames, rgb)  # [n, t, 3, h, w]
        x = torch.cat((frames, likeness, grid.expand(n, t, -1, -1, -1)), 2).flatten(0, 1)
        x = x.contiguous(memory_format=torch.channels_last)
        near = likeness[:, :, [0, 2]].flatten(0, 1)
        area = near.mean((2, 3))
        own = _moments(near / (near.sum((2, 3), keepdim=True) + 1e-3), grid)
        bias = self.color(color_index).repeat_interleave(t, 0)[:, :, None, None]
        x = F.relu(self.stem_norm(self.stem(x)) + bias)
        x = self.down2(self.block1(x))
        x = self.mix2(self.block2(x), t)
        near = F.adaptive_avg_pool2d(near.amax(1, keepdim=True), x.shape[-2:])
        pooled2, maps2 = _attend(x, self.attend2(x) + self.likeness2.view(1, -1, 1, 1) * near)
        grid2 = F.adaptive_avg_pool2d(grid, x.shape[-2:])
        x = self.down3(x)
        x = self.block3(self.mix3(x, t))
        near = F.adaptive_avg_pool2d(near, x.shape[-2:])
        pooled3, maps3 = _attend(x, self.attend3(x) + self.likeness3.view(1, -1, 1, 1) * near)
        grid3 = F.adaptive_avg_pool2d(grid, x.shape[-2:])
        moments = (_moments(maps2, grid2), _moments(maps3, grid3), own, area.sqrt())
        row = torch.cat([p.float() for p in (pooled2, pooled3, x.mean((2, 3)), *moments)], 1)
        return self.heads(self.temporal(row.unflatten(0, (n, t))))


class SceneNet(nn.Module):
    """Which colours are there; background, its texture, and the camera's pan."""

    def __init__(self, config: CheckerConfig):
        super().__init__()
        w, colors = config.scene_width, len(grammar.COLORS)
        self.stem = nn.Sequential(
            nn.Conv2d(3 + colors + 2, w, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(w), nn.ReLU()
        )
        self.down2 = _down(w, 2 * w)
        self.mix2 = _FrameMix(2 * w)
        self.block2 = _Block(2 * w)
        self.mix2b = _FrameMix(2 * w)
        self.down3 = _down(2 * w, 3 * w)
        self.mix3 = _FrameMix(3 * w)
        channels = 2 * 3 * w + 2 * w + 4 * colors
        self.temporal = _Temporal(channels, 3 * w)
        sizes = {"present": colors} | {k: len(v) for k, v in SCENE_HEADS.items()}
        self.heads = _Heads(2 * 3 * w, sizes, 128)
        # The same question for every colour: how much of the frames has it, and where most.
        self.presence = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, frames: Tensor, palette: Tensor) -> dict[str, Tensor]:
        """Logits: `present [n, 8]` and one `[n, classes]` for each head, from `[n, frames, 3, h, w]` float32."""
        n, t, _, h, w = frames.shape
        grid = _coordinates(h, w, frames.device)
        near = torch.stack([_near(frames, c, 0.3) for c in palette], 2)  # [n, t, 8, h, w]
        x = torch.cat((frames, near, grid.expand(n, t, -1, -1, -1)), 2).flatten(0, 1)
        near = near.flatten(0, 1)
        close = near.square().square()  # the same with half the spread
        areas = [5 * near.mean((2, 3)).sqrt(), F.avg_pool2d(near, 4).amax((2, 3))]
        areas += [5 * close.mean((2, 3)).sqrt(), F.avg_pool2d(close, 2).amax((2, 3))]
        of_color = torch.stack(areas, -1).unflatten(0, (n, t))  # [n, t, 8, 4]
        areas = torch.cat(areas, 1)
        x = self.down2(self.stem(x.contiguous(memory_format=torch.channels_last)))
        x = self.mix2b(self.block2(self.mix2(x, t)), t)
        shallow = x.mean((2, 3))
        x = self.mix3(self.down3(x), t)
        row = torch.cat([p.float() for p in (x.mean((2, 3)), x.amax((2, 3)), shallow, areas)], 1)
        logits = self.heads(self.temporal(row.unflatten(0, (n, t))))
        evidence = self.presence(torch.cat((of_color.mean(1), of_color.amax(1)), -1)).squeeze(-1).float()
        return logits | {"present": logits["present"] + evidence}


def _near(frames: Tensor, color: Tensor, spread: float) -> Tensor:
    """1 where a pixel has the colour, falling off with the distance in RGB; colour `[..., 3]` in [-1, 1]."""
    d = frames - color[..., :, None, None]
    return torch.exp(-d.square().sum(-3) / (2 * spread**2))


def color_likeness(frames: Tensor, rgb: Tensor) -> Tensor:
    """How much each pixel looks like a colour, its shaded form, and any brightness between.

    Args:
        frames: `[n, frames, 3, h, w]` in [-1, 1].
        rgb: `[n, 3]` in [-1, 1].

    Returns:
        `[n, frames, 3, h, w]` in [0, 1].
    """
    rgb = rgb[:, None]
    light = (rgb + 1)[..., :, None, None]
    along = ((frames + 1) * light).sum(2, keepdim=True) / light.square().sum(2, keepdim=True)
    off = (frames + 1 - along.clamp(_SHADED, 1.0) * light).square().sum(2)
    between = torch.exp(-off / (2 * 0.2**2))
    return torch.stack((_near(frames, rgb, 0.3), _near(frames, (rgb + 1) * _SHADED - 1, 0.2), between), 2)


class Checker(nn.Module):
    """Reads the attributes of clips `[B, 3, T, H, W]` in [-1, 1], of any length and size.

    `scores` are those on held-out real clips, kept in the file with the weights; None before validation.
    """

    palette: Tensor

    def __init__(self, config: CheckerConfig | None = None):
        super().__init__()
        self.config = config or CheckerConfig()
        self.scene = SceneNet(self.config)
        self.object = ObjectNet(self.config)
        rgb = torch.tensor([COLOR_RGB[c] for c in grammar.COLORS]) / 127.5 - 1
        self.register_buffer("palette", rgb, persistent=False)
        self.scores: Scores | None = None
        for module in (self.scene, self.object):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def prepare(self, clips: Tensor, stride: int = FRAME_STRIDE) -> Tensor:
        """Every `stride`-th frame at the checker's own height: `[B, frames, 3, h, w]`, float32.

        Raises:
            ConfigError: the clips have not five dimensions or not three channels.
        """
        if clips.ndim != 5 or clips.shape[1] != 3:
            raise ConfigError(f"clips must be [batch, 3, frames, height, width], got {list(clips.shape)}")
        frames = clips[:, :, ::stride].transpose(1, 2).float()
        height, width = clips.shape[-2:]
        if height != self.config.height:
            size = (self.config.height, max(8, round(width * self.config.height / height)))
            flat = F.interpolate(frames.flatten(0, 1), size, mode="bilinear", antialias=True)
            frames = flat.unflatten(0, frames.shape[:2])
        return frames.clamp(-1, 1)

    def forward(
        self, frames: Tensor, clip_index: Tensor, color_index: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logits of the scene and of the objects asked for.

        Args:
            frames: From `prepare`, `[B, frames, 3, h, w]`.
            clip_index, color_index: `[n]` int64: which clips are asked about which colours.

        Returns:
            Scene logits `[B, classes]` and object logits `[n, classes]`, float32, by head.
        """
        scene = self.scene(frames, self.palette)
        return scene, self.object(frames[clip_index], self.palette[color_index], color_index)


@contextmanager
def fixed_algorithms() -> Iterator[None]:
    """No timing of convolution algorithms: the number of objects differs from batch to batch, each a new shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
