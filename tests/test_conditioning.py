"""The spread of perturbed runs is as large as float32's deviation, whatever the layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vae_export.certification.rounding import UNIT, Perturbed
from vae_export.certification.tolerances import SPREADS

pytestmark = pytest.mark.quick

DRAWS = 3
#: Right results are to stay within half of what is tolerated.
_BEYOND = SPREADS / 2


def spread(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """The largest deviation of some perturbed runs, and that of float32, both from float64."""
    with torch.no_grad():
        exact = function(x.double())
        moved = []
        for seed in range(DRAWS):
            with Perturbed(seed):
                moved.append(float((function(x.double()) - exact).abs().max()))
        return max(moved), float((function(x).double() - exact).abs().max())


NORMS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "group, one value": (lambda x: nn.functional.group_norm(x, 8), (16, 8, 1, 1)),
    "group, two values": (lambda x: nn.functional.group_norm(x, 8), (16, 8, 1, 2)),
    "group, many values": (lambda x: nn.functional.group_norm(x, 2), (4, 8, 9, 7)),
    "group, weighted": (
        lambda x: nn.functional.group_norm(x, 4, torch.arange(8).to(x), torch.arange(8).to(x)),
        (4, 8, 3, 3),
    ),
    "instance": (lambda x: nn.functional.instance_norm(x), (4, 8, 3, 3)),
    "layer": (lambda x: nn.functional.layer_norm(x, (8,)), (4, 5, 8)),
    "layer, two dimensions": (
        lambda x: nn.functional.layer_norm(x, (5, 8), torch.arange(40).view(5, 8).to(x)),
        (4, 5, 8),
    ),
    "batch": (
        lambda x: nn.functional.batch_norm(x, torch.arange(8).to(x), 1 + torch.arange(8).to(x), training=False),
        (4, 8, 3, 3),
    ),
}


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("kind", NORMS)
def test_norms(kind: str, offset: float) -> None:
    """The mean that is subtracted counts, however large it is beside the difference."""
    norm, shape = NORMS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset
    moved, single = spread(norm, x)
    assert single <= _BEYOND * moved


def test_a_norm_of_one_value_rounds_in_units_of_its_mean() -> None:
    """In exact arithmetic the result is 0, in float32 it is not, and perturbed runs show it."""
    x = 100 + torch.rand(64, 8, 1, 1, generator=torch.Generator().manual_seed(1))
    moved, _ = spread(lambda x: nn.functional.group_norm(x, 8, eps=1e-6), x)
    in_units = 100 / 1e-6**0.5 * UNIT
    assert 0.1 * in_units < moved < 4 * in_units
    near, _ = spread(lambda x: nn.functional.group_norm(x - 100, 8, eps=1e-6), x)
    assert near < 0.1 * moved
