"""`vidsparse show`: pictures of what a method computes, on any machine."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from vidsparse.errors import ConfigError, OutputError

from .arguments import parse_size, split_options
from .method_options import convert, option_name, parse_options

PROMPT = "a large red star spins on a checkered navy background"


def run(
    *,
    sparse: str,
    grid: str | None,
    model: str,
    size: str | None,
    frames: str | None,
    steps: str | None,
    prompt: str | None,
    seed: int,
    token: str | None,
    head: int,
    layer: int | None,
    step: int | None,
    from_run: str | None,
    output: str | None,
    extra: list[str],
    option_names: list[str],
) -> int:
    """Write the pictures and print their paths. Returns 0.

    Raises:
        VidsparseError: one sentence for the user.
    """
    from vidsparse.methods import processor_class
    from vidsparse.plots import draw, middle_token, pyplot, to_html, to_png

    from .methods import option_types

    pyplot()
    if from_run is not None:
        typed = {"--grid": grid, "--size": size, "--frames": frames, "--steps": steps, "--prompt": prompt}
        given = [name for name, value in typed.items() if value is not None]
        given += [option_name(name) for name in split_options(extra, option_names)]
        if given:
            raise ConfigError(f"The run file says what {given[0]} is; leave {given[0]} out, or --from-run.")
        return _show_run(from_run, token, head, layer, step, output)
    options = parse_options(sparse, option_types(sparse), split_options(extra, option_names), option_names)
    processor = processor_class(sparse)(**options)
    static = _is_static(processor)
    if not static and grid is not None:
        raise ConfigError(
            f"The method {sparse!r} looks at query and key, so it is drawn from a run; give --size in place of --grid."
        )
    paths = _paths(output)
    if not static:
        view, place = _recorded(sparse, options, model, size, frames, steps, prompt, seed, layer, step)
    else:
        view, place = _static(processor, _grid(grid, model, size, frames)), ""
    if not 0 <= head < view.num_heads:
        raise ConfigError(f"--head must be from 0 to {view.num_heads - 1} here, got {head}.")
    latent = view.layout.grid
    where = middle_token(latent) if token is None else _token(token, latent)
    title = f"{sparse} on a latent grid of {latent}{place}"
    png = to_png(draw(view, title, token=where, head=head))
    densities = view.head_density()
    facts = [
        ("method", " ".join([sparse, *(f"{name}={value}" for name, value in options.items())])),
        ("latent grid", f"{latent}, {latent.num_tokens:,} tokens, {view.layout.text_len} of text beside them"),
        ("blocks", f"{view.mask.num_q_blocks} x {view.mask.num_kv_blocks}"),
        ("density of all pairs", ", ".join(f"{value:.4f}" for value in densities)),
        ("density by query block", ", ".join(f"{value:.3f}" for value in view.row_density(head).tolist())),
    ]
    for path in paths:
        _write(path, png if path.suffix == ".png" else to_html(title, png, facts).encode())
        print(path)
    return 0


def _show_run(path: str, token: str | None, head: int, layer: int | None, step: int | None, output: str | None) -> int:
    """Pictures of one call of a generation that is repeated from its run file."""
    from vidsparse.plots import View, middle_token, to_html, to_png
    from vidsparse.run_plots import draw_run, recall
    from vidsparse_pipelines.record_run import record_run
    from vidsparse_pipelines.runfile import read_run

    from .generate import _hush
    from .screen import Screen

    read_run(path)
    paths = _paths(output)
    _hush()
    screen = Screen()
    try:
        run = record_run(path, step=step, layer=layer, observer=screen)
    finally:
        screen.close()
    call, chosen, settings = run.call, run.selection, run.settings
    latent = call.layout.grid
    if not 0 <= head < call.num_heads:
        raise ConfigError(f"--head must be from 0 to {call.num_heads - 1} here, got {head}.")
    where = middle_token(latent) if token is None else _token(token, latent)
    view = None if chosen is None else View(chosen.block_mask, call.layout, chosen.q_order, chosen.kv_order)
    recalls = [] if view is None else [recall(call, view, h) for h in range(call.num_heads)]
    branch = "" if run.branch is None else f", branch {run.branch}"
    title = f"{settings.sparse}: step {run.step}, layer {run.layer}{branch}"
    png = to_png(draw_run(call, view, run.frames, title, token=where, head=head, recalls=recalls))
    facts = [
        ("run", str(Path(path).expanduser().absolute())),
        ("prompt", settings.prompt),
        ("model", settings.model),
        ("method", " ".join([settings.sparse, *(f"{k}={v}" for k, v in settings.method_options.items())])),
        ("latent grid", f"{latent}, {latent.num_tokens:,} tokens, {call.layout.text_len} of text beside them"),
        ("call", f"step {run.step} of {settings.num_inference_steps}, layer {run.layer}{branch}, head {head}"),
        ("density of all pairs", "1 (dense)" if view is None else ", ".join(f"{x:.4f}" for x in view.head_density())),
        ("recall by head", ", ".join(f"{value:.3f}" for value in recalls) or "1 (dense)"),
        *(("note", note) for note in run.notes),
    ]
    for target in paths:
        _write(target, png if target.suffix == ".png" else to_html(title, png, facts).encode())
        print(target)
    return 0


def _is_static(processor: Any) -> bool:
    from vidsparse.layout import LatentGrid

    parts, _ = processor.parts(processor.layout(LatentGrid(2, 8, 8)), "cpu")
    return parts.block_mask is not None


def _grid(text: str | None, model: str, size: str | None, frames: str | None) -> Any:
    """The grid asked for, by itself or by a model's video."""
    from vidsparse.layout import LatentGrid

    if text is not None:
        match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*x\s*(\d+)\s*", text.lower())
        if not match:
            raise ConfigError(f"The grid {text!r} is not understood; use FRAMESxHEIGHTxWIDTH such as 21x30x52.")
        return LatentGrid(*map(int, match.groups()))
    from vidsparse_pipelines.costs import read_shape

    shape = read_shape(model)
    preset = shape.info.preset
    height, width = parse_size(size, preset.sizes) if size is not None else (preset.height, preset.width)
    shape.info.check_size(height, width)
    count = preset.num_frames if frames is None else convert("--frames", int, frames)
    if count < 1:
        raise ConfigError(f"The option --frames must be a whole number of at least 1, got {count}.")
    return shape.grid(shape.info.snap_frames(count), height, width)


