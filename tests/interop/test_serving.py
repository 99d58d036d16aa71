"""``lowbit serve`` in transformers' engine answers OpenAI's requests with what the packed model generates."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lowbit

from helpers import tiny_writer

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason="transformers' server: pip install 'lowbit[serve]'")

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
MESSAGES = [{"role": "user", "content": "w7 w8 w9"}]
NEW = 48  # so that keys and values are packed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("served")
    tiny_writer(place / "model")
    recipe = lowbit.recipe("rtn+kivi", bits=4, group_size=32, kv_bits=2, recent=32)
    lowbit.quantize(place / "model", recipe, None, out=place / "q", max_kl=50)
    (place / "q" / "chat_template.jinja").write_text(TEMPLATE)
    return place / "q"


@pytest.fixture(scope="module")
def server(model) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lowbit", "serve", str(model), "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = f"http://localhost:{port}"
    try:
        for _ in range(1200):
            assert process.poll() is None, process.communicate()
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def asked(url: str, **body: Any) -> str:
    """The answer to a chat completion."""
    data = json.dumps({"messages": MESSAGES, "max_tokens": NEW, "temperature": 0} | body).encode()
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def expected(model) -> tuple[str, int]:
    """The text of an answer and its number of tokens."""
    tokenizer, loaded = lowbit.load_tokenizer(model), lowbit.load(model)
    prompt = tokenizer.apply_chat_template(MESSAGES, return_tensors="pt", return_dict=True, add_generation_prompt=True)
    made = loaded.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    answer = made[0, prompt.input_ids.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True), len(answer)


def test_a_chat_completion_is_what_the_model_generates(server, expected):
    answer = json.loads(asked(server[1]))
    assert (answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]) == expected


def test_streamed_pieces_are_the_same_text(server, expected):
    lines = [line for line in asked(server[1], stream=True).splitlines() if line.startswith("data: {")]
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or "" for line in lines]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == expected[0]


def test_the_model_has_the_name_of_its_place(server, model):
    with urllib.request.urlopen(f"{server[1]}/v1/models") as answer:
        assert [each["id"] for each in json.load(answer)["data"]] == [str(model)]


@pytest.mark.parametrize(("body", "code"), [({"colour": "blue"}, 422), ({"model": "another"}, 400)])
def test_a_bad_request_is_refused_and_the_next_one_is_answered(server, expected, body, code):
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(server[1], **body)
    assert refused.value.code == code
    refused.value.close()
    assert json.loads(asked(server[1]))["choices"][0]["message"]["content"] == expected[0]


def test_ctrl_c_ends_the_server_without_a_traceback(server):
    process, _ = server
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the server has ended" in errors and "Traceback" not in errors
