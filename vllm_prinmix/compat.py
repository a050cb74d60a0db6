"""All that the plugin uses of vLLM's internals, by name: resolved and checked in this one place.

vLLM moves things between releases. Each name below lists where it is known to live; `check` resolves
all of them when PrinMix is switched on and refuses with a message that says what is missing. Without
any PrinMix option nothing here is called.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from vllm_prinmix.errors import PrinMixError

TESTED = "0.32.0"


@dataclass(frozen=True)
class Internal:
    """A class or function of vLLM: places to look for it, and the parameters or attributes we rely on."""

    places: tuple[str, ...]  # "module:qualified.name", or "module:" for the module itself
    parameters: tuple[str, ...] = ()  # of a function
    attributes: tuple[str, ...] = ()  # of a class


INTERNALS: dict[str, Internal] = {
    "EngineArgs": Internal(
        ("vllm.engine.arg_utils:EngineArgs",), attributes=("add_cli_args", "create_engine_config")
    ),
    "LoRAConfig": Internal(
        ("vllm.config.lora:LoRAConfig",), attributes=("compute_hash", "verify_with_model_config")
    ),
    "LoRARequest": Internal(("vllm.lora.request:LoRARequest",)),
    "config_decorator": Internal(("vllm.config.utils:config",)),
    "current_platform": Internal(("vllm.platforms:current_platform",)),
    "Scheduler": Internal(
        ("vllm.v1.core.sched.scheduler:Scheduler",),
        attributes=("schedule", "update_from_output", "_handle_blocked_waiting_request"),
    ),
    "AsyncScheduler": Internal(("vllm.v1.core.sched.async_scheduler:AsyncScheduler",)),
    "Executor": Internal(("vllm.v1.executor.abstract:Executor",), attributes=("collective_rpc",)),
    "FinishReason": Internal(("vllm.v1.engine:FinishReason",), attributes=("ERROR",)),
    "LoRAModelRunnerMixin": Internal(
        ("vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin",),
        attributes=("load_lora_model", "set_active_loras"),
    ),
    "LinearBase": Internal(("vllm.model_executor.layers.linear:LinearBase",)),
    "ReplicatedLinear": Internal(("vllm.model_executor.layers.linear:ReplicatedLinear",)),
    "QKVParallelLinear": Internal(("vllm.model_executor.layers.linear:QKVParallelLinear",)),
    "RowParallelLinear": Internal(("vllm.model_executor.layers.linear:RowParallelLinear",)),
    "VocabParallelEmbedding": Internal(
        ("vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",)
    ),
    "RMSNorm": Internal(("vllm.model_executor.layers.layernorm:RMSNorm",)),
    "LogitsProcessor": Internal(
        ("vllm.model_executor.layers.logits_processor:LogitsProcessor",), attributes=("_apply_head",)
    ),
    "GPUModelRunner": Internal(
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner",), attributes=("_get_prompt_logprobs_dict",)
    ),
    "prompt_logprobs_v1": Internal(
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict",),
        parameters=("hidden_states",),
    ),
    "OpenAIServingModels": Internal(
        ("vllm.entrypoints.openai.models.serving:OpenAIServingModels",),
        attributes=("show_available_models", "is_base_model"),
    ),
    "build_chat_params": Internal(
        ("vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.build_chat_params",),
        parameters=("default_template",),
    ),
    "to_sampling_params": Internal(
        ("vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.to_sampling_params",),
        parameters=("max_tokens", "default_sampling_params"),
    ),
    "process_inputs": Internal(
        ("vllm.v1.engine.input_processor:InputProcessor.process_inputs",), parameters=("lora_request",)
    ),
    "SamplingParams": Internal(
        ("vllm.sampling_params:SamplingParams",), attributes=("update_from_generation_config",)
    ),
    "BaseServing": Internal(
        ("vllm.entrypoints.serve.engine.serving:BaseServing",),
        attributes=("_check_model", "create_error_response"),
    ),
    "AsyncLLM": Internal(("vllm.v1.engine.async_llm:AsyncLLM",), attributes=("generate",)),
    "GenerationError": Internal(("vllm.exceptions:GenerationError",)),
    "shm_broadcast": Internal(
        ("vllm.distributed.device_communicators.shm_broadcast:",), attributes=("sched_yield",)
    ),
    "init_logger": Internal(("vllm.logger:init_logger",)),
}

# The HTTP stack: worker processes must not import it only to check that it is there.
API_SERVER_ONLY = {
    "OpenAIServingModels",
    "BaseServing",
    "build_chat_params",
    "to_sampling_params",
    "process_inputs",
    "AsyncLLM",
    "GenerationError",
}


@cache
def resolve(name: str) -> Any:
    """The object of that name. Raises PrinMixError where this vLLM has none."""
    internal, reasons = INTERNALS[name], []
    for place in internal.places:
        module, _, path = place.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in filter(None, path.split(".")):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            reasons.append(f"{place}: {error}")  # vLLM has no such thing, or lacks a package itself
            continue
        lacking = [a for a in internal.attributes if not hasattr(found, a)]
        if internal.parameters:
            known = inspect.signature(found).parameters
            lacking += [p for p in internal.parameters if p not in known]
        if not lacking:
            return found
        raise _unsupported(f"{place} has no {', '.join(lacking)}")
    raise _unsupported("; ".join(reasons))


def check(skip: set[str] = API_SERVER_ONLY) -> None:
    """Resolve every name: an unsuitable vLLM is refused at start, not in the middle of a request."""
    for name in INTERNALS:
        if name not in skip:
            resolve(name)


def on_import(module: str, patch: Callable[[ModuleType], None]) -> None:
    """Call ``patch`` with the module, now when it is imported already, otherwise right after its import.

    Lets the API server be extended without every worker importing the HTTP stack.
    """
    if module in sys.modules:
        patch(sys.modules[module])
    else:
        sys.meta_path.insert(0, _PatchAfterImport(module, patch))


class _PatchAfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, patch: Callable[[ModuleType], None]) -> None:
        self.module, self.patch = module, patch

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.patch(module)

        loader.exec_module = exec_module
        return spec


def _unsupported(detail: str) -> PrinMixError:
    from vllm import __version__ as version

    return PrinMixError(
        "this vLLM does not fit this release of vllm-prinmix",
        found=f"vllm {version}: {detail}",
        expected=f"vllm {TESTED}",
        fix=f"install vllm {TESTED}, or start without --enable-prinmix",
    )
