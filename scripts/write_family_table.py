"""Run every family through its checks and write what came out to docs/families.md.

    pip install cache-dit torchao && python scripts/write_family_table.py

Takes about five minutes on one core; needs no network and no GPU. Nothing is written when a check fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vidsparse.processors.families import REFUSED
from vidsparse.testing import CASES

ROOT = Path(__file__).resolve().parent.parent
TESTS = [ROOT / "tests" / "core" / f"test_{name}.py" for name in ("model_families", "stacking", "context_parallel")]
TABLE = ROOT / "docs" / "families.md"

COLUMNS = {
    "bare processor": "test_full_mask_equals_stock",
    "sparse = masked dense": "test_sparse_equals_masked_dense",
    "text, conditions untouched": "test_text_and_conditions_keep_the_familys_processors",
    "checkpointing": "test_gradient_checkpointing_gives_the_same_gradients",
    "compile": "test_compiled_gives_the_same",
    "offload": "test_offload",
    "casting": "test_layerwise_casting",
    "LoRA": "test_lora",
    "pipeline": "test_a_pipeline_runs_with_a_bare_processor",
    "caches": "test_caches",
    "cache-dit": "test_cache_dit",
    "torchao": "test_quantised_linears",
    "context parallel": "test_two_processes_equal_one",
}
"""Head of a column -> the test behind it. A test may have more parameters than the family: all must pass."""

NO_SPLIT = {
    "LTX-2": "its tokens here do not divide by two",
    "LTX-2.3": "its tokens here do not divide by two",
    "Helios": "diffusers' plan names 40 blocks, the tiny model has fewer",
}
"""Families with a plan for several devices whose stock model cannot follow it in two processes."""

NOT_EVERY_FAMILY = ("pipeline", "caches", "cache-dit", "context parallel")
"""Columns whose tests have some families only; the others were not tried."""

HEAD = """\
# Model families

Written by `scripts/write_family_table.py` from a run of `tests/core/test_model_families.py`, `test_stacking.py` and
`test_context_parallel.py` with diffusers {diffusers}, on a CPU.

Every row is a tiny random model of the real diffusers class, on which nothing but
`transformer.set_attn_processor(processor)` was called, on a grid that fills no whole number of blocks and, where the
family has them, with padded prompts and their masks. The shapes that people run, from Wan at 480p to Flux at 4096 x 4096,
are in `tests/core/test_real_shapes.py`: narrow models of the same classes, every layer of which must find its grid and
text.

- *bare processor*: with every block kept, the output is the stock processor's within fp32 rounding; after the
  processor is taken off it is bit-identical to before.
- *sparse = masked dense*: with a random 40 % of blocks kept, the output is that of dense attention under the same mask.
- *batch 2*: both hold for two samples, too, whose prompts have different lengths where the family masks padding.
- *text, conditions untouched*: cross-attention, refiners, sound and adapters keep the family's own processors.
- *checkpointing*: gradients with and without gradient checkpointing are equal.
- *compile*: `compile_repeated_blocks(fullgraph=True)` gives the same output; "no blocks" where diffusers names none to
  compile.
- *offload*, *casting*, *LoRA*: group offload, accelerate's offload and layerwise casting to fp8, adapters added, fused,
  unfused and removed, before and after binding: the output is the stock model's with the same thing stacked.
- *pipeline*: a tiny pipeline of the real class runs from prompt to latents, with guidance; steps and branches are right.
- *caches*: FirstBlockCache, PyramidAttentionBroadcast, FasterCache, MagCache and TaylorSeer, as far as the stock pipeline
  takes them; at least one of them, "no caches" where diffusers has none for the model.
- *cache-dit* {cache_dit}: DBCache skips blocks as it does with the stock model, to the same output; "one block" where the
  tiny model has nothing to skip. *torchao* {torchao}: int8 weights, likewise, quantised before and after binding. Neither
  package is in the tests that every change runs.
- *context parallel*: two gloo processes with Ulysses give what one process gives, sparse; "no plan" where diffusers
  cannot split the model.
- A dot: not tried, as the tests make no tiny pipeline of that class; other words: why the stock model itself cannot.

