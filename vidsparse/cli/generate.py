"""`vidsparse generate`: settle the options, run, show the result."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from typing import Any

from vidsparse.errors import ConfigError

from . import is_first
from .arguments import parse_size, read_config, split_options
from .method_options import convert, option_name


def run(
    given: dict[str, Any],
    *,
    method_options: dict[str, str],
    extra: list[str],
    option_names: list[str],
    prompt_file: str | None,
    output: str | None,
    config: str | None,
    recipe: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    num_gpus: str | None = None,
    arguments: list[str] | None = None,
) -> int:
    """Generate what the command line asks for. Returns an exit code.

    Args:
        given: settings typed by the user, by name.
        method_options: method options that have a flag of their own.
        extra: leftover arguments, taken as options of the method.
        option_names: the command's own flags, for messages.
        prompt_file, output, config, recipe, as_json, quiet, verbose, num_gpus: the flags of these names.
        arguments: the whole command line, for the processes of `--num-gpus`.

    Raises:
        VidsparseError: one sentence for the user.
    """
    typed = {**split_options(extra, option_names), **method_options}
    from_file = read_config(config) if config is not None else {}
    as_json, quiet, verbose = (
        convert(option_name(name), bool, from_file.pop(name, False)) or value
        for name, value in (("json", as_json), ("quiet", quiet), ("verbose", verbose))
    )
    if recipe is not None:
        from_file = _with_recipe(recipe, given, typed, from_file)
    prompts, one = _prompts(given, from_file, prompt_file)
    processes = _processes(given, from_file, num_gpus)
    if output is None and isinstance(from_file.get("output"), str):
        output = from_file["output"]
    if not verbose:
        _hush()
    batch = settle(given, typed, from_file, prompts, option_names)
    if processes > 1:
        from .launch import check_gpus, launch

        check_gpus(processes, batch[0].device)
        return launch(arguments or [], processes, verbose)
    _check_processes(batch[0].ulysses_degree)
    first = is_first()
    if first and config is not None:
        for note in _changes(config, batch[0]):
            print(note, file=sys.stderr)

    from vidsparse_pipelines.generation import generate_many
    from vidsparse_pipelines.progress import Observer

    from .screen import Screen

    screen = None if quiet or as_json or not first else Screen()
    documents: list[dict[str, Any]] = []
    results = generate_many(batch, output, observer=screen or Observer())
    try:
        for result in results:
            if screen is not None:
                screen.close()
            if not first:
                continue
            if as_json:
                documents.append({**result.document, "path": str(result.path), "json_path": str(result.json_path)})
            else:
                _show(result, quiet)
    finally:
        results.close()
        if screen is not None:
            screen.close()
    if as_json and first:
        # Plain ASCII, so that it can be piped whatever the terminal's encoding.
        print(json.dumps(documents[0] if one else documents))
    return 0


def _with_recipe(path: str, given: dict[str, Any], typed: dict[str, Any], from_file: dict[str, Any]) -> dict[str, Any]:
    """The config file's settings with a recipe, and with what it was tuned for where nobody says otherwise."""
    from vidsparse_pipelines.recipe_file import read_recipe, suggested

    others = [name for name in typed if name != "guard"]
    if "sparse" in given or others:
        name = "--sparse" if "sparse" in given else option_name(others[0])
        raise ConfigError(f"Give --recipe or {name}, not both: a recipe has the method and all its options.")
    recipe = read_recipe(path)
    if "guard" in typed:
        recipe["config"]["schedule"]["guard"] = convert("--guard", float, typed.pop("guard"))
    found = suggested(recipe)
    if "model" in given or "model" in from_file:
        found.pop("model", None)
    if "size" in from_file or "size" in given:
        found = {k: v for k, v in found.items() if k not in ("height", "width")}
    method = {"sparse": recipe["method"], "method_options": {}, "recipe": recipe}
    return {**found, **from_file, **method}


def _changes(config: str, settings: Any) -> list[str]:
    """What is no longer as it was when the run file that is repeated was written."""
    from vidsparse_pipelines.model_info import inspect_model
    from vidsparse_pipelines.runfile import changes, run_document

    document = run_document(config)
    return [] if document is None else changes(document, settings, inspect_model(settings.model))


def _processes(given: dict[str, Any], from_file: dict[str, Any], num_gpus: str | None) -> int:
    """How many processes `--num-gpus` makes us start, 1 for none; sets `ulysses_degree` among the settings given."""
    from vidsparse_pipelines.ranks import num_processes

    in_file = from_file.pop("num_gpus", None)
    count = convert("--num-gpus", int, num_gpus if num_gpus is not None else in_file if in_file is not None else 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"The option --num-gpus must be a whole number of at least 1, got {count!r}.")
    if count == 1:
        return 1
    degree = given.setdefault("ulysses_degree", str(count))
    if degree != str(count):
        raise ConfigError(f"Give either --num-gpus or --ulysses-degree, not both; got {count} and {degree}.")
    return count if num_processes() == 1 else 1


