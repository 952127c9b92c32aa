"""Write the model card of `vidsparse-tiny` from what its training and its evaluation recorded.

    python scripts/write_model_card.py --model pipelines/vidsparse_pipelines/models/vidsparse-tiny \\
        --evaluation benchmarks/results/2026-11-22-cpu-evaluation-large.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

CARD = "README.md"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def share(entry: dict) -> str:
    if not entry["count"]:
        return "none"
    low, high = entry["wilson95"]
    return f"{100 * entry['share']:.0f} % [{100 * low:.0f}, {100 * high:.0f}] of {entry['count']}"


def adherence_table(evaluation: dict) -> list[str]:
    """One column per method, beside the checker's own score on the real clips of the same prompts."""
    titles = {"real": "real clips", "reconstructed": "real clips through the VAE"}
    columns = {titles.get(name, name): entry["adherence"] for name, entry in evaluation["methods"].items()}
    columns = {
        title: {k: v for k, v in c.items() if k != "attributes"} | c["attributes"] for title, c in columns.items()
    }
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in next(iter(columns.values())):
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(share(c[name]) for c in columns.values()) + " |")
    return lines


def vae_table(vae: dict) -> list[str]:
    lines = [
        "| size, dtype | mean over clips | lowest clip | by frame (error pooled over clips) |",
        "|---|---|---|---|",
    ]
    for name, v in vae.items():
        frames = ", ".join(f"{i}: {p:.1f}" for i, p in v["psnr_by_frame"].items())
        lines.append(f"| {name} | {v['psnr_mean_over_clips']:.1f} dB | {v['psnr_lowest_clip']:.1f} dB | {frames} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, help="results.json of scripts/evaluate_tiny_model.py")
    args = parser.parse_args()
    training = json.loads((args.model / "training.json").read_text())
    config = training["config"]
    seconds = training["seconds"]
    small, large = config["small"], config["large"]
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        "pipeline_tag: text-to-video",
        "---",
        "# vidsparse-tiny",
        "",
        "A text-to-video model of 14 million parameters in the exact diffusers format of Wan: `WanPipeline."
        "from_pretrained(folder)` loads it with stock diffusers. It draws coloured shapes that move, and serves to try,",
        "test and measure sparse attention where no other model is at hand. It knows nothing else of the world.",
        "",
        "## What it was trained on",
        "Only on clips that this project draws from sentences of its own grammar (`vidsparse_pipelines.clips`): one or "
        "two objects (6 shapes, 8 colours, 3 sizes, 3 textures) in 10 motions at 3 speeds, in front of one another or "
        "side by side, on 6 background colours with 4 textures, with camera pans. One spec in 16, by a hash of its "
        "attributes, is held out of training.",
        "",
        "## How",
        "```",
        "python scripts/train_tiny_model.py --work-dir runs/tiny --output "
        "pipelines/vidsparse_pipelines/models/vidsparse-tiny \\",
        "    --checker pipelines/vidsparse_pipelines/clips/checker.safetensors",
        "```",
        f"On one {training['hardware']}, seed {config['seed']}, torch {training['versions']['torch']}, in two runs that "
        f"resumed one another: VAE {seconds['vae']:.0f} s, latents {seconds['latents']:.0f} s, transformer with text "
        f"encoder {seconds['dit']:.0f} s, prompt checker {seconds['checker']:.0f} s; "
        f"{sum(seconds.values()) / 60:.1f} minutes in all. Learning rates follow the clock, so a rerun gives a model "
        "like this one, not the same bits.",
        "",
        f"Sizes: small {small[1]}x{small[0]} (2,016 tokens at 81 frames; the default) and large {large[1]}x{large[0]} "
        f"(5,040 tokens). Lengths seen in training: 17, 49 and {config['num_frames']} frames at the small size, 33 and "
        f"{config['num_frames']} at the large one. Made for 16 frames a second, guidance 4, flow shift "
        f"{config['flow_shift']:g}, 20 to 30 UniPC steps.",
        "",
        "## Reconstruction by the VAE",
        "PSNR (peak to peak) on 32 held-out clips of 81 frames, encoded and decoded chunk by chunk as the pipeline "
        "does.",
        "",
        *vae_table(training["vae"]),
        "",
    ]
    if args.evaluation:
        evaluation = json.loads(args.evaluation.read_text())
        settings = evaluation["settings"]
        lines += [
            "## Prompt adherence",
            "Held-out prompts; every attribute is read back from the pixels by the prompt checker, and a clip is right "
            "when all of them are. 95 % Wilson intervals. The checker itself is right on "
            f"{share(evaluation['checker']['on_held_out_real_clips']['all_right'])} held-out real clips.",
            f"Size {settings['size']}, {settings['frames']} frames, {settings['steps']} steps, {settings['dtype']}, on "
            f"{evaluation['device']}:",
            "```",
            evaluation["command"],
            "```",
            "",
            *adherence_table(evaluation),
            "",
        ]
    lines += [
        "## Limits",
        "- It knows the words of its grammar only; every other word is `<unk>`.",
        "- Outlines wobble: crosses, stars and rings in fast rotation, and small objects. Two objects that pass in front "
        "of one another can fade or merge. The transformer's loss was still falling when its time was up.",
        "- The checker is lenient with a wobbling outline: it was validated on clean clips, and has been seen to take a "
        "star-like square for a square.",
        "- Longer than 81 frames it goes on, but was never trained there.",
        "- Background colours are black, gray, navy, brown, teal and maroon; objects have brighter colours.",
        "",
        "## Files (sha256)",
        "```",
    ]
    files = sorted(p for p in args.model.rglob("*") if p.is_file() and p.name != CARD)
    lines += [f"{sha256(p)}  {p.relative_to(args.model).as_posix()}" for p in files]
    lines += ["```", ""]
    (args.model / CARD).write_text("\n".join(lines))


if __name__ == "__main__":
    main()
