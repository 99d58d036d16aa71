"""Perplexity protocols: the windows that a text is cut into, and the predictions of each that are counted.

Five protocols are in use. They give different figures for one model on one text, so a figure is always reported with
its protocol:

* `gptq`: disjoint windows of `seq_len` ids from the start of the text, all `seq_len - 1` predictions of each counted.
  The usual protocol of the papers on quantization.
* `llama.cpp`: the same windows, but only the predictions at positions `seq_len // 2` to `seq_len - 2` are counted
  (`seq_len - seq_len // 2 - 1` in each window), so each has at least half a window of context. If the tokenizer puts a
  BOS before a text, the whole text starts with one, and BOS replaces the first id of every window (context, never
  counted). Read from `tools/perplexity/perplexity.cpp` of llama.cpp. Unlike that tool, a text of a single window is
  accepted, and the tokenizers are transformers'.
* `word`: lm-eval's word perplexity, exp(total negative log-likelihood / number of words). Every token of a document
  is predicted once, `seq_len` in each window with one token of left context, and the very first from BOS (EOS without
  a BOS). The last window of a document predicts the rest and fills up with the context before it. Words are the pieces
  of `re.split(r"\\s+", document)`, as in lm-eval: a document that ends in white space has one more. Read from lm-eval
  0.4.13 and tested against it. Two things differ: lm-eval lets a tokenizer add its own special tokens to the document,
  and its wikitext task detokenizes the text first.

* `ptb`: Penn Treebank as GPTQ's code has it (`get_ptb_new`): sentences, a row or a line each, stripped and joined by a space,
  then windows as by `gptq`.
* `c4`: C4's validation split as GPTQ's code has it (`get_c4_new`): the first 1100 documents, a row or a line each, joined by
  a space, then windows as by `gptq`, 256 at most.

`gptq` on WikiText-2 joins rows by a blank line, which reading rows as one text does.

A text is tokenized as ONE string without special tokens. A last piece shorter than a window is dropped, except by
`word`, which predicts every token.

Shape suffixes: N windows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.rows import lines_of

Text = str | Sequence[str] | Tensor
"""One text, or documents (`word`, `ptb` and `c4`), or ids: integers [T], or [N, T] where T is the window length."""

OF_ROWS = ("ptb", "c4")
"""Protocols that join the rows of a text in their own way."""
C4_DOCUMENTS, C4_WINDOWS = 1100, 256


@dataclass(frozen=True, eq=False)
class Window:
    """One forward pass. The logits of `inputs` [T] at positions first, first + 1, .. predict `targets`; both int64."""

    inputs: Tensor
    targets: Tensor
    first: int = 0


@dataclass(frozen=True, eq=False)
class Cut:
    """A text cut by a protocol: its windows in order, and their number of words if perplexity is per word."""

    windows: tuple[Window, ...]
    words: int | None = None


def as_protocol_reads(text: Any, protocol: str) -> str | Sequence[str]:
    """What a protocol reads of a :class:`lowbit.texts.Text`: its rows where it joins them itself, else the whole."""
    return text.rows if protocol in OF_ROWS and text.rows else text.text


def cut(text: Text, tokenizer: Any, protocol: str, seq_len: int, windows: int | None) -> Cut:
    """The first `windows` windows of `text`, cut by a protocol.

    Args:
        text: one string, documents (`word`, `ptb` and `c4`) or ids.
        tokenizer: a transformers tokenizer; may be None for ids, and then no BOS is known.
        protocol: a name of `PROTOCOLS`.
        seq_len: ids in a window.
        windows: number of windows; None: all.

    Raises:
        ValueError: an unknown protocol, a text with fewer windows than asked or none, a window too short to predict
            anything, ids of the wrong shape or type, a missing tokenizer.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown perplexity protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    if seq_len < 2:
        raise ValueError(f"seq_len is {seq_len}: a window needs at least 2 tokens to predict one")
    if windows is not None and windows < 1:
        raise ValueError(f"windows is {windows}: ask for at least 1, or None for the whole text")
    return PROTOCOLS[protocol](_readable(text), tokenizer, seq_len, windows)


def _readable(text: Any) -> Text:
    """``text`` if it is one; ids of any type of integers as int64."""
    if isinstance(text, Tensor) and text.ndim in (1, 2) and not (text.is_floating_point() or text.dtype == torch.bool):
        return text.long()
    if isinstance(text, Tensor):
        raise ValueError(f"ids are integers [T] or [windows, T], found {text.dtype} {list(text.shape)}")
    if isinstance(text, str) or (isinstance(text, Sequence) and all(isinstance(row, str) for row in text)):
        return text
    raise ValueError(
        f"found a text of type {type(text).__name__}; expected a text, a list of texts, or token ids as a tensor: torch.tensor(ids)"
    )


def _whole_windows(text: Text, tokenizer: Any, seq_len: int, count: int | None) -> Cut:
    rows_NT = _rows(_ids(text, tokenizer, seq_len), seq_len, count)
    return Cut(tuple(Window(row, row[1:]) for row in rows_NT))


def _sentences(text: Text, tokenizer: Any, seq_len: int, count: int | None) -> Cut:
    return _whole_windows(_joined(text, "ptb", None), tokenizer, seq_len, count)


