"""The cut of a text into windows of tokens, for calibration and evaluation.

One rule for every text: it is tokenized as ONE string without special tokens and cut into windows that do not overlap,
from its start; the rest at the end is dropped. So a text, a tokenizer and a window length say exactly which tokens are
used, and two people who have them get the same numbers. For models that were trained with a first token (BOS), every
calibration window begins with it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lowbit.architectures import learned_positions
from lowbit.generation import DataError, GeneratedText, Quality, Sampling, is_generated, read_generated, write_tokens
from lowbit.generation.tokens import ids_of, special_ids, tokenizer_sha256
from lowbit.surroundings import usable
from lowbit.texts import TextError, load_text, own_strategy

Bos = Literal["auto", "yes", "no"]

MAX_PADDING = 0.5
"""Share of a window that may be padding."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of token ids.

    Attributes:
        ids: int64 [N windows, T].
        name: of the text.
        sha256: of the shape and the ids.
        held_out: int64 [H, T], the windows of the text after these, which results are measured on; None: there are none.
        further: int64 [M, S], the windows of the text after those, for training; None: there are none, or none were asked.
        warnings: what the user should know.
        quality: the report on the texts, where a model wrote them; None: people did, or it is not known who.
    """

    ids: Tensor
    name: str
    sha256: str
    held_out: Tensor | None = None
    further: Tensor | None = None
    warnings: tuple[str, ...] = ()
    quality: Quality | None = None


CalibrationText = str | PathLike[str] | Sequence[str] | Tensor | Calibration
"""What a run calibrates on: a text by name or place (:mod:`lowbit.texts`), a list of texts, ids ``[N, T]``, or windows."""


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Token ids, int64 [T], of the text as one string without special tokens."""
    # verbose=False: a text longer than the model's context is meant here, and not worth the tokenizer's warning.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def windows(
    ids: Tensor, seq_len: int, count: int | None = None, *, name: str = "the text", bos: int | None = None
) -> Tensor:
    """The first ``count`` windows (all, by default) of ``seq_len`` tokens: ids [T] -> [N, seq_len].

    They start at the first token and do not overlap; the tail that fills no window is dropped. ``bos`` begins every window
    where it is given, so a window then takes one token less of the text.

    Raises:
        TextError: fewer windows than ``count``, or none.
    """
    own = seq_len - (bos is not None)
    if own < 1 or (count is not None and count < 1):
        raise TextError(f"seq_len = {seq_len} and {count} windows were asked; both must be at least 1.")
    count_of_windows = len(ids) // own
    if count_of_windows < (count or 1):
        raise TextError(
            f"{name} is too short: {len(ids)} tokens = {count_of_windows} windows of {seq_len}; asked for {count or 1}. "
            "Use a longer text, fewer samples or a smaller seq_len."
        )
    count = count_of_windows if count is None else count
    cut = ids[: count * own].view(count, own)
    return cut if bos is None else torch.cat([ids.new_full((count, 1), bos), cut], dim=1)


def bos_token(tokenizer: Any, bos: Bos) -> int | None:
    """The id that begins every calibration window.

    Args:
        bos: ``auto``: what the tokenizer puts before a text, as the model was trained. ``yes``, ``no``: whatever it does.

    Raises:
        TextError: ``yes``, and the tokenizer has no such token.
    """
    if bos not in get_args(Bos):
        raise TextError(f"bos = {bos!r}: expected {', '.join(get_args(Bos))}.")
    token = getattr(tokenizer, "bos_token_id", None)
    if bos == "yes" and token is None:
        raise TextError("bos = yes: the model's tokenizer has no BOS token; use auto or no.")
    if bos == "no" or token is None:
        return None
    return token if bos == "yes" or tokenizer("a", return_attention_mask=False)["input_ids"][:1] == [token] else None


