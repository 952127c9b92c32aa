"""Draw clips from their specs: signed distance functions with one-pixel anti-aliasing, vectorised over clips.

Lengths are fractions of the frame height (x runs from 0 to width/height), times are frames, angles radians. A
`Params` row holds everything continuous about a clip, so that a clip can be drawn again at any size and length:
every motion is periodic or wraps around, and frame t does not depend on how many frames are drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from vidsparse_pipelines.clips import grammar
from vidsparse_pipelines.clips.grammar import ClipSpec, ObjectSpec

#: RGB in 0..255. Objects are bright and backgrounds dark, so that every pair can be told apart.
COLOR_RGB = {
    "red": (225, 35, 35),
    "orange": (255, 140, 0),
    "yellow": (255, 230, 50),
    "green": (50, 190, 70),
    "blue": (50, 100, 255),
    "purple": (155, 55, 215),
    "pink": (255, 140, 200),
    "white": (245, 245, 245),
}
BACKGROUND_RGB = {
    "black": (16, 16, 18),
    "gray": (115, 115, 118),
    "navy": (18, 26, 92),
    "brown": (98, 64, 34),
    "teal": (10, 92, 96),
    "maroon": (98, 16, 44),
}
#: Radius of an object, in frame heights.
SIZE_RADIUS = {"small": 0.14, "medium": 0.21, "large": 0.31}
#: Frames that one turn of the reference clip lasts; speeds are per this many frames.
REFERENCE_FRAMES = 81
#: Linear motions: frame widths (or heights) per 81 frames. Periodic ones: cycles. Spins: turns.
LINEAR_SPEED = {"slow": 0.3, "normal": 0.75, "fast": 1.7}
CYCLE_SPEED = {"slow": 0.9, "normal": 2.0, "fast": 4.2}
SPIN_SPEED = {"slow": 0.35, "normal": 0.85, "fast": 2.0}
PAN_SPEED = 0.9  # frame heights per 81 frames
WRAP_MARGIN = 1.2  # radii beyond the edge at which an object is wholly out of sight
GROUND_CELL = 0.25  # side of a background cell, in frame heights

#: Columns of `Params.objects`: what draws one object.
FIELDS: tuple[str, ...] = tuple("shape texture r g b radius x y vx vy ax ay hop rate phase angle spin pulse".split())
#: Columns of `Params.ground`: what draws the background.
GROUND_FIELDS: tuple[str, ...] = tuple("texture r g b x y vx vy".split())


@dataclass(frozen=True)
class Params:
    """Numbers that draw a batch of clips.

    objects: `[clips, 2, 18]` float32, back object first.
    ground: `[clips, 8]` float32.
    shapes: `[clips, 2]` int64, -1 where there is no object. Always on the CPU: drawing goes shape by shape, and
        asking the device which clips have one would stall it.
    """

    objects: Tensor
    ground: Tensor
    shapes: Tensor

    def to(self, device: torch.device | str) -> Params:
        return Params(self.objects.to(device), self.ground.to(device), self.shapes)

    def __getitem__(self, index: slice) -> Params:
        return Params(self.objects[index], self.ground[index], self.shapes[index])

    def __len__(self) -> int:
        return self.objects.shape[0]


def every_nth_frame(params: Params, stride: int) -> Params:
    """Params whose frame t is frame `stride * t` of the clip, so that only the frames looked at are drawn."""
    objects, ground = params.objects.clone(), params.ground.clone()
    for name in ("vx", "vy", "rate", "spin"):
        objects[:, :, FIELDS.index(name)] *= stride
    for name in ("vx", "vy"):
        ground[:, GROUND_FIELDS.index(name)] *= stride
    return Params(objects, ground, params.shapes)


def _object_params(o: ObjectSpec, rng: Random, aspect: float, center: tuple[float, float] | None) -> dict[str, float]:
    jitter = rng.uniform(0.93, 1.07)
    p = dict.fromkeys(FIELDS, 0.0)
    p["shape"], p["texture"] = grammar.SHAPES.index(o.shape), grammar.TEXTURES.index(o.texture)
    p["r"], p["g"], p["b"] = (c / 127.5 - 1 for c in COLOR_RGB[o.color])
    p["radius"] = radius = SIZE_RADIUS[o.size] * rng.uniform(0.95, 1.05)
    p["angle"] = rng.uniform(-math.pi, math.pi) if o.motion == "spin" else rng.uniform(-0.1, 0.1)
    p["phase"] = rng.uniform(0, 2 * math.pi)
    p["rate"] = 2 * math.pi * CYCLE_SPEED[o.speed] * jitter / REFERENCE_FRAMES
    travel = LINEAR_SPEED[o.speed] * jitter / REFERENCE_FRAMES
    reach_x = reach_y = radius  # half extent of the whole movement
    if o.motion in ("left", "right"):
        p["vx"] = travel * aspect * (-1 if o.motion == "left" else 1)
    elif o.motion in ("up", "down"):
        p["vy"] = travel * (-1 if o.motion == "up" else 1)
    elif o.motion == "bounce":
        p["hop"] = rng.uniform(0.28, 0.36)
        p["rate"] /= 2  # |sin| has half the period
        reach_y += p["hop"] / 2
    elif o.motion == "sway":
        p["ax"] = rng.uniform(0.26, 0.34)
        reach_x += p["ax"]
    elif o.motion == "circle":
        p["ax"] = p["ay"] = rng.uniform(0.17, 0.2)
        reach_x, reach_y = reach_x + p["ax"], reach_y + p["ay"]
    elif o.motion == "spin":
        p["spin"] = 2 * math.pi * SPIN_SPEED[o.speed] * jitter / REFERENCE_FRAMES * rng.choice((-1, 1))
    elif o.motion == "pulse":
        p["pulse"] = rng.uniform(0.3, 0.36)

    def inside(wish: float, reach: float, extent: float) -> float:
        return extent / 2 if 2 * reach >= extent else min(max(wish, reach), extent - reach)

    wish = center or (rng.uniform(0, aspect), rng.uniform(0, 1))
    p["x"], p["y"] = inside(wish[0], reach_x, aspect), inside(wish[1], reach_y, 1.0)
    p["y"] += p["hop"] / 2  # the hop goes up from here
    if center is None:  # a linear motion starts on the side it comes from
        if p["vx"]:
            start = rng.uniform(radius, max(radius, aspect * 0.45))
            p["x"] = start if p["vx"] > 0 else aspect - start
        if p["vy"]:
            start = rng.uniform(radius, max(radius, 0.45))
            p["y"] = start if p["vy"] > 0 else 1 - start
    return p


def _wrapped(place: float, extent: float, radius: float) -> float:
    """Where a linear motion shows: what has left the frame on one side comes back on the other."""
    margin = WRAP_MARGIN * radius
    return (place + margin) % (extent + 2 * margin) - margin


def _clip_params(spec: ClipSpec, rng: Random, aspect: float) -> tuple[list[list[float]], list[float]]:
    objects = spec.objects
    if len(objects) == 1:
        rows = [_object_params(objects[0], rng, aspect, None)]
    elif spec.relation == "and":  # side by side, or one above the other where they move sideways
        sideways = any(o.motion in ("left", "right", "sway") for o in objects)
        places = [(0.5, 0.24), (0.5, 0.76)] if sideways else [(0.27, 0.5), (0.73, 0.5)]
        rng.shuffle(places)
        rows = []
        for o, (fx, fy) in zip(objects, places, strict=True):
            p = _object_params(o, rng, aspect, (fx * aspect, fy))
            spread = rng.uniform(-0.25, 0.25)
            if sideways:
                p["x"] += spread * aspect
            else:
                p["y"] += spread
            rows.append(p)
    else:  # the front object crosses the back one at some early frame
        middle = (aspect * rng.uniform(0.4, 0.6), rng.uniform(0.42, 0.58))
        back = _object_params(objects[1], rng, aspect, middle)
        front = _object_params(objects[0], rng, aspect, middle)
        meeting = rng.uniform(8, 32)
        for axis, v, extent in (("x", "vx", aspect), ("y", "vy", 1.0)):
            place = _wrapped(back[axis] + back[v] * meeting, extent, back["radius"]) if back[v] else front[axis]
            place += rng.uniform(-0.5, 0.5) * back["radius"]
            place = min(max(place, front["radius"]), extent - front["radius"])
            front[axis] = place - front[v] * meeting
        rows = [back, front]
    if len(rows) == 1 or spec.relation == "and":
        rows = rows[::-1]
    while len(rows) < 2:
        rows.insert(0, dict.fromkeys(FIELDS, 0.0) | {"shape": -1.0, "radius": 0.1})
    ground = dict.fromkeys(GROUND_FIELDS, 0.0)
    ground["texture"] = grammar.BACKGROUND_TEXTURES.index(spec.background_texture)
    ground["r"], ground["g"], ground["b"] = (c / 127.5 - 1 for c in BACKGROUND_RGB[spec.background])
    ground["x"], ground["y"] = rng.uniform(0, 1), rng.uniform(0, 1)
    speed = PAN_SPEED * rng.uniform(0.93, 1.07) / REFERENCE_FRAMES
    ground["vx"] = {"left": speed, "right": -speed}.get(spec.pan, 0.0)
    ground["vy"] = {"up": speed, "down": -speed}.get(spec.pan, 0.0)
    return [list(r.values()) for r in rows], list(ground.values())


def sample_params(specs: list[ClipSpec], rng: Random, height: int, width: int) -> Params:
    """Choose everything a caption leaves open: places, phases, and a little spread in size and speed.

    Args:
        specs: The clips.
        rng: The source of randomness.
        height, width: Frame size in pixels; only their ratio matters.
    """
    rows = [_clip_params(s, rng, width / height) for s in specs]
    objects = torch.tensor([r[0] for r in rows])
    return Params(objects, torch.tensor([r[1] for r in rows]), objects[:, :, 0].long())


def _box(x: Tensor, y: Tensor, half_x: Tensor, half_y: Tensor) -> Tensor:
    qx, qy = x.abs() - half_x, y.abs() - half_y
    return torch.hypot(qx.clamp(min=0), qy.clamp(min=0)) + torch.maximum(qx, qy).clamp(max=0)


def _distance(shape: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance to the outline (negative inside), y pointing down."""
    if shape == "circle":
        return torch.hypot(x, y) - 0.95 * r
    if shape == "square":
        return _box(x, y, 0.84 * r, 0.84 * r)
    if shape == "triangle":
        y = y - 0.15 * r
        return torch.maximum(0.8660254 * x.abs() - 0.5 * y, y) - 0.58 * r
    if shape == "ring":
        return (torch.hypot(x, y) - 0.72 * r).abs() - 0.26 * r
    if shape == "cross":
        return torch.minimum(_box(x, y, r, 0.33 * r), _box(x, y, 0.33 * r, r))
    # five-pointed star: fold the angle into one tenth, then the distance to one edge line
    angle = torch.atan2(x, -y)
    sector = 2 * math.pi / 5
    angle = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    rho = torch.hypot(x, y)
    px, py = rho * torch.sin(angle), rho * torch.cos(angle)
    tip, notch = 1.12 * r, 0.5 * r
    nx, ny = notch * math.sin(sector / 2), notch * math.cos(sector / 2)
    ex, ey = nx, ny - tip
    length = torch.hypot(ex, ey)
    return (px * (-ey) + (py - tip) * ex) / length


