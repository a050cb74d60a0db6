"""Deltas of many tenants added to a batch by Triton kernels: the launches, and the memory between them."""

from __future__ import annotations

import torch
import triton

from vllm_prinmix.kernels.descriptors import Arena, SiteTables
from vllm_prinmix.kernels.expand import expand_kernel
from vllm_prinmix.kernels.gather import BLOCKS, STEP, gather_kernel
from vllm_prinmix.kernels.lookup import embedding_kernel, rms_norm_kernel
from vllm_prinmix.kernels.segments import Segments
from vllm_prinmix.kernels.shrink import shrink_kernel
from vllm_prinmix.kernels.unpack import CHUNK, offset

DECODE_ROWS = 16  # of a segment, at most, for the kernels' decode shapes
DECODE_BATCH = 64  # rows of a batch up to which all its segments take them
UNLIMITED = 1 << 30
LOOKUP_PROGRAMS = 4  # for each row of an embedding


class Workspace:
    """What lies between the launches, shared by all sites: they run one after the other.

    ``columns``: of t, `descriptors.columns` summed over a site's parts; ``groups``: likewise. Both are
    maxima over the tenants that may come.
    """

    def __init__(
        self, rows: int, cols: int, columns: int, groups: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        steps = triton.cdiv(cols, STEP)
        self.columns, self.groups = columns, groups
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
    _expand(y, rows, site, arena, segments, workspace, programs, asm)


def embedding_(
    y: torch.Tensor,
    ids: torch.Tensor,
    site: SiteTables,
    arena: Arena,
    segments: Segments,
    workspace: Workspace,
    programs: int,
    asm: bool,
) -> None:
    """y [rows, hidden] += dE[ids] for the rows of tenants; ids outside the table add nothing.

    ``site``: widths (hidden,), cols the vocabulary, parts from `descriptors.embedding_part`.
    """
    rows = ids.shape[0]
    if rows == 0:
        return
    embedding_kernel[(rows, LOOKUP_PROGRAMS)](
        arena.words, arena.tables, arena.floats, arena.halves, site.entries, segments.slots, segments.starts,
        segments.counts, segments.total, segments.order, ids, site.cols, site.col_offset, site.col_blocks,
        site.row_blocks[0], site.widths[0], workspace.t, workspace.t.stride(0), workspace.partials,
        workspace.partials.stride(0), y, y.stride(0), SEGMENTS=segments.width, num_warps=2,
    )  # fmt: skip
    _expand(y, rows, site, arena, segments, workspace, programs, asm)


def norm_(
    y: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    arena: Arena,
    segments: Segments,
    eps: float,
) -> None:
    """y = RMSNorm(x) with the tenant's weight, for the rows of tenants that have one; others stay.

    x and y [rows, size] or [rows, heads, size], the last dimension contiguous. ``weights`` int64 [slots]:
    position of a slot's float32 [size] in the arena, in elements; -1 for none.
    """
    x, y = (v.unsqueeze(1) if v.dim() == 2 else v for v in (x, y))
    rows, heads, size = x.shape
    if rows == 0:
        return
    block = triton.next_power_of_2(size)
    rms_norm_kernel[(rows, heads)](
        arena.floats, weights, segments.slots, segments.starts, segments.counts, segments.total,
        segments.order, x, x.stride(0), x.stride(1), y, y.stride(0), y.stride(1), size, eps,
        SEGMENTS=segments.width, SIZE=block, num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip


def _expand(
    y: torch.Tensor,
    rows: int,
    site: SiteTables,
    arena: Arena,
    segments: Segments,
    workspace: Workspace,
    programs: int,
    asm: bool,
) -> None:
    for shape, least, most in launches(rows):
        expand_kernel[(programs,)](
            arena.words, arena.tables, arena.floats, arena.halves, site.entries, segments.slots,
            segments.starts, segments.counts, segments.order, site.parts, workspace.t, workspace.t.stride(0),
            workspace.partials, workspace.partials.stride(0), y, y.stride(0), least, most,
            ASM=asm, SEGMENTS=segments.width, PARTS=len(site.widths), **shape["expand"],
        )  # fmt: skip


# Rows per task decide: few leave the product bound by the packed bytes, many by the tensor cores.
# Chosen so that no target spills registers and that every program fits the smallest shared memory (100 KB).
# Two warps share 64 rows of codes: with four, Hopper and Blackwell would take instructions that want operands
# in shared memory, which costs more than it brings while every code is unpacked in registers.
# In the second product, 16 accumulators for 128 outputs leave room for 16 rows.
COMMON = {"num_warps": 2, "enable_fp_fusion": True}  # stated, as Triton's default changes with its version
DECODE = {
    "shrink": {"M": 8, "STAGES": 3, **COMMON},
    "expand": {"M": 8, "BLOCKS": 4, "N": 64, "STAGES": 4, **COMMON},
}
PREFILL = {
    "shrink": {"M": 32, "STAGES": 2, **COMMON},
    "expand": {"M": 16, "BLOCKS": 4, "N": 32, "STAGES": 3, **COMMON},
}
# AMD's matrix instructions take 16 rows at least.
AMD_DECODE = {
    "shrink": {"M": 16, "STAGES": 1, **COMMON},
    "expand": {"M": 16, "BLOCKS": 4, "N": 32, "STAGES": 2, **COMMON},
}
AMD_PREFILL = {
    "shrink": {"M": 16, "STAGES": 1, **COMMON},
    "expand": {"M": 16, "BLOCKS": 4, "N": 32, "STAGES": 2, **COMMON},
}


def launches(rows: int) -> list[tuple[dict, int, int]]:
    """(shape, least and most rows of a segment that it takes) of each launch for a batch of ``rows``."""
    decode, prefill = (AMD_DECODE, AMD_PREFILL) if torch.version.hip else (DECODE, PREFILL)
    if rows <= DECODE_BATCH:
        return [(decode, 1, UNLIMITED)]
    return [(decode, 1, DECODE_ROWS), (prefill, DECODE_ROWS + 1, UNLIMITED)]


def programs_for(device: torch.device) -> int:
    """Programs of a launch: as many as fit on the device at once (registers allow four of a decode shape)."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
