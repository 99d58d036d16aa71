"""Recipes that quantize attention's operands, from the walk to the loaded model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

import lowbit
from lowbit import decoding
from lowbit.architectures import attention_spec, observed, operand_ranges
from lowbit.checkpoints import native
from lowbit.checkpoints.description import ModelDescription
from lowbit.modules import AttentionSpec, restore
from lowbit.numerics import to_dict
from lowbit.plan import explain, plan
from lowbit.recipes import Recipe, from_plain
from lowbit.scheme import Scheme
from lowbit.solve import Nearest
from lowbit.steps import Learn, Set, SetAttentionRange, Smooth, Solve

from helpers import random_ids, sqnr_db, tiny_llama
from laws.test_architectures import CASES
from matrix import made_of, save_model
from pairwise import enough

SPEC = AttentionSpec(8, probability_bits=8)
RECIPE = lowbit.recipe("smoothquant", attention_bits=8)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    place = tmp_path_factory.mktemp("attention")
    lowbit.quantize(tiny_llama(place / "model"), RECIPE, random_ids(4, 32), out=place / "out")
    return place


@torch.no_grad()
def test_the_loaded_model_attends_with_quantized_operands_and_generates(quantized):
    description = json.loads((quantized / "out/config.json").read_text())["quantization_config"]
    assert description["version"] == 3
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert description["attention"] == [[{"type": "AttentionSpec", "bits": 8, "probability_bits": 8}, names]]
    model, ids = lowbit.load(quantized / "out", dtype=torch.float32), random_ids(1, 24, seed=3)
    assert [name for name, module in model.named_modules() if attention_spec(module) == SPEC] == names
    assert "queries, keys and values are quantized" in decoding.explain(model)
    restore(model)
    found = model(ids).logits
    plain = lowbit.load(quantized / "out", dtype=torch.float32)
    restore(plain)
    plain.set_attn_implementation("sdpa")  # linears as they are, attention floating
    assert 15 < sqnr_db(plain(ids).logits, found) < 60
    steps = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(steps[:, 24], found[:, -1].argmax(-1)) and steps.shape == (1, 28)


@torch.no_grad()
def test_transformers_loads_it_and_saving_keeps_it(quantized, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(quantized / "out", dtype=torch.float32)
    ids = random_ids(1, 24, seed=3)
    native.save(model, tmp_path / "again")
    again = lowbit.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert (tmp_path / "again/config.json").read_text().count("AttentionSpec") == 1


def test_learning_and_mixes_quantize_it_too_and_steps_see_it(tmp_path, monkeypatch):
    model, seen, run = tiny_llama(tmp_path / "model"), [], Learn.run
    spied = lambda step, state: (seen.append(attention_spec(state.block.self_attn)), run(step, state))[1]  # noqa: E731
    monkeypatch.setattr(Learn, "run", spied)
    learned = lowbit.recipe("omniquant", bits=6, activation_bits=6, attention_bits=6, epochs=1)
    assert learned.scheme.attention == AttentionSpec(6, symmetric=False)
    report = lowbit.quantize(model, learned, random_ids(4, 32), out=tmp_path / "a")
    assert seen == [learned.scheme.attention] * 2
    floating = lowbit.recipe("omniquant", bits=6, activation_bits=6, epochs=1)
    other = lowbit.quantize(model, floating, random_ids(4, 32), out=tmp_path / "b")
    assert seen[2:] == [None] * 2
    assert report.kl != other.kl and report.bits_per_weight == other.bits_per_weight
    mixed = lowbit.recipe("smoothquant+gptq", bits=8, activation_bits=8, group_size=None, attention_bits=8)
    assert mixed.scheme.attention == SPEC


STATIC = [
    ("smoothquant", {"level": "O3", "attention_bits": 8}, 7 * 4),
    ("outlier-suppression", {"attention_bits": 8, "epochs": 1}, 3 * 5),
    # Scales of 4 query and 2 + 2 key-value heads with 4 clusters each, their zero points, and a label for 2 x 2 x 16 channels.
    ("rptq", {"bits": 8, "activation_bits": 8, "attention_bits": 6, "ranges": "minmax"}, 32 * 5 + 64),
]


@pytest.mark.parametrize(
    ("name", "options", "stored"), STATIC, ids=lambda value: value if isinstance(value, str) else ""
)
def test_static_ranges_are_stored_counted_and_loaded_in_any_dtype(name, options, stored, tmp_path):
    model, ids = tiny_llama(tmp_path / "model"), random_ids(1, 24, seed=3)
    lowbit.quantize(model, lowbit.recipe(name, **options), random_ids(8, 64), out=tmp_path / "out")
    loaded = lowbit.load(tmp_path / "out", dtype=torch.float32)
    ranges = [operand_ranges(layer.self_attn) for layer in loaded.model.layers]
    for found in ranges:
        if name != "smoothquant":
            assert sum(buffer.nbytes for buffer in found.buffers()) == stored
    with torch.no_grad():
        found, original = loaded(ids).logits, lowbit.load(model, dtype=torch.float32)(ids).logits
    assert sqnr_db(original, found) > 15
    half = lowbit.load(tmp_path / "out", dtype=torch.bfloat16)
    for a, b in zip(ranges, (operand_ranges(layer.self_attn) for layer in half.model.layers), strict=True):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a.buffers(), b.buffers(), strict=True))
    native.save(loaded, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(lowbit.load(tmp_path / "again", dtype=torch.float32)(ids).logits, found)
    steps = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(steps[:, 24], found[:, -1].argmax(-1))


@pytest.mark.parametrize("skip", [0, 3])
def test_the_first_tokens_of_windows_can_be_kept_out_of_static_ranges(skip, tmp_path):
    model, ids = tiny_llama(tmp_path / "model"), random_ids(8, 16)
    largest = {}

    def keep(*operands):
        largest.update(
            (name, x[:, :, skip:].abs().max().item())
            for name, x in zip(("query", "key", "value"), operands[:3], strict=True)
        )

    original = lowbit.load(model, dtype=torch.float32)
    original.set_attn_implementation("lowbit")
    with torch.no_grad(), observed(original.model.layers[0].self_attn, keep):
        original(ids)
    recipe = lowbit.recipe("smoothquant", level="O3", attention_bits=8, skip_first=skip)
    lowbit.quantize(model, recipe, ids, out=tmp_path / "out")
    ranges = operand_ranges(lowbit.load(tmp_path / "out").model.layers[0].self_attn)
    for name, absmax in largest.items():
        assert ranges.get_buffer(f"{name}_scale").item() == pytest.approx(absmax / 127, rel=1e-4)


def test_windows_that_are_skipped_whole_leave_no_range(tmp_path):
    with pytest.raises(ValueError, match="number of tokens"):
        SetAttentionRange(skip_first=-1)
    recipe = lowbit.recipe("smoothquant", level="O3", attention_bits=8, skip_first=8)
    with pytest.raises(ValueError, match="windows of 8 tokens"):
        lowbit.quantize(tiny_llama(tmp_path / "model"), recipe, random_ids(2, 8), out=tmp_path / "out")


@pytest.mark.parametrize("case", enough([case for case in CASES if not case.startswith(("bloom", "falcon"))], made_of))
def test_static_ranges_by_clusters_serve_every_architecture_that_attends_through_the_interface(case, tmp_path):
    original = save_model(case, tmp_path / "model")
    ids = torch.randint(3, 48, (8, 24), generator=torch.Generator().manual_seed(0))
    recipe = lowbit.recipe("rptq", bits=8, activation_bits=8, attention_bits=8, ranges="minmax", clusters=8)
    lowbit.quantize(tmp_path / "model", recipe, ids, out=tmp_path / "out")
    model = lowbit.load(tmp_path / "out", torch.float32)
    assert any(operand_ranges(module) is not None for module in model.modules())
    with torch.no_grad():
        assert sqnr_db(original(ids).logits, model(ids).logits) > 20


def test_a_killed_run_with_static_ranges_continues_to_the_same_bytes(tmp_path):
    model, recipe = tiny_llama(tmp_path / "model"), lowbit.recipe(STATIC[2][0], **STATIC[2][1])
    lowbit.quantize(model, recipe, random_ids(4, 32), out=tmp_path / "a", max_kl=50)

    def interrupt(done, total, what):
        if done >= 1.2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(model, recipe, random_ids(4, 32), out=tmp_path / "b", max_kl=50, progress=interrupt)
    lowbit.quantize(model, recipe, random_ids(4, 32), out=tmp_path / "b", max_kl=50)
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_static_ranges_need_a_step_that_finds_them_before_what_moves_channels():
    scheme = Scheme(rules=lowbit.recipe("rtn").scheme.rules, attention=AttentionSpec(8, static=True))
    with pytest.raises(ValueError, match="static operands of attention need the step SetAttentionRange"):
        Recipe.blockwise(name="mine", scheme=scheme, steps=(Solve(Nearest()),))
    late = Set(Smooth(0.5), ("v_o",))
    with pytest.raises(ValueError, match="Set transforms channels whose static ranges in attention are fixed by then"):
        Recipe.blockwise(name="mine", scheme=scheme, steps=(SetAttentionRange(), late, Solve(Nearest())))
    with pytest.raises(ValueError, match="ranges that attention's operands do not have here"):
        Recipe.blockwise(name="mine", scheme=lowbit.recipe("rtn").scheme, steps=(SetAttentionRange(), Solve(Nearest())))
    assert Recipe.blockwise(
        name="mine", scheme=scheme, steps=(late, SetAttentionRange(), Solve(Nearest()))
    ).needs_calibration
    mixed = lowbit.recipe("rptq+llm-fp4", attention_bits=8, attention_format=None)
    assert mixed.scheme.attention == lowbit.recipe("rptq", attention_bits=8).scheme.attention


def test_explain_and_plan_say_so(tmp_path):
    place = tiny_llama(tmp_path / "model")
    told = "queries, keys and values of 8 bits, a range for each token of each head; its probabilities are of 8 bits"
    assert any(told in note for note in explain(RECIPE, place).notes)
    (answer,) = (a for name, a in plan(place, RECIPE).compatibility.items() if name.startswith("vLLM"))
    assert "attention multiplies quantized queries, keys and values, for which it has no place" in answer


def test_recipes_with_it_are_plain_data_and_overrides_keep_it():
    assert from_plain(to_dict(RECIPE)) == RECIPE
    assert RECIPE.with_overrides([{"match": "down", "skip": True}]).scheme.attention == SPEC
    assert lowbit.recipe("smoothquant", attention_bits=16).scheme.attention is None
    assert "attention" not in to_dict(lowbit.recipe("smoothquant"))["scheme"]


def test_models_that_attend_by_code_of_their_own_are_refused_before_any_work(tmp_path):
    config = BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    with pytest.raises(ValueError, match="BloomForCausalLM does not attend through transformers' attention interface"):
        lowbit.quantize(tmp_path / "bloom", RECIPE, random_ids(2, 16), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage", [[["x"]], [[{"type": "PerToken"}, ["model.layers.0.self_attn"]]], [{"bits": 8}], [[{"type": "No"}, []]]]
)
def test_a_damaged_description_of_it_is_refused(quantized, tmp_path, damage):
    config = json.loads((quantized / "out/config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match=r"damaged|No"):
        ModelDescription.from_json(config | {"attention": damage})
