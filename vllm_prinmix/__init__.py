"""PrinMix: serve many full fine-tunes of one base model from packed deltas.

Kept light on purpose: vLLM imports this package in every one of its processes, and
``vllm_prinmix.kernels`` and ``vllm_prinmix.compress`` run it too. No torch and no vllm here.
"""

__version__ = "0.1.0"
