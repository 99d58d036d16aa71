"""Servers for a quantized model. All of them are other projects' engines: this package starts the one that fits.

:mod:`lowbit.serving.engines` runs transformers' server in this process, or replaces this process by vLLM's or llama.cpp's.
:mod:`lowbit.serving.vllm_plugin` is what vLLM loads to read this project's checkpoints. Nothing is imported here: vLLM brings an
older transformers than the rest of lowbit needs.
"""
