"""Which rows of a batch belong to which slot: tensors of fixed size that kernels in CUDA graphs read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Segments:
    """The rows of a batch sorted by slot. A *segment* is the rows of one slot; rows of the base are in none.

    The tensors keep their place and size, so captured CUDA graphs see the batch that was set last.
    ``max_tenants`` bounds the slots in one batch, ``max_rows`` the rows of one batch.
    """

    def __init__(self, max_tenants: int, max_rows: int, device: torch.device | str = "cpu") -> None:
        self.max_tenants, self.max_rows = max_tenants, max_rows
        self.width = max(16, 1 << (max_tenants - 1).bit_length())  # kernels want a power of two
        self.tenants = self.rows = 0  # in the batch that was set last
        device = torch.device(device)
        size = 1 + 3 * self.width + max_rows
        self._data = torch.zeros(size, dtype=torch.int32, device=device)
        self.total = self._data[:1]  # int32 [1]: rows in all segments
        self.slots = self._data[1 : 1 + self.width]  # int32 [width]
        self.starts = self._data[1 + self.width : 1 + 2 * self.width]  # int32 [width]: first sorted row
        self.counts = self._data[1 + 2 * self.width : 1 + 3 * self.width]  # int32 [width]: 0 where unused
        self.order = self._data[1 + 3 * self.width :]  # int32 [max_rows]: sorted row -> row of the batch

    def set(self, slots: np.ndarray) -> None:
        """``slots`` int [rows]: the slot of each row of the batch, -1 for the base's.

        The copy to the device is asynchronous, in order with the current stream's work.
        """
        if slots.shape[0] > self.max_rows:
            raise ValueError(f"a batch of {slots.shape[0]} rows exceeds the maximum of {self.max_rows}")
        order = np.argsort(slots, kind="stable")
        order = order[np.searchsorted(slots[order], 0) :]
        present, starts, counts = np.unique(slots[order], return_index=True, return_counts=True)
        if present.size > self.max_tenants:
            raise ValueError(f"a batch of {present.size} tenants exceeds the maximum of {self.max_tenants}")
        self.tenants, self.rows = present.size, order.size
        end = 1 + 3 * self.width + order.size
        # Memory of its own each time, which torch keeps until the copy from it is done.
        source: Any = torch.zeros(end, dtype=torch.int32, pin_memory=self._data.is_cuda)
        staged = source.numpy()
        table = staged[1 : 1 + 3 * self.width].reshape(3, self.width)
        staged[0] = order.size
        for line, values in zip(table, (present, starts, counts), strict=True):
            line[: present.size] = values
        staged[1 + 3 * self.width :] = order
        self._data[:end].copy_(source, non_blocking=True)
