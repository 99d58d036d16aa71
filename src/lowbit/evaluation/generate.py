"""Text from a model: a thin wrapper of `generate`, greedy or, with a temperature, sampled from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from lowbit.evaluation.forward import evaluating


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    chat: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The continuation of `prompt`, without the prompt and without special tokens.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        prompt: the text to continue, or with `chat` the user's message.
        max_new_tokens: largest number of generated tokens.
        chat: put the prompt through the tokenizer's chat template as one user message.
        temperature: 0 is greedy; above 0 tokens are sampled.
        top_p: nucleus of the sampling; 1 keeps all tokens.
        seed: of the sampling. The caller's random state is not changed.
        on_text: called with each piece of text as it is generated.

    Raises:
        ValueError: an empty prompt, `chat` with a tokenizer that has no chat template, a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: 0 is greedy, above 0 samples")
    ids_1T = _prompt_ids(tokenizer, prompt, chat).to(model.device)
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
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            **sampling,
        )
    return tokenizer.decode(out_1T[0, ids_1T.shape[1] :], skip_special_tokens=True)


class _CallbackStreamer(TextStreamer):
    """transformers' streamer, which passes text to a function instead of printing it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def _prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """The prompt as ids [1, T], with the special tokens that the tokenizer or its template adds."""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: generate with chat=False")
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty and the tokenizer adds no BOS: give at least one token to continue")
    return ids.long()
