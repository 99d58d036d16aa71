"""The law of the compiled step: one token through it is one token through transformers' forward of the same packed model."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
    TextStreamer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lowbit import decoding
from lowbit.architectures import block_modules, for_config, model_types, resolve
from lowbit.decoding import cache as caches
from lowbit.decoding.description import Described
from lowbit.kernels import native
from lowbit.modules import ActSpec, QuantLinear, prepare, restore
from lowbit.numerics import (
    NF4,
    Alternating,
    BinaryCoded,
    Codebook,
    Float,
    Int,
    KeptColumns,
    LowRank,
    Lut,
    MinMax,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QTensor,
    Sign,
    Sparse,
    Spec,
    Unfitted,
    fit_params,
    quantize,
)
from lowbit.transforms import Normalize, Permute, Scale

from helpers import sqnr_db

SETS = native.instruction_sets()
SIZES = {
    "vocab_size": 131,
    "hidden_size": 72,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases, tied, llama3 rope": LlamaConfig(
        **SIZES | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2, biases": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3, head norms": Qwen3Config(**SIZES),
}
W4 = Spec(Int(4), PerGroup(32))
PROMPT = torch.randint(0, 131, (1, 7), generator=torch.Generator().manual_seed(3))
TOKENS = [5, 77, 130, 0, 42]


def original(config) -> type[PreTrainedModel]:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def quantized(weight: Tensor, spec: Spec) -> QTensor:
    if isinstance(spec.grid, Codebook):  # to be fast, levels of a row are drawn, not found
        params = Lut(torch.randn(len(weight), 2**spec.grid.bits).sort(1).values * weight.shape[1] ** -0.5)
        return QTensor.fitted(spec.grid.encode(weight, params), params, spec)
    fits = {BinaryCoded: Alternating(), Sign: Unfitted()}
    return quantize(weight, spec, fits.get(type(spec.grid), MinMax()))


def packed(
    config=CONFIGS["llama"], spec=W4, act: ActSpec | None = None, dtype=torch.float32, **options
) -> PreTrainedModel:
    """A random model whose block linears are packed, ready to run as one that was loaded."""
    torch.manual_seed(1)
    model = original(config)(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.rand_like(p) + 0.5 if p.dim() == 1 else torch.randn_like(p) * p.shape[-1] ** -0.5)
    model.to(dtype)
    for block in block_modules(model, for_config(config)):
        for path in resolve(for_config(config), block).linears:
            linear = block.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            static = fit_params(torch.linspace(-4, 4, 64), act.spec, MinMax()) if act and act.static else None
            q = quantized(linear.weight.float(), spec)
            block.set_submodule(path, QuantLinear.from_qtensor(q, linear.bias, act, static, **options))
    prepare(model)
    decoding.install(model)
    return model


def kv(cache: Any) -> dict[str, Any]:
    """The cache under the name that the installed transformers has for it."""
    return {decoding.cache_argument(LlamaForCausalLM): cache}


def ordinary(model: PreTrainedModel, ids: Tensor, cache: DynamicCache, **inputs) -> Tensor:
    """Logits by transformers' own forward."""
    return original(model.config).forward(model, ids, **kv(cache), use_cache=True, **inputs).logits


@torch.no_grad()
def both_ways(model: PreTrainedModel, tokens=TOKENS, prompt=PROMPT) -> tuple[Tensor, Tensor]:
    """Logits of ``tokens`` one by one after ``prompt``: by transformers' forward, and by the installed one."""
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    ordinary(model, prompt, theirs), ordinary(model, prompt, ours)
    ids = [torch.tensor([[token]]) for token in tokens]
    a = [ordinary(model, one, theirs) for one in ids]
    b = [model(input_ids=one, **kv(ours), use_cache=True).logits for one in ids]
    assert ours.get_seq_length() == theirs.get_seq_length() == prompt.shape[1] + len(tokens)
    return torch.cat(a), torch.cat(b)


