"""The grammar of the clips: captions, vocabulary, split."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse_pipelines.clips import grammar
from vidsparse_pipelines.clips.grammar import (
    ClipSpec,
    ObjectSpec,
    caption,
    is_held_out,
    sample_spec,
    sample_split,
    vocabulary,
    words,
)

seeds = st.integers(0, 2**32 - 1)


def parse(text: str) -> ClipSpec:
    """Read a caption back, knowing nothing but the words."""
    text, _, pan = text.partition(", the camera pans ")
    match = re.fullmatch(r"(.*) on a (?:(checkered|dotted) )?(\w+)( gradient)? background", text)
    assert match, text
    body, texture, background, gradient = match.groups()
    texture = texture or ("gradient" if gradient else "plain")

    def parse_object(part: str) -> ObjectSpec:
        part = part.removeprefix("an ").removeprefix("a ")
        tokens = part.split()
        size = tokens.pop(0) if tokens[0] in grammar.SIZES else "medium"
        color = tokens.pop(0)
        fill = tokens.pop(0) if tokens[0] in grammar.TEXTURES else "solid"
        shape, rest = tokens[0], " ".join(tokens[1:])
        found = [
            (motion, speed)
            for motion, verbs in grammar.VERBS.items()
            for verb in verbs
            for speed, adverbs in grammar.ADVERBS.items()
            for adverb in adverbs
            if f"{verb} {adverb}".strip() == rest
        ]
        assert len(set(found)) == 1, (part, found)
        return ObjectSpec(shape, color, size, fill, *found[0])

    noun = rf"an? (?:(?:{'|'.join((*grammar.SIZES, *grammar.COLORS, *grammar.TEXTURES))}) )+(?:{'|'.join(grammar.SHAPES)})"
    relation, parts = "alone", [body]
    if m := re.fullmatch(rf"(.*) in front of ({noun}) that (.*)", body):
        relation, parts = "in front of", [m[1], f"{m[2]} {m[3]}"]
    elif m := re.fullmatch(rf"(.*) behind ({noun}) that (.*)", body):
        relation, parts = "in front of", [f"{m[2]} {m[3]}", m[1]]
    elif m := re.fullmatch(rf"(.*) and ({noun} .*)", body):
        relation, parts = "and", [m[1], m[2]]
    objects = tuple(parse_object(p) for p in parts)
    return ClipSpec(objects, relation, background, texture, pan or "none")


def spoken(spec: ClipSpec) -> ClipSpec:
    """What the caption can say: a still object has no speed of its own."""
    return replace(spec, objects=tuple(replace(o, speed="normal") if o.motion == "still" else o for o in spec.objects))


@given(seeds, st.one_of(st.none(), seeds))
@settings(max_examples=300, deadline=None)
def test_caption_says_every_attribute(seed, paraphrase):
    spec = sample_spec(Random(seed))
    text = caption(spec, None if paraphrase is None else Random(paraphrase))
    if any(o.motion == "still" for o in spec.objects):
        text = re.sub(r"((?:stays|stands) still|does not move) (?:slowly|quickly|fast)", r"\1", text)
    assert parse(text) == spoken(spec)


@given(seeds, seeds)
@settings(max_examples=200, deadline=None)
def test_every_word_is_in_the_vocabulary(seed, paraphrase):
    assert set(words(caption(sample_spec(Random(seed)), Random(paraphrase)))) <= set(vocabulary())


@given(seeds, seeds)
@settings(max_examples=200, deadline=None)
def test_articles(seed, paraphrase):
    text = caption(sample_spec(Random(seed)), Random(paraphrase))
    for article, initial in re.findall(r"\b(an?) (\w)", text):
        assert (article == "an") == (initial in "aeiou"), text


def test_vocabulary_is_sorted_and_lower_case():
    found = vocabulary()
    assert found == sorted(set(found))
    assert all(w == w.lower() and " " not in w for w in found)


def test_paraphrases_differ_and_the_plain_caption_does_not():
    spec = ClipSpec((ObjectSpec("star", "orange", motion="spin", speed="fast"),))
    assert caption(spec) == caption(spec) == "an orange star spins quickly on a black background"
    assert len({caption(spec, Random(i)) for i in range(50)}) == 6  # three verbs, two adverbs


def test_a_still_object_has_normal_speed():
    specs = [sample_spec(Random(i)) for i in range(500)]
    still = [o for s in specs for o in s.objects if o.motion == "still"]
    assert still and all(o.speed == "normal" for o in still)


def test_two_objects_have_two_colours_and_the_back_one_is_large():
    specs = [sample_spec(Random(i), two_objects=True) for i in range(500)]
    assert all(len({o.color for o in s.objects}) == 2 for s in specs)
    ordered = [s for s in specs if s.relation == "in front of"]
    assert ordered and all(s.objects[1].size == "large" != s.objects[0].size for s in ordered)


def test_only_textures_that_show_it_pan():
    specs = [sample_spec(Random(i)) for i in range(1000)]
    assert {s.background_texture for s in specs if s.pan != "none"} == {"checkered", "dotted"}


@pytest.mark.parametrize("attribute", ["shape", "color", "size", "texture", "motion", "speed"])
def test_every_value_is_drawn(attribute):
    values = {getattr(o, attribute) for i in range(600) for o in sample_spec(Random(i)).objects}
    assert values == set(getattr(grammar, attribute.upper() + "S"))


def test_held_out_share_and_stability():
    specs = [sample_spec(Random(i)) for i in range(8000)]
    share = sum(map(is_held_out, specs)) / len(specs)
    assert abs(share - 1 / 16) < 0.011  # four standard deviations
    fixed = ClipSpec((ObjectSpec("circle", "red"),))
    assert is_held_out(fixed) == is_held_out(ClipSpec((ObjectSpec("circle", "red"),)))


def test_splits_are_disjoint():
    rng = Random(0)
    train = {sample_split(rng, held_out=False) for _ in range(300)}
    test = {sample_split(rng, held_out=True) for _ in range(60)}
    assert not train & test
    assert not any(map(is_held_out, train)) and all(map(is_held_out, test))


def test_sampling_is_deterministic():
    assert [sample_spec(Random(i)) for i in range(20)] == [sample_spec(Random(i)) for i in range(20)]
