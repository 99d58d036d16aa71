"""vLLM's plug-in: native checkpoints, and compressed-tensors of 2 to 8 bits, on this project's CPU kernels.

vLLM loads it by the entry point ``vllm.general_plugins`` in each of its processes. It stands on the parts of lowbit that need
torch and no particular transformers: descriptions, layouts, kernels, packed layers. Those of its files that import vLLM are
:mod:`~lowbit.serving.vllm_plugin.config`, :mod:`~lowbit.serving.vllm_plugin.methods` and
:mod:`~lowbit.serving.vllm_plugin.kernel`.
"""


def register() -> None:
    """Makes ``quant_method: "lowbit"`` and the linear kernel known to vLLM; a second call changes nothing."""
    from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, register_linear_kernel  # pyright: ignore
    from vllm.model_executor.layers.quantization import register_quantization_config  # pyright: ignore
    from vllm.platforms import PlatformEnum  # pyright: ignore

    from lowbit.checkpoints.description import METHOD
    from lowbit.serving.vllm_plugin.config import NativeConfig
    from lowbit.serving.vllm_plugin.kernel import LowbitLinearKernel

    register_quantization_config(METHOD)(NativeConfig)
    if LowbitLinearKernel not in _POSSIBLE_KERNELS.get(PlatformEnum.CPU, ()):
        register_linear_kernel(LowbitLinearKernel, PlatformEnum.CPU, "mp")
