"""Read the attributes of a clip back from its pixels: a small classifier, trained on the clips that we draw.

Objects of one clip have distinct colours, so a colour names an object. `SceneNet` says which colours are there and
what the background does; `ObjectNet` is asked about one colour at a time and sees, beside the pixels, how much each
looks like that colour. Its weights are therefore shared by all colours.

Colour, place and outline of an object come from soft attention over each frame; a temporal network reads the motion
from how they change. Clips are looked at every fourth frame and at one frame height, whatever their own is.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vidsparse.errors import ConfigError, ModelLoadError
from vidsparse_pipelines.clips import grammar
from vidsparse_pipelines.clips.grammar import ClipSpec, sample_split
from vidsparse_pipelines.clips.renderer import _FIELDS, _GROUND_FIELDS, COLOR_RGB, Params, render, sample_params

#: Frames between two that the checker looks at.
FRAME_STRIDE = 4
#: Where the trained checker is kept in the package.
DEFAULT_PATH = Path(__file__).with_name("checker.safetensors")

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


# ------------------------------------------------------------------------------------------------------------ targets


def targets_from_specs(specs: Sequence[ClipSpec]) -> dict[str, Tensor]:
    """What the checker should say about clips.

    Returns:
        `present`: `[B, 8]` float32, by colour. Each of `OBJECT_HEADS`: `[B, 8]` int64 by colour, `IGNORED` (-100)
        where the colour is absent, for the speed of a still object, and for the order of objects that the caption
        does not order. Each of `SCENE_HEADS`: `[B]` int64.
    """
    colors = len(grammar.COLORS)
    present = torch.zeros(len(specs), colors)
    objects = {name: [[IGNORED] * colors for _ in specs] for name in OBJECT_HEADS}
    for row, spec in enumerate(specs):
        for place, o in enumerate(spec.objects):
            k = grammar.COLORS.index(o.color)
            present[row, k] = 1.0
            for name in OBJECT_ATTRIBUTES:
                if name != "speed" or o.motion != "still":
                    objects[name][row][k] = OBJECT_HEADS[name].index(getattr(o, name))
            if spec.relation == "in front of":
                objects["order"][row][k] = place
    scene = {name: torch.tensor([v.index(getattr(s, name)) for s in specs]) for name, v in SCENE_HEADS.items()}
    return {"present": present} | {name: torch.tensor(v) for name, v in objects.items()} | scene


def queries_from_specs(specs: Sequence[ClipSpec]) -> tuple[Tensor, Tensor]:
    """The (clip, colour) pairs of all objects, `[n]` int64 each."""
    pairs = [(i, grammar.COLORS.index(o.color)) for i, s in enumerate(specs) for o in s.objects]
    clip, color = torch.tensor(pairs).unbind(1)
    return clip, color


def checker_loss(
    scene: dict[str, Tensor],
    objects: dict[str, Tensor],
    targets: dict[str, Tensor],
    clip_index: Tensor,
    color_index: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over heads of the mean cross-entropy where the target is defined, and its parts."""
    weight = targets.get("present_weight", torch.ones_like(targets["present"]))
    present = F.binary_cross_entropy_with_logits(scene["present"], targets["present"], weight)
    parts = {"present": 4 * present}
    for name in SCENE_HEADS:
        parts[name] = F.cross_entropy(scene[name], targets[name])
    for name in OBJECT_HEADS:
        wanted = targets[name][clip_index, color_index]
        total = F.cross_entropy(objects[name], wanted, ignore_index=IGNORED, reduction="sum")
        parts[name] = total / (wanted != IGNORED).sum().clamp(min=1)
    return torch.stack(list(parts.values())).sum(), parts


# ----------------------------------------------------------------------------------------------------------- training


def every_nth_frame(params: Params, stride: int) -> Params:
    """Params whose frame t is frame `stride * t` of the clip, so that only the frames looked at are drawn."""
    objects, ground = params.objects.clone(), params.ground.clone()
    for name in ("vx", "vy", "rate", "spin"):
        objects[:, :, _FIELDS.index(name)] *= stride
    for name in ("vx", "vy"):
        ground[:, _GROUND_FIELDS.index(name)] *= stride
    return Params(objects, ground, params.shapes)


