"""What the plugin needs of vLLM is there; what is not there is said; and nothing happens unasked."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vllm_prinmix import compat
from vllm_prinmix.compat import Internal, on_import
from vllm_prinmix.errors import PrinMixError


def test_the_installed_vllm_has_every_hook() -> None:
    compat.check(skip=set())


@pytest.mark.parametrize(
    ("internal", "detail"),
    [
        (Internal(("vllm.nowhere:Thing",)), "vllm.nowhere:Thing: No module named .vllm.nowhere."),
        (Internal(("vllm.lora.request:LoRARequest",), attributes=("colour",)), "LoRARequest has no colour"),
        (Internal(("vllm.plugins:load_general_plugins",), parameters=("speed",)), "has no speed"),
    ],
)
def test_another_vllm_is_refused_by_name(
    internal: Internal, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compat.INTERNALS, "test", internal)
    compat.resolve.cache_clear()
    with pytest.raises(PrinMixError, match=f"does not fit.*{detail}"):
        compat.resolve("test")
    compat.resolve.cache_clear()


def test_patch_after_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prinmix_test_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[ModuleType] = []
    on_import("prinmix_test_module", seen.append)
    assert not seen
    module = importlib.import_module("prinmix_test_module")
    assert seen == [module]
    on_import("prinmix_test_module", seen.append)
    assert seen == [module, module]
    del sys.modules["prinmix_test_module"]


def test_registering_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a plugin would end every vLLM process of the environment."""
    from vllm_prinmix import hooks, plugin

    def broken() -> None:
        raise RuntimeError("no such hook")

    monkeypatch.setattr(hooks, "install", broken)
    monkeypatch.setattr(plugin, "_registered", False)
    plugin.register()
