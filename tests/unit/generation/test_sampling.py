from __future__ import annotations

import pytest
import torch

from lowbit.generation import Sampling

LOGITS = torch.tensor([2.0, -1.0, 0.5, 2.0, -30.0, 1.0])
COUNT = 10_000


def drawn(sampling: Sampling, logits=LOGITS, count: int = COUNT) -> torch.Tensor:
    """How often each token comes for draws that divide 0 to 1 evenly."""
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _ = sampling.choose(logits.expand(count, -1), draws, torch.zeros(count, dtype=torch.bool))
    return tokens.bincount(minlength=len(logits))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_even_draws_give_every_token_its_share(temperature):
    wanted = (LOGITS.double() / temperature).softmax(-1) * COUNT
    assert (drawn(Sampling("sampled", temperature)) - wanted).abs().max() <= 1


def test_top_k_and_top_p_leave_the_likeliest_tokens_in_their_proportions():
    shares = LOGITS.double().softmax(-1)
    only = drawn(Sampling("sampled", top_k=2))
    assert only.nonzero().flatten().tolist() == [0, 3] and abs(int(only[0]) - COUNT // 2) <= 1
    assert shares[[0, 3]].sum() < 0.8 < shares[[0, 3, 5]].sum()
    nucleus = drawn(Sampling("sampled", top_p=0.8))
    wanted = shares[[0, 3, 5]] / shares[[0, 3, 5]].sum() * COUNT
    assert nucleus.nonzero().flatten().tolist() == [0, 3, 5]
    assert (nucleus[[0, 3, 5]] - wanted).abs().max() <= 1
    assert drawn(Sampling("sampled", top_p=1e-9)).nonzero().flatten().tolist() == [0]  # one token is always left


def test_a_draw_next_to_one_gives_no_token_without_probability():
    logits = torch.tensor([[0.0, 0.3, -float("inf"), -float("inf")]])
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    token, chance = Sampling("sampled").choose(logits, last, torch.tensor([False]))
    assert token.tolist() == [1] and chance.item() == logits.double().softmax(-1)[0, 1].item()


def test_the_probability_of_a_choice_is_the_models_own_whatever_it_was_drawn_from():
    sampling = Sampling("sampled", temperature=0.1, top_k=3, top_p=0.9)
    tokens, chances = sampling.choose(
        LOGITS[None].expand(4, -1), torch.rand(4).double(), torch.tensor([True, False] * 2)
    )
    assert tokens[0] == tokens[2] == LOGITS.argmax()
    assert torch.equal(chances, LOGITS.double().softmax(-1)[tokens])


def test_the_numbers_of_a_text_depend_on_the_seed_and_its_number_alone():
    def numbers(seed: int, text: int) -> list[float]:
        draw = Sampling(seed=seed).draws(text)
        return [draw() for _ in range(5)]

    assert numbers(1, 2) == numbers(1, 2) and len({tuple(numbers(s, t)) for s in range(3) for t in range(3)}) == 9
    assert numbers(0, 0)[0] == 0.8368042277695901  # the same on every machine and in every version


def test_hybrid_texts_are_greedy_up_to_prefixes_of_three_four_and_five_tokens_in_turn():
    assert [Sampling().greedy_tokens(turn) + 1 for turn in range(6)] == [3, 4, 5, 3, 4, 5]
    assert Sampling("sampled").greedy_tokens(2) == 0 and Sampling("greedy").greedy_tokens(2) > 10**9


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strategy": "best"}, "expected greedy, sampled, hybrid"),
        ({"temperature": 0.0}, "strategy greedy draws nothing"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_values_out_of_range_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**values)


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite; it cannot write"):
        Sampling().choose(torch.tensor([[0.0, float("nan")]]), torch.zeros(1).double(), torch.tensor([True]))
