"""Random numbers addressed by (seed, stream, example), the same on every machine and in every batch.

The generator is Philox 4×64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
a keyed bijection from a 256-bit counter to 256 bits. The key is (seed, stream). The counter's low 128
bits are ``example · ⌈size / 8⌉ + block``, its third 64-bit word is the importance draw, its fourth is 0.
Each block of four 64-bit words gives eight 32-bit halves, low half first.

The address has no size: examples of different sizes draw from the same words. Use another seed where draws of two
models must be independent.

Example ``i`` of seed ``s`` is therefore the same whatever the batch size, the split, the thread, the
backend or the processor.
"""

from __future__ import annotations

import math
import operator
import threading
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from vae_export.errors import InputError

#: Streams, by the purpose of the numbers. Streams of one seed are independent of each other.
PRIOR: Final = 0
POSTERIOR: Final = 1
LIKELIHOOD: Final = 2
TRAINER: Final = 3
VERIFIER: Final = 4

_WORD = 1 << 64
_MASK = _WORD - 1
HALVES: Final = 8  # 32-bit halves in one 256-bit block

# Arrays without dimensions: NumPy converts a Python number to one in every operation, which for few numbers costs as
# much as the operation.
_HALF, _UNIT, _MINUS_TWO, _TURN = (np.array(value) for value in (0.5, 2.0**-32, -2.0, 2.0 * np.pi))


def check_address(seed: int, stream: int, first: int, count: int, size: int, draw: int = 0) -> tuple[int, ...]:
    """The six numbers of an address as Python integers, in this order.

    Raises:
        InputError: one is out of the range that `words` documents.
    """
    try:
        seed, stream, first, count, size, draw = map(operator.index, (seed, stream, first, count, size, draw))
    except TypeError as error:
        raise InputError(f"noise: seed, start and the like must be integers: {error}") from None
    for name, value in (("seed", seed), ("stream", stream), ("draw", draw)):
        if not 0 <= value < _WORD:
            raise InputError(f"noise: {name} is {value}; expected 0 to 2^64 - 1")
    if first < 0 or count < 0 or size < 0 or first + count > _WORD:
        raise InputError(
            "noise: first, count and size must not be negative and first + count must not exceed 2^64, "
            f"got {first}, {count} and {size}"
        )
    return seed, stream, first, count, size, draw


def words(seed: int, stream: int, first: int, count: int, size: int, draw: int = 0) -> npt.NDArray[np.uint32]:
    """The raw random words.

    Args:
        seed: 0 ≤ seed < 2^64.
        stream: one of the constants of this module, 0 ≤ stream < 2^64.
        first: index of the first example, ≥ 0; ``first + count`` ≤ 2^64.
        count: number of examples, ≥ 0.
        size: words for each example, ≥ 0.
        draw: importance draw, 0 ≤ draw < 2^64.

    Returns:
        (count, size) uint32, uniform over all values.

    Raises:
        InputError: an argument is out of its range.
    """
    seed, stream, first, count, size, draw = check_address(seed, stream, first, count, size, draw)
    blocks = -(-size // HALVES)
    # NumPy increments the counter before it generates, so its block c + 1 is Random123's block c.
    counter = ((draw << 128) + first * blocks - 1) % (1 << 256)
    raw = _philox(counter, seed, stream).random_raw(count * blocks * 4)
    halves: npt.NDArray[np.uint32] = raw.astype("<u8", copy=False).view("<u4").astype(np.uint32, copy=False)
    return halves.reshape(count, blocks * HALVES)[:, :size]


class _Local(threading.local):
    """A generator for each thread: setting its state takes a tenth of the time of constructing one."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.state = self.philox.state
        self.state["buffer_pos"] = 4  # an empty buffer: begin with a new block


_local = _Local()


def _philox(counter: int, seed: int, stream: int) -> np.random.Philox:
    """This thread's generator, as `Philox(counter=counter, key=[seed, stream])` would be."""
    inner = _local.state["state"]
    # NumPy reads them item by item: tuples of Python integers save the construction of arrays.
    numbers = (counter & _MASK, counter >> 64 & _MASK, counter >> 128 & _MASK, counter >> 192)
    inner["counter"] = numbers  # type: ignore[typeddict-item]
    inner["key"] = (seed, stream)  # type: ignore[typeddict-item]
    _local.philox.state = _local.state
    return _local.philox


def uniforms(seed: int, stream: int, first: int, count: int, size: int, draw: int = 0) -> npt.NDArray[np.float64]:
    """Uniform numbers in (0, 1): (word + 1/2) / 2^32, so that neither end is ever reached.

    Arguments and errors are those of `words`.

    Returns:
        (count, size) float64.
    """
    uniform = words(seed, stream, first, count, size, draw).astype(np.float64)
    uniform += _HALF
    uniform *= _UNIT
    return uniform


def normals(seed: int, stream: int, first: int, count: int, size: int, draw: int = 0) -> npt.NDArray[np.float32]:
    """Standard normal numbers by the Box–Muller transform (1958) of neighbouring uniforms.

    Computed in float64 and rounded once to float32: in float32 the logarithm, sine and cosine differ
    between processors, through float64 the rounded results agree.

    Arguments and errors are those of `words`.

    Returns:
        (count, size) float32.
    """
    uniform = uniforms(seed, stream, first, count, size + size % 2, draw)
    radius = np.sqrt(np.log(uniform[:, 0::2]) * _MINUS_TWO)
    angle = uniform[:, 1::2] * _TURN
    normal = np.empty(uniform.shape, np.float32)
    normal[:, 0::2] = radius * np.cos(angle)
    normal[:, 1::2] = radius * np.sin(angle)
    return normal if size % 2 == 0 else np.ascontiguousarray(normal[:, :size])


def permutation(seed: int, stream: int, index: int, n: int, draw: int = 0) -> npt.NDArray[np.intp]:
    """A random permutation of ``range(n)``, addressed like every other draw.

    Returns:
        (n,) intp. Ties between the underlying 32-bit words keep their order, which biases pairs by 2^-32.
    """
    return np.argsort(words(seed, stream, index, 1, n, draw)[0], kind="stable")


@dataclass(frozen=True)
class Normals:
    """Standard normals by their address, to be generated where they are needed: on the host or on a GPU.

    Attributes:
        seed: as for `normals`.
        stream: as for `normals`.
        first: index of the first example.
        shape: (count, *example), into which the numbers of `normals` are reshaped.
        draw: importance draw.
    """

    seed: int
    stream: int
    first: int
    shape: tuple[int, ...]
    draw: int = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Normals:
        """A slice of the examples, of step 1."""
        begin, end, step = rows.indices(len(self))
        assert step == 1
        return replace(self, first=self.first + begin, shape=(max(0, end - begin), *self.shape[1:]))

    @property
    def size(self) -> int:
        """Numbers for each example."""
        return math.prod(self.shape[1:])

    def numpy(self) -> npt.NDArray[np.float32]:
        """The numbers, on the host: float32 of `shape`. Errors as for `normals`."""
        return normals(self.seed, self.stream, self.first, len(self), self.size, self.draw).reshape(self.shape)
