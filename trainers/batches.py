"""The batches of a run, each a function of its step alone, so that a resumed run needs no other state."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vae_export.numerics import noise
from vae_export.trainers.config import TrainConfig
from vae_export.trainers.datasets import ORDER, Subset

_NOISE = 1 << 20  # values of noise that are generated at once, unless one step needs more
_KEPT = 1 << 28  # bytes of examples that are kept transformed


@dataclass(frozen=True)
class Batch:
    """One process's share of a step.

    Attributes:
        x: (B, C, H, W) float32.
        eps: (K, B, *latent) float32 standard normal noise, K draws for each example.
        count: number of examples of this process: B, or 0 where fewer examples are left than there are processes.
        total: number of examples in this step, of all processes.
    """

    x: Tensor
    eps: Tensor
    count: int
    total: int


class Batches:
    """The batches of a run, by step."""

    def __init__(
        self, data: Subset, config: TrainConfig, latent: tuple[int, ...], rank: int = 0, processes: int = 1
    ) -> None:
        """Prepare the batches of the process of a rank, for latents of shape `latent`."""
        self._data, self._config, self._latent = data, config, latent
        self._rank, self._processes = rank, processes
        self._global_batch = config.batch_size * processes
        self.steps_per_epoch = math.ceil(len(data) / self._global_batch)
        self._epoch: tuple[int, npt.NDArray[np.intp]] = (-1, np.zeros(0, np.intp))
        step = config.draws * self._global_batch * math.prod(latent)
        self._block = max(1, min(16, _NOISE // step))  # steps whose noise is generated at once
        self._eps: tuple[tuple[int, int], Tensor] = ((-1, -1), torch.zeros(0))
        same = data.fixed(_KEPT)
        self._same = None if same is None else torch.from_numpy(same)

    def indices(self, step: int) -> npt.NDArray[np.intp]:
        """Indices of the training examples of a step, of all processes together."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        kept, order = self._epoch
        if kept != epoch:
            order = noise.permutation(self._config.seed, noise.TRAINER, epoch, len(self._data), ORDER)
            self._epoch = (epoch, order)
        first = offset * self._global_batch
        return order[first : first + self._global_batch]

    def __getitem__(self, step: int) -> Batch:
        """This process's share of a step."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        rows = self.indices(step)
        share = -(-len(rows) // self._processes)
        begin = min(self._rank * share, len(rows))
        count = min(share, len(rows) - begin)
        if count == 0:
            begin = 0  # another process's example stands in, without weight: every process takes every step
        mine = slice(begin, begin + max(count, 1))
        first = offset * self._global_batch
        if self._same is None:
            seen = epoch * len(self._data) + first + begin
            x = torch.from_numpy(self._data.draw(rows[mine], seen))
        else:
            x = self._same.index_select(0, torch.from_numpy(rows[mine]))
        return Batch(x, self._noise(epoch, offset)[:, mine], count, len(rows))

    def _noise(self, epoch: int, offset: int) -> Tensor:
        """(K, examples, *latent) for a step of an epoch, of all processes; generated for several steps at once."""
        within = offset % self._block
        key = (epoch, offset - within)
        kept, eps = self._eps
        if kept != key:
            first = key[1] * self._global_batch
            count = min(self._block * self._global_batch, len(self._data) - first)
            size, seed, seen = math.prod(self._latent), self._config.seed, epoch * len(self._data) + first
            draws = [noise.normals(seed, noise.TRAINER, seen, count, size, k) for k in range(self._config.draws)]
            eps = torch.from_numpy(np.stack(draws)).reshape(-1, count, *self._latent)
            self._eps = (key, eps)
        return eps[:, within * self._global_batch : (within + 1) * self._global_batch]

    def ahead(self, steps: Iterable[int], workers: int) -> Iterator[Batch]:
        """The batches of steps, in order, prepared ahead of time by `workers` threads if there are any."""
        if workers == 0:
            yield from map(self.__getitem__, steps)
            return
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque = deque()  # type: ignore[type-arg]
            try:
                for step in steps:
                    waiting.append(pool.submit(self.__getitem__, step))
                    if len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
