"""Adapters of peft on packed models: LoRA beside packed layers, its gradients, its files, and what merging it does."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import transformers
from torch import Tensor, nn

import lowbit
from lowbit.adapters import merged_layer
from lowbit.kernels.activation import fake_quantize_activation
from lowbit.modules import QuantLinear, restore

from helpers import assert_same, random_ids, tiny_llama, tiny_writer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # of transformers, for what peft calls
    "ignore:merging rounds an adapter",
)

LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
RECIPES = {
    "nf4, double quantization": lambda: lowbit.recipe("nf4", double_quant=True),
    "integers, groups": lambda: lowbit.recipe("gptq", bits=4, group_size=32),
    "rotations at run time": lambda: lowbit.recipe("quip", bits=4),
    "kept columns": lambda: lowbit.recipe("owq", bits=4),
    "sparse outliers": lambda: lowbit.recipe("spqr", bits=3),
    "tables": lambda: lowbit.recipe("squeezellm", bits=4),
    "binary codes": lambda: lowbit.recipe("lut-gemm", bits=3),
    "integers of weights and inputs": lambda: lowbit.recipe("smoothquant+rtn", bits=8, activation_bits=8),
}


def packed(name: str, inputs: int = 64, outputs: int = 48) -> QuantLinear:
    torch.manual_seed(1)
    linear, x = nn.Linear(inputs, outputs).requires_grad_(False), torch.randn(256, inputs)
    recipe = RECIPES[name]()
    fisher = torch.rand(outputs, inputs) if recipe.needs_fisher else None
    layer = lowbit.quantize_linear(linear, x, recipe, fisher)
    layer.prepare()
    return layer


class One(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.ones(()))  # peft asks the parameters for the device

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layer(x).tanh()


def adapted(layer: nn.Module, *, bias: str = "none") -> nn.Module:
    """LoRA beside a layer, whose second matrix is not zero."""
    model = peft.get_peft_model(One(layer), peft.LoraConfig(target_modules=["layer"], r=4, lora_alpha=8, bias=bias))
    fill(model)
    return model


def fill(model: nn.Module, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def dequantized(layer: QuantLinear, x: Tensor) -> Tensor:
    """What a packed layer stands for, by plain torch: its inputs quantized with straight-through gradients."""
    weight, bias = layer.qtensor().dequantize().to(x.dtype), layer.bias
    for transform in layer.pre:
        x = transform.forward(x)
    fake = (
        x if layer.act is None else fake_quantize_activation(x, layer.act.spec, layer.act_params, layer.act.threshold)
    )
    y = fake @ weight.T
    for term in layer.side_terms:
        y = y + x @ term.dense((48, 64)).to(x.dtype).T
    for transform in layer.post:
        y = transform.forward(y)
    return y if bias is None else y + bias.to(x.dtype)


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of a sum of the outputs with weights that differ."""
    return list(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), leaves))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_those_of_the_dequantized_base(name, dtype):
    layer = packed(name)
    if dtype == torch.float64:
        layer.restore()  # compiled products compute in float32
    model = adapted(layer).to(dtype)
    lora = model.base_model.model.layer
    assert type(lora).__name__ == "PackedLora" and lora.get_base_layer() is layer
    x = torch.randn(5, 64, dtype=dtype, generator=torch.Generator().manual_seed(2)).requires_grad_()
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    ours = gradients(model(x), [x, a, b])
    theirs = gradients((dequantized(layer, x) + 2 * (x @ a.T) @ b.T).tanh(), [x, a, b])
    limit = 1e-9 if dtype == torch.float64 else 2e-4
    for one, two in zip(ours, theirs, strict=True):
        assert one.any()
        assert (one - two).abs().max() <= limit * two.abs().max()


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("name", ["nf4, double quantization", "integers of weights and inputs"])
def test_no_decoded_weight_is_kept_for_the_backward_pass(name, restored):
    layer = packed(name)
    if restored:
        layer.restore()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() if t.is_floating_point() else 0) or t, lambda t: t
    ):
        layer(torch.randn(3, 64, requires_grad=True))
    assert max(kept, default=0) < 64 * 48


