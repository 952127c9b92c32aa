from __future__ import annotations

import pytest

from vidsparse.errors import ConfigError
from vidsparse.schedule import ASKED_FOR, UNKNOWN_COUNT, Schedule


@pytest.mark.parametrize(("steps", "warmup"), [(50, 12), (40, 10), (20, 5), (8, 2), (4, 1), (2, 0), (1, 0)])
def test_default_warmup_is_a_quarter(steps, warmup):
    schedule = Schedule()
    assert schedule.warmup(steps) == warmup
    assert [schedule.is_dense_step(i, steps) for i in range(steps)] == [i < warmup for i in range(steps)]


def test_unknown_number_of_steps_assumes_twelve_and_says_so():
    schedule = Schedule()
    assert schedule.step_reason(11, None) == UNKNOWN_COUNT
    assert schedule.step_reason(12, None) is None
    assert UNKNOWN_COUNT not in ASKED_FOR
    assert Schedule(warmup_steps=3).step_reason(2, None) in ASKED_FOR


def test_reasons_in_order():
    schedule = Schedule(warmup_steps=1, cooldown_steps=2, dense_layers=1, min_tokens=100)
    reasons = [schedule.dense_reason(step, 5, layer, 200) for step in range(5) for layer in range(2)]
    warm, cool, layer = "warm-up step", "cool-down step", "dense layer"
    assert reasons == [warm, warm, layer, None, layer, None, cool, cool, cool, cool]
    assert schedule.dense_reason(1, 5, 1, 99) == "sequence below min_tokens"


def test_min_tokens_is_what_the_user_says():
    short = "sequence below min_tokens"
    assert short not in ASKED_FOR
    assert Schedule(warmup_steps=0).dense_reason(0, 5, 0, 1) is None
    assert Schedule(warmup_steps=0, min_tokens=0).dense_reason(0, 5, 0, 1) is None
    assert Schedule(warmup_steps=0, min_tokens=9).dense_reason(0, 5, 0, 9) is None
    assert Schedule(warmup_steps=0, min_tokens=9).dense_reason(0, 5, 0, 8) == short
    assert Schedule(min_tokens=9).dense_reason(None, None, 0, 8) == short


def test_training_has_no_step():
    assert Schedule(warmup_steps=5, cooldown_steps=5).dense_reason(None, None, 0, 10) is None


@pytest.mark.parametrize("name", ["warmup_steps", "cooldown_steps", "dense_layers", "min_tokens"])
@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_bad_values(name, value):
    with pytest.raises(ConfigError, match=f"`{name}` must be a whole number"):
        Schedule(**{name: value})
