"""Strict records, and their canonical JSON with a digest.

A record with a digest is two-space indented JSON in the order of its fields, ended by a newline. Its digest is the
SHA-256 of its own bytes (a checksum, not a signature), and reading it is strict: unknown fields, other types, another
order or other white space are refused. Fields with their default value are not written, so that fields may be added:
old records keep their canonical bytes, and every released version stays readable. A newer version is refused with a
message that names it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from vae_export.contract.checks import is_sha256
from vae_export.errors import BundleError


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A strict, immutable record."""


class Part(Record, frozen=True, kw_only=True, omit_defaults=True):
    """A record of canonical JSON, or a part of one: fields with their default value are not written."""


class File(Part, frozen=True, kw_only=True):
    """A file that a record lists.

    Attributes:
        size: in bytes.
        sha256: of its content, 64 lower-case hexadecimal digits.
    """

    size: int
    sha256: str

    def __post_init__(self) -> None:
        if self.size < 0 or not is_sha256(self.sha256):
            raise ValueError("a size of 0 or more and 64 lower-case hexadecimal digits expected")


class FolderRecord(Protocol):
    """A record that lists the files of its folder.

    Its fields include `digest`, the SHA-256 of its own bytes with this field empty, and `files`, every file of the
    folder but the record itself, by its path with forward slashes.
    """

    @property
    def digest(self) -> str:
        """64 lower-case hexadecimal digits."""
        ...

    @property
    def files(self) -> dict[str, File]:
        """Size and hash by path."""
        ...


T = TypeVar("T", bound=FolderRecord)


@dataclass(frozen=True)
class RecordFormat(Generic[T]):
    """A format of records with a digest, and how messages name it.

    Attributes:
        record: the type, whose first fields are `format` and `version`.
        format: the value of its field `format`.
        version: the newest version that is read.
        file: the record's file name in its folder, such as `manifest.json`.
        name: how messages call the record, such as `manifest`.
        folder: how messages call the folder, such as `bundle`.
        command: the command that writes it, such as `export`.
        remedy: what to do about a damaged one, such as `Export the model again`.
    """

    record: type[T]
    format: str
    version: int
    file: str
    name: str
    folder: str
    command: str
    remedy: str

    def encode(self, record: T) -> bytes:
        """The canonical bytes of a record, with its digest."""
        # msgspec leaves a field out where it is the default's own object, not where it equals it: decoding shares it.
        record = msgspec.json.decode(msgspec.json.encode(record), type=self.record)
        return _canonical(record, hashlib.sha256(_canonical(record, "")).hexdigest())

    def decode(self, raw: bytes) -> T:
        """Read a record strictly.

        Raises:
            BundleError: it is not such a record, newer than this version, or damaged or inconsistent.
        """
        try:
            header = msgspec.json.decode(raw, type=_Header)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BundleError(f"{self.file} is not a {self.name}: {_one_line(error)}") from None
        if header.format != self.format:
            raise BundleError(f"{self.file}: format is {header.format!r}, expected {self.format!r}")
        if header.version > self.version:
            raise BundleError(
                f"{self.file} has version {header.version}; this vae_export reads versions up to {self.version}. "
                "Run: pip install --upgrade vae-export"
            )
        try:
            record = msgspec.json.decode(raw, type=self.record)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BundleError(f"{self.file}: {_one_line(error)}") from None
        if self.encode(record) != raw:
            raise BundleError(
                f"{self.file} was changed after the {self.command}: its digest or its form does not match its content. "
                f"{self.remedy}"
            )
        return record


def _one_line(error: Exception) -> str:
    """A message on one line: names from the record in it may contain line ends."""
    return str(error).replace("\n", "\\n")


class _Header(msgspec.Struct):
    format: str
    version: int


def _canonical(record: Any, digest: str) -> bytes:
    return msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(record, digest=digest)), indent=2) + b"\n"