def test_only_the_adapter_is_trained_and_it_learns(tmp_path):
    lowbit.quantize(tiny_llama(tmp_path / "model"), "nf4", None, out=tmp_path / "q")
    model = peft.get_peft_model(
        lowbit.load(tmp_path / "q", torch.float32), peft.LoraConfig(target_modules=LINEARS, r=4)
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    assert sum(type(m).__name__ == "PackedLora" for m in model.modules()) == 14
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ids, optimizer = random_ids(4, 24), torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    lowbit.quantize(tiny_llama(place / "model"), "nf4", None, out=place / "q")
    return place / "q"


def test_putting_an_adapter_beside_a_layer_decodes_no_weight(quantized, monkeypatch):
    def decoded(self):
        raise AssertionError("a weight was decoded")

    base = lowbit.load(quantized, torch.float32)
    monkeypatch.setattr(QuantLinear, "weight", property(decoded))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=LINEARS))
    packed = sum(isinstance(module, QuantLinear) for module in base.modules())
    assert packed and sum(name.endswith("lora_A.default") for name, _ in model.named_modules()) == packed


@pytest.fixture(scope="module")
def adapter(quantized):
    """An adapter of packed layers in peft's own files, and the logits of the model that saved it."""
    model = peft.get_peft_model(
        lowbit.load(quantized, torch.float32), peft.LoraConfig(target_modules=["q_proj", "down_proj"])
    )
    fill(model, 0.1)
    model.save_pretrained(quantized.parent / "adapter")
    with torch.no_grad():
        return quantized.parent / "adapter", model.eval()(input_ids=random_ids(2, 9)).logits


