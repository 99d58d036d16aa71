from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import yaml

from lowbit.modules import ActSpec, QuantLinear
from lowbit.numerics import ClipSearch, Int, PerChannel, PerGroup, PerTensor, PerToken, Spec, Table, to_dict
from lowbit.plan.model_plan import plan_model
from lowbit.recipes import METHODS, Blockwise, Recipe, as_recipe, builtin_recipes, from_file, from_plain, mix, recipe
from lowbit.scheme import FormatRule, Scheme, activation, linears, weight
from lowbit.solve import Gptq, Nearest
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Journal
from lowbit.steps import (
    ClipShares,
    Learn,
    MeanAbsPower,
    Scales,
    Search,
    SearchClip,
    Set,
    SetActivationRange,
    Smooth,
    Solve,
)

from helpers import random_ids, tiny_llama

BUILTIN = sorted(builtin_recipes())
LLAMA_LINEARS = {
    f"model.layers.{i}.{path}_proj": path.rpartition(".")[2]
    for i in range(2)
    for path in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
}
PLAIN_W4 = {"type": "Spec", "grid": {"type": "Int", "bits": 4}, "granularity": {"type": "PerGroup", "size": 64}}
SOLVE = {"type": "Solve", "solver": {"type": "Nearest"}}


def explicit(**changes) -> dict:
    """The data of a recipe file that spells out everything."""
    return {"name": "mine", "scheme": [{"match": "*", "weight": PLAIN_W4}], "steps": [SOLVE]} | changes


# One recipe, written in three ways


