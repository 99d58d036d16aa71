"""``lowbit generate``: text from a model, as it comes."""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli import common

EXAMPLE = 'Example: lowbit generate smollm2-w4 --prompt "The capital of France is" --max-new-tokens 32'


def command(
    model: common.Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue, or with --chat the message.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens generated.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Use the tokenizer's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above it tokens are sampled.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
    as_json: common.Json = False,
) -> None:
    """Continue a prompt with a quantized or an ordinary model.

    The text goes to stdout as it is generated. A quantized model runs packed.
    """
    common.use_threads(threads)
    import lowbit
    from lowbit import decoding
    from lowbit.evaluation import generate_text

    common.say(f"loading {model}")
    tokenizer = lowbit.load_tokenizer(model, trust_remote_code=trust_remote_code)
    loaded = lowbit.load(model, trust_remote_code=trust_remote_code)
    common.say(decoding.explain(loaded))
    text = generate_text(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens,
        chat=chat,
        temperature=temperature,
        seed=seed,
        on_text=None if as_json else _write,
    )
    if as_json:
        common.print_json({"prompt": prompt, "text": text})
    else:
        typer.echo()


def _write(piece: str) -> None:
    typer.echo(piece, nl=False)
