"""Open a bundle, whose content is not trusted (see `folders`), and create one atomically."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath

from vae_export.contract import folders
from vae_export.contract.manifest import RECORD_FORMAT, Manifest
from vae_export.contract.model import GRAPHS
from vae_export.contract.onnx_guard import Weights

MANIFEST = RECORD_FORMAT.file


class Bundle(folders.RecordFolder[Manifest]):
    """An opened bundle: its manifest is verified; `read` and `check` verify the other files.

    Attributes:
        path: the bundle's folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the bundle at `path` and check its manifest.

        Raises:
            InputError: there is no folder at `path`.
            BundleError: its manifest is missing, damaged, inconsistent or newer than this version.
        """
        super().__init__(path, RECORD_FORMAT)

    @property
    def manifest(self) -> Manifest:
        """The verified manifest."""
        return self.record

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}: {self.manifest!r})"

    def graph_files(self) -> set[str]:
        """The files that `graphs` reads."""
        records = self.manifest.graphs.values()
        return {record.file for record in records} | {record.weights for record in records if record.weights}

    def graphs(self) -> tuple[dict[str, bytes], dict[str, Weights]]:
        """The verified bytes of encoder and decoder, and their external weights, where there are any, by graph.

        Raises:
            BundleError: as `read`.
        """
        records = self.manifest.graphs
        external = {name: records[name].weights for name in GRAPHS}
        return (
            {name: self.read(records[name].file) for name in GRAPHS},
            {name: Weights(PurePosixPath(file).name, self.read(file)) for name, file in external.items() if file},
        )


def create(path: Path, *, overwrite: bool = False) -> AbstractContextManager[Path]:
    """A new folder to fill and to end with `write_manifest`. On success it becomes the bundle at `path`.

    Raises:
        InputError: as `folders.check_target`.
    """
    return folders.create(path, RECORD_FORMAT, overwrite=overwrite)


def check_target(path: Path, *, overwrite: bool) -> None:
    """As `folders.check_target`, for bundles."""
    folders.check_target(path, RECORD_FORMAT, overwrite=overwrite)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder of a bundle that is being written."""
    (folder / MANIFEST).write_bytes(RECORD_FORMAT.encode(manifest))
