"""What a module's `encode` and `decode` return, recognized: the tensors of the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vae_export.errors import InputError

#: What q(z|x)'s parameters are called, and what makes a log-variance of them.
_MEANS = ("mean", "mu", "loc", "embedding")
_LOGVARS = ("logvar", "log_var", "log_variance", "log_covariance")
_DEVIATIONS = ("stddev", "std", "scale")
_VARIANCES = ("variance", "var")
#: What the mean of p(x|z) is called, and its other parameters.
_SAMPLES = ("sample", "reconstruction", "recon_x", "x_hat", "mean", "mu", "loc", "probs")
_LOGITS = ("logits",)

ADAPTER = """Write an adapter, and export that:

class Adapted(torch.nn.Module):
    def __init__(self, vae): super().__init__(); self.vae = vae
    def encode(self, x): return mean, logvar  # of self.vae for x, unsampled
    def decode(self, z): return sample  # the mean of p(x|z)"""


class Adapter(nn.Module):
    """A module under the protocol, whatever its `encode` and `decode` wrap their tensors in.

    `encode` may return (mean, logvar), a tensor (a deterministic encoder), or an object or mapping that has a mean
    and a log-variance, standard deviation or variance under one of their usual names: distributions of
    torch.distributions, outputs of diffusers and pythae. `decode` likewise. A module without them, whose parts
    `encoder` and `decoder` return such outputs, is taken as well: pythae's.
    """

    def __init__(self, module: nn.Module, likelihood: str, outputs: str | None) -> None:
        """Wrap a module.

        Args:
            module: the user's.
            likelihood: p(x|z): it says which tensors `decode` must give.
            outputs: what a Bernoulli decoder's one tensor holds: `logits` or `mean`; None where it says so itself.

        Raises:
            InputError: it has neither the methods nor the parts.
        """
        super().__init__()
        self.module = module
        self.likelihood = likelihood
        self.outputs = outputs
        methods = all(callable(getattr(module, name, None)) for name in ("encode", "decode"))
        parts = all(isinstance(getattr(module, name, None), nn.Module) for name in ("encoder", "decoder"))
        if not methods and not parts:
            raise InputError(
                f"export: {type(module).__name__} has neither methods encode and decode nor modules encoder and "
                f"decoder. {ADAPTER}"
            )
        self._methods = ("encode", "decode") if methods else ("encoder", "decoder")

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, *data) → the mean, and the log-variance unless the encoder is deterministic; (B, *latent) each."""
        with _unchecked_distributions():
            return _posterior(self._call(0, x), self._methods[0])

    def decode(self, z: Tensor) -> tuple[Tensor, ...]:
        """(B, *latent) → the tensors of `DECODER_OUTPUTS[likelihood]`, (B, *data) each."""
        with _unchecked_distributions():
            return self._likelihood(self._call(1, z))

    def _call(self, which: int, value: Tensor) -> Any:
        name = self._methods[which]
        try:
            return getattr(self.module, name)(value)
        except TypeError as error:
            if "required positional argument" in str(error) or "required keyword-only argument" in str(error):
                raise InputError(
                    f"export: {name} of {type(self.module).__name__} needs more than one argument ({error}): "
                    "conditional VAEs are not supported. If the other one is fixed, fix it in an adapter. " + ADAPTER
                ) from None
            raise

    def _likelihood(self, value: Any) -> tuple[Tensor, ...]:
        name, kind = self._methods[1], self.likelihood
        value = _inside(value)
        if isinstance(value, (tuple, list)):
            tensors = tuple(value)
            if not tensors or not all(isinstance(part, Tensor) for part in tensors):
                raise _unknown(name, value)
            if kind == "bernoulli" and len(tensors) == 1:
                return self._bernoulli(tensors[0], None)
            return tensors
        if isinstance(value, Tensor):
            return self._bernoulli(value, None) if kind == "bernoulli" else (value,)
        found = _Fields(name, value)
        if kind == "bernoulli":
            logits = found.one(_LOGITS)
            mean = None if logits is not None else found.one(_SAMPLES)
            if logits is None and mean is None:
                raise _unknown(name, value)
            if logits is None and ("probs" in found.names or self.outputs == "mean"):
                return self._from_mean(mean)
            return self._bernoulli(mean, logits)
        sample = found.one(_SAMPLES)
        if sample is None:
            raise _unknown(name, value)
        if kind == "gaussian":
            logvar = found.logvar()
            return (sample,) if logvar is None else (sample, logvar)
        if kind == "discretized_logistic":
            location, log_scale = found.one(("location",)), found.one(("log_scale",))
            if location is not None and log_scale is not None:
                return sample, location, log_scale
        return (sample,)

    def _bernoulli(self, tensor: Tensor | None, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        if logits is None and self.outputs == "logits":
            logits = tensor
        if logits is not None:
            return torch.sigmoid(logits), logits
        if self.outputs == "mean":
            return self._from_mean(tensor)
        raise InputError(
            f"export: {self._methods[1]} of {type(self.module).__name__} gives one tensor, and a Bernoulli likelihood "
            "needs to know what is in it. Pass outputs='logits', or outputs='mean' for what a sigmoid gave"
        )

    @staticmethod
    def _from_mean(mean: Any) -> tuple[Tensor, Tensor]:
        """The logits of means, which are kept 1e-7 away from 0 and 1, where there are none."""
        logits = torch.logit(mean, eps=1e-7)
        return torch.sigmoid(logits), logits


def _posterior(value: Any, name: str) -> tuple[Tensor, ...]:
    value = _inside(value)
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, (tuple, list)):
        tensors = tuple(value)
        if not tensors or not all(isinstance(part, Tensor) for part in tensors):
            raise _unknown(name, value)
        if len(tensors) > 2:
            raise InputError(
                f"export: {name} returns {len(tensors)} tensors, and which of them are the mean and the log-variance "
                f"cannot be told. {ADAPTER}"
            )
        return tensors
    found = _Fields(name, value)
    mean, logvar = found.one(_MEANS), found.logvar()
    if mean is None:
        mean = found.one(("latents", "latent"))
    if mean is None:
        raise _unknown(name, value)
    return (mean,) if logvar is None else (mean, logvar)


def _inside(value: Any) -> Any:
    """What an output wraps: a distribution in an output of diffusers, the base of an Independent."""
    for name in ("latent_dist", "base_dist"):
        while getattr(value, name, None) is not None:
            value = getattr(value, name)
    if isinstance(value, torch.distributions.Distribution):
        known = (torch.distributions.Normal, torch.distributions.Bernoulli)
        if not isinstance(value, known):
            raise InputError(
                f"export: got a {type(value).__name__} distribution; expected Normal, or Bernoulli of a decoder. "
                "Discrete latents and other posteriors are not supported"
            )
    return value


class _Fields:
    """The tensors of an object or a mapping, by name."""

    def __init__(self, method: str, value: Any) -> None:
        self.method = method
        self.value = value
        if isinstance(value, Mapping):
            found = {str(key): tensor for key, tensor in value.items() if isinstance(tensor, Tensor)}
        elif isinstance(value, torch.distributions.Normal):
            found = {"loc": value.loc, "scale": value.scale}
        elif isinstance(value, torch.distributions.Bernoulli):
            found = {name: value.__dict__[name] for name in ("logits", "probs") if name in value.__dict__}
        else:
            every = (*_MEANS, *_LOGVARS, *_DEVIATIONS, *_VARIANCES, *_SAMPLES, *_LOGITS, "latents", "latent")
            found = {name: part for name in every if isinstance(part := getattr(value, name, None), Tensor)}
            # A distribution of diffusers has all three; they are one.
            if "logvar" in found:
                found = {
                    name: part for name, part in found.items() if name not in (*_DEVIATIONS, *_VARIANCES, "sample")
                }
        self.names = found

    def one(self, names: tuple[str, ...]) -> Tensor | None:
        """The tensor that has one of the names; None where there is none."""
        there = [name for name in names if name in self.names]
        if len(there) > 1:
            raise InputError(
                f"export: {self.method} returns a {type(self.value).__name__} with {' and '.join(there)}, and which "
                f"is meant cannot be told. {ADAPTER}"
            )
        return self.names[there[0]] if there else None

    def logvar(self) -> Tensor | None:
        """The log-variance, made from a deviation or a variance where there is no other."""
        logvar, deviation, variance = (self.one(names) for names in (_LOGVARS, _DEVIATIONS, _VARIANCES))
        given = [value for value in (logvar, deviation, variance) if value is not None]
        if len(given) > 1:
            raise InputError(
                f"export: {self.method} returns a {type(self.value).__name__} with more than one of a log-variance, a "
                f"deviation and a variance, and which is meant cannot be told. {ADAPTER}"
            )
        if deviation is not None:
            return 2.0 * torch.log(deviation)
        return torch.log(variance) if variance is not None else logvar


def _unknown(method: str, value: Any) -> InputError:
    """What was returned, so that one can see it."""
    if isinstance(value, Mapping):
        seen = f" with {', '.join(map(str, value)) or 'nothing in it'}"
    elif isinstance(value, (tuple, list)):
        seen = f" of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    else:
        public = [name for name in getattr(value, "__dict__", {}) if not name.startswith("_")]
        seen = f" with {', '.join(public)}" if public else ""
    return InputError(f"export: {method} returns a {type(value).__name__}{seen}, which is not recognized. {ADAPTER}")


@contextmanager
def _unchecked_distributions() -> Iterator[None]:
    """Without the checks of values in torch.distributions, which no graph can hold."""
    checked = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(checked)
