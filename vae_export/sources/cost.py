"""The cost of one example: multiply-adds, and the peak bytes of intermediate results, counted on fake tensors."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vae_export.contract.model import Cost, Model
from vae_export.sources.protocol import Decoder, Encoder, Trained


def count(source: Trained) -> dict[str, Cost]:
    """The cost of a model's encoder and decoder.

    With named sizes it is counted at three of them, which determine the polynomial of `Cost`.
    """
    model = source.model
    named = model.data.named()
    base = source.sizes()
    counted_sizes = [
        {name: dim.multiple_of * math.ceil(times * base[name] / dim.multiple_of) for name, dim in named.items()}
        for times in ((1, 2, 3) if named else (1,))
    ]
    counted = [_at(source.module, model, sizes) for sizes in counted_sizes]
    costs = {}
    for graph in ("encoder", "decoder"):
        pixels = [math.prod(sizes.values()) if sizes else 0 for sizes in counted_sizes]
        multiply_adds, activations = (_polynomial(pixels, [values[graph][i] for values in counted]) for i in range(2))
        costs[graph] = Cost(multiply_adds=multiply_adds, activations=activations)
    return costs


def _at(module: nn.Module, model: Model, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """(multiply-adds, bytes) of each graph for one example of these sizes."""
    costs = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for wrapper, graph in ((Encoder, "encoder"), (Decoder, "decoder")):
            whole = wrapper(module, model)
            weights: dict[str, Tensor] = {
                name: fake.from_tensor(value) for name, value in whole.state_dict(keep_vars=True).items()
            }
            value = torch.empty(model.tensor_shape(model.signature(graph)[0][0], 1, sizes))
            with torch.no_grad(), FlopCounterMode(display=False) as flops, _LiveBytes() as live:
                functional_call(whole, weights, (value,))
            costs[graph] = (flops.get_total_flops() // 2, live.peak)
    return costs


class _LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensors that are created in this mode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func.__name__:
            # Exported, its weights (batch, heads, queries, keys) are a tensor, and so are the scores before softmax.
            query, key = args[0], args[1]
            weights = query.numel() // query.shape[-1] * key.shape[-2] * query.element_size()
            self.peak = max(self.peak, self.now + 2 * weights)
        values = result if isinstance(result, (tuple, list)) else (result,)
        # A result that aliases an argument, such as a view of a weight, has no memory of its own.
        aliases = any(returned.alias_info is not None for returned in func._schema.returns)
        for value in () if aliases else values:
            if isinstance(value, Tensor):
                self._hold(value.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _polynomial(pixels: list[int], values: list[int]) -> tuple[float, float, float]:
    """c0, c1, c2 of c0 + c1 · p + c2 · p² through the values; negative coefficients become 0."""
    if len(values) == 1:
        return float(values[0]), 0.0, 0.0
    constant, linear, square = np.linalg.solve(np.vander(np.asarray(pixels, float), 3, increasing=True), values)
    return max(0.0, float(constant)), max(0.0, float(linear)), max(0.0, float(square))
