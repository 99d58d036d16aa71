"""Files of every kind that a report is made of, with names that try to become markup."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lowbit
from lowbit.inspection import inspect_model
from lowbit.numerics import to_dict

from helpers import random_ids, tiny_llama

HOSTILE = "</title><script>alert('$x$')</script><img src=x onerror=alert(1)> & \"quoted\" $a_b$"
GPTQ = to_dict(lowbit.recipe("gptq", bits=4, group_size=64))


def record(label: str, recipe: Any = GPTQ, **figures: Any) -> dict[str, Any]:
    """A line of ``lowbit compare``."""
    return {
        "label": label,
        "recipe": recipe,
        "model": {"name": "tiny", "sha256": "a" * 64},
        "protocol": {"name": "gptq", "text": "text.txt", "windows": 20, "seq_len": 1024, "sha256": "b" * 64},
        "calibration": None
        if recipe is None
        else {"text": "cal.txt", "windows": 32, "tokens": 512, "sha256": "c" * 64},
        "machine": {"cpu": "a processor", "threads": 1},
        "versions": {"lowbit": "0.1.0", "torch": "2"},
        **figures,
    }


RECORDS = [
    record("original", None, perplexity=20.0, model_bits_per_weight=16.0, bytes=10**8),
    record("large", perplexity=21.0, model_bits_per_weight=8.1, bits_per_weight=8.0, bytes=5 * 10**7, kl=0.01),
    record("small", perplexity=30.0, model_bits_per_weight=4.2, bits_per_weight=4.1, bytes=3 * 10**7, kl=0.4),
    record(
        "worse and larger", perplexity=31.0, model_bits_per_weight=4.3, bits_per_weight=4.2, bytes=3 * 10**7, kl=0.5
    ),
    record("ruined", perplexity=9e5, model_bits_per_weight=2.0, problems=["KL over 2"]),
    record("lost", error="the process ended"),
    record(HOSTILE, perplexity=25.0, model_bits_per_weight=5.0, warnings=[HOSTILE]),
]
CURVE = [
    {
        "step": i,
        "tokens": 512 * i,
        "loss": None if i == 0 else 2 / i,
        "held_out_kl": 1 / (i + 1),
        "lr": 1e-3,
        "seconds": i,
    }
    for i in range(6)
]
CACHES = {
    "quality": [
        {"name": "kivi 4", "bits": 5.0, "perplexity": 20.2, "kl": 0.005},
        {"name": HOSTILE, "bits": 3.0, "perplexity": 27.0, "kl": 0.26},
    ],
    "speed": [{"name": "kivi 4", "context": n, "milliseconds": 1.0 * n, "megabytes": 2.0} for n in (1, 2, 4)],
    "machine": {"cpu": "a processor"},
}
SAMPLES = [{"prompt": "The sky\nis", "answers": {"original": "blue", "packed": HOSTILE}}]
TABLE = {"models": [{"model": HOSTILE, "bits": 4, "ms": 1.5}, {"model": "b", "bits": 16, "ms": 3.0}], "commit": "abc"}


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_all(place: Path) -> list[Path]:
    """A file or a directory of every kind in ``place``, with a tiny model quantized and inspected twice."""
    model = tiny_llama(place / "model")
    calibration = random_ids(4, 16)
    lowbit.quantize(model, lowbit.recipe("rtn", bits=4, group_size=32), calibration, out=place / "packed", max_kl=50)
    inspect_model(model, calibration, out=place / "before")
    shutil.copytree(place / "before", place / "after")
    (place / "caches.json").write_text(json.dumps(CACHES))
    (place / "table.json").write_text(json.dumps(TABLE))
    return [
        write_lines(place / "results.jsonl", RECORDS),
        place / "packed",
        write_lines(place / "training-2.jsonl", CURVE),
        place / "before",
        place / "after",
        place / "caches.json",
        write_lines(place / "samples.jsonl", SAMPLES),
        place / "table.json",
    ]