def _check_processes(ulysses_degree: int) -> None:
    """Raises ConfigError where torchrun started several processes that would all do the same."""
    from vidsparse_pipelines.ranks import num_processes

    if num_processes() > 1 and ulysses_degree == 1:
        raise ConfigError(
            f"torchrun started {num_processes()} processes that would all make the same video; give "
            f"--ulysses-degree {num_processes()}."
        )


def _prompts(given: dict[str, Any], from_file: dict[str, Any], prompt_file: str | None) -> tuple[list[str], bool]:
    """The prompts, and whether there can be only one: a prompt file gives a list even if it holds one."""
    from vidsparse_pipelines.prompts import read_prompts

    if prompt_file is not None and "prompt" in given:
        raise ConfigError("Give either --prompt or --prompt-file, not both.")
    if prompt_file is None and "prompt" not in given:
        prompt_file = from_file.get("prompt_file")
    if prompt_file is not None:
        return read_prompts(prompt_file), False
    prompt = given.get("prompt", from_file.get("prompt"))
    if prompt is None:
        raise ConfigError("There is no prompt; give --prompt TEXT or --prompt-file FILE.")
    return [str(prompt)], True


def settle(
    given: dict[str, Any],
    typed: dict[str, Any],
    from_file: dict[str, Any],
    prompts: list[str],
    option_names: list[str],
) -> list[Any]:
    """One `GenerateSettings` for each prompt: the command line before the config file before presets.

    Args:
        given: settings from the command line.
        typed: method options from the command line.
        from_file: everything from the config file.
        prompts: the prompts.
        option_names: the command's own flags, for messages.

    Raises:
        ConfigError: a name or value is not allowed.
    """
    from vidsparse_pipelines.lora import LoraSpec
    from vidsparse_pipelines.model_info import inspect_model
    from vidsparse_pipelines.settings import GenerateSettings

    from .method_options import config_fields

    names = {field.name for field in fields(GenerateSettings)}
    from_file = {k: v for k, v in from_file.items() if k not in ("prompt", "prompt_file", "output")}
    given = {k: v for k, v in given.items() if k != "prompt"}
    file_options = from_file.pop("method_options", None) or {}
    if not isinstance(file_options, dict):
        raise ConfigError(f"`method_options` must hold `name: value` pairs, got {file_options!r}.")
    file_options = dict(file_options)
    file_options.update({k: from_file.pop(k) for k in list(from_file) if k not in names and k != "size"})

    model = given.get("model", from_file.get("model"))
    if model is not None and not isinstance(model, str):
        raise ConfigError(f"`model` must be text, got {model!r}.")
    sizes = inspect_model(model).preset.sizes if model is not None else inspect_model().preset.sizes
    merged = {**_with_size(from_file, sizes), **_with_size(given, sizes)}
    types = config_fields(GenerateSettings)
    merged = {k: v if k == "loras" else convert(option_name(k), types[k], v) for k, v in merged.items()}
    sparse = str(merged.get("sparse", GenerateSettings.sparse))
    if sparse != str(from_file.get("sparse", sparse)):
        file_options = {}  # they belong to the file's method
        merged.pop("recipe", None)
    merged["method_options"] = _method_options(sparse, file_options, typed, option_names)
    loras = tuple(LoraSpec.parse(str(text)) for text in merged.pop("loras", ()))
    seed = merged.pop("seed", None)
    batch = []
    for index, prompt in enumerate(prompts):
        seed_i = seed + index if isinstance(seed, int) else seed
        batch.append(GenerateSettings(prompt=prompt, loras=loras, seed=seed_i, **merged))
    return batch


def _with_size(values: dict[str, Any], sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Replace `size` by height and width; explicit ones win over it."""
    values = dict(values)
    size = values.pop("size", None)
    if size is not None:
        height, width = parse_size(str(size), sizes)
        values = {"height": height, "width": width, **values}
    return values


def _method_options(
    sparse: str, file_options: dict[str, Any], typed: dict[str, Any], option_names: list[str]
) -> dict[str, Any]:
    from .method_options import parse_options
    from .methods import option_types

    types = option_types(sparse)
    return {
        **parse_options(sparse, types, file_options, option_names),
        **parse_options(sparse, types, typed, option_names),
    }


def _hush() -> None:
    """Keep the libraries' progress bars and advice out of our output."""
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.captureWarnings(True)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _show(result: Any, quiet: bool) -> None:
    from rich.console import Console

    if quiet:
        print(result.path)
        return
    from .screen import duration
    from .table import print_report

    console = Console(file=sys.stdout, highlight=False)
    settings = result.settings
    if result.report is not None:
        print_report(console, result.document["report"])
    frames = "1 frame" if settings.num_frames == 1 else f"{settings.num_frames} frames"
    total = duration(sum(result.timings.values()))
    console.print(
        f"{result.path}  {frames}, {settings.width}x{settings.height}, seed {settings.seed}, {total}",
        markup=False,
        soft_wrap=True,
    )
