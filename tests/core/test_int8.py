"""Eight-bit weights: near the exact product, whatever the sizes."""

import pytest
import torch

from moshi_fl.models.int8 import linear


@pytest.mark.parametrize("width", [1, 7, 31, 33, 344])
def test_rows_that_fill_no_lane_are_not_read_past_their_end(width: int) -> None:
    torch.manual_seed(0)
    poison = torch.full((64, 4096), torch.nan)  # what lies behind small tensors in memory
    del poison
    weight = torch.randn(40, width)
    product = linear(weight, None, "int8")
    for _ in range(50):
        x = torch.randn(1, width)
        assert (product(x) - x @ weight.T).norm() < 0.05 * (1 + (x @ weight.T).norm())
