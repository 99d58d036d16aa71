"""WKVQuant: what is learned of a cache is what its checkpoint carries and its decoding reads."""

from dataclasses import replace

import pytest
import torch

import lowbit
from lowbit.architectures import observed
from lowbit.caches import PackedLayer
from lowbit.decoding import cache_argument
from lowbit.decoding.packed_cache import simulated_cache
from lowbit.modules import KVSpec, LinearFormat, cache_calibration, kv_formats
from lowbit.numerics import Int, PerGroup, PerToken, Spec
from lowbit.plan.model_plan import plan_model
from lowbit.recipes import Recipe
from lowbit.scheme import attention, linears, weight
from lowbit.solve import Nearest
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Journal
from lowbit.steps import BlockState, CacheCoordinates, ClipShares, CrossBlockMAE, Learn, Solve

from helpers import first_block, random_ids, tiny_llama

FOUR = Spec(Int(4, zero="real"), PerGroup(128))
FORM = KVSpec(FOUR, FOUR, key_scaled=True, key_shifted=True, value_scaled=True, value_shifted=True)
BUFFERS = {"key_scale", "key_shift", "value_scale", "value_shift"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny", blocks=3, initializer_range=0.1)


def quantized(model, out, **options):
    recipe = lowbit.recipe("wkvquant", **{"group_size": 32, "epochs": 3, "ahead": 1, **options})
    result = lowbit.quantize(model, recipe, random_ids(4, 32), out=out, max_kl=50)
    return result, lowbit.load(out)


@pytest.fixture(scope="module")
def learned(model, tmp_path_factory):
    return quantized(model, tmp_path_factory.mktemp("learned") / "out")


def state_of(model, form=FORM, **changes):
    block, resolved, io = first_block(model)
    formats = {path: LinearFormat(weight(4, 32)) for path in resolved.linears}
    layer = PackedLayer(form, frequencies=10000.0 ** -(torch.arange(8) / 8) if form.before_rope else None)
    return BlockState.of("", block, resolved, formats, io, caches={"self_attn": layer}, **changes)


def token_by_token(model, ids, cache):
    name = cache_argument(model)
    with torch.no_grad():
        return torch.cat([model(ids[:, t : t + 1], **{name: cache}).logits for t in range(ids.shape[1])], 1)


def test_a_checkpoint_carries_what_was_learned(learned):
    _, loaded = learned
    for layer in loaded.model.layers:
        found = cache_calibration(layer.self_attn)
        assert found is not None and set(found.spec.buffers) == BUFFERS
        assert all(found.get_buffer(name).shape == (2, 16) for name in BUFFERS)
        assert all(not torch.equal(found.get_buffer(name), torch.ones(2, 16)) for name in BUFFERS)
    formats = kv_formats(loaded)
    assert formats.kv == FORM
    key = lowbit.kv_cache(loaded, FORM).layers[1].key_side.coordinates
    assert torch.equal(key.scale[:, 0], cache_calibration(loaded.model.layers[1].self_attn).key_scale)


def test_decoding_reads_the_cache_that_was_simulated(learned):
    _, loaded = learned
    ids = random_ids(1, 40, seed=5)
    wanted = token_by_token(loaded, ids, lowbit.kv_cache(loaded, FORM))
    with torch.no_grad(), simulated_cache(loaded, kv_formats(loaded)):
        found = loaded(ids).logits
    exact = loaded(ids).logits
    assert (found - wanted).norm() < 0.02 * (exact - wanted).norm()  # a product in another order may move a code


def test_learning_starts_from_the_channels_middle_and_the_root_of_their_reach(model):
    state = state_of(model)
    keys = []
    with observed(state.block.self_attn, lambda _, key, *others: keys.append(key)):
        for i in range(len(state.io)):
            state.io.run(state.block, state.io.window(i), i)
    key_GND = torch.cat(keys).transpose(0, 1).flatten(1, 2)
    low, high = key_GND.amin(1), key_GND.amax(1)
    CacheCoordinates().make(state, {}).commit(state)
    found = cache_calibration(state.block.self_attn)
    torch.testing.assert_close(found.key_shift, (low + high) / 2)
    root = ((high - low) / 2).sqrt()
    torch.testing.assert_close(found.key_scale, root / root.log().mean(1, keepdim=True).exp())


def test_dead_channels_keep_their_scale(model):
    state = state_of(model)
    with torch.no_grad():
        state.block.self_attn.v_proj.weight[5] = 0
    CacheCoordinates().make(state, {}).commit(state)
    found = cache_calibration(state.block.self_attn)
    assert found.value_scale[0, 5] == 1 and found.value_shift[0, 5] == 0
    assert found.value_scale.isfinite().all() and found.key_scale.isfinite().all()


class Watching(Learn):
    """Keeps the loss of all windows at the end."""

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)

    def _descend(self, state, maps, *rest):
        super()._descend(state, maps, *rest)
        base = {name: p.detach() for name, p in state.block.named_parameters()}
        with torch.no_grad():
            picks = (slice(i, i + 1) for i in range(len(state.io)))
            self.loss = sum(self._loss(state, base, maps, pick).item() for pick in picks)


