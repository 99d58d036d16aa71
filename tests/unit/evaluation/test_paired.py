"""Intervals and tests of scores over items, against values that were computed by hand or are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lowbit.evaluation.paired import TaskScore, against, mcnemar, metric_of, paired, perplexity_of, wilson


def test_the_standard_error_is_lm_evals_of_a_mean():
    metric = metric_of("acc", [1, 1, 0, 1])
    assert metric.value == 0.75 and metric.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert metric_of("acc", [1]).stderr is None


def test_wilsons_interval_is_the_published_example_and_stays_inside_0_and_1():
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)  # Newcombe 1998, method 3, 15 of 148
    low, high = wilson(0, 20)
    assert low == 0 and high == pytest.approx(0.1611, abs=1e-4)
    assert wilson(20, 20)[1] == 1.0


def test_mcnemars_exact_test_is_the_binomial_test_of_the_changed_items():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 2**12)


def test_changes_are_listed_both_ways_and_the_interval_is_bonett_and_prices():
    found = paired(metric_of("acc", [1, 0, 1, 1, 0, 1]), metric_of("acc", [1, 1, 0, 0, 0, 1]))
    assert (found.lost, found.gained, found.original) == ((1,), (2, 3), 0.5)
    assert found.difference == pytest.approx(1 / 6)
    less, more = 2 / 8, 3 / 8
    half = 1.959964 * math.sqrt((less + more - (more - less) ** 2) / 8)
    assert found.interval == pytest.approx((more - less - half, more - less + half), abs=1e-5)


def test_equal_answers_leave_an_interval_that_is_no_point():
    same = metric_of("acc", [1, 0] * 50)
    low, high = paired(same, same).interval or (0, 0)
    assert low == pytest.approx(-high) and 0.01 < high < 0.05


def test_perplexity_compares_log_likelihoods():
    ours, theirs = perplexity_of("perplexity", [-1.0, -3.0, -2.5]), perplexity_of("perplexity", [-1.0, -2.0, -2.0])
    assert ours.value == pytest.approx(math.exp(6.5 / 3))
    found = paired(ours, theirs)
    assert found.difference == pytest.approx(-0.5) and found.p_value is None and found.lost == ()


def test_scores_of_other_items_are_not_compared():
    score = TaskScore("piqa", "p", 2, "abc", (metric_of("acc", [1, 0]),))
    assert against(score, score).metrics[0].against is not None
    with pytest.raises(ValueError, match="answered different items"):
        against(score, replace(score, sha256="def"))


def test_perplexity_of_nan_is_nan_and_one_beyond_a_float_is_infinite():
    assert all(math.isnan(perplexity_of("perplexity", values).value) for values in ([math.nan], [-1.0, math.nan]))
    assert perplexity_of("perplexity", [-800.0]).value == perplexity_of("perplexity", [-math.inf]).value == math.inf
    assert perplexity_of("perplexity", [-705.0]).value == pytest.approx(math.exp(705))


def test_an_original_that_gave_nan_is_no_measure():
    score = TaskScore("piqa", "p", 2, "abc", (metric_of("acc", [1, 0]),))
    with pytest.raises(ValueError, match="original model gave NaN for 1 of 2 items: check its files"):
        against(score, replace(score, broken=1))
    assert against(replace(score, broken=1), score).broken == 1


def test_a_score_as_plain_data_has_ones_and_zeros():
    data = TaskScore("piqa", "p", 2, "abc", (metric_of("acc", [True, False]),)).to_dict()
    assert data["metrics"]["acc"]["values"] == [1, 0] and data["metrics"]["acc"]["against"] is None
