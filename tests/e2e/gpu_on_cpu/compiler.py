"""The compiler of Triton's backend "cpu": there is none, kernels are interpreted."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import BaseBackend


def _missing(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("kernels are only interpreted here: start the process with TRITON_INTERPRET=1")


class NoCompiler(BaseBackend):
    """Looks like a compiler, compiles nothing."""

    supports_target = staticmethod(lambda target: False)
    hash = parse_options = add_stages = load_dialects = get_module_map = _missing