def test_an_adapter_is_saved_in_pefts_own_files_and_loaded_beside_packed_weights(quantized, adapter):
    place, logits = adapter
    assert sorted(file.name for file in place.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (place / "adapter_model.safetensors").stat().st_size < 40_000  # no base weight in it
    base = lowbit.load(quantized, torch.float32)
    fast = {name for name, layer in base.named_modules() if isinstance(layer, QuantLinear) and layer.tiles is not None}
    loaded = peft.PeftModel.from_pretrained(base, place)
    assert fast == {
        name.removesuffix(".base_layer")
        for name, layer in loaded.get_base_model().named_modules()
        if isinstance(layer, QuantLinear) and layer.tiles is not None
    }
    with torch.no_grad():
        assert_same(loaded(input_ids=random_ids(2, 9)).logits, logits)
        with loaded.disable_adapter():
            plain = loaded(input_ids=random_ids(2, 9)).logits
        assert_same(plain, lowbit.load(quantized, torch.float32)(input_ids=random_ids(2, 9)).logits)
        assert not torch.allclose(plain, logits)
    ids = random_ids(1, 6)
    slow = ids
    with torch.no_grad():
        for _ in range(5):
            slow = torch.cat([slow, loaded(input_ids=slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(loaded.generate(input_ids=ids, max_new_tokens=5, do_sample=False), slow)


def test_an_adapter_among_a_models_own_files_is_refused_with_what_to_do(quantized, adapter, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(quantized, both)
    shutil.copyfile(adapter[0] / "adapter_config.json", both / "adapter_config.json")
    with pytest.raises(
        ValueError, match=r"lowbit merge-adapter .* PeftModel.from_pretrained\(lowbit.load\(DIR\), ADAPTER\)"
    ):
        lowbit.load(both)


# Merging


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_added_changes_no_bit_and_what_is_added_is_in_the_weight(name):
    layer = packed(name)
    same = merged_layer(layer, torch.zeros(48, 64))
    assert same.state_dict().keys() == layer.state_dict().keys()
    for key, value in layer.state_dict().items():
        assert_same(same.state_dict()[key], value)
    delta = torch.randn(48, 4) @ torch.randn(4, 64) * 0.05
    merged = merged_layer(layer, delta)
    wanted, found = layer.effective_weight() + delta, merged.effective_weight()
    lost = (found - wanted).norm() / delta.norm()
    assert merged.description == layer.description and lost < 0.6, lost
    assert (layer.effective_weight() - wanted).norm() > (found - wanted).norm()


def test_merging_and_unmerging_gives_the_former_bits(quantized, adapter):
    model = peft.PeftModel.from_pretrained(lowbit.load(quantized, torch.float32), adapter[0])
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=random_ids(2, 9)).logits, adapter[1])
    model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    with torch.no_grad():
        assert_same(model(input_ids=random_ids(2, 9)).logits, adapter[1])


def test_a_merged_model_is_a_packed_checkpoint_and_the_loss_is_measured(tmp_path):
    place = tiny_writer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 97 + 8}" for i in range(0, 6000, 7)))
    lowbit.quantize(place, lowbit.recipe("rtn", bits=8, group_size=32), None, out=tmp_path / "q")
    model = peft.get_peft_model(lowbit.load(tmp_path / "q"), peft.LoraConfig(target_modules=["up_proj", "v_proj"]))
    fill(model, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    asked = {"text": str(tmp_path / "text.txt"), "samples": 3, "seq_len": 20}
    report = lowbit.merge_adapter(tmp_path / "q", tmp_path / "adapter", tmp_path / "merged", **asked)
    assert 0 < report.kl < report.adapter_kl / 2 and report.warnings == () and report.layers == 4
    merged = lowbit.load(tmp_path / "merged")
    assert not any("lora" in name for name, _ in merged.named_modules())
    with torch.no_grad():
        near = (merged(input_ids=random_ids(2, 9)).logits - model.eval()(input_ids=random_ids(2, 9)).logits).norm()
        far = (
            lowbit.load(tmp_path / "q")(input_ids=random_ids(2, 9)).logits - model(input_ids=random_ids(2, 9)).logits
        ).norm()
    assert near < far / 4
    with pytest.raises(ValueError, match="exists and is not empty"):
        lowbit.merge_adapter(tmp_path / "q", tmp_path / "adapter", tmp_path / "merged", **asked)
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        lowbit.merge_adapter(tmp_path / "q", tmp_path / "q", tmp_path / "m2", **asked)


def test_a_packed_head_that_is_the_embedding_too_stays_tied_in_a_merged_model(tmp_path):
    """peft compares the buffers of the two, which differ where both are packed."""
    place = tiny_writer(tmp_path / "model", tie_word_embeddings=True)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 97 + 8}" for i in range(3000)))
    recipe = lowbit.recipe("rtn", bits=8, group_size=32).with_overrides([{"match": "embedding", "bits": 8}])
    lowbit.quantize(place, recipe, None, out=tmp_path / "q")
    model = peft.get_peft_model(lowbit.load(tmp_path / "q"), peft.LoraConfig(target_modules=["up_proj"]))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    asked = {"text": str(tmp_path / "text.txt"), "samples": 2, "seq_len": 20}
    lowbit.merge_adapter(tmp_path / "q", tmp_path / "adapter", tmp_path / "merged", **asked)
    assert lowbit.load(tmp_path / "merged").config.tie_word_embeddings


@pytest.mark.parametrize("change", [{"skip": True}, {"bits": 8}])
@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Model with `tie_word_embeddings=True`"
)
def test_an_adapter_of_a_head_that_is_the_embedding_too_is_not_merged(tmp_path, change):
    place = tiny_writer(tmp_path / "model", tie_word_embeddings=True)
    recipe = lowbit.recipe("rtn", bits=8, group_size=32).with_overrides([{"match": "embedding", **change}])
    lowbit.quantize(place, recipe, None, out=tmp_path / "q")
    base = lowbit.load(tmp_path / "q")
    assert isinstance(base.lm_head, QuantLinear) == ("bits" in change)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lm_head"]))
    fill(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 97 + 8}" for i in range(3000)))
    asked = {"text": str(tmp_path / "text.txt"), "samples": 2, "seq_len": 20}
    with pytest.raises(ValueError, match="a head that is the embedding too"):
        lowbit.merge_adapter(tmp_path / "q", tmp_path / "adapter", tmp_path / "merged", **asked)
    assert not (tmp_path / "merged").exists()


# What is refused


@pytest.mark.parametrize("kind", ["OFTConfig", "LoHaConfig"])
def test_other_adapters_of_packed_layers_are_refused_with_the_name_of_their_class(quantized, kind):
    with pytest.raises((ValueError, TypeError), match=r"QuantLinear.* (is|are)? ?not supported"):
        peft.get_peft_model(lowbit.load(quantized), getattr(peft, kind)(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base weight, which is packed here"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base weight"),
    ],
)
def test_what_computes_with_or_changes_the_base_weight_is_refused(quantized, options, words):
    with pytest.raises(ValueError, match=words):
        peft.get_peft_model(lowbit.load(quantized), peft.LoraConfig(target_modules=["q_proj"], **options))


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`")
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_whole_copies_of_packed_layers_are_refused(tmp_path, name):
    tiny_llama(tmp_path / "model")
    recipe = lowbit.recipe("rtn", bits=8, group_size=32)
    outside = [{"match": "head", "bits": 8}, {"match": "embedding", "bits": 8}]
    lowbit.quantize(tmp_path / "model", recipe.with_overrides(outside), None, out=tmp_path / "packed")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[name])
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    peft.get_peft_model(original, config).save_pretrained(tmp_path / "adapter")
    words = f"modules_to_save names '{name}', and .*{name} is packed"
    with pytest.raises(ValueError, match=words):
        peft.get_peft_model(lowbit.load(tmp_path / "packed"), config)
    with pytest.raises(ValueError, match=words):
        peft.PeftModel.from_pretrained(lowbit.load(tmp_path / "packed"), tmp_path / "adapter")


def test_a_bias_of_an_adapter_stays_beside_the_layer():
    layer = packed("integers, groups")
    model = peft.get_peft_model(One(layer), peft.LoraConfig(target_modules=["layer"], lora_bias=True))
    with pytest.raises(ValueError, match="lora_bias cannot be merged"):
        model.merge_adapter()


def test_an_adapter_of_a_head_that_is_not_packed_is_part_of_every_new_token(tmp_path):
    lowbit.quantize(tiny_llama(tmp_path / "model"), "rtn", None, out=tmp_path / "q")
    model = peft.get_peft_model(lowbit.load(tmp_path / "q", torch.float32), peft.LoraConfig(target_modules=["lm_head"]))
    ids = random_ids(1, 6)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        fill(model, 1.0)
        assert not torch.allclose(model(input_ids=ids).logits, plain)
        slow = ids
        for _ in range(6):
            slow = torch.cat([slow, model(input_ids=slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), slow)
    restore(model)


# all-linear


def test_all_linear_means_packed_layers_too_and_not_the_head(quantized):
    model = peft.get_peft_model(lowbit.load(quantized, torch.float32), peft.LoraConfig(target_modules="all-linear"))
    adapted = {name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(LINEARS)
    model.add_adapter("second", peft.LoraConfig(target_modules="all-linear"))
    assert sum("second" in m.lora_A for m in model.modules() if hasattr(m, "lora_A")) == 14


def test_all_linear_leaves_a_packed_head_alone(tmp_path):
    recipe = lowbit.recipe("rtn", bits=8, group_size=32).with_overrides([{"match": "head", "bits": 8}])
    lowbit.quantize(tiny_llama(tmp_path / "model"), recipe, None, out=tmp_path / "q")
    base = lowbit.load(tmp_path / "q", torch.float32)
    assert isinstance(base.lm_head, QuantLinear)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
    assert not hasattr(model.get_base_model().lm_head, "lora_A")
