"""The PyTorch model at one precision, on NumPy arrays."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vae_export.errors import InputError
from vae_export.sources.protocol import Decoder, Encoder, Trained
from vae_export.trainers.objective import kl_terms, log_prob_of

Array = npt.NDArray[Any]


class TorchModel:
    """A model at one precision.

    Attributes:
        module: its copy in this precision.
        encoder: x → the posterior's parameters.
        decoder: z → the likelihood's parameters.
        reduced_precisions: those below float64 that it computed in although it should compute in float64.
    """

    def __init__(self, source: Trained, dtype: torch.dtype) -> None:
        self.module = copy.deepcopy(source.module).to(dtype).eval()
        self.model = source.model
        self.dtype = dtype
        self.encoder, self.decoder = Encoder(self.module, source.model), Decoder(self.module, source.model)
        self.likelihood = None
        if source.model.has_elbo:
            self.likelihood = log_prob_of(source.model.likelihood, source.model.data)
        self.reduced_precisions: set[str] = set()

    def decode(self, z: Array, sizes: Mapping[str, int]) -> dict[str, Array]:
        """The decoder's outputs by name, float64."""
        with torch.no_grad():
            return _arrays(self._named("decode", self.decoder, self._tensor(z), sizes))

    def whole(self, x: Array, eps: Array, sizes: Mapping[str, int]) -> dict[str, Array]:
        """The posterior, the decoded mean at the latent sampled with eps, and the ELBO's terms, by name, float64.

        The latent is rounded to float32, as in every runtime.
        """
        with torch.no_grad():
            values = self._tensor(x)
            posterior = self._named("encode", self.encoder, values, sizes)
            z = posterior["mean"].float()
            if "logvar" in posterior:
                deviation = torch.exp(0.5 * posterior["logvar"])
                z = (posterior["mean"] + deviation * self._tensor(eps)).float()
            parameters = self._named("decode", self.decoder, z.to(self.dtype), sizes)
            results = {**posterior, "sample": parameters["sample"]}
            if self.likelihood and "logvar" in posterior:
                # Whatever the model's precision, the terms are computed and summed in float64: what remains is the
                # model's own error.
                mean, logvar = posterior["mean"].double(), posterior["logvar"].double()
                terms = self.likelihood(values.double(), tuple(p.double() for p in parameters.values())).flatten(1)
                kl = kl_terms(mean, logvar).flatten(1)
                scale = terms.abs().sum(1) + kl.abs().sum(1)
                results |= {"reconstruction": terms.sum(1), "kl": kl.sum(1), "scale": scale}
            return _arrays(results)

    def _tensor(self, value: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(value)).to(self.dtype)

    def _named(
        self, method: str, wrapper: Encoder | Decoder, value: Tensor, sizes: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """The outputs by name, after a check of their shapes; notes the precisions in which they are computed."""
        try:
            with _Watch() as watch:
                outputs = dict(zip(wrapper.outputs, wrapper(value), strict=True))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if not sizes:
                raise
            named = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(
                f"export: {method} of the PyTorch model fails at {named}, which its sizes allow: "
                f"{str(error).strip().partition(chr(10))[0]}. Declare only sizes that it takes"
            ) from error
        self.reduced_precisions |= watch.seen if self.dtype == torch.float64 else set()
        latent = self.model.latent_shape(sizes)
        expected = latent if method == "encode" else self.model.data_shape(latent)
        for name, output in outputs.items():
            if tuple(output.shape) != (len(value), *expected):
                raise InputError(
                    f"export: {method} gave {name} of shape {tuple(output.shape)} for a batch of {len(value)}; "
                    f"expected {(len(value), *expected)}"
                )
        return outputs


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


class _Watch(TorchDispatchMode):
    """Records the dtypes of floating-point results other than float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                self.seen.add(str(value.dtype).removeprefix("torch."))
        return result
