"""The commands around a generation and their options: doctor, and those registered beside it in `app`."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, show_default=False)


JSON = Annotated[bool, _option("--json", help="Print JSON on stdout, and nothing else there.")]
DEVICE = Annotated[str, _option("--device", help="auto (default), cpu, cuda or cuda:N.")]


def doctor(
    device: DEVICE = "auto",
    seconds: Annotated[
        float, _option("--seconds", help="Time for the self-test (default 10); compiling takes longest.")
    ] = 10.0,
    as_json: JSON = False,
) -> None:
    """Say what is installed, which kernels run here and which do not, and why. Exit code 1 if something is wrong."""
    from .doctor import run

    _exit(run(device=device, seconds=seconds, as_json=as_json))


MODEL = Annotated[
    str,
    _option(
        "--model",
        "-m",
        help="The bundled vidsparse-tiny (default), a short name such as wan-14b, a local diffusers folder, or a hub id.",
    ),
]
SPARSE = Annotated[
    str, _option("--sparse", help="Method: radial (default); its further options follow as in `generate`.")
]
SIZE = Annotated[str | None, _option("--size", help="WIDTHxHEIGHT, or a name such as small, large, 480p.")]
FRAMES = Annotated[str | None, _option("--frames", "--num-frames", help="Frames.", metavar="INTEGER")]
STEPS = Annotated[str | None, _option("--steps", "--num-inference-steps", help="Denoising steps.", metavar="INTEGER")]
METHOD_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}


def _names(context: typer.Context) -> list[str]:
    return [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]


def plan(
    context: typer.Context,
    model: MODEL = "vidsparse-tiny",
    size: SIZE = None,
    frames: FRAMES = None,
    steps: STEPS = None,
    guidance_scale: Annotated[
        str | None, _option("--guidance-scale", help="1 is off and halves the work.", metavar="NUMBER")
    ] = None,
    sparse: SPARSE = "radial",
    device: Annotated[
        str, _option("--device", help="auto (default), cpu, cuda, cuda:N, or a recorded one: h200.")
    ] = "auto",
    dtype: Annotated[str, _option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    remeasure: Annotated[
        bool, _option("--remeasure", help="Time this device again in place of what was kept from earlier.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Say what a generation will compute and take, and whether sparse attention helps, before loading any weights."""
    from .plan_command import run

    _exit(
        run(
            model=model, frames=frames, size=size, steps=steps, guidance_scale=guidance_scale, sparse=sparse, typed={},
            extra=list(context.args), option_names=_names(context), device=device, dtype=dtype, remeasure=remeasure,
            as_json=as_json,
        )
    )  # fmt: skip


def show(
    context: typer.Context,
    sparse: SPARSE = "radial",
    grid: Annotated[
        str | None, _option("--grid", help="Latent grid, such as 21x30x52; default that of the model's video.")
    ] = None,
    model: MODEL = "vidsparse-tiny",
    size: SIZE = None,
    frames: FRAMES = None,
    steps: STEPS = None,
    prompt: Annotated[str | None, _option("--prompt", "-p", help="Of the run that is recorded.")] = None,
    seed: Annotated[int, _option("--seed", help="Likewise (default 0).")] = 0,
    token: Annotated[
        str | None, _option("--token", help="FRAME,ROW,COLUMN of the token whose reach is drawn; default the middle.")
    ] = None,
    head: Annotated[int, _option("--head", help="Head that is drawn (default 0).")] = 0,
    layer: Annotated[int | None, _option("--layer", help="Layer of the run (default the middle one).")] = None,
    step: Annotated[int | None, _option("--step", help="Step of the run (default the last).")] = None,
    from_run: Annotated[
        str | None,
        _option(
            "--from-run",
            help="The JSON beside a video: repeat that run and draw what its attention looks at.",
            metavar="RUN.json",
        ),
    ] = None,
    output: Annotated[
        str | None, _option("--output", "-o", help="FILE.png, FILE.html, or a folder for both (default: here).")
    ] = None,
) -> None:
    """Draw what a method computes (mask, density, one token's reach), or what the attention of a run looks at."""
    from .show import run

    _exit(
        run(
            sparse=sparse, grid=grid, model=model, size=size, frames=frames, steps=steps, prompt=prompt, seed=seed,
            token=token, head=head, layer=layer, step=step, from_run=from_run, output=output,
            extra=list(context.args), option_names=_names(context),
        )
    )  # fmt: skip


