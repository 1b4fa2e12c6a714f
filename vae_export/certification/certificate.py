"""The certificate: what was measured between a reference and a graph, and what is tolerated.

float32's tolerances come from the reference's own conditioning, see `rounding_tolerance`; those of lower precisions
stand in `TOLERANCES`, in the terms of whoever uses encoder and decoder, each with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec
import numpy as np

from vae_export.certification.deviations import unit
from vae_export.certification.golden import Rows
from vae_export.contract.records import Record, check_text
from vae_export.errors import BundleError, VerificationError
from vae_export.numerics.elbo import Float64

FORMAT: Final = "vae_export.certificate"
VERSION: Final = 2

GraphName = Literal["encoder", "decoder", "end to end"]

#: How many spreads float32's tolerance is: twice what the runners take, so that another processor's kernels have room
#: (docs/certificate.md has both sides, and what is too small a fault to be seen).
SPREADS: Final = 16.0
#: The least spread, in the quantity's unit: a result is itself rounded, by half a unit in the last place at most.
LEAST_SPREAD: Final = 2.0**-24


def rounding_tolerance(quantity: str, rows: Rows) -> Float64:
    """What is tolerated of a quantity in float32, for each row, in the same unit as its deviations.

    SPREADS times how far rounding moves the row, or the median row of its kind if that is more: few draws may by chance
    agree. A KL divergence is quadratic in the error, and so is its tolerance.
    """
    spread = rows.tensors[f"spread.{quantity}"]
    scale = unit(quantity, rows.tensors)
    least = 0.0 if quantity.split(".")[-1] in ("sigma", "dimension") else LEAST_SPREAD
    relative = np.maximum(spread / scale, max(float(np.median(spread / scale)), least))
    tolerance: Float64 = SPREADS ** (2 if quantity == "encoder.kl.dimension" else 1) * relative * scale
    return tolerance


def output_tolerance(graph: str, rows: Rows) -> float:
    """What is tolerated in float32 between two computations of a graph's outputs, as a share of max|output|.

    Args:
        graph: `encoder`; any other is judged like what the decoder gives for draws from the prior.
        rows: the golden examples.
    """
    prefix = "spread.encoder." if graph == "encoder" else "spread.prior."
    quantities = [name.removeprefix("spread.") for name in rows.tensors if name.startswith(prefix)]
    shares = [
        float(np.median(rounding_tolerance(name, rows) / unit(name, rows.tensors)))
        for name in quantities
        if name.endswith(".max")
    ]
    return max(shares)


class Tolerance(Record, frozen=True, kw_only=True):
    """What is tolerated at a precision below float32, on rows of data.

    Attributes:
        sigma: the error of the posterior's mean, in standard deviations of the posterior; of a deterministic encoder in
            those of the latent over the data.
        kl: KL(reference ‖ measured) of the worst latent dimension, nats.
        off1: the share of decoded values that are off by more than 1/255 of the data's range.
        off2: the same by more than 2/255.
        pixel: the largest error of a decoded value, as a share of the range.
        psnr: of the decoded values, dB, at least.
        elbo: the error of the ELBO and of its terms, divided by S, the sum of their absolute terms; where the
            likelihood is the model's own.
    """

    sigma: float
    kl: float
    off1: float
    off2: float
    pixel: float
    psnr: float
    elbo: float


_HALF = Tolerance(sigma=0.05, kl=2e-3, off1=1e-2, off2=1e-3, pixel=8 / 255, psnr=50.0, elbo=1e-3)
_EIGHT = Tolerance(sigma=0.25, kl=5e-2, off1=0.5, off2=0.1, pixel=24 / 255, psnr=38.0, elbo=1e-2)

#: By precision. Of float32 there is none: see `rounding_tolerance`.
TOLERANCES: Mapping[str, Tolerance] = {
    # Products are rounded to 10 bits of mantissa (2^-11 = 5e-4 each) and summed in float32; in float16 so is what is
    # stored between them. A mean that is off by a twentieth of its deviation is lost in the draw: 0.00125 nats. Of 255
    # levels nearly all are the same, and nobody sees those that are not.
    "tf32": _HALF,
    "float16": _HALF,
    # 7 bits of mantissa (2^-8 = 4e-3): eight times float16's errors. A quarter of a deviation are 0.03 nats. What is
    # seen first, in flat areas, are errors of several levels side by side: at 38 dB the RMS error is 3 levels.
    "bfloat16": _EIGHT,
    # 256 levels over the range of an activation: half a level is 2^-9 of the range, the same order as bfloat16's.
    "int8": _EIGHT,
}


#: What judges a quantity below float32, by the last two parts of its id, for what is measured on data.
JUDGED: Mapping[str, str] = {
    "mean.sigma": "sigma",
    "kl.dimension": "kl",
    "pixel.max": "pixel",
    "pixel.off1": "off1",
    "pixel.off2": "off2",
    "pixel.psnr": "psnr",
}


class Check(Record, frozen=True, kw_only=True):
    """One measured quantity.

    Attributes:
        id: stable, such as `encoder.mean.max`: see `deviations`. Texts may change, ids do not.
        graph: `encoder`, `decoder` or `end to end`.
        quantity: what was measured, in words.
        unit: of both numbers, such as `nats` or `of max|reference|`.
        measured: the value nearest to its tolerance over all rows, batches and sizes; of what has none, the worst.
        tolerance: what is tolerated of that row; null for what is only reported.
        at_least: whether the tolerance is a lower bound.
        pytorch: the same row's of PyTorch in float32 against its own float64, where it was measured.
        size: of the row, such as `height 64, width 96`; null where the data have one size.
        batch: the batch size at which it was measured.
        example: the row: of x, or of the draws from the prior.
        rows: how many rows it is the worst of, where they are not the golden examples; they are told apart in
            `Certificate.examples`.
        quantile: what 99.9 % of these rows are within.
    """

    id: str
    graph: GraphName
    quantity: str
    unit: str
    measured: float
    tolerance: float | None = None
    at_least: bool = False
    pytorch: float | None = None
    size: str | None = None
    batch: int | None = None
    example: int | None = None
    rows: int | None = None
    quantile: float | None = None

    def __post_init__(self) -> None:
        check_text(self.id, self.quantity, self.unit, self.size or "")

    @property
    def share(self) -> float:
        """The measured value as a share of its tolerance, from 0 on; 1 and less hold. 0 for what is only reported."""
        if self.tolerance is None:
            return 0.0
        if self.at_least:
            return self.tolerance / self.measured if self.measured > 0 else float("inf")
        if self.measured <= 0:
            return 0.0 if self.measured == 0 else float("inf")
        return self.measured / self.tolerance if self.tolerance > 0 else float("inf")

    @property
    def passed(self) -> bool:
        """Whether it is within its tolerance. NaN never is."""
        return self.share <= 1.0

    def __str__(self) -> str:
        parts = [] if self.size is None else [self.size]
        parts += [] if self.batch is None else [f"batch {self.batch}"]
        parts += [] if self.example is None else [f"example {self.example}"]
        parts += [] if self.rows is None else [f"worst of {self.rows:,} rows"]
        parts += [] if self.quantile is None else [f"99.9 % are within {self.quantile:.3g}"]
        where = f" ({', '.join(parts)})" if parts else ""
        kind = "at least " * self.at_least
        tolerance = "" if self.tolerance is None else f", tolerance {kind}{self.tolerance:.3g}"
        return f"{self.graph}: {self.quantity} is {self.measured:.3g} {self.unit}{tolerance}{where} [{self.id}]"


def beyond_half(checks: Iterable[Check], graph: str) -> Check | None:
    """What a graph loses beyond what half precision may, or None: what is within it nobody sees.

    Args:
        checks: of a certificate.
        graph: `encoder` or `decoder`.

    Returns:
        Of its checks the one that is farthest beyond, with half precision's tolerance.
    """
    half = TOLERANCES["float16"]
    judged = [
        msgspec.structs.replace(check, tolerance=getattr(half, JUDGED[what]))
        for check in checks
        if check.graph == graph and check.tolerance is not None and (what := check.id.partition(".")[2]) in JUDGED
    ]
    worst = max(judged, key=lambda check: check.share, default=None)
    return None if worst is None or worst.passed else worst


class Certificate(Record, frozen=True, kw_only=True):
    """The measured difference between the PyTorch reference and the graphs, up to the ELBO.

    Attributes:
        format: always `vae_export.certificate`.
        version: of this format: 2.
        bundle: the bundle's name.
        created: when it was measured, UTC, ISO 8601.
        reference: what it was measured against.
        measured: what ran: backend, version, device, provider, threads, and the machine.
        precision: what the graphs compute in: one precision, or one for each of encoder and decoder.
        examples: how many of each kind.
        batches: the batch sizes.
        sizes: the sizes of the data's named dimensions that were measured.
        absent: what was not measured, and why.
        splits_identical: whether all ways to split a batch gave the same bits.
        checks: what was measured.
    """

    format: Literal["vae_export.certificate"] = FORMAT
    version: Literal[2] = VERSION
    bundle: str
    created: str
    reference: str
    measured: dict[str, str]
    precision: str
    examples: dict[str, int]
    batches: tuple[int, ...]
    sizes: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    splits_identical: bool
    checks: tuple[Check, ...]

    def __post_init__(self) -> None:
        if not self.checks:
            raise ValueError("one check or more expected")
        check_text(self.bundle, self.created, self.reference, self.precision, *self.sizes, *self.absent)

    @property
    def passed(self) -> bool:
        """Whether every check is within its tolerance."""
        return all(check.passed for check in self.checks)

    @property
    def nearest(self) -> Check:
        """The check that is nearest to its tolerance, or farthest beyond it."""
        return max(self.checks, key=lambda check: check.share)

    def check(self, quantity: str) -> Check:
        """The check of an id.

        Raises:
            KeyError: it was not measured.
        """
        for check in self.checks:
            if check.id == quantity:
                return check
        raise KeyError(quantity)

    def require(self) -> None:
        """Say what failed.

        Raises:
            VerificationError: a check is out of its tolerance.
        """
        failed = sorted((check for check in self.checks if not check.passed), key=lambda check: -check.share)
        if failed:
            raise VerificationError(
                f"{self.bundle} differs from its reference:\n  " + "\n  ".join(map(str, failed)) + self._advice(failed)
            )

    def _advice(self, failed: list[Check]) -> str:
        """What to do where it holds at one size and not at another."""
        example = self.sizes[0] if self.sizes else None
        if example is None or any(check.size == example for check in failed):
            return ""
        return (
            f"\nIt holds at {example}: the graph depends on the size that it was traced at. Write sizes as x.shape[2] "
            "and x.shape[3] of the tensor at hand, without int() or len(), and branches on a size so that both give "
            "the same"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON, with `passed` for the whole and for each check."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        plain["checks"] = [
            {**values, "passed": check.passed} for values, check in zip(plain["checks"], self.checks, strict=True)
        ]
        return {**plain, "passed": self.passed}


def encode(certificate: Certificate) -> bytes:
    """The bytes of `verification.json`."""
    return msgspec.json.format(msgspec.json.encode(certificate), indent=2) + b"\n"


def decode(raw: bytes) -> Certificate:
    """Read a `verification.json`.

    Raises:
        BundleError: it is not a certificate of this version.
    """
    try:
        plain = msgspec.json.decode(raw)
        if isinstance(plain, dict) and plain.get("version") == 1:
            raise BundleError(
                "verification.json is a certificate of version 1, whose tolerances were not measured. Export the model "
                "again"
            )
        return msgspec.json.decode(raw, type=Certificate)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"verification.json is not a certificate: {error}") from None
