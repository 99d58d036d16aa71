"""What several test files need: tiny models on disk, and one assertion for each kind of agreement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit.architectures import ResolvedBlock, for_config, resolve, unfuse_experts
from lowbit.checkpoints.source import open_model
from lowbit.stages.stream import Stream
from lowbit.steps import BlockIO, BlockState

VOCABULARY = 128


def tiny_llama(path: Path, *, blocks: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Saves a random llama (d 64, MLP 96, 4 heads on 2) with outlier channels in its norms; returns ``path``."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": blocks,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
        }
        | changes
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(0.5 + torch.rand_like(parameter))
                parameter[::16] *= 20
            elif parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(3)  # enough for blocks to matter to the logits
    model.to(dtype).save_pretrained(path)
    return path


def random_ids(windows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (windows, tokens), generator=torch.Generator().manual_seed(seed))


def first_block(place: Path) -> tuple[nn.Module, ResolvedBlock, BlockIO]:
    """The first block of the model in ``place``, its table, and its inputs and outputs for 4 windows of 32 random tokens."""
    source = open_model(place)
    model = source.load_full()
    unfuse_experts(model)
    architecture = for_config(source.config)
    stream = Stream(model, architecture)
    entered = [stream.enter(window[None]) for window in random_ids(4, 32)]
    x, call = torch.cat([hidden for hidden, _ in entered]), entered[0][1][0]
    block = model.model.layers[0].requires_grad_(False)
    with torch.no_grad():
        y = torch.cat([call(block, window[None]) for window in x])
    return block, resolve(architecture, block, source.config), BlockIO(x, y, call)


def held(state: BlockState, attribute: str) -> dict[str, Any]:
    """What the drafts of the block hold as ``attribute``, by path; without those that hold nothing."""
    values = {path: getattr(draft, attribute) for path, draft in state.drafts.items()}
    return {
        path: value
        for path, value in values.items()
        if value is not None and not (isinstance(value, tuple) and not value)
    }


def assert_same(a: Tensor, b: Tensor) -> None:
    """Bit for bit."""
    assert a.dtype == b.dtype and torch.equal(a, b), f"differ by up to {(a.double() - b.double()).abs().max()}"


def assert_close_f64(a: Tensor, b: Tensor) -> None:
    """Equal up to float64 rounding: 1e-9 of the largest magnitude."""
    assert a.dtype == b.dtype == torch.float64
    gap, size = (a - b).abs().max().item(), b.abs().max().item()
    assert gap <= 1e-9 * max(size, 1e-300), f"differ by {gap:.3g} of {size:.3g}"


def sqnr_db(wanted: Tensor, found: Tensor) -> float:
    """Signal to quantization noise, in decibels."""
    noise = (wanted.double() - found.double()).square().sum()
    return float(10 * torch.log10(wanted.double().square().sum() / noise.clamp(min=1e-300)))
