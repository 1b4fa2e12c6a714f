"""The certificate: what was measured between a reference and a graph, and what is allowed.

The tolerances of every check stand in `TOLERANCES`, once, each with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from vae_export.errors import BundleError, VerificationError
from vae_export.records import Record, check_text

FORMAT: Final = "vae_export.certificate"
VERSION: Final = 1


GraphName = Literal["encoder", "decoder", "end to end"]


class Tolerance(Record, frozen=True, kw_only=True):
    """What is allowed at one precision.

    Attributes:
        relative: the worst error of ELBO, reconstruction and KL, divided by S, the sum of the absolute terms
            of the reference example's log p(x|z) and KL.
        output: the worst error of each output of a graph, divided by the largest reference value, where PyTorch's
            own error in float32 does not allow more.
        own_factor: the RMS of the errors of ELBO, reconstruction and KL as a multiple of PyTorch's own in
            float32; and the worst error of each output. KL(q_reference || q_exported), which is quadratic in
            the error, is held to its square.
        rms_floor: an RMS that is always allowed, before the factor, whatever PyTorch's own.
        posterior_kl: KL(q_reference || q_exported) of the worst latent dimension that is always allowed.
        pixel: the worst error of the decoded mean from end to end, as a share of the data's range.
        pixels_off: the share of pixels that are off by more than 1/255 of the range.
        split: the worst difference between two ways to split a batch, as a share of the largest output, where
            PyTorch's own error in float32 does not allow more.
        extreme: how many times as much the outputs of the encoder may be off for examples at the ends of the data's
            range; its square for the KL.
    """

    relative: float
    output: float
    own_factor: float
    rms_floor: float
    posterior_kl: float
    pixel: float
    pixels_off: float
    split: float
    extreme: float = 1.0


_HALF = Tolerance(
    relative=1e-3,
    output=1e-2,
    own_factor=3.0,
    rms_floor=2e-4,
    posterior_kl=5e-3,
    pixel=5e-3,
    pixels_off=1e-2,
    split=1e-3,
)

_EIGHTH = Tolerance(
    relative=1e-2,
    output=1e-1,
    own_factor=3.0,
    rms_floor=2e-3,
    posterior_kl=5e-2,
    pixel=5e-2,
    pixels_off=0.5,
    split=1e-2,
)

TOLERANCES: Mapping[str, Tolerance] = {
    # Sums of float32 products in another order differ by a few units in the last place (2^-24 = 6e-8 each)
    # at every layer. An RMS of half a unit of the result itself is rounding, however good PyTorch's was; a KL
    # of 1e-9 is a mean that is off by 1/20,000 of a standard deviation. Pictures of one colour have no deviation by
    # which a group or instance norm could divide but that of rounding, which it makes a thousand times larger: sums in
    # another order are then off by up to 18 times what PyTorch's are, measured; by 8 if norms are written out.
    "float32": Tolerance(
        relative=5e-6,
        output=5e-6,
        own_factor=3.0,
        rms_floor=2.0**-25,
        posterior_kl=1e-9,
        pixel=5e-5,
        pixels_off=0.0,
        split=1e-6,
        extreme=10.0,
    ),
    # Products are rounded to 10 bits of mantissa (2^-11 = 5e-4 each) and summed in float32; in float16 so is what is
    # stored between them. A likelihood's errors add up with random signs: 1e-3 of S. A deep graph's single output
    # loses a few units at every layer. 5e-3 nats are a mean that is off by a tenth of a standard deviation; half a
    # per cent of the range is less than one and a half of 255 levels.
    "tf32": _HALF,
    "float16": _HALF,
    # 7 bits of mantissa (2^-8 = 4e-3): eight times float16's errors.
    "bfloat16": _EIGHTH,
    # 256 levels over the range of an activation: half a level is 2^-9 of the range, the same order as bfloat16's.
    "int8": _EIGHTH,
}


class Check(Record, frozen=True, kw_only=True):
    """One measured quantity.

    Attributes:
        graph: `encoder`, `decoder` (on draws from the prior) or `end to end`.
        quantity: what was measured.
        unit: `nats`, `of S`, `of the range`, `share`, `dB`, `values`, `of the largest`.
        got: the measured value, the worst over all batch sizes.
        allowed: its budget; null for what is only reported.
        pytorch: the same of PyTorch in float32 against its own float64, where it was measured.
        batch: the batch size at which it was worst.
        example: the row at which it was worst: of x, or of the draws from the prior for `decoder`.
    """

    graph: GraphName
    quantity: str
    unit: str
    got: float
    allowed: float | None = None
    pytorch: float | None = None
    batch: int | None = None
    example: int | None = None

    @property
    def passed(self) -> bool:
        """Whether it is within its budget. Not-a-number never is."""
        return self.allowed is None or self.got <= self.allowed

    def __str__(self) -> str:
        where = f" (batch {self.batch}" * (self.batch is not None) + f", example {self.example}" * (
            self.example is not None
        )
        allowed = "" if self.allowed is None else f", allowed {self.allowed:.3g}"
        return f"{self.graph}: {self.quantity} is {self.got:.3g} {self.unit}{allowed}{where + ')' if where else ''}"


class Certificate(Record, frozen=True, kw_only=True):
    """The measured difference between the PyTorch reference and the graphs, up to the ELBO.

    Attributes:
        format: always `vae_export.certificate`.
        version: of this format: 1.
        bundle: the bundle's name.
        created: when it was measured, UTC, ISO 8601.
        reference: what it was measured against.
        measured: what ran: backend, version, device, provider, threads, and the machine.
        precision: the precision whose tolerances apply.
        examples: how many of each kind.
        batches: the batch sizes.
        splits_identical: whether all ways to split a batch gave the same bits.
        checks: what was measured.
    """

    format: Literal["vae_export.certificate"] = FORMAT
    version: Literal[1] = VERSION
    bundle: str
    created: str
    reference: str
    measured: dict[str, str]
    precision: str
    examples: dict[str, int]
    batches: tuple[int, ...]
    splits_identical: bool
    checks: tuple[Check, ...]

    def __post_init__(self) -> None:
        if not self.checks:
            raise ValueError("one check or more expected")
        check_text(self.bundle, self.created, self.reference, self.precision)

    @property
    def passed(self) -> bool:
        """Whether every check is within its budget."""
        return all(check.passed for check in self.checks)

    def require(self) -> None:
        """Say what failed.

        Raises:
            VerificationError: a check is out of its budget.
        """
        failed = [str(check) for check in self.checks if not check.passed]
        if failed:
            raise VerificationError(f"{self.bundle} differs from its reference:\n  " + "\n  ".join(failed))

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
        BundleError: it is not a certificate.
    """
    try:
        return msgspec.json.decode(raw, type=Certificate)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"verification.json is not a certificate: {error}") from None
