"""Many clients at once against a server: errors, answers a second, and whether the server's memory grows.

    lowbit serve smollm2-w4 --port 8000 &
    python benchmarks/serve_load.py --port 8000 --clients 64 --seconds 120 --pid $!

Every client sends chat completions one after another, every second one streamed. The server's memory is sampled each second, and the
mean of the last quarter of the samples is compared with that of the second quarter, when everything has been made once.
Needs the server's pid, and nothing beyond what lowbit needs. Exit code 1 where a request failed or memory grew by more than 2 %.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import threading
import time

import psutil

WORDS = "tide river stone cloud engine mirror garden winter letter signal".split()


class Client(threading.Thread):
    """Sends requests until ``end``, and counts answers and errors."""

    def __init__(self, number: int, host: str, port: int, tokens: int, end: float):
        super().__init__(daemon=True)
        self.number, self.host, self.port, self.tokens, self.end = number, host, port, tokens, end
        self.answers, self.errors = 0, []

    def run(self) -> None:
        sent = 0
        while time.monotonic() < self.end:
            words = " ".join(WORDS[(self.number + sent + i) % len(WORDS)] for i in range(3 + self.number % 7))
            body = {
                "messages": [{"role": "user", "content": f"Tell me about {words}."}],
                "max_tokens": self.tokens,
                "temperature": 0,
                "stream": bool((self.number + sent) % 2),
            }
            sent += 1
            try:
                text = self._ask(body)
                if '"error"' in text or '"choices"' not in text:
                    raise ValueError(f"answered {text[:200]}")
                self.answers += 1
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.errors.append(f"{type(error).__name__}: {error}")

    def _ask(self, body: dict) -> str:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=3600)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {text[:200]}")
            return text
        finally:
            connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer at most")
    asked = parser.parse_args()
    server = psutil.Process(asked.pid)
    began = time.monotonic()
    clients = [
        Client(number, asked.host, asked.port, asked.tokens, began + asked.seconds) for number in range(asked.clients)
    ]
    for client in clients:
        client.start()
    samples: list[float] = []
    while any(client.is_alive() for client in clients):
        if time.monotonic() < began + asked.seconds:
            samples.append(server.memory_info().rss / 1e6)
            done = sum(client.answers for client in clients)
            print(f"\r{time.monotonic() - began:4.0f} s, {done} answers, {samples[-1]:.0f} MB", end="", file=sys.stderr)
        time.sleep(1)
    print(file=sys.stderr)
    seconds = time.monotonic() - began  # the answers that were under way at the end included
    quarter = max(1, len(samples) // 4)
    early, late = statistics.mean(samples[quarter : 2 * quarter]), statistics.mean(samples[-quarter:])
    errors = [error for client in clients for error in client.errors]
    answers = sum(client.answers for client in clients)
    result = {
        "clients": asked.clients,
        "seconds": round(seconds, 1),
        "answers": answers,
        "clients_with_answers": sum(client.answers > 0 for client in clients),
        "errors": len(errors),
        "first_errors": errors[:3],
        "memory_mb": {
            "second quarter": round(early, 1),
            "last quarter": round(late, 1),
            "growth": round(late / early - 1, 4),
        },
    }
    print(json.dumps(result, indent=1))
    return int(bool(errors) or not answers or late > 1.02 * early)


if __name__ == "__main__":
    raise SystemExit(main())