def test_a_file_a_name_with_options_and_python_give_equal_recipes(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: gptq\noptions: {bits: 3, group_size: 64, act_order: true}\n")
    python = Recipe.blockwise(
        name="gptq",
        scheme=Scheme(rules=(FormatRule(weight=Spec(Int(3), PerGroup(64))),)),
        steps=(Solve(Gptq(ClipSearch(), order="act")),),
        feed="quant",
    )
    named = recipe("gptq", bits=3, group_size=64, act_order=True)
    assert from_file(file) == named == python == as_recipe(str(file)) == as_recipe(file)
    assert as_recipe(named) is named
    assert as_recipe({"method": "gptq", "options": {"bits": 3, "group_size": 64, "act_order": True}}) == named
    assert recipe("gptq", bits=4, group_size=64, act_order=True) != named


def test_formats_and_steps_spelled_out_are_the_named_recipe():
    spelled, named = as_recipe("w4-explicit"), as_recipe("w4-awq-gptq")
    assert (spelled.scheme, spelled.steps, spelled.feed, spelled.seed) == (
        named.scheme,
        named.steps,
        named.feed,
        named.seed,
    )


def test_options_of_the_wrong_kind_of_number_are_read_as_the_method_declares_them(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: omniquant\noptions: {clip_lr: 1e-3}\n")
    (clip,) = from_file(file).steps[0].makers
    assert clip == ClipShares(lr=0.001) and isinstance(clip.lr, float)
    file.write_text("method: omniquant\noptions: {clip_lr: 1}\n")
    assert from_file(file).steps[0].makers[0].lr == 1.0


def test_exponents_without_a_point_are_numbers_in_explicit_steps_too(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nscheme: [{match: '*', weight: {type: Spec, grid: {type: Int, bits: 4}, granularity: {type: PerChannel}}}]\n"
        "steps:\n- {type: Solve, solver: {type: Gptq, damp: 5e-3}}\n"
    )
    assert from_file(file).steps == (Solve(Gptq(damp=0.005)),)


def test_steps_at_the_top_of_a_file_are_short_for_one_stage():
    rules = [{"weight": {key: item for key, item in PLAIN_W4.items() if key != "type"}}]
    stage = {"type": "Blockwise", "steps": [SOLVE], "feed": "fp"}
    long = from_plain({"name": "mine", "scheme": {"rules": rules}, "stages": [stage]})
    assert long == from_plain(explicit(feed="fp")) == from_plain(to_dict(long))
    assert long == Recipe("mine", linears(weight(4, 64)), (Blockwise((Solve(Nearest()),), "fp"),))
    with pytest.raises(ValueError, match="short for one Blockwise stage"):
        from_plain(explicit(stages=[stage]))
    with pytest.raises(ValueError, match="so attention and kv go into it"):
        from_plain(explicit(scheme={"rules": rules}, attention={"bits": 8}))


@pytest.mark.parametrize("name", BUILTIN)
def test_every_builtin_recipe_loads_says_what_for_and_survives_plain_data(name):
    data = yaml.safe_load(builtin_recipes()[name].read_text())
    assert 20 < len(data["description"]) < 120 and data["description"].endswith(".")
    loaded = as_recipe(name)
    assert loaded == from_file(builtin_recipes()[name])
    assert from_plain(json.loads(json.dumps(to_dict(loaded)))) == loaded


@pytest.mark.parametrize("name", BUILTIN)
def test_every_builtin_recipe_fits_a_llama(name):
    as_recipe(name).scheme.check_matches(LLAMA_LINEARS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny", hidden_size=32, intermediate_size=48)


@pytest.mark.parametrize("name", BUILTIN)
def test_every_builtin_recipe_quantizes_every_linear(tiny, tmp_path, name):
    wanted = as_recipe(name)
    quick = (replace(step, epochs=1) if isinstance(step, Learn) else step for step in wanted.steps)
    wanted = wanted.with_blockwise(steps=tuple(quick))
    journal = Journal(tmp_path / "out", {})
    journal.open()
    walk = Walk(plan_model(tiny, wanted), random_ids(2, 16), journal)
    records = walk.run()
    layers = [layer for record in records for layer in record.layers]
    assert {layer.name: layer.role for layer in layers} == LLAMA_LINEARS
    for layer in layers:
        form = wanted.scheme.format(layer.name, layer.role)
        assert layer.bits_per_weight > form.weight.grid.bits
        assert layer.error < 0.5
    walk.close()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_survives_plain_data_and_describes_itself(name):
    built = recipe(name)
    assert from_plain(json.loads(json.dumps(to_dict(built)))) == built
    described = json.loads(json.dumps(METHODS[name].describe()))
    assert described["name"] == name and described["summary"].endswith(".")
    assert set(described["options"]) == set(METHODS[name].options)


def test_a_recipe_can_be_a_key_and_cannot_be_changed():
    assert len({recipe("gptq"), recipe("gptq"), recipe("gptq", bits=3)}) == 2
    with pytest.raises(FrozenInstanceError):
        recipe("gptq").seed = 1  # pyright: ignore[reportAttributeAccessIssue]


# Formats


def test_bits_groups_and_activations_become_specs():
    rule = recipe("rtn", bits=3, group_size=None, symmetric=True, activation_bits=8).scheme.rules[0]
    assert rule.weight == Spec(Int(3, symmetric=True), PerChannel()) == weight(3, None, symmetric=True)
    assert rule.activation == ActSpec(Spec(Int(8, symmetric=True), PerToken(), scale_dtype="float32"))
    assert activation(None) is None and activation(16) is None
    static = activation(8, per="tensor", static=True)
    assert static is not None and static.static and static.spec.granularity == PerTensor()


def test_the_last_rule_that_matches_counts():
    four, eight = weight(4, 64), weight(8, None)
    scheme = Scheme(
        rules=(
            FormatRule(weight=four),
            FormatRule(match="down", weight=eight),
            FormatRule(match="re:layers\\.1\\.", skip=True),
            FormatRule(match="model.layers.1.*.v_proj", weight=eight),
        )
    )
    found = {name: scheme.format(name, role) for name, role in LLAMA_LINEARS.items()}
    assert found["model.layers.0.self_attn.q_proj"].weight == four
    assert found["model.layers.0.mlp.down_proj"].weight == eight
    assert found["model.layers.1.mlp.down_proj"] is None
    assert found["model.layers.1.self_attn.v_proj"].weight == eight
    assert Scheme(rules=(FormatRule(match="q", weight=four),)).format("model.layers.0.mlp.down_proj", "down") is None


def test_an_override_changes_what_it_names_and_keeps_the_rest():
    base = {"method": "rtn", "options": {"bits": 4, "group_size": 64, "activation_bits": 8}}
    overrides = [
        {"match": "down", "bits": 8},
        {"match": "v", "group_size": 32, "symmetric": True},
        {"match": "o", "group_size": "channel", "activation_bits": 6},
        {"match": "q", "activation_bits": 16},
        {"match": "k", "skip": True},
    ]
    built = from_plain(base | {"overrides": overrides})
    form = {role: built.scheme.format(name, role) for name, role in LLAMA_LINEARS.items()}
    act = activation(8)
    assert (form["down"].weight, form["down"].act) == (weight(8, 64), act)
    assert (form["v"].weight, form["v"].act) == (weight(4, 32, symmetric=True), act)
    assert (form["o"].weight, form["o"].act) == (weight(4, None), activation(6))
    assert (form["q"].weight, form["q"].act) == (weight(4, 64), None)
    assert form["k"] is None and form["gate"].weight == weight(4, 64)
    assert from_plain(to_dict(built)) == built


def test_an_override_starts_from_the_first_rule_that_has_a_format():
    data = explicit(scheme=[{"match": "k", "skip": True}, {"match": "*", "weight": PLAIN_W4}])
    built = from_plain(data | {"overrides": [{"match": "down", "bits": 8}]})
    assert built.scheme.format("x", "down").weight == weight(8, 64)


# Mixes


def test_a_mix_takes_the_steps_in_order_and_solves_once_as_the_last_does():
    mixed = recipe("smoothquant+gptq", bits=8, group_size=None, symmetric=True, activation_bits=8, alpha=0.8)
    assert mixed.steps == (Set(Smooth(0.8), ("norm_*",)), Solve(Gptq(ClipSearch(), order="group")))
    assert mixed.scheme == linears(weight(8, None, symmetric=True), activation(8))
    assert mixed.feed == recipe("gptq").feed
    assert recipe("awq+gptq", bits=3, group_size=64, clip=False).steps[0] == Search(
        MeanAbsPower(20), ("norm_*", "v_o", "*up_down*")
    )


def test_activations_of_a_mix_are_as_the_first_that_quantizes_them_says():
    static = recipe("smoothquant+gptq", level="O3", bits=8, group_size=None)
    assert [type(step) for step in static.steps] == [Set, SetActivationRange, Solve]
    assert static.scheme.rules[0].activation == recipe("smoothquant", level="O3").scheme.rules[0].activation


# Refusals, with the nearest valid value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "gtpq"}, r"no method 'gtpq' \(did you mean 'gptq'\?\)"),
        ({"method": "awq+gtpq"}, r"no method 'gtpq' \(did you mean 'gptq'\?\)"),
        ({"method": "gptq", "options": {"group_sise": 64}}, r"no option 'group_sise' \(did you mean 'group_size'\?\)"),
        (
            {"method": "awq+gptq", "options": {"clpi": False}},
            r"none of the methods .* 'clpi' \(did you mean 'clip'\?\)",
        ),
        ({"method": "gptq", "option": {"bits": 3}}, r"unknown key 'option' \(did you mean 'options'\?\)"),
        ({"method": "gptq", "options": {"bits": "four"}}, r"method 'gptq': bits: .*integer.*'four'"),
        ({"method": "gptq", "options": {"bits": 9}}, "1 to 8 bits, found 9"),
        ({"method": "gptq", "options": {"group_size": 0}}, "found 0"),
        ({"method": "gptq", "options": {"order": "up"}}, r"order: .*'act'"),
        ({"method": "smoothquant", "options": {"alpha": 1.5}}, "alpha is a share between 0"),
        ({"method": "gptq", "feed": "both"}, "feed: .*'fp' or 'quant'"),
        ({"method": "gptq", "overrides": [{"mach": "down"}]}, r"unknown key 'mach' \(did you mean 'match'\?\)"),
        ({"method": "gptq", "overrides": [{"bits": 8}]}, "match: Field required"),
        ({"method": "gptq", "overrides": [{"match": "re:(", "bits": 8}]}, "not a regular expression"),
        ({}, "method: Field required"),
        (["gptq"], "a recipe is a mapping .* found list"),
        (explicit(step=[]), r"unknown key 'step' \(did you mean 'steps'\?\)"),
        (
            explicit(steps=[SOLVE | {"solver": {"type": "Gtpq"}}]),
            r"solver: unknown type 'Gtpq' \(did you mean 'Gptq'\?\)",
        ),
        (explicit(steps=[SOLVE | {"solvr": 1}]), r"Solve has no option 'solvr' \(did you mean 'solver'\?\)"),
        (explicit(steps=[PLAIN_W4, SOLVE]), "is not a step such as Solve"),
        (explicit(scheme=[{"match": "*", "wieght": PLAIN_W4}]), r"unknown key 'wieght' \(did you mean 'weight'\?\)"),
        (explicit(scheme=[], overrides=[{"match": "q", "bits": 8}]), "no rule of the scheme has a weight format"),
        (explicit(scheme=[]), "no rule of the scheme has a weight format"),
        (explicit(steps=[]), "one Solve, as its last step"),
    ],
)
def test_a_mistake_is_named_with_the_nearest_valid_thing(data, message):
    with pytest.raises(ValueError, match=message):
        from_plain(data)


def test_a_name_that_is_neither_method_nor_recipe_is_answered_with_both_lists():
    with pytest.raises(
        ValueError, match=r"no method and no recipe 'w4-gtpq' \(did you mean 'w4-gptq'\?\); .*ends in .yaml"
    ):
        as_recipe("w4-gtpq")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"type": "Set", "rule": {"type": "Smooth"}, "at": "norm_*"}, r"Set.at: expected a list, found 'norm_\*'"),
        (
            {"type": "Set", "rule": {"type": "MinMax"}, "at": ["norm_*"]},
            r"Set.rule: expected TransformRule, found MinMax\(\)",
        ),
        (
            {"type": "Set", "rule": {"type": "Smooth", "alpha": "high"}, "at": ["norm_*"]},
            "Set.rule.Smooth.alpha: .*number, found 'high'",
        ),
        ({"type": "Learn", "makers": [{"type": "ClipShares", "lr": "fast"}]}, "ClipShares.lr: .*number, found 'fast'"),
        (
            {"type": "Search", "candidates": {"type": "MeanAbsPower", "grid": 2.5}, "at": ["v_o"]},
            "MeanAbsPower.grid: .*integer",
        ),
    ],
)
def test_a_setting_of_the_wrong_type_is_found_before_any_work(step, message):
    with pytest.raises(ValueError, match=message):
        from_plain(explicit(steps=[step, SOLVE]))


