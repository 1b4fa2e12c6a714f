"""Downloads of data sets, by pooch: only from the addresses listed here, and only files with the listed SHA-256."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Final

from vae_export.errors import InputError, require
from vae_export.trainers.formats import CIFAR, Report, idx_file

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A file to download.

    Attributes:
        url: of the file.
        size: in bytes.
        sha256: of its content.
        members: files to extract from it, if it is a tar archive; otherwise the file itself is wanted.
    """

    url: str
    size: int
    sha256: str
    members: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The wanted files, relative to the data set's folder."""
        return self.members or (self.url.rpartition("/")[2],)


_BATCHES = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")
_MNIST = {
    "train-images-idx3-ubyte.gz": (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    "train-labels-idx1-ubyte.gz": (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    "t10k-images-idx3-ubyte.gz": (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    "t10k-labels-idx1-ubyte.gz": (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
}
_FASHION = {
    "train-images-idx3-ubyte.gz": (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
    "train-labels-idx1-ubyte.gz": (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
    "t10k-images-idx3-ubyte.gz": (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
    "t10k-labels-idx1-ubyte.gz": (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
}


def _remotes(folder: str, files: Mapping[str, tuple[int, str]]) -> tuple[Remote, ...]:
    return tuple(Remote(f"{folder}/{name}", size, sha256) for name, (size, sha256) in files.items())


#: The files of each data set. The checksums are those that TensorFlow Datasets records for the same files.
SOURCES: Final[Mapping[str, tuple[Remote, ...]]] = {
    "mnist": _remotes("https://ossci-datasets.s3.amazonaws.com/mnist", _MNIST),
    # This server has no HTTPS: the SHA-256 protects the files.
    "fashion": _remotes("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com", _FASHION),
    "cifar10": (
        Remote(
            *("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 170_052_171),
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            tuple(f"{CIFAR}/{name}" for name in _BATCHES),
        ),
    ),
}


def download(
    kind: str,
    folder: Path,
    report: Report = lambda message: None,
    sources: Mapping[str, tuple[Remote, ...]] = SOURCES,
    timeout: float = 30.0,
) -> None:
    """Download the missing files of a data set. A file appears under its name once it is complete and verified.

    Args:
        kind: a key of `sources`.
        folder: to download to; created if it does not exist.
        report: called with lines of progress.
        sources: the files of each kind.
        timeout: seconds without a byte after which a download fails.

    Raises:
        InputError: this kind cannot be downloaded, a server cannot be reached, or a file's SHA-256 is another one.
        BackendError: pooch is not installed.
    """
    if kind not in sources:
        raise InputError(
            f"train: data set {kind!r} cannot be downloaded; expected {', '.join(sources)}. Leave --download out"
        )
    pooch = require("pooch", "train", "--download")
    pooch.get_logger().setLevel("WARNING")  # it would print each file's temporary path
    for remote in sources[kind]:
        missing = [name for name in remote.files if not _exists(folder, name)]
        if not missing:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download.") as stage:
            try:
                pooch.retrieve(
                    *(remote.url, remote.sha256, remote.url.rpartition("/")[2], stage),
                    processor=pooch.Untar(list(remote.members), ".") if remote.members else None,
                    downloader=pooch.HTTPDownloader(_progress(remote, Path(stage), report), _CHUNK, timeout=timeout),
                )
            except (OSError, ValueError) as error:  # from requests; from pooch, if the SHA-256 is another one
                cause: BaseException = error
                while cause.__context__ is not None:  # requests wraps the error of the socket in several others
                    cause = cause.__context__
                raise InputError(
                    f"{remote.url} cannot be downloaded: {cause}. Try again, or download it by hand into {folder}"
                ) from None
            for name in missing:
                (folder / name).parent.mkdir(exist_ok=True)
                Path(stage, name).replace(folder / name)


def _progress(remote: Remote, stage: Path, report: Report) -> SimpleNamespace:
    """A progress bar as pooch expects it. It reports each tenth, and stops a download that exceeds the file's size."""
    done = 0

    def update(count: int) -> None:  # by the size of a chunk, which need not be full
        nonlocal done
        before, done = done, sum(file.stat().st_size for file in stage.iterdir())
        if done > remote.size:
            raise ValueError(f"the server sends more than {remote.size:,} bytes")
        if done * 10 // remote.size > before * 10 // remote.size:
            report(f"{remote.url}: {done:,} of {remote.size:,} bytes")

    return SimpleNamespace(update=update, reset=lambda: None, close=lambda: None)


def _exists(folder: Path, name: str) -> bool:
    """Whether the reader of the data set finds this file, in any spelling or place."""
    if name.startswith(CIFAR):
        return (folder / name).is_file() or (folder / Path(name).name).is_file()
    return idx_file(folder, name.removesuffix(".gz")) is not None
