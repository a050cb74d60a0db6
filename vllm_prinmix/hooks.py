"""The hooks into vLLM, each one a wrapper that passes straight through unless PrinMix is on.

Where a hook sits and why: options are folded into ``additional_config`` because only native fields survive
the way into the API servers' child processes; `create_engine_config` turns them into a PrinMixConfig, which
then reaches every process inside VllmConfig.
"""

from __future__ import annotations

import functools
import sys
import time
from types import ModuleType
from typing import Any

from vllm_prinmix import api_hooks, options
from vllm_prinmix.api_hooks import is_on
from vllm_prinmix.compat import check, on_import, resolve
from vllm_prinmix.errors import PrinMixError


def install() -> None:
    """Patch what is imported already and arrange for the rest."""
    _allow_amx()
    on_import("vllm.engine.arg_utils", _patch_arguments)
    on_import("vllm.v1.executor.abstract", _patch_executor)
    on_import("vllm.v1.worker.lora_model_runner_mixin", _patch_worker)
    api_hooks.install()


def _allow_amx() -> None:
    """On CPUs with AMX, bf16 kernels die of an illegal instruction unless permission was asked for."""
    import torch

    if resolve("current_platform").is_cpu() and hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()


def _patch_arguments(module: ModuleType) -> None:
    engine_args = module.EngineArgs
    add_cli_args, create_engine_config = engine_args.add_cli_args, engine_args.create_engine_config

    @functools.wraps(add_cli_args)
    def add_cli_args_with_prinmix(parser: Any) -> Any:
        parser = add_cli_args(parser)
        options.add_arguments(parser)
        parse_known_args = parser.parse_known_args

        def parse_and_fold(*args: Any, **kwargs: Any) -> Any:
            namespace, rest = parse_known_args(*args, **kwargs)
            try:
                chosen = options.from_namespace(namespace)
            except PrinMixError as error:
                parser.error(str(error))
            if chosen is not None:
                namespace.additional_config = {
                    **(namespace.additional_config or {}),
                    options.KEY: chosen.to_mapping(),
                }
            return namespace, rest

        parser.parse_known_args = parse_and_fold
        return parser

    @functools.wraps(create_engine_config)
    def create_engine_config_with_prinmix(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.additional_config
        if not isinstance(given, dict) or options.KEY not in given:
            return create_engine_config(self, *args, **kwargs)
        chosen = options.Options.from_mapping(given[options.KEY])
        check()
        if self.enable_lora:
            raise PrinMixError("--enable-lora cannot be combined with --enable-prinmix yet", fix="drop one")
        # Left in, the path would become part of the compilation cache's key.
        self.additional_config = {k: v for k, v in given.items() if k != options.KEY}
        # On the CPU any LoRA switches compilation off, for LoRA layers' sake; config.install adds ours after.
        self.enable_lora = not resolve("current_platform").is_cpu()
        self.max_loras, self.max_cpu_loras = chosen.max_deltas, chosen.host_capacity
        try:
            vllm_config = create_engine_config(self, *args, **kwargs)
        finally:
            self.additional_config, self.enable_lora = given, False
        from vllm_prinmix import config

        config.install(vllm_config, chosen)
        return vllm_config

    engine_args.add_cli_args = staticmethod(add_cli_args_with_prinmix)
    engine_args.create_engine_config = create_engine_config_with_prinmix


def _patch_executor(module: ModuleType) -> None:
    init = module.Executor.__init__

    @functools.wraps(init)
    def init_and_record(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if is_on(vllm_config):
            from vllm_prinmix.scheduler import record_executor

            record_executor(self)
            _sleep_while_waiting()
        init(self, vllm_config, *args, **kwargs)

    module.Executor.__init__ = init_and_record


def _patch_worker(module: ModuleType) -> None:
    mixin = module.LoRAModelRunnerMixin
    load_lora_model = mixin.load_lora_model

    @functools.wraps(load_lora_model)
    def load_deltas_instead(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        if not is_on(vllm_config):
            return load_lora_model(self, model, vllm_config, device)
        from vllm_prinmix.manager import DeltaManager

        _patch_prompt_logprobs()
        _sleep_while_waiting()
        self.lora_manager = DeltaManager(model, vllm_config, device)
        return model

    mixin.load_lora_model = load_deltas_instead


WAIT_SECONDS = 5e-5


def _sleep_while_waiting() -> None:
    """On the CPU, the engine and its workers sleep between two looks at a message queue.

    vLLM's yield there (sched_yield) hands the core over for an instant at most: since Linux 6.6 the scheduler
    comes back at once, and with few cores the API server starves. Streams then stall for seconds.
    """
    if resolve("current_platform").is_cpu():
        resolve("shm_broadcast").sched_yield = functools.partial(time.sleep, WAIT_SECONDS)


# Functions of the two model runners that compute logits for prompt tokens: (module, class, functions).
PROMPT_LOGPROBS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", ("_get_prompt_logprobs_dict",)),
    (
        "vllm.v1.worker.gpu.sample.prompt_logprob",
        "PromptLogprobsWorker",
        ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"),
    ),
)


@functools.cache
def _patch_prompt_logprobs() -> None:
    """The head's rows are token rows there, not sampled ones. A runner's module is loaded by now, if used."""
    from vllm_prinmix.manager import with_prompt_rows

    for module, owner, functions in PROMPT_LOGPROBS:
        if module in sys.modules:
            cls = getattr(sys.modules[module], owner)
            for name in functions:
                setattr(cls, name, with_prompt_rows(getattr(cls, name)))
