"""What several test files need: tiny models on disk, and one assertion for each kind of agreement."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowbit.architectures import ResolvedBlock, for_config, resolve, unfuse_experts
from lowbit.checkpoints.source import open_model
from lowbit.stages.stream import Stream
from lowbit.steps import BlockIO, BlockState

VOCABULARY = 128
SOURCES = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]
"""Where Python finds tests and lowbit."""
DOCS = Path(__file__).parents[1] / "docs"


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


CONTROLS = ["<unk>", "<eos>", "<unused3>", "<0x0A>", "[reserved_7]", "\x07"]
"""Tokens of :func:`tiny_writer` that begin no text; ids from 0."""


def tiny_writer(path: Path, *, bos: bool = False, **changes) -> Path:
    """:func:`tiny_llama` with a tokenizer of words, special ones and others that begin no text; ids from 120 have no token."""
    words = [f"w{i}" for i in range(len(CONTROLS), 120)]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*CONTROLS, *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>"}
    if bos:
        special["bos_token"] = "w119"
        inner.post_processor = processors.TemplateProcessing(single="w119 $A", special_tokens=[("w119", 119)])
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(path)
    return tiny_llama(path, bos_token_id=119 if bos else None, eos_token_id=1, **changes)


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


def launched_twice(
    tmp_path: Path, script: str, config: str = "accelerate-two-processes.yaml"
) -> subprocess.CompletedProcess[str]:
    """Two processes of ``accelerate launch`` that run ``script``, started with a configuration of the documentation."""
    (tmp_path / "work.py").write_text(script)
    words = ["--config_file", str(DOCS / config), "--main_process_port", "0", str(tmp_path / "work.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(SOURCES)}
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words]
    return subprocess.run(launch, env=environment, capture_output=True, text=True)