def calibration_set(
    spec: str | Sequence[str],
    tokenizer: Any,
    samples: int,
    seq_len: int,
    *,
    bos: Bos = "auto",
    vocab_size: int | None = None,
    model: Any = None,
    seed: int = 0,
    further: tuple[int, int] = (0, 0),
) -> Calibration:
    """The first ``samples`` windows of ``seq_len`` tokens of a text, of generated texts, or of what the model writes now.

    Args:
        spec: as in :func:`load_text`; a directory of ``lowbit generate-data`` or a shard of it, whose very token ids are
            used; or ``self``: texts that ``model`` writes (``self:STRATEGY``: of another strategy than hybrid).
        bos: as in :func:`bos_token`.
        vocab_size: where given, it is checked: a tokenizer of another model gives ids that the embedding does not have.
        model, seed: for ``self`` only.
        further: number of windows for training, and tokens of each. Fewer are given where the text is too short, with a
            warning; they share no token with the other windows.

    Raises:
        TextError: a text that cannot be used.
    """
    _check_sizes(samples, seq_len)
    first = None if tokenizer is None else bos_token(tokenizer, bos)
    written: GeneratedText | None = None
    if isinstance(spec, str) and (strategy := own_strategy(spec)) is not None:
        if model is None:
            raise TextError(f"{spec}: the calibration text is written by the model, so a loaded model is needed.")
        needed = samples * seq_len + held_out_windows(samples) * seq_len + further[0] * further[1]
        how = Sampling(strategy, seed=seed)
        written = _own_text(spec, model, tokenizer, needed, max(seq_len, further[1]), first, how)
        name, tokens = f"{spec} (seed {seed})", _tokens(written)
    elif isinstance(spec, str) and is_generated(spec):
        written = _kept_text(spec, tokenizer)
        name, tokens = f"{written.name} ({len(written.lengths)} generated texts)", _tokens(written)
    else:
        text = load_text(spec, "calibration", tokenizer)
        name, tokens = text.name, tokenize(text.text, tokenizer)
    if first is not None and len(tokens) and tokens[0] == first:
        tokens = tokens[1:]  # every window begins with it
    ids = windows(tokens, seq_len, samples, name=name, bos=first)
    own = seq_len - (first is not None)
    more = max(0, min(held_out_windows(samples), len(tokens) // own - samples))
    held_out = windows(tokens[samples * own :], seq_len, more, bos=first) if more else None
    beyond = _further(tokens[(samples + more) * own :], *further, bos=first)
    name = name if first is None else f"{name}, windows with BOS"
    largest = max(int(each.max()) for each in (ids, beyond) if each is not None)
    if vocab_size is not None and largest >= vocab_size:
        raise TextError(
            f"{name}: the tokenizer gives id {largest}, the model's vocabulary has {vocab_size}. "
            "The tokenizer is not this model's; use the one saved with it."
        )
    warnings = _fewer(beyond, further)
    quality = None
    if written is not None:
        quality = written.quality(ids_of(tokenizer, vocab_size or largest + 1))
        warnings = [*(f"{written.name} is bad data: {problem}" for problem in quality.problems), *warnings]
    return Calibration(ids, name, ids_sha256(ids), held_out, beyond, tuple(warnings), quality)


def _own_text(
    name: str, model: Any, tokenizer: Any, count: int, seq_len: int, bos: int | None, how: Sampling
) -> GeneratedText:
    """Texts of ``count`` tokens that the model writes itself, of ``seq_len`` tokens at most each."""
    # One token more than the windows have: the first BOS of all is not among them.
    batches = write_tokens(model, tokenizer, how, count + 1, seq_len, bos=bos)
    return GeneratedText.written(name, [text for batch in batches for text in batch])


def _kept_text(spec: str, tokenizer: Any) -> GeneratedText:
    """Generated texts of a file or a directory. Raises TextError where they cannot be used, or are of another tokenizer."""
    try:
        made = read_generated(spec)
    except DataError as error:
        raise TextError(f"{error}.") from error
    wanted = tokenizer_sha256(tokenizer)
    if made.provenance.get("tokenizer") != wanted:
        raise TextError(
            f"{spec}: its token ids are of another tokenizer than this model's. Generate text with this model, or read the "
            "text of a shard: FILE.parquet:text."
        )
    return made


def _tokens(written: GeneratedText) -> Tensor:
    """The tokens of all texts, int64 [T]."""
    return torch.from_numpy(written.ids.astype("int64"))


def _further(tokens: Tensor, count: int, seq_len: int, bos: int | None) -> Tensor | None:
    """The first ``count`` windows of ``seq_len`` tokens, or as many as there are; None: there are none."""
    found = min(count, len(tokens) // (seq_len - (bos is not None))) if count else 0
    return windows(tokens, seq_len, found, bos=bos) if found else None


def held_out_windows(samples: int) -> int:
    """The number of windows to measure on beside ``samples`` windows of calibration: a quarter of them, 1 to 8."""
    return min(8, max(1, samples // 4))


def calibration_of(
    source: Any,
    text: CalibrationText,
    samples: int,
    seq_len: int,
    bos: Bos = "auto",
    *,
    further: tuple[int, int] = (0, 0),
) -> Calibration:
    """What a run over ``source`` (a ModelSource) calibrates on.

    Args:
        text: as in :func:`calibration_set`, the path of a file, or ids ``[N, T]``, which are taken as they are. For ``self`` the
            whole model is loaded, to write the text.
        bos: as in :func:`bos_token`.
        further: as in :func:`calibration_set`; texts given as windows have none, with the same warning.

    Raises:
        TextError: a text that cannot be used; ids that the model does not have; windows of one token, of padding, or
            longer than the model's learned positions.
    """
    config = source.config.get_text_config()
    text = os.fspath(text) if isinstance(text, PathLike) else text
    if isinstance(text, Calibration):
        made = text
    elif isinstance(text, Tensor):
        made = _given_ids(text)
        made = replace(made, warnings=tuple(_fewer(None, further)))
    else:
        _check_sizes(samples, seq_len)  # before a model is loaded to write the text
        _check_positions(source, seq_len)
        own = source.load_full() if isinstance(text, str) and own_strategy(text) else None
        tokenizer = source.tokenizer() if own is None else source.tokenizer_if_any()
        if further[0]:
            _check_positions(source, further[1])
        made = calibration_set(
            text, tokenizer, samples, seq_len, bos=bos, vocab_size=config.vocab_size, model=own, further=further
        )
    warnings = (*_check_ids(source, made.ids), *made.warnings)
    return replace(made, ids=usable(made.ids), warnings=tuple(dict.fromkeys(warnings)))


def _fewer(found: Tensor | None, asked: tuple[int, int]) -> list[str]:
    """A warning where there is less text to train on than was asked for."""
    count = 0 if found is None else len(found)
    less = f"training asks for {asked[0]} windows of {asked[1]} tokens; behind the calibration text there are {count}"
    return [less] if count < asked[0] else []


def _check_sizes(samples: int, seq_len: int) -> None:
    if samples < 1:
        raise TextError(f"{samples} calibration windows were asked; expected 1 or more.")
    if seq_len < 2:
        raise TextError(f"windows of {seq_len} tokens were asked; a model predicts nothing from fewer than 2.")


def _given_ids(ids: Tensor) -> Calibration:
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TextError(f"calibration ids are integers [windows, tokens], found {ids.dtype} {list(ids.shape)}.")
    ids = ids.long().cpu()
    return Calibration(ids, "token ids", ids_sha256(ids))


def _check_ids(source: Any, ids: Tensor) -> tuple[str, ...]:
    """Refuses windows that a model cannot be calibrated on; what may be wrong with them comes back as warnings."""
    config = source.config.get_text_config()
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise TextError(
            f"calibration ids must be from 0 to {config.vocab_size - 1}, found {ids.min().item()} to {ids.max().item()}."
        )
    if ids.shape[1] < 2:
        raise TextError("calibration windows have one token; a model predicts nothing from fewer than 2.")
    pad = getattr(config, "pad_token_id", None)
    padding = (ids == (-1 if pad is None else pad)).double().mean(dim=1)
    same = (ids == ids[:, :1]).all(dim=1)
    if bool((same | (padding > MAX_PADDING)).any()):
        first = int((same | (padding > MAX_PADDING)).nonzero()[0])
        raise TextError(
            f"calibration window {first} is padding: {ids[first, -1].item()} fills it. Pass windows of text that are full."
        )
    return _check_positions(source, ids.shape[1])


def _check_positions(source: Any, seq_len: int) -> tuple[str, ...]:
    """Refuses windows longer than learned positions; windows longer than the context of other models are a warning."""
    if (learned := learned_positions(source.skeleton())) is not None and seq_len > learned:
        raise TextError(
            f"windows of {seq_len} tokens were asked; the model has {learned} positions: use seq_len {learned}."
        )
    context = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if context is None or seq_len <= context:
        return ()
    return (
        f"calibration windows of {seq_len} tokens are longer than the model's context of {context}: use a seq_len of at most "
        f"{context}",
    )


def drawn_tokens(source: Any, samples: int = 2, seq_len: int = 64) -> Tensor:
    """Ids ``[samples, seq_len]`` drawn from the vocabulary, for runs without text; tokens with a role of their own left out."""
    config = source.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or seq_len
    ids = torch.randint(config.vocab_size, (samples, min(seq_len, context)), generator=torch.Generator().manual_seed(0))
    special = special_ids(source.config)
    usual = next(i for i in range(config.vocab_size) if i not in special)
    return torch.where(torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype)), usual, ids)


def ids_sha256(ids: Tensor) -> str:
    """A sha256 of the shape and the int64 little-endian values of token ids."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