def test_a_rule_that_matches_nothing_names_the_nearest_role_or_layer(tiny):
    assert plan_model(tiny, "rtn").linears == LLAMA_LINEARS
    for pattern, message in [
        ("doown", r"'doown' matches no layer \(did you mean 'down'\?\)"),
        ("model.layers.7.mlp.down_proj", r"did you mean 'model\.layers\.\d\.mlp\.down_proj'"),
        ("re:^nothing$", "has the roles down, gate, k, o, q, up, v, and names such as model.layers.0.self_attn.q_proj"),
    ]:
        wanted = recipe("rtn").with_overrides([{"match": pattern, "skip": True}])
        with pytest.raises(ValueError, match=message):
            plan_model(tiny, wanted)


CLIP = Learn((ClipShares(),))


@pytest.mark.parametrize("clip", [SearchClip(), CLIP], ids=["searched", "learned"])
def test_clipping_and_an_order_that_moves_groups_are_refused_together(clip):
    def build(solver: Gptq, group_size: int | None = 64) -> Recipe:
        return Recipe.blockwise(name="mine", scheme=linears(weight(4, group_size)), steps=(clip, Solve(solver)))

    with pytest.raises(ValueError, match=r"mine: the clipping is chosen .* static_groups=true"):
        build(Gptq(order="act"))
    for fine in (Gptq(order="act", static_groups=True), Gptq(order="group"), Gptq()):
        assert build(fine).steps[-1].solver == fine
    build(Gptq(order="act"), group_size=None)  # one range for each row, in any order


