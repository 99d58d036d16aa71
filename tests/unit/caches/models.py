"""Small random models whose caches are tested."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lowbit.modules import CalibrationSpec, calibrate_cache

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def llama(**changes):
    """Logits spread over several nats, so that greedy tokens are no ties."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "head_dim": 64, "initializer_range": 0.1, **changes})).eval()


def qwen2_with_large_key_biases(size=300.0):
    """As in trained models, the biases are in channels that the rotary embedding turns slowly, and queries avoid them."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, initializer_range=0.1)).eval()
    for layer in model.model.layers:
        attention = layer.self_attn
        slow = torch.arange(32).view(2, 16)[:, 10:].flatten()
        for bias in attention.k_proj.bias.data.view(2, 32):
            bias[slow] = size * torch.randn(len(slow))
        attention.q_proj.weight.data.view(4, 32, 128)[:, slow] *= 1 / size
    return model


def tokens(*shape, seed=0):
    return torch.randint(3, 256, shape, generator=torch.Generator().manual_seed(seed))


def calibrated(model, buffers, seed=0):
    """``model`` whose attention modules carry random coordinates of their caches."""
    made = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "k_proj"):
            heads = module.config.num_key_value_heads
            spec = CalibrationSpec.of(buffers, (heads, module.head_dim, module.head_dim))
            found = {}
            for name in spec.buffers:
                shape = spec.shape(name)
                drawn = torch.randn(shape, generator=made)
                if name.endswith("rotation"):
                    found[name] = torch.linalg.qr(drawn)[0]
                else:
                    found[name] = drawn.exp() if name.endswith("scale") else drawn
            calibrate_cache(module, spec).fill(found)
    return model
