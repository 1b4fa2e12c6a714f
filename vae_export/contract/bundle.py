"""Open a bundle, trusting nothing in it, and create one atomically: see `sealed`."""

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
    """An opened bundle. Nothing but the manifest has been read; `read` and `check` do the rest.

    Attributes:
        path: the bundle's folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the bundle at `path` and check its manifest.

        Raises:
            InputError: there is no folder at `path`.
            BundleError: its manifest is missing, damaged, newer than this version or was changed.
        """
        super().__init__(path, RECORD_FORMAT)

    @property
    def manifest(self) -> Manifest:
        """Its verified manifest."""
        return self.record

    def graph_files(self) -> set[str]:
        """The files that `graphs` reads."""
        records = self.manifest.graphs.values()
        return {record.file for record in records} | {record.weights for record in records if record.weights}

    def graphs(self) -> tuple[dict[str, bytes], dict[str, Weights]]:
        """The verified bytes of encoder and decoder, and those of the weights beside them, where there are any.

        Raises:
            BundleError: as `read`.
        """
        records = self.manifest.graphs
        beside = {name: records[name].weights for name in GRAPHS}
        return (
            {name: self.read(records[name].file) for name in GRAPHS},
            {name: Weights(PurePosixPath(file).name, self.read(file)) for name, file in beside.items() if file},
        )


def create(path: Path, *, overwrite: bool = False) -> AbstractContextManager[Path]:
    """A new folder to fill and to end with `write_manifest`. On success it becomes the bundle at `path`.

    Raises:
        InputError: something is at `path` and overwrite is false, or what is there is not just a bundle.
    """
    return folders.create(path, RECORD_FORMAT, overwrite=overwrite)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a place at which `create` cannot make a bundle. Errors as there."""
    folders.check_target(path, RECORD_FORMAT, overwrite=overwrite)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder of a bundle that is being made."""
    (folder / MANIFEST).write_bytes(RECORD_FORMAT.encode(manifest))
