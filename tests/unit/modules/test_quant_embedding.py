"""Packed embeddings and heads: looked up and multiplied from one table, stored once, and kept only where they cost little."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit import decoding
from lowbit.checkpoints.shards import read_headers
from lowbit.job import prepare
from lowbit.kernels import decode_packed, ops
from lowbit.modules import QuantEmbedding, QuantLinear, restore
from lowbit.numerics import Int, MinMax, PerChannel, PerGroup, Spec, quantize
from lowbit.pipeline import run
from lowbit.plan import outside as outsides
from lowbit.plan import plan
from lowbit.recipes import as_recipe

from helpers import random_ids, sqnr_db

IDS = random_ids(4, 32)


def table(bits=8, rows=50, width=24, **options) -> QuantEmbedding:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    spec = Spec(Int(bits, symmetric=True), PerChannel(), scale_dtype="float32")
    return QuantEmbedding.from_qtensor(quantize(weight, spec, MinMax()), **options)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=request.param,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() == 2 else 1)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def recipe(**bits):
    return as_recipe("rtn").with_overrides([{"match": match, "bits": width} for match, width in bits.items()])


@pytest.mark.parametrize("bits", [1, 3, 4, 6, 8])
@torch.no_grad()
def test_rows_are_those_of_the_decoded_table_and_the_head_multiplies_by_it(bits):
    embedding = table(bits, factor=3.0 if bits == 8 else 1.0)
    ids = torch.tensor([[3, 0, 49], [7, 7, 1]])
    assert torch.equal(embedding(ids), embedding.weight[ids] * embedding.factor)
    head, x = embedding.head(), torch.randn(5, 24)
    assert sqnr_db(x @ embedding.weight.T, head(x)) > 100
    assert not head.state_dict() and set(embedding.state_dict()) == {"codes", "scale"}
    assert embedding.half()(ids).dtype == torch.float16 and embedding.scale.dtype == torch.float32
    with pytest.raises(IndexError):
        embedding(torch.tensor([50]))


def test_the_reference_decodes_a_vocabulary_in_parts_and_its_gradient_is_that_of_the_whole(monkeypatch):
    head = table(4, rows=30_011, width=512).head()
    assert head.tiles is None
    weight, shapes = head.dequantize(), []

    def decode(tensors, spec, shape):
        shapes.append(shape)
        return decode_packed(tensors, spec, shape)

    monkeypatch.setattr(ops, "decode_packed", decode)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1), requires_grad=True)
    g = torch.randn(3, 30_011, generator=torch.Generator().manual_seed(2))
    y = head(x)
    y.backward(g)
    assert sum(rows for rows, _ in shapes) == 2 * 30_011 and max(rows * columns for rows, columns in shapes) == 2**22
    with torch.no_grad():
        assert torch.equal(head(x), y)
    assert sqnr_db(x.detach().double() @ weight.T.double(), y.detach()) > 120
    assert x.grad is not None and sqnr_db(g.double() @ weight.double(), x.grad) > 120


def test_a_restored_head_has_the_codes_of_its_embedding_not_a_copy(model, tmp_path):
    lowbit.quantize(model, recipe(embedding=8, head=8), IDS, out=tmp_path / "q")
    loaded = lowbit.load(tmp_path / "q")
    codes = loaded.model.embed_tokens.codes
    restore(loaded)
    assert loaded.lm_head.tiles is None and torch.equal(loaded.lm_head.codes, codes) == loaded.lm_head.is_tied
    assert (loaded.lm_head.codes.data_ptr() == codes.data_ptr()) == loaded.config.tie_word_embeddings


def test_rows_that_share_parameters_are_refused():
    weight = torch.randn(8, 32)
    with pytest.raises(ValueError, match="parameters for each row; its zero are"):
        QuantEmbedding.from_qtensor(quantize(weight, Spec(Int(4), PerGroup(16)), MinMax()))


@torch.no_grad()
def test_a_model_with_a_packed_embedding_and_head_stores_them_once_and_runs_them(model, tmp_path):
    report = lowbit.quantize(model, recipe(embedding=8, head=8), IDS, out=tmp_path / "q")
    assert report.outside_cost is not None and abs(report.outside_cost) < 1e-3
    loaded, plain = lowbit.load(tmp_path / "q"), lowbit.load(model)
    assert isinstance(loaded.model.embed_tokens, QuantEmbedding) and isinstance(loaded.lm_head, QuantLinear)
    assert sqnr_db(plain.lm_head.weight, loaded.lm_head.weight) > 35
    assert plan(model, recipe(embedding=8, head=8)).bits_per_weight == pytest.approx(report.bits_per_weight)
    measured = lowbit.evaluate(loaded, IDS, seq_len=IDS.shape[1], windows=1)
    assert measured.bits_per_weight == pytest.approx(report.bits_per_weight)  # the linears' alone, without the head's
    names = read_headers(tmp_path / "q")
    assert any(name.startswith("lm_head") for name in names) != plain.config.tie_word_embeddings
    expected = loaded(IDS).logits
    loaded.generate(IDS[:1, :5], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert "So far: 3 tokens by it" in decoding.explain(loaded)
    loaded.save_pretrained(tmp_path / "again")
    lowbit.export(tmp_path / "q", "native", out=tmp_path / "copy")
    for directory in ("again", "copy"):
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / directory)(IDS).logits, expected)
    assert sum(file.stat().st_size for file in (tmp_path / "q").glob("*.safetensors")) == report.bytes
    rows = {layer.name: layer for layer in plan(model, recipe(embedding=8, head=8)).layers}
    assert 8 < rows["model.embed_tokens"].bits_per_weight < 9


def test_the_head_alone_is_packed_where_it_has_a_weight_of_its_own(model, tmp_path):
    lowbit.quantize(model, recipe(head=6), IDS, out=tmp_path / "q")
    loaded = lowbit.load(tmp_path / "q")
    tied = loaded.config.tie_word_embeddings
    assert isinstance(loaded.lm_head, QuantLinear) and loaded.lm_head.spec.grid == Int(6, symmetric=True)
    assert isinstance(loaded.model.embed_tokens, QuantEmbedding if tied else nn.Embedding)
    if tied:
        with pytest.raises(ValueError, match="both have one format; give embedding or head"):
            plan(model, recipe(embedding=8, head=6))


def test_narrow_weights_bring_a_packed_embedding_where_it_costs_little(model, tmp_path, monkeypatch):
    assert as_recipe("rtn").scheme.chosen_outside.limit == 1e-3
    assert lowbit.recipe("rtn", bits=5).scheme.chosen_outside.embedding is None
    lowbit.quantize(model, "rtn", IDS, out=tmp_path / "small")
    assert not any(isinstance(m, QuantEmbedding) for m in lowbit.load(tmp_path / "small").modules())
    monkeypatch.setattr(outsides, "LEAST_WEIGHTS", 1000)
    lowbit.quantize(model, "rtn", IDS, out=tmp_path / "packed")
    assert any(isinstance(m, QuantEmbedding) for m in lowbit.load(tmp_path / "packed").modules())
    monkeypatch.setattr("lowbit.stages.rest.Rest._cost", lambda rest: 0.01)
    report = lowbit.quantize(model, "rtn", IDS, out=tmp_path / "dear")
    assert report.outside_cost is None and "would cost 0.01 nats a token, over 0.001" in report.warnings[-1]
    assert not any(isinstance(m, QuantEmbedding) for m in lowbit.load(tmp_path / "dear").modules())


def test_overrides_of_embedding_and_head_take_bits_or_skip():
    assert as_recipe("rtn").with_overrides([{"match": "head", "skip": True}]).scheme.chosen_outside.embedding is None
    for entry in ({"match": "head"}, {"match": "embedding", "bits": 8, "group_size": 32}):
        with pytest.raises(ValueError, match="bits or skip are expected"):
            as_recipe("rtn").with_overrides([entry])


@pytest.mark.parametrize("match", ["embedding", "head"])
def test_bits_that_an_embedding_or_a_head_cannot_have_are_refused_by_name(match):
    for bits in (0, 9, 15):
        with pytest.raises(ValueError, match=f"the {match} has 1 to 8 bits, or 16 to stay as it is; found {bits}"):
            as_recipe("rtn").with_overrides([{"match": match, "bits": bits}])
    assert getattr(as_recipe("rtn").with_overrides([{"match": match, "bits": 16}]).scheme.chosen_outside, match) is None


def test_a_result_larger_than_its_source_names_only_what_is_not_packed(model, tmp_path):
    for name, bits in (("plain", {}), ("packed", {"embedding": 8, "head": 8})):
        job = prepare(model, recipe(**bits), IDS, out=tmp_path / name)
        job.source_bytes = 1
        report = run(job, ram_limit=2**30, max_kl=50, allow_broken=False, restart=False)
        (warning,) = [text for text in report.warnings if "more than the original's" in text]
        assert warning.endswith("the original may be quantized already")
        assert ("the embedding and the head stay in float32" in warning) == (name == "plain")
