"""``lowbit chat``: a conversation with a model in the terminal, or with messages from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from lowbit.cli import common
from lowbit.cli.choose import KV, KVBits, KVSettings, choose_cache
from lowbit.cli.generate import Seed, Temperature, TopP, show, writer

EXAMPLE = 'Example: lowbit chat smollm2-w4 --system "Answer in one sentence."; echo "What is a tide?" | lowbit chat smollm2-w4 --kv kv-rotated:4'
HINT = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def command(
    model: common.Model,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message (default: what the chat template says itself).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    kv: KV = None,
    kv_bits: KVBits = None,
    kv_settings: KVSettings = None,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
) -> None:
    """Chat with a quantized or an ordinary model in the terminal. It needs a tokenizer with a chat template.

    The model sees the whole conversation each time. /reset forgets it; /exit or Ctrl-D ends; Ctrl-C stops an answer.
    Where stdin is not a terminal, each of its lines is a message.
    """
    cache, sampling = choose_cache(kv, kv_bits, kv_settings), (temperature, top_p, seed)
    answer = writer(model, trust_remote_code, threads, cache, sampling, chat=True)
    terminal = sys.stdin.isatty()
    if terminal:
        common.say(HINT)
    opening = [] if system is None else [{"role": "system", "content": system}]
    said = list(opening)
    for line in _lines(terminal):
        message = line.strip()
        if message == "/exit":
            return
        if message == "/reset":
            said = list(opening)
            common.say("the conversation is forgotten")
        elif message.startswith("/") and message[1:].isalpha():
            common.say(f"no command {message}: {HINT}")
        elif message:
            asked = [*said, {"role": "user", "content": message}]
            try:
                text = _answer(answer, asked, max_new_tokens, terminal)
            except ValueError as error:  # such as a conversation that has become too long
                if not terminal:
                    raise
                common.fail(f"{error}. Start again with /reset")
                continue
            if text:  # an answer that was stopped before its first word leaves no trace
                said = [*asked, {"role": "assistant", "content": text}]


def _answer(write: Callable[..., str], messages: list[dict[str, str]], max_new_tokens: int, terminal: bool) -> str:
    """The answer, shown as it comes. At a terminal Ctrl-C ends it, and what was shown counts as the answer."""
    shown: list[str] = []

    def show_and_keep(piece: str) -> None:
        show(piece)
        shown.append(piece)

    try:
        return write(messages, max_new_tokens, on_text=show_and_keep)
    except KeyboardInterrupt as stop:
        if not terminal or isinstance(stop, common.Terminated):
            raise
        return "".join(shown)
    finally:
        typer.echo()


def _lines(terminal: bool) -> Iterator[str]:
    """The user's messages, one a line, until Ctrl-D or the end of stdin."""
    if not terminal:
        yield from sys.stdin
        return
    try:
        import readline  # noqa: F401  # gives input() arrow keys and a history, where Python has it
    except ImportError:
        pass
    while True:
        try:
            yield input("> ")
        except EOFError:
            common.say("")
            return
        except KeyboardInterrupt as stop:
            if isinstance(stop, common.Terminated):
                raise
            common.say(f"\n{HINT}")
