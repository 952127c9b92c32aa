"""Reading the command line: spelling, sizes, method options, config files, tables."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from vidsparse.cli.arguments import normalise, parse_size, read_config, split_options
from vidsparse.cli.method_options import attribute_help, config_fields, parse_options
from vidsparse.cli.methods import option_types
from vidsparse.cli.screen import describe, duration
from vidsparse.cli.table import MAX_COLUMNS, condense, runs, sentences
from vidsparse.errors import ConfigError


@dataclass(frozen=True)
class Example:
    """A method's settings.

    Attributes:
        density: share, in (0, 1];
            default None.
        mode: which.
        layers: some.
    """

    density: float | None = None
    mode: Literal["a", "b"] = "a"
    layers: tuple[int, ...] = ()
    on: bool = True
    count: int = 3


FIELDS = config_fields(Example)


def test_underscores_become_dashes_in_names_only() -> None:
    given = ["generate", "--num_frames", "a_b", "--prompt=snake_case words", "-o", "x_y.mp4", "--flow_shift=3", "--"]
    wanted = ["generate", "--num-frames", "a_b", "--prompt=snake_case words", "-o", "x_y.mp4", "--flow-shift=3", "--"]
    assert normalise(given) == wanted


@pytest.mark.parametrize("text", ["832x480", "832X480", "832*480", "832×480", " 832 x 480 "])
def test_size_is_width_by_height(text: str) -> None:
    assert parse_size(text, {}) == (480, 832)


def test_named_sizes() -> None:
    assert parse_size("Large", {"small": (64, 96), "large": (96, 160)}) == (96, 160)
    with pytest.raises(ConfigError, match="832x480 or one of small"):
        parse_size("huge", {"small": (64, 96)})


def test_leftover_arguments_become_options() -> None:
    extra = ["--decay-factor", "0.5", "--variant=paper", "--flag", "--low", "-1"]
    assert split_options(extra, []) == {"decay-factor": "0.5", "variant": "paper", "flag": True, "low": "-1"}
    for stray in (["word"], ["-x"], ["--a", "1", "2"]):
        with pytest.raises(ConfigError, match="not understood"):
            split_options(stray, ["--prompt"])


@pytest.mark.parametrize(
    ("given", "result"),
    [
        ({"density": "0.3"}, {"density": 0.3}),
        ({"density": "none"}, {"density": None}),
        ({"mode": "b"}, {"mode": "b"}),
        ({"layers": "1,2, 5"}, {"layers": (1, 2, 5)}),
        ({"on": True}, {"on": True}),
        ({"no-on": True}, {"on": False}),
        ({"on": "off"}, {"on": False}),
        ({"count": "7"}, {"count": 7}),
        ({"density": 0.25, "layers": [1]}, {"density": 0.25, "layers": (1,)}),
    ],
)
def test_option_text_takes_the_fields_type(given: dict[str, Any], result: dict[str, Any]) -> None:
    assert parse_options("example", FIELDS, given) == result


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"density": "lots"}, "--density must be a number"),
        ({"count": "1.5"}, "--count must be a whole number"),
        ({"mode": "c"}, "--mode must be one of a, b"),
        ({"on": "maybe"}, "true or false"),
        ({"count": True}, "--count needs a value"),
        ({"densty": "1"}, r"did you mean --density\?"),
        ({"zzzzzz": "1"}, "the method takes --density, --mode"),
    ],
)
def test_bad_options_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_options("example", FIELDS, given)


def test_options_of_a_method_are_its_fields_and_its_schedule() -> None:
    types = option_types("radial")
    assert {"density", "decay_factor", "block_size", "warmup_steps", "dense_layers"} <= set(types)
    assert "schedule" not in types and types["decay_factor"] is float


def test_help_comes_from_the_docstring() -> None:
    assert attribute_help(Example)["density"] == "share, in (0, 1]; default None."
    assert attribute_help(Example)["layers"] == "some."


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_config_file_names(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"run{suffix}"
    data = {"prompt": "a cat", "frames": 9, "guidance-scale": 3, "lora": "x:0.5", "decay_factor": 0.5}
    path.write_text(json.dumps(data))
    wanted = {"prompt": "a cat", "num_frames": 9, "guidance_scale": 3, "loras": ["x:0.5"], "decay_factor": 0.5}
    assert read_config(str(path)) == wanted


def test_run_document_is_a_config(tmp_path: Path) -> None:
    path = tmp_path / "clip.json"
    path.write_text(
        json.dumps({"format": "vidsparse-run", "format_version": 1, "output": "clip.mp4", "settings": {"seed": 3}})
    )
    assert read_config(str(path)) == {"seed": 3}


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "{"), ("a.yaml", "a: [1"), ("b.yaml", "- 1\n- 2"), ("c.json", "3")]
)
def test_broken_config_is_one_sentence(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(str(tmp_path / "missing.yaml"))


def report(cells: list[list[float | None]], dense: set[tuple[int, int]]) -> dict[str, Any]:
    layers, steps = list(range(len(cells))), list(range(len(cells[0])))
    groups = [{"reason": "warm-up step", "layers": [i], "steps": [j], "calls": 1} for i, j in sorted(dense)]
    return {"matrix": {"layers": layers, "steps": steps, "density": cells}, "dense": groups}


def test_equal_neighbours_are_merged() -> None:
    assert runs([1, 1, 2, 1]) == [(0, 1), (2, 2), (3, 3)]
    cells: list[list[float | None]] = [[1.0] * 4, [1.0, 0.5, 0.5, 0.5], [1.0, 0.5, 0.5, 0.5]]
    dense = {(0, j) for j in range(4)} | {(1, 0), (2, 0)}
    header, body = condense(report(cells, dense))
    assert header == ["layers", "step 0", "steps 1-3"]
    assert body == [["0", "dense", "dense"], ["1-2", "dense", "0.50"]]


def test_sparse_at_density_one_is_not_called_dense() -> None:
    assert condense(report([[1.0, 1.0]], {(0, 0)}))[1] == [["0", "dense", "1.00"]]


def test_a_cell_with_one_dense_call_shows_its_density() -> None:
    assert condense(report([[0.75, 1.0]], {(0, 0), (0, 1)}))[1] == [["0", "0.75", "dense"]]


def test_sentences_under_the_table() -> None:
    numbers = {"num_calls": 20, "num_sparse_calls": 12, "sparse_density": 0.456, "notes": ["a thing"]}
    wanted = [
        "sparse: 12 of 20 attention calls, density 0.46",
        "dense: 6 (warm-up step), 2 (dense layer)",
        "note: a thing",
    ]
    assert sentences({**numbers, "dense_calls": {"warm-up step": 6, "dense layer": 2}}) == wanted
    on_hopper = {**numbers, "dense_calls": {"warm-up step": 6}, "dense_kernels": {"hopper": 6}}
    assert sentences(on_hopper)[1] == "dense: 6 (warm-up step); 6 of them on hopper"
    none = {"num_calls": 4, "num_sparse_calls": 0, "sparse_density": None, "notes": [], "dense_calls": {"x": 4}}
    assert sentences(none) == ["sparse: 0 of 4 attention calls", "dense: 4 (x)"]


def test_wide_reports_are_condensed_to_ranges() -> None:
    cells: list[list[float | None]] = [[0.5 + 0.01 * j for j in range(40)]]
    header, body = condense(report(cells, set()))
    assert len(header) - 1 <= MAX_COLUMNS
    assert header[1] == "steps 0-3" and body[0][1] == "0.50..0.53"


def test_words_for_time() -> None:
    from vidsparse_pipelines.progress import Estimate

    assert [duration(s) for s in (0.26, 7.4, 125, 3780)] == ["0.3 s", "7 s", "2 min 05 s", "1 h 03 min"]
    assert describe(Estimate(65, True)) == "at most 1 min 05 s left"
    assert describe(None) == ""
