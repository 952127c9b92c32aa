"""Times of attention calls, transformer blocks and denoising loops here: every dense and sparse backend that is present.

Nothing is timed before it was found right: every backend against float64 on a small shape and on sampled rows of the
timed one, every block and pipeline with all of its tokens kept against the stock one.
"""

from __future__ import annotations

import csv
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import vidsparse
from vidsparse.errors import ConfigError, OutputError, VidsparseError
from vidsparse.layout import LatentGrid
from vidsparse_kernels import (
    BlockMask,
    UnsupportedBackendError,
    available_backends,
    block_sparse_attention,
    select_from_qk,
)
from vidsparse_kernels.testing import assert_close_to_oracle, make_block_mask, make_qkv, masked_attention_oracle

from .environment import device_name, environment
from .rates import dense_runs, spread_mask

LEVELS = ("kernel", "block", "pipeline")
PACKAGES = {
    "flash": ("flash_attn", "flash-attn"),
    "_flash_3": ("flash_attn_interface", "flash-attn-3"),
    "sage": ("sageattention", "sageattention"),
    "xformers": ("xformers", "xformers"),
}
"""Dense backends of diffusers from packages: name -> (what is imported, what is installed)."""

APPROXIMATE = ("sage",)
"""They quantise, so they are not held to the error of dense attention."""

ROUNDS = 3
PIPELINE_STEPS, PIPELINE_LAYERS = 2, 2
SAMPLED_ROWS = 32
BLOCK_SIZE = 128


class WrongResult(VidsparseError):
    """A kernel is wrong, so no speed is told."""


@dataclass(frozen=True)
class Shape:
    """What is timed.

    Attributes:
        grid: latent grid of the video tokens.
        num_heads, head_dim: of attention.
        ffn_dim: of the block; None: four times the hidden size.
    """

    grid: LatentGrid
    num_heads: int
    head_dim: int
    ffn_dim: int | None = None


CPU_SHAPE = Shape(LatentGrid(21, 8, 12), 4, 64, 768)
GPU_SHAPE = Shape(LatentGrid(21, 30, 52), 12, 128, 8960)


@dataclass(frozen=True)
class Row:
    """One line of the table and of the CSV file.

    Attributes:
        level: "kernel", "block" or "pipeline".
        name: what ran.
        counts: what the time contains beside attention.
        density: computed share of the (query, key) pairs.
        ms, ms_p20, ms_p80: median and percentiles of single calls.
        tflops: on computed pairs, of a kernel.
        speedup: over the fastest dense one of the same level; None for those.
    """

    date: str
    vidsparse: str
    commit: str
    device: str
    torch: str
    triton: str
    dtype: str
    level: str
    name: str
    counts: str
    grid: str
    tokens: int
    num_heads: int
    head_dim: int
    density: float
    ms: float
    ms_p20: float
    ms_p80: float
    tflops: float | None
    speedup: float | None


COLUMNS = [field.name for field in fields(Row)]


@dataclass(frozen=True)
class _Run:
    name: str
    call: Callable[[], Any]
    density: float = 1.0
    counts: str = ""
    dense: bool = False


