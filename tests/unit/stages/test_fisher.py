"""Fisher information: the streaming pass against autograd on the whole model, and what transforms and kills do to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import lowbit
from lowbit.architectures import Kind, block_modules, for_config, resolve
from lowbit.modules import LinearFormat
from lowbit.numerics import Codebook, Fisher, Int, KMeans, PerChannel, PerGroup, Spec, Statistic, serializable
from lowbit.plan import explain, plan
from lowbit.plan.model_plan import plan_model
from lowbit.recipes import Recipe
from lowbit.scheme import linears
from lowbit.solve import Gptq, Nearest, Solution
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Journal
from lowbit.steps import BlockState, Incoherence, Midpoint, Set, Shifts, Smooth, Solve, precision
from lowbit.steps.learn import Learn
from lowbit.transforms import Permute, Rotate, Scale

from helpers import VOCABULARY, assert_same, held, random_ids, sqnr_db, tiny_llama

SPEC = Spec(Int(8), PerGroup(32))


@serializable
@dataclass(frozen=True)
class DropInsensitive(Nearest):
    """Rounds what is more sensitive than the median; the rest becomes 0. Needs Fisher information, and shows it."""

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Fisher()})

    def solve(self, w_OI: Tensor, spec: Spec, stats: Mapping[Statistic, Tensor], clip=None) -> Solution:
        return super().solve(w_OI * (stats[Fisher()] >= stats[Fisher()].median()), spec, stats, clip)


def recipe_of(*steps, name="sensitive") -> Recipe:
    return Recipe.blockwise(name=name, scheme=linears(SPEC), steps=(*steps, Solve(DropInsensitive())))


def tiny_gpt2(path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and ".h." in name:
                p.mul_(10)
    model.save_pretrained(path)
    return path


def tiny_mixtral(path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=24,  # more than the few tokens of a test choose
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gate.weight"):
                p.mul_(20)
    model.save_pretrained(path)
    return path


MODELS = {"llama": lambda path: tiny_llama(path, blocks=3), "gpt2": tiny_gpt2, "mixtral": tiny_mixtral}


def whole(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Squared gradients of every parameter, summed over windows, by plain autograd on the whole model."""
    squares: dict[str, Tensor] = {}
    for window in ids:
        model.zero_grad()
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        cross_entropy(logits[:-1], window[1:]).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            squares[name] = squares.get(name, 0) + p.grad.square()
    return squares


def wanted_of(full: dict[str, Tensor], block: nn.Module, name: str, path: str) -> Tensor:
    """Of the squares of a model with fused experts, those of one linear of the unfused ``block``."""
    key = f"{name}.{path}.weight"
    if key in full:
        return full[key].T if isinstance(block.get_submodule(path), Conv1D) else full[key]
    experts, number, leaf = path.rsplit(".", 2)
    if leaf == "down_proj":
        return full[f"{name}.{experts}.down_proj"][int(number)]
    gate, up = full[f"{name}.{experts}.gate_up_proj"][int(number)].chunk(2)
    return {"gate_proj": gate, "up_proj": up}[leaf]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ram_limit", [2**32, 0], ids=["memory", "files"])
