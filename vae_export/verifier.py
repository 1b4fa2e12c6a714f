"""Measure the certificate: what runs on this machine, against the reference's golden examples. No PyTorch."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vae_export import certificate as certificates
from vae_export import elbo, golden, noise
from vae_export.bundle import Bundle
from vae_export.certificate import TOLERANCES, Certificate, Check, Tolerance
from vae_export.elbo import Array, Float64
from vae_export.golden import EXTREMES, Reference
from vae_export.manifest import Model
from vae_export.pixels import to_uint8
from vae_export.runtimes import VAE, Backend, BuildLike, Settings, open_bundle

BATCHES = (1, 2, 7, 64)
#: What the checks of splits and of bytes are called.
SPLIT, PICTURE = "another split of the batch", "picture, worst"


def verify(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    build: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    opened: Callable[[str], None] = lambda line: None,
) -> Certificate:
    """Measure a bundle again, on this machine, against the golden examples that it brought along.

    What is measured is the bundle's own graphs, whatever builds the cache has; or a build, where one is named.

    Nothing is written. The result may be out of budget: ask `Certificate.passed`, or call
    `Certificate.require`.

    Args:
        path: the bundle's folder.
        device: as for `load`.
        build: the folder of a build of this bundle, to measure in place of the bundle's own graphs.
        threads: as for `load`.
        opened: called with what is measured, in one line, before it is.

    Raises:
        InputError, BundleError, BackendError: as for `load`.
    """
    bundle = Bundle(path)
    manifest = bundle.manifest
    reference = golden.decode(bundle.read(golden.FILE), manifest.golden, manifest.model)
    source: BuildLike = False if build is None else build
    runs = open_bundle(bundle, device=device, build=source, settings=Settings(threads=threads))
    try:
        opened(runs.line())
        return measure(manifest.model, runs.backend, reference, manifest.name, runs.tolerance)
    finally:
        runs.backend.close()


def measure(
    model: Model,
    backend: Backend,
    reference: Reference,
    name: str,
    precision: str = "float32",
    batches: Sequence[int] = BATCHES,
) -> Certificate:
    """Compare a backend that has a model's graphs with the reference.

    Of these, batches of more examples than the reference has are left out.

    Args:
        model: what the graphs compute.
        backend: has them; its fused graphs are measured, too, where it has any.
        reference: what they are compared with.
        name: of the bundle.
        precision: whose tolerances apply.
        batches: to measure at. What differs between the smallest and the largest is what a split costs.
    """
    record = reference.record
    batches = tuple(batch for batch in batches if batch <= max(record.examples, record.prior))
    vaes = {batch: VAE(model, backend, micro_batch=batch) for batch in batches}
    meter = _Meter(reference, TOLERANCES[precision])
    encoded = {batch: _encode(vae, reference) for batch, vae in vaes.items()}
    decoded = {batch: _decode(vae, reference) for batch, vae in vaes.items()}
    meter.finite("encoder", encoded)
    meter.posterior(encoded)
    meter.finite("decoder", decoded)
    meter.pixels("decoder", {b: d["sample"] for b, d in decoded.items()}, "prior.sample", model)
    for output in decoded[batches[0]]:
        meter.worst("decoder", output, {b: d[output] for b, d in decoded.items()}, f"prior.{output}")
    seed = record.seed
    x = reference.tensors["x"]
    gaussian = model.posterior.kind == "diagonal_gaussian"
    samples = {b: vae.reconstruct(x, seed=seed if gaussian else None) for b, vae in vaes.items()}
    meter.pixels("end to end", samples, "sample", model)
    if "generate" in backend.graphs:
        meter.pictures({b: _pictures(vae, reference) for b, vae in vaes.items()}, model)
    if reference.has_elbo:
        bounds = {batch: vae.elbo(x, seed=seed) for batch, vae in vaes.items()}
        meter.terms("ELBO", {b: bound.elbo for b, bound in bounds.items()})
        meter.terms("reconstruction", {b: bound.reconstruction for b, bound in bounds.items()})
        meter.terms("KL", {b: bound.kl for b, bound in bounds.items()})
    meter.splits("encoder", encoded)
    meter.splits("decoder", decoded)
    return Certificate(
        bundle=name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        reference=record.reference,
        measured={**{k: str(v) for k, v in backend.describe().items()}, "machine": platform.machine()},
        precision=precision,
        examples={
            "extremes": record.extremes,
            "held_out": record.held_out,
            "decoded": record.decoded,
            "prior": record.prior,
        },
        batches=batches,
        splits_identical=meter.identical,
        checks=tuple(meter.checks),
    )


_Outputs = Mapping[str, Array]


def _encode(vae: VAE, reference: Reference) -> _Outputs:
    posterior = vae.encode(reference.tensors["x"])
    return {"mean": posterior.mean} | ({} if posterior.logvar is None else {"logvar": posterior.logvar})


def _decode(vae: VAE, reference: Reference) -> _Outputs:
    record, shape = reference.record, reference.tensors["mean"].shape[1:]
    z = noise.normals(record.seed, noise.PRIOR, 0, record.prior, math.prod(shape))
    return vae.likelihood(z.reshape(-1, *shape))


def _pictures(vae: VAE, reference: Reference) -> Array:
    record, latent = reference.record, reference.tensors["mean"].shape[1:]
    pictures: Array = vae.generate(record.prior, record.seed, size=vae.model.sizes(latent) or None)
    return pictures


class _Meter:
    """Collects checks. Every quantity is the worst over the batch sizes."""

    def __init__(self, reference: Reference, tolerance: Tolerance) -> None:
        self.tensors = reference.tensors
        self.tolerance = tolerance
        self.checks: list[Check] = []
        self.identical = True

    def finite(self, graph: certificates.GraphName, outputs: Mapping[int, _Outputs]) -> None:
        wrong = {b: sum(int((~np.isfinite(v)).sum()) for v in out.values()) for b, out in outputs.items()}
        batch = max(wrong, key=wrong.__getitem__)
        self._add(graph, "not finite", "values", wrong[batch], 0.0, batch=batch)

    def posterior(self, encoded: Mapping[int, _Outputs]) -> None:
        for output in next(iter(encoded.values())):
            self.worst("encoder", output, {b: e[output] for b, e in encoded.items()}, output)
        if "logvar" not in self.tensors:
            return
        mean, logvar = self.tensors["mean"], self.tensors["logvar"]
        terms = {b: elbo.kl_between_terms(mean, logvar, e["mean"], e["logvar"]) for b, e in encoded.items()}
        divergence = {b: elbo.per_example(t) for b, t in terms.items()}
        self._worst_row("encoder", "KL(reference || exported)", "nats", divergence, None)
        own = float(self.tensors["float32.divergence"].max())
        allowed = max(self.tolerance.posterior_kl, self.tolerance.own_factor**2 * own)
        worst = {b: _row_max(t) for b, t in terms.items()}
        extreme = self.tolerance.extreme**2
        self._worst_row("encoder", "KL(reference || exported), worst dimension", "nats", worst, allowed, own, extreme)

    def worst(self, graph: certificates.GraphName, output: str, got: Mapping[int, Array], against: str) -> None:
        """The worst error of an output, as a share of the largest reference value, beside PyTorch's own."""
        exact = self.tensors[against]
        largest = max(float(np.abs(exact).max()), 1e-30)
        own = self._own(graph, output)
        allowed = max(self.tolerance.output, self.tolerance.own_factor * own)
        errors = {b: _row_max(np.abs(value - exact)) / largest for b, value in got.items()}
        extreme = self.tolerance.extreme if graph == "encoder" else 1.0
        self._worst_row(graph, f"{output}, worst", "of the largest", errors, allowed, own, extreme)

    def pixels(self, graph: certificates.GraphName, got: Mapping[int, Array], against: str, model: Model) -> None:
        low, high = model.data.range
        errors = {b: np.abs(v - self.tensors[against]) / (high - low) for b, v in got.items()}
        worst = {b: _row_max(e) for b, e in errors.items()}
        self._worst_row(graph, "pixel, worst", "of the range", worst, self.tolerance.pixel)
        off = {b: float((e > 1 / 255).mean()) for b, e in errors.items()}
        # Capped at 300 dB, far beyond float64, for results that are equal.
        noise_ratio = {b: -20 * math.log10(np.maximum(_rms(e), 1e-15)) for b, e in errors.items()}
        batch = max(off, key=off.__getitem__)
        self._add(
            graph,
            "pixels off by more than 1/255",
            "share",
            off[batch],
            self.tolerance.pixels_off,
            batch=batch,
        )
        batch = min(noise_ratio, key=lambda b: np.nan_to_num(noise_ratio[b], nan=-np.inf))
        self._add(graph, "PSNR", "dB", np.nan_to_num(noise_ratio[batch]), None, batch=batch)

    def pictures(self, got: Mapping[int, Array], model: Model) -> None:
        """Bytes of the pictures of draws from the prior, against those of the reference."""
        exact = to_uint8(self.tensors["prior.sample"], model.data.range).transpose(0, 2, 3, 1).astype(np.int16)
        off = {b: np.abs(v.astype(np.int16) - exact) for b, v in got.items()}
        # Rounding puts two values that are close on both sides of a half: one level is never an error.
        allowed = 1 + math.floor(255 * self.tolerance.pixel)
        worst = {b: _row_max(levels) for b, levels in off.items()}
        self._worst_row("decoder", PICTURE, "levels of 255", worst, allowed)

    def terms(self, quantity: str, got: Mapping[int, Array]) -> None:
        """ELBO, reconstruction or KL: nats, and relative to S, beside PyTorch's own in float32."""
        tensors, scale = self.tensors, self.tensors["scale"]
        names = {"reconstruction": "reconstruction", "KL": "kl"}
        if quantity == "ELBO":
            exact = tensors["reconstruction"] - tensors["kl"]
            torch32 = tensors["float32.reconstruction"] - tensors["float32.kl"]
        else:
            exact, torch32 = tensors[names[quantity]], tensors[f"float32.{names[quantity]}"]
        own = np.abs(torch32 - exact)
        errors = {b: np.abs(value - exact) for b, value in got.items()}
        self._worst_row("end to end", quantity, "nats", errors, None, float(own.max()))
        relative = {b: e / scale for b, e in errors.items()}
        allowed = self.tolerance.relative
        self._worst_row("end to end", f"{quantity}, worst", "of S", relative, allowed, float((own / scale).max()))
        rms = {b: _rms(r) for b, r in relative.items()}
        batch = max(rms, key=rms.__getitem__)
        own_rms = _rms(own / scale)
        budget = min(allowed, self.tolerance.own_factor * max(own_rms, self.tolerance.rms_floor))
        self._add(
            "end to end",
            f"{quantity}, RMS",
            "of S",
            rms[batch],
            budget,
            batch=batch,
            pytorch=own_rms,
        )

    def splits(self, graph: certificates.GraphName, outputs: Mapping[int, _Outputs]) -> None:
        """Another split is another order of sums: what PyTorch in float32 is off by is allowed for it, too."""
        whole = outputs[max(outputs)]
        worst: dict[int, Float64] = {}
        own = max(self._own(graph, name) for name in whole)
        allowed = max(self.tolerance.split, self.tolerance.own_factor * own)
        for batch, out in outputs.items():
            shares = [_row_max(np.abs(out[k] - v)) / max(float(np.abs(v).max()), 1e-30) for k, v in whole.items()]
            worst[batch] = np.max(shares, axis=0)
            self.identical &= all(np.array_equal(out[k], v) for k, v in whole.items())
        self._worst_row(graph, SPLIT, "of the largest", worst, allowed, own)

    def _own(self, graph: certificates.GraphName, output: str) -> float:
        """PyTorch's own worst error of an output in float32, as a share of the largest reference value."""
        against = output if graph == "encoder" else f"prior.{output}"
        largest = max(float(np.abs(self.tensors[against]).max()), 1e-30)
        return float(self.tensors[f"float32.{against}"].max()) / largest

    def _worst_row(
        self,
        graph: certificates.GraphName,
        quantity: str,
        unit: str,
        rows: Mapping[int, Array],
        allowed: float | None,
        pytorch: float | None = None,
        extreme: float = 1.0,
    ) -> None:
        """The row that is nearest to its budget, which for the extremes is `extreme` times the others'."""
        factor = np.ones(len(next(iter(rows.values()))))
        factor[:EXTREMES] = extreme
        with np.errstate(divide="ignore", invalid="ignore"):  # nothing may be off where the factor is 0
            shares = {b: np.where(np.isnan(r / factor), np.inf, r / factor) for b, r in rows.items()}
        places = {b: int(np.argmax(share)) for b, share in shares.items()}
        batch = max(rows, key=lambda b: shares[b][places[b]])
        got = float(rows[batch][places[batch]])
        allowed = None if allowed is None else allowed * float(factor[places[batch]])
        self._add(graph, quantity, unit, got, allowed, batch=batch, example=places[batch], pytorch=pytorch)

    def _add(
        self,
        graph: certificates.GraphName,
        quantity: str,
        unit: str,
        got: float,
        allowed: float | None,
        *,
        batch: int | None = None,
        example: int | None = None,
        pytorch: float | None = None,
    ) -> None:
        # JSON has no NaN: what cannot be compared counts as infinitely far off, which no budget allows.
        got = float(got) if np.isfinite(got) else float(np.finfo(np.float64).max)
        self.checks.append(
            Check(
                graph=graph, quantity=quantity, unit=unit, got=got, allowed=allowed,
                pytorch=pytorch, batch=batch, example=example,
            )
        )  # fmt: skip


def _row_max(values: Array) -> Float64:
    worst: Float64 = values.reshape(len(values), -1).max(axis=1)
    return worst


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values * values)))
