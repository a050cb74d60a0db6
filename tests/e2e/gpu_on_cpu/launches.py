"""A log of PrinMix's launches outside graphs: when one would be compiled, and how many a step has."""

from __future__ import annotations

import functools
from typing import Any


def install() -> None:
    """Patch Triton's interpreter and the backend."""
    from triton.runtime.interpreter import GridExecutor

    from vllm_prinmix.backend import BASE
    from vllm_prinmix.compat import resolve
    from vllm_prinmix.triton_backend import TritonBackend

    launch, set_batch = GridExecutor.__call__, TritonBackend.set_batch
    seen: set[tuple] = set()
    count = [0]
    logger = resolve("init_logger")("vllm.prinmix")

    @functools.wraps(launch)
    def launch_and_log(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        if self.fn.__module__.startswith("vllm_prinmix"):
            count[0] += 1
            kind = (self.fn.__name__, *map(_kind, args), *((name, kwargs[name]) for name in sorted(kwargs)))
            if kind not in seen:
                seen.add(kind)
                logger.info("first launch of %s", kind)
        launch(self, *args, **kwargs)

    @functools.wraps(set_batch)
    def set_and_log(self: Any, tokens: Any, samples: Any, active: bool) -> None:
        launched, count[0] = count[0], 0
        base, tenants = (tokens == BASE).sum(), len(set(tokens[tokens != BASE].tolist()))
        logger.info(
            "%d launches until a batch of %d rows, %d of the base, %d tenants",
            launched, len(tokens), base, tenants,
        )  # fmt: skip
        set_batch(self, tokens, samples, active)

    GridExecutor.__call__ = launch_and_log
    TritonBackend.set_batch = set_and_log  # type: ignore[method-assign]


def _kind(argument: Any) -> Any:
    """What Triton compiles anew for: dtypes, whether pointers and numbers are multiples of 16, and ones."""
    if hasattr(argument, "data_ptr"):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return "1" if argument == 1 else (argument % 16 == 0, abs(argument) >= 1 << 31)
    return type(argument)