"""

SOMETIMES_DENSE = """
## Calls that stay dense

The report of these calls says why, and under `strict` they raise `DenseFallbackError`:

- Kandinsky 5 where its pipeline asks for the model's own sparse attention (NABLA);
- Lumina 2 with captions of different lengths in one batch, Z-Image and HiDream with images of different sizes in one
  batch, Z-Image Omni with several images in one sequence;
- SkyReels-V2 with causal blocks, and any call whose attention mask is more than one entry per key.

## Remarks

- History (Helios, Framepack), reference images (Flux Kontext, Flux 2, Qwen-Image-Edit), keyframes (LTX-2), sound and
  conditions (MiniMax-H3) and the filling between image and caption (Z-Image, HiDream) count as text: they see and are
  seen by all.
- Motif-Video's last layers attend to the encoded video beside the one that is made; that copy counts as text, too, so
  these layers gain little.
- Latte is sparse within frames only; its attention over time has a few tokens.
- The released Cosmos models need torchvision, which diffusers uses to resize a mask.
- Flux 2 with key-value processors is refused when the processor is set.
"""

REFUSED_HEAD = """
## Refused

`set_attn_processor` and `vidsparse.apply` raise `UnsupportedModelError` with this sentence:

| transformer | why |
| --- | --- |
"""


def outcomes(report: Path) -> dict[tuple[str, str], str]:
    """(test, family) -> "✓" or the reason for which it was skipped.

    Raises:
        SystemExit: a test failed.
    """
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            sys.exit(f"{case.get('name')} failed; {TABLE.relative_to(ROOT)} stays as it is.")
        match = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", ""))
        if match is None:
            continue
        test, parameters = match.groups()
        families = [name for name in CASES if re.search(rf"(^|-){re.escape(name)}(-|$)", parameters)]
        skipped = case.find("skipped")
        if families and (skipped is None or (test, max(families, key=len)) not in found):
            outcome = "✓" if skipped is None else skipped.get("message", "skipped")
            found[test, max(families, key=len)] = outcome
    return found


def rows(found: dict[tuple[str, str], str]) -> list[str]:
    heads = ["family", "transformer", *COLUMNS]
    heads.insert(4, "batch 2")
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for family, case in CASES.items():
        model = case.build()
        cells = [
            found.get((test, family), "·") if column in NOT_EVERY_FAMILY else found[test, family]
            for column, test in COLUMNS.items()
        ]
        if not hasattr(model, "enable_cache"):
            cells[list(COLUMNS).index("caches")] = "no caches"
        if getattr(model, "_cp_plan", None) is None:
            cells[list(COLUMNS).index("context parallel")] = "no plan"
        elif family in NO_SPLIT:
            cells[list(COLUMNS).index("context parallel")] = NO_SPLIT[family]
        stock, sparse = cells[:2]
        cells.insert(2, "✓" if stock == sparse == "✓" and 2 in case.batches else "not tried")
        cells = ["no blocks" if cell.startswith("diffusers names no repeated blocks") else cell for cell in cells]
        cells = ["one block" if cell.startswith("one block of each kind") else cell for cell in cells]
        cells = ["diffusers adds no LoRA to it" if "'add_adapter'" in cell else cell for cell in cells]
        lines.append("| " + " | ".join([family, f"`{type(model).__name__}`", *cells]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TABLE, help="file to write")
    arguments = parser.parse_args()
    try:
        versions = {name.replace("-", "_"): version(name) for name in ("diffusers", "cache-dit", "torchao")}
    except PackageNotFoundError as error:
        sys.exit(f"{error.name} is not installed; the table has a column for it.")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *map(str, TESTS),
        ]
        subprocess.run(command, cwd=ROOT, check=False)
        if not report.exists():
            sys.exit("pytest wrote no report.")
        found = outcomes(report)
    refused = [f"| `{name}` | {reason[0].upper()}{reason[1:]}. |" for name, reason in REFUSED.items()]
    text = HEAD.format(**versions) + "\n".join(rows(found)) + "\n"
    arguments.output.write_text(text + SOMETIMES_DENSE + REFUSED_HEAD + "\n".join(refused) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
