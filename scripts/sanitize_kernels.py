"""Run a few small cases of every family of kernels under NVIDIA's compute-sanitizer, on a CUDA GPU.

    python scripts/sanitize_kernels.py --output sanitizer.json                       memcheck, then racecheck, all families
    python scripts/sanitize_kernels.py --families forward,hopper --tools memcheck
    python scripts/sanitize_kernels.py --run hopper                                  the cases alone, without the sanitizer

memcheck finds accesses outside of what was allocated, racecheck unordered accesses to shared memory. Every family runs
once without the sanitizer, which also compiles its kernels, and then once under each tool, several families at a time.
PyTorch's caching of memory is off, so that each tensor is an allocation of its own and an access past its end is seen.
Results are checked for NaN only: what is right is for the tests and the soak to say.

Exit code: 0 nothing found, 1 something found or not run, 2 the arguments are wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidsparse_kernels import (
    arrange_clusters,
    block_sparse_attention,
    block_sparse_attention_with_tail,
    cluster,
    linear_branch,
    permute_tokens,
    pool_blocks,
    pooled_tail_attention,
    pooled_tail_merge_,
    qk_norm_rope_pair,
    sampled_error,
    score_tiles,
    select_from_qk,
    unpermute_tokens,
)
from vidsparse_kernels.testing import make_block_mask, make_qkv, make_variable_block_mask

TOOLS = ("memcheck", "racecheck")
KERNELS = Path(__file__).resolve().parents[1] / "kernels"
SHAPE: dict[str, Any] = dict(seq_len_q=333, seq_len_kv=411)
"""No multiple of any tile, and small, because the sanitizer makes a kernel hundreds of times slower."""
HANDED_OVER = re.compile(r"(items\.index\(.*\)|verdicts\.index\(.*\)|number)\.store\(")
"""Lines that write what one warp hands to another: `hopper_schedule.py`, `hopper.py`, and the control."""
DTYPES = (torch.bfloat16, torch.float32)


def inputs(dtype: torch.dtype, head_dim: int, *, contiguous: bool = False, **changes: Any) -> list[Tensor]:
    shape = {**SHAPE, "num_heads": 2, "num_kv_heads": 1, **changes}
    return list(
        make_qkv(head_dim=head_dim, dtype=dtype, device="cuda", contiguous=contiguous, **shape)  # pyright: ignore
    )


def attend(mask: Any, tensors: list[Tensor], backend: str, *, gradients: bool = False, **options: Any) -> None:
    query, key, value = tensors = [x.detach().requires_grad_(gradients) for x in tensors]
    out, lse = block_sparse_attention(query, key, value, mask, backend=backend, return_lse=True, **options)
    found = [out]
    if gradients:
        outputs = (out, lse) if not bool((lse == -torch.inf).any()) else (out,)
        found += torch.autograd.grad(outputs, tensors, [torch.randn_like(x) for x in outputs])
    check(*found)


def check(*results: Tensor) -> None:
    torch.cuda.synchronize()
    for result in results:
        assert not bool(result.isnan().any()), "a result holds NaN"


def bias() -> Tensor:
    return torch.randn(1, 1, SHAPE["seq_len_kv"], device="cuda")


def uniform(q_size: int, kv_size: int, **options: Any) -> Any:
    rows = dict(empty_rows=True, full_rows=True, num_heads=2, device="cuda")
    return make_block_mask(q_block_size=q_size, kv_block_size=kv_size, **{**SHAPE, **rows, **options})


def clusters(q_size: int, kv_size: int) -> Any:
    return make_variable_block_mask(
        num_q_blocks=5, num_kv_blocks=9, q_block_size=q_size, kv_block_size=kv_size, num_heads=2, offsets_heads=2,
        full_rows=True, device="cuda", **SHAPE,
    )  # fmt: skip


def forward() -> None:
    for dtype in DTYPES:
        attend(uniform(64, 32), inputs(dtype, 72), "triton", key_bias=bias())
        attend(uniform(128, 64), inputs(dtype, 64), "triton", skip_threshold=0.01)


def backward() -> None:
    for dtype in DTYPES:
        attend(uniform(64, 32), inputs(dtype, 72), "triton", gradients=True, key_bias=bias())
    attend(uniform(128, 64), inputs(torch.bfloat16, 128), "triton", gradients=True)


def descriptors() -> None:
    """The portable kernels through TMA, which small cases do not use by themselves."""
    from vidsparse_kernels.block_sparse_attention import backward, forward

    forward.MIN_DESCRIPTOR_FLOPS = backward.MIN_DESCRIPTOR_FLOPS = 0
    attend(uniform(128, 64), inputs(torch.bfloat16, 128), "triton", gradients=True)
    attend(clusters(64, 64), inputs(torch.bfloat16, 64), "triton", gradients=True)


def hopper() -> None:
    for head_dim in (64, 128, 72):
        attend(uniform(128, 128), inputs(torch.bfloat16, head_dim), "hopper")
    attend(uniform(128, 64), inputs(torch.float16, 128), "hopper", key_bias=bias())


def hopper_backward() -> None:
    """The gradient of query on its own kernel, after q-blocks without keys and after none, the LSE's gradient with these."""
    for kv_size, head_dim, empty_rows in ((128, 128, True), (64, 72, False)):
        mask = uniform(128, kv_size, empty_rows=empty_rows, density=0.6)
        attend(mask, inputs(torch.bfloat16, head_dim), "hopper", gradients=True)