def _static(processor: Any, grid: Any) -> Any:
    from vidsparse.plots import View

    layout = processor.layout(grid)
    mask, _ = processor.build_mask(layout, None)
    return View(mask, layout)


def _recorded(
    sparse: str,
    options: dict[str, Any],
    model: str,
    size: str | None,
    frames: str | None,
    steps: str | None,
    prompt: str | None,
    seed: int,
    layer: int | None,
    step: int | None,
) -> tuple[Any, str]:
    """A selection of a small generation of `model`, and where it was made."""
    from vidsparse.plots import View
    from vidsparse_pipelines.model_info import inspect_model
    from vidsparse_pipelines.record import record
    from vidsparse_pipelines.settings import GenerateSettings

    from .generate import _hush

    _hush()
    shape: dict[str, Any] = {}
    if size is not None:
        shape["height"], shape["width"] = parse_size(size, inspect_model(model).preset.sizes)
    settings = GenerateSettings(
        prompt=prompt or PROMPT,
        model=model,
        sparse=sparse,
        method_options=options,
        seed=seed,
        num_frames=None if frames is None else convert("--frames", int, frames),
        num_inference_steps=8 if steps is None else convert("--steps", int, steps),
        **shape,
    )
    kept = record(settings)
    made_steps, made_layers = sorted({place[0] for place in kept}), sorted({place[1] for place in kept})
    step = made_steps[-1] if step is None else step
    layer = made_layers[len(made_layers) // 2] if layer is None else layer
    if (step, layer) not in kept:
        raise ConfigError(
            f"Nothing was selected in step {step}, layer {layer}; steps {made_steps[0]} to {made_steps[-1]} and layers "
            f"{made_layers[0]} to {made_layers[-1]} are sparse here."
        )
    found = kept[step, layer]
    chosen = found.selection
    orders = [None if order is None else order.cpu() for order in (chosen.q_order, chosen.kv_order)]
    return View(chosen.block_mask.to("cpu"), found.layout, *orders), f", step {step}, layer {layer}"


def _token(text: str, grid: Any) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*", text)
    if not match:
        raise ConfigError(f"The token {text!r} is not understood; use FRAME,ROW,COLUMN such as 10,15,26.")
    frame, row, column = map(int, match.groups())
    if frame >= grid.frames or row >= grid.height or column >= grid.width:
        raise ConfigError(f"The token {text} is outside the grid {grid}; counting starts at 0.")
    return (frame * grid.height + row) * grid.width + column


def _paths(output: str | None) -> list[Path]:
    """What is to be written: one .png or .html, or both in a folder."""
    path = Path(output or ".").expanduser()
    if path.suffix.lower() in (".png", ".html"):
        paths = [path]
    elif path.suffix and not path.is_dir():
        raise ConfigError(f"The output {output!r} must end in .png or .html, or be a folder.")
    else:
        paths = [path / "show.png", path / "show.html"]
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {str(paths[0].parent)!r} cannot be made ({error.strerror}).") from error
    return paths


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    temporary: str | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}.", delete=False) as file:
            temporary = file.name
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written ({error.strerror}).") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
