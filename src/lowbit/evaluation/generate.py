"""Text from a model: a thin wrapper of `generate`, greedy or, with a temperature, sampled from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from lowbit.checkpoints.config import check_positions
from lowbit.evaluation.forward import evaluating

Messages = Sequence[Mapping[str, str]]
"""A conversation: mappings with ``role`` (system, user or assistant) and ``content``, the oldest first."""


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str | Messages,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The continuation of `prompt`, or the next answer of a conversation, without special tokens.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        prompt: the text to continue, or messages, which go through the tokenizer's chat template.
        max_new_tokens: largest number of generated tokens. The model's positions limit it too.
        temperature: 0 is greedy; above 0 tokens are sampled.
        top_p: nucleus of the sampling; 1 keeps all tokens.
        seed: of the sampling. The caller's random state is not changed.
        on_text: called with each piece of text as it is generated.

    Raises:
        ValueError: an empty prompt, one that leaves the model no position for an answer, messages for a tokenizer that
            has no chat template or a template that refuses them, a temperature or `top_p` out of range; a model whose logits
            are NaN or infinite.
    """
    check_sampling(temperature, top_p)
    ids_1T = prompt_ids(tokenizer, prompt).to(model.device)
    length = ids_1T.shape[1]
    what = f"a prompt of {length} tokens and its answer" if isinstance(prompt, str) else "the conversation"
    check_positions(model, length + 1, what)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max_new_tokens if positions is None else min(max_new_tokens, positions - length)
    # do_sample overrides the checkpoint's generation_config; its temperature and the like would only cause a warning.
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    streamer = _CallbackStreamer(tokenizer, on_text) if on_text else None
    devices = [] if ids_1T.device.type == "cpu" else [ids_1T.device]
    with evaluating(model), torch.random.fork_rng(devices, device_type=ids_1T.device.type if devices else "cuda"):
        torch.manual_seed(seed)
        out_1T = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=room,
            pad_token_id=pad,
            streamer=streamer,
            logits_processor=LogitsProcessorList([_RefuseBroken()]),
            **sampling,
        )
    return tokenizer.decode(out_1T[0, length:], skip_special_tokens=True)


def check_sampling(temperature: float, top_p: float) -> None:
    """Raises ValueError for what :func:`generate_text` cannot sample by."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: 0 is greedy, above 0 samples")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: expected more than 0 and at most 1, which keeps all tokens")


class _RefuseBroken(LogitsProcessor):
    """Refuses logits that are no numbers. ``argmax`` of NaN is the first token, which is special in many models, so that a
    broken model would seem to say nothing."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not math.isfinite(scores.max()):  # NaN goes through max; -inf at single tokens forbids them
            raise ValueError("the model's logits are NaN or infinite; it cannot write text")
        return scores


class _CallbackStreamer(TextStreamer):
    """transformers' streamer, which passes text to a function instead of printing it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def check_chat(tokenizer: Any) -> None:
    """Raises ValueError where the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, so nothing says how this model reads a conversation: use a model that was "
            "trained to chat (often named -Instruct or -Chat), or continue a text with lowbit generate MODEL --prompt TEXT"
        )


def prompt_ids(tokenizer: Any, prompt: str | Messages) -> torch.Tensor:
    """The prompt as ids int64 [1, T], with the special tokens that the tokenizer or its template adds.

    Raises:
        ValueError: no token, or messages without a chat template that takes them.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        check_chat(tokenizer)
        try:
            text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is code, and raises what its author liked
            roles = ", ".join(message["role"] for message in prompt)
            raise ValueError(f"the model's chat template refuses messages of the roles {roles}: {error}") from error
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty and the tokenizer adds no BOS: give at least one token to continue")
    return ids.long()
