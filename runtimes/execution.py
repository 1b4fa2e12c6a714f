"""How a call of a graph is cut to fit: slices of the batch, a memory budget, and tiles."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from vae_export.contract.manifest import Tiled
from vae_export.contract.model import GRAPHS, Model
from vae_export.errors import InputError, check_flags
from vae_export.numerics import noise
from vae_export.numerics.noise import Normals
from vae_export.runtimes import memory
from vae_export.runtimes.backend import Array, Backend, DeviceBackend, Value, result_shape, slices
from vae_export.runtimes.inputs import check_count
from vae_export.runtimes.memory import Budget
from vae_export.runtimes.tiling import Axis, Seams, Tile, grid, run_tiled


class Execution:
    """Runs a model's graphs on a backend, each call in slices and tiles that fit. Arguments: see `VAE`."""

    def __init__(
        self, model: Model, backend: Backend, micro_batch: int, budget: Budget | None, tiled: Mapping[str, Tiled]
    ) -> None:
        self._model = model
        self._backend = backend
        self._micro_batch = micro_batch
        self._budget = budget
        self.seams = Seams(tiled)
        # The shape of a graph's results for one example, where it is the same in every call.
        self._shapes = {} if model.data.named() else {graph: result_shape(model, graph, {}) for graph in backend.graphs}

    def result_shape(self, graph: str, example: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a graph's results for one example of its first input."""
        shape = self._shapes.get(graph)
        return result_shape(self._model, graph, self._model.input_sizes(graph, example)) if shape is None else shape

    def has_fused(self, graph: str, example: tuple[int, ...]) -> bool:
        """Whether the backend has a fused graph, and max_memory admits one example of its first input."""
        return graph in self._backend.graphs and (
            self._budget is None or self._budget.rows(graph, self._model.input_sizes(graph, example)) > 0
        )

    def prior(
        self, verb: str, n: int, seed: int, start: int, size: Mapping[str, int] | None, on_device: bool, out: Any
    ) -> Normals:
        """The address of n latents of the prior. Arguments and errors: see `VAE.sample`."""
        check_flags(verb, on_device=on_device)
        n = check_count(verb, "n", n, 1)
        start = check_count(verb, "start", start, 0)
        if on_device and not self._backend.on_gpu:
            raise InputError(f"{verb}: on_device is for a GPU, and this VAE runs on the CPU. Drop it")
        if on_device and out is not None:
            raise InputError(
                f"{verb}: out is an array of the host, and on_device leaves the result on the GPU. Drop one"
            )
        latent = self._model.latent_shape(size)
        itemsize = 1 if verb == "generate" and "generate" in self._backend.graphs else 4
        needed, available = itemsize * n * math.prod(self.result_shape("decoder", latent)), memory.of_this_machine()
        if out is None and not on_device and needed > available:
            raise InputError(
                f"{verb}: {n:,} examples take {needed / 2**30:,.0f} GiB, and this machine has "
                f"{available / 2**30:,.0f} GiB. Draw them in parts, by start"
            )
        return Normals(seed, noise.PRIOR, start, (n, *latent))

    def rows(self, example: tuple[int, ...], *graphs: str) -> int:
        """How many examples of the first graph's input may go through these graphs, untiled; InputError if none."""
        if self._budget is None:
            return self._micro_batch
        sizes = self._model.input_sizes(graphs[0], example)
        return min(self._micro_batch, *(self._budget.at_least_one(graph, sizes) for graph in graphs))

    def run(
        self,
        graph: str,
        inputs: Mapping[str, Value],
        outputs: Sequence[str],
        on_device: bool = False,
        tile: Tile | None = None,
        rows: int = 0,
        out: npt.NDArray[Any] | None = None,
    ) -> list[Any]:
        """As `Backend.run`, cut by `tile` or, without one, as max_memory requires; with `rows`, that many examples run
        at once, untiled. InputError: the tile does not suit the model, or max_memory admits not even a tile.
        """
        first = next(iter(inputs.values()))
        n, *rest = first.shape
        example = tuple(rest)
        if not rows:
            rows, axes = self._plan(graph, example, tile)
            if axes:
                return self._tiled(graph, first, outputs, rows, axes, on_device, out)
        with (
            self._budget.held(graph, self._model.input_sizes(graph, example), min(rows, n))
            if self._budget
            else contextlib.nullcontext()
        ):
            if on_device:
                return cast(DeviceBackend, self._backend).run(graph, inputs, outputs, rows, on_device=True)
            return self._backend.run(graph, inputs, outputs, rows, out=None if out is None else (out,))

    def warm(self, graph: str, n: int, sizes: Mapping[str, int]) -> None:
        """Run a graph once, if a method of `VAE` would run it: a single tile of it where max_memory requires tiles."""
        model = self._model
        inputs, outputs = model.signature(graph)
        example = model.tensor_shape(inputs[0], n, sizes)[1:]
        if graph not in GRAPHS and not self.has_fused(graph, example):
            return
        rows, axes = self._plan(graph, example, None)
        if axes:
            sizes = model.input_sizes(graph, _largest_tile(example, axes))
        low, high = model.data.range
        arrays: dict[str, Value] = {}
        for tensor in inputs:
            shape = model.tensor_shape(tensor, n, sizes)
            stream = noise.POSTERIOR if tensor.name == "eps" else noise.PRIOR
            arrays[tensor.name] = Normals(0, stream, 0, shape)
            if tensor.name == "x":  # constant data may take other paths through caches and kernels
                uniform = noise.uniforms(0, noise.PRIOR, 0, n, math.prod(shape[1:]))
                arrays["x"] = (low + (high - low) * uniform).astype(np.float32).reshape(shape)
        self._backend.warm(graph, arrays, [tensor.name for tensor in outputs], rows)

    def _plan(self, graph: str, example: tuple[int, ...], tile: Tile | None) -> tuple[int, tuple[Axis, Axis] | None]:
        """How many examples go through a graph at once, and the tiles of each: for `tile`, or for max_memory."""
        if self._budget is None:
            return self._micro_batch, grid(self._model, graph, example, tile) if tile else None
        sizes = self._model.input_sizes(graph, example)
        if tile is None:
            if rows := self._budget.rows(graph, sizes):
                return min(rows, self._micro_batch), None
            tile = self._budget.tile(graph, sizes)
        axes = grid(self._model, graph, example, tile)
        if axes:
            sizes = self._model.input_sizes(graph, _largest_tile(example, axes))
        return min(max(1, self._budget.rows(graph, sizes)), self._micro_batch), axes

    def _tiled(
        self,
        graph: str,
        value: Array | Normals,
        outputs: Sequence[str],
        rows: int,
        axes: tuple[Axis, Axis],
        on_device: bool,
        out: Array | None,
    ) -> list[Any]:
        if on_device:
            raise InputError(
                f"max_memory holds no example of this size in the {graph}, and tiles are joined on the host. Pass "
                "NumPy arrays and drop on_device, or load with a larger max_memory"
            )
        self.seams.warn(graph)

        def run(tile: Array) -> list[Any]:
            return self.run(graph, {name: tile}, outputs, rows=rows)

        (name,) = (tensor.name for tensor in self._model.signature(graph)[0])
        shape = (len(value), *self.result_shape(graph, value.shape[1:]))
        results = [np.empty(shape, np.float32) for _ in outputs] if out is None else [out]
        for part in slices(len(value), rows):
            whole = value[part]
            examples = whole.numpy() if isinstance(whole, Normals) else whole
            run_tiled(run, examples, *axes, tuple(result[part] for result in results))
        return results


def _largest_tile(example: tuple[int, ...], axes: tuple[Axis, Axis]) -> tuple[int, ...]:
    return (example[0], *(axis.parts[0] for axis in axes))