def _training_spec(rng: Random) -> ClipSpec:
    """A clip of the training split; sometimes one whose front object is the larger one.

    By the grammar the object behind is always large, so that size alone would give the order away.
    """
    while True:
        spec = sample_split(rng, held_out=False)
        if spec.relation == "in front of" and rng.random() < 0.4:
            objects = tuple(replace(o, size=rng.choice(grammar.SIZES)) for o in spec.objects)
            spec = replace(spec, objects=objects)
        if not grammar.is_held_out(spec):
            return spec


def _mark_overlaps(targets: dict[str, Tensor], specs: Sequence[ClipSpec], params: Params, num_frames: int) -> None:
    """Set the order where two objects are seen to touch, drop what is hidden; in place, on the device of `params`.

    Both objects are drawn alone, small, on black.
    """
    rows = [i for i, s in enumerate(specs) if len(s.objects) == 2]
    if not rows:
        return
    device = params.objects.device
    index = torch.tensor(rows, device=device)
    color = torch.tensor([[grammar.COLORS.index(o.color) for o in specs[i].objects] for i in rows], device=device)
    ground = torch.full((2 * len(rows), len(_GROUND_FIELDS)), -1.0, device=device)
    ground[:, _GROUND_FIELDS.index("texture")] = 0
    shapes = params.shapes[rows]
    none = torch.full_like(shapes[:, 0], -1)
    alone = torch.cat((torch.stack((none, shapes[:, 1]), 1), torch.stack((shapes[:, 0], none), 1)))
    height, width = 24, 36
    drawn = render(Params(params.objects[index].repeat(2, 1, 1), ground, alone), num_frames, height, width)
    front, back = (drawn.amax(1) > -0.75).chunk(2)  # [pairs, frames, h, w]
    both = (front & back).sum((2, 3)).float()
    size_front, size_back = front.sum((2, 3)).float(), back.sum((2, 3)).float()
    overlap = (both / torch.minimum(size_front, size_back).clamp(min=8)).sum(1)
    grown = F.max_pool2d(front.float(), 3, 1, 1) > 0
    apart = (grown & back).sum((1, 2, 3)) == 0
    in_sight = size_back > 8
    clear = in_sight & ((size_back - both) > 0.35 * size_back)
    visible = clear.sum(1) > 0.5 * in_sight.sum(1)
    for place in (0, 1):
        k = color[:, place]
        order = torch.where(apart, 2, torch.where((overlap > 0.6) & visible, place, IGNORED))
        targets["order"][index, k] = order
        if place == 1:
            for name in OBJECT_ATTRIBUTES:
                targets[name][index, k] = torch.where(visible, targets[name][index, k], IGNORED)
            targets["present_weight"][index, k] = visible.float()


def augment(frames: Tensor) -> Tensor:
    """Make drawn frames a little like generated ones, each clip in its own measure: `[B, frames, 3, h, w]`.

    Blur, loss of detail as from compression, ghosts of neighbouring frames, brightness, contrast, colour cast, noise.
    """
    b, t, c, h, w = frames.shape

    def amount(low: float, high: float, share: float = 1.0, shape: tuple[int, ...] = (1, 1, 1, 1)) -> Tensor:
        value = torch.empty(b, *shape, device=frames.device).uniform_(low, high)
        return value * (torch.rand(b, *([1] * len(shape)), device=frames.device) < share)

    flat = frames.flatten(0, 1)
    blurred = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, 1).view_as(frames)
    frames = torch.lerp(frames, blurred, amount(0, 0.9, 0.5))
    coarse = F.interpolate(F.avg_pool2d(flat, 2), (h, w), mode="bilinear").view_as(frames)
    frames = torch.lerp(frames, coarse, amount(0, 0.8, 0.25))
    ghost = torch.cat((frames[:, :1], frames[:, :-1]), 1)
    frames = torch.lerp(frames, ghost, amount(0, 0.15, 0.25))
    frames = (frames + 1) * (1 + amount(-0.1, 0.1, 0.7)) - 1 + amount(-0.06, 0.06, 0.7)
    frames = frames + amount(-0.05, 0.05, 0.5, (1, 3, 1, 1))
    frames = frames + torch.randn_like(frames) * amount(0, 0.08, 0.6)
    return frames.clamp(-1, 1)