def _documents(text: Text, tokenizer: Any, seq_len: int, count: int | None) -> Cut:
    if count is not None and count > C4_WINDOWS:
        raise ValueError(f"protocol c4 reads {C4_WINDOWS} windows at most, and {count} were asked: use gptq for more")
    windows = _whole_windows(_joined(text, "c4", C4_DOCUMENTS), tokenizer, seq_len, count).windows
    return Cut(windows[:C4_WINDOWS])


def _joined(text: Text, protocol: str, most: int | None) -> str:
    if isinstance(text, Tensor):
        raise ValueError(f"protocol {protocol} joins the rows of a text: pass text, not ids, or use gptq")
    rows = lines_of(text) if isinstance(text, str) else text
    return " ".join([row.strip() if protocol == "ptb" else row for row in rows if row.strip()][:most])


def _second_halves(text: Text, tokenizer: Any, seq_len: int, count: int | None) -> Cut:
    bos = _bos_before_text(tokenizer)
    ids = _ids(text, tokenizer, seq_len)
    if bos is not None:
        ids = torch.cat((ids.new_tensor([bos]), ids))
    rows_NT = _rows(ids, seq_len, count).clone()
    if bos is not None:
        rows_NT[:, 0] = bos
    first = seq_len // 2
    if first + 1 == seq_len:
        raise ValueError("seq_len is 2: the second half of a window of 2 predicts nothing; use at least 3")
    return Cut(tuple(Window(row, row[first + 1 :], first) for row in rows_NT))


def _rolling_windows(text: Text, tokenizer: Any, seq_len: int, count: int | None) -> Cut:
    if isinstance(text, Tensor) or tokenizer is None:
        raise ValueError("word perplexity counts the words of a text: pass text and a tokenizer, not ids")
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise ValueError("word perplexity predicts the first token from BOS or EOS, and the tokenizer has neither")
    windows: list[Window] = []
    words = 0
    for document in [text] if isinstance(text, str) else text:
        if len(windows) == count:
            break
        ids = _encode(document, tokenizer)
        pieces = _rolled(torch.cat((ids.new_tensor([prefix]), ids)), seq_len)
        pieces = pieces[: None if count is None else count - len(windows)]
        windows += pieces
        scored = sum(len(piece.targets) for piece in pieces)
        # A document cut short by `count` counts only the words of its predicted part.
        words += _words(document if scored == len(ids) else tokenizer.decode(ids[:scored].tolist()))
    if not windows or (count is not None and len(windows) < count):
        raise ValueError(_too_short(len(windows), seq_len, count))
    return Cut(tuple(windows), words)


def _rolled(stream: Tensor, seq_len: int) -> list[Window]:
    """Windows of at most `seq_len` inputs that predict every token of `stream` [1 + T] except the first once."""
    predicted = len(stream) - 1
    windows = []
    for start in range(0, predicted, seq_len):
        end = min(start + seq_len, predicted)
        context = max(0, end - seq_len)  # before `start` only in a short last window
        windows.append(Window(stream[context:end], stream[start + 1 : end + 1], start - context))
    return windows


def _words(text: str) -> int:
    return len(re.split(r"\s+", text))


def _encode(text: str, tokenizer: Any) -> Tensor:
    if tokenizer is None:
        raise ValueError("a text needs a tokenizer: pass one, or pass token ids")
    # verbose=False: a whole corpus is longer than the model's context, and the tokenizer would warn about that.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def _ids(text: Text, tokenizer: Any, seq_len: int) -> Tensor:
    """The text as one line of ids [T]."""
    if isinstance(text, str):
        return _encode(text, tokenizer)
    if not isinstance(text, torch.Tensor):
        raise ValueError("this protocol reads one text, and got several documents: join them, or use protocol 'word'")
    if text.ndim == 2 and text.shape[1] != seq_len:
        raise ValueError(f"the ids are windows of {text.shape[1]} and seq_len is {seq_len}: make them equal")
    return text.reshape(-1)


def _rows(ids: Tensor, seq_len: int, count: int | None) -> Tensor:
    """The first `count` disjoint windows [N, T]."""
    held = len(ids) // seq_len
    if held == 0 or (count is not None and held < count):
        raise ValueError(_too_short(held, seq_len, count) + f" ({len(ids)} tokens)")
    taken = held if count is None else count
    return ids[: taken * seq_len].view(taken, seq_len)


def _too_short(held: int, seq_len: int, count: int | None) -> str:
    return (
        f"the text holds {held} windows of {seq_len} tokens and {count or 'at least 1'} were asked: "
        "use a longer text, fewer windows or a shorter seq_len"
    )


def _bos_before_text(tokenizer: Any) -> int | None:
    """The BOS id if this tokenizer puts one before a text, else None."""
    if tokenizer is None or tokenizer.bos_token_id is None:
        return None
    start = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id if start == [tokenizer.bos_token_id] else None


PROTOCOLS: Mapping[str, Callable[[Text, Any, int, int | None], Cut]] = {
    "gptq": _whole_windows,
    "llama.cpp": _second_halves,
    "word": _rolling_windows,
    "ptb": _sentences,
    "c4": _documents,
}
