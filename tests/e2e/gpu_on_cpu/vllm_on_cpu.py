"""Changes to vLLM: its CPU worker compiles, schedules and captures graphs as its GPU worker does."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

# What the CPU's platform takes out of the configuration.
KEPT = {
    "compilation_config": (
        "mode",
        "backend",
        "cudagraph_mode",
        "cudagraph_capture_sizes",
        "max_cudagraph_capture_size",
        "ir_enable_torch_wrap",
    ),
    "scheduler_config": ("async_scheduling",),
}


def install() -> None:
    """Patch this process's vLLM."""
    _platform()
    _worker()
    _runner_v1()
    _attention()
    _leave_out()


def _platform() -> None:
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def keep(cls: Any, vllm_config: Any) -> None:
        kept = [(getattr(vllm_config, config), name) for config, names in KEPT.items() for name in names]
        before = [getattr(config, name) for config, name in kept]
        check(cls, vllm_config)
        for (config, name), value in zip(kept, before, strict=True):
            setattr(config, name, value)

    wrapper = "vllm.compilation.cuda_graph.CUDAGraphWrapper"
    CpuPlatform.check_and_update_config = classmethod(keep)
    CpuPlatform.support_static_graph_mode = classmethod(lambda cls: True)
    CpuPlatform.get_static_graph_wrapper_cls = classmethod(lambda cls: wrapper)
    CpuPlatform.graph_pool_handle = classmethod(lambda cls: (0, 0))


def _worker() -> None:
    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.utils import torch_utils
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.workspace import init_workspace_manager

    determine = CPUWorker.determine_available_memory

    def determine_available_memory(self: CPUWorker) -> int:
        """With a first capture, by which a GPU's worker finds out what graphs need."""
        init_workspace_manager(self.device)
        found = determine(self)
        self.model_runner.profile_cudagraph_memory()
        return found

    CPUWorker.compile_or_warm_up_model = Worker.compile_or_warm_up_model
    CPUWorker.determine_available_memory = determine_available_memory
    GroupCoordinator.graph_capture = lambda self, context: nullcontext(context)
    torch_utils.weak_ref_tensor = lambda tensor: tensor


def _runner_v1() -> None:
    """The GPU's loads a model into a wrapper that captures whole decoding steps; the CPU's without."""
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = CPUModelRunner.load_model

    def load_and_wrap(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        if self.compilation_config.cudagraph_mode.has_full_cudagraphs():
            self.model = CUDAGraphWrapper(self.model, self.vllm_config, runtime_mode=CUDAGraphMode.FULL)

    def get_model(self: Any) -> Any:
        return self.model.unwrap() if isinstance(self.model, CUDAGraphWrapper) else self.model

    CPUModelRunner.load_model = load_and_wrap
    CPUModelRunner.get_model = get_model


def _attention() -> None:
    """A GPU's attention reads the batch from memory that stays in place; the CPU's, from the forward context.

    So a whole captured graph is replayed within a context with the metadata that was built last.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor, set_forward_context
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    latest: dict[str, Any] = {}
    build, run_fullgraph = CPUAttentionMetadataBuilder.build, ModelCudaGraphManager.run_fullgraph

    @functools.wraps(build)
    def build_and_note(self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = build(self, *args, **kwargs)
        latest.update(dict.fromkeys(self.layer_names, metadata))
        return metadata

    @functools.wraps(run_fullgraph)
    def run_with_context(self: Any, desc: Any) -> Any:
        slots = {name: metadata.slot_mapping for name, metadata in latest.items()}
        with set_forward_context(
            latest,
            self.vllm_config,
            num_tokens=desc.num_tokens,
            cudagraph_runtime_mode=CUDAGraphMode.FULL,
            batch_descriptor=BatchDescriptor(num_tokens=desc.num_tokens),
            slot_mapping=slots,
        ):
            return run_fullgraph(self, desc)

    CPUAttentionMetadataBuilder._cudagraph_support = AttentionCGSupport.ALWAYS
    CPUAttentionMetadataBuilder.build = build_and_note
    ModelCudaGraphManager.run_fullgraph = run_with_context


def _leave_out() -> None:
    """What needs a GPU, or more than Triton's interpreter.

    Of the pass that makes operations write in place again: it names operations of vLLM's build for a GPU, and
    none of PrinMix's, which inductor itself makes so.
    """
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker import gpu_worker

    topk_topp_sampler.HAS_TRITON = False
    FixFunctionalizationPass.__call__ = lambda *args: None
    gpu_worker.kernel_warmup = lambda worker: None
