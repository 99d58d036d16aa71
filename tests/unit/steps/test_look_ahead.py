"""Learning that looks ahead: the next original blocks, the loss behind them, and what that costs."""

import pytest
import torch

import lowbit
from lowbit.checkpoints.source import open_model
from lowbit.numerics import to_dict
from lowbit.plan.model_plan import plan_model
from lowbit.plan.peak import peak_parts, stream_tokens
from lowbit.recipes import Recipe, from_plain
from lowbit.scheme import linears, weight
from lowbit.solve import Nearest
from lowbit.stages.blockwise import Walk
from lowbit.stages.journal import Journal
from lowbit.steps import Ahead, BlockIO, BlockMSE, ClipShares, CrossBlockMAE, Learn, RotateResidual, Solve
from lowbit.steps.objectives import block_loss

from helpers import random_ids, tiny_llama


def learning(ahead, epochs=4, before=(), **options):
    learn = Learn((ClipShares(lr=0.05),), CrossBlockMAE(ahead, **options), epochs=epochs, amp=False)
    return Recipe.blockwise("ahead", linears(weight(3, 16)), (*before, learn, Solve(Nearest())))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny", blocks=4)


def test_the_loss_is_that_behind_the_block_and_that_behind_the_blocks_ahead():
    made = torch.Generator().manual_seed(0)
    output, y, z = (torch.randn(3, 5, 8, generator=made) for _ in range(3))
    ahead = Ahead(lambda hidden, first: 2 * hidden + first, z)
    io = BlockIO(y, y, lambda run, x: run(x), ahead=ahead)
    found = block_loss(CrossBlockMAE(2, weight=0.5), io, output[1:], 1)
    wanted = (output - y)[1:].abs().mean() + 0.5 * (2 * output + 1 - z)[1:].abs().mean()
    torch.testing.assert_close(found, wanted)
    near = block_loss(CrossBlockMAE(0), io, output[1:], 1)
    assert torch.equal(near, (output - y)[1:].abs().mean())
    io.ahead = None  # the last block
    assert torch.equal(block_loss(CrossBlockMAE(2), io, output[1:], 1), near)
    assert torch.equal(block_loss(BlockMSE(), io, output[1:], 1), (output - y)[1:].square().mean())


class Recording(Walk):
    """Keeps what each block was given to look ahead with."""

    def _ahead(self, i, calls):
        ahead = super()._ahead(i, calls)
        start = self.store["next"][: self.calibrated].clone()
        run = None if ahead is None else torch.cat([ahead.run(x[None], w) for w, x in enumerate(start)])
        self.kept = [*getattr(self, "kept", []), (ahead and ahead.y.clone(), run)]
        return ahead


def walked(model, recipe, path):
    checked = plan_model(model, recipe)
    journal = Journal(path / "out", {"test": 1})
    journal.open()
    walk = Recording(checked, random_ids(3, 24), journal)
    walk.run()
    walk.close()
    journal.close()
    return walk


@pytest.mark.parametrize("before", [(), (RotateResidual(),)])
def test_the_stream_ahead_is_the_original_models_and_ends_with_it(model, tmp_path, before):
    walk = walked(model, learning(2, 0, before), tmp_path)
    original = open_model(model).load_full().eval()
    seen = []
    for block in original.model.layers:
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for ids in random_ids(3, 24):
            original(ids[None])
    behind = [torch.cat(seen[i::4]) for i in range(4)]
    norms = [hidden.norm() for hidden in behind]
    for (y, run), at in zip(walk.kept, (2, 3, 3, None), strict=True):
        if at is None:
            assert y is None
            continue
        torch.testing.assert_close(run, y, atol=1e-4, rtol=1e-4)
        if not before:
            torch.testing.assert_close(y, behind[at], atol=1e-4, rtol=1e-4)
        assert y.norm() == pytest.approx(norms[at].item(), rel=1e-3)


def codes(model, recipe, out):
    result = lowbit.quantize(model, recipe, random_ids(3, 24), out=out, max_kl=50)
    loaded = lowbit.load(out)
    return result, {name: value for name, value in loaded.state_dict().items() if "codes" in name}


def test_looking_ahead_changes_what_is_learned(model, tmp_path):
    _, near = codes(model, learning(0), tmp_path / "near")
    _, far = codes(model, learning(2), tmp_path / "far")
    _, none = codes(model, learning(2, weight=0.0), tmp_path / "none")
    assert all(torch.equal(near[name], none[name]) for name in near)
    changed = {name for name in near if not torch.equal(near[name], far[name])}
    assert any(".0." in name for name in changed)


def test_blocks_ahead_are_left_as_they_were(model, tmp_path):
    """Learning nothing with blocks ahead gives the bytes of learning nothing without."""
    _, near = codes(model, learning(0, 0), tmp_path / "near")
    _, far = codes(model, learning(3, 0), tmp_path / "far")
    assert near.keys() == far.keys() and all(torch.equal(near[name], far[name]) for name in near)


def test_the_plan_counts_blocks_and_activations_ahead(model):
    near, far = (plan_model(model, learning(ahead)) for ahead in (0, 2))
    assert stream_tokens(far, 8, 32)[3] == 8 * 32 and stream_tokens(near, 8, 32)[3] == 0
    parts = [peak_parts(checked, 8, 32, 2**32)["block"]["step Learn"] for checked in (near, far)]
    block = sum(shape[0] * shape[1] for shape in near.blocks[0].shapes.values()) * 4
    assert parts[1] - parts[0] >= 2 * block


def test_recipes_say_how_far_they_look(model):
    recipe = learning(2)
    assert recipe.looks_ahead == 2 and learning(0).looks_ahead == 0
    assert from_plain(to_dict(recipe)) == recipe
    two = (Learn((ClipShares(),), CrossBlockMAE(1)), Learn((ClipShares(0.1),), CrossBlockMAE(2)), Solve(Nearest()))
    with pytest.raises(ValueError, match=r"one number of blocks, found \[1, 2\]"):
        Recipe.blockwise("both", linears(weight(3, 16)), two)
    with pytest.raises(ValueError, match="0 blocks or more ahead"):
        CrossBlockMAE(-1)


def test_an_interrupted_run_continues_to_the_same_codes(model, tmp_path):
    def interrupt(done, total, text):
        if done >= 2:
            raise KeyboardInterrupt

    recipe, ids = learning(2), random_ids(3, 24)
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize(model, recipe, ids, out=tmp_path / "twice", max_kl=50, progress=interrupt)
    _, once = codes(model, recipe, tmp_path / "once")
    _, twice = codes(model, recipe, tmp_path / "twice")
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)