def run(
    device: torch.device,
    shape: Shape | None = None,
    *,
    levels: Sequence[str] = LEVELS,
    densities: Sequence[float] = (0.2,),
    methods: Sequence[str] = ("radial", "pooled"),
    milliseconds: float = 40.0,
    note: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Check and time.

    Args:
        device: where.
        shape: default `GPU_SHAPE` or `CPU_SHAPE`.
        levels: of `LEVELS`.
        densities: of the sparse calls.
        methods: timed in a block and in a pipeline.
        milliseconds: per run and round.
        note: told what is left out and why.

    Raises:
        WrongResult: a kernel is wrong; nothing was timed.
        ConfigError: a value is out of range.
    """
    for density in densities:
        if not 0 < density <= 1:
            raise ConfigError(f"A density must be in (0, 1], got {density:g}.")
    for level in levels:
        if level not in LEVELS:
            raise ConfigError(f"--level must be {' or '.join(LEVELS)}, got {level!r}.")
    if not milliseconds > 0:
        raise ConfigError(f"--milliseconds must be above 0, got {milliseconds:g}.")
    gpu = device.type == "cuda"
    shape = shape or (GPU_SHAPE if gpu else CPU_SHAPE)
    dtype = torch.bfloat16 if gpu else torch.float32
    rows: list[Row] = []
    with torch.inference_mode():
        for level in levels:
            if level == "kernel":
                runs = _kernel_runs(device, dtype, shape, densities, note)
            elif level == "block":
                runs = _block_runs(device, dtype, shape, densities, methods, note)
            else:
                runs = _pipeline_runs(device, dtype, shape, densities, methods, note)
            rows += _time(level, runs, device, dtype, shape, milliseconds)
    return rows


def _kernel_runs(
    device: torch.device, dtype: torch.dtype, shape: Shape, densities: Sequence[float], note: Callable[[str], None]
) -> list[_Run]:
    length = shape.grid.num_tokens
    query, key, value = make_qkv(
        seq_len_q=length, num_heads=shape.num_heads, head_dim=shape.head_dim, dtype=dtype, device=device
    )
    runs = [_Run(name, call, dense=True) for name, call in dense_runs(query, key, value).items()]
    runs += [_Run(f"dense {name}", call, dense=True) for name, call in _package_runs(query, key, value, note).items()]
    if not runs:
        raise ConfigError("No dense attention of torch runs here; see `vidsparse doctor`.")
    full = BlockMask.full(length, length, q_block_size=BLOCK_SIZE, kv_block_size=BLOCK_SIZE, device=device)
    for each in runs:
        if not each.name.endswith(APPROXIMATE):
            check_rows(each.call(), query, key, value, full, each.name)
    for density in densities:
        mask = spread_mask(length, density, BLOCK_SIZE, device)
        for backend in available_backends():
            if backend == "reference":
                continue
            call = _sparse(query, key, value, mask, backend)
            try:
                _check_small(backend, device, dtype, shape.head_dim)
                check_rows(call(), query, key, value, mask, f"{backend} at {length} tokens")
            except UnsupportedBackendError as error:
                note(f"left out: {str(error).partition('; use backend=')[0]}")
                continue
            runs.append(_Run(f"sparse {backend}", call, mask.token_density, "mask made before"))
        runs.append(_selecting(query, key, value, density))
    runs.append(_building(query, key, value, shape.grid))
    return runs


def _sparse(query: Any, key: Any, value: Any, mask: Any, backend: str) -> Callable[[], Any]:
    return lambda: block_sparse_attention(query, key, value, mask, backend=backend)


def _selecting(query: Any, key: Any, value: Any, density: float) -> _Run:
    """A call that first selects its blocks."""

    def select() -> Any:
        return select_from_qk(query, key, q_block_size=BLOCK_SIZE, kv_block_size=BLOCK_SIZE, density=density)

    def call() -> Any:
        return block_sparse_attention(query, key, value, select())

    mask = select()
    check_rows(call(), query, key, value, mask, "attention over selected blocks")
    return _Run("sparse, selected from q and k", call, mask.token_density, "selection of blocks")


def _building(query: Any, key: Any, value: Any, grid: LatentGrid) -> _Run:
    """A call that first builds a static mask, which a generation does once."""
    from vidsparse.methods.radial import RadialProcessor

    processor = RadialProcessor()
    layout = processor.layout(grid)

    def build() -> Any:
        return processor.build_mask(layout, query.device)[0]

    def call() -> Any:
        return block_sparse_attention(query, key, value, build())

    mask = build()
    check_rows(call(), query, key, value, mask, "attention over the radial mask")
    return _Run("sparse, radial mask built", call, mask.token_density, "building the mask, which is done once a shape")


def _package_runs(query: Any, key: Any, value: Any, note: Callable[[str], None]) -> dict[str, Callable[[], Any]]:
    """Dense backends of installed packages through diffusers."""
    if query.device.type != "cuda":
        return {}
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    found: dict[str, Callable[[], Any]] = {}
    for name, (module, package) in PACKAGES.items():
        if find_spec(module) is None:
            note(f"left out: dense {name}, not installed (pip install {package})")
            continue

        def call(name: str = name) -> Any:
            return dispatch_attention_fn(query, key, value, backend=name)  # pyright: ignore[reportArgumentType]

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
            found[name] = call
        except Exception as error:
            # Whatever a package that was made for another GPU or torch raises: it does not take part.
            lines = str(error).strip().splitlines()
            note(f"left out: dense {name} ({lines[0].rstrip('.') if lines else type(error).__name__})")
    return found


def _check_small(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    query, key, value = make_qkv(seq_len_q=700, head_dim=head_dim, dtype=dtype, device=device)
    mask = make_block_mask(seq_len_q=700, q_block_size=BLOCK_SIZE, kv_block_size=BLOCK_SIZE, device=device)
    out = block_sparse_attention(query, key, value, mask, backend=backend)
    truth, eager = (masked_attention_oracle(query, key, value, mask, dtype=kind)[0] for kind in (torch.float64, dtype))
    try:
        assert_close_to_oracle(out, eager, truth)
    except AssertionError as error:
        raise WrongResult(f"The backend {backend!r} is wrong, so no speed is reported ({error}).") from error


def check_rows(out: Any, query: Any, key: Any, value: Any, mask: Any, name: str) -> None:
    """Sampled rows of the first and last head against float64.

    Raises:
        WrongResult: they differ.
    """
    length, heads, head_dim = query.shape[1:]
    rows = torch.linspace(0, length - 1, min(SAMPLED_ROWS, length), device=query.device).long()
    dense = mask.to_dense()
    for head in {0, heads - 1}:
        blocks = dense[0, head if dense.shape[1] > 1 else 0][rows // mask.q_block_size]
        listed = blocks.repeat_interleave(mask.kv_block_size, 1)[:, :length]

        def attention(dtype: torch.dtype, head: int = head, listed: Any = listed) -> Any:
            q, k, v = (x[0, :, head].to(dtype) for x in (query[:, rows], key, value))
            logits = (q @ k.T * head_dim**-0.5).masked_fill(~listed, -torch.inf)
            # A row without any block gives 0.
            return torch.nan_to_num(logits.softmax(-1)) @ v

        try:
            assert_close_to_oracle(out[0, rows, head], attention(query.dtype), attention(torch.float64), name=name)
        except AssertionError as error:
            raise WrongResult(f"A result is wrong, so no speed is reported ({error}).") from error


def _block_runs(
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    densities: Sequence[float],
    methods: Sequence[str],
    note: Callable[[str], None],
) -> list[_Run]:
    """One Wan block with random weights inside its model: stock, and through each method's processor."""
    from vidsparse.methods import processor_class

    grid = shape.grid
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, grid.frames, grid.height, grid.width, generator=generator),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.randn(1, 64, 64, generator=generator),
    }
    inputs = {name: x.to(device, dtype if x.ndim > 1 else None) for name, x in inputs.items()}

    def build() -> Any:
        return _wan(device, dtype, shape, num_layers=1, patch_size=(1, 1, 1))

    def forward(model: Any) -> Any:
        return model(**inputs, return_dict=False)[0]

    stock = build()
    wanted = forward(stock)
    runs = [_Run("stock", lambda: forward(stock), dense=True)]
    plain: dict[str, Any] = {"warmup_steps": 0, "dense_layers": 0, "min_tokens": 0}
    full = build()
    full.set_attn_processor(processor_class("pooled")(density=1.0, **plain))
    error = float((forward(full) - wanted).float().abs().max() / wanted.float().abs().max())
    if not error <= 20 * torch.finfo(dtype).eps:
        raise WrongResult(f"A block with every pair kept is off by {error:.1e}, so no speed is reported.")
    del full
    for name in methods:
        for density in densities:
            model = build()
            processor = processor_class(name)(density=density, **plain)
            model.set_attn_processor(processor)
            begun = time.perf_counter()
            forward(model)
            _wait(device)
            first = time.perf_counter() - begun
            report = processor.report()
            reached = report.mean_density
            if reached is None or report.dense_calls:
                note(f"left out: {name}, which ran dense ({', '.join(report.dense_calls)})")
                continue
            counts = f"all in the block; mask of a shape once ({1000 * first:.0f} ms with the first call)"
            runs.append(_Run(name, lambda model=model: forward(model), reached, counts))
    return runs


