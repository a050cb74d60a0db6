"""Naming a tenant without a server: `LLM.generate(prompts, lora_request=tenant_request(llm, "NAME"))`."""

from __future__ import annotations

from typing import Any

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.hooks import is_on, lora_request


def tenant_request(llm: Any, name: str) -> Any:
    """The LoRARequest that makes ``llm`` answer as tenant ``name``.

    ``llm`` is a vllm.LLM made with additional_config={"prinmix": {"deltas": DIR, ...}}.
    Raises PrinMixError for a name that is not served, with the reason where its delta was skipped.
    """
    vllm_config = llm.llm_engine.vllm_config
    tenants = vllm_config.lora_config.tenants if is_on(vllm_config) else ()
    for tenant in tenants:
        if tenant.name == name:
            return lora_request(tenant, str(vllm_config.model_config.served_model_name))
    reason = vllm_config.lora_config.skipped.get(name) if is_on(vllm_config) else None
    raise PrinMixError(
        f"no tenant named {name}",
        found=reason or ", ".join(t.name for t in tenants) or "no tenants",
        fix='make the LLM with additional_config={"prinmix": {"deltas": DIR}}' if not tenants else None,
    )
