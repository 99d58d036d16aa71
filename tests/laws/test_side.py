"""The law of compiled side terms: every instruction set of this CPU adds what the term's float matrix would."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.kernels import native, side_terms
from lowbit.numerics import KeptColumns, LowRank, SideTerm, Sparse

from helpers import sqnr_db
from pairwise import cases

if not native.instruction_sets():
    pytest.skip("lowbit was installed without its compiled kernels", allow_module_level=True)

SETS = native.instruction_sets()
SHAPES = [(40, 129), (17, 33), (3, 5), (64, 256), (1, 1), (9, 1700)]
SHARES = {"sparse": 0.1, "full rows": 1.0, "no value": 0.0}
ROWS = [*SHARES, "kept columns", "one column", "most columns"]


def term_of(kind: str, shape: tuple[int, int]) -> SideTerm:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(shape, generator=generator)
    if kind in SHARES:
        return Sparse.of(w, torch.rand(shape, generator=generator) < SHARES[kind])
    if kind == "low rank":
        return LowRank.of(torch.randn(3, shape[1], generator=generator), torch.randn(shape[0], 3, generator=generator))
    count = {"one column": 1, "kept columns": max(1, shape[1] // 3), "most columns": max(1, shape[1] - 2)}[kind]
    index = torch.randperm(shape[1], generator=generator)[:count]
    return KeptColumns.of(w[:, index], index)


def exact(y: Tensor, x: Tensor, *terms: SideTerm) -> Tensor:
    shape = (y.shape[-1], x.shape[-1])
    return y.double() + sum(x.double() @ term.dense(shape).double().T for term in terms)


def by_rows(y: Tensor, x: Tensor, term: SideTerm, isa: str) -> Tensor:
    assert isinstance(term, Sparse | KeptColumns)
    native.add_rows(isa, x, y := y.clone(), side_terms.row_arguments(term))
    return y


@pytest.mark.parametrize(("shape", "kind", "isa"), cases(SHAPES, ROWS, SETS), ids=str)
def test_what_is_added_is_the_product_with_the_float_matrix_for_every_number_of_tokens(shape, kind, isa):
    term, generator = term_of(kind, shape), torch.Generator().manual_seed(2)
    floor = min(120, 20 * math.log10(2**24 / shape[1] ** 0.5))  # what rounding leaves of a float32 sum of so many terms
    for tokens in (0, 1, 2, 4, 5, 16, 17, 33):
        x, y = (torch.randn(tokens, size, generator=generator) for size in reversed(shape))
        found, wanted = by_rows(y, x, term, isa).double(), exact(y, x, term)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5 * shape[1] ** 0.5)
        # Beside what was there before, for the sum of the two may be next to nothing.
        assert (
            tokens == 0 or kind == "no value" or sqnr_db(*(torch.cat([y.double(), z]) for z in (wanted, found))) > floor
        )


@pytest.mark.parametrize(("kind", "dtype", "isa"), cases(ROWS, [torch.bfloat16, torch.float16], SETS), ids=str)
def test_half_width_inputs_are_multiplied_in_float32_and_rounded_once(kind, dtype, isa):
    term = term_of(kind, (40, 129))
    for tokens in (1, 3, 20):
        x, y = torch.randn(tokens, 129).to(dtype), torch.randn(tokens, 40).to(dtype)
        found, wanted = by_rows(y, x, term, isa), exact(y, x, term)
        torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kinds", [["sparse"], ["sparse", "kept columns", "low rank"]], ids=str)
def test_terms_of_a_layer_are_added_together_whatever_the_input_looks_like(kinds, isa):
    terms = tuple(term_of(kind, (40, 129)) for kind in kinds)
    x, y = torch.randn(129, 5, 2).permute(2, 1, 0), torch.randn(40, 5, 2).permute(2, 1, 0)
    wanted = exact(y, x, *terms)
    torch.testing.assert_close(side_terms.add(y.clone(), x, terms, isa).double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("kind", "tokens", "isa"), cases(["full rows", "most columns"], [2, 20], SETS))
def test_a_value_that_is_not_finite_stays_with_its_token(kind, tokens, isa):
    term = term_of(kind, (40, 129))
    x, y = torch.randn(tokens, 129), torch.randn(tokens, 40)
    clean = by_rows(y, x, term, isa)
    x[1] = float("nan")
    found = by_rows(y, x, term, isa)
    assert found[1].isnan().all() and torch.equal(found[0], clean[0]) and torch.equal(found[2:], clean[2:])


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_column_has_no_say_in_rows_that_do_not_hold_it(tokens, isa):
    w = torch.randn(20, 40)
    w[:, 0] = 0
    x = torch.randn(tokens, 40)
    x[:, 0] = float("inf")
    assert by_rows(torch.zeros(tokens, 20), x, Sparse.of(w, w != 0), isa).isfinite().all()


@pytest.mark.parametrize("kind", ROWS)
def test_the_number_of_threads_does_not_change_a_bit(kind):
    term, before = term_of(kind, (700, 600)), torch.get_num_threads()
    try:
        for tokens in (1, 33):
            x, y, found = torch.randn(tokens, 600), torch.randn(tokens, 700), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(by_rows(y, x, term, SETS[0]))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", SHARES)
def test_torch_accepts_the_operator(kind):
    term = term_of(kind, (40, 129))
    about = (torch.randn(3, 40), torch.randn(3, 129), *vars(term).values(), "")
    checks = torch.library.opcheck(torch.ops.lowbit.sparse_rows.default, about)
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", [*ROWS, "low rank"])
def test_gradients_and_float64_take_the_form_in_torch(kind):
    terms = (term_of(kind, (40, 129)),)
    x, y = torch.randn(3, 129, requires_grad=True), torch.randn(3, 40)
    (gradient,) = torch.autograd.grad(side_terms.add(y, x, terms).sum(), x)
    wanted = terms[0].dense((40, 129)).sum(0)
    torch.testing.assert_close(gradient, wanted.expand(3, -1), rtol=1e-5, atol=1e-4)
    x, y = x.detach().double(), y.double()
    torch.testing.assert_close(side_terms.add(y, x, terms), exact(y, x, *terms), rtol=1e-5, atol=1e-5)


def test_what_is_not_as_it_is_stored_is_not_read():
    term = term_of("sparse", (40, 129))
    assert isinstance(term, Sparse) and side_terms.why_not(term) is None
    wide = Sparse(term.row_start, term.column, term.value.float())
    for other in (
        wide,
        Sparse(term.row_start.long(), term.column, term.value),
        Sparse(term.row_start, term.column.long(), term.value),
        KeptColumns(torch.tensor([3]), torch.ones(40, 1, dtype=torch.float16)),
    ):
        assert "not as it is stored" in (side_terms.why_not(other) or "")
    x, y = torch.randn(3, 129), torch.randn(3, 40)
    torch.testing.assert_close(side_terms.add(y.clone(), x, (wide,)).double(), exact(y, x, term), rtol=1e-5, atol=1e-4)
    assert "LowRank" in (side_terms.why_not(term_of("low rank", (40, 129))) or "")
