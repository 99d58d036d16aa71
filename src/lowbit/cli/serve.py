"""``lowbit serve``: a model for OpenAI's clients, in the engine that fits."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lowbit.cli import common

EXAMPLE = 'Example: lowbit serve smollm2-w4 --port 8000; curl localhost:8000/v1/chat/completions -H \'Content-Type: application/json\' -d \'{"messages": [{"role": "user", "content": "Hello"}]}\''
INTERRUPTED = "the server has ended"


def command(
    model: common.Model,
    engine: Annotated[
        Literal["auto", "transformers", "vllm", "llama.cpp"],
        typer.Option(
            help="auto: llama.cpp for a GGUF file where llama-server is on the PATH, else transformers in this process."
        ),
    ] = "auto",
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for other machines.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 8000,
    trust_remote_code: common.Trust = False,
    threads: common.Threads = None,
) -> None:
    """Serve a model with OpenAI's interface until Ctrl-C: chat completions, streamed or not.

    The server is transformers', vLLM's or llama.cpp's own. A quantized model runs packed. docs/serving.md says what each engine
    can and lacks.
    """
    common.use_threads(threads)
    from lowbit.serving.engines import Serving, serve

    serve(Serving(model, host, port, trust_remote_code, common.is_verbose()), engine, common.say)
