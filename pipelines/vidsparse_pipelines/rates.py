"""How fast a device is: recorded for an H200, else measured within seconds and kept in the user's cache folder."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vidsparse.break_even import CallShape, relative_cost
from vidsparse.errors import ConfigError

from .environment import device_name
from .runfile import write_json

FORMAT, FORMAT_VERSION = "vidsparse-rates", 2
SECONDS = 20.0
"""A measurement takes at most about this long, without compiling."""


@dataclass(frozen=True)
class Rates:
    """Speed of a device in the dtype that models run in there.

    Attributes:
        device: its name.
        device_type: "cuda" or "cpu".
        source: where the numbers come from.
        matmul: FLOP/s of large products.
        attention: FLOP/s of dense attention, head dims from 90 on; below in proportion on a GPU.
        bandwidth: bytes/s of a copy, read and written.
        sparse_share, sparse_slope: a static sparse call takes sparse_share + sparse_slope * density of the dense one;
            None: the fit of `vidsparse.break_even`, which was made on an H200.
        is_hopper: whether dense calls of sparse methods may run on our kernel.
    """

    device: str
    device_type: str
    source: str
    matmul: float
    attention: float
    bandwidth: float
    sparse_share: float | None = None
    sparse_slope: float | None = None
    is_hopper: bool = False

    def relative(
        self,
        shape: CallShape,
        density: float,
        *,
        selects: bool = False,
        overhead: float = 0.0,
        factor: float = 1.0,
        call_seconds: float = 0.0,
    ) -> float:
        """Time of a sparse call over that of the dense one; arguments as for `vidsparse.break_even.relative_cost`."""
        if self.sparse_share is None or self.sparse_slope is None:
            return relative_cost(
                shape, density, selects=selects, overhead=overhead, factor=factor, call_seconds=call_seconds
            )
        cost = (self.sparse_share + self.sparse_slope * density) * factor + overhead
        # What a call takes on the host, however little it computes.
        return (
            max(cost, relative_cost(shape, 0.0, selects=selects, call_seconds=call_seconds)) if self.is_gpu else cost
        )

    @property
    def is_gpu(self) -> bool:
        return self.device_type == "cuda"

    def attention_rate(self, head_dim: int) -> float:
        """FLOP/s of dense attention with this head dim."""
        return self.attention * (min(1.0, head_dim / 90) if self.is_gpu else 1.0)


RECORDED = {
    "h200": Rates(
        "NVIDIA H200",
        "cuda",
        "recorded: fitted to benchmarks/results/2026-11-25-h200-models.json",
        matmul=0.85 * 780e12,
        attention=600e12,
        bandwidth=4.26e12,
        is_hopper=True,
    )
}


def rates_for(device: str, remeasure: bool = False) -> Rates:
    """Rates of a recorded device by name ("h200"), or of this machine's, measured once and kept.

    Raises:
        ConfigError: the device is neither recorded nor here.
    """
    if device.lower() in RECORDED:
        return RECORDED[device.lower()]
    from .device import resolve_device

    try:
        resolved = resolve_device(device)
    except ConfigError as error:
        raise ConfigError(f"{str(error).rstrip('.')}; recorded devices are {', '.join(RECORDED)}.") from error
    path = cache_path(resolved)
    kept = None if remeasure else _read(path)
    if kept is not None:
        return kept
    rates = measure(resolved)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "format_version": FORMAT_VERSION, "rates": asdict(rates)})
    except OSError:
        pass  # It only has to be measured again.
    return rates


def cache_path(device: Any) -> Path:
    """File of a device's rates; another torch or another number of threads has another one."""
    import torch

    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    name = re.sub(r"[^\w.-]+", "-", f"{device_name(device)}-torch{torch.__version__}").strip("-")
    return Path(base) / "vidsparse" / "rates" / f"{name}.json"


