"""Targets, precisions and optimization profiles of builds."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from vae_export.contract.model import Model, SizeDim, Tensor
from vae_export.contract.records import Part
from vae_export.errors import InputError

Runner = Literal["onnxruntime", "openvino"]
FlavourName = Literal["tensorrt", "tensorrt-rtx"]
#: The smallest, middle and largest value.
Range = tuple[int, int, int]
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

#: The names of precisions in certificates.
TOLERANCE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
TARGET_PATTERN = re.compile(r"cpu|cuda|tensorrt|tensorrt-rtx(?:-sm(\d{1,2})(\d))?")
_TARGETS = "cpu, cuda, tensorrt, tensorrt-rtx, or tensorrt-rtx-smNN for a compute capability such as sm89"
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}


@dataclass(frozen=True)
class Target:
    """The runtime, and the device, that a build is for.

    Attributes:
        name: such as `tensorrt-rtx-sm89`.
        flavour: of TensorRT, or None for ONNX Runtime.
        capability: the compute capability in the name, such as `8.9`, or None.
    """

    name: str
    flavour: FlavourName | None
    capability: str | None

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return "cpu" if self.name == "cpu" else "cuda"


def parse(name: str) -> Target:
    """A target by its name.

    Raises:
        InputError: no target has this name.
    """
    if not isinstance(name, str) or not (match := TARGET_PATTERN.fullmatch(name)):
        raise InputError(f"build: target is {name!r}; expected {_TARGETS}")
    flavour: FlavourName | None = None
    if name.startswith("tensorrt"):
        flavour = "tensorrt" if name == "tensorrt" else "tensorrt-rtx"
    return Target(name, flavour, f"{match[1]}.{match[2]}" if match[1] else None)


class Profile(Part, frozen=True, kw_only=True):
    """An optimization profile of an engine: the shapes that it takes. It is fastest at the middle ones.

    Attributes:
        batch: smallest, middle and largest number of examples.
        sizes: likewise of the data's named dimensions.
    """

    batch: Range
    sizes: dict[str, Range] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for low, middle, high in (self.batch, *self.sizes.values()):
            if not 1 <= low <= middle <= high:
                raise ValueError(f"profile: 1 ≤ smallest ≤ middle ≤ largest expected, got {low}, {middle}, {high}")

    def shapes(self, tensor: Tensor, model: Model) -> Shapes:
        """The smallest, middle and largest shape of a graph's input."""
        low, middle, high = (
            model.tensor_shape(tensor, self.batch[which], {name: size[which] for name, size in self.sizes.items()})
            for which in range(3)
        )
        return low, middle, high

    def fits(self, batch: int, sizes: Mapping[str, int]) -> bool:
        """Whether a batch of examples of these sizes can run, padded to the smallest batch where it is smaller."""
        return batch <= self.batch[2] and all(
            name in sizes and low <= sizes[name] <= high for name, (low, _, high) in self.sizes.items()
        )

    @property
    def volume(self) -> int:
        """The largest batch times the largest sizes."""
        product = self.batch[2]
        for _, _, high in self.sizes.values():
            product *= high
        return product

    def __str__(self) -> str:
        sizes = [f"{name} {low} to {high}" for name, (low, _, high) in self.sizes.items()]
        return ", ".join([f"batch {self.batch[0]} to {self.batch[2]}", *sizes])


def profiles(
    model: Model,
    batches: Sequence[int],
    sizes: Sequence[Mapping[str, int]],
    *,
    static: bool = False,
) -> tuple[Profile, ...]:
    """One profile for each batch size and each size: a batch between two batch sizes belongs to the larger one.

    Args:
        model: whose data may have named dimensions.
        batches: in any order, each ≥ 1.
        sizes: of the named dimensions; empty for data of fixed size.
        static: take these batches and sizes only; a smaller batch is padded.

    Raises:
        InputError: a batch size is below 1, or a size is not one that the model takes.
    """
    try:
        batches = sorted({operator.index(batch) for batch in batches})
    except TypeError:
        raise InputError(f"build: batches are {batches!r}; expected numbers from 1 on") from None
    if not batches or batches[0] < 1:
        raise InputError(f"build: batches are {list(batches)}; expected numbers from 1 on")
    named = model.data.named()
    for size in sizes or [{}]:
        model.latent_shape(size)
    result = []
    for size in sizes or [{}]:
        ranges = {
            name: (value if static else _smallest(named[name], value), value, value) for name, value in size.items()
        }
        for before, batch in zip([0, *batches], batches, strict=False):
            result.append(Profile(batch=(batch if static else before + 1, batch, batch), sizes=ranges))
    return tuple(result)


def _smallest(dim: SizeDim, largest: int) -> int:
    return min(largest, -(-dim.min // dim.multiple_of) * dim.multiple_of)


def choose(profiles: Sequence[Profile], batch: int, sizes: Mapping[str, int]) -> tuple[int, int] | None:
    """The index of the smallest profile that fits, and the batch to run at, which may be larger; None if none fits."""
    fitting = [(p.volume, index) for index, p in enumerate(profiles) if p.fits(batch, sizes)]
    if not fitting:
        return None
    index = min(fitting)[1]
    return index, max(batch, profiles[index].batch[0])


def title(flavour: FlavourName) -> str:
    """The product name of a flavour."""
    return _TITLES[flavour]
