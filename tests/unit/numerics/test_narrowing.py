"""What is looked for in floats before they are used."""

from __future__ import annotations

import pytest
import torch

from lowbit.numerics import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_one_value_that_is_no_number_is_found_wherever_it_is(dtype):
    x = torch.linspace(-3, 3, 7 * 33).view(7, 33)
    assert all_finite(x.to(dtype)) and all_finite(x[:0].to(dtype))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for at in ((0, 0), (3, 16), (6, 32)):
            broken = x.clone()
            broken[at] = bad
            found = broken.to(dtype)  # float8 has no infinity
            assert all_finite(found) == bool(found.float().isfinite().all()), (bad, at)
    assert not all_finite(torch.full_like(x, torch.nan).to(dtype))