def _square_wave(x: Tensor, period: Tensor | float, pixel: float) -> Tensor:
    """0/1 stripes with an edge about one pixel wide."""
    omega = 2 * math.pi / period
    return (0.5 + torch.sin(omega * x) / (omega * pixel)).clamp(0, 1)


def render(
    params: Params,
    num_frames: int,
    height: int,
    width: int,
    *,
    first_frame: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw clips.

    Args:
        params: From `sample_params`, on the device that shall draw.
        num_frames: Frames to draw.
        height, width: Frame size in pixels.
        first_frame: Index of the first frame drawn.
        dtype: Of the result; arithmetic is float32.

    Returns:
        `[clips, 3, num_frames, height, width]` in [-1, 1].
    """
    device = params.objects.device
    pixel = 1.0 / height
    aspect = width / height
    t = torch.arange(first_frame, first_frame + num_frames, device=device, dtype=torch.float32).view(1, -1, 1, 1)
    yy = ((torch.arange(height, device=device) + 0.5) * pixel).view(1, 1, -1, 1)
    xx = ((torch.arange(width, device=device) + 0.5) * pixel).view(1, 1, 1, -1)
    image = _render_ground(params.ground, t, yy, xx, pixel)
    for index in range(params.objects.shape[1]):
        rows = params.objects[:, index]
        for shape_id, shape in enumerate(grammar.SHAPES):
            chosen = (params.shapes[:, index] == shape_id).nonzero().flatten()
            if chosen.numel():
                chosen = chosen.to(device)
                f = {n: rows[chosen, i].view(-1, 1, 1, 1) for i, n in enumerate(FIELDS)}
                alpha, shade = _render_object(shape, f, t, yy, xx, pixel, aspect)
                color = torch.stack((f["r"], f["g"], f["b"]), 1)
                color = (color + 1) * (1 - 0.62 * shade.unsqueeze(1)) - 1
                image[chosen] = torch.lerp(image[chosen], color, alpha.unsqueeze(1))
    return image.to(dtype)


def _render_ground(ground: Tensor, t: Tensor, yy: Tensor, xx: Tensor, pixel: float) -> Tensor:
    f = {n: ground[:, i].view(-1, 1, 1, 1) for i, n in enumerate(GROUND_FIELDS)}
    u, v = xx - f["x"] - f["vx"] * t, yy - f["y"] - f["vy"] * t
    cell = GROUND_CELL
    checks = (_square_wave(u, 2 * cell, pixel) * 2 - 1) * (_square_wave(v, 2 * cell, pixel) * 2 - 1) * 0.5 + 0.5
    cu = torch.remainder(u, cell) - cell / 2
    cv = torch.remainder(v, cell) - cell / 2
    dots = (0.5 - (torch.hypot(cu, cv) - 0.3 * cell) / pixel).clamp(0, 1)
    slope = (1 - yy).expand_as(dots)
    kind = f["texture"]
    level = torch.where(kind == 1, slope, torch.where(kind == 2, checks, torch.where(kind == 3, dots, 0.0)))
    color = torch.stack((f["r"], f["g"], f["b"]), 1)
    light = (color + 1) * 1.25 - 1 + 0.18
    return torch.lerp(color.expand(-1, -1, *level.shape[1:]), light, level.unsqueeze(1))


def _render_object(
    shape: str, f: dict[str, Tensor], t: Tensor, yy: Tensor, xx: Tensor, pixel: float, aspect: float
) -> tuple[Tensor, Tensor]:
    """Coverage and darkening by the texture, each `[clips, frames, height, width]`."""
    theta = f["rate"] * t + f["phase"]
    radius = f["radius"] * (1 + f["pulse"] * torch.sin(theta))
    cx = f["x"] + f["vx"] * t + f["ax"] * torch.sin(theta)
    cy = f["y"] + f["vy"] * t + f["ay"] * torch.cos(theta) - f["hop"] * torch.sin(theta).abs()
    # What leaves the frame on one side comes back on the other, once it is wholly out of sight.
    margin = WRAP_MARGIN * f["radius"]
    cx = torch.where(f["vx"] == 0, cx, torch.remainder(cx + margin, aspect + 2 * margin) - margin)
    cy = torch.where(f["vy"] == 0, cy, torch.remainder(cy + margin, 1 + 2 * margin) - margin)
    angle = f["angle"] + f["spin"] * t
    cos, sin = torch.cos(angle), torch.sin(angle)
    dx, dy = xx - cx, yy - cy
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    alpha = (0.5 - _distance(shape, x, y, radius) / pixel).clamp(0, 1)
    scale = radius / f["radius"]
    period = torch.maximum(0.72 * f["radius"], torch.full_like(f["radius"], 0.11)) * scale
    stripes = _square_wave(y, period, pixel)
    cell = period * 1.1
    checks = (_square_wave(x, cell, pixel) * 2 - 1) * (_square_wave(y, cell, pixel) * 2 - 1) * 0.5 + 0.5
    shade = torch.where(f["texture"] == 1, stripes, torch.where(f["texture"] == 2, checks, 0.0))
    return alpha, shade