def test_the_same_refusal_reaches_mixes_and_files():
    with pytest.raises(ValueError, match="static_groups=true"):
        recipe("awq+gptq", act_order=True)
    with pytest.raises(ValueError, match="static_groups=true"):
        from_plain({"method": "awq+gptq", "options": {"order": "act"}})
    recipe("awq+gptq", act_order=True, clip=False)


def test_static_activations_need_their_ranges_set():
    static = linears(weight(8, None), activation(8, per="tensor", static=True))
    with pytest.raises(ValueError, match="static activations need the step SetActivationRange"):
        Recipe.blockwise(name="mine", scheme=static, steps=(Solve(Nearest()),))
    assert Recipe.blockwise(
        name="mine", scheme=static, steps=(SetActivationRange(), Solve(Nearest()))
    ).needs_calibration
    with pytest.raises(ValueError, match="static activation ranges are per tensor"):
        activation(8, per="token", static=True)


@pytest.mark.parametrize("steps", [(), (Solve(), Solve()), (Solve(), SearchClip()), (SearchClip(),)])
def test_a_recipe_solves_once_and_last(steps):
    with pytest.raises(ValueError, match="one Solve, as its last step"):
        Recipe.blockwise(name="mine", scheme=linears(weight(4, 64)), steps=steps)


def test_a_mix_that_would_do_a_step_twice_is_refused():
    with pytest.raises(ValueError, match="would do Search twice"):
        recipe("awq+awq", clip=False)


def test_a_mix_in_which_a_method_would_leave_no_trace_is_refused():
    with pytest.raises(ValueError, match="only says how weights are rounded"):
        recipe("squeezellm+gptq")
    mixed = mix("both", [recipe("rtn", activation_bits=8), recipe("gptq")])
    assert mixed.steps == recipe("gptq").steps and mixed.scheme.quantizes_activations


