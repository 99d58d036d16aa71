"""Which tokens begin a text, and which end it."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Collection, Iterable
from typing import Any

_UNUSED = re.compile(r"[<\[].*(unused|reserved|extra_id|placeholder).*[>\]]", re.IGNORECASE)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def special_ids(config: Any) -> set[int]:
    """The ids that a model's config gives a role of their own."""
    entries = (*config.to_dict().items(), *config.get_text_config().to_dict().items())
    roles = [value for name, value in entries if name.endswith(("token_id", "token_index"))]
    return {each for value in roles for each in _as_ids(value)}


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a text: those of the tokenizer, of the config and of the generation config."""
    places = (tokenizer, model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    return frozenset(each for place in places for each in _as_ids(getattr(place, "eos_token_id", None)))


def _as_ids(value: Any) -> set[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return {each for each in values if type(each) is int and each >= 0}


def vocabulary(tokenizer: Any) -> dict[str, int]:
    """The tokenizer's tokens and their ids; empty without a tokenizer."""
    return {} if tokenizer is None else dict(tokenizer.get_vocab())


def ids_of(tokenizer: Any, size: int) -> Collection[int]:
    """All ids of the tokenizer; without one those of a model whose vocabulary has ``size``."""
    return range(size) if tokenizer is None else set(vocabulary(tokenizer).values())


def tokenizer_sha256(tokenizer: Any) -> str | None:
    """A sha256 of the tokenizer's tokens with their ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    listed = sorted(vocabulary(tokenizer).items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


class FirstTokens:
    """The tokens that begin texts: every usual one once, in an order that the seed draws, then again.

    Tokens that are no text are left out: special and added ones, unused ones, single bytes and other pieces of a
    character, control characters, and ids that the tokenizer or the model does not have. LLM-QAT begins with every id,
    and such ids give junk.

    Args:
        tokenizer: the model's; None: only the config says which ids are special.
        config: the model's.
        seed: of the order.
    """

    def __init__(self, tokenizer: Any, config: Any, seed: int):
        self.tokenizer = tokenizer
        size = config.get_text_config().vocab_size
        special = special_ids(config)
        names: dict[int, str] = {id: token for token, id in vocabulary(tokenizer).items()}
        if tokenizer is not None:
            special |= {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
            special |= {id for id, token in names.items() if _UNUSED.fullmatch(token) or _BYTE.fullmatch(token)}
        known: Iterable[int] = range(size) if tokenizer is None else (id for id in sorted(names) if id < size)
        draw = random.Random(f"{seed}/first tokens").random
        self._waiting = sorted((id for id in known if id not in special), key=lambda _: draw(), reverse=True)
        self._found: list[int] = []

    def of(self, number: int) -> tuple[int, int]:
        """The first token of text ``number``, and how often all tokens have begun a text before.

        Raises:
            ValueError: no token can begin a text.
        """
        while (
            self._waiting and len(self._found) <= number
        ):  # decoding is slow: no more tokens are tried than are needed
            if self._is_text(id := self._waiting.pop()):
                self._found.append(id)
        if not self._found:
            raise ValueError(
                "no token of the model's vocabulary can begin a text: all are special, unused or single bytes"
            )
        round, place = divmod(number, len(self._found)) if not self._waiting else (0, number)
        return self._found[place], round

    def _is_text(self, id: int) -> bool:
        if self.tokenizer is None:
            return True
        text = self.tokenizer.decode([id])
        return bool(text) and _REPLACEMENT not in text and not any(map(_is_control, text))


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\n\r\t"
