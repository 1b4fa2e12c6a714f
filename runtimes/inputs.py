"""The checks of arguments: once, where they enter."""

from __future__ import annotations

import operator
import sys
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vae_export.contract.model import Data, Latent, Model, SizeDim, shape_text
from vae_export.errors import InputError
from vae_export.numerics.pixels import from_uint8
from vae_export.runtimes.backend import Array

_FLOAT32 = np.dtype(np.float32)
_UINT8 = np.dtype(np.uint8)
_UINT32 = np.dtype(np.uint32)
_CUDA = (2, 13)  # kDLCUDA and kDLCUDAManaged (dlpack.h)
#: How far data may exceed their range, relative to its width.
_SLACK, _HALF_LEVEL = 0.45, 0.5 / 255
_ONE = int(np.float32(1.0).view(np.uint32))


class OnGpu(Protocol):
    """An array that lies on a GPU: of PyTorch, CuPy, JAX or this package."""

    def __dlpack_device__(self) -> tuple[Any, int]: ...

    def __dlpack__(self, *, stream: Any = ...) -> Any: ...


class ArrayCheck:
    """Converts an argument to a C-contiguous float32 batch, or refuses it."""

    def __init__(self, name: str, model: Model, *, on_gpu: bool = False, check_range: bool = True) -> None:
        """Prepare the check of `x` (examples of the model's data) or of `z` (its latents).

        A Bernoulli likelihood has no density outside of [0, 1]: data outside are refused. Other data may exceed their
        range by half a level of 256 (discretized logistic) or by 45 % of its width, as a model's own means and noisy
        pictures do; larger deviations mean data of another scale.

        Args:
            name: `x` or `z`.
            model: the model of which it is data or a latent.
            on_gpu: whether the backend takes arrays that lie on a GPU.
            check_range: False accepts any finite values, except for a Bernoulli likelihood.
        """
        self._on_gpu = on_gpu
        spec = model.data if name == "x" else model.latent
        self._name = name
        self._model = model
        self._dims = spec.shape
        self._fixed = spec.shape if all(isinstance(dim, int) for dim in spec.shape) else None
        self._rank = len(spec.shape) + 1
        self._range = spec.range if isinstance(spec, Data) else None
        self._check_values = self._check_finite
        if name == "x" and model.likelihood.kind == "bernoulli":
            self._check_values = self._check_unit
        elif self._range and check_range:
            low, high = self._range
            slack = (high - low) * (_HALF_LEVEL if model.likelihood.kind == "discretized_logistic" else _SLACK)
            self._low, self._high = np.float32(low - slack), np.float32(high + slack)
            self._check_values = self._check_range

    def __call__(self, verb: str, value: Any) -> Array:
        """The value as (B, *shape) float32, C-contiguous; copied only if necessary.

        Raises:
            InputError: wrong type, rank, shape, dtype or byte order; empty, not finite, or out of range.
        """
        array = value if type(value) is np.ndarray else self._as_array(verb, value)
        if array.shape[1:] != self._fixed or len(array) == 0:
            self._check_shape(verb, array.shape)
        if array.dtype is not _FLOAT32:
            array = self._convert(verb, array)
        if not array.flags.c_contiguous:
            array = np.ascontiguousarray(array)
        self._check_values(verb, array)
        return array

    def anywhere(self, verb: str, value: Any) -> tuple[Any, bool]:
        """The checked value, and whether it lies on a GPU, where its values are not checked."""
        if type(value) is np.ndarray or not _lies_on_gpu(value):
            return self(verb, value), False
        if not self._on_gpu:
            raise InputError(
                f"{verb}: {self._name} lies on a GPU, and this VAE runs on the CPU. Pass a NumPy array, or load the "
                "bundle with device='cuda'"
            )
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            raise InputError(f"{verb}: {self._name} is a {type(value).__name__} without a shape and a dtype")
        shape = tuple(value.shape)
        if shape[1:] != self._fixed or shape[0] == 0:
            self._check_shape(verb, shape)
        dtype = str(value.dtype).rpartition(".")[2]
        if dtype != "float32":
            raise InputError(f"{verb}: {self._name} has dtype {dtype} on the GPU; expected float32. Convert it there")
        return value, True

    def padded(self, verb: str, value: Any) -> Array:
        """The value with its named dimensions padded to the next size that the model takes: the edge is repeated."""
        if _lies_on_gpu(value):
            raise InputError(f"{verb}: {self._name} lies on a GPU, and pad is done on the host. Pass a NumPy array")
        array = value if type(value) is np.ndarray else self._as_array(verb, value)
        if len(array.shape) == self._rank:
            missing = [grown - size for grown, size in zip(self._grown(array.shape[1:]), array.shape[1:], strict=True)]
            if any(missing):
                array = np.pad(array, [(0, 0), *((0, more) for more in missing)], mode="edge")
        return self(verb, array)

    def _grown(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The next shape of an example that the model takes, or this one where there is none."""
        grown = tuple(
            max(-(-size // dim.multiple_of), -(-dim.min // dim.multiple_of)) * dim.multiple_of
            if isinstance(dim, SizeDim) and size
            else size
            for dim, size in zip(self._dims, shape, strict=True)
        )
        return grown if self._allows(grown) else shape

    def _as_array(self, verb: str, value: Any) -> Array:
        if isinstance(value, np.ma.MaskedArray):
            raise InputError(f"{verb}: {self._name} is a masked array; fill its gaps first: {self._name}.filled(0)")
        if isinstance(value, np.ndarray) or hasattr(value, "__array__"):
            try:
                return np.asarray(value)
            except Exception as error:  # another library's conversion, which may raise anything
                raise InputError(
                    f"{verb}: {self._name} is a {type(value).__name__} that NumPy cannot read: {error}"
                ) from None
        raise InputError(
            f"{verb}: {self._name} is a {type(value).__name__}; pass a NumPy array of shape {shape_text(self._dims)}"
        )

    def _check_shape(self, verb: str, shape: tuple[int, ...]) -> None:
        problem = f"{verb}: {self._name} has shape {shape}; this bundle expects {shape_text(self._dims)}."
        if len(shape) == self._rank - 1 and self._allows(shape):
            raise InputError(f"{problem} For one example add a batch axis: {self._name}[None]")
        if len(shape) != self._rank:
            raise InputError(f"{problem} Reshape {self._name} to {self._rank} dimensions, the batch first")
        if shape[0] == 0:
            raise InputError(f"{problem} The batch is empty; pass one example or more")
        if not self._allows(shape[1:]):
            limits = "; ".join(str(dim) for dim in self._model.data.named().values() if str(dim) != dim.name)
            what = "Resize or crop the examples" if self._range else "Pass latents that encode or a prior draw gave"
            if self._range and verb in ("encode", "reconstruct") and self._grown(shape[1:]) != shape[1:]:
                what += ", or use pad=True"
            raise InputError(f"{problem} {what}{f' ({limits})' if limits else ''}")

    def _allows(self, shape: tuple[int, ...]) -> bool:
        if len(shape) != len(self._dims):
            return False
        if any(isinstance(dim, int) and dim != size for dim, size in zip(self._dims, shape, strict=True)):
            return False
        data = shape if self._range else self._model.data_shape(shape)
        sized = zip(self._model.data.shape, data, strict=True)
        return all(dim.allows(size) for dim, size in sized if isinstance(dim, SizeDim))

    def _convert(self, verb: str, array: Array) -> Array:
        dtype = array.dtype
        if self._range and dtype == _UINT8:
            return from_uint8(array, self._range)
        if dtype == _FLOAT32:  # another object for the same type
            return array
        accepted = "float32 (or uint8 pictures)" if self._range else "float32"
        if dtype.newbyteorder("=") == _FLOAT32:
            order = "big" if sys.byteorder == "little" else "little"
            raise InputError(
                f"{verb}: {self._name} is {order}-endian float32, which backends would misread; "
                f"expected {accepted} in this machine's byte order. Convert it: {self._name}.astype('=f4')"
            )
        raise InputError(
            f"{verb}: {self._name} has dtype {dtype}; expected {accepted}. "
            f"Convert it: {self._name}.astype(numpy.float32)"
        )

    def _check_finite(self, verb: str, array: Array) -> None:
        finite = np.isfinite(array)
        if np.count_nonzero(finite) != finite.size:  # a quarter of the overhead of finite.all()
            self._refuse(verb, array, ~finite, "finite values")

    def _check_unit(self, verb: str, array: Array) -> None:
        # Bits of floats from 0 to 1, read as integers, lie between 0 and those of 1; those of NaN, of numbers
        # above 1 and of all with a sign are larger. Only −0 needs the second look.
        if np.maximum.reduce(array.view(_UINT32), None) > _ONE:
            inside = (array >= 0) & (array <= 1)
            if not inside.all():
                self._refuse(verb, array, ~inside, "values in [0, 1]. Scale the data, or pass uint8")

    def _check_range(self, verb: str, array: Array) -> None:
        # NaN and infinities fail this comparison, too.
        if self._low <= np.minimum.reduce(array, None) and np.maximum.reduce(array, None) <= self._high:
            return
        self._check_finite(verb, array)
        assert self._range is not None
        low, high = self._range
        inside = (array >= self._low) & (array <= self._high)
        advice = "Scale the data, pass uint8, or load with check_range=False (--any-range) if they have no bounds"
        self._refuse(verb, array, ~inside, f"values in the data's range [{low:g}, {high:g}]. {advice}")

    def _refuse(self, verb: str, array: Array, wrong: np.ndarray[Any, np.dtype[np.bool_]], expected: str) -> None:
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise InputError(
            f"{verb}: {self._name}[{', '.join(map(str, where))}] is {array[where]:g}, one of "
            f"{int(wrong.sum())} such values; expected {expected}"
        )


def check_out(verb: str, out: Any, shape: tuple[int, ...], dtype: type[np.generic], *sources: Any) -> None:
    """Refuse an `out` that is no NumPy array of this shape and dtype, C-contiguous, aligned and writable, or that
    shares memory with an input of `sources`, which is read while `out` is written.
    """
    if problem := _out_problem(out, shape, dtype):
        raise InputError(f"{verb}: out {problem}. Pass numpy.empty({shape}, numpy.{dtype.__name__}) or the like")
    for source in sources:
        if isinstance(source, np.ndarray) and np.may_share_memory(out, source):
            raise InputError(
                f"{verb}: out shares memory with the input, which is read while out is written. Pass another array"
            )


def _out_problem(out: Any, shape: tuple[int, ...], dtype: type[np.generic]) -> str | None:
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        return f"is a {type(out).__name__}; expected a NumPy array"
    if out.shape != shape:
        return f"has shape {out.shape}, and the result has {shape}"
    if out.dtype != dtype:  # also in another byte order
        return f"has dtype {out.dtype.str}, and the result is {dtype.__name__}"
    flags = out.flags
    if flags.carray:
        return None
    if not flags.writeable:
        return "is read-only, and the result is written there"
    return "is not C-contiguous and aligned, which backends need to write to it"


def check_host_only(verb: str, name: str, tile: object, out: object = None) -> None:
    """Refuse a tile or an `out` for an array that lies on a GPU."""
    if tile is not None:
        raise InputError(f"{verb}: {name} lies on a GPU, and tiles are joined on the host. Pass a NumPy array")
    if out is not None:
        raise InputError(
            f"{verb}: {name} lies on a GPU, where the result stays, and out is an array of the host. Drop out, or "
            "pass a NumPy array"
        )


def check_count(verb: str, name: str, value: Any, least: int) -> int:
    """An argument as an integer; InputError if it is below `least` or no integer."""
    try:
        count = operator.index(value)
    except TypeError:
        raise InputError(f"{verb}: {name} is {value!r}; expected an integer") from None
    if count < least:
        raise InputError(f"{verb}: {name} is {count}; expected {least} or more")
    return count


def check_direction(latent: Latent, means: tuple[int, ...], value: Any, strength: float) -> npt.NDArray[Any]:
    """The direction of an edit, (*latent) or (B, *latent) = `means`; InputError if it or the strength is not finite."""
    direction: npt.NDArray[Any] = np.asarray(value)
    if direction.dtype.kind not in "fiu":
        raise InputError(f"edit: direction has dtype {direction.dtype}; expected numbers")
    if direction.shape not in (means[1:], means) or not np.isfinite(direction).all():
        raise InputError(
            f"edit: direction has shape {direction.shape}; expected finite values of shape "
            f"{shape_text(latent.shape, batch='')}, or the same with a batch"
        )
    if not (isinstance(strength, (int, float, np.number)) and abs(strength) <= float(np.finfo(float).max)):
        raise InputError(f"edit: strength is {strength!r}; expected a finite number")
    return direction


def _lies_on_gpu(value: Any) -> bool:
    """Whether an array of some library lies on an NVIDIA GPU."""
    if device_of := getattr(value, "__dlpack_device__", None):
        try:
            return int(device_of()[0]) in _CUDA
        except Exception:  # another library's, for an array that cannot be exported: it is refused later
            return False
    return hasattr(value, "__cuda_array_interface__")