def test_overrides_change_only_what_the_grid_has():
    nf4 = linears(Spec(Table((-1.0, 0.0, 0.5, 1.0)), PerGroup(64)))
    built = Recipe.blockwise(name="mine", scheme=nf4, steps=(Solve(Nearest()),))
    with pytest.raises(ValueError, match="bits cannot be changed"):
        built.with_overrides([{"match": "down", "bits": 8}])
    assert built.with_overrides([{"match": "down", "group_size": 32}]).scheme.rules[1].weight.granularity == PerGroup(
        32
    )


def test_only_recipes_that_look_at_inputs_need_text():
    needing = {name for name in METHODS if recipe(name).needs_calibration}
    assert "rtn" not in needing and {"gptq", "awq", "smoothquant", "omniquant"} <= needing
    learns_without_statistics = Recipe.blockwise(
        name="mine", scheme=linears(weight(4, 64)), steps=(CLIP, Solve(Nearest()))
    )
    assert learns_without_statistics.needs_calibration and not CLIP.needs
    assert Learn((Scales(("norm_*",)),)).needs


def test_a_missing_or_broken_file_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe file .*nowhere.yaml.*lowbit recipes"):
        as_recipe("nowhere.yaml")
    file = tmp_path / "broken.yaml"
    file.write_text("method: [gptq\n")
    with pytest.raises(ValueError, match=r"broken\.yaml is not YAML"):
        from_file(file)
    file.write_text("")
    with pytest.raises(ValueError, match=r"broken\.yaml: a recipe is a mapping .* found NoneType"):
        from_file(file)
    file.write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match=r"broken\.yaml is not YAML"):
        from_file(file)


_STEPS = "name: x\nscheme: [{match: '*', weight: {type: Spec, grid: {type: Int, bits: 4}, granularity: {type: PerChannel}}}]\n"
_BOMB = "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b0: &b0 [x, x]\n" + _BOMB, "more than 100000 values"),
        ("name: x\nscheme: [{match: '*', weight: &a {type: Spec, grid: *a}}]\n", "an alias refers to what contains it"),
        ("[" * 5000, "nested too deeply"),
        ("x: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("x: " + "y" * 10**6, "a recipe has at most 1000000"),
        ("method: rtn\noptions: {bits: 4, bits: 3}\n", "the key 'bits' is given twice"),
        ("!!timestamp x", "is not YAML"),
        ("method: rtn\noverrides: [{match: 're:([a-z0-9._]+)+!$', bits: 3}]\n", "could try for ever"),
        ("method: rtn\noverrides: [{match: 're:(a|aa)*!', bits: 3}]\n", "could try for ever"),
        ("method: rtn\noverrides: [{match: 're:" + "a?" * 40 + "', bits: 3}]\n", "could try for ever"),
        ("method: rtn\noverrides: [{match: 're:(?:){1000000000}', bits: 3}]\n", "could try for ever"),
        ("method: rtn\noverrides: [{match: 're:" + "(" * 5000 + ")" * 5000 + "', bits: 3}]\n", "at most 500 are read"),
        ("method: rtn\noverrides: [{match: " + "x" * 501 + ", bits: 3}]\n", "at most 500 are read"),
        (_STEPS + "steps: [{type: {a: 1}}]\n", "unknown type {'a': 1}"),
        (_STEPS.replace("weight: {", "weight: {true: x, ") + "steps: []\n", "a key is text, found True"),
    ],
    ids=str,
)
def test_a_file_that_would_run_for_ever_or_mean_two_things_is_refused_in_one_line(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        as_recipe(file)
    assert "mine.yaml" in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 2000


def test_ordinary_patterns_and_aliases_stay(tmp_path):
    file = tmp_path / "mine.yaml"
    patterns = (r".*layers\.\d+\..*_proj$", r"layers\.(1?[0-9]|2[0-9]|3[01])\.", r"(mlp|self_attn)\.(up|down|q)_proj")
    overrides = ", ".join(f"{{match: 're:{pattern}', bits: *b}}" for pattern in patterns)
    file.write_text(f"method: rtn\noptions: {{bits: &b 4}}\noverrides: [{overrides}]\n")
    assert [rule.match for rule in as_recipe(file).scheme.rules[1:]] == [f"re:{pattern}" for pattern in patterns]


def test_quantized_layers_are_packed_linears(tiny, tmp_path):
    journal = Journal(tmp_path / "out", {})
    journal.open()
    record = Walk(plan_model(tiny, recipe("rtn", group_size=16)), None, journal).run()[0]
    layer = QuantLinear.empty(record.modules["model.layers.0.mlp.down_proj"])
    assert layer.spec == weight(4, 16) and layer.shape == (32, 48)
