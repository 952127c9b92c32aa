"""`import vidsparse` is light and needs neither CUDA, Triton nor the network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "kernels/torch-ext", "pipelines", "lora")),
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy():
    heavy = ("torch", "diffusers", "transformers", "numpy", "triton")
    code = f"import sys, vidsparse; print([m for m in {heavy!r} if m in sys.modules], len(vidsparse.__version__) > 0)"
    assert run(code) == "[] True"


def test_import_is_quick():
    code = "import time; t = time.perf_counter(); import vidsparse; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.1


def test_command_line_loads_later_packages_only_when_needed():
    later = ("torch", "diffusers", "vidsparse_kernels", "vidsparse_pipelines", "vidsparse_lora")
    assert run(f"import sys, vidsparse.cli; print([m for m in {later!r} if m in sys.modules])") == "[]"


def test_names_and_settings_without_torch():
    code = (
        "import sys, vidsparse\n"
        "from vidsparse import LatentGrid, RadialConfig, Recipe, Report, Schedule, TokenLayout\n"
        "vidsparse.Recipe.from_options('radial', density=0.3)\n"
        "print('torch' in sys.modules)"
    )
    assert run(code) == "False"


def test_processor_and_mask_with_triton_blocked():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, vidsparse\n"
        "from vidsparse.masks.radial import radial_block_mask\n"
        "vidsparse.RadialProcessor()\n"
        "mask = radial_block_mask(vidsparse.LatentGrid(5, 8, 8), q_block_size=16, kv_block_size=16)\n"
        "q = torch.randn(1, 320, 2, 16)\n"
        "print(tuple(vidsparse.sparse_attention(q, q, q, mask).shape))"
    )
    assert run(code) == "(1, 320, 2, 16)"


def test_every_exported_name_resolves():
    import vidsparse

    for name in vidsparse.__all__:
        assert getattr(vidsparse, name) is not None
    assert set(vidsparse.__all__) <= set(dir(vidsparse))
    assert not hasattr(vidsparse, "no_such_name")


BARE = """
import torch
import vidsparse{imports}
from vidsparse.testing import CASES
case = CASES[{family!r}]
model = case.build().eval()
model.set_attn_processor({processor}(warmup_steps=0, dense_layers=0, min_tokens=0))
with torch.no_grad():
    model(**case.inputs(1, torch.Generator().manual_seed(0)), return_dict=False)
print(model._vidsparse_binding.run.report.num_sparse_calls)
"""


def test_the_advertised_line_in_a_fresh_process():
    """Python looks the method up before the processor is made: what installs it must reach that method too."""
    cases = (
        ("", "Wan", "vidsparse.RadialProcessor"),
        ("\nfrom vidsparse import RadialProcessor", "Wan", "RadialProcessor"),
        ("\nfrom vidsparse import RadialProcessor", "Mochi", "RadialProcessor"),
    )
    for imports, family, processor in cases:
        assert int(run(BARE.format(imports=imports, family=family, processor=processor))) >= 2


def test_other_processors_pass_through_to_diffusers():
    code = (
        "import vidsparse\n"
        "from vidsparse.testing import CASES\n"
        "model = CASES['Wan'].build()\n"
        "stock = dict(model.attn_processors)\n"
        "vidsparse.RadialProcessor()\n"
        "try:\n"
        "    model.set_attn_processor({})\n"
        "except ValueError as error:\n"
        "    print('A dict of processors' in str(error))\n"
        "model.set_attn_processor(dict(stock))\n"
        "print(model.attn_processors == stock)"
    )
    assert run(code).split() == ["True", "True"]
