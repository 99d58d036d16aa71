"""``lowbit.merge_adapter``: an adapter put into the packed weights of its model, and what that loses. The adapter is one of peft,
or the low-rank terms that the model's own layers store."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial as partial_of
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from lowbit.adapters import apart, has_terms, merged_layer, why_inseparable
from lowbit.adapters.merge import TIED
from lowbit.checkpoints import native
from lowbit.checkpoints.companions import copy_companions
from lowbit.checkpoints.source import open_model
from lowbit.checkpoints.target import OutputError, check_target
from lowbit.checkpoints.to_run import locate_to_run
from lowbit.data import tokenize, windows
from lowbit.evaluation.forward import evaluating, logits_of
from lowbit.modules import QuantLinear
from lowbit.numerics.divergence import kl_and_agreement
from lowbit.progress import Progress, silent
from lowbit.surroundings import own_settings
from lowbit.texts import load_text


@dataclass(frozen=True)
class MergeReport:
    """What was written.

    Attributes:
        out: the directory.
        layers: packed layers that the adapter changes.
        kl: mean KL divergence of the merged model from the model with the adapter beside it, nats a token.
        agreement: share of tokens that both think likeliest.
        adapter_kl: divergence of the model without the adapter from that with it: what the adapter does at all.
        measured_on: the text.
    """

    out: Path
    layers: int
    kl: float
    agreement: float
    adapter_kl: float
    measured_on: str

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know."""
        if self.kl < self.adapter_kl / 2:
            return ()
        return (
            f"merging loses {self.kl:.2g} nats a token of the {self.adapter_kl:.2g} that the adapter changes: the bits of the packed "
            "layers do not hold it; keep the adapter beside the model, or merge it into the original and quantize that",
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"out": str(self.out), "warnings": self.warnings}


@own_settings()
def merge_adapter(
    model: str | PathLike[str],
    adapter: str | PathLike[str] | None,
    out: str | PathLike[str],
    text: str = "python-docs",
    *,
    samples: int = 8,
    seq_len: int = 256,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> MergeReport:
    """Adds a LoRA adapter to the packed weights of ``model``, in the formats that they have, and measures what is lost.

    A weight of few bits cannot hold a small change of each element, so merging rounds part of the adapter away. Layers
    that are not packed take it as it is.

    Args:
        model: a packed checkpoint.
        adapter: a directory as peft's ``save_pretrained`` writes it, trained beside this model; None: the low-rank terms that
            the checkpoint stores beside its codes.
        out: a new directory.
        text: to measure on, as for :func:`lowbit.evaluate`.
        samples, seq_len: how many windows of how many tokens of it.

    Raises:
        ValueError: bad input, found before any work; a layer that no adapter can be merged into; peft is not installed.
    """
    out = check_target(Path(out).expanduser())
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        raise OutputError(f"{partial} exists: another run did not finish there. Remove it, or choose another -o DIR")
    if adapter is not None and not (adapter := Path(adapter).expanduser() / "adapter_config.json").is_file():
        raise ValueError(
            f"{adapter.parent}: no adapter_config.json; expected a directory as peft's save_pretrained writes it"
        )
    path = locate_to_run(model, trust_remote_code=trust_remote_code)
    if not native.is_native(native.read_checkpoint(path).config):
        raise ValueError(f"{path} is not packed by lowbit; merge with merge_and_unload of peft")
    source = open_model(path, trust_remote_code=trust_remote_code, allow_quantized=True)
    content = load_text(text, "evaluation", tokenizer := source.tokenizer())
    ids = windows(tokenize(content.text, tokenizer), seq_len, samples, name=content.name)

    progress(0, samples, "merging")
    load = partial_of(native.load, path, trust_remote_code=trust_remote_code)
    beside, without, merged, layers = _of_terms(load) if adapter is None else _of_peft(load, adapter.parent)
    whole, changes = [], []
    with evaluating(beside, merged):
        for i, ids_T in enumerate(ids):
            wanted = logits_of(beside, ids_T)
            whole.append(kl_and_agreement(wanted, logits_of(merged, ids_T)))
            with without() as plain:
                changes.append(kl_and_agreement(wanted, logits_of(plain, ids_T))[0])
            progress(i + 1, samples, "measuring what merging loses")
    try:
        native.save(merged, partial)
        tokenizer.save_pretrained(partial)
        copy_companions(path, partial, code=trust_remote_code)
        if out.exists():
            out.rmdir()  # empty: checked above
        os.replace(partial, out)  # noqa: PTH105  (atomic on every system)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    kl = torch.cat([kl_T for kl_T, _ in whole]).mean().item()
    agreement = torch.cat([agree_T.double() for _, agree_T in whole]).mean().item()
    measured = f"{samples} windows of {seq_len} tokens of {content.name}"
    return MergeReport(out, layers, kl, agreement, torch.cat(changes).mean().item(), measured)


def _check_tied(model: Any) -> None:
    """Refuses adapters of weights that two modules share: one of them is not what was adapted."""
    tied = {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}
    if tied & {name for name, module in model.named_modules() if hasattr(module, "lora_A")}:
        raise ValueError(f"{TIED}; keep it beside the model")


_Models = tuple[Any, Callable[[], AbstractContextManager[Any]], Any, int]
"""The model with its adapter beside it, what opens it without the adapter, the merged one, and how many packed layers changed."""


def _of_peft(load: Callable[[], Any], adapter: Path) -> _Models:
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError("merging adapters needs the package peft. Run: pip install 'lowbit[adapters]'") from None
    beside, merged = (PeftModel.from_pretrained(load(), str(adapter)) for _ in range(2))
    _check_tied(merged.get_base_model())
    before = {name: layer for name, layer in merged.get_base_model().named_modules() if isinstance(layer, QuantLinear)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "merging rounds an adapter")  # measured
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        tied = merged.get_base_model().config.tie_word_embeddings
        merged: Any = merged.merge_and_unload()
    # peft sees that a packed head and its embedding have buffers of their own, and takes them for untied
    merged.config.tie_word_embeddings = tied
    layers = sum(layer not in before.values() for layer in merged.modules() if isinstance(layer, QuantLinear))

    @contextmanager
    def without() -> Iterator[Any]:
        with beside.disable_adapter():
            yield beside.get_base_model()

    return beside.get_base_model(), without, merged, layers


def _of_terms(load: Callable[[], Any]) -> _Models:
    beside, plain, merged = (load() for _ in range(3))
    adapted = [name for name, m in beside.named_modules() if isinstance(m, QuantLinear) and has_terms(m.description)]
    if not adapted:
        raise ValueError("the checkpoint stores no low-rank terms; name the directory of an adapter that peft wrote")
    for name in adapted:
        layer = merged.get_submodule(name)
        if reason := why_inseparable(layer.description):
            raise ValueError(f"{name}: an adapter cannot be merged: {reason}; keep it beside the model")
        parts = apart(layer)
        plain.set_submodule(name, parts.base)
        merged.set_submodule(name, merged_layer(parts.base, parts.b_OR @ parts.a_RI))

    @contextmanager
    def without() -> Iterator[Any]:
        with evaluating(plain):
            yield plain

    return beside, without, merged, len(adapted)
