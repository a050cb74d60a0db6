"""Where the time of a compression goes."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds between laps, added up by name. On a GPU a lap waits for its work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, device: torch.device | None = None) -> None:
        """The time since the last lap belongs to ``name``."""
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
