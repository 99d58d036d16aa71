"""``lowbit generate``: text from a model, as it comes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli import common
from lowbit.cli.choose import KV, KVBits, KVSettings, choose_cache

if TYPE_CHECKING:
    from lowbit.modules import KVFormats

EXAMPLE = 'Example: lowbit generate smollm2-w4 --prompt "The capital of France is" --max-new-tokens 32 --kv kivi:2'

Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy; above it tokens are sampled.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that have this share together.")
]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]


def command(
    model: common.Model,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="The text to continue, or with --chat the message; - reads stdin.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens generated.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="One message through the chat template; lowbit chat has a conversation.")
    ] = False,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    kv: KV = None,
    kv_bits: KVBits = None,
    kv_settings: KVSettings = None,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Continue a prompt with a quantized or an ordinary model.

    The text goes to stdout as it is generated. A quantized model runs packed.
    """
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    cache, sampling = choose_cache(kv, kv_bits, kv_settings), (temperature, top_p, seed)
    write = writer(model, trust_remote_code, threads, cache, sampling, chat=chat)
    asked = [{"role": "user", "content": prompt}] if chat else prompt
    text = write(asked, max_new_tokens, on_text=None if as_json else show)
    if as_json:
        common.print_json({"prompt": prompt, "text": text})
    else:
        typer.echo()


def writer(
    model: str,
    trust_remote_code: bool,
    threads: int | None,
    kv: KVFormats | None,
    sampling: tuple[float, float, int],
    *,
    chat: bool,
) -> Callable[..., str]:
    """:func:`lowbit.evaluation.generate_text` with its model and tokenizer, loaded from ``model``, ``kv`` for its cache, and the
    temperature, top-p and seed of ``sampling``.

    Raises:
        ValueError: what loading raises; before weights are read, a temperature or top-p out of range, and ``chat`` with a
            tokenizer without a chat template.
    """
    common.use_threads(threads)
    import lowbit
    from lowbit import decoding
    from lowbit.evaluation import check_chat, check_sampling, generate_text
    from lowbit.modules import kv_formats
    from lowbit.plan.cache import cache_texts

    temperature, top_p, seed = sampling
    check_sampling(temperature, top_p)
    common.say(f"loading {model}")
    tokenizer = lowbit.load_tokenizer(model, trust_remote_code=trust_remote_code)
    if chat:
        check_chat(tokenizer)
    loaded = lowbit.load(model, kv=kv, trust_remote_code=trust_remote_code)
    common.say(decoding.explain(loaded))
    for line in cache_texts(kv_formats(loaded)):
        common.say(line)
    return partial(generate_text, loaded, tokenizer, temperature=temperature, top_p=top_p, seed=seed)


def show(piece: str) -> None:
    """Prints a piece of the answer at once."""
    typer.echo(piece, nl=False)
