"""What a VAE holds while it is open: it is described, warmed up, pickled and closed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from vae_export.contract.manifest import Tiled
from vae_export.contract.model import DECODER_OUTPUTS, ENCODER_OUTPUTS, Model, shape_text
from vae_export.errors import InputError
from vae_export.runtimes.backend import Backend
from vae_export.runtimes.execution import Execution
from vae_export.runtimes.inputs import ArrayCheck, check_count
from vae_export.runtimes.memory import Budget
from vae_export.runtimes.posterior import scaling_facts

_FLOAT32: Mapping[str, Any] = {"precision": "float32", "build": None, "passed_over": {}, "notes": []}


class Lifecycle:
    """The base of `VAE`: everything but its verbs."""

    def __init__(
        self,
        model: Model,
        backend: Backend,
        *,
        micro_batch: int = 64,
        name: str = "",
        facts: Mapping[str, Any] | None = None,
        budget: Budget | None = None,
        tiled: Mapping[str, Tiled] | None = None,
        check_range: bool = True,
        reopen: tuple[Callable[..., Any], tuple[Any, ...]] | None = None,
    ) -> None:
        """Join a model's description and a backend that has its graphs.

        Args:
            model: the description.
            backend: has `encoder` and `decoder`, and may have fused graphs.
            micro_batch: as for `load`.
            name: of the bundle.
            facts: for `describe`: as `Opened.facts`; None for a bundle's own graphs.
            budget: for the memory of intermediate results; None is no limit.
            tiled: the export's measurements of tiles, by graph: the first tiled call warns of visible differences.
            check_range: as for `load`.
            reopen: a module's function, and arguments, that open the same again; without it pickling is an error.

        Raises:
            InputError: micro_batch is below 1.
        """
        self.model = model
        self.name = name
        self._backend = backend
        self._micro_batch = check_count("load", "micro_batch", micro_batch, 1)
        self._budget = budget
        self._facts = dict(_FLOAT32 if facts is None else facts)
        self._execution = Execution(model, backend, self._micro_batch, budget, tiled or {})
        self._reopen = reopen
        self._data = ArrayCheck("x", model, on_gpu=backend.on_gpu, check_range=check_range)
        self._latent = ArrayCheck("z", model, on_gpu=backend.on_gpu)
        self._encoder_outputs = ENCODER_OUTPUTS[model.posterior.kind]
        self._decoder_outputs = DECODER_OUTPUTS[model.likelihood.kind]

    def __repr__(self) -> str:
        data, latent = shape_text(self.model.data.shape), shape_text(self.model.latent.shape)
        runs = self._backend.describe()
        backend = f"{runs['backend']} on {runs['device']}" if runs["backend"] else "closed"
        return f"VAE({self.name!r}, data {data}, latent {latent}, {self._facts['precision']}, {backend})"

    def warmup(self, batches: Iterable[int] = (1,), size: Mapping[str, int] | None = None) -> None:
        """Run every graph that the methods use once, so that an app's first call is as fast as its later ones.

        The first run at a shape allocates memory; on a GPU it compiles kernels and captures CUDA graphs, in every lane.

        Args:
            batches: numbers of examples that the app will use, ≥ 1 each.
            size: for models whose data has named dimensions, as for `sample`.

        Raises:
            InputError: batches are no such numbers, the model does not take the size, or max_memory admits not even a
                tile of it.
        """
        try:
            counts = sorted({operator.index(batch) for batch in batches})
        except TypeError:
            counts = []
        if not counts or counts[0] < 1:
            raise InputError(f"warmup: batches is {batches!r}; expected numbers from 1 on, such as (1, 8)")
        sizes = self.model.sizes(self.model.latent_shape(size))
        for graph in sorted(self._backend.graphs):
            for n in counts:
                self._execution.warm(graph, n, sizes)

    def describe(self) -> dict[str, Any]:
        """The model and what it runs on, as plain values.

        `precision` is that of the graphs, such as `float32` or `float32 encoder, int8 decoder`; `build` the folder of
        the build that runs, or None for the bundle's own graphs; `passed_over` has what would have been preferred, and
        why it is not used; `notes` is about the build: another processor, other kernels for other batches.
        """
        model = self.model
        return {
            "bundle": self.name,
            "architecture": model.architecture,
            "parameters": model.parameters,
            "data": shape_text(model.data.shape),
            "data_range": list(model.data.range),
            "latent": shape_text(model.latent.shape),
            **scaling_facts(model.latent),
            "prior": model.prior,
            "posterior": model.posterior.kind,
            "likelihood": model.likelihood.kind,
            "micro_batch": self._micro_batch,
            "max_memory": self._budget.limit if self._budget else None,
            "tiles": self._execution.seams.facts,
            **self._facts,
            **self._backend.describe(),
        }

    def release_memory(self) -> None:
        """Release the memory that is kept for the next calls; the first of them is slower.

        Useful after a call of an unusually large batch or size. Calls that run meanwhile keep theirs. On the CPU that
        is the memory of intermediate results, which in ONNX Runtime all VAEs of a process with named sizes share; on a
        GPU the lanes' buffers, and the CUDA graphs that were captured on them. Weights stay.
        """
        self._backend.release_memory()

    def close(self) -> None:
        """Release everything that the backend holds; the VAE cannot be used afterwards."""
        self._backend.close()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """For pickle, and so for spawned processes: the bundle is opened again there, by its path.

        Raises:
            InputError: the VAE does not come from `load`.
        """
        if self._reopen is None:
            raise InputError(
                "a VAE that load did not make has no path to be opened again by. Load the bundle where it is needed"
            )
        return self._reopen

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
