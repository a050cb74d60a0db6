"""PrinMixConfig: sits in VllmConfig.lora_config and so reaches every process.

Being a LoRAConfig, it switches on the parts of vLLM's LoRA path that deltas reuse: routing, the limit of
distinct adapters per batch, the prefix-cache key and the CUDA-graph cases. ``isinstance`` is the test for
"PrinMix is on". Imported only where a vLLM process is already running.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import ConfigDict

from vllm_prinmix import __version__
from vllm_prinmix.catalog import Catalog
from vllm_prinmix.compat import resolve
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.options import Options

LoRAConfig: Any = resolve("LoRAConfig")
logger = resolve("init_logger")("vllm.prinmix")


@resolve("config_decorator")(config=ConfigDict(arbitrary_types_allowed=True))
class PrinMixConfig(LoRAConfig):
    """LoRAConfig plus the tenants. ``max_loras`` is --max-deltas, ``max_cpu_loras`` is --max-cpu-deltas."""

    catalog: Catalog | None = None  # never None in use; each process has its own

    def compute_hash(self) -> str:
        # Key of compiled graphs: neither paths nor tenants belong in it, the plugin's version does.
        return f"prinmix-{__version__}-{super().compute_hash()}"


def install(vllm_config: Any, options: Options) -> None:
    """Put a PrinMixConfig and our scheduler into a VllmConfig, made without LoRA on the CPU.

    Scans the deltas; raises PrinMixError for what cannot be served together with deltas.
    """
    model = vllm_config.model_config
    if vllm_config.lora_config is None:
        vllm_config.lora_config = LoRAConfig(
            max_loras=options.max_deltas, max_cpu_loras=options.host_capacity
        )
        vllm_config.lora_config.verify_with_model_config(model)
    _refuse_unsupported(vllm_config)
    served = model.served_model_name
    reserved = [served] if isinstance(served, str) else list(served or [model.model])
    dummy = vllm_config.load_config.load_format == "dummy"
    catalog = Catalog(options.deltas, model.model, reserved, dummy)
    tenants = catalog.tenants.values()
    for name, reason in catalog.skipped.items():
        logger.warning("PrinMix: %s is not served: %s", name, reason)
    packed = sum(t.packed_bytes for t in tenants)
    held = sum(sorted((t.packed_bytes for t in tenants), reverse=True)[: options.host_capacity])
    logger.info(
        "PrinMix: %d tenants, %.1f MB packed; %d slots; at most %d tenants (%.1f MB) in host memory",
        len(tenants),
        packed / 1e6,
        options.max_deltas,
        options.host_capacity,
        held / 1e6,
    )
    lora = vllm_config.lora_config
    fields = {f.name: getattr(lora, f.name) for f in dataclasses.fields(lora)}
    vllm_config.lora_config = PrinMixConfig(**fields, catalog=catalog)
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is not None:
        raise PrinMixError(
            "--scheduler-cls cannot be combined with --enable-prinmix", found=scheduler.scheduler_cls
        )
    kind = "PrinMixAsyncScheduler" if scheduler.async_scheduling else "PrinMixScheduler"
    scheduler.scheduler_cls = f"vllm_prinmix.scheduler.{kind}"


def _refuse_unsupported(vllm_config: Any) -> None:
    """Combinations that would be silently wrong are refused at start."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    reasons = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "a pooling model": model.runner_type != "generate",
        "a multimodal model": model.is_multimodal_model,
        "a head in another dtype than the model": model.head_dtype != model.dtype,
        # These hand a module another set of rows than the batch's, or the same rows in another order.
        "microbatches (--enable-dbo)": parallel.use_ubatching,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "--enable-batch-sharded-sampling": parallel.enable_batch_sharded_sampling,
        "--fully-sharded-loras": vllm_config.lora_config.fully_sharded_loras,
    }
    for what, present in reasons.items():
        if present:
            raise PrinMixError(
                f"PrinMix does not support {what} yet", fix="start without it, or without --enable-prinmix"
            )
