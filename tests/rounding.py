"""How far float32's rounding may move what a PyTorch model gives: tolerances that no machine happened to give.

Monte Carlo arithmetic (Parker 1997): in float64, every weight and everything that an operator gives is multiplied by
1 + 2^-24 ξ, ξ uniform in [-1, 1]. How far that moves the result is how far rounding may, on any processor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

#: Right results in float32 stay below 4 spreads, and the smallest fault that was planted is at 100.
MULTIPLE = 16
_HALF_ULP = 2.0**-24
_DRAWS = 4

Array = npt.NDArray[Any]
Function = Callable[..., Sequence[Tensor]]


class _Rounding(TorchDispatchMode):
    """Moves what every operator gives that computes anew by about half a unit in float32's last place."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views and what is written in place keep their values' places: their makers were moved already.
        if any(argument.alias_info is not None for argument in func._schema.arguments):
            return result
        parts = result if isinstance(result, (tuple, list)) else (result,)
        for part in parts:
            if isinstance(part, Tensor) and part.dtype == torch.float64:
                moved(part, self.generator)
        return result


def moved(value: Tensor, generator: torch.Generator) -> None:
    """Multiply each number by 1 + 2^-24 ξ, in place."""
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
    value.mul_(1 + _HALF_ULP * noise)


def exact(function: Function, module: nn.Module, *arrays: Array) -> tuple[list[Array], list[Array]]:
    """What a function of a module gives in float64, and how far rounding moves it.

    Args:
        function: (module, *tensors) → its results.
        module: of any precision; it is copied.
        arrays: what the function takes besides.

    Returns:
        The results in float64, and of each the distances from it, (draws, *shape).
    """
    double = copy.deepcopy(module).double()
    tensors = [torch.from_numpy(np.asarray(array, np.float64)) for array in arrays]
    draws = []
    with torch.no_grad():
        results = [result.numpy() for result in function(double, *tensors)]
        for draw in range(_DRAWS):
            generator = torch.Generator().manual_seed(draw)
            moving = copy.deepcopy(double)
            for weight in moving.parameters():
                moved(weight, generator)
            with _Rounding(generator):
                draws.append([result.numpy() for result in function(moving, *(t.clone() for t in tensors))])
    spreads = [np.stack([np.abs(found[i] - result) for found in draws]) for i, result in enumerate(results)]
    return results, spreads


def assert_near(found: Sequence[Array], function: Function, module: nn.Module, *arrays: Array) -> None:
    """Compare results in float32 with those of the module in float64, by what rounding explains.

    Both the worst number and the root mean square are compared: a place where the model divides by almost nothing makes
    the first blind, and hardly the second.
    """
    for index, (got, expected, spread) in enumerate(zip(found, *exact(function, module, *arrays), strict=True)):
        assert got.shape == expected.shape
        error = np.abs(got - expected)
        for name, size in (("worst", np.max), ("RMS", lambda values: np.sqrt(np.mean(values**2)))):
            share = float(size(error) / size(spread))
            assert share <= MULTIPLE, f"result {index}: {name} error of {share:.3g} spreads"  # NaN is not, either
