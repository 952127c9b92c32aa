"""The smallest kernel that hands numbers from one warpgroup to another warp through shared memory, ordered by mbarriers.

`sanitize_kernels.py` runs it to see what racecheck makes of that pattern, which `hopper_schedule.py` uses.
"""

# In kernels every value is the compiler's, which its annotations for the host do not describe.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAssignmentType=false

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from vidsparse_kernels.block_sparse_attention.hopper_schedule import warpgroup_barrier


@gluon.jit
def _write(out, number, full, empty, count):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for turn in range(count):
        mbarrier.wait(empty, (turn & 1) ^ 1)
        number.store(gl.full([1], 0, gl.int32, one) + turn)
        warpgroup_barrier()
        mbarrier.arrive(full, count=1)


@gluon.jit
def _read(out, number, full, empty, count):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for turn in range(count):
        mbarrier.wait(full, turn & 1)
        gl.store(out + turn, gl.sum(number.load(one), 0))
        warpgroup_barrier()
        mbarrier.arrive(empty, count=1)


@gluon.jit
def hand_over_kernel(out, count):
    number = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize(
        [(_write, (out, number, full, empty, count)), (_read, (out, number, full, empty, count))], [1], [24]
    )


def handed_over(count: int) -> list[int]:
    """The numbers 0 .. count - 1 as they arrive."""
    out = torch.full((count,), -1, dtype=torch.int32, device="cuda")
    hand_over_kernel[(1,)](out, count, num_warps=4)
    return out.tolist()
