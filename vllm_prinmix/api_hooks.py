"""The hooks into the API server: which tenants there are, what each brings, and why a request failed.

Like those of `hooks`, wrappers that pass straight through unless PrinMix is on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Callable
from http import HTTPStatus
from types import ModuleType
from typing import Any

from vllm_prinmix.compat import on_import, resolve
from vllm_prinmix.errors import PrinMixError


def install() -> None:
    """Patch what is imported already and arrange for the rest."""
    on_import("vllm.entrypoints.openai.models.serving", _patch_models)
    on_import("vllm.entrypoints.serve.engine.serving", _patch_request_check)
    for kind in ("openai.chat_completion", "openai.completion", "openai.responses", "serve.tokenize"):
        on_import(f"vllm.entrypoints.{kind}.protocol", _patch_requests)
    on_import("vllm.v1.engine.input_processor", _patch_ends)
    on_import("vllm.v1.engine.async_llm", _patch_errors)


def is_on(vllm_config: Any) -> bool:
    """Whether this configuration serves deltas."""
    lora = getattr(vllm_config, "lora_config", None)
    return lora is not None and hasattr(lora, "catalog")


def _patch_models(module: ModuleType) -> None:
    """/v1/models lists what the folder of deltas holds now."""
    models = module.OpenAIServingModels
    init, show = models.__init__, models.show_available_models

    @functools.wraps(init)
    def init_with_tenants(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        init(self, engine_client, *args, **kwargs)
        if is_on(engine_client.vllm_config):
            _enlist(self, *_catalog(self).tenants)
            global _models
            _models = self

    @functools.wraps(show)
    async def show_tenants(self: Any) -> Any:
        if is_on(self.engine_client.vllm_config):
            catalog = _catalog(self)
            with contextlib.suppress(OSError):  # the folder is away for now: what was there is listed
                await asyncio.to_thread(catalog.refresh)
            _enlist(self, *self.lora_requests.keys() | catalog.tenants.keys())
        return await show(self)

    models.__init__ = init_with_tenants
    models.show_available_models = show_tenants


_models: Any = None  # of this process's server


def _settings(name: str | None) -> Any:
    """The settings of the tenant of that name; None for the base, and where PrinMix is off."""
    tenant = _catalog(_models).tenants.get(name) if _models is not None else None
    return None if tenant is None else tenant.settings


def _catalog(models: Any) -> Any:
    return models.engine_client.vllm_config.lora_config.catalog


def _enlist(models: Any, *names: str) -> None:
    """vLLM's list of adapters, by name, gets the tenants of these names as the catalog has them."""
    for name in names:
        tenant, known = _catalog(models).tenants.get(name), models.lora_requests.get(name)
        if tenant is None:
            models.lora_requests.pop(name, None)
        elif known is None or known.lora_int_id != tenant.id:
            models.lora_requests[name] = lora_request(tenant, models.base_model_paths[0].name)


def _patch_request_check(module: ModuleType) -> None:
    """Before a request reaches the engine: what is its tenant's delta now, is it whole, and if not, why?"""
    from vllm_prinmix.format.checkpoint import brief

    serving = module.BaseServing
    check_model = serving._check_model

    @functools.wraps(check_model)
    async def check_tenant(self: Any, request: Any) -> Any:
        vllm_config: Any = getattr(getattr(self.models, "engine_client", None), "vllm_config", None)
        name = request.model
        if not is_on(vllm_config) or not name or self.models.is_base_model(name):
            return await check_model(self, request)
        catalog, reason = _catalog(self.models), None
        try:
            await asyncio.to_thread(catalog.lookup, name)
        except PrinMixError as broken:
            reason = str(broken)
        _enlist(self.models, name)
        error = await check_model(self, request)
        if error is None and name not in self.models.lora_requests:
            # VLLM_SKIP_MODEL_NAME_VALIDATION would have the base answer.
            error = self.create_error_response(
                f"The model `{name}` does not exist.",
                err_type="NotFoundError",
                status_code=HTTPStatus.NOT_FOUND,
                param="model",
            )
        if error is None and reason is not None:
            return self.create_error_response(
                f"tenant {name}: {reason}",
                err_type="ServiceUnavailableError",
                status_code=HTTPStatus.SERVICE_UNAVAILABLE,
                param="model",
            )
        if error is not None and reason is not None:
            error.error.message = f"tenant {name} is not served: {reason}"
        elif error is not None:  # vLLM's message names the base alone
            error.error.message += f" Tenants: {brief(list(catalog.tenants), limit=10)} (all in /v1/models)."
        return error

    serving._check_model = check_tenant


