"""Naming a tenant without a server: `LLM.generate(prompts, lora_request=tenant_request(llm, "NAME"))`."""

from __future__ import annotations

from typing import Any

from vllm_prinmix.api_hooks import is_on, lora_request
from vllm_prinmix.errors import PrinMixError


def tenant_request(llm: Any, name: str) -> Any:
    """The LoRARequest that makes ``llm`` answer as tenant ``name``.

    ``llm`` is a vllm.LLM made with additional_config={"prinmix": {"deltas": DIR, ...}}.
    Raises PrinMixError for a name that is not served, with the reason where it has a folder.
    """
    vllm_config = llm.llm_engine.vllm_config
    if not is_on(vllm_config):
        raise PrinMixError(
            f"no tenant named {name}",
            found="no tenants",
            fix='make the LLM with additional_config={"prinmix": {"deltas": DIR}}',
        )
    catalog = vllm_config.lora_config.catalog
    if (tenant := catalog.lookup(name)) is None:
        raise PrinMixError(f"no tenant named {name}", found=", ".join(catalog.tenants), where=catalog.root)
    return lora_request(tenant, str(vllm_config.model_config.served_model_name))