def _pipeline_runs(
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    densities: Sequence[float],
    methods: Sequence[str],
    note: Callable[[str], None],
) -> list[_Run]:
    """The denoising loop of a WanPipeline with random weights, from noise to latents: stock, and through each method.

    The prompt comes encoded and the latents are not decoded: text encoder and VAE are not what differs.
    """
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    import vidsparse

    grid = shape.grid
    pipe: Any = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),  # pyright: ignore[reportArgumentType]
        transformer=_wan(device, dtype, shape, num_layers=PIPELINE_LAYERS, patch_size=(1, 2, 2)),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    arguments: dict[str, Any] = {
        "prompt_embeds": text[0],
        "negative_prompt_embeds": text[1],
        "height": 16 * grid.height,
        "width": 16 * grid.width,
        "num_frames": 4 * (grid.frames - 1) + 1,
        "num_inference_steps": PIPELINE_STEPS,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }

    def generate() -> Any:
        return pipe(**arguments, generator=torch.Generator().manual_seed(0)).frames

    def through(name: str, density: float) -> tuple[Any, Callable[[], Any]]:
        """The method attached around each call, so that one model serves all."""
        handle = vidsparse.apply(pipe, name, density=density, **plain)
        report = (generate(), handle.report())
        handle.remove()

        def call() -> Any:
            own = vidsparse.apply(pipe, name, density=density, **plain)
            found = generate()
            own.remove()
            return found

        return report, call

    plain: dict[str, Any] = {"warmup_steps": 0, "dense_layers": 0, "min_tokens": 0}
    wanted = generate()
    (latents, _), _ = through("pooled", 1.0)
    error = float((latents - wanted).float().norm() / wanted.float().norm())
    if not error <= 20 * torch.finfo(dtype).eps:
        raise WrongResult(f"A pipeline with every pair kept is off by {error:.1e}, so no speed is reported.")
    counts = f"{PIPELINE_STEPS} steps with guidance, {PIPELINE_LAYERS} blocks, no dense steps or layers"
    runs = [_Run("stock", generate, counts=counts, dense=True)]
    for name in methods:
        for density in densities:
            (_, report), call = through(name, density)
            reached = report.mean_density
            if reached is None or report.dense_calls:
                note(f"left out: {name}, which ran dense ({', '.join(report.dense_calls)})")
                continue
            runs.append(_Run(name, call, reached, f"{counts}; building the mask"))
    return runs


