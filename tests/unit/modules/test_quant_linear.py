"""The packed linear: it computes what its parts say, stores what it says, and rebuilds from its description."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from lowbit.modules import ActSpec, LinearDescription, QuantLinear, fake_quantize_activation, quantize_activation
from lowbit.numerics import (
    NF4,
    Affine,
    Float,
    Int,
    KeptColumns,
    MinMax,
    PerChannel,
    PerCluster,
    PerGroup,
    PerInput,
    PerTensor,
    PerToken,
    Sign,
    Sparse,
    Spec,
    Unfitted,
    fit_params,
    from_dict,
    powers_of_two,
    quantize,
    to_dict,
)
from lowbit.transforms import Kronecker, Normalize, Permute, RandomHadamard, Reassembly, Rotate, Scale, Shift, Split

from pairwise import cases

O, I = 24, 40


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sqnr_db(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(10 * torch.log10(x.double().pow(2).sum() / (x.double() - y.double()).pow(2).sum()))


W4 = Spec(Int(4), PerGroup(16))
TRANSFORMS = {
    "scale": (Scale(random(I).abs() + 0.5),),
    "shift": (Shift(random(I)),),
    "permute": (Permute(torch.randperm(I, generator=torch.Generator().manual_seed(2))),),
    "rotate": (Rotate.random_orthogonal(I, 0, dtype=torch.float32),),
    "rotate by heads": (Rotate.hadamard(I, 0, block=8, dtype=torch.float32),),
    "split": (Split(torch.tensor([3] + [1] * (I - 1))),),
    "reassembly": (Reassembly(I, torch.tensor([5]), torch.tensor([5]), torch.tensor([0])),),
    "all": (
        Scale(random(I).abs() + 0.5),
        Shift(random(I, seed=5)),
        Permute(torch.arange(I).flip(0)),
        Rotate.hadamard(I, 1, dtype=torch.float32),
    ),
}

HALVED = Spec(powers_of_two(3), PerTensor(), scale_dtype="float32")
E4M3_OF_TENSOR = Spec(Float(4, 3, "fn"), PerTensor(), scale_dtype="float32")
ACTS = {
    "none": None,
    "per token": ActSpec(Spec(Int(8), PerToken())),
    "per tensor": ActSpec(Spec(Int(8, True), PerTensor())),
    "per group": ActSpec(Spec(Int(4), PerGroup(16))),
    "float": ActSpec(Spec(Float(4, 3), PerToken())),
    "static": ActSpec(Spec(Int(8, True), PerTensor()), static=True),
    "static asymmetric": ActSpec(Spec(Int(8), PerTensor()), static=True),
    "static clusters": ActSpec(Spec(Int(8), PerCluster((10, 25, 5))), static=True),
    "static channels": ActSpec(Spec(Float(4, 3), PerInput()), static=True),
    "static channels, powers of two": ActSpec(Spec(Float(4, 3), PerInput(), HALVED, "float32"), static=True),
    "scales of 8 bits": ActSpec(Spec(Float(2, 1), PerGroup(16), E4M3_OF_TENSOR, "float32")),
    "shared exponents": ActSpec(Spec(Float(4, 3, "fn", shared_exponent=True), PerGroup(16))),
}


def static_params(act: ActSpec | None) -> Affine | None:
    if act is None or not act.static:
        return None
    spec = Spec(act.spec.grid, act.spec.granularity, act.spec.stats, "float32")
    return fit_params(random(64, I, seed=9), spec, MinMax())


def layer(spec: Spec = W4, act: str = "none", bias: bool = True, pre: tuple = ()) -> QuantLinear:
    w, b = random(O, I, seed=3), random(O, seed=4) if bias else None
    for t in pre:
        w, b = t.fold_in(w, b)
    return QuantLinear.from_qtensor(quantize(w, spec, MinMax()), b, ACTS[act], static_params(ACTS[act]), pre)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (2, 1, 3)])
def test_the_output_is_the_linear_of_the_decoded_weight_in_the_dtype_of_the_input(dtype, lead):
    q = layer()
    x = random(*lead, I).to(dtype)
    expected = F.linear(x, q.dequantize().to(dtype)) + q.bias.to(dtype)
    assert q(x).dtype == dtype and q(x).shape == (*lead, O)
    assert torch.equal(q(x), expected)


@pytest.mark.parametrize("act", [name for name, act in ACTS.items() if act], ids=str)
def test_a_quantized_input_is_decoded_from_its_codes(act, monkeypatch):
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")
    q = layer(act=act)
    x = random(2, 6, I, seed=7)
    assert q.act is not None
    fake = fake_quantize_activation(x, q.act, q.act_params)
    assert 15 < sqnr_db(x, fake) < 60
    assert torch.equal(q(x), F.linear(fake, q.dequantize()) + q.bias)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_the_input_are_undone_by_the_weights_folded_for_them(name):
    q = layer(Spec(Int(8), PerGroup(8), scale_dtype="float32"), pre=TRANSFORMS[name])
    x = random(11, I, seed=8)
    if name == "reassembly":
        x[:, 5] = 0.0  # the channel that gives up its place
    original = F.linear(x, random(O, I, seed=3), random(O, seed=4))
    assert sqnr_db(original, q(x)) > 35
    effective = F.linear(x, q.effective_weight(), q.effective_bias())
    assert sqnr_db(q(x), effective) > 100
    assert torch.equal(q.weight, q.effective_weight())


def test_transforms_run_on_the_buffers_without_a_copy():
    q = layer(pre=TRANSFORMS["all"])
    assert q.pre[0].s.data_ptr() == q.pre0_s.data_ptr()
    assert q.pre[2].index.data_ptr() == q.pre2_index.data_ptr()
    assert [type(t).__name__ for t in q.pre] == ["Scale", "Shift", "Permute", "Rotate"]


SPECS = {
    "w3": Spec(Int(3), PerGroup(16)),
    "w8": Spec(Int(8, True), PerChannel()),
    "nf4": Spec(NF4, PerGroup(16), stats=Spec(Int(8), PerGroup(256), scale_dtype="float32")),
    "real zeros": Spec(Int(4, zero="real"), PerGroup(16), stats=Spec(Int(8), PerGroup(16))),
}


@pytest.mark.parametrize(("pre", "act", "spec"), cases(["none", "reassembly", "all"], ACTS, SPECS))
def test_a_layer_rebuilds_from_its_description_and_state(pre, act, spec):
    q = layer(SPECS[spec], act, bias=pre != "none", pre=TRANSFORMS.get(pre, ()))
    description = LinearDescription.from_json(json.loads(json.dumps(q.description.to_json())))
    assert description == q.description and hash(description) == hash(q.description)
    empty = QuantLinear.empty(description, "cpu")
    state = q.state_dict()
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == description.layout()
    empty.load_state_dict(state, strict=True)
    x = random(5, I, seed=7)
    assert torch.equal(empty(x), q(x))
    assert QuantLinear.empty(description).codes.is_meta
    assert (empty.in_features, empty.out_features) == (I, O)


@pytest.mark.parametrize("act", ACTS)
def test_stored_bits_are_the_bits_of_every_buffer_but_the_bias(act):
    q = layer(act=act, pre=TRANSFORMS["all"])
    buffers = {name: b for name, b in q.state_dict().items() if name != "bias"}
    assert q.stored_bits == 8 * sum(b.numel() * b.element_size() for b in buffers.values())
    assert q.bits_per_weight == q.stored_bits / (O * I)


def test_bits_per_weight_of_a_plain_layer_are_codes_scales_and_zeros():
    q = QuantLinear.from_qtensor(quantize(random(64, 256), Spec(Int(4), PerGroup(64)), MinMax()))
    assert q.bits_per_weight == 4 + (16 + 4) / 64


def test_casts_move_the_layer_but_never_convert_what_is_stored():
    q = layer(act="static", pre=TRANSFORMS["all"])
    for cast in (copy.deepcopy(q).half(), copy.deepcopy(q).to(torch.bfloat16), copy.deepcopy(q).double()):
        for name, buffer in q.named_buffers():
            assert torch.equal(cast.get_buffer(name), buffer) and cast.get_buffer(name).dtype == buffer.dtype
    assert all(buffer.is_meta for buffer in copy.deepcopy(q).to("meta").buffers())


def test_the_packed_weight_unpacks_to_the_tensor_it_was_built_from():
    spec = Spec(Int(3), PerGroup(16))
    source = quantize(random(O, I), spec, MinMax())
    q = QuantLinear.from_qtensor(source)
    assert torch.equal(q.qtensor().codes, source.codes)
    assert torch.equal(q.qtensor().params.scale, source.params.scale)
    assert torch.equal(q.dequantize(), source.dequantize())
    assert q.bias is None and q.effective_bias() is None


def test_the_layer_says_what_it_is_and_which_kernel_runs():
    q = QuantLinear.from_qtensor(
        quantize(random(O, I), Spec(Int(8, True), PerChannel()), MinMax()), act=ACTS["per token"]
    )
    assert "in_features=40, out_features=24, bias=False" in repr(q) and "dynamic" in repr(q)
    assert [reason.kernel for reason in q.explain(rows=3) if reason.why_not is None] == ["int8_torch"]


def test_an_input_of_the_wrong_width_is_refused_even_where_a_permutation_would_take_it():
    with pytest.raises(ValueError, match="reads 40 channels, the input has 41"):
        layer(pre=TRANSFORMS["permute"])(random(2, I + 1))


@pytest.mark.parametrize("act", [None, "per token"])
def test_integers_are_refused_which_a_weight_rounded_to_integers_would_turn_to_zeros(act):
    q = QuantLinear.from_qtensor(
        quantize(random(O, I), Spec(Int(8, True), PerChannel()), MinMax()), act=act and ACTS[act]
    )
    with pytest.raises(ValueError, match=r"floating-point inputs, found torch.int64"):
        q(torch.ones(2, I, dtype=torch.int64))


def test_descriptions_and_parts_that_do_not_fit_are_refused():
    spec = Spec(Int(4), PerGroup(16))
    q = quantize(random(O, I), spec, MinMax())
    with pytest.raises(ValueError, match="bias should be"):
        QuantLinear.from_qtensor(q, random(O + 1))
    with pytest.raises(ValueError, match="act_params are given exactly when act is static"):
        QuantLinear.from_qtensor(q, act=ACTS["static"])
    with pytest.raises(ValueError, match="act_zero should be"):
        QuantLinear.from_qtensor(q, act=ACTS["static asymmetric"], act_params=Affine(torch.ones(1, 1)))
    data = QuantLinear.from_qtensor(q).description.to_json()
    with pytest.raises(ValueError, match="lacks bias, pre"):
        LinearDescription.from_json({k: v for k, v in data.items() if k not in ("bias", "pre")})
    with pytest.raises(ValueError, match="did you mean 'Scale'"):
        LinearDescription.from_json(data | {"pre": [{"type": "Scael", "s": [I]}]})


def test_activation_formats_round_trip_through_plain_data_and_refuse_static_ranges_a_token():
    for act in ACTS.values():
        assert from_dict(json.loads(json.dumps(to_dict(act)))) == act
    with pytest.raises(ValueError, match="static activation ranges are per tensor, per cluster or per input channel"):
        ActSpec(Spec(Int(8), PerToken()), static=True)
    with pytest.raises(ValueError, match="needs its calibrated parameters"):
        quantize_activation(random(2, I), ACTS["static"])


@pytest.mark.parametrize("act", [a for a in ACTS.values() if a], ids=[name for name, a in ACTS.items() if a])
def test_zeros_stay_zeros_and_nan_stays_nan(act):
    x = random(4, I)
    x[1] = 0
    x[2, 3] = torch.nan
    fake = fake_quantize_activation(x, act, static_params(act))
    assert torch.isnan(fake[2, 3])
    if act.static or act.spec.granularity != PerTensor():
        assert torch.equal(fake[1], torch.zeros(I))
        assert not fake[[0, 3]].isnan().any()
    assert torch.equal(fake_quantize_activation(torch.zeros(4, I), act, static_params(act)), torch.zeros(4, I))


def test_dynamic_parameters_are_the_extremes_of_each_token_and_are_not_rounded():
    x = random(3, I).to(torch.bfloat16)
    codes, params = quantize_activation(x, ActSpec(Spec(Int(8, True), PerToken())))
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    assert torch.equal(params.scale[:, 0], x.float().abs().amax(1) / 127)


# Transforms of the output, seeds, side terms


POST = {
    "seeded": (Kronecker(8, O, inverted=True),),
    "several": (Scale(random(O).abs() + 0.5), RandomHadamard(9, O), Permute(torch.arange(O).flip(0))),
    "shift": (Shift(random(O, seed=6)),),
}


def sides() -> tuple:
    mask = torch.rand(O, I, generator=torch.Generator().manual_seed(1)) < 0.03
    return Sparse.of(random(O, I, seed=11), mask), KeptColumns.of(random(O, 2, seed=12), torch.tensor([30, 4]))


def full(spec: Spec = W4, act: str = "none", post: str = "several", bias: bool = True) -> QuantLinear:
    """A layer with everything: seeded and plain transforms on both sides and both side terms."""
    q = quantize(random(O, I, seed=3), spec, MinMax())
    pre = (Scale(random(I).abs().half() + 0.5), RandomHadamard(7, I))
    b = random(O, seed=4) if bias else None
    return QuantLinear.from_qtensor(q, b, ACTS[act], static_params(ACTS[act]), pre, POST[post], sides())


@pytest.mark.parametrize("act", ["none", "per token", "static"])
@pytest.mark.parametrize("post", POST)
def test_a_layer_computes_its_formula_transforms_before_the_bias_and_sides_on_the_floating_input(
    act, post, monkeypatch
):
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")
    q, x = full(act=act, post=post), random(5, I, seed=8)
    h = x
    for t in q.pre:
        h = t.forward(h)
    seen = h if q.act is None else fake_quantize_activation(h, q.act, q.act_params)
    y = F.linear(seen, q.qtensor().dequantize()) + sum(term.apply(h, O) for term in q.side_terms)
    for t in POST[post]:
        y = t.forward(y)
    assert sqnr_db(y + q.bias, q(x)) > 110


@pytest.mark.parametrize("post", POST)
@pytest.mark.parametrize("bias", [True, False])
def test_the_effective_weight_and_bias_are_the_whole_layer(post, bias):
    q, x = full(post=post, bias=bias), random(9, I, seed=8)
    assert sqnr_db(q(x), F.linear(x, q.effective_weight(), q.effective_bias())) > 100
    added = q.dequantize() - q.qtensor().dequantize()
    assert torch.allclose(added, sum(term.dense((O, I)) for term in sides()), atol=1e-6)


def test_a_rotation_on_both_sides_is_undone_by_the_layer():
    w, b, x = random(O, I, seed=3), random(O, seed=4), random(11, I, seed=8)
    of_input, of_output = RandomHadamard(1, I), Kronecker(2, O)
    turned = of_output.fold_out(of_input.fold_in(w, None)[0], None)[0]
    spec = Spec(Int(8), PerGroup(8), scale_dtype="float32")
    q = QuantLinear.from_qtensor(quantize(turned, spec, MinMax()), b, pre=(of_input,), post=(of_output.inverse(),))
    assert sqnr_db(F.linear(x, w, b), q(x)) > 40 and sqnr_db(w, q.effective_weight()) > 40
    plain = QuantLinear.from_qtensor(quantize(w, spec, MinMax()))
    assert q.stored_bits - plain.stored_bits == 2 * 64
    assert (q.in_features, q.out_features) == (I, O)


@pytest.mark.parametrize("act", ["none", "static clusters"])
def test_a_layer_with_everything_rebuilds_and_counts_every_bit(act):
    q = full(act=act)
    description = LinearDescription.from_json(json.loads(json.dumps(q.description.to_json())))
    assert description == q.description and hash(description) == hash(q.description)
    empty = QuantLinear.empty(description, "cpu")
    state = q.state_dict()
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == description.layout()
    empty.load_state_dict(state, strict=True)
    x = random(5, I, seed=7)
    assert torch.equal(empty(x), q(x))
    assert q.stored_bits == 8 * sum(b.numel() * b.element_size() for n, b in state.items() if n != "bias")
    assert {state[n].dtype for n in ("pre1_seed", "post1_seed")} == {torch.int64} and state[
        "pre0_s"
    ].dtype == torch.float16
    assert (state["side0_column"].dtype, state["side0_value"].dtype) == (torch.int16, torch.float16)
    assert empty.pre[1] == RandomHadamard(7, I)
    for word in ("pre=Scale then RandomHadamard", "post=Scale then", "side=Sparse and KeptColumns"):
        assert word in repr(q)


def test_descriptions_from_before_there_were_outputs_and_sides_load_and_are_still_written():
    data = layer(pre=TRANSFORMS["permute"]).description.to_json()
    assert set(data) == {"spec", "shape", "bias", "act", "pre"}
    assert data["pre"] == [{"type": "Permute", "index": [I]}]
    empty = QuantLinear.empty(LinearDescription.from_json(data), "cpu")
    assert empty.post == empty.side_terms == ()


def test_integer_products_add_side_terms_too():
    w8 = Spec(Int(8), PerChannel())
    q = full(w8, "per token")
    assert [reason.kernel for reason in q.explain(4) if reason.why_not is None] == ["int8_torch"]
    x = random(6, I, seed=9)
    fast = q(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_KERNELS", "reference")
        assert sqnr_db(q(x), fast) > 90


def test_what_no_layer_has_at_a_place_is_refused():
    q = quantize(random(O, I), W4, MinMax())
    with pytest.raises(ValueError, match="no Split as post"):
        QuantLinear.from_qtensor(q, post=(Split(torch.ones(O, dtype=torch.int64)),))
    data = full().description.to_json()
    with pytest.raises(ValueError, match="did you mean 'Sparse'"):
        LinearDescription.from_json(data | {"side": [{"type": "Sparce"}]})
    with pytest.raises(ValueError, match="seed is stored as one of"):
        seed = {"shape": [1], "dtype": "float8"}
        LinearDescription.from_json(data | {"post": [{"type": "Kronecker", "seed": seed, "size": O, "inverted": True}]})


@pytest.mark.parametrize("spec", [Spec(Sign(), PerTensor()), W4], ids=str)
def test_a_layer_that_normalizes_its_output_computes_it_before_the_bias_and_is_no_weight(spec):
    w, b, x = random(O, I, seed=3), random(O, seed=4), random(11, I, seed=8)
    q = quantize(w, spec, Unfitted() if isinstance(spec.grid, Sign) else MinMax())
    before, after = Scale(random(I).abs().half() + 0.5), Scale(random(O).abs().half() + 0.5)
    layer = QuantLinear.from_qtensor(q, b, pre=(before,), post=(after, Normalize(1e-3)))
    inner = F.linear(x / before.s.float(), q.dequantize()) / after.s.float()
    assert sqnr_db(F.layer_norm(inner, (O,), eps=1e-3) + b, layer(x)) > 90
    again = QuantLinear.empty(LinearDescription.from_json(json.loads(json.dumps(layer.description.to_json()))), "cpu")
    again.load_state_dict(layer.state_dict(), strict=True)
    assert (
        torch.equal(again(x), layer(x)) and again.post[-1] == Normalize(1e-3) and "Scale then Normalize" in repr(layer)
    )
    layer.prepare()
    assert sqnr_db(again(x), layer(x)) > 90
    for effective in (layer.effective_weight, layer.effective_bias):
        with pytest.raises(ValueError, match="normalizes its output"):
            effective()
    assert layer.weight.shape == (O, I) and torch.isnan(F.linear(x, layer.weight)).all()
    with pytest.raises(ValueError, match="no Normalize as pre"):
        QuantLinear.from_qtensor(q, pre=(Normalize(),))


def test_a_layer_that_stores_nothing_but_codes_is_prepared_once_it_has_them():
    layer = QuantLinear.from_qtensor(quantize(random(O, I), Spec(Sign(), PerTensor()), Unfitted()), post=(Normalize(),))
    assert list(layer.state_dict()) == ["codes"] and layer.stored_bits == O * I
    assert torch.isnan(layer.weight).all()
    empty = QuantLinear.empty(layer.description)
    assert "no content" in (empty.prepare() or "")
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), strict=True)
    wanted = layer(random(3, I))
    assert empty.prepare() is None and sqnr_db(wanted, empty(random(3, I))) > 90
    assert torch.equal(empty.state_dict()["codes"], layer.codes)


def test_layers_that_were_given_one_transform_keep_one_each():
    scale, q = Scale(random(I).abs().half() + 0.5), quantize(random(O, I), W4, MinMax())
    first, second = (QuantLinear.from_qtensor(q, pre=(scale,)) for _ in range(2))
    assert len({scale.s.data_ptr(), first.pre0_s.data_ptr(), second.pre0_s.data_ptr()}) == 3


def test_the_effective_weight_is_the_same_in_inference_mode():
    q = full()
    wanted = q.effective_weight()
    with torch.inference_mode():
        assert torch.equal(q.effective_weight(), wanted) and torch.equal(q.weight, wanted)
