"""A vLLM plugin for tests: on the CPU, deltas go through the Triton kernels and Triton's interpreter."""

from __future__ import annotations

from typing import Any


def register() -> None:
    from vllm_prinmix import manager

    def interpreted(device: Any, slots: int, rows: int, dtype: Any) -> Any:
        import triton

        from vllm_prinmix.triton_backend import TritonBackend

        assert triton.knobs.runtime.interpret, "start the process with TRITON_INTERPRET=1"
        return TritonBackend(slots, rows, dtype, device)

    manager.backend_for = interpreted
