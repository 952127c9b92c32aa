"""The grammar of the clips: what can be in one, and the sentences that say it.

A caption fixes every attribute: where no word is given the default holds ("a red star" is a solid star of medium
size). Speeds and sizes are relative to the frame, so one caption means the same clip at every size.

>>> import random
>>> spec = sample_spec(random.Random(0))
>>> text = caption(spec, random.Random(0))
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from random import Random

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "medium", "large")
TEXTURES = ("solid", "striped", "checkered")
MOTIONS = ("still", "left", "right", "up", "down", "bounce", "sway", "circle", "spin", "pulse")
SPEEDS = ("slow", "normal", "fast")
BACKGROUNDS = ("black", "gray", "navy", "brown", "teal", "maroon")
BACKGROUND_TEXTURES = ("plain", "gradient", "checkered", "dotted")
PANS = ("none", "left", "right", "up", "down")
RELATIONS = ("alone", "and", "in front of")

#: Third-person verb phrases of each motion; the first is the one used in examples.
VERBS = {
    "still": ("stays still", "stands still", "does not move"),
    "left": ("moves left", "slides to the left", "goes left"),
    "right": ("moves right", "slides to the right", "goes right"),
    "up": ("moves up", "rises up", "goes up"),
    "down": ("moves down", "falls down", "goes down"),
    "bounce": ("bounces", "bounces up and down", "jumps up and down"),
    "sway": ("swings left and right", "sways left and right", "moves from side to side"),
    "circle": ("moves in a circle", "circles around", "goes around in a circle"),
    "spin": ("spins", "rotates", "spins around"),
    "pulse": ("pulses", "grows and shrinks", "gets bigger and smaller"),
}
ADVERBS = {"slow": ("slowly",), "normal": ("",), "fast": ("quickly", "fast")}

#: One in this many specs is never drawn for training (see `is_held_out`).
HELD_OUT_MODULUS = 16


@dataclass(frozen=True)
class ObjectSpec:
    """One object. `speed` is "normal" for a still object."""

    shape: str
    color: str
    size: str = "medium"
    texture: str = "solid"
    motion: str = "still"
    speed: str = "normal"


@dataclass(frozen=True)
class ClipSpec:
    """One clip. With two objects of relation "in front of", `objects[0]` is the front one.

    Motions are those seen on the screen; a camera pan to the left makes the background scroll to the right.
    """

    objects: tuple[ObjectSpec, ...]
    relation: str = "alone"
    background: str = "black"
    background_texture: str = "plain"
    pan: str = "none"


def _sample_object(rng: Random, colors: list[str], sizes: tuple[str, ...]) -> ObjectSpec:
    shape = rng.choice(SHAPES)
    texture = rng.choice(("solid", "solid", "striped", "checkered"))
    motion = rng.choice(MOTIONS)
    while motion == "spin" and texture == "solid" and shape in ("circle", "ring"):
        motion = rng.choice(MOTIONS)  # nothing would be seen to turn
    speed = "normal" if motion == "still" else rng.choice(SPEEDS)
    return ObjectSpec(shape, rng.choice(colors), rng.choice(sizes), texture, motion, speed)


def sample_spec(rng: Random, two_objects: float | bool = 0.4) -> ClipSpec:
    """Draw a clip.

    Args:
        rng: The source of randomness.
        two_objects: Probability of a second object (True or False to fix it).
    """
    background = rng.choice(BACKGROUNDS)
    background_texture = rng.choice(BACKGROUND_TEXTURES)
    pan = rng.choice(PANS) if background_texture in ("checkered", "dotted") else "none"
    if rng.random() >= float(two_objects):
        first = _sample_object(rng, list(COLORS), SIZES)
        return ClipSpec((first,), "alone", background, background_texture, pan)
    relation = rng.choice(RELATIONS[1:])
    if relation == "and":
        sizes = (("small", "medium"), ("small", "medium"))
    else:  # the one behind stays visible around the one in front
        sizes = (("small", "medium"), ("large",))
    first = _sample_object(rng, list(COLORS), sizes[0])
    second = _sample_object(rng, [c for c in COLORS if c != first.color], sizes[1])
    return ClipSpec((first, second), relation, background, background_texture, pan)


def _noun(o: ObjectSpec) -> str:
    words = [o.size if o.size != "medium" else "", o.color, o.texture if o.texture != "solid" else "", o.shape]
    noun = " ".join(w for w in words if w)
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _verb(o: ObjectSpec, rng: Random | None) -> str:
    verbs, adverbs = VERBS[o.motion], ADVERBS[o.speed]
    verb = rng.choice(verbs) if rng else verbs[0]
    adverb = rng.choice(adverbs) if rng else adverbs[0]
    return f"{verb} {adverb}".strip()


def caption(spec: ClipSpec, rng: Random | None = None) -> str:
    """The sentence for a clip; `rng` chooses among paraphrases, None gives the plainest one."""
    first = spec.objects[0]
    if len(spec.objects) == 1:
        text = f"{_noun(first)} {_verb(first, rng)}"
    else:
        second = spec.objects[1]
        if spec.relation == "and":
            text = f"{_noun(first)} {_verb(first, rng)} and {_noun(second)} {_verb(second, rng)}"
        elif rng and rng.random() < 0.5:
            text = f"{_noun(second)} {_verb(second, rng)} behind {_noun(first)} that {_verb(first, rng)}"
        else:
            text = f"{_noun(first)} {_verb(first, rng)} in front of {_noun(second)} that {_verb(second, rng)}"
    ground = {
        "plain": f"{spec.background} background",
        "gradient": f"{spec.background} gradient background",
        "checkered": f"checkered {spec.background} background",
        "dotted": f"dotted {spec.background} background",
    }[spec.background_texture]
    text = f"{text} on a {ground}"
    return text if spec.pan == "none" else f"{text}, the camera pans {spec.pan}"


def is_held_out(spec: ClipSpec) -> bool:
    """Whether the clip belongs to the test set: one spec in 16, by a hash of all its attributes."""
    return zlib.crc32(repr(spec).encode()) % HELD_OUT_MODULUS == 0


def sample_split(rng: Random, held_out: bool, two_objects: float | bool = 0.4) -> ClipSpec:
    """Like `sample_spec`, from the training set or from the held-out set alone."""
    while True:
        spec = sample_spec(rng, two_objects)
        if is_held_out(spec) == held_out:
            return spec


def words(text: str) -> list[str]:
    """Split a caption the way the bundled tokenizer does: lower case, runs of letters and single punctuation."""
    return re.findall(r"[a-z]+|[^\sa-z]", text.lower())


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted."""
    texts = [v for verbs in VERBS.values() for v in verbs] + [a for adverbs in ADVERBS.values() for a in adverbs]
    texts += [*SHAPES, *COLORS, *SIZES, *TEXTURES, *BACKGROUNDS, *BACKGROUND_TEXTURES, *PANS, *RELATIONS]
    texts.append("a an that behind in front of on and the camera pans background,")
    return sorted({w for t in texts for w in words(t)})
