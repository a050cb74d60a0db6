"""Deltas of many tenants added to a batch by Triton kernels: the launches, and the memory between them."""

from __future__ import annotations

import torch
import triton

from vllm_prinmix.kernels.descriptors import Arena, SiteTables
from vllm_prinmix.kernels.expand import expand_kernel
from vllm_prinmix.kernels.gather import BLOCKS, STEP, gather_kernel
from vllm_prinmix.kernels.segments import Segments
from vllm_prinmix.kernels.shrink import shrink_kernel
from vllm_prinmix.kernels.unpack import CHUNK, offset

DECODE_ROWS = 16  # of a segment, at most, for the kernels' decode shapes
DECODE_BATCH = 64  # rows of a batch up to which all its segments take them
UNLIMITED = 1 << 30


class Workspace:
    """What lies between the launches, shared by all sites: they run one after the other.

    ``columns``: of t, `descriptors.columns` summed over a site's parts; ``groups``: tasks of a slot at a site.
    """

    def __init__(
        self, rows: int, cols: int, columns: int, groups: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        steps = triton.cdiv(cols, STEP)
        self.groups = groups
        chunks = torch.arange(STEP).view(-1, 8)[:, 0] // 8 % 16
        offsets = [[offset(c, w) for c in chunks.tolist()] for w in (1, 2, 4)]
        self.offsets = torch.tensor([*offsets, [1] * len(chunks)], dtype=torch.float32, device=device)
        self.offsets = self.offsets.repeat_interleave(CHUNK, dim=1).contiguous()  # [4, STEP]
        self.x = torch.zeros(rows * steps * STEP, dtype=dtype, device=device)
        self.sums = torch.zeros(rows * steps * 4, dtype=torch.float32, device=device)
        self.t = torch.zeros(rows, triton.cdiv(columns, 16) * 16, dtype=dtype, device=device)
        self.partials = torch.zeros(rows, groups, 4, dtype=torch.float32, device=device)


def linear_(
    y: torch.Tensor,
    x: torch.Tensor,
    site: SiteTables,
    arena: Arena,
    segments: Segments,
    workspace: Workspace,
    programs: int,
    asm: bool,
) -> None:
    """y [rows, outputs] += x [rows, cols] dW^T (+ bias) for the rows of tenants; other rows are not touched.

    x and the workspace have one dtype (bfloat16, float16 or float32); y may have any. The last dimension of
    both is contiguous. ``programs``: of a launch, constant; ``asm``: NVIDIA's inline assembly or its twin.
    """
    rows = x.shape[0]
    if rows == 0:
        return
    steps = triton.cdiv(site.col_blocks, BLOCKS)
    per_program = 1 if rows <= DECODE_BATCH else 8
    gather_kernel[(rows, triton.cdiv(steps, per_program))](
        x, x.stride(0), site.cols, site.col_offset, segments.total, segments.order,
        workspace.offsets, steps,        workspace.x, workspace.sums, STEPS=per_program, num_warps=1,
    )  # fmt: skip
    views = arena.words, arena.tables, arena.floats, arena.halves
    batch = site.entries, segments.slots, segments.starts, segments.counts, segments.order
    between = workspace.t, workspace.t.stride(0), workspace.partials, workspace.partials.stride(0)
    for shape, least, most in launches(rows):
        shrink_kernel[(programs,)](
            *views, *batch, site.col_blocks, workspace.x, workspace.sums, steps, *between, y, y.stride(0),
            least, most, ASM=asm, SEGMENTS=segments.width,
            STEPS=triton.next_power_of_2(steps), **shape["shrink"],
        )  # fmt: skip
        expand_kernel[(programs,)](
            *views, *batch, site.parts, *between, y, y.stride(0), least, most,
            ASM=asm, SEGMENTS=segments.width, PARTS=len(site.widths), **shape["expand"],
        )  # fmt: skip


# Rows per task decide: few leave the product bound by the packed bytes, many by the tensor cores.
DECODE = {
    "shrink": {"M": 8, "STAGES": 3, "num_warps": 2},
    "expand": {"M": 8, "BLOCKS": 4, "N": 64, "STAGES": 4, "num_warps": 2},
}
PREFILL = {
    "shrink": {"M": 64, "STAGES": 2, "num_warps": 4},
    "expand": {"M": 32, "BLOCKS": 4, "N": 64, "STAGES": 3, "num_warps": 4},
}


def launches(rows: int) -> list[tuple[dict, int, int]]:
    """(shape, least and most rows of a segment that it takes) of each launch for a batch of ``rows``."""
    if rows <= DECODE_BATCH:
        return [(DECODE, 1, UNLIMITED)]
    return [(DECODE, 1, DECODE_ROWS), (PREFILL, DECODE_ROWS + 1, UNLIMITED)]
