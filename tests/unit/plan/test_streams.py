"""The windows that a result is measured on."""

from __future__ import annotations

import pytest

from lowbit.plan.streams import stream_windows, watched_windows
from lowbit.recipes import recipe


@pytest.mark.parametrize(("tokens", "windows"), [(16, 8), (256, 8), (400, 5), (512, 4), (4096, 4)])
def test_as_many_windows_are_watched_as_hold_enough_tokens(tokens, windows):
    assert watched_windows(32, 0, tokens) == range(windows)
    assert watched_windows(32, 8, tokens) == range(32, 32 + windows)
    assert watched_windows(32, 1, tokens) == range(32, 33) and watched_windows(2, 0, tokens) == range(2)


def test_windows_that_nothing_is_measured_on_pass_through_no_block_unless_a_training_reads_them():
    rounded = stream_windows(recipe("gptq"), 32, 8, 512)
    assert rounded["quant"] == range(36) and rounded["fp"] == rounded["packed"] == range(32, 36)
    trained = stream_windows(recipe("omniquant"), 32, 8, 512)
    assert trained["fp"] == range(40)
