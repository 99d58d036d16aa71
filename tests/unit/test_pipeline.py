"""The whole run on tiny models: what is written, what is refused, what is held in memory."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.source import open_model
from lowbit.data import Calibration
from lowbit.modules import QuantLinear
from lowbit.numerics import Int, PerGroup, Spec
from lowbit.plan.model_plan import plan_model
from lowbit.recipes import Recipe
from lowbit.scheme import linears
from lowbit.solve import FEW_TOKENS
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Journal
from lowbit.stages.stream import CannotStream
from lowbit.steps import Solve

from helpers import random_ids, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


def _quantize(model, out, recipe="rtn", ids=None, **options):
    recipe = lowbit.recipe(recipe, bits=4, group_size=32) if isinstance(recipe, str) else recipe
    return lowbit.quantize(
        model, recipe, random_ids(3, 24) if ids is None else ids, out=out, **{"max_kl": 50} | options
    )


def test_a_saved_model_loads_both_ways_and_generates_the_same(model, tmp_path):
    report = _quantize(model, tmp_path / "q", "gptq")
    ours = lowbit.load(tmp_path / "q", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ids = random_ids(1, 6)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    a, b = (m.generate(ids, max_new_tokens=5, do_sample=False) for m in (ours, theirs))
    assert torch.equal(a, b) and a.shape == (1, 11)
    assert isinstance(ours.model.layers[0].self_attn.q_proj, QuantLinear)
    assert report.coverage == 1.0 and report.problems == () and report.out == tmp_path / "q"


def test_reported_bits_are_the_stored_bytes(model, tmp_path):
    report = _quantize(model, tmp_path / "q", "gptq")
    linears = {layer.name for layer in report.layers}
    stored = 0
    for shard in (tmp_path / "q").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            if name.rpartition(".")[0] in linears:
                stored += tensor.nbytes
    weights = sum(layer.weights for layer in report.layers)
    assert report.bits_per_weight == pytest.approx(8 * stored / weights, rel=1e-12)
    assert report.bytes == sum(f.stat().st_size for f in (tmp_path / "q").glob("*.safetensors"))


def test_a_report_prints_as_a_few_lines(model, tmp_path):
    text = repr(_quantize(model, tmp_path / "q"))
    assert len(text) < 1500 and "bits_per_weight=" in text and "q_proj" not in text


def test_the_kl_in_the_report_is_that_of_the_loaded_model(model, tmp_path):
    ids = random_ids(3, 24)
    report = _quantize(model, tmp_path / "q", "rtn", ids)
    p = open_model(model).load_full()(ids).logits.log_softmax(-1)
    q = lowbit.load(tmp_path / "q", torch.float32)(ids).logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert report.kl == pytest.approx(kl, rel=1e-3)


def test_activations_in_files_give_the_same_bytes_as_in_memory(model, tmp_path):
    _quantize(model, tmp_path / "ram", "gptq")
    _quantize(model, tmp_path / "disk", "gptq", ram_limit=0)
    for shard in (tmp_path / "ram").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "disk" / shard.name).read_bytes()


def test_at_no_time_is_more_than_one_block_of_original_weights_in_memory(tmp_path):
    plan = plan_model(tiny_llama(tmp_path / "model", blocks=4), lowbit.recipe("awq+gptq", bits=4, group_size=32))
    journal = Journal(tmp_path / "q", {})
    journal.open()
    walk = Walk(plan, random_ids(2, 16), journal)
    most = []

    def look(*_):
        held = [i for i, block in enumerate(walk.blocks) if any(not p.is_meta for p in block.parameters())]
        most.append(len(held))

    walk.progress = look
    walk.run()
    walk.close()
    assert max(most) == 1 and len(most) > 40


def test_a_recipe_without_statistics_runs_without_text(model, tmp_path):
    report = lowbit.quantize(model, lowbit.recipe("rtn", bits=4, group_size=32), None, out=tmp_path / "q")
    assert report.kl is not None and report.calibration == "none"
    with_text = _quantize(model, tmp_path / "t", "rtn")
    assert with_text.kl is not None
    for shard in (tmp_path / "q").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "t" / shard.name).read_bytes()


def test_steps_learn_where_the_caller_computes_no_gradients(model, tmp_path):
    recipe, ids = lowbit.recipe("omniquant", bits=4, group_size=32, epochs=1), random_ids(2, 24)
    _quantize(model, tmp_path / "a", recipe, ids)
    with torch.no_grad():
        _quantize(model, tmp_path / "b", recipe, ids)
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "squeezellm", "smoothquant", "autoround"])
def test_progress_goes_forward_within_a_phase(model, tmp_path, name):
    phases = []

    def report(done, total, what):
        phase = what.partition(":")[0].partition(" ")[0]
        if not phases or phases[-1][0] != phase:
            phases.append((phase, []))
        phases[-1][1].append((done, total))

    _quantize(model, tmp_path / "q", lowbit.recipe(name), progress=report)
    names = [phase for phase, _ in phases]
    assert names == [*(["sensitivities"] if name == "squeezellm" else []), "block", "comparing"]
    for _, told in phases:
        dones, totals = zip(*told, strict=True)
        assert list(dones) == sorted(dones) and len(set(totals)) == 1 and 0 < dones[0] and dones[-1] == totals[0]


def test_a_recipe_that_needs_text_says_so_before_any_work(model, tmp_path):
    with pytest.raises(ValueError, match="needs calibration text"):
        lowbit.quantize(model, "gptq", None, out=tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_a_broken_result_names_its_layers_and_leaves_nothing_finished(model, tmp_path):
    recipe = lowbit.recipe("rtn", bits=1, group_size=None)
    with pytest.raises(
        lowbit.BrokenModel, match=r"KL divergence.*over the limit.*model\.layers\.\d.*overrides"
    ) as refusal:
        _quantize(model, tmp_path / "q", recipe, max_kl=1e-4)
    assert refusal.value.report.problems and not (tmp_path / "q").exists()
    assert not (tmp_path / "q.partial" / "config.json").exists()
    with pytest.raises(ValueError):
        lowbit.load(tmp_path / "q.partial")
    report = _quantize(model, tmp_path / "q", recipe, max_kl=1e-4, allow_broken=True)
    assert report.problems and "**Broken**" in (tmp_path / "q" / "README.md").read_text()


def test_weights_with_nan_are_refused_with_their_name(tmp_path):
    path = tiny_llama(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        _quantize(path, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_activations_that_overflow_stop_the_run_at_their_block(tmp_path):
    path = tiny_llama(tmp_path / "model", blocks=3)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e37
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: a scale of .* does not fit float16"):
        _quantize(path, tmp_path / "half")
    wide = Spec(Int(4), PerGroup(32), scale_dtype="float32")
    recipe = Recipe.blockwise(name="wide", scheme=linears(wide), steps=(Solve(),))
    with pytest.raises(lowbit.BrokenModel, match=r"model\.layers\.1: hidden states behind it are NaN or Inf"):
        _quantize(path, tmp_path / "q", recipe)
    assert not (tmp_path / "q").exists()


def test_groups_that_came_out_all_zero_are_found(tmp_path):
    path = tiny_llama(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    weight[:, :32] *= 1e-12  # far below what a half-precision scale can hold
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(lowbit.BrokenModel, match=r"layers\.0\.mlp\.up_proj: 50% of its groups came out all zero"):
        _quantize(path, tmp_path / "q")


def test_a_quantized_model_is_not_quantized_again(model, tmp_path):
    _quantize(model, tmp_path / "q")
    with pytest.raises(ValueError, match="already quantized"):
        _quantize(tmp_path / "q", tmp_path / "again")


def test_overrides_reach_their_layers_and_unmatched_ones_are_errors(model, tmp_path):
    recipe = lowbit.recipe("rtn", bits=4, group_size=32)
    mixed = recipe.with_overrides([{"match": "down", "bits": 8}, {"match": "re:layers\\.0\\..*q_proj", "skip": True}])
    report = _quantize(model, tmp_path / "q", mixed)
    bits = {layer.name: layer.bits_per_weight for layer in report.layers}
    assert bits["model.layers.1.mlp.down_proj"] > 8 > 5 > bits["model.layers.1.mlp.up_proj"]
    assert "model.layers.0.self_attn.q_proj" not in bits and report.coverage < 1
    with pytest.raises(ValueError, match=r"'dwon' matches no layer.*did you mean 'down'"):
        _quantize(model, tmp_path / "r", recipe.with_overrides([{"match": "dwon", "bits": 8}]))


def test_group_sizes_that_do_not_divide_are_stored_ragged(model, tmp_path):
    report = _quantize(model, tmp_path / "q", lowbit.recipe("gptq", bits=4, group_size=40))
    assert report.coverage == 1 and lowbit.load(tmp_path / "q")(random_ids(1, 4)).logits.isfinite().all()


def test_half_precision_checkpoints_keep_their_dtype(tmp_path):
    path = tiny_llama(tmp_path / "model", dtype=torch.bfloat16)
    _quantize(path, tmp_path / "q", lowbit.recipe("awq", bits=4, group_size=32))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    tensors = {k: v for f in (tmp_path / "q").glob("*.safetensors") for k, v in load_file(f).items()}
    assert config["dtype"] == "bfloat16"
    assert tensors["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.self_attn.q_proj.scale"].dtype == torch.float16


def test_no_pickle_is_read_or_written(model, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    _quantize(model, tmp_path / "q", "gptq")
    lowbit.load(tmp_path / "q")
    assert not list((tmp_path / "q").glob("*.bin"))


def test_an_unknown_architecture_is_discovered_and_said_to_lack_transforms(tmp_path):
    config = AutoConfig.for_model(
        "stablelm",
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 48, (3, 16))
    report = lowbit.quantize(
        tmp_path / "model",
        lowbit.recipe("awq+gptq", bits=4, group_size=16, clip=False),
        ids,
        out=tmp_path / "q",
        max_kl=10,
    )
    assert report.coverage == 1.0
    assert any("no edge" in text or "transform" in text for text in report.warnings)


def test_a_model_in_memory_is_quantized_as_its_directory_is(tmp_path):
    directory = tiny_llama(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    for name, source in (("a", directory), ("b", model)):
        lowbit.quantize(source, "rtn", random_ids(2, 16), out=tmp_path / name)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    with pytest.raises(ValueError, match="a model of type int, expected a directory"):
        lowbit.quantize(3, "rtn", None, out=tmp_path / "c")


def test_weight_files_may_be_read_by_whoever_may_read_new_files(tmp_path):
    lowbit.quantize(tiny_llama(tmp_path / "model"), "rtn", None, out=tmp_path / "out")
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_run_without_text_is_measured_and_reloaded_on_drawn_tokens(tmp_path, monkeypatch):
    model = tiny_llama(tmp_path / "model")
    report = lowbit.quantize(model, "rtn", None, out=tmp_path / "out")
    assert report.kl is not None and report.measured_on == "2 windows of 64 tokens drawn from the vocabulary"
    assert "over the limit 1e-09" in lowbit.quantize(model, "rtn", None, out=tmp_path / "far", max_kl=1e-9).warnings[-1]
    monkeypatch.setattr("lowbit.pipeline.output_error", lambda a, b: 1.0)
    with pytest.raises(lowbit.BrokenModel, match="the reloaded checkpoint does not compute what was measured"):
        lowbit.quantize(model, "rtn", None, out=tmp_path / "wrong")


def test_drawn_tokens_refuse_a_model_for_nan_alone(model, tmp_path, monkeypatch):
    def measure(kl):
        monkeypatch.setattr("lowbit.guard.kl_and_agreement", lambda *_: (torch.tensor([kl]), torch.tensor([False])))

    measure(3.0)
    assert "is 3 nats a token" in lowbit.quantize(model, "rtn", None, out=tmp_path / "far").warnings[-1]
    measure(float("nan"))
    with pytest.raises(lowbit.BrokenModel, match="KL divergence from the original is nan"):
        lowbit.quantize(model, "rtn", None, out=tmp_path / "nan")


def test_a_checkpoint_that_nothing_was_measured_on_is_loaded_before_it_is_finished(model, tmp_path, monkeypatch):
    def cannot(walk):
        raise CannotStream("its blocks cannot run one at a time")

    def damaged(directory, **options):
        raise ValueError("it does not load")

    monkeypatch.setattr(Walk, "start", cannot)
    assert lowbit.quantize(model, "rtn", None, out=tmp_path / "q").measured_on == "nothing"
    monkeypatch.setattr("lowbit.checkpoints.native.load", damaged)
    with pytest.raises(ValueError, match="it does not load"):
        lowbit.quantize(model, "rtn", None, out=tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_results_are_measured_on_windows_of_the_text_that_no_step_saw(tmp_path):
    model = tiny_llama(tmp_path / "model")
    ids = random_ids(6, 16)
    held = Calibration(ids[:4], "a text", "0", held_out=ids[4:])
    recipe = lowbit.recipe("gptq").with_blockwise(compute="float32")  # else windows that are measured on are more exact
    report = lowbit.quantize(model, recipe, held, out=tmp_path / "held", max_kl=50)
    assert report.measured_on == "2 windows of 16 tokens of a text, held out from calibration"
    plain = lowbit.quantize(model, recipe, ids[:4], out=tmp_path / "plain", max_kl=50)
    assert "also used for calibration" in plain.measured_on and plain.kl != report.kl
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("held", "plain"))
    assert a == b


def test_long_text_is_measured_at_evenly_spaced_positions_and_the_report_says_which(tmp_path):
    model, ids = tiny_llama(tmp_path / "model"), random_ids(4, 1024)
    report = lowbit.quantize(model, lowbit.recipe("rtn", bits=3), ids, out=tmp_path / "out", max_kl=50)
    assert report.measured_on.startswith("every second token of 4 windows of 1024 tokens")
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    packed = lowbit.load(tmp_path / "out", torch.float32)
    with torch.no_grad():
        p, q = (each(input_ids=ids).logits.log_softmax(-1)[:, 1::2] for each in (original, packed))
    assert report.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)


def test_transformers_without_lowbit_refuses_a_checkpoint(tmp_path):
    """It passes over a quantization_config that it does not know, and would give every packed layer random weights."""
    lowbit.quantize(tiny_llama(tmp_path / "model"), "rtn", None, out=tmp_path / "out")
    code = (
        "import sys; sys.modules['lowbit'] = None\n"
        "from transformers import AutoModelForCausalLM as M\nM.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1 and "raising an error" in done.stderr


@pytest.mark.parametrize("name", ["gptq", "awq", "smoothquant", "squeezellm", "autoround"])
def test_experts_that_few_tokens_reached_are_counted_in_one_warning_for_each_kind(tmp_path, name):
    path, sizes = tmp_path / "model", {"num_local_experts": 8, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("mixtral", vocab_size=128, max_position_embeddings=64, **sizes, **widths)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    options = {"steps": 1} if name == "autoround" else {}
    report = lowbit.quantize(path, lowbit.recipe(name, **options), random_ids(1, 6), out=tmp_path / "out", max_kl=50)
    (unseen,) = [each for each in report.warnings if "saw no calibration token" in each]
    assert re.search(r"more \(of \d+ experts\): ", unseen)
    few = [each for each in report.warnings if FEW_TOKENS in each]
    assert len(few) == (name != "squeezellm")  # its Fisher information does not tell how many tokens gave it


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_the_settings_of_the_caller_change_nothing(model, tmp_path):
    learning = lowbit.recipe("omniquant", bits=4, epochs=1)

    def results(name):
        ids, w = random_ids(2, 8), torch.nn.Linear(16, 8, dtype=torch.float32)
        w.load_state_dict(
            {"weight": torch.linspace(-1, 1, 128, dtype=torch.float32).reshape(8, 16), "bias": torch.zeros(8)}
        )
        inputs = torch.sin(torch.arange(640.0, dtype=torch.float32)).reshape(40, 16)
        out, mode = tmp_path / name, (torch.get_default_dtype(), torch.is_inference_mode_enabled())
        found = [lowbit.quantize(model, each, ids, out=out / str(i)) for i, each in enumerate((learning, "squeezellm"))]
        linear = lowbit.quantize_linear(w, inputs, learning)
        loaded = lowbit.load(out / "0").state_dict()
        evaluation = lowbit.evaluate(out / "1", ids, seq_len=8, windows=2, against=model)
        assert mode == (torch.get_default_dtype(), torch.is_inference_mode_enabled())
        files = [sorted(p.read_bytes() for p in (out / i).glob("*.safetensors")) for i in "01"]
        kl = [report.kl for report in found]
        return files, kl, linear.dequantize().tolist(), loaded, evaluation.perplexity, evaluation.kl

    plain = results("plain")
    for name, mode in {
        "inference": torch.inference_mode(),
        "bfloat16": default_dtype(torch.bfloat16),
        "float64": default_dtype(torch.float64),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }.items():
        with mode:
            found = results(name)
        for one, other in zip(plain, found, strict=True):
            if isinstance(one, dict):
                assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
            else:
                assert one == other, name


def test_another_default_device_of_the_caller_changes_nothing(model, tmp_path):
    ids, learning = random_ids(2, 8), lowbit.recipe("omniquant", bits=4, epochs=1)
    lowbit.quantize(model, learning, ids, out=tmp_path / "plain")
    with torch.device("meta"):
        lowbit.quantize(model, learning, ids, out=tmp_path / "meta")
        loaded = lowbit.load(tmp_path / "meta").state_dict()
        assert torch.empty(1).is_meta
    plain = lowbit.load(tmp_path / "plain").state_dict()
    assert plain.keys() == loaded.keys() and all(torch.equal(plain[name], loaded[name]) for name in plain)


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("method", ["nf4", "squeezellm", "kv-int", "rptq"])
def test_a_loaded_model_computes_the_same_with_another_default_dtype(model, tmp_path, monkeypatch, method, kernels):
    lowbit.quantize(model, method, random_ids(2, 24), out=tmp_path / "q", allow_broken=True)
    monkeypatch.setenv("LOWBIT_KERNELS", kernels)

    def results():
        loaded = lowbit.load(tmp_path / "q")
        layer = loaded.get_submodule("model.layers.0.mlp.up_proj")
        x = torch.linspace(-1, 1, 20 * 64, dtype=torch.float32).view(20, 64).requires_grad_()
        layer(x).sum().backward()
        weight = layer.effective_weight() if isinstance(layer, QuantLinear) else layer.weight
        with torch.no_grad():
            whole = loaded(random_ids(1, 40)).logits
            written = loaded.generate(
                random_ids(1, 40), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None,
                output_logits=True, return_dict_in_generate=True,
            ).logits  # fmt: skip
            return whole, *written, x.grad, weight

    plain = results()
    for dtype in (torch.float64, torch.bfloat16):
        with default_dtype(dtype):
            found = results()
        for one, other in zip(plain, found, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), dtype


def test_more_stored_bits_than_asked_are_said_and_can_be_refused(model, tmp_path):
    tables = lowbit.recipe("squeezellm", bits=4)
    report = _quantize(model, tmp_path / "said", tables, random_ids(2, 8))
    (said,) = [each for each in report.warnings if "were asked" in each]
    assert f"{report.bits_per_weight:.2f} bits a weight are stored where 4 were asked" in said
    assert report.asked_bits == report.to_dict()["asked_bits"] == 4
    with pytest.raises(ValueError, match=r"stores .* bits a weight in this model, over the limit 5"):
        _quantize(model, tmp_path / "refused", tables, random_ids(2, 8), max_bits=5)
    assert not list(tmp_path.glob("refused*"))
    kept = lowbit.recipe("spqr", threshold=0.0)  # how many weights it keeps is not known before
    plain = lowbit.recipe("rtn", bits=4, group_size=32)
    assert not [each for each in _quantize(model, tmp_path / "plain", plain, max_bits=8).warnings if "asked" in each]
    with pytest.raises(lowbit.BrokenModel, match=r"bits a weight are stored, over the limit 16"):
        _quantize(model, tmp_path / "late", kept, random_ids(2, 8), max_bits=16)


def test_a_recipe_that_skips_everything_is_refused_before_any_work(tmp_path):
    recipe = lowbit.recipe("rtn", bits=4, group_size=32).with_overrides([{"match": "*", "skip": True}])
    with pytest.raises(ValueError, match="quantizes no linear of this model"):
        lowbit.quantize(tiny_llama(tmp_path / "model"), recipe, None, out=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