def hopper_clusters() -> None:
    for head_dim in (64, 128):
        attend(clusters(64, 64), inputs(torch.bfloat16, head_dim), "hopper")


def variable_blocks() -> None:
    for dtype in DTYPES:
        attend(clusters(64, 64), inputs(dtype, 64), "triton", gradients=True)


def selection() -> None:
    query, key, _ = inputs(torch.bfloat16, 64)
    check(*pool_blocks(key, 64, kinds=("mean", "max", "min"), backend="triton").values())
    for choice in (dict(top_k=3), dict(top_p=0.8)):
        select_from_qk(query, key, q_block_size=64, kv_block_size=32, **choice)  # pyright: ignore[reportArgumentType]
    torch.cuda.synchronize()


def clustering() -> None:
    query, key, value = inputs(torch.bfloat16, 64, num_kv_heads=2)
    found = arrange_clusters(cluster(key, 21, iterations=2, backend="triton"), backend="triton")
    order = cluster(query, 5, iterations=2, backend="triton").order
    check(score_tiles(query, order, found.centroids, found.counts, 64, shift=100, backend="triton"))
    moved = permute_tokens((key, value), found.order, backend="triton")
    back = unpermute_tokens(moved, found.order, backend="triton")
    check(*back)
    assert torch.equal(back[0], key)


def pooled_tail() -> None:
    mask = uniform(128, 64)
    for dtype in DTYPES:
        query, key, value = tensors = [x.requires_grad_() for x in inputs(dtype, 64)]
        out, _ = pooled_tail_attention(query, key, value, mask, backend="triton")
        check(out, *torch.autograd.grad(out, tensors, torch.randn_like(out)))
        with torch.no_grad():
            out, lse = block_sparse_attention(query, key, value, mask, backend="triton", return_lse=True)
            check(pooled_tail_merge_(out, lse, query, key, value, mask, backend="triton")[0])


def hopper_tail() -> None:
    """Pools, their bias and attention over listed blocks and means in one kernel."""
    from vidsparse_kernels.pooled_tail.hopper_pooling import hopper_pool

    for kv_size, head_dim in ((64, 128), (128, 72)):
        query, key, value = inputs(torch.bfloat16, head_dim, contiguous=True)
        check(block_sparse_attention_with_tail(query, key, value, uniform(128, kv_size), backend="hopper_with_tail"))
        keys, values, matrix = hopper_pool(key, value, kv_size, first_order=True)
        assert matrix is not None
        check(keys, values, matrix)