@dataclass
class _Batch:
    frames: Tensor  # [B, frames, 3, h, w]
    targets: dict[str, Tensor]
    clip: Tensor
    color: Tensor


@dataclass(frozen=True)
class TrainingSizes:
    """How clips are drawn for training.

    small, large: frame sizes (height, width); lengths: frame counts with their weights.
    batch_small, batch_large: clips a step; two steps in three are of the small size.
    fresh: how many clips pass through `corrupt` in each step of every `corrupt_every`-th group of three.
    pool: how many of these are kept for each size; they make up the share `replayed` of a batch.
    """

    small: tuple[int, int] = (64, 96)
    large: tuple[int, int] = (96, 160)
    lengths: tuple[tuple[int, float], ...] = ((81, 0.85), (49, 0.15))
    batch_small: int = 128
    batch_large: int = 96
    corrupt_every: int = 4
    fresh: int = 24
    pool: int = 1536
    replayed: float = 0.3
    learning_rate: float = 2e-3


@dataclass
class _Plan:
    """A training batch before it is drawn, on the CPU."""

    size: tuple[int, int]
    num_frames: int
    specs: list[ClipSpec]
    params: Params
    targets: dict[str, Tensor]
    corrupt: _Plan | None = None  # clips to add to the pool
    old: list[tuple[ClipSpec, Tensor, dict[str, Tensor]]] = field(default_factory=list)  # clips from the pool