def watched(state, epochs):
    step = Watching((ClipShares(lr=0.002), CacheCoordinates(lr=0.002)), CrossBlockMAE(0), epochs=epochs, amp=False)
    step.run(state)
    return step.loss


def test_learning_lowers_the_blocks_own_loss(model):
    """Slowly: at ten times this rate the end depends on the last bits of every product."""
    assert watched(state_of(model), 16) < 0.95 * watched(state_of(model), 0)


def test_a_cache_without_coordinates_is_simulated_as_it_is(model):
    coarse = state_of(model, KVSpec(Spec(Int(2, zero="real"), PerToken()), None, recent=4))
    exact = state_of(model, KVSpec(None, None))
    assert watched(coarse, 0) > 1.1 * watched(exact, 0)
    assert cache_calibration(coarse.block.self_attn) is None


def test_keys_before_the_rotary_embedding_are_learned_there(model):
    turned = replace(FORM, before_rope=True)
    after, before = state_of(model), state_of(model, turned)
    for state in (after, before):
        CacheCoordinates().make(state, {}).commit(state)
    a, b = (cache_calibration(state.block.self_attn) for state in (after, before))
    assert not torch.allclose(a.key_shift, b.key_shift, atol=1e-3)
    assert torch.equal(a.value_shift, b.value_shift)


def test_without_a_cache_nothing_is_learned_of_it_and_the_report_says_so(model):
    state = state_of(model)
    state.context.caches.clear()
    Learn((CacheCoordinates(),), CrossBlockMAE(0), epochs=1, amp=False).run(state)
    assert any("none is simulated" in note for note in state.notes)


def test_what_cannot_be_simulated_is_refused_before_work(model):
    steps = (Learn((ClipShares(), CacheCoordinates()), CrossBlockMAE(0)), Solve(Nearest()))
    scheme = replace(linears(weight(4, 32), attention=attention(8)), kv=FORM)
    with pytest.raises(ValueError, match="not simulated together"):
        Recipe.blockwise("both", scheme, steps)
    learned = replace(FORM, key_rotation="learned")
    with pytest.raises(ValueError, match="key_rotation"):
        Recipe.blockwise("rotated", replace(linears(weight(4, 32)), kv=learned), steps)
    with pytest.raises(ValueError, match="have none after the first"):
        CacheCoordinates(skip_first=32).make(state_of(model), {})


def test_an_interrupted_run_continues_to_the_same_bytes(model, learned, tmp_path):
    def interrupt(done, total, text):
        if done >= 1.5:
            raise KeyboardInterrupt

    recipe = lowbit.recipe("wkvquant", group_size=32, epochs=3, ahead=1)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(model, recipe, random_ids(4, 32), out=tmp_path / "out", max_kl=50, progress=interrupt)
    _, again = quantized(model, tmp_path / "out")
    once, twice = learned[1].state_dict(), again.state_dict()
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)


def test_later_blocks_learn_from_what_earlier_ones_compute_with_their_cache(model, learned, tmp_path):
    """The quantized stream behind the last block is what the finished model makes of its cache."""
    journal = Journal(tmp_path / "out", {"test": 1})
    journal.open()
    walk = Walk(plan_model(model, learned[0].recipe), random_ids(4, 32), journal)
    walk.run()
    stream = torch.cat([walk.hidden("quant", w) for w in walk.watched])
    walk.close()
    journal.close()
    loaded, seen = learned[1], []
    loaded.model.layers[-1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad(), simulated_cache(loaded, kv_formats(loaded)):
        loaded(random_ids(4, 32))
    with torch.no_grad():
        loaded(random_ids(4, 32))
    cached, exact = seen
    assert (stream - cached).norm() < 0.1 * (exact - cached).norm()


def test_sixteen_bits_leave_the_cache_as_it_is():
    recipe = lowbit.recipe("wkvquant", kv_bits=16)
    assert not recipe.scheme.cache and not recipe.simulates_cache and recipe.looks_ahead == 5
