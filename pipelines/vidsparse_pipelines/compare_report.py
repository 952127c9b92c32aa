"""The page of a comparison: numbers, and players side by side; one file that needs no other."""

from __future__ import annotations

import base64
import html
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .compare import FLOOR, REPORT, Comparison
from .video import output_error, write_video

STYLE = """
body{font:14px sans-serif;margin:2em;color:#222}table{border-collapse:collapse;margin:1em 0}
th,td{padding:.3em .8em;text-align:right;border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}
figure{display:inline-block;margin:.4em}figcaption{font-size:12px;max-width:240px}
video{width:240px;image-rendering:pixelated;display:block}pre{font-size:12px}
"""
SCRIPT = """
document.getElementById('play').onclick=()=>{const all=document.querySelectorAll('video');
all.forEach(v=>{v.pause();v.currentTime=0});all.forEach(v=>v.play())};
"""


def interval(entry: dict[str, Any] | None, digits: int = 2) -> str:
    """`30.12 (29.50 to 30.80)`, or nothing."""
    if not entry or not entry.get("clips"):
        return ""
    low, high = entry["bootstrap95"]
    return f"{entry['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def mean(entry: dict[str, Any] | None, digits: int = 2) -> str:
    """`30.12`, or nothing."""
    return f"{entry['mean']:.{digits}f}" if entry and entry.get("clips") else ""


def table(data: dict[str, Any], value: Callable[..., str] = interval) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the numbers by method; `value` says how a number is written."""
    columns = ["method", "clips", "density", "PSNR, dB", "SSIM", "LPIPS", "adherence", "denoise, s", "times as fast"]
    rows = []
    for label, entry in data["methods"].items():
        right = entry.get("adherence")
        seconds = entry.get("seconds", {})
        rows.append(
            [
                label,
                str(entry["clips"]),
                f"{entry['density']:.2f}" if "density" in entry else "1" if entry["clips"] else "",
                value(entry.get("psnr")),
                value(entry.get("ssim"), 4),
                value(entry.get("lpips"), 4),
                f"{right['right']} of {right['count']}" if right else "",
                value(seconds.get("denoise")),
                value(entry.get("denoise_speedup")),
            ]
        )
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def page(comparison: Comparison, data: dict[str, Any], players: int) -> str:
    """The whole page.

    Args:
        comparison: has the clips.
        data: its results.
        players: of how many clips to show the videos.
    """
    header, rows = table(data)
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in data["notes"])
    settings = data["settings"]
    shape = f"{settings['num_frames']} frames of {settings['width']}x{settings['height']}, "
    shape += f"{settings['num_inference_steps']} steps, {data['model']['name']}, {data['device']}"
    sections = []
    for clip, row in list(zip(comparison.clips, data["clips"], strict=True))[:players]:
        figures = []
        for method in comparison.methods:
            if method.label == FLOOR or method.label not in row["methods"]:
                continue
            entry = row["methods"][method.label]
            parts = [f"{entry['psnr']:.1f} dB"] if "psnr" in entry else []
            parts += [f"{entry['timings_s']['denoise']:.1f} s"]
            parts += ["as asked" if entry["right"] else "not as asked"] if "right" in entry else []
            video = as_data(comparison.frames(method, clip), settings["fps"] or 16)
            figures.append(
                f'<figure><video muted loop autoplay playsinline controls src="{video}"></video>'
                f"<figcaption><b>{html.escape(method.label)}</b><br>{', '.join(parts)}</figcaption></figure>"
            )
        sections.append(f"<h3>{html.escape(clip.prompt)} (seed {clip.seed})</h3>{''.join(figures)}")
    environment = html.escape(json.dumps({k: data[k] for k in ("environment", "model", "settings")}, indent=1))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vidsparse compare</title>'
        f"<style>{STYLE}</style></head><body><h1>Sparse against dense</h1><p>{html.escape(shape)}</p>{notes}"
        f"<table><tr>{head}</tr>{cells}</table>"
        "<p>Means with 95 % bootstrap intervals over clips, each compared with the dense clip of the same prompt and "
        f"seed. “{FLOOR}” is dense attention by another kernel: what rounding alone changes.</p>"
        f'<button id="play">play all from the start</button>{"".join(sections)}'
        f"<details><summary>environment and settings</summary><pre>{environment}</pre></details>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def as_data(frames: Any, fps: float) -> str:
    """A clip as a data URL: MP4, H.264."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder) / "clip.mp4", frames, fps)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def write_page(comparison: Comparison, data: dict[str, Any], players: int = 8) -> Path:
    """Write the page whole or not at all; returns its path.

    Raises:
        OutputError: it cannot be written.
    """
    path = comparison.folder / REPORT
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(page(comparison, data, players), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
