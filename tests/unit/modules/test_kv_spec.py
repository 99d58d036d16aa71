"""Formats of a KV cache: what they may be, where they are carried, and which models cannot have one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import MambaConfig, MambaForCausalLM

import lowbit
from lowbit.modules import KVSpec
from lowbit.numerics import (
    NF4,
    Block,
    Codebook,
    Int,
    Normal,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Spec,
    from_dict,
    to_dict,
)
from lowbit.plan import plan
from lowbit.recipes import Recipe, from_file, from_plain, mix
from lowbit.scheme import Scheme, linears, weight

from helpers import random_ids

KIVI = KVSpec(Spec(Int(2), Block(32, 1)), Spec(Int(2), PerGroup(32)), recent=128)
GROUPS, TOKENS = Spec(Int(4), PerGroup(32)), Spec(Int(4), PerToken())
STATIC = Spec(Int(8, symmetric=True), PerTensor())


@pytest.mark.parametrize(
    "spec",
    [KIVI, KVSpec(TOKENS, TOKENS), KVSpec(GROUPS, Spec(NF4, PerGroup(64)), recent=5, sink=4, past_only=False)],
    ids=["kivi", "per token", "groups and tables"],
)
def test_a_format_survives_its_plain_form(spec):
    assert from_dict(json.loads(json.dumps(to_dict(spec)))) == spec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recent": -1}, "recent is a number of tokens, 0 or more, found -1"),
        ({"sink": 1.5}, "sink is a number of tokens, 0 or more, found 1.5"),
        ({"key": Int(4)}, r"KVSpec\.key needs a Spec .* found Int"),
        ({"value": Spec(Codebook(4), PerToken())}, r"KVSpec\.value needs a Spec with a grid that a range places"),
        ({"key": Spec(Int(4), PerChannel())}, r"KVSpec\.key .* PerChannel.* change with every token"),
        (
            {"value": Spec(Normal(4), PerTensor())},
            r"one range for all tokens, which places integers or floats, found Normal",
        ),
        ({"key": STATIC, "key_rotation": "hadamard"}, r"KVSpec\.key .* range for all tokens.*leave rotations"),
        ({"key": STATIC, "centred": True, "recent": 32}, r"KVSpec\.key .* range for all tokens.*centred out"),
        ({"value": STATIC, "value_shifted": True}, r"KVSpec\.value .* range for all tokens.*shifts"),
        (
            {"value": GROUPS, "shared_heads": True},
            r"shared_heads goes with PerToken\(\) or PerTensor\(\), found PerGroup",
        ),
        ({"value": replace(TOKENS, stats=TOKENS)}, r"KVSpec\.value quantizes its scales"),
        ({"recent": 0, "key": Spec(Int(4), Block(32, 1))}, r"blocks of 32 tokens.* a multiple of 32, found 0"),
        ({"recent": 48, "value": Spec(Int(4), Block(32, 4))}, r"KVSpec\.value .* a multiple of 32, found 48"),
    ],
)
def test_a_format_that_no_cache_can_have_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KVSpec(**{"key": TOKENS, "value": TOKENS, **settings})


def test_a_file_of_either_kind_takes_the_format_and_a_mix_keeps_it(tmp_path):
    kv = "kv: {key: {grid: {type: Int, bits: 4}, granularity: {type: PerToken}}, value: {grid: {type: Int, bits: 4}, granularity: {type: PerToken}}, sink: 4}\n"
    wanted = KVSpec(TOKENS, TOKENS, sink=4)
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\n" + kv)
    alone = from_file(file)
    assert alone == Recipe("mine", Scheme(kv=wanted)) and not alone.needs_calibration and alone.steps == ()
    file.write_text("method: gptq\n" + kv)
    both = from_file(file)
    assert both.scheme == replace(lowbit.recipe("gptq").scheme, kv=wanted) and both.steps == lowbit.recipe("gptq").steps
    assert mix("mine", [alone, lowbit.recipe("gptq")]) == replace(both, name="mine")
    assert mix("mine", [alone, alone]) == alone
    for recipe in (alone, both):
        assert from_plain(json.loads(json.dumps(to_dict(recipe)))) == recipe
        assert recipe.with_overrides([]) == recipe
    assert both.with_overrides([{"match": "down", "bits": 8}]).scheme.kv == wanted


def test_a_mistake_in_a_file_is_named_with_its_place():
    data = {"method": "gptq", "kv": {"key": to_dict(TOKENS), "value": to_dict(TOKENS), "recent": "all"}}
    with pytest.raises(ValueError, match=r"kv\.KVSpec\.recent: .*integer, found 'all'"):
        from_plain(data)
    with pytest.raises(ValueError, match=r"kv: expected KVSpec, its fields as a mapping, found 'kivi:2'"):
        from_plain(data | {"kv": "kivi:2"})
    with pytest.raises(ValueError, match=r"options: expected a mapping, found None"):
        from_plain({"method": "gptq", "options": None})
    with pytest.raises(ValueError, match=r"overrides: expected a list, found"):
        from_plain({"method": "gptq", "overrides": {"match": "down", "bits": 8}})
    del data["kv"]["value"]
    with pytest.raises(ValueError, match=r"kv\.KVSpec\.value: Field required"):
        from_plain(data)


def test_a_recipe_has_a_stage_or_only_a_cache_format():
    for scheme in (Scheme(), linears(weight(4, 64)), replace(linears(weight(4, 64)), kv=KIVI)):
        with pytest.raises(ValueError, match=r"has a stage.* or only a KV cache format"):
            Recipe("mine", scheme)


def test_a_model_without_keys_and_values_is_refused_before_any_work(tmp_path):
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="mamba has no layers of full attention"):
        lowbit.quantize(tmp_path / "model", Recipe("mine", Scheme(kv=KIVI)), random_ids(2, 16), out=tmp_path / "out")
    with pytest.raises(ValueError, match="mamba has no layers of full attention"):
        plan(tmp_path / "model", Recipe("mine", Scheme(kv=KIVI)))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
