"""Error of one attention call under each method, on query, key and value recorded from the bundled model.

    python scripts/compare_selections.py --output selections.json
    python scripts/compare_selections.py --methods pooled,semantic,vidsparse --densities 0.15,0.25

The bundled model draws one clip; at some steps the query, key and value of every self-attention are kept. Each method then
attends over them alone, without what earlier steps leave behind, and its output is compared with dense attention:
|sparse - dense| / |dense|, as the mean over heads, by layer. Runs on a CPU in a minute or two.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.wan.pipeline_wan import WanPipeline

from vidsparse.attention import attend, make_context
from vidsparse.layout import LatentGrid, TokenLayout
from vidsparse.recipe import Recipe
from vidsparse_pipelines import bundled_model_path

PROMPT = "a large red star spins on a checkered navy background"
METHODS = ("radial", "svg1", "random", "pooled", "pisa", "semantic", "vidsparse")
Record = tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]


def record(
    height: int, width: int, num_steps: int, steps: tuple[int, ...], device: str = "cpu"
) -> tuple[LatentGrid, list[Record]]:
    """Step, layer, query, key and value of each self-attention, `[1, seq_len, heads, head_dim]`, guidance branch "cond"."""
    pipe = WanPipeline.from_pretrained(str(bundled_model_path())).to(device)
    pipe.set_progress_bar_config(disable=True)
    grid = LatentGrid(21, height // 8, width // 8)
    found: list[Record] = []
    calls = {"forward": -1, "layer": 0}
    original = F.scaled_dot_product_attention

    def keep(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if query.shape[2] == grid.num_tokens == key.shape[2]:
            step, branch = divmod(calls["forward"], 2)
            if branch == 0 and step in steps:
                found.append((step, calls["layer"], *(x.transpose(1, 2).clone() for x in (query, key, value))))
            calls["layer"] += 1
        return original(query, key, value, *args, **kwargs)

    def start(module: Any, args: Any) -> None:
        calls["forward"] += 1
        calls["layer"] = 0

    hook = pipe.transformer.register_forward_pre_hook(start)
    F.scaled_dot_product_attention = keep
    try:
        pipe(
            PROMPT,
            negative_prompt="",
            height=height,
            width=width,
            num_frames=81,
            num_inference_steps=num_steps,
            guidance_scale=4.0,
            max_sequence_length=64,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    finally:
        F.scaled_dot_product_attention = original
        hook.remove()
    return grid, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated, NAME:OPTION=VALUE:...")
    parser.add_argument("--densities", default="0.15,0.25,0.35")
    parser.add_argument("--size", default="96x160", help="HEIGHTxWIDTH")
    parser.add_argument("--steps", type=int, default=12, help="of the clip that is recorded")
    parser.add_argument("--record", type=Path, help="keep the tensors in this file, or take them from it")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    height, width = (int(part) for part in arguments.size.split("x"))
    if arguments.record is not None and arguments.record.exists():
        grid_sizes, found = torch.load(arguments.record, map_location=arguments.device)
        grid = LatentGrid(*grid_sizes)
    else:
        steps = (arguments.steps // 3, 2 * arguments.steps // 3)
        grid, found = record(height, width, arguments.steps, steps, arguments.device)
        if arguments.record is not None:
            torch.save(((grid.frames, grid.height, grid.width), found), arguments.record)
    layout = TokenLayout(grid)
    rows = []
    dense = [attention(q, k, v) for _, _, q, k, v in found]
    for item in arguments.methods.split(","):
        name, *pairs = item.split(":")
        options = {
            key: json.loads(value) if value[0] in "0123456789tf" else value
            for key, _, value in (pair.partition("=") for pair in pairs)
        }
        for density in (float(part) for part in arguments.densities.split(",")):
            context = make_context(layout, Recipe.from_options(name, density=density, **options), arguments.device)
            errors: dict[int, list[float]] = {}
            taken, started = [], time.perf_counter()
            for (_, layer, q, k, v), want in zip(found, dense, strict=True):
                out, selection = attend(q, k, v, context)
                if selection is not None:
                    taken.append(float(selection.density))
                elif context.parts is not None and context.parts.block_mask is not None:
                    taken.append(context.parts.block_mask.density)
                error = (out - want).norm(dim=(1, 3)) / want.norm(dim=(1, 3))
                errors.setdefault(layer, []).append(float(error.mean()))
            by_layer = {layer: round(sum(values) / len(values), 4) for layer, values in errors.items()}
            row = {
                "method": item,
                "density_asked": density,
                "density": round(sum(taken) / len(taken), 4),
                "error": round(sum(by_layer.values()) / len(by_layer), 4),
                "by_layer": by_layer,
            }
            rows.append(row)
            print(
                f"{item:40} density {row['density']:.3f}  error {row['error']:.4f}  by layer "
                f"{' '.join(f'{x:.3f}' for x in by_layer.values())}  ({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
    if arguments.output:
        result = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "torch": torch.__version__,
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


if __name__ == "__main__":
    sys.exit(main())