def test_streaming_equals_per_sample_autograd_on_the_whole_model(tmp_path, model, ram_limit, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    path, ids = MODELS[model](tmp_path / "model"), random_ids(3, 10)
    journal = Journal(tmp_path / "out", {})
    journal.open()
    walk = Walk(plan_model(path, recipe_of()), ids, journal, ram_limit=ram_limit)
    held: list[int] = []
    walk.progress = lambda *_: held.append(sum(not next(b.parameters()).is_meta for b in walk.blocks))
    calls = walk.start()
    before = walk.store["fp"].clone()
    walk.find_sensitivities(calls)
    assert set(held) == {0, 1}, "more than one block of weights at a time"
    assert_same(walk.store["fp"], before)
    assert set(walk.store._live) == {"fp", "quant", "next"}, "the pass leaves activations behind"
    assert all(p.is_meta for p in walk.blocks.parameters()), "the pass leaves weights behind"
    assert walk.fisher is not None
    full = whole(AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager"), ids)
    untouched = 0
    for i, block in enumerate(walk.blocks):
        name, found = f"{walk.architecture.blocks}.{i}", walk.fisher.load(i)
        assert set(found) == set(resolve(walk.architecture, block, walk.source.config).linears)
        for linear, f_OI in found.items():
            wanted = wanted_of(full, block, name, linear)
            assert f_OI.shape == wanted.shape and f_OI.dtype == torch.float32
            torch.testing.assert_close(f_OI, wanted, rtol=1e-3, atol=1e-6 * float(wanted.max()))
            untouched += not f_OI.any()
    assert (untouched > 0) == (model == "mixtral"), "exactly the experts without tokens have none"


@pytest.mark.parametrize("model", ["llama", "gpt2"])  # in a mixture a rounded router sends a token elsewhere
def test_where_products_are_in_bfloat16_the_information_is_nearly_the_same_and_in_float32(tmp_path, model, monkeypatch):
    path, ids = MODELS[model](tmp_path / "model"), random_ids(3, 10)
    found = []
    for fast in (False, True):
        monkeypatch.setattr(precision, "has_bfloat16", lambda device, fast=fast: fast)
        journal = Journal(tmp_path / f"out {fast}", {})
        journal.open()
        walk = Walk(plan_model(path, recipe_of()), ids, journal)
        walk.find_sensitivities(walk.start())
        assert walk.fisher is not None
        found.append([walk.fisher.load(i) for i in range(walk.total)])
    for exact, rounded in zip(*found, strict=True):
        for linear, f_OI in exact.items():
            assert rounded[linear].dtype == torch.float32
            assert not torch.equal(rounded[linear], f_OI), "nothing was rounded"
            assert sqnr_db(f_OI, rounded[linear]) > 12, linear


def test_the_square_of_a_sum_is_something_else(tmp_path):
    model, ids = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model")), random_ids(4, 10)
    each = whole(model, ids)["model.layers.0.mlp.up_proj.weight"]
    model.zero_grad()
    logits = model(input_ids=ids).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    together = (4 * model.model.layers[0].mlp.up_proj.weight.grad).square()
    assert (together / each).log().abs().mean() > 0.5


def _state_of_block_one(path, ids) -> tuple[nn.Module, BlockState]:
    """A whole model in float64 and the state of its block 1 with Fisher information."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    architecture = for_config(model.config)
    block = block_modules(model, architecture)[1]
    resolved, name = resolve(architecture, block, model.config), f"{architecture.blocks}.1"
    formats = {linear: LinearFormat(SPEC) for linear in resolved.linears}
    full = whole(model, ids)
    fisher = {linear: wanted_of(full, block, name, linear) for linear in formats}
    return model, BlockState.of(name, block, resolved, formats, fisher=fisher, store_dtype=torch.float64)


@pytest.mark.parametrize("kind", [Kind.SCALE, Kind.PERMUTE])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_what_a_commit_makes_of_it_is_what_the_transformed_model_has(tmp_path, model, kind):
    ids = random_ids(2, 10)
    model, state = _state_of_block_one(MODELS[model](tmp_path / "model"), ids)
    before, generator = held(state, "fisher"), torch.Generator().manual_seed(3)
    edges = list(state.edges(["*"], kind))
    for edge in edges:
        if kind is Kind.SCALE:
            s = torch.exp(torch.randn(edge.channels, generator=generator, dtype=torch.float64))
            sign = torch.randn(edge.channels, generator=generator, dtype=torch.float64).sign()
            transform = Scale(s if edge.positive else s * sign)
        else:
            run = edge.within or edge.channels
            index = [torch.randperm(run, generator=generator) + k for k in range(0, edge.channels, run)]
            transform = Permute(torch.cat(index))
        with torch.no_grad():
            state.commit(edge, transform, kind)
    after = whole(model, ids)
    changed = 0
    for path, f_OI in held(state, "fisher").items():
        wanted = wanted_of(after, state.block, state.name, path)
        torch.testing.assert_close(f_OI, wanted, rtol=1e-6, atol=1e-12 * float(wanted.max()))
        changed += not torch.allclose(f_OI, before[path])
    assert len(edges) >= 2 and changed >= 2


def test_a_transform_that_leaves_no_diagonal_is_refused_before_any_work_and_at_commit(tmp_path):
    for step in (Set(Midpoint(), ("norm_*",)), Learn((Shifts(("norm_*",)),)), Incoherence()):
        with pytest.raises(ValueError, match=rf"Fisher information.*{type(step).__name__}"):
            recipe_of(step)
    assert recipe_of(Set(Smooth(0.5), ("norm_*",))).needs_fisher
    _, state = _state_of_block_one(tiny_llama(tmp_path / "model"), random_ids(1, 6))
    edge = next(state.edges(["v_o"], Kind.ROTATE))
    with pytest.raises(ValueError, match=r"v_o.*behind a Rotate"):
        state.commit(edge, Rotate(torch.eye(edge.within or edge.channels, dtype=torch.float64)), Kind.ROTATE)


def test_a_solver_of_tables_falls_back_to_tables_where_no_token_came(tmp_path):
    recipe = Recipe.blockwise(
        name="tables",
        scheme=linears(Spec(Codebook(4), PerChannel())),
        steps=(Solve(Gptq(fit=KMeans(), order="none")),),
    )
    path = tiny_mixtral(tmp_path / "model")
    report = lowbit.quantize(path, recipe, random_ids(3, 10), out=tmp_path / "out", max_kl=50)
    assert any("no calibration token" in note for layer in report.layers for note in layer.notes)


class _Killed(Exception):
    pass


def _bytes(directory) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_run_stopped_anywhere_keeps_what_it_had_and_ends_in_the_same_bytes(tmp_path):
    path, ids, recipe = tiny_llama(tmp_path / "model", blocks=3), random_ids(3, 12), recipe_of()
    ticks: list[str] = []
    lowbit.quantize(
        path, recipe, ids, out=tmp_path / "whole", max_kl=50, progress=lambda d, t, what: ticks.append(what)
    )
    wanted = _bytes(tmp_path / "whole")
    assert not any("fisher" in name for name in wanted)
    backward = [n for n, what in enumerate(ticks, 1) if "backward, block 2" in what]
    solving = [n for n, what in enumerate(ticks, 1) if "block 2 of 3: solving" in what]
    count = 0

    def stop_at(point: int):
        def progress(done, total, what):
            nonlocal count
            count += 1
            if count == point:
                raise _Killed

        return progress

    partial = tmp_path / "killed.partial"
    with pytest.raises(_Killed):
        lowbit.quantize(path, recipe, ids, out=tmp_path / "killed", max_kl=50, progress=stop_at(backward[1]))
    kept = load_file(partial / "fisher-00002.safetensors")
    assert sorted(p.name for p in partial.glob("fisher*")) == ["fisher-00002.safetensors"]
    count, again = 0, []
    with pytest.raises(_Killed):
        lowbit.quantize(path, recipe, ids, out=tmp_path / "killed", max_kl=50, progress=stop_at(solving[0]))
    assert len(list(partial.glob("fisher*"))) == 3 and len(list(partial.glob("stage-1-*"))) == 1
    for name, value in load_file(partial / "fisher-00002.safetensors").items():
        assert_same(value, kept[name])
    lowbit.quantize(
        path, recipe, ids, out=tmp_path / "killed", max_kl=50, progress=lambda d, t, what: again.append(what)
    )
    assert not any("sensitivities" in what for what in again), "what is there was made again"
    assert _bytes(tmp_path / "killed") == wanted


def test_only_recipes_that_need_it_pay_for_it(tmp_path):
    ticks: list[str] = []
    path = tiny_llama(tmp_path / "model")
    lowbit.quantize(
        path, "gptq", random_ids(2, 16), out=tmp_path / "out", max_kl=50, progress=lambda *x: ticks.append(x[2])
    )
    assert ticks and not any("sensitivities" in what for what in ticks)


def test_a_scale_that_nothing_absorbs_reaches_the_solver_folded():
    torch.manual_seed(0)
    linear, fisher, inputs = nn.Linear(64, 16), torch.rand(16, 64), torch.randn(100, 64) * torch.rand(64).exp2()
    q = lowbit.quantize_linear(linear, inputs, recipe_of(Set(Smooth(0.5), ("*",))), fisher=fisher)
    (scale,) = q.pre
    assert isinstance(scale, Scale) and scale.s.std() > 0.1
    folded = fisher / scale.s**2
    assert (q.dequantize()[folded < 0.99 * folded.median()] == 0).all()
    assert (q.dequantize()[folded > 1.01 * folded.median()] != 0).float().mean() > 0.95


def test_a_lone_linear_takes_the_information_that_its_recipe_needs_and_no_other():
    torch.manual_seed(0)
    linear, fisher = nn.Linear(64, 16), torch.rand(16, 64)
    q = lowbit.quantize_linear(linear, None, recipe_of(), fisher=fisher)
    dropped = fisher < fisher.median()
    assert (q.dequantize()[dropped] == 0).all() and (q.dequantize()[~dropped] != 0).float().mean() > 0.95
    with pytest.raises(ValueError, match=r"needs Fisher information; pass fisher=\[16, 64\]"):
        lowbit.quantize_linear(linear, None, recipe_of())
    with pytest.raises(ValueError, match="no use for Fisher"):
        lowbit.quantize_linear(linear, None, "rtn", fisher=fisher)
    with pytest.raises(ValueError, match=r"found \[64, 16\]"):
        lowbit.quantize_linear(linear, None, recipe_of(), fisher=fisher.T)
    with pytest.raises(ValueError, match="negative"):
        lowbit.quantize_linear(linear, None, recipe_of(), fisher=-fisher)


def test_a_plan_counts_the_pass_and_an_explanation_says_it(tmp_path):
    path = tiny_llama(tmp_path / "model", blocks=3)
    plain, needs = (plan(path, recipe, samples=4, seq_len=16, ram_limit=0) for recipe in ("rtn", recipe_of()))
    assert "gradients" in needs.peak_ram_parts and "gradients" not in plain.peak_ram_parts
    weights = sum(layer.shape[0] * layer.shape[1] for layer in needs.layers if not layer.reason)
    boundaries = 3 * 4 * 16 * 64 * 4  # of three blocks, windows, tokens, width, bytes
    assert needs.peak_disk_bytes - plain.peak_disk_bytes == boundaries + 4 * weights
    assert any("Fisher" in sentence for sentence in explain(recipe_of(), path).steps)
    assert not any("Fisher" in sentence for sentence in explain("rtn", path).steps)
