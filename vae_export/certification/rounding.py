"""How far float32 rounding can move a model's results: Monte Carlo arithmetic in float64.

A perturbed run multiplies every weight, and every result of an operation that rounds, by 1 + u ξ, where u = 2^-24 is
half a unit in float32's last place and ξ is uniform in [−1, 1] (Parker 1997, Monte Carlo Arithmetic). Products that are
summed over K terms round at every partial sum as well: by a random walk of ACCUMULATED · √K · u times the sums' root
mean square, one part independent in each value and one that all positions of a channel share, as they do where
neighbours are nearly equal. The constant was chosen by measurement, so that the deviations of oneDNN, ONNX Runtime and
OpenVINO, relative to this, do not grow with K (docs/certificate.md).

A norm subtracts a mean, which may be much larger than the difference: kernels that subtract after scaling, as
x·s − m·s, round in units of m·s. Where one pixel or a few are normalized that is the larger part.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

#: Half a unit in the last place of float32.
UNIT = 2.0**-24
#: See the module's docstring.
ACCUMULATED = 0.2

#: Operations whose results are exact: they select, copy or order values.
_EXACT = {
    "abs", "abs_", "amax", "amin", "argmax", "argmin", "arange", "cat", "ceil", "clamp", "clamp_", "clamp_max",
    "clamp_min", "clone", "constant_pad_nd", "copy", "copy_", "detach", "empty", "empty_like", "eq", "fill", "fill_",
    "flip", "floor", "full", "full_like", "gather", "ge", "gt", "hardtanh", "hardtanh_", "index", "index_put",
    "index_select", "le", "lift_fresh", "lt", "masked_fill", "masked_fill_", "max", "max_pool2d_with_indices",
    "maximum", "min", "minimum", "ne", "neg", "neg_", "new_empty", "new_full", "new_ones", "new_zeros", "ones",
    "ones_like", "pixel_shuffle", "pixel_unshuffle", "reflection_pad1d", "reflection_pad2d", "relu", "relu_",
    "repeat", "replication_pad2d", "roll", "round", "scalar_tensor", "sign", "slice", "slice_scatter", "select",
    "stack", "threshold", "threshold_", "tril", "triu", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "where", "zero_", "zeros", "zeros_like", "_to_copy", "_upsample_nearest_exact2d",
}  # fmt: skip
#: Operations that return a result, means and inverse deviations.
_NORMS = {"native_batch_norm", "native_group_norm", "native_layer_norm"}
#: The size of the pool of random numbers, from which a tensor takes a slice at a random offset.
_POOL = 1 << 21


class Perturbed(TorchDispatchMode):
    """Perturbs the results of float64 operations while it is active."""

    def __init__(self, seed: int) -> None:
        """Generate the noise.

        Args:
            seed: equal seeds and equal operations give equal results.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)
        self._noise = _uniform(_POOL, self._generator)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _EXACT or func.is_view:
            return result
        inputs = {value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)}
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        if name in _NORMS and outputs[1].numel():  # a batch norm outside of training has no statistics
            self._round(*_centred(name, args, outputs))
        for value in outputs[:1] if "norm" in name else outputs:  # a norm's other outputs are its statistics
            rounded = isinstance(value, Tensor) and value.dtype == torch.float64 and value.numel()
            if rounded and (name.endswith("_") or value.untyped_storage()._cdata not in inputs):
                self._perturb(value, _summed(name, args))
        return result

    def perturb(self, value: Tensor) -> None:
        """Perturb a weight, in place."""
        self._perturb(value, 0)

    def _perturb(self, value: Tensor, terms: int) -> None:
        if not value.is_contiguous():
            copied = value.contiguous()
            self._perturb(copied, terms)
            value.copy_(copied)
            return
        if not terms or value.ndim < 2:
            for part in value.view(-1).split(_POOL // 2):
                part.addcmul_(part, self._drawn(len(part)))
            return
        sizes = ACCUMULATED * math.sqrt(terms) * value.flatten(1).square().mean(dim=1).sqrt()
        self._round(value.view(*value.shape[:2], -1), sizes.view(-1, 1, 1))
        self._perturb(value, 0)

    def _round(self, value: Tensor, sizes: Tensor) -> None:
        """Add noise of some sizes to (B, C, n): to each value its own, and what all n share."""
        batch, channels, count = value.shape
        sizes = sizes.expand(batch, channels, 1)
        step = max(1, _POOL // 2 // count)
        for row, size in zip(value, sizes, strict=True):
            for part, each in zip(row.split(step), size.split(step), strict=True):
                part.addcmul_(each, self._drawn(part.numel()).view(part.shape))
        if count > 1:
            value.addcmul_(sizes, self._drawn(batch * channels).view(batch, channels, 1))

    def _drawn(self, count: int) -> Tensor:
        """So many values of the noise."""
        if count <= _POOL // 2:
            first = int(torch.randint(_POOL - count + 1, (), generator=self._generator))
            return self._noise[first : first + count]
        return torch.cat([self._drawn(min(_POOL // 2, count - first)) for first in range(0, count, _POOL // 2)])


def perturb_weights(module: nn.Module, exact: nn.Module, noise: Perturbed) -> None:
    """Copy the weights of `exact` into a module of the same class, perturbed. Both are in float64."""
    with torch.no_grad():
        for mine, theirs in zip(_weights(module), _weights(exact), strict=True):
            mine.copy_(theirs)
            noise.perturb(mine)


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1) * UNIT


def _centred(name: str, args: Any, outputs: Any) -> tuple[Tensor, Tensor]:
    """The result of a norm as (B, C, n), and the mean that it subtracted, in the result's units, (B, C, 1)."""
    result, mean, scale = outputs[:3]
    sizes, weight = (mean * scale).abs(), args[2 if name == "native_layer_norm" else 1]
    if name == "native_layer_norm":
        sizes = sizes.reshape(1, -1, 1)
        typical = 1.0 if weight is None else weight.abs().mean()
        return result.view(1, sizes.shape[1], -1), sizes * typical
    channels = result.shape[1]
    sizes = sizes.view(-1 if name == "native_group_norm" else 1, mean.shape[-1])
    sizes = sizes.repeat_interleave(channels // sizes.shape[1], dim=1)
    if weight is not None:
        sizes = sizes * weight.abs()
    return result.view(len(result), channels, -1), sizes[:, :, None]


def _summed(name: str, args: Any) -> int:
    """The number of products that each value of the result sums; 0 for operations that are not matrix products."""
    if name == "convolution":
        weight, stride, transposed, groups = args[1], args[3], args[6], args[8]
        if not transposed:
            return int(math.prod(weight.shape[1:]))
        return max(1, int(len(weight) // groups * math.prod(weight.shape[2:]) // math.prod(stride)))
    if name in ("mm", "bmm"):
        return int(args[0].shape[-1])
    if name in ("addmm", "baddbmm"):
        return int(args[1].shape[-1])
    if "scaled_dot_product" in name:
        return int(args[0].shape[-1])
    return 0