def norms() -> None:
    query, key = (torch.randn(2, 333, 4 * 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weights = tuple(torch.randn(64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    check(*qk_norm_rope_pair(query, key, num_heads=4, weights=(weights[0], weights[1]), backend="triton"))


def error_sample() -> None:
    query, key, value = inputs(torch.bfloat16, 64, num_kv_heads=2)
    check(sampled_error(query, key, value, query, count=16, backend="triton"))


def linear() -> None:
    query, key, value = tensors = [x.requires_grad_() for x in inputs(torch.bfloat16, 64, num_kv_heads=2)]
    mask = uniform(64, 64)
    out = linear_branch(query, key, value, block_mask=mask, coverage="non_selected", backend="triton")
    check(out, *torch.autograd.grad(out, tensors, torch.randn_like(out)))


def hand_over() -> None:
    """No kernel of ours but a control: numbers handed from warp to warp by two mbarriers alone, as the Hopper kernel's
    scheduler does. What racecheck says of it is no race."""
    from hand_over import handed_over

    assert handed_over(8) == list(range(8))


FAMILIES = {
    function.__name__: function
    for function in (
        forward, backward, hopper, hopper_backward, hopper_clusters, variable_blocks, descriptors, selection, clustering,
        pooled_tail, hopper_tail, norms, error_sample, linear, hand_over,
    )
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the families asked for under the tools asked for, print a row each, write the file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated, of " + ", ".join(FAMILIES))
    parser.add_argument("--tools", default=",".join(TOOLS), help="comma-separated, of " + ", ".join(TOOLS))
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after so long (default 240)")
    parser.add_argument("--at-once", type=int, default=8, help="families at a time (default 8)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--run", metavar="FAMILY", help="only run the cases of a family")
    arguments = parser.parse_args(argv)
    families, tools = ([arguments.run] if arguments.run else arguments.families.split(",")), arguments.tools.split(",")
    for name, known in (*((name, FAMILIES) for name in families), *((name, TOOLS) for name in tools)):
        if name not in known:
            print(f'must be one of {", ".join(known)}, got "{name}"', file=sys.stderr)
            return 2
    if not torch.cuda.is_available():
        print("This needs a CUDA GPU.", file=sys.stderr)
        return 2
    if arguments.run:
        FAMILIES[arguments.run]()
        return 0
    deadline = time.monotonic() + arguments.seconds
    with ThreadPoolExecutor(arguments.at_once) as pool:
        rows = [row for found in pool.map(lambda name: examine(name, tools, deadline), families) for row in found]
    control = next((row for row in rows if row["family"] == "hand_over" and row["tool"] == "racecheck"), {})
    for row in rows:
        if row.get("handed_over") and not control.get("handed_over") and row["errors"] is not None:
            row["errors"] += row["handed_over"]
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": os.environ.get("VIDSPARSE_COMMIT", "unknown"),
        "command": " ".join(["python scripts/sanitize_kernels.py", *(sys.argv[1:] if argv is None else argv)]),
        "rows": rows,
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any(row["errors"] != 0 for row in rows) else 0


def examine(family: str, tools: list[str], deadline: float) -> list[dict[str, Any]]:
    """One row a tool; "errors" is None where the family did not run to its end."""
    rows = [one_run(family, None, deadline)]
    if rows[0]["errors"] == 0:
        rows += [one_run(family, tool, deadline) for tool in tools]
    return rows


def one_run(family: str, tool: str | None, deadline: float) -> dict[str, Any]:
    """The row of one family under one tool, or under none."""
    started = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--run", family]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if tool is not None:
        command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", *command]
    row: dict[str, Any] = {"family": family, "tool": tool or "none", "errors": None, "says": ""}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=max(1.0, deadline - started)
        )
        text = done.stdout + done.stderr
        row.update(outcome(text, done.returncode, tool))
    except subprocess.TimeoutExpired:
        row["says"] = "no time left"
    except FileNotFoundError as error:
        row["says"] = str(error)
    row["seconds"] = round(time.monotonic() - started, 1)
    print(
        f"{row['family']:16s} {row['tool']:10s} errors {row['errors']}  {row['seconds']} s  {row['says'][:300]}",
        flush=True,
    )
    return row


def outcome(text: str, code: int, tool: str | None) -> dict[str, Any]:
    """What the output of a run says: the number of errors, and the lines that tell of them."""
    if tool is None:
        return {"errors": 0 if code == 0 else None, "says": "" if code == 0 else text[-1000:]}
    counts = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    counts += [int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)]
    reports = re.split(r"=+ (?=Error: Race|RACECHECK)", text)[1:]
    roles = sum(is_role_byte(report) for report in reports)
    handed_over = sum(is_handed_over(report) for report in reports)
    if not counts or code != 0 and not sum(counts):
        return {"errors": None, "says": text[-1000:]}
    lines = [line for line in text.splitlines() if line.startswith("=========") and len(line.split()) > 1]
    return {
        "errors": sum(counts) - roles - handed_over,
        "role_bytes": roles,
        "handed_over": handed_over,
        "says": "\n".join(lines[:60]) if sum(counts) else "",
    }


def is_role_byte(report: str) -> bool:
    """Whether a report of a race is about nothing but the byte by which Triton tells a warp its role in a kernel.

    Triton writes it before, and reads it after, a barrier of all warps, which the two sides reach at different
    instructions; racecheck takes those for two barriers. The accesses carry the lines of the kernel's `def` and of
    `gl.warp_specialize`, where no code of ours touches shared memory.
    """
    accesses = re.findall(r"access at (\w+)\+0x[0-9a-f]+ in (\S+\.py):(\d+)", report)
    return bool(accesses) and all(is_role_line(kernel, file, int(line)) for kernel, file, line in accesses)


def is_role_line(kernel: str, file: str, line: int) -> bool:
    """Whether the line is the `def` of the kernel or its call of `gl.warp_specialize`."""
    for lines in sources(kernel, file):
        # A condition around the call lends its own line to it.
        if "".join(lines[line : line + 1]).startswith(f"def {kernel}(") or any(
            text.strip() == "gl.warp_specialize(" for text in lines[line : line + 2]
        ):
            return True
    return False


def is_handed_over(report: str) -> bool:
    """Whether all writes in a report of a race are to the numbers that one warp hands to another: the writer's warps meet
    at a barrier, then one thread arrives at an mbarrier, where the reader waits.

    racecheck does not follow that order: it reports the same of `hand_over.py`, which does nothing else. Where it stays
    silent about that, `main` counts these reports as errors.
    """
    writes = re.findall(r"Write access at (\w+)\+0x[0-9a-f]+ in (\S+\.py):(\d+)", report)
    return bool(writes) and all(
        any(HANDED_OVER.search("".join(lines[int(line) : int(line) + 1])) for lines in sources(kernel, file))
        for kernel, file, line in writes
    )


def sources(kernel: str, file: str) -> list[list[str]]:
    """The lines, counted from 1, of our source files of that name: those that define the kernel where some do, else all,
    as the sanitizer names files without their folder."""
    paths = [path for folder in (KERNELS, Path(__file__).parent) for path in folder.rglob(Path(file).name)]
    found = [["", *path.read_text().splitlines()] for path in paths]
    return [lines for lines in found if any(text.startswith(f"def {kernel}(") for text in lines)] or found


if __name__ == "__main__":
    sys.exit(main())
