"""A `cache_context` that somebody else set on a model keeps working under ours and is there again afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

import vidsparse


class Counting:
    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner, self.names = inner, []

    @contextlib.contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        self.names.append(name)
        with self.inner(name, **kwargs):
            yield


def test_a_foreign_one_from_before(build_pipeline: Callable, generate: Callable) -> None:
    pipe = build_pipeline()
    stock = generate(pipe)
    theirs = Counting(pipe.transformer.cache_context)
    pipe.transformer.cache_context = theirs
    handle = vidsparse.apply(pipe, "pooled", warmup_steps=1, dense_layers=0, min_tokens=0)
    generate(pipe)
    assert theirs.names == ["cond", "uncond"] * 4
    assert handle.report().num_sparse_calls == 18
    vidsparse.apply(pipe, "radial", min_tokens=0).remove()
    assert vars(pipe.transformer)["cache_context"] is theirs
    assert torch.equal(generate(pipe), stock) and len(theirs.names) == 16


def test_a_foreign_one_from_later_stays(build_pipeline: Callable, generate: Callable) -> None:
    pipe = build_pipeline()
    stock = generate(pipe)
    handle = vidsparse.apply(pipe, "pooled", warmup_steps=1, dense_layers=0, min_tokens=0)
    theirs = Counting(pipe.transformer.cache_context)
    pipe.transformer.cache_context = theirs
    generate(pipe)
    assert handle.report().num_sparse_calls == 18
    handle.remove()
    assert vars(pipe.transformer)["cache_context"] is theirs
    assert torch.equal(generate(pipe), stock) and len(theirs.names) == 16


def test_without_one_nothing_is_left(build_pipeline: Callable) -> None:
    pipe = build_pipeline()
    vidsparse.apply(pipe, "pooled").remove()
    assert not {"cache_context", "compile"} & set(vars(pipe.transformer))