@pytest.fixture
def steps(monkeypatch) -> Callable[[], int]:
    """How many tokens the compiled step has run since it was asked last."""
    count, run = [0], Described.run

    def counted(*args):
        count[0] += 1
        return run(*args)

    def taken() -> int:
        found, count[0] = count[0], 0
        return found

    monkeypatch.setattr(Described, "run", counted)
    return taken


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_gives_the_logits_of_the_ordinary_forward(name, isa, monkeypatch, steps):
    monkeypatch.setenv("LOWBIT_KERNELS", isa)
    theirs, ours = both_ways(packed(CONFIGS[name]))
    assert steps() == len(TOKENS)
    assert sqnr_db(theirs, ours) > 90


SPECS = [
    *(Spec(Int(b), PerGroup(16)) for b in (1, 2, 3, 5)),
    Spec(Int(8, symmetric=True), PerChannel()),
    Spec(Int(3, zero="real"), PerGroup(48)),
    Spec(NF4, PerGroup(64)),
    Spec(Float(4, 3), PerChannel()),
    Spec(Codebook(3), PerChannel()),
    Spec(BinaryCoded(2), PerGroup(64)),
    Spec(Sign(), PerTensor()),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_kind_of_tiles_runs_in_a_step(spec, steps):
    theirs, ours = both_ways(packed(spec=spec))
    assert steps() == len(TOKENS)
    assert sqnr_db(theirs, ours) > 90


@pytest.mark.parametrize(
    "act",
    [
        ActSpec(Spec(Int(8), PerToken())),
        ActSpec(Spec(Int(8, symmetric=True), PerToken())),
        ActSpec(Spec(Int(8, symmetric=True, reach=0.9), PerToken())),
        ActSpec(Spec(Int(8), PerTensor())),
        ActSpec(Spec(Int(8), PerTensor()), static=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_quantized_to_integers_run_in_a_step(act, bits, steps):
    theirs, ours = both_ways(packed(spec=Spec(Int(bits, symmetric=True), PerChannel()), act=act))
    assert steps() == len(TOKENS)
    # An input in the middle between two integers may become the other one, in 1 of 10 such tokens: a step of 8 bits.
    agreement = sorted(sqnr_db(a, b) for a, b in zip(theirs, ours, strict=True))
    assert agreement[0] > 40 and agreement[1] > 90


def test_a_linear_that_is_not_packed_runs_in_a_step(steps):
    model = packed()
    block = block_modules(model, for_config(model.config))[1]
    for role in ("gate", "down"):
        layer = block.get_submodule(f"mlp.{role}_proj")
        dense = nn.Linear(layer.in_features, layer.out_features, bias=True)
        setattr(block.mlp, f"{role}_proj", dense)
    theirs, ours = both_ways(model)
    assert steps() == len(TOKENS) and sqnr_db(theirs, ours) > 90


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_16_bits_is_nearer_to_float32_than_the_ordinary_forward_is(dtype, steps):
    narrow = packed(dtype=dtype)
    theirs, ours = both_ways(narrow)
    assert steps() == len(TOKENS) and ours.dtype == dtype
    exact, _ = both_ways(copy.deepcopy(narrow).float())
    assert sqnr_db(exact, ours) > sqnr_db(exact, theirs) > 30


def test_threads_do_not_change_a_bit():
    model, threads, found = packed(), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(both_ways(model)[1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@torch.no_grad()
def test_a_cache_grows_and_holds_what_the_ordinary_one_holds(monkeypatch, steps):
    monkeypatch.setattr(caches, "LEAST_ROOM", 4)
    model = packed()
    theirs, ours = DynamicCache(), DynamicCache()
    ordinary(model, PROMPT, theirs), model(PROMPT, **kv(ours))
    for token in range(20):
        one = torch.tensor([[token]])
        a, b = ordinary(model, one, theirs), model(one, **kv(ours)).logits
        assert sqnr_db(a, b) > 90
    assert steps() == 20 and ours.layers[0].room.capacity == 32
    for mine, plain in zip(ours.layers, theirs.layers, strict=True):
        assert sqnr_db(plain.keys, mine.keys) > 90 and sqnr_db(plain.values, mine.values) > 90


@torch.no_grad()
def test_several_tokens_after_steps_and_steps_after_them_go_on_in_one_cache(monkeypatch, steps):
    monkeypatch.setattr(caches, "LEAST_ROOM", 8)
    model = packed(CONFIGS["qwen3, head norms"])
    theirs, ours = DynamicCache(), DynamicCache()
    for ids in (PROMPT, *torch.tensor([[[4]], [[9]]]), PROMPT + 1, *torch.tensor([[[6]], [[7]]])):
        assert sqnr_db(ordinary(model, ids, theirs), model(ids, **kv(ours)).logits) > 90
    assert steps() == 4


@torch.no_grad()
def test_a_cropped_reordered_or_copied_cache_goes_on(steps):
    model, one = packed(), torch.tensor([[8]])
    theirs, ours = DynamicCache(), DynamicCache()
    ordinary(model, PROMPT, theirs), model(PROMPT, **kv(ours))
    ordinary(model, one, theirs), model(one, **kv(ours))
    for cache in (theirs, ours):
        cache.crop(-3)
        cache.reorder_cache(torch.tensor([0]))
    branch = copy.deepcopy(ours)
    model(one + 1, **kv(branch))
    again = copy.deepcopy(branch)
    model(one + 2, **kv(again))
    assert (ours.get_seq_length(), branch.get_seq_length(), again.get_seq_length()) == (5, 6, 7)
    assert sqnr_db(ordinary(model, one, theirs), model(one, **kv(ours)).logits) > 90
    assert steps() == 4


@torch.no_grad()
def test_what_a_step_does_not_do_is_left_to_the_ordinary_forward(steps):
    model, one = packed(), torch.tensor([[8]])

    def filled(prompt=PROMPT) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(prompt, **kv(cache))
        return cache

    holes = torch.ones(1, 8, dtype=torch.int64)
    holes[0, 2] = 0
    expected = ordinary(model, one, filled(), attention_mask=holes)
    assert torch.equal(model(one, **kv(filled()), attention_mask=holes).logits, expected)
    assert torch.equal(model(one, **kv(DynamicCache())).logits, ordinary(model, one, DynamicCache()))
    pair = model(one.repeat(2, 1), **kv(filled(PROMPT.repeat(2, 1))))
    assert pair.logits.shape == (2, 1, 131)
    assert model(one, **kv(filled()), output_hidden_states=True).hidden_states is not None
    assert isinstance(model(one, **kv(filled()), return_dict=False), tuple)
    assert model(one, **kv(filled()), labels=one).loss is not None
    model(one, **kv(filled()), use_cache=False)
    model(inputs_embeds=torch.zeros(1, 1, 72), **kv(filled()))
    model(one, **kv(StaticCache(config=model.config, max_cache_len=16)))
    with torch.enable_grad():
        model(one, **kv(filled()))
    model.train()
    model(one, **kv(filled()))
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        model(one, **kv(filled()))
    for where in ([[-1]], [[10.5]], [[2**31]]):
        inputs = {"position_ids": torch.tensor(where)}
        assert torch.equal(model(one, **kv(filled()), **inputs).logits, ordinary(model, one, filled(), **inputs))
    assert steps() == 0
    ones = torch.ones_like(holes)
    for inputs in ({}, {"attention_mask": ones}, {"position_ids": torch.tensor([[7]])}, {"logits_to_keep": 1}):
        assert sqnr_db(ordinary(model, one, filled(), **inputs), model(one, **kv(filled()), **inputs).logits) > 90
    assert steps() == 4


@torch.no_grad()
def test_a_position_turns_a_token_as_it_says(steps):
    model, one = packed(), torch.tensor([[8]])
    for position in (700, 0, 10**7):
        where = torch.tensor([[position]])
        theirs, ours = DynamicCache(), DynamicCache()
        ordinary(model, PROMPT, theirs), ordinary(model, PROMPT, ours)
        a = ordinary(model, one, theirs, position_ids=where)
        b = model(one, **kv(ours), position_ids=where).logits
        assert steps() == 1 and sqnr_db(a, b) > 90


def test_a_part_of_each_head_is_turned_where_the_model_does_so_and_only_there(steps):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}  # which llama does not look at
    theirs, ours = both_ways(packed(LlamaConfig(**SIZES, rope_parameters=rope)))
    assert steps() == len(TOKENS) and sqnr_db(theirs, ours) > 90


@torch.no_grad()
def test_a_cache_with_one_layer_of_another_kind_is_not_taken(steps):
    model = packed()

    def refused(change: Callable[[DynamicCache], object]) -> bool:
        cache = DynamicCache()
        ordinary(model, PROMPT, cache)
        change(cache)
        return isinstance(caches.adopt(cache, 2, 2, 24, torch.float32), str)

    def other(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[DynamicCache], object]:
        return lambda cache: setattr(cache.layers[1], name, change(getattr(cache.layers[1], name)))

    assert not refused(lambda cache: None)
    for name in ("keys", "values"):
        for change in (Tensor.half, lambda t: t[:, :1], lambda t: t[..., :8], lambda t: t.repeat(2, 1, 1, 1)):
            assert refused(other(name, change))
    assert refused(other("values", lambda t: t[:, :, :1]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_forked_within_a_step_runs_steps_of_its_own(monkeypatch):
    monkeypatch.setattr(caches, "LEAST_ROOM", 2**16)  # attention over so many tokens is most of a step
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own pool does not survive a fork
    model, stop = packed(), threading.Event()
    with torch.no_grad():
        cache = DynamicCache()
        ordinary(model, PROMPT, cache)
        described = model._described()  # pyright: ignore[reportCallIssue]
        room = caches.adopt(cache, *described.cache)
        assert isinstance(room, caches.Room)
        for buffer in room.buffers:
            buffer.zero_()

    @torch.no_grad()
    def step() -> None:
        room.lengths = [2**15, 2**15]
        described.run(torch.tensor([[5]]), room, 100)

    def spin() -> None:
        while not stop.is_set():
            step()

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        for _ in range(4):
            time.sleep(0.01)
            child = os.fork()
            if not child:
                step()
                os._exit(0)
            end = time.monotonic() + 20
            while not os.waitpid(child, os.WNOHANG)[0]:
                if time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    pytest.fail("the child waits for a lock that a thread of its parent holds")
                time.sleep(0.005)
    finally:
        stop.set()
        thread.join()
        torch.set_num_threads(threads)


def changes() -> dict[str, Callable[[PreTrainedModel], object]]:
    def other_layer(model: PreTrainedModel) -> None:
        model.model.layers[1].mlp.up_proj = copy.deepcopy(model.model.layers[0].mlp.up_proj)

    def other_block(model: PreTrainedModel) -> None:
        model.model.layers[0] = copy.deepcopy(model.model.layers[1])
        model.model.layers[0].self_attn.layer_idx = 0

    def other_memory(model: PreTrainedModel) -> None:
        model.model.norm.weight.data = torch.linspace(0.1, 2, 72)

    def other_tiles(model: PreTrainedModel) -> None:
        tiles = model.model.layers[0].mlp.up_proj.tiles
        tiles.data = tiles.data.clone()

    return {
        "a replaced layer": other_layer,
        "a swapped block": other_block,
        "a parameter changed in place": lambda m: m.model.layers[0].input_layernorm.weight.mul_(1.7),
        "a parameter's other memory": other_memory,
        "an embedding trained in place": lambda m: m.model.embed_tokens.weight.add_(0.3),
        "a new head": lambda m: m.set_submodule("lm_head", nn.Linear(72, 131, bias=True).requires_grad_(False)),
        "a cast": lambda m: m.to(torch.float64).to(torch.float32),
        "restored and prepared again": lambda m: (restore(m), prepare(m)),
        "tiles' other memory": other_tiles,
        "shared memory": lambda m: m.share_memory(),
        "scales changed in place": lambda m: m.model.layers[0].mlp.up_proj.scale.mul_(2),
        "frequencies changed in place": lambda m: m.model.rotary_emb.inv_freq.mul_(0.5),
        "another scaling of angles": lambda m: setattr(m.model.rotary_emb, "attention_scaling", 2.0),
        "another eps": lambda m: setattr(m.model.norm, "variance_epsilon", 1.0),
        "a bias that is given": lambda m: setattr(m.model.layers[0].mlp.up_proj, "bias", torch.ones(112)),
    }


@pytest.mark.parametrize("what", changes())
def test_a_step_never_runs_a_model_of_before(what, steps):
    model = packed()
    before = both_ways(model)[1]
    changes()[what](model)
    theirs, ours = both_ways(model)
    assert steps() == 2 * len(TOKENS) and sqnr_db(theirs, ours) > 90
    same = ("a cast", "restored and prepared again", "tiles' other memory", "shared memory")
    assert torch.equal(before, ours) == (what in same)


def test_a_step_stops_where_a_layer_is_restored_a_forward_replaced_or_a_hook_listens(steps):
    model, heard = packed(), []
    restore(model)
    both_ways(model)
    assert steps() == 0 and "not packed" in decoding.explain(model)
    prepare(model)
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    both_ways(model)
    assert steps() == 0 and len(heard) == 12 and "hook" in decoding.explain(model)
    hook.remove()
    layer = model.model.layers[0].mlp
    layer.forward = type(layer).forward.__get__(layer)
    both_ways(model)
    assert steps() == 0 and "replaced" in decoding.explain(model)
    del layer.forward
    both_ways(model)
    assert steps() == len(TOKENS)
    with torch.no_grad():
        model(PROMPT, output_hidden_states=True)  # after which transformers leaves hooks of its own behind, asleep
    both_ways(model)
    assert steps() == len(TOKENS)


@torch.no_grad()
def test_copies_and_pickles_run_steps_of_their_own(steps):
    model = packed()
    before = both_ways(model)[1]
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    twin.model.norm.weight.mul_(2)
    assert type(twin) is type(model) and isinstance(model, original(model.config))
    steps()
    assert torch.equal(both_ways(model)[1], before) and torch.equal(both_ways(again)[1], before)
    assert sqnr_db(*both_ways(twin)) > 90 and not torch.equal(both_ways(twin)[1], before)
    assert steps() == 4 * len(TOKENS)


def test_a_model_and_a_cache_are_freed_without_the_garbage_collector(steps):
    model = packed()
    cache = DynamicCache()
    with torch.no_grad():
        model(PROMPT, **kv(cache))
        model(torch.tensor([[1]]), **kv(cache))
    assert steps() == 1
    gc.collect()
    gc.disable()
    try:
        watched = [weakref.ref(model), weakref.ref(cache.layers[0].room)]
        del model, cache
        assert [ref() for ref in watched] == [None, None]
    finally:
        gc.enable()


def test_generation_writes_the_same_text_with_and_without_steps(steps):
    model = packed()
    for how in ({"do_sample": False}, {"do_sample": True, "temperature": 1.5}, {"num_beams": 3, "do_sample": False}):
        texts = []
        for on in (True, False):
            (decoding.install if on else decoding.uninstall)(model)
            torch.manual_seed(0)
            texts.append(
                model.generate(
                    PROMPT,
                    attention_mask=torch.ones_like(PROMPT),
                    max_new_tokens=20,
                    pad_token_id=0,
                    eos_token_id=None,
                    **how,
                )
            )
            assert steps() == (19 if on and "num_beams" not in how else 0)
        assert texts[0].shape == (1, 27) and torch.equal(*texts)


def test_text_streams_while_steps_run(steps):
    class Words:
        def decode(self, ids, **_):
            return "".join(f"{i} " for i in torch.as_tensor(ids).flatten().tolist())

    class Heard(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    pieces: list[str] = []
    model = packed()
    out = model.generate(
        PROMPT, max_new_tokens=9, do_sample=False, eos_token_id=None, streamer=Heard(Words(), skip_prompt=True)
    )
    assert steps() == 8 and len(pieces) > 5
    assert "".join(pieces).split() == [str(i) for i in out[0, 7:].tolist()]


def test_explain_says_whether_a_step_runs_and_if_not_why(monkeypatch):
    assert decoding.explain(packed()).startswith("One new token of one sequence runs as one compiled step")
    plain = original(CONFIGS["llama"])(CONFIGS["llama"])
    assert "not loaded as a lowbit checkpoint" in decoding.explain(plain)
    decoding.install(plain)
    assert "no layer is packed" in decoding.explain(plain)
    for act, why in (
        (ActSpec(Spec(Float(4, 3), PerToken())), "quantized to a format without an integer product"),
        (ActSpec(Spec(Int(8), PerToken()), threshold=6.0), "threshold"),
    ):
        assert why in decoding.explain(packed(act=act))
    monkeypatch.setenv("LOWBIT_KERNELS", "reference")
    assert "LOWBIT_KERNELS=reference is set" in decoding.explain(packed())
    monkeypatch.delenv("LOWBIT_KERNELS")
    assert "float64" in decoding.explain(packed().double())


@torch.no_grad()
def test_explain_counts_the_tokens_of_either_forward_under_either_name_of_the_cache():
    model, one = packed(), torch.tensor([[7]])
    model.generate(PROMPT, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert decoding.explain(model).endswith("So far: 5 tokens by it.")
    cache = DynamicCache(config=model.config)
    ordinary(model, PROMPT, cache)
    model(one, cache=cache), model(one, past_key_values=cache)
    model(one, **kv(StaticCache(config=model.config, max_cache_len=16)))
    text = decoding.explain(model)
    assert "So far: 7 tokens by it, 1 by the ordinary forward (last: the cache is a StaticCache" in text


def test_what_stands_beside_a_layer_keeps_its_model_from_steps():
    model = packed()
    layer = model.model.layers[0].mlp.up_proj
    q, width = layer.qtensor(), layer.in_features
    for options, why in (
        ({"pre": (Permute(torch.arange(width).flip(0)),)}, "transforms of its own other than scales"),
        ({"post": (Normalize(), Scale(torch.full((112,), 2.0)))}, "transforms of its own other than scales"),
        ({"side_terms": (LowRank.of(torch.ones(2, width), torch.ones(112, 2)),)}, "LowRank"),
    ):
        model.model.layers[0].mlp.up_proj = QuantLinear.from_qtensor(q, **options)
        prepare(model)
        assert why in decoding.explain(model)


def test_kept_columns_and_sparse_weights_run_in_a_step(steps):
    model = packed()
    generator = torch.Generator().manual_seed(2)
    for block in model.model.layers:
        for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
            layer = block.get_submodule(name)
            w = torch.randn(layer.shape, generator=generator)
            some = Sparse.of(w, torch.rand(layer.shape, generator=generator) < 0.05)
            side = (some, KeptColumns.of(w[:, [3, 9]], torch.tensor([3, 9])))
            block.set_submodule(name, QuantLinear.from_qtensor(layer.qtensor(), side_terms=side))
    prepare(model)
    theirs, ours = both_ways(model)
    assert steps() == len(TOKENS) and sqnr_db(theirs, ours) > 90


def around(model: PreTrainedModel, which: Callable[[str], bool], *, scale: bool = True, normalize: bool = True) -> None:
    """Gives each chosen layer scales of its own for its input and output, and a normalization."""
    generator = torch.Generator().manual_seed(7)

    def scales(width: int) -> tuple[Scale, ...]:
        return (Scale(torch.rand(width, generator=generator).add(0.5).half()),) if scale else ()

    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and which(name):
            post = (*scales(layer.out_features), *((Normalize(),) if normalize else ()))
            made = QuantLinear.from_qtensor(
                layer.qtensor(),
                layer.bias,
                layer.act,
                layer.act_params,
                scales(layer.in_features),
                post,
                layer.side_terms,
            )
            model.set_submodule(name, made)
    prepare(model)


EVERYWHERE: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "one of those that read an input": lambda name: name.endswith(("k_proj", "up_proj")),
    "one block": lambda name: ".1." in name,
    "what adds to the stream": lambda name: name.endswith(("o_proj", "down_proj")),
}


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("name", ["llama", "llama with biases, tied, llama3 rope", "qwen3, head norms"])
def test_signs_between_scales_and_normalized_run_in_a_step(name, isa, monkeypatch, steps):
    monkeypatch.setenv("LOWBIT_KERNELS", isa)
    model = packed(CONFIGS[name], Spec(Sign(), PerTensor()))
    around(model, EVERYWHERE["all"])
    theirs, ours = both_ways(model)
    assert steps() == len(TOKENS) and sqnr_db(theirs, ours) > 90


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("where", EVERYWHERE)
def test_whichever_layers_scale_or_normalize_run_in_a_step(where, normalize, scale, steps):
    model = packed(CONFIGS["llama with biases, tied, llama3 rope"])
    plain = both_ways(model)[1]
    around(model, EVERYWHERE[where], scale=scale, normalize=normalize)
    steps()
    theirs, ours = both_ways(model)
    assert steps() == len(TOKENS) and sqnr_db(theirs, ours) > 90
    assert torch.equal(ours, plain) == (not scale and not normalize)


@pytest.mark.parametrize("spec", [Spec(NF4, PerGroup(64)), Spec(Codebook(3), PerChannel()), W4], ids=str)
@pytest.mark.parametrize("act", [None, ActSpec(Spec(Int(8, symmetric=True), PerToken()))], ids=str)
def test_every_kind_of_input_is_scaled_before_it_is_prepared(spec, act, steps):
    model = packed(spec=spec, act=act if isinstance(spec.grid, Int) else None)
    around(model, EVERYWHERE["all"])
    theirs, ours = both_ways(model)
    assert steps() == len(TOKENS)
    agreement = sorted(sqnr_db(a, b) for a, b in zip(theirs, ours, strict=True))
    assert agreement[0] > 40 and agreement[1] > 90


def test_side_terms_and_drowning_inputs_are_of_the_scaled_input(steps):
    model = packed()
    generator = torch.Generator().manual_seed(2)
    for block in model.model.layers:
        layer = block.mlp.down_proj
        w = torch.randn(layer.shape, generator=generator)
        some = Sparse.of(w, torch.rand(layer.shape, generator=generator) < 0.05)
        s = torch.ones(layer.in_features)
        s[5] = 1e-6  # this channel takes the digits of all others
        block.mlp.down_proj = QuantLinear.from_qtensor(layer.qtensor(), pre=(Scale(s),), side_terms=(some,))
    prepare(model)
    theirs, ours = both_ways(model)
    assert steps() == len(TOKENS) and sqnr_db(theirs, ours) > 90


def test_a_scale_that_changes_in_place_changes_the_step(steps):
    model = packed()
    around(model, EVERYWHERE["all"])
    before = both_ways(model)[1]
    model.model.layers[0].mlp.up_proj.pre0_s.mul_(torch.linspace(0.5, 2, 72).half())
    theirs, ours = both_ways(model)
    assert sqnr_db(theirs, ours) > 90 and not torch.equal(before, ours)
    model.model.layers[0].mlp.up_proj.post0_s.mul_(torch.linspace(0.5, 2, 112).half())
    theirs, ours = both_ways(model)
    assert steps() == 3 * len(TOKENS) and sqnr_db(theirs, ours) > 90


@pytest.mark.parametrize("count", [2, 5])
def test_threads_do_not_change_a_bit_of_what_is_normalized(count):
    model, threads = (
        packed(CONFIGS["llama with biases, tied, llama3 rope"], Spec(Sign(), PerTensor())),
        torch.get_num_threads(),
    )
    around(model, EVERYWHERE["one of those that read an input"])
    try:
        torch.set_num_threads(1)
        alone = both_ways(model)[1]
        torch.set_num_threads(count)
        together = both_ways(model)[1]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


def test_every_table_has_a_step_or_a_reason():
    reasons = {
        "another gate": LlamaConfig(**SIZES, hidden_act="gelu"),
        "a sliding window": MistralConfig(**SIZES, sliding_window=16),
        "frequencies by length": LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        "scaled embeddings": GemmaConfig(**SIZES),
    }
    for config in reasons.values():
        model = original(config)(config)
        decoding.install(model)
        assert decoding.explain(model).startswith("No compiled step of one token: ")
    assert {"llama", "mistral", "qwen2", "qwen3"} <= set(model_types())


@torch.no_grad()
def test_torch_compiles_a_model_with_a_step_whole(steps):
    model = packed()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(PROMPT, use_cache=False).logits, model(PROMPT, use_cache=False).logits)
    assert steps() == 0
