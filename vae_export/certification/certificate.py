"""The certificate, `verification.json`: measured deviations of graphs from a reference, each with its tolerance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal

import msgspec

from vae_export.certification.tolerances import JUDGED, TOLERANCES
from vae_export.contract.checks import check_text
from vae_export.contract.records import Record
from vae_export.errors import BundleError, VerificationError

FORMAT: Final = "vae_export.certificate"
VERSION: Final = 2

GraphName = Literal["encoder", "decoder", "end to end"]


class Check(Record, frozen=True, kw_only=True):
    """One measured quantity.

    Attributes:
        id: stable, such as `encoder.mean.max`: see `deviations`. The shown texts may change, ids do not.
        graph: `encoder`, `decoder` or `end to end`.
        quantity: the quantity's name, as it is shown.
        unit: of both numbers, such as `nats` or `relative to max|reference|`.
        measured: the value nearest to its tolerance over all rows, batches and sizes; the worst where there is none.
        tolerance: for that row; null for what is only reported.
        at_least: whether the tolerance is a lower bound.
        pytorch: the same row's deviation of PyTorch in float32 from its own float64, where it was measured.
        size: of the row, such as `height 64, width 96`; null where the data have one size.
        batch: the batch size at which it was measured.
        example: index of the row: of x, or of the draws from the prior.
        rows: the number of rows, where they are not the golden examples; `Certificate.examples` counts them by kind.
        quantile: the 99.9 % quantile over these rows.
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
        """The measured value relative to its tolerance, ≥ 0: up to 1 it passes. 0 for what is only reported."""
        if self.tolerance is None:
            return 0.0
        if self.at_least:
            return self.tolerance / self.measured if self.measured > 0 else float("inf")
        if self.measured <= 0:
            return 0.0 if self.measured == 0 else float("inf")
        return self.measured / self.tolerance if self.tolerance > 0 else float("inf")

    @property
    def passed(self) -> bool:
        """Whether it is within its tolerance. NaN never passes."""
        return self.share <= 1.0

    def __repr__(self) -> str:
        verdict = "reported" if self.tolerance is None else "passed" if self.passed else "failed"
        return f"Check({self.id!r}, {self.measured:.3g} {self.unit}, {verdict})"

    def __str__(self) -> str:
        parts = [] if self.size is None else [self.size]
        parts += [] if self.batch is None else [f"batch {self.batch}"]
        parts += [] if self.example is None else [f"example {self.example}"]
        parts += [] if self.rows is None else [f"worst of {self.rows:,} rows"]
        parts += [] if self.quantile is None else [f"99.9 % are within {self.quantile:.3g}"]
        where = f" ({', '.join(parts)})" if parts else ""
        bound = "at least " * self.at_least
        tolerance = "" if self.tolerance is None else f", tolerance {bound}{self.tolerance:.3g}"
        return f"{self.graph}: {self.quantity} is {self.measured:.3g} {self.unit}{tolerance}{where} [{self.id}]"


def beyond_half(checks: Iterable[Check], graph: str) -> Check | None:
    """Whether a graph's errors exceed float16's tolerances: within them, they are not visible.

    Args:
        checks: of a certificate.
        graph: `encoder` or `decoder`.

    Returns:
        The check that exceeds its tolerance most, with that tolerance; None where all are within theirs.
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
    """Measured differences between the PyTorch reference and the graphs, from their outputs to the ELBO.

    Attributes:
        format: always `vae_export.certificate`.
        version: of this format: 2.
        bundle: the bundle's name.
        created: date and time of the measurement, UTC, ISO 8601.
        reference: what computed the reference, such as `PyTorch 2.13.0 float64`.
        measured: what ran the graphs: backend, version, device, provider, threads, and the machine.
        precision: of the graphs: one precision, or one for each of encoder and decoder.
        examples: the number of rows, by kind.
        batches: the batch sizes.
        sizes: the sizes of the data's named dimensions that were measured.
        absent: what was not measured, and why.
        splits_identical: whether all ways to split a batch gave bitwise identical results.
        checks: one for each quantity.
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
        """The check with the largest `share`: nearest to its tolerance, or farthest beyond it."""
        return max(self.checks, key=lambda check: check.share)

    def __repr__(self) -> str:
        verdict = "passed" if self.passed else "failed"
        nearest = f"{self.nearest.id} at {self.nearest.share:.0%} of its tolerance"
        return f"Certificate({self.bundle!r}, {self.precision}, {verdict}, {nearest})"

    def check(self, quantity: str) -> Check:
        """The check with an id.

        Raises:
            KeyError: there is none.
        """
        for check in self.checks:
            if check.id == quantity:
                return check
        raise KeyError(quantity)

    def require(self) -> None:
        """Raise where a check failed.

        Raises:
            VerificationError: a check is out of its tolerance. The message lists all of these.
        """
        failed = sorted((check for check in self.checks if not check.passed), key=lambda check: -check.share)
        if failed:
            raise VerificationError(
                f"{self.bundle} differs from its reference:\n  " + "\n  ".join(map(str, failed)) + self._advice(failed)
            )

    def _advice(self, failed: list[Check]) -> str:
        """What to do where checks fail at some sizes and pass at the example's."""
        example = self.sizes[0] if self.sizes else None
        if example is None or any(check.size == example for check in failed):
            return ""
        return (
            f"\nIt passes at {example}: the graph depends on the size that it was traced at. Write sizes as x.shape[2] "
            "and x.shape[3] of the tensor at hand, without int() or len(), and branches on a size so that both give "
            "the same"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with `passed` for the certificate and for each check."""
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