def _wan(device: torch.device, dtype: torch.dtype, shape: Shape, **config: Any) -> Any:
    """A Wan transformer with random weights, the same every time."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = WanTransformer3DModel(
            num_attention_heads=shape.num_heads, attention_head_dim=shape.head_dim, text_dim=64,
            ffn_dim=shape.ffn_dim or 4 * shape.num_heads * shape.head_dim, **config,
        )  # fmt: skip
    return model.to(device, dtype).eval()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _samples(call: Callable[[], Any], device: torch.device, milliseconds: float, least: int = 3) -> list[float]:
    """Milliseconds of single calls: by events on a GPU, by the clock elsewhere."""
    _wait(device)
    begun = time.perf_counter()
    call()
    _wait(device)
    once = 1000 * (time.perf_counter() - begun)
    repeats = max(least, min(200, int(milliseconds / max(once, 1e-3))))
    if device.type == "cuda":
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in pairs:
            start.record()
            call()
            stop.record()
        _wait(device)
        return [start.elapsed_time(stop) for start, stop in pairs]
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - begun))
    return found


def _time(
    level: str, runs: list[_Run], device: torch.device, dtype: torch.dtype, shape: Shape, milliseconds: float
) -> list[Row]:
    """All in turns, because a GPU that grows warm slows down."""
    samples: list[list[float]] = [[] for _ in runs]
    for each in runs:
        each.call()
    for _ in range(ROUNDS):
        for found, each in zip(samples, runs, strict=True):
            found += _samples(each.call, device, milliseconds, 1 if level == "pipeline" else 3)
    samples = [sorted(found) for found in samples]
    medians = [found[len(found) // 2] for found in samples]
    best = min(ms for ms, each in zip(medians, runs, strict=True) if each.dense)
    env = environment()
    length = shape.grid.num_tokens
    rows = []
    for each, found, ms in zip(runs, samples, medians, strict=True):
        flops = 4.0 * length**2 * shape.num_heads * shape.head_dim * each.density
        rows.append(
            Row(
                date=env["date"],
                vidsparse=vidsparse.__version__,
                commit=env["commit"],
                device=device_name(device),
                torch=torch.__version__,
                triton=str(env["packages"]["triton"]),
                dtype=str(dtype).removeprefix("torch."),
                level=level,
                name=each.name,
                counts=each.counts,
                grid=str(shape.grid),
                tokens=length,
                num_heads=shape.num_heads,
                head_dim=shape.head_dim,
                density=round(each.density, 4),
                ms=round(ms, 4),
                ms_p20=round(found[len(found) // 5], 4),
                ms_p80=round(found[len(found) * 4 // 5], 4),
                tflops=round(flops / ms / 1e9, 4) if level == "kernel" else None,
                speedup=None if each.dense else round(best / ms, 3),
            )
        )
    return rows


def check_csv(path: Path) -> None:
    """Raise OutputError unless rows can be appended to a file that is there."""
    if path.is_dir():
        raise OutputError(f"{str(path)!r} is a folder; give --csv a file.")
    if not path.exists():
        return
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{str(path)!r} cannot be read; choose another --csv.") from error
    if header and header != COLUMNS:
        raise OutputError(f"{str(path)!r} has other columns than this version writes; choose another --csv.")


def append_csv(path: Path, rows: Sequence[Row]) -> None:
    """Append, with a header where the file is new or empty.

    Raises:
        OutputError: it cannot be written, or has other columns.
    """
    check_csv(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written ({error.strerror}).") from error


def to_json(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Rows, what was left out, and the environment."""
    return json.dumps({"environment": environment(), "notes": list(notes), "rows": [asdict(row) for row in rows]})
