"""Training the prompt checker on clips drawn on the fly: targets, loss, augmentation, batches, the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidsparse_pipelines.clips import grammar
from vidsparse_pipelines.clips.checker.network import (
    FRAME_STRIDE,
    IGNORED,
    OBJECT_ATTRIBUTES,
    OBJECT_HEADS,
    SCENE_HEADS,
    Checker,
    CheckerConfig,
    fixed_algorithms,
)
from vidsparse_pipelines.clips.grammar import ClipSpec, sample_split
from vidsparse_pipelines.clips.renderer import GROUND_FIELDS, Params, every_nth_frame, render, sample_params


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
    ground = torch.full((2 * len(rows), len(GROUND_FIELDS)), -1.0, device=device)
    ground[:, GROUND_FIELDS.index("texture")] = 0
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
        with fixed_algorithms():
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