class _Source:
    """Draws training batches on the device; clips that passed through `corrupt` are kept and used several times.

    `plan` works on the CPU alone, to be called while the device is busy with the batch before.
    """

    def __init__(
        self,
        checker: Checker,
        device: torch.device,
        sizes: TrainingSizes,
        rng: Random,
        corrupt: Callable[[Tensor], Tensor] | None,
    ):
        self.checker, self.device, self.sizes, self.rng, self.corrupt = checker, device, sizes, rng, corrupt
        self.pools: dict[tuple[int, int], list[tuple[ClipSpec, Tensor, dict[str, Tensor]]]] = {}

    def _plan_clips(self, count: int, size: tuple[int, int], num_frames: int) -> _Plan:
        specs = [_training_spec(self.rng) for _ in range(count)]
        return _Plan(size, num_frames, specs, sample_params(specs, self.rng, *size), targets_from_specs(specs))

    def plan(self, step: int) -> _Plan:
        s = self.sizes
        large = step % 3 == 2
        size, count = (s.large, s.batch_large) if large else (s.small, s.batch_small)
        num_frames = self.rng.choices([n for n, _ in s.lengths], [w for _, w in s.lengths])[0]
        longest = max(n for n, _ in s.lengths)
        pool = self.pools.setdefault(size, [])
        old = self.rng.sample(pool, min(len(pool), int(count * s.replayed))) if num_frames == longest else []
        plan = self._plan_clips(count - len(old), size, num_frames)
        plan.old = old
        if self.corrupt is not None and (step // 3) % s.corrupt_every == 0:
            plan.corrupt = self._plan_clips(max(1, s.fresh // 2) if large else s.fresh, size, longest)
        return plan

    def _draw(self, plan: _Plan, corrupt: bool) -> tuple[Tensor, dict[str, Tensor]]:
        params = plan.params.to(self.device)
        looked_at = (plan.num_frames - 1) // FRAME_STRIDE + 1
        sparse = every_nth_frame(params, FRAME_STRIDE)
        if corrupt and self.corrupt is not None:
            frames = self.checker.prepare(self.corrupt(render(params, plan.num_frames, *plan.size)))
        else:
            frames = self.checker.prepare(render(sparse, looked_at, *plan.size), stride=1)
        targets = {k: v.to(self.device) for k, v in plan.targets.items()}
        targets["present_weight"] = torch.ones_like(targets["present"])
        _mark_overlaps(targets, plan.specs, sparse, looked_at)
        return frames, targets

    def batch(self, plan: _Plan) -> _Batch:
        if plan.corrupt is not None:
            frames, targets = self._draw(plan.corrupt, True)
            pool = self.pools[plan.size]
            for i, spec in enumerate(plan.corrupt.specs):
                pool.append((spec, frames[i].clone(), {k: v[i] for k, v in targets.items()}))
            del pool[: -self.sizes.pool]
        frames, targets = self._draw(plan, False)
        specs = plan.specs + [spec for spec, _, _ in plan.old]
        if plan.old:
            frames = torch.cat((frames, torch.stack([f for _, f, _ in plan.old])))
            targets = {k: torch.cat((v, torch.stack([o[k] for _, _, o in plan.old]))) for k, v in targets.items()}
        clip, color = self._queries(specs)
        return _Batch(augment(frames), targets, clip.to(self.device), color.to(self.device))

    def _queries(self, specs: list[ClipSpec]) -> tuple[Tensor, Tensor]:
        """Always one and a half for each clip, leaving some out or asking some twice: shapes must not change."""
        clip, color = queries_from_specs(specs)
        wanted = len(specs) * 3 // 2
        order = list(range(len(clip)))
        self.rng.shuffle(order)
        chosen = torch.tensor([order[i % len(order)] for i in range(wanted)])
        return clip[chosen], color[chosen]


@contextmanager
def _fixed_algorithms() -> Iterator[None]:
    """No timing of convolution algorithms: the number of objects differs from batch to batch, each a new shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def train_checker(
    device: torch.device | str,
    seconds: float,
    *,
    seed: int,
    corrupt: Callable[[Tensor], Tensor] | None = None,
    log: Callable[[str], None] = print,
    checkpoint: Path | str | None = None,
    config: CheckerConfig | None = None,
    sizes: TrainingSizes | None = None,
) -> Checker:
    """Train a checker on clips drawn on the fly.

    Args:
        device: Where to train.
        seconds: Wall clock; the learning rate falls linearly to 0 with the share of it that is spent.
        seed: Of the weights and of the clips. The number of steps depends on the machine, so the result does too.
        corrupt: Called with whole clips `[B, 3, T, H, W]` in [-1, 1], returns the same shape: passes a share of the
            clips through the trained VAE, say. None for none.
        log: Takes one line at a time.
        checkpoint: File to go on from, and to save to twice a minute and at the end; None for none.
        config: Size of the network.
        sizes: Sizes of clips and batches.

    Returns:
        The checker in eval mode on `device`.
    """
    device, sizes = torch.device(device), sizes or TrainingSizes()
    torch.manual_seed(seed)
    checker = Checker(config).to(device).train()
    optimizer = torch.optim.AdamW(
        checker.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    step, spent = 0, 0.0
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None and path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        checker.load_state_dict(state["checker"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]

    def save() -> None:
        if path is not None:
            state = {"checker": checker.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            temporary = path.with_name(path.name + ".tmp")
            torch.save(state | {"spent": spent}, temporary)
            temporary.replace(path)

    source = _Source(checker, device, sizes, Random(f"checker {seed} {step}"), corrupt)
    saved_at, logged_at = spent, -math.inf
    first, clips = spent, 0
    mark = time.monotonic()
    plan = source.plan(step)
    while spent < seconds:
        share = spent / seconds
        for group in optimizer.param_groups:
            group["lr"] = sizes.learning_rate * min(1.0, (step + 1) / 60) * (1 - share)
        batch = source.batch(plan)
        with _fixed_algorithms():
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                scene, objects = checker(batch.frames, batch.clip, batch.color)
            loss, parts = checker_loss(scene, objects, batch.targets, batch.clip, batch.color)
            loss.backward()
        nn.utils.clip_grad_norm_(checker.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        plan = source.plan(step + 1)
        step += 1
        clips += batch.frames.shape[0]
        if device.type == "cuda" and step % 10 == 0:
            torch.cuda.synchronize()  # or the clock would run behind the queue
        now = time.monotonic()
        spent, mark = spent + now - mark, now
        if spent - logged_at > max(2.0, seconds / 30):
            logged_at = spent
            each = " ".join(f"{k} {v.item():.3f}" for k, v in parts.items())
            log(
                f"checker {spent / seconds:.0%} step {step} {clips / (spent - first):.0f} clips/s loss {loss.item():.3f}: {each}"
            )
        if spent - saved_at > 30:
            save()
            saved_at = spent
    save()
    return checker.eval()


# ------------------------------------------------------------------------------------------------- reading and scoring


@dataclass(frozen=True)
class Share:
    """`right` of `count`."""

    right: int
    count: int

    @property
    def value(self) -> float:
        return self.right / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (Wilson 1927): it stays within [0, 1] and is right near the ends."""
        if not self.count:
            return (0.0, 1.0)
        z, n, p = 1.959964, self.count, self.value
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (max(0.0, middle - half), min(1.0, middle + half))

    def __str__(self) -> str:
        if not self.count:
            return "none"
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}] of {self.count}"


@dataclass(frozen=True)
class Scores:
    """How often clips show what their specs say.

    attributes: by name. `color`, `shape`, `size`, `texture`, `motion` and `speed` count objects (`speed`: moving ones
        only), the others clips (`order`: "in front of" only; `count`: the number of colours seen). Attributes of an
        object whose colour is not seen are wrong.
    all_right: clips with everything right. one_object, two_objects: the same, by the number of objects asked for.
    right: of each clip, whether all is right, in order.
    """

    attributes: dict[str, Share]
    all_right: Share
    one_object: Share
    two_objects: Share
    right: tuple[bool, ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, object]:
        """Plain numbers for JSON, without the verdict of each clip."""

        def plain(s: Share) -> dict[str, object]:
            value = None if not s.count else round(s.value, 4)
            return {"right": s.right, "count": s.count, "share": value, "wilson95": [round(v, 4) for v in s.interval]}

        return {
            "attributes": {k: plain(v) for k, v in self.attributes.items()},
            "all_right": plain(self.all_right),
            "one_object": plain(self.one_object),
            "two_objects": plain(self.two_objects),
        }

    @classmethod
    def sum(cls, parts: Sequence[Scores]) -> Scores:
        """Scores of several batches together."""

        def add(shares: Sequence[Share]) -> Share:
            return Share(sum(s.right for s in shares), sum(s.count for s in shares))

        names = list(dict.fromkeys(name for p in parts for name in p.attributes))
        return cls(
            {name: add([p.attributes[name] for p in parts if name in p.attributes]) for name in names},
            add([p.all_right for p in parts]),
            add([p.one_object for p in parts]),
            add([p.two_objects for p in parts]),
            tuple(ok for p in parts for ok in p.right),
        )

    @classmethod
    def from_dict(cls, data: dict) -> Scores:
        def share(d: dict) -> Share:
            return Share(d["right"], d["count"])

        return cls(
            {k: share(v) for k, v in data["attributes"].items()},
            share(data["all_right"]),
            share(data["one_object"]),
            share(data["two_objects"]),
        )

    def __str__(self) -> str:
        lines = [f"all attributes {self.all_right}; one object {self.one_object}; two objects {self.two_objects}"]
        return "; ".join(lines + [f"{k} {v}" for k, v in self.attributes.items()])


@torch.no_grad()
@_fixed_algorithms()
def _read(checker: Checker, frames: Tensor, asked: Sequence[Sequence[int]] | None = None) -> list[dict]:
    """Attributes of prepared frames; objects are those seen, and those of the colours `asked` about."""
    scene = checker.scene(frames, checker.palette)
    seen = (scene["present"] > 0).tolist()
    pairs = [(i, k) for i, row in enumerate(seen) for k in range(len(row)) if row[k] or (asked and k in asked[i])]
    names = {head: scene[head].argmax(1).tolist() for head in SCENE_HEADS}
    clips: list[dict] = [
        {"objects": [], "count": sum(row)} | {h: v[names[h][i]] for h, v in SCENE_HEADS.items()}
        for i, row in enumerate(seen)
    ]
    if pairs:
        clip, color = torch.tensor(pairs, device=frames.device).unbind(1)
        logits = checker.object(frames[clip], checker.palette[color], color)
        choice = {head: v.argmax(1).tolist() for head, v in logits.items()}
        order = logits["order"].log_softmax(1).tolist()
        for row, (i, k) in enumerate(pairs):
            o = {"color": grammar.COLORS[k], "seen": bool(seen[i][k])}
            o |= {head: OBJECT_HEADS[head][choice[head][row]] for head in OBJECT_ATTRIBUTES}
            o["speed"] = "normal" if o["motion"] == "still" else o["speed"]
            clips[i]["objects"].append(o | {"order": ORDERS[choice["order"][row]], "_order": order[row]})
    return clips


def _front(a: dict, b: dict) -> str | None:
    """Colour of the one in front; None where neither is seen to touch the other."""
    (af, ab, apart_a), (bf, bb, apart_b) = a["_order"], b["_order"]
    odds = af + bb - ab - bf
    if apart_a + apart_b > max(af + bb, ab + bf):
        return None
    return a["color"] if odds > 0 else b["color"]


def read_attributes(checker: Checker, clips: Tensor, batch_size: int = 32) -> list[dict]:
    """What is to be seen in clips.

    Args:
        checker: In eval mode.
        clips: `[B, 3, T, H, W]` in [-1, 1] at 16 frames a second, on any device.
        batch_size: Clips looked at together.

    Returns:
        For each clip `count`, `background`, `background_texture`, `pan`, `front` (a colour, or None unless two
        objects are seen to overlap) and `objects`: a list of dicts with `color`, `shape`, `size`, `texture`,
        `motion` and `speed`.

    Raises:
        ConfigError: the clips have not five dimensions or not three channels.
    """
    device = checker.palette.device
    result = []
    for part in clips.split(batch_size):
        for clip in _read(checker, checker.prepare(part.to(device))):
            objects = clip["objects"]
            clip["front"] = _front(*objects) if len(objects) == 2 else None
            clip["objects"] = [{k: o[k] for k in ("color", *OBJECT_ATTRIBUTES)} for o in objects]
            result.append(clip)
    return result


def _score_frames(checker: Checker, batches, specs: Sequence[ClipSpec]) -> Scores:
    names = ("count", "color", *OBJECT_ATTRIBUTES, "order", *SCENE_HEADS)
    tally: dict[str, list[bool]] = {name: [] for name in names}
    verdicts: list[bool] = []
    rest = iter(specs)
    for frames in batches:
        part = [next(rest) for _ in range(frames.shape[0])]
        asked = [[grammar.COLORS.index(o.color) for o in s.objects] for s in part]
        for spec, clip in zip(part, _read(checker, frames, asked), strict=True):
            found = {o["color"]: o for o in clip["objects"]}
            checks = [("count", clip["count"] == len(spec.objects))]
            for o in spec.objects:
                got = found[o.color]
                checks.append(("color", got["seen"]))
                for name in OBJECT_ATTRIBUTES:
                    if name != "speed" or o.motion != "still":
                        checks.append((name, got["seen"] and got[name] == getattr(o, name)))
            if spec.relation == "in front of":
                a, b = (found[o.color] for o in spec.objects)
                checks.append(("order", a["seen"] and b["seen"] and _front(a, b) == a["color"]))
            checks += [(name, clip[name] == getattr(spec, name)) for name in SCENE_HEADS]
            for name, ok in checks:
                tally[name].append(ok)
            verdicts.append(all(ok for _, ok in checks))

    def share(values: Sequence[bool]) -> Share:
        return Share(sum(values), len(values))

    one = [ok for ok, s in zip(verdicts, specs, strict=True) if len(s.objects) == 1]
    two = [ok for ok, s in zip(verdicts, specs, strict=True) if len(s.objects) == 2]
    attributes = {name: share(values) for name, values in tally.items()}
    return Scores(attributes, share(verdicts), share(one), share(two), tuple(verdicts))


def score(checker: Checker, clips: Tensor, specs: Sequence[ClipSpec], batch_size: int = 32) -> Scores:
    """How well clips show their specs; report it beside `checker.scores`, its own on real clips.

    Args:
        checker: In eval mode.
        clips: `[B, 3, T, H, W]` in [-1, 1], on any device.
        specs: What each should show.
        batch_size: Clips looked at together.

    Raises:
        ConfigError: there is not one spec for each clip, or the clips have a wrong shape.
    """
    if len(specs) != clips.shape[0]:
        raise ConfigError(f"score needs one spec for each clip, got {len(specs)} specs for {clips.shape[0]} clips")
    device = checker.palette.device
    return _score_frames(checker, (checker.prepare(p.to(device)) for p in clips.split(batch_size)), specs)


def validate_checker(
    checker: Checker,
    device: torch.device | str,
    num_clips: int = 2000,
    *,
    sizes: Sequence[tuple[int, int]] = ((64, 96), (96, 160)),
    num_frames: int = 81,
    seed: int = 1,
    corrupt: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Score the checker on real clips of the held-out split, the sizes (height, width) in equal parts.

    Args:
        checker: In eval mode, on `device`.
        device: Where to draw.
        num_clips: Clips in all.
        sizes: Frame sizes.
        num_frames: Length of a clip.
        seed: Of the clips.
        corrupt: As in `train_checker`; where given, every clip passes through it.

    Returns:
        The scores, also kept as `checker.scores` unless `corrupt` is given.
    """
    rng = Random(f"validate checker {seed}")
    counts = [len(range(i, num_clips, len(sizes))) for i in range(len(sizes))]
    chunk = 64 if corrupt is None else 16
    plan = [(size, min(chunk, n - i)) for size, n in zip(sizes, counts, strict=True) for i in range(0, n, chunk)]
    specs: list[ClipSpec] = []
    parts = [[sample_split(rng, held_out=True) for _ in range(n)] for _, n in plan]

    def batches():
        for (size, _), part in zip(plan, parts, strict=True):
            params = sample_params(part, rng, *size).to(device)
            if corrupt is not None:
                yield checker.prepare(corrupt(render(params, num_frames, *size)))
            else:
                drawn = render(every_nth_frame(params, FRAME_STRIDE), (num_frames - 1) // FRAME_STRIDE + 1, *size)
                yield checker.prepare(drawn, stride=1)

    for part in parts:
        specs += part
    scores = _score_frames(checker, batches(), specs)
    if corrupt is None:
        checker.scores = scores
    return scores


# --------------------------------------------------------------------------------------------------------------- files


def save_checker(checker: Checker, path: Path | str = DEFAULT_PATH, scores: Scores | None = None) -> None:
    """Write weights (fp16; running statistics fp32), configuration and scores to one safetensors file.

    Args:
        checker: What to save.
        path: The file; it is written under a temporary name, then renamed.
        scores: On held-out real clips; `checker.scores` where not given.
    """
    scores = scores or checker.scores
    metadata = {"format": "vidsparse-checker-1", "config": json.dumps(checker.config.__dict__)}
    if scores is not None:
        metadata["scores"] = json.dumps(scores.as_dict())
    tensors = {
        k: v.detach()
        .cpu()
        .to(torch.float16 if v.is_floating_point() and "running_" not in k else v.dtype)
        .contiguous()
        for k, v in checker.state_dict().items()
    }
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata)
    temporary.chmod(0o644)
    temporary.replace(path)


def load_checker(path: Path | str | None = None, device: torch.device | str = "cpu") -> Checker:
    """Read a checker, in eval mode and float32.

    Args:
        path: File of `save_checker`; the one in the package where None.
        device: Where to put it.

    Raises:
        ModelLoadError: the file is missing or is not a checker.
    """
    file = Path(path) if path is not None else DEFAULT_PATH
    if not file.is_file():
        raise ModelLoadError(
            f"There is no prompt checker at {str(file)!r}; give the path of one, or train one with "
            "scripts/train_tiny_model.py --checker FILE."
        )
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            checker = Checker(CheckerConfig(**json.loads(metadata["config"])))
            checker.load_state_dict({k: f.get_tensor(k).float() for k in f.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise ModelLoadError(
            f"{str(file)!r} is not a readable prompt checker ({reason}); train one with "
            "scripts/train_tiny_model.py --checker FILE."
        ) from error
    if "scores" in metadata:
        checker.scores = Scores.from_dict(json.loads(metadata["scores"]))
    return checker.to(device).eval()
