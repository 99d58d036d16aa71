"""A tokenizer as GGUF has it: tokens with their types, merges or scores, special tokens, the chat template.

llama.cpp has the rules by which a text is split before byte pairs are merged in its code, under names. The name is found by the
rule itself, as tokenizer.json says it; a rule that is not known here is refused, because another would give other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import TokenType

from lowbit.checkpoints.shards import read_json

TOKENIZER = "tokenizer.json"
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_RULES: list[tuple[str, list[dict[str, Any]]]] = [
    ("gpt-2", [_GPT2]),
    ("smollm", [{"type": "Digits", "individual_digits": True}, _GPT2]),
    ("llama-bpe", [_split(_WORDS % "{1,3}"), _BYTES]),
    ("qwen2", [_split(_WORDS % ""), _BYTES]),
]
"""Names of llama.cpp and the pre-tokenizers that split as they do."""

Values = dict[str, Any]


def tokenizer_values(directory: Path, vocabulary: int) -> Values:
    """Keys of a GGUF file (below ``tokenizer.``) for the tokenizer of a model directory; empty where it has none.

    Args:
        vocabulary: rows of the embedding; tokens beyond the tokenizer's are unused ones.

    Raises:
        ValueError: a tokenizer that llama.cpp would not follow.
    """
    file = directory / TOKENIZER
    if not file.is_file() or not (data := read_json(file)):
        return {}
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(f"the tokenizer is {model.get('type')!r}; those of byte pairs are written")
    values = _of_bytes(data) if not model.get("byte_fallback") else _of_pieces(data)
    added = {entry["id"]: entry for entry in data.get("added_tokens", ())}
    texts = {number: text for text, number in model["vocab"].items()}
    texts |= {number: entry["content"] for number, entry in added.items()}
    if max(texts) >= vocabulary:
        raise ValueError(f"the tokenizer has token {max(texts)}, the model an embedding of {vocabulary}")
    tokens, kinds = [], []
    for number in range(vocabulary):
        text = texts.get(number)
        tokens.append(f"[PAD{number}]" if text is None else text)
        kinds.append(int(_kind(text, added.get(number), bool(model.get("byte_fallback")))))
    values |= {"ggml.tokens": tokens, "ggml.token_type": kinds}
    if "ggml.scores" in values:
        values["ggml.scores"] = [values["ggml.scores"].get(token, -1000.0) for token in tokens]
    return values | _special(directory, texts) | {"huggingface.json": file.read_text(encoding="utf-8")}


def _kind(text: str | None, added: dict[str, Any] | None, fallback: bool) -> TokenType:
    if text is None:
        return TokenType.UNUSED
    if added is not None:
        unknown = fallback and text == "<unk>"
        return TokenType.UNKNOWN if unknown else TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
    return TokenType.BYTE if fallback and len(text) == 6 and text.startswith("<0x") else TokenType.NORMAL


def _of_bytes(data: dict[str, Any]) -> Values:
    rule = data.get("pre_tokenizer")
    steps = rule["pretokenizers"] if rule is not None and rule["type"] == "Sequence" else [rule]
    fits = [name for name, known in _RULES if len(steps) == len(known) and all(map(_agree, steps, known))]
    if not fits:
        raise ValueError(
            f"the tokenizer splits text by a rule that is not known here ({json.dumps(rule)[:200]}); known are those of "
            f"{', '.join(name for name, _ in _RULES)}"
        )
    normalizer = data.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise ValueError(f"the tokenizer changes text first ({json.dumps(normalizer)[:200]}), which llama.cpp does not")
    return {"ggml.model": "gpt2", "ggml.pre": fits[0], "ggml.merges": _merges(data)}


def _agree(step: dict[str, Any] | None, known: dict[str, Any]) -> bool:
    return step is not None and all(step.get(key) == value for key, value in known.items())


def _merges(data: dict[str, Any]) -> list[str]:
    merges = data["model"]["merges"]
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    if any(pair.count(" ") != 1 for pair in pairs):
        raise ValueError("the tokenizer merges tokens with spaces, which GGUF's list of merges cannot say")
    return pairs


def _of_pieces(data: dict[str, Any]) -> Values:
    """Pieces of SentencePiece. llama.cpp merges the pair with the highest score first, tokenizers by the order of merges, so
    the order gives the scores."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(data["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(rank))
    kinds = [step.get("type") for step in _steps(data.get("normalizer"))]
    if not set(kinds) <= {"Prepend", "Replace"} or (
        "Split" in str(data.get("pre_tokenizer")) and "Isolated" in str(data["pre_tokenizer"])
    ):
        raise ValueError(f"the tokenizer changes text by {kinds}, which is not known here")
    metaspace = next((s for s in _steps(data.get("pre_tokenizer")) if s.get("type") == "Metaspace"), {})
    prefix = "Prepend" in kinds or metaspace.get("prepend_scheme", "never") != "never"
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": scores,
        "ggml.add_space_prefix": prefix,
    }


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    inner = part.get("normalizers") or part.get("pretokenizers")
    yield from inner if inner else [part]


def _special(directory: Path, texts: dict[int, str]) -> Values:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    values: Values = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None and number in texts:
            values[f"ggml.{key}_token_id"] = number
    ids = tokenizer("a").input_ids
    values["ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    values["ggml.add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        values["chat_template"] = template
    return values