def _read(path: Path) -> Rates | None:
    """Kept rates; None where there are none, of another version, or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["format_version"] != FORMAT_VERSION:
            return None
        return Rates(**data["rates"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def median_seconds(run: Callable[[], Any], device: Any, budget: float) -> float:
    """Median seconds of a call, after one to warm up, for about `budget` seconds but at least three calls."""
    import torch

    def once() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    times = [once()]
    while len(times) < 3 or (sum(times) < budget and len(times) < 100):
        times.append(once())
    return statistics.median(times)


def measure(device: Any, seconds: float = SECONDS) -> Rates:
    """Time a product, a copy, dense attention and sparse attention at two densities.

    Args:
        device: a torch device of this machine.
        seconds: for all of it, roughly.
    """
    import torch

    from vidsparse import sparse_attention

    gpu = device.type == "cuda"
    if gpu:
        dtype, side, copied, (seq_len, heads, head_dim) = torch.bfloat16, 8192, 2**28, (16_384, 12, 128)
    else:
        from .device import resolve_dtype

        dtype, side, copied, (seq_len, heads, head_dim) = resolve_dtype("auto", device), 1024, 2**25, (2048, 4, 64)
    budget = seconds / 8 if gpu else min(seconds / 8, 0.3)
    with torch.inference_mode():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = median_seconds(lambda: a @ b, device, budget)
        source = torch.zeros(copied // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = median_seconds(lambda: target.copy_(source), device, budget)
        q, k, v = (torch.randn(1, seq_len, heads, head_dim, device=device).to(dtype) for _ in range(3))
        dense = min(median_seconds(run, device, budget) for run in dense_runs(q, k, v).values())
        shares = {}
        for density in (0.1, 0.4):
            mask = spread_mask(seq_len, density, 128, device)
            run = median_seconds(lambda mask=mask: sparse_attention(q, k, v, mask), device, budget)
            shares[mask.density] = run / dense
    (low, at_low), (high, at_high) = shares.items()
    slope = max(0.0, (at_high - at_low) / (high - low))
    return Rates(
        device_name(device),
        device.type,
        f"measured on this machine, {str(dtype).removeprefix('torch.')}",
        matmul=2 * side**3 / product,
        attention=4 * seq_len**2 * heads * head_dim / dense,
        bandwidth=copied / copy,
        sparse_share=max(0.0, at_low - slope * low),
        sparse_slope=slope,
        is_hopper=gpu and torch.cuda.get_device_capability(device) == (9, 0),
    )


def dense_runs(query: Any, key: Any, value: Any) -> dict[str, Callable[[], Any]]:
    """torch's dense kernels that run on these tensors `[batch, seq_len, num_heads, head_dim]`, by name."""
    import warnings

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {
        "dense cuDNN": SDPBackend.CUDNN_ATTENTION,
        "dense FlashAttention-2": SDPBackend.FLASH_ATTENTION,
        "dense memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    found: dict[str, Callable[[], Any]] = {}
    for name, kind in kinds.items():

        def run(kind: SDPBackend = kind) -> Any:
            with sdpa_kernel(kind):
                q, k, v = (x.transpose(1, 2) for x in (query, key, value))
                return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run()
            found[name] = run
        except RuntimeError:
            continue
    return found


def spread_mask(seq_len: int, density: float, block_size: int, device: Any, num_heads: int = 1) -> Any:
    """Random lists with the same number of blocks in every row, so that nothing is gained from locality."""
    import torch

    from vidsparse_kernels import BlockMask

    blocks = -(-seq_len // block_size)
    count = max(1, round(density * blocks))
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(num_heads, blocks, blocks, generator=generator).argsort(-1)[..., :count].sort(-1).values
    counts = torch.full((1, num_heads, blocks), count, dtype=torch.int32)
    mask = BlockMask.from_indices(
        counts, order[None].int(), seq_len_q=seq_len, seq_len_kv=seq_len, q_block_size=block_size,
        kv_block_size=block_size,
    )  # fmt: skip
    return mask.to(device)
