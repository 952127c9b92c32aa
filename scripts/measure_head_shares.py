"""How unevenly heads of the bundled model compute, and what dealing them out to two GPUs makes of it; on a CPU.

    python scripts/measure_head_shares.py --output head_shares.json

For each call of a short video: the heavier of two ranks over the mean, where each has two neighbouring heads, where heads
are dealt by what they computed in the first sparse step (`processors.parallel.deal`), and at best. 1 is balanced.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline

import vidsparse
from vidsparse.parts import pairs_of_heads
from vidsparse.processors.parallel import deal
from vidsparse_pipelines import bundled_model_path

METHODS: dict[str, dict[str, Any]] = {
    "semantic": {"top_p": 0.9},
    "pooled": {"top_p": 0.9},
    "svg1": {},
    "vidsparse": {},
}
PROMPT = "a large red star spins on a checkered navy background"
RANKS = 2


def heavier(loads: list[float], heads: Sequence[int]) -> float:
    """The busiest rank's load over the mean."""
    size = len(loads) // RANKS
    shares = [sum(loads[h] for h in heads[first : first + size]) for first in range(0, len(loads), size)]
    return max(shares) / statistics.fmean(shares)


def recorded(pipe: Any, method: str, options: dict[str, Any]) -> dict[tuple[Any, Any, Any], list[float]]:
    """What each head computed, by layer, branch and step."""
    from vidsparse import attention

    handle = vidsparse.apply(pipe, method, warmup_steps=1, dense_layers=0, min_tokens=0, **options)
    found, select = {}, attention._select

    def watched(query: torch.Tensor, key: torch.Tensor, context: Any) -> Any:
        selection = select(query, key, context)
        loads = pairs_of_heads(selection.block_mask, query.shape[2]).tolist()
        found[context.layer_index, context.branch, context.step_index] = loads
        return selection

    attention._select = watched
    try:
        pipe(PROMPT, num_frames=81, height=64, width=96, num_inference_steps=6, guidance_scale=4.0,
             generator=torch.Generator().manual_seed(1), output_type="latent")  # fmt: skip
    finally:
        attention._select = select
        handle.remove()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    pipe = WanPipeline.from_pretrained(bundled_model_path())
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for method, options in METHODS.items():
        found = recorded(pipe, method, options)
        first: dict[Any, list[float]] = {}
        ratios: dict[str, list[float]] = {"neighbours": [], "dealt": [], "best": []}
        for (layer, branch, _), loads in sorted(found.items()):
            dealt = deal(first.setdefault((layer, branch), loads), RANKS)
            ratios["neighbours"].append(heavier(loads, range(len(loads))))
            ratios["dealt"].append(heavier(loads, dealt))
            ratios["best"].append(min(heavier(loads, order) for order in itertools.permutations(range(len(loads)))))
        row = {"method": method, **options, "calls": len(found)}
        row |= {name: round(statistics.fmean(values), 3) for name, values in ratios.items()}
        row["worst of neighbours"] = round(max(ratios["neighbours"]), 3)
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if arguments.output:
        result = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": "python scripts/measure_head_shares.py " + " ".join(sys.argv[1:]),
            "versions": {name: version(name) for name in ("torch", "diffusers")},
            "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
