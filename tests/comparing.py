"""What tests of comparisons share: a model with texts and a task, and comparisons of it that take a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lowbit

from helpers import VOCABULARY, random_ids, tiny_llama

HERE = {"samples": 4, "seq_len": 16, "eval_seq_len": 32, "windows": 5, "threads": 1}
"""Settings of small comparisons; :data:`SHORT` are the same on the command line."""
SHORT = tuple(word for key, value in HERE.items() for word in (f"--{key.replace('_', '-')}", value))
TIMED = {"peak_rss_bytes", "quantize_peak_rss_bytes", "quantize_seconds", "evaluate_seconds"}
"""Fields of a record that differ from run to run."""


def model_with_texts(path: Path) -> Path:
    """A tiny model with a tokenizer of words; beside it ``text.txt``, ``calibration.txt`` and the task ``piqa.jsonl`` of its words."""
    tiny_llama(path)
    words = [f"w{i}" for i in range(VOCABULARY - 1)]
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(path)
    for seed, name in enumerate(("text.txt", "calibration.txt")):
        (path.parent / name).write_text(" ".join(random.Random(seed).choices(words, k=200)))
    draw = random.Random(3)
    rows = [{"query": "w1 w2", "choices": draw.sample(words, 3), "gold": draw.randrange(3)} for _ in range(12)]
    (path.parent / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compare(model: Path, rows: Any, out: Path, **changes: Any) -> list[dict[str, Any]]:
    """``lowbit.compare`` on random ids."""
    return lowbit.compare(model, rows, random_ids(4, 16), random_ids(5, 32, seed=2), out, **{**HERE, **changes})


def texts(model: Path) -> tuple[Any, ...]:
    """The command line's arguments for the texts beside ``model``, and :data:`SHORT`."""
    return ("--calibration", model.parent / "calibration.txt", "--text", model.parent / "text.txt", *SHORT)


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what differs from run to run."""
    return {key: value for key, value in record.items() if key not in TIMED}
