"""vLLM and PrinMix on the CPU, going the way that they go on a GPU.

`plugin` is a vLLM plugin; this folder is also a Triton backend named "cpu" (`compiler`, `driver`), which
vLLM's CPU build asks for before it uses Triton at all. Wants TRITON_INTERPRET=1.
"""
