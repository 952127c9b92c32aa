"""The commands and their options. Every option defaults to None: presets and methods hold the defaults.

Numbers are taken as text and converted later, so that they and those of a config file meet the same checks and words.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vidsparse import __version__

from .tools import register
from .train import train_app

app = typer.Typer(
    name="vidsparse",
    help="Make videos with diffusion transformers that compute only the attention that matters.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

app.add_typer(train_app, name="train")

_WHAT, _MODEL, _SPARSE, _MACHINE, _OUTPUT = "What to make", "Model", "Sparse attention", "Machine", "Output"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vidsparse {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make videos with diffusion transformers that compute only the attention that matters."""


def _option(*names: str, help: str, panel: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, _option("--prompt", "-p", help="What the video shows.", panel=_WHAT)] = None,
    prompt_file: Annotated[
        str | None,
        _option(
            "--prompt-file",
            help="One prompt per line; blank lines and lines starting with # are skipped. Prompt i uses seed + i.",
            panel=_WHAT,
            metavar="FILE",
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, _option("--negative-prompt", help="What to steer away from.", panel=_WHAT)
    ] = None,
    image: Annotated[
        str | None,
        _option(
            "--image", "--image-path", help="First frame, for an image-to-video model.", panel=_WHAT, metavar="FILE"
        ),
    ] = None,
    num_frames: Annotated[
        str | None,
        _option(
            "--num-frames",
            "--frames",
            help="Frames; rounded up to what the VAE allows.",
            metavar="INTEGER",
            panel=_WHAT,
        ),
    ] = None,
    size: Annotated[
        str | None,
        _option("--size", help="WIDTHxHEIGHT, or a name such as small, large, 480p.", panel=_WHAT, metavar="SIZE"),
    ] = None,
    height: Annotated[str | None, _option("--height", help="Pixels.", metavar="INTEGER", panel=_WHAT)] = None,
    width: Annotated[str | None, _option("--width", help="Pixels.", metavar="INTEGER", panel=_WHAT)] = None,
    num_inference_steps: Annotated[
        str | None,
        _option("--num-inference-steps", "--steps", help="Denoising steps.", metavar="INTEGER", panel=_WHAT),
    ] = None,
    guidance_scale: Annotated[
        str | None,
        _option("--guidance-scale", help="How closely to follow the prompt; 1 is off.", metavar="NUMBER", panel=_WHAT),
    ] = None,
    flow_shift: Annotated[
        str | None,
        _option("--flow-shift", help="Timestep shift of a flow-matching scheduler.", metavar="NUMBER", panel=_WHAT),
    ] = None,
    seed: Annotated[
        str | None, _option("--seed", help="Drawn and printed if not given.", metavar="INTEGER", panel=_WHAT)
    ] = None,
    model: Annotated[
        str | None,
        _option(
            "--model",
            "-m",
            "--model-path",
            help="The bundled vidsparse-tiny (default), a local diffusers folder, or a hub id.",
            panel=_MODEL,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        _option(
            "--lora", "--lora-path", help="A LoRA and its scale; repeatable.", panel=_MODEL, metavar="PATH[:SCALE]"
        ),
    ] = None,
    sparse: Annotated[
        str | None,
        _option(
            "--sparse",
            help="Method: radial (default), dense, …; `vidsparse methods` lists them and their further options.",
            panel=_SPARSE,
            metavar="METHOD",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        _option(
            "--recipe",
            help="A file of `vidsparse tune` in place of the method; model, size, length and steps follow it unless given.",
            panel=_SPARSE,
            metavar="FILE",
        ),
    ] = None,
    density: Annotated[
        str | None,
        _option("--density", help="Share of the attention to compute, in (0, 1].", metavar="NUMBER", panel=_SPARSE),
    ] = None,
    warmup_steps: Annotated[
        str | None, _option("--warmup-steps", help="First steps that run dense.", metavar="INTEGER", panel=_SPARSE)
    ] = None,
    dense_layers: Annotated[
        str | None, _option("--dense-layers", help="First layers that run dense.", metavar="INTEGER", panel=_SPARSE)
    ] = None,
    guard: Annotated[
        str | None,
        _option(
            "--guard",
            help="Compare sampled rows with exact attention; layers that agree less, such as 0.95, attend more.",
            metavar="NUMBER",
            panel=_SPARSE,
        ),
    ] = None,
    strict: Annotated[
        bool | None,
        _option(
            "--strict/--no-strict", help="Fail instead of running dense where sparse was asked for.", panel=_SPARSE
        ),
    ] = None,
    device: Annotated[str | None, _option("--device", help="auto, cpu, cuda or cuda:N.", panel=_MACHINE)] = None,
    dtype: Annotated[
        str | None, _option("--dtype", help="auto, float32, bfloat16 or float16.", panel=_MACHINE)
    ] = None,
    offload: Annotated[
        str | None,
        _option("--offload", help="none, model, group, sequential or auto (default).", panel=_MACHINE, metavar="MODE"),
    ] = None,
    vae_tiling: Annotated[
        bool | None, _option("--vae-tiling/--no-vae-tiling", help="Decode in tiles, to save memory.", panel=_MACHINE)
    ] = None,
    compile: Annotated[
        bool | None, _option("--compile/--no-compile", help="Compile the transformer's blocks.", panel=_MACHINE)
    ] = None,
    num_gpus: Annotated[
        str | None,
        _option("--num-gpus", help="GPUs of this machine that share one video.", metavar="INTEGER", panel=_MACHINE),
    ] = None,
    ulysses_degree: Annotated[
        str | None,
        _option(
            "--ulysses-degree",
            help="Processes that share the attention heads, where torchrun started them.",
            metavar="INTEGER",
            panel=_MACHINE,
        ),
    ] = None,
    output: Annotated[
        str | None,
        _option(
            "--output",
            "-o",
            help="FILE.mp4, .webm, .gif, .png (several frames: a folder of PNGs), replaced if it exists; or a folder.",
            panel=_OUTPUT,
            metavar="PATH",
        ),
    ] = None,
    fps: Annotated[str | None, _option("--fps", help="Frames per second.", metavar="NUMBER", panel=_OUTPUT)] = None,
    config: Annotated[
        str | None,
        _option(
            "--config",
            help="YAML or JSON with these options, or the JSON beside a video; the command line wins.",
            panel=_OUTPUT,
            metavar="FILE",
        ),
    ] = None,
    as_json: Annotated[
        bool, _option("--json", help="Print the result as JSON on stdout, and nothing else there.", panel=_OUTPUT)
    ] = False,
    quiet: Annotated[bool, _option("--quiet", "-q", help="Print only the path of the result.", panel=_OUTPUT)] = False,
    verbose: Annotated[
        bool, _option("--verbose", help="Show the libraries' warnings and full tracebacks.", panel=_OUTPUT)
    ] = False,
) -> None:
    """Make a video from a prompt through sparse attention."""
    from .generate import run

    own = ("prompt", "negative_prompt", "image", "num_frames", "height", "width", "num_inference_steps")
    own += ("guidance_scale", "flow_shift", "seed", "model", "sparse", "strict", "device", "dtype", "offload")
    own += ("vae_tiling", "compile", "fps", "size", "ulysses_degree")
    values = context.params
    given = {name: values[name] for name in own if values[name] is not None}
    if lora:
        given["loras"] = lora
    method_options = {
        name: values[name] for name in ("density", "warmup_steps", "dense_layers", "guard") if values[name] is not None
    }
    if lora:
        from .train import follow_adapters

        given, method_options = follow_adapters(given, method_options, context.args, config)
    names = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    code = run(
        given,
        method_options=method_options,
        extra=list(context.args),
        option_names=names,
        prompt_file=prompt_file,
        output=output,
        config=config,
        recipe=recipe,
        as_json=as_json,
        quiet=quiet,
        verbose=verbose,
        num_gpus=num_gpus,
        arguments=context.obj or [],
    )
    if code:
        raise typer.Exit(code)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show the options of this method.", show_default=False)] = None,
) -> None:
    """List the sparse attention methods, or the options of one."""
    from .methods import show

    show(name)


register(app)