def compare(
    recipe: Annotated[
        list[str] | None,
        _option(
            "--recipe", "-r", help="NAME:OPTION=VALUE:..., such as radial:density=0.4; repeatable (default radial)."
        ),
    ] = None,
    prompt: Annotated[list[str] | None, _option("--prompt", "-p", help="Repeatable; default: held-out ones.")] = None,
    prompt_file: Annotated[str | None, _option("--prompt-file", help="One prompt per line.", metavar="FILE")] = None,
    prompts: Annotated[int, _option("--prompts", help="How many held-out prompts (default 4).")] = 4,
    seeds: Annotated[int, _option("--seeds", help="Seeds for each prompt (default 1).")] = 1,
    seed: Annotated[int, _option("--seed", help="The first of them (default 0).")] = 0,
    model: MODEL = "vidsparse-tiny",
    size: SIZE = None,
    frames: FRAMES = None,
    steps: STEPS = None,
    guidance_scale: Annotated[str | None, _option("--guidance-scale", help="1 is off.", metavar="NUMBER")] = None,
    floor: Annotated[
        bool, _option("--floor/--no-floor", help="Also compare dense with dense by another kernel (default).")
    ] = True,
    players: Annotated[int, _option("--players", help="Clips whose videos the page shows (default 8).")] = 8,
    device: DEVICE = "auto",
    dtype: Annotated[str, _option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    offload: Annotated[str, _option("--offload", help="none, model, group, sequential or auto (default).")] = "auto",
    vae_tiling: Annotated[bool, _option("--vae-tiling", help="Decode in tiles, to save memory.")] = False,
    output: Annotated[
        str, _option("--output", "-o", help="Folder, new or of a comparison to continue (default: compare).")
    ] = "compare",
    as_json: JSON = False,
    quiet: Annotated[bool, _option("--quiet", "-q", help="Print only the path of the page.")] = False,
) -> None:
    """Compare recipes with dense attention on the same prompts and noise: PSNR, SSIM, adherence, time, and a page."""
    from .compare import run

    numbers = {"num_frames": frames, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    given = {"model": model, "device": device, "dtype": dtype, "offload": offload, "vae_tiling": vae_tiling}
    _exit(
        run(
            recipes=recipe or ["radial"], prompt=prompt or [], prompt_file=prompt_file, num_prompts=prompts,
            seeds=seeds, seed=seed, floor=floor, players=players, output=output, size=size, numbers=numbers,
            given=given, as_json=as_json, quiet=quiet,
        )
    )  # fmt: skip


def bench(
    level: Annotated[str, _option("--level", help="kernel, block, pipeline or all (default).")] = "all",
    density: Annotated[
        str, _option("--density", help="Of the sparse calls, comma-separated (default 0.2).", metavar="NUMBER,...")
    ] = "0.2",
    methods: Annotated[
        str,
        _option(
            "--methods",
            help="Timed in a block and a pipeline, comma-separated (default radial,pooled).",
            metavar="NAME,...",
        ),
    ] = "radial,pooled",
    grid: Annotated[
        str | None, _option("--grid", help="Latent grid (default 21x30x52 on a GPU, 21x8x12 on a CPU).")
    ] = None,
    heads: Annotated[int | None, _option("--heads", help="Attention heads (default 12 on a GPU, 4 on a CPU).")] = None,
    head_dim: Annotated[
        int | None, _option("--head-dim", help="Channels of a head (default 128 on a GPU, 64 on a CPU).")
    ] = None,
    milliseconds: Annotated[
        float, _option("--milliseconds", help="For each run and each of three rounds (default 40).")
    ] = 40.0,
    device: DEVICE = "auto",
    csv: Annotated[str | None, _option("--csv", help="Append the rows to this file.", metavar="FILE")] = None,
    as_json: JSON = False,
) -> None:
    """Time attention calls, transformer blocks and denoising loops, dense and sparse. Exit code 1 if a result is wrong."""
    from .bench import run

    _exit(
        run(
            device=device, level=level, density=density, methods=methods, grid=grid, heads=heads, head_dim=head_dim,
            milliseconds=milliseconds, csv=csv, as_json=as_json,
        )
    )  # fmt: skip


def tune(
    target_psnr: Annotated[
        str | None, _option("--target-psnr", help="Mean PSNR against dense that is wanted, in dB.", metavar="DB")
    ] = None,
    max_time: Annotated[
        str | None, _option("--max-time", help="Seconds that denoising one clip may take.", metavar="SECONDS")
    ] = None,
    max_attention: Annotated[
        str | None, _option("--max-attention", help="Share of the dense attention time, in (0, 1].", metavar="SHARE")
    ] = None,
    choice: Annotated[
        list[str] | None,
        _option("--choice", "-c", help="NAME:OPTION=VALUE:... that may be used; repeatable (default: a menu)."),
    ] = None,
    rule: Annotated[
        str, _option("--rule", help="budget (default), or a baseline: sparse-vdit, sparge.", metavar="RULE")
    ] = "budget",
    heads: Annotated[bool, _option("--heads/--no-heads", help="Let heads of a layer differ (default).")] = True,
    prompt: Annotated[list[str] | None, _option("--prompt", "-p", help="Of the calibration; repeatable.")] = None,
    prompt_file: Annotated[str | None, _option("--prompt-file", help="One prompt per line.", metavar="FILE")] = None,
    prompts: Annotated[
        int | None, _option("--prompts", help="How many prompts (default 4 on a CPU, 16 on a GPU).", metavar="INTEGER")
    ] = None,
    seed: Annotated[int, _option("--seed", help="Of the first clip (default 0).")] = 0,
    model: MODEL = "vidsparse-tiny",
    size: SIZE = None,
    frames: FRAMES = None,
    steps: STEPS = None,
    guidance_scale: Annotated[str | None, _option("--guidance-scale", help="1 is off.", metavar="NUMBER")] = None,
    price_tokens: Annotated[
        int | None,
        _option(
            "--price-tokens", help="Weigh times of an H200 at this many tokens, not those here.", metavar="INTEGER"
        ),
    ] = None,
    budget_seconds: Annotated[
        float | None, _option("--budget-seconds", help="Measure less, to be done in this time.", metavar="SECONDS")
    ] = None,
    device: DEVICE = "auto",
    dtype: Annotated[str, _option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    offload: Annotated[str, _option("--offload", help="none, model, group, sequential or auto (default).")] = "auto",
    vae_tiling: Annotated[bool, _option("--vae-tiling", help="Decode in tiles, to save memory.")] = False,
    output: Annotated[
        str,
        _option("--output", "-o", help="The recipe (default: recipe.json); measurements stand in a folder beside."),
    ] = "recipe.json",
    as_json: JSON = False,
    quiet: Annotated[bool, _option("--quiet", "-q", help="Print only the path of the recipe.")] = False,
) -> None:
    """Find the fastest recipe for a quality, or the best for a time: by layer, step range and head. Resumable."""
    from .tune_command import run

    numbers = {"num_frames": frames, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    given = {"model": model, "device": device, "dtype": dtype, "offload": offload, "vae_tiling": vae_tiling}
    _exit(
        run(
            target={"psnr": target_psnr, "seconds": max_time, "share": max_attention}, choices=choice or [], rule=rule,
            prompt=prompt or [], prompt_file=prompt_file, num_prompts=prompts, seed=seed, by_head=heads, output=output,
            size=size, numbers=numbers, given=given, price_tokens=price_tokens, budget_seconds=budget_seconds,
            as_json=as_json, quiet=quiet,
        )
    )  # fmt: skip


def _exit(code: int) -> None:
    if code:
        raise typer.Exit(code)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(doctor)
    app.command(context_settings=METHOD_OPTIONS)(plan)
    app.command(context_settings=METHOD_OPTIONS)(show)
    app.command()(compare)
    app.command()(tune)
    app.command()(bench)
