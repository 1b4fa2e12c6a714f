"""Fetching data sets: only from the places listed here, and only what has the listed SHA-256."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from vae_export.contract.atomic import atomic_file
from vae_export.errors import InputError
from vae_export.trainers import formats

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A file in the net.

    Attributes:
        url: where it is.
        size: in bytes.
        sha256: of its bytes.
        members: what to take out of it, for a packed tar file; otherwise it is the file that is wanted.
    """

    url: str
    size: int
    sha256: str
    members: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it gives, relative to the data set's folder."""
        return self.members or (self.url.rpartition("/")[2],)


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # has no HTTPS; the SHA-256 decides
_BATCHES = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")

#: What `fetch` knows. The checksums are those that TensorFlow Datasets records for the same files.
SOURCES: Final[Mapping[str, tuple[Remote, ...]]] = {
    "mnist": (
        Remote(
            *(f"{_MNIST}train-images-idx3-ubyte.gz", 9_912_422),
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        Remote(
            *(f"{_MNIST}train-labels-idx1-ubyte.gz", 28_881),
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        Remote(
            *(f"{_MNIST}t10k-images-idx3-ubyte.gz", 1_648_877),
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        Remote(
            *(f"{_MNIST}t10k-labels-idx1-ubyte.gz", 4_542),
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion": (
        Remote(
            *(f"{_FASHION}train-images-idx3-ubyte.gz", 26_421_880),
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        Remote(
            *(f"{_FASHION}train-labels-idx1-ubyte.gz", 29_515),
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        Remote(
            *(f"{_FASHION}t10k-images-idx3-ubyte.gz", 4_422_102),
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        Remote(
            *(f"{_FASHION}t10k-labels-idx1-ubyte.gz", 5_148),
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "cifar10": (
        Remote(
            *("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 170_052_171),
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            tuple(f"{formats.CIFAR}/{name}" for name in _BATCHES),
        ),
    ),
}


def fetch(
    kind: str,
    folder: Path,
    report: formats.Report = lambda message: None,
    sources: Mapping[str, tuple[Remote, ...]] = SOURCES,
) -> None:
    """Download those files of a data set that are not there yet. Each gets its name when it is whole and right.

    Args:
        kind: `mnist`, `fashion` or `cifar10`.
        folder: where to put them; made where it is missing.
        report: is told how it goes on.
        sources: where the files are.

    Raises:
        InputError: there is nothing to download for this kind, the net or a server does not answer, or what it
            gives is not the file that is wanted.
    """
    if kind not in sources:
        raise InputError(
            f"train: data set {kind!r} cannot be downloaded; expected {', '.join(sources)}. Leave --download out"
        )
    for remote in sources[kind]:
        missing = [name for name in remote.files if not _is_there(folder, name)]
        if not missing:
            continue
        if not remote.members:
            with atomic_file(folder / missing[0]) as stage, stage.open("wb") as file:
                _download(remote, file, folder, report)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as packed:
            _download(remote, packed, folder, report)
            packed.seek(0)
            with tarfile.open(fileobj=packed, mode="r:gz") as archive:
                for name in missing:
                    member = archive.extractfile(name)
                    assert member is not None
                    with atomic_file(folder / name) as stage, stage.open("wb") as file:
                        shutil.copyfileobj(member, file)


def _is_there(folder: Path, name: str) -> bool:
    """Whether `formats` would find this file, in whatever spelling or place."""
    if name.startswith(formats.CIFAR):
        return (folder / name).is_file() or (folder / Path(name).name).is_file()
    return formats.idx_file(folder, name.removesuffix(".gz")) is not None


def _download(remote: Remote, file: BinaryIO, folder: Path, report: formats.Report) -> None:
    by_hand = f"Download it by hand into {folder}"
    digest, done = hashlib.sha256(), 0
    for chunk in _chunks(remote, by_hand):
        file.write(chunk)
        digest.update(chunk)
        tenth, done = done * 10 // remote.size, done + len(chunk)
        if done * 10 // remote.size > tenth:
            report(f"{remote.url}: {done:,} of {remote.size:,} bytes")
    if digest.hexdigest() != remote.sha256:
        raise InputError(
            f"{remote.url} gave {done:,} bytes with SHA-256 {digest.hexdigest()}; expected {remote.size:,} bytes with "
            f"{remote.sha256}. Nothing was kept. Try again. {by_hand} if that does not help"
        )


def _chunks(remote: Remote, by_hand: str) -> Iterator[bytes]:
    """The file's bytes, at most one chunk more than it should have."""
    done = 0
    try:
        with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as response:
            while done <= remote.size and (chunk := response.read(_CHUNK)):
                done += len(chunk)
                yield chunk
    except urllib.error.HTTPError as error:
        with error:
            raise InputError(f"{remote.url} answers {error.code} {error.reason}. {by_hand}") from None
    except (OSError, http.client.HTTPException) as error:  # no net, no such name, no answer, a broken connection
        reason = getattr(error, "reason", error)
        raise InputError(f"{remote.url} cannot be downloaded: {reason}. {by_hand}") from None