# Requests of the API that are rendered with a chat template, or sampled for.
REQUESTS = ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "TokenizeChatRequest")


def _patch_requests(module: ModuleType) -> None:
    """A tenant's own chat template and sampling defaults: before the base's, after what the request says."""
    for name in REQUESTS:
        request = getattr(module, name, None)
        if request is None or request.__module__ != module.__name__:
            continue
        if hasattr(request, "build_chat_params"):
            request.build_chat_params = _with_template(request.build_chat_params)
        if hasattr(request, "to_sampling_params"):
            request.to_sampling_params = _with_sampling(request.to_sampling_params)


def _with_template(build: Callable) -> Callable:
    signature = inspect.signature(build)

    @functools.wraps(build)
    def build_chat_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        if (settings := _settings(self.model)) is not None:  # the server's --chat-template is for all
            template = given.arguments["default_template"]
            given.arguments["default_template"] = template or settings.chat_template
        return build(*given.args, **given.kwargs)

    return build_chat_params


def _with_sampling(convert: Callable) -> Callable:
    signature = inspect.signature(convert)

    @functools.wraps(convert)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        settings = _settings(self.model)
        if settings is not None and settings.sampling is not None:
            from vllm_prinmix.settings import SAMPLING

            config = _models.engine_client.vllm_config.model_config
            if config.generation_config == "auto":  # else the operator says which defaults there are
                default = given.arguments.get("default_sampling_params") or {}
                fixed = config.override_generation_config
                kept = {name: v for name, v in default.items() if name not in SAMPLING or name in fixed}
                given.arguments["default_sampling_params"] = {**settings.sampling, **kept}
        return convert(*given.args, **given.kwargs)

    return to_sampling_params


def _patch_ends(module: ModuleType) -> None:
    """A tenant's answers end at its own end tokens, too."""
    processor = module.InputProcessor
    process_inputs = processor.process_inputs
    signature = inspect.signature(process_inputs)

    @functools.wraps(process_inputs)
    def process(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = process_inputs(self, *args, **kwargs)
        tenant = signature.bind(self, *args, **kwargs).arguments.get("lora_request")
        if tenant is not None and is_on(self.vllm_config) and found.sampling_params is not None:
            now = self.vllm_config.lora_config.catalog.tenants.get(tenant.lora_name)
            known = range(self.model_config.get_vocab_size())  # vLLM looks up any other in vain
            ends = [token for token in now.settings.end_tokens if token in known] if now else []
            found.sampling_params.update_from_generation_config(
                {"eos_token_id": ends}, self.renderer.get_eos_token_id()
            )
        return found

    processor.process_inputs = process


def _patch_errors(module: ModuleType) -> None:
    """The scheduler sends a failed tenant's reason as stop_reason; here it becomes the HTTP error's text."""
    engine = module.AsyncLLM
    generate = engine.generate

    async def explain(results: Any) -> Any:
        async with contextlib.aclosing(results):
            async for output in results:
                for completion in output.outputs:
                    if completion.finish_reason == "error" and completion.stop_reason:
                        raise resolve("GenerationError")(str(completion.stop_reason))
                yield output

    @functools.wraps(generate)
    def generate_or_explain(self: Any, *args: Any, **kwargs: Any) -> Any:
        results = generate(self, *args, **kwargs)
        return explain(results) if is_on(self.vllm_config) else results

    engine.generate = generate_or_explain


def lora_request(tenant: Any, base: str) -> Any:
    """The LoRARequest by which vLLM carries a tenant."""
    return resolve("LoRARequest")(
        lora_name=tenant.name, lora_int_id=tenant.id, lora_path=tenant.path, base_model_name=base
    )
