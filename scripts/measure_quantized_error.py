"""Error of attention with 8-bit query and key on query, key and value recorded from the bundled model, and on random ones.

    python scripts/measure_quantized_error.py --output quantized.json

The reference attends with `quantize="int8"` over random lists of 30 % of the blocks, and over all of them, against float64:
|quantised - exact| / |exact| of the whole call and of the worst head. "without mean" leaves the mean in the keys. Runs on
a CPU in a minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from compare_selections import record  # noqa: E402

from vidsparse_kernels import BlockMask, block_sparse_attention  # noqa: E402
from vidsparse_kernels.block_sparse_attention.quantize import key_mean, quantize_reference, restored  # noqa: E402
from vidsparse_kernels.testing import make_qkv, masked_attention_oracle  # noqa: E402

BLOCK = 128


def errors(query: Tensor, key: Tensor, value: Tensor, density: float) -> dict[str, float]:
    """Relative errors of one call, of its worst head, and of the call without taking the mean away."""
    seq_len = query.shape[1]
    blocks = -(-seq_len // BLOCK)
    chosen = torch.rand(1, query.shape[2], blocks, blocks, generator=torch.Generator().manual_seed(0)) < density
    mask = BlockMask.from_dense(
        chosen | torch.eye(blocks, dtype=torch.bool),
        seq_len_q=seq_len,
        seq_len_kv=seq_len,
        q_block_size=BLOCK,
        kv_block_size=BLOCK,
    )
    exact = masked_attention_oracle(query, key, value, mask)[0]
    off = block_sparse_attention(query, key, value, mask, quantize="int8", backend="reference").double() - exact
    plain = restored(quantize_reference(query, key, torch.zeros_like(key_mean(key)), BLOCK), BLOCK)
    off_plain = block_sparse_attention(*plain, value.float(), mask, backend="reference").double() - exact
    return {
        "density": density,
        "error": float(off.norm() / exact.norm()),
        "worst_head": float((off.norm(dim=(1, 3)) / exact.norm(dim=(1, 3))).max()),
        "without_mean": float(off_plain.norm() / exact.norm()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=4, help="of the clip that is recorded; its first and last are")
    arguments = parser.parse_args()
    rows = []
    with torch.no_grad():
        for head_dim in (64, 128):
            tensors = make_qkv(seq_len_q=2048, num_heads=4, head_dim=head_dim)
            rows += [{"tensors": f"normal, head_dim {head_dim}", **errors(*tensors, d)} for d in (0.3, 1.0)]
        _, found = record(64, 96, arguments.steps, (0, arguments.steps - 1))
        for step, layer, query, key, value in found:
            rows += [{"tensors": f"step {step}, layer {layer}", **errors(query, key, value, d)} for d in (0.3, 1.0)]
    for row in rows:
        print(f"{row['tensors']:24s}" + " ".join(f"{name} {row[name]:.4f}" for name in list(row)[1:]))
    if arguments.output is not None:
        data = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", "scripts/measure_quantized_error.py", *sys.argv[1:]]),
            "versions": {"torch": torch.__version__},
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
