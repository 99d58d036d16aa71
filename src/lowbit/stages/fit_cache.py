"""The stage FitCache: the finished model runs once over the calibration windows, and each layer's attention is listened to.

The model is loaded whole, packed, from the shards that the stages before left; beside it there is nothing but the sums of every
layer. What is found is one more unit of the run, beside those shards, which stay as they are. The stage is not resumed in its
middle: a run that was killed there does it again, with the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.architectures import IMPLEMENTATION, attention_modules, observed
from lowbit.caches import Operands, PackedCache, PackedLayer
from lowbit.caches.fits import Sums
from lowbit.caches.rotary import frequencies
from lowbit.checkpoints.description import ModelDescription
from lowbit.modules import CacheCalibration, CalibrationSpec, KVFormats, KVSpec
from lowbit.modules.cache_calibration import CALIBRATION
from lowbit.numerics import from_dict, to_dict
from lowbit.plan.model_plan import ModelPlan
from lowbit.progress import Progress
from lowbit.recipes import FitCache
from lowbit.stages.blockwise import Broken, Walk
from lowbit.stages.journal import Section
from lowbit.stages.whole import read_back


@dataclass
class CacheFitting:
    """One FitCache stage of a run.

    Args:
        stage: what to do.
        walk: of the same run: it knows the windows.
        source: the units of the stages before.
        section: where what is found goes.
        packed: what the stages before have stored.
        formats: of the cache, fitted to the model's keys.
    """

    stage: FitCache
    walk: Walk
    source: Section
    section: Section
    packed: ModelDescription
    formats: KVFormats
    progress: Progress

    def run(self) -> dict[str, CalibrationSpec]:
        """Calibrates, unless the journal has it; what was found, by name of the module that attends."""
        section, name = self.section, self.section.unit_name(0, 1)
        if section.finished and not _is_record(section.finished[0], name):
            section.forget(0)  # the journal was damaged
        if not section.finished:
            found = self._found()
            tensors = {
                f"{path}.{CALIBRATION}.{key}": buffer
                for path, calibration in found.items()
                for key, buffer in calibration.named_buffers()
            }
            record = {"found": {path: to_dict(calibration.spec) for path, calibration in found.items()}}
            section.write(name, tensors, record)
        return _specs(section.finished[0]["record"])

    @torch.no_grad()
    def _found(self) -> dict[str, CacheCalibration]:
        walk = self.walk
        assert walk.ids is not None
        # A checkpoint stores something quantized; a cache as it is says as little as possible.
        stored = self.packed if self.packed.layers else replace(self.packed, kv=KVSpec(None, None))
        model = read_back(walk.plan, self.section, stored, self.source.files)
        model.set_attn_implementation(IMPLEMENTATION)
        layers = listened_layers(walk.plan, model, self.formats)
        ids = walk.ids[: walk.calibrated]
        with ExitStack() as stack:
            for layer in layers.values():
                stack.enter_context(observed(layer.module, partial(layer.observe, self.stage)))
            for w, ids_T in enumerate(ids):
                model.base_model(input_ids=ids_T[None], use_cache=False)
                self.progress(w + 1, len(ids), f"calibrating the cache: window {w + 1} of {len(ids)}")
        return {
            path: calibration
            for path, layer in layers.items()
            if (calibration := layer.calibration(self.stage, path)) is not None
        }


@dataclass
class ListenedLayer:
    """An attention module whose cache is calibrated.

    Attributes:
        form: the format of its cache.
        frequencies: of its rotary embedding, where keys are packed before it.
        heads: key-value heads, and channels of a key and of a value, once it has run.
        sums: what was added up.
    """

    module: nn.Module
    form: KVSpec
    frequencies: Tensor | None = None
    heads: tuple[int, int, int] | None = None
    sums: Sums = field(default_factory=dict)

    def observe(self, stage: FitCache, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> None:
        """Adds one attention call to the sums."""
        self.heads = key.shape[1], key.shape[3], value.shape[3]
        operands = Operands(query.float(), key.float(), value.float(), scaling, self.frequencies, self.form.sink)
        stage.fit.observe(self.sums, operands)

    def calibration(self, stage: FitCache, path: str) -> CacheCalibration | None:
        """What follows from the sums, as far as the format asks for it; None: it asks for nothing of this stage.

        Raises:
            ValueError: the module has not been called.
            Broken: its operands were NaN or Inf.
        """
        asked = self.form.calibrated & stage.fit.parts
        if not asked:
            return None
        if self.heads is None:
            raise ValueError(f"{path} was never called on the calibration text, so its cache cannot be calibrated")
        try:
            buffers = stage.fit.found(self.sums, shared_heads=self.form.shared_heads)
            made = CacheCalibration(CalibrationSpec.of(asked, self.heads))
            made.fill({name: buffers[name] for name in asked})
            made.check(f"{path}.{CALIBRATION}")
        except ValueError as error:
            raise Broken(f"the cache of {path} cannot be calibrated: {error}") from error
        return made


def listened_layers(plan: ModelPlan, model: PreTrainedModel, formats: KVFormats) -> dict[str, ListenedLayer]:
    """The attention modules whose caches' formats need calibration, by name."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    cache = PackedCache(config, formats.kv, formats.overrides)
    forms = {i: layer.spec for i, layer in enumerate(cache.layers) if isinstance(layer, PackedLayer)}
    layers = {}
    for block in plan.blocks:
        for path in attention_modules(block.resolved):
            module = model.get_submodule(f"{block.name}.{path}")
            form = forms.get(getattr(module, "layer_idx", -1))
            if form is not None and form.calibrated:
                turning = _turning(form, text, module)
                layers[f"{block.name}.{path}"] = ListenedLayer(module, form, turning)
    return layers


def _turning(form: KVSpec, text: Any, module: nn.Module) -> Tensor | None:
    if not form.before_rope:
        return None
    return frequencies(text, getattr(module, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def combined(a: Mapping[str, CalibrationSpec], b: Mapping[str, CalibrationSpec]) -> dict[str, CalibrationSpec]:
    """Calibrations of both, by module; where both have some, with the buffers of both."""
    result = dict(a)
    for path, spec in b.items():
        before = result.get(path)
        buffers = spec.buffers if before is None else (*before.buffers, *spec.buffers)
        result[path] = CalibrationSpec.of(buffers, spec.heads)
    return result


def _is_record(entry: Mapping[str, Any], name: str) -> bool:
    try:
        return entry["file"] == name and bool(_specs(entry["record"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _specs(record: Mapping[str, Any]) -> dict[str, CalibrationSpec]:
    return {path: from_dict(data, CalibrationSpec) for path, data in record["found"].items()}
