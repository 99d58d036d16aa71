"""Whether one model can be the original of another: refused where sizes say no, doubted where a checkpoint's report names other files."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lowbit.architectures.gguf import same_in_gguf
from lowbit.checkpoints import native
from lowbit.checkpoints.config import load_config
from lowbit.checkpoints.locate import gguf_file
from lowbit.checkpoints.model_card import REPORT
from lowbit.checkpoints.shards import fingerprint, read_headers, read_json
from lowbit.checkpoints.to_run import locate_to_run

_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
"""What quantization never changes of a model."""
_SHORT = 12  # digits of a fingerprint in messages


class OriginalWarning(UserWarning):
    """Two models are compared that may be, or are, not one and its original."""


def check_original(
    model: str | PathLike[str] | PreTrainedModel,
    original: str | PathLike[str] | PreTrainedModel,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Checks, by their configs alone, that ``model`` can be what was made of ``original``.

    What another model computes says nothing about what quantization cost, and training towards it would end without a word.

    Args:
        model, original: models in memory, or places as :func:`lowbit.load` takes them.

    Raises:
        ValueError: another kind of model, or another size.
    """
    if other := other_model(model, original, trust_remote_code=trust_remote_code):
        raise ValueError(f"{other}. Name the model that was quantized with against= (--against ORIGINAL)")


def other_model(
    model: str | PathLike[str] | PreTrainedModel,
    original: str | PathLike[str] | PreTrainedModel,
    *,
    trust_remote_code: bool = False,
) -> str:
    """Why ``model`` cannot have been made of ``original``, by their configs alone; empty where it can."""
    (here, mine), (there, its) = (_config(each, trust_remote_code) for each in (model, original))
    found = [(name, getattr(mine, name, None), getattr(its, name, None)) for name in _FIELDS]
    # A GGUF file does not tell some types apart, so a model that was read from one may have the other type.
    differing = [
        each for each in found if each[1] != each[2] and not (each[0] == "model_type" and same_in_gguf(*each[1:]))
    ]
    if not differing:
        return ""
    listed = ", ".join(f"{name} is {one} here and {two} there" for name, one, two in differing)
    return f"{there} is not the original of {here}: {listed}"


def original_doubts(
    model: str | PathLike[str], original: str | PathLike[str], *, trust_remote_code: bool = False
) -> tuple[str, ...]:
    """A warning where the report of a checkpoint says that it was made of a model with other bytes than ``original``, and where
    ``original`` is packed and ``model`` is not.

    A copy in another format or type has other bytes too, so this is no refusal. GGUF files are not compared.
    """
    if gguf_file(original) is not None:
        return ()
    mine, path = (locate_to_run(each, trust_remote_code=trust_remote_code) for each in (model, original))
    packed, its = (native.is_native(read_json(place / "config.json")) for place in (mine, path))
    if its and not packed:
        return (
            f"{original}, which is given as the original, is packed, and {model} is not: KL and differences are of {model} from "
            f"it; the original belongs after against= (--against)",
        )
    # An exported checkpoint keeps its report; what it is converted into to run has none.
    report = next((file for file in (Path(model).expanduser() / REPORT, mine / REPORT) if file.is_file()), None)
    made_of = [] if report is None else _made_of(read_json(report))
    if not made_of or mine.resolve() == path.resolve():  # a checkpoint beside itself shows what another cache costs
        return ()
    found = fingerprint(path / "config.json", read_headers(path))
    if found in made_of:
        return ()
    return (
        f"{original} has other bytes (fingerprint {found[:_SHORT]}) than the model that {model} was made of "
        f"({made_of[-1][:_SHORT]}, in its {REPORT}): unless it is a copy of that in another form, what follows compares two different models",
    )


def _config(model: str | PathLike[str] | PreTrainedModel, trust_remote_code: bool) -> tuple[str, Any]:
    """What a model is called, and the config of the part that reads text."""
    if isinstance(model, PreTrainedModel):
        return type(model).__name__, model.config.get_text_config()
    path = locate_to_run(model, trust_remote_code=trust_remote_code)
    config = load_config(str(model), path, native.read_checkpoint(path).config, trust_remote_code)
    return str(model), config.get_text_config()


def _made_of(report: Mapping[str, Any]) -> list[str]:
    """Fingerprints of the models that a report's run, and those before it, read: checkpoints that were trained, and originals."""
    found: list[str] = []
    now: Mapping[str, Any] | None = report
    while now:
        header = now.get("header") or {}
        found += [header[key] for key in ("checkpoint", "original", "model") if header.get(key)]
        now = now.get("before")
    return found
