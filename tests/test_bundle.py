"""A bundle is not trusted: every change is detected, nothing outside of it is read, and nothing is lost in writing."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import filelock
import msgspec
import numpy as np
import onnx
import pytest

import vae_export
from vae_export.contract import atomic, folders
from vae_export.contract import bundle as bundles
from vae_export.contract.bundle import Bundle
from vae_export.contract.manifest import Manifest
from vae_export.errors import BundleError, InputError, VaeExportError
from vae_export.numerics import images


@pytest.fixture
def copy(digits: dict[str, Path], tmp_path: Path) -> Path:
    """A digits bundle that may be broken."""
    return Path(shutil.copytree(digits["gaussian"], tmp_path / "copy.bundle"))


def reseal(path: Path, **changes: object) -> None:
    """Write a manifest that fits the files as they are now: what a hostile author would do."""
    manifest = Bundle(path).manifest
    (path / bundles.MANIFEST).unlink()
    listed = folders.list_files(path)
    bundles.write_manifest(path, msgspec.structs.replace(manifest, files=listed, **changes))


def test_one_bit_flipped_anywhere_is_refused(digits: dict[str, Path], copy: Path) -> None:
    """2,000 random places, over all files by their size, and each file at least 20 times."""
    paths = sorted(p for p in copy.rglob("*") if p.is_file())
    choose = random.Random(0)
    places = [path for path in paths for _ in range(20)]
    places += choose.choices(paths, [p.stat().st_size for p in paths], k=2000 - len(places))
    for path in places:
        original = path.read_bytes()
        position, bit = choose.randrange(len(original)), choose.randrange(8)
        changed = bytearray(original)
        changed[position] ^= 1 << bit
        path.write_bytes(changed)
        with pytest.raises(BundleError) as caught:
            vae_export.load(copy)
        assert caught.value.exit_code == 3
        path.write_bytes(original)
    vae_export.load(copy)


@pytest.mark.parametrize("name", ["vae_decoder/model.onnx", "golden.safetensors", "README.md", "manifest.json"])
def test_truncated_and_missing(copy: Path, name: str) -> None:
    original = (copy / name).read_bytes()
    (copy / name).write_bytes(original[:-1])
    expected = "is not a manifest|was changed" if name == "manifest.json" else "It is truncated or was changed"
    with pytest.raises(BundleError, match=expected):
        vae_export.load(copy)
    (copy / name).unlink()
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        vae_export.load(copy)


def test_links_are_not_followed(copy: Path, tmp_path: Path) -> None:
    target = copy / "README.md"
    outside = tmp_path / "outside"
    shutil.move(target, outside)
    target.symlink_to(outside)
    with pytest.raises(BundleError, match=r"README\.md is a symbolic link"):
        vae_export.load(copy)
    target.unlink()
    os.link(outside, target)
    with pytest.raises(BundleError, match=r"README\.md: is a hard link, so that it can be changed from outside"):
        vae_export.load(copy)
    target.unlink()
    shutil.copy(outside, target)
    vae_export.load(copy)
    folder = copy / "vae_decoder"
    shutil.move(folder, tmp_path / "decoder")
    folder.symlink_to(tmp_path / "decoder")
    with pytest.raises(BundleError, match="vae_decoder is a symbolic link"):
        vae_export.load(copy)


def test_special_files_are_not_opened(copy: Path) -> None:
    (copy / "README.md").unlink()
    os.mkfifo(copy / "README.md")
    with pytest.raises(BundleError, match="is not a plain file"):
        vae_export.load(copy)
    (copy / "README.md").unlink()
    (copy / "README.md").mkdir()
    with pytest.raises(BundleError, match=r"README\.md: cannot be read: Is a directory"):
        vae_export.load(copy)


def test_unlisted_files_are_never_read(copy: Path) -> None:
    (copy / "extra.txt").write_text("hello")
    vae_export.load(copy)
    opened = Bundle(copy)
    assert opened.unlisted() == ["extra.txt"]
    with pytest.raises(BundleError, match=r"extra\.txt is not listed in the manifest and is not read"):
        opened.read("extra.txt")


def test_the_bytes_that_were_checked_are_the_bytes_that_run(copy: Path) -> None:
    with vae_export.load(copy) as vae:
        before = vae.sample(3)
        for path in copy.rglob("*.onnx"):
            path.write_bytes(b"\0" * path.stat().st_size)
        assert np.array_equal(vae.sample(3), before)


def test_large_files_are_checked_piece_by_piece(copy: Path) -> None:
    size = 80 << 20
    with (copy / "large").open("wb") as file:
        file.truncate(size)
    reseal(copy)
    tracemalloc.start()
    Bundle(copy).check()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 2
    with (copy / "large").open("r+b") as file:
        file.seek(size - 1)
        file.write(b"1")
    with pytest.raises(BundleError, match="its SHA-256 is not the one in the manifest"):
        Bundle(copy).check()


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; expected the folder of a bundle"):
        vae_export.load(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; expected the folder"):
        vae_export.load(tmp_path / "file")
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read"):
        vae_export.load(tmp_path)


@pytest.mark.parametrize("operator", ["RandomNormal", "Loop", "If"])
def test_a_hostile_graph_with_a_right_manifest_is_refused(copy: Path, operator: str) -> None:
    path = copy / "vae_decoder" / "model.onnx"
    model = onnx.load(path)
    if operator == "RandomNormal":
        model.graph.node.append(onnx.helper.make_node("RandomNormal", [], ["noise"], shape=[1]))
    else:
        inner = onnx.helper.make_graph([onnx.helper.make_node("RandomUniform", [], ["u"], shape=[1])], "g", [], [])
        inputs, attributes = (["", ""], {"body": inner}) if operator == "Loop" else (["c"], {"then_branch": inner})
        model.graph.node.append(onnx.helper.make_node(operator, inputs, [], **attributes))
    path.write_bytes(model.SerializeToString())
    reseal(copy)
    with pytest.raises(BundleError, match=r"decoder: the graph (draws random numbers|has a Loop)"):
        vae_export.load(copy)


def test_a_graph_that_the_backend_refuses(copy: Path) -> None:
    path = copy / "vae_decoder" / "model.onnx"
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())
    reseal(copy)
    with pytest.raises(BundleError, match=r"decoder: ONNX Runtime \S+ does not open it on cpu"):
        vae_export.load(copy)


def test_creation_is_whole_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new"

    def fail(overwrite: bool) -> None:
        with atomic.atomic_folder(path, overwrite=overwrite) as folder:
            (folder / "file").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail(overwrite=False)
    assert list(tmp_path.iterdir()) == []
    with atomic.atomic_folder(path) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(InputError, match=r"exists already\. Choose another path, or overwrite it on purpose"):
        atomic.atomic_folder(path).__enter__()
    with pytest.raises(RuntimeError, match="stop"):
        fail(overwrite=True)
    assert (path / "file").read_text() == "old"
    with atomic.atomic_folder(path, overwrite=True) as folder:
        (folder / "file").write_text("new")
    assert (path / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_bundle_is_overwritten(tmp_path: Path, copy: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("…")
    with pytest.raises(InputError, match="exists and is not a whole bundle"):
        bundles.create(tmp_path / "precious", overwrite=True).__enter__()
    (tmp_path / "precious" / "manifest.json").write_text('{"name": "my web app"}')
    with pytest.raises(InputError, match="exists and is not a whole bundle"):
        bundles.create(tmp_path / "precious", overwrite=True).__enter__()
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds files that are not the bundle's: notes\.txt\. Move them away"):
        bundles.create(copy, overwrite=True).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists and is not a folder"):
        bundles.create(tmp_path / "file", overwrite=True).__enter__()


def test_without_an_exchange_the_folder_is_replaced_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other systems than Linux have no atomic exchange of two folders."""
    monkeypatch.setattr(sys, "platform", "darwin")
    for content in ("old", "new"):
        with atomic.atomic_folder(tmp_path / "folder", overwrite=True) as folder:
            (folder / "file").write_text(content)
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    program = (
        "import sys, itertools; from pathlib import Path; from vae_export.contract.atomic import atomic_folder\n"
        "for i in itertools.count():\n"
        "    with atomic_folder(Path(sys.argv[1]), overwrite=True) as folder:\n"
        "        for name in 'ab': (folder / name).write_text(str(i))\n"
        "    print(i, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "folder")]
    for milliseconds in range(0, 20, 2):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()  # the first folder is there
            time.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGKILL)
        assert (tmp_path / "folder" / "a").read_text() == (tmp_path / "folder" / "b").read_text() != ""


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        with atomic.atomic_file(tmp_path / "deep" / "file") as stage:
            stage.write_bytes(content)

    def fail() -> None:
        with atomic.atomic_file(tmp_path / "deep" / "file") as stage:
            stage.write_bytes(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file"]
    assert (tmp_path / "deep" / "file").read_bytes() == b"two"
    with atomic.atomic_file(Path("/dev/null")) as stage:
        stage.write_bytes(b"gone")


def test_a_folder_that_appears_meanwhile_stays(tmp_path: Path, copy: Path) -> None:
    """Without --force; and with it, only a whole bundle is replaced, whenever the other one came."""

    def write(path: Path, other: str, *, overwrite: bool) -> None:
        with bundles.create(path, overwrite=overwrite) as stage:
            (stage / "file").write_text("new")
            path.mkdir()
            (path / other).write_text("precious")

    for name, overwrite, message in (
        ("a", False, "a appeared while this was written, by another writer. Nothing was replaced"),
        ("b", True, "b exists and is not a whole bundle"),
    ):
        with pytest.raises(InputError, match=message):
            write(tmp_path / name, "thesis.txt", overwrite=overwrite)
        assert (tmp_path / name / "thesis.txt").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", copy.name}


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_what_came_at_the_last_moment_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    path, looks = tmp_path / "folder", iter([None, InputError("not ours")])
    path.mkdir()
    (path / "thesis.txt").write_text("precious")

    def check(folder: Path) -> None:
        assert (folder / "thesis.txt").exists()
        if error := next(looks):
            raise error

    with pytest.raises(InputError, match="not ours"), atomic.atomic_folder(path, overwrite=True, check=check):
        pass
    assert (path / "thesis.txt").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_one_of_two_writers_is_told(tmp_path: Path) -> None:
    first, second = atomic.atomic_folder(tmp_path / "folder"), atomic.atomic_folder(tmp_path / "folder")
    for number, writer in enumerate((first, second)):
        (writer.__enter__() / "file").write_text(str(number))
    second.__exit__(None, None, None)
    with pytest.raises(InputError, match="folder appeared while this was written"):
        first.__exit__(None, None, None)
    assert (tmp_path / "folder" / "file").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_next_writer_removes_what_dead_ones_left(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from vae_export.contract.atomic import atomic_file, atomic_folder\n"
        "path = Path(sys.argv[1])\n"
        "with atomic_folder(path / 'folder'), atomic_file(path / 'a.json') as stage:\n"
        "    stage.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    left = [path.name for path in tmp_path.iterdir()]
    assert sum(name.startswith(".folder.") for name in left) == 2  # the stage and its lock: the first's are removed
    assert sum(name.startswith(".a.") for name in left) == 2
    with atomic.atomic_folder(tmp_path / "folder"), atomic.atomic_file(tmp_path / "a.json") as live:
        live.write_text("whole")
        with atomic.atomic_folder(tmp_path / "folder"), atomic.atomic_file(tmp_path / "a.json") as other:
            other.write_text("first")
        assert live.exists()
        (tmp_path / "folder").rmdir()
    assert {path.name: path.is_dir() for path in tmp_path.iterdir()} == {"folder": True, "a.json": False}
    assert (tmp_path / "a.json").read_text() == "whole"


def test_what_a_dead_writer_moved_away_is_put_back(tmp_path: Path) -> None:
    old = tmp_path / ".folder.00000000.partial" / "old"
    old.mkdir(parents=True)
    (old / "file").write_text("old")
    (tmp_path / ".folder.00000000.partial.lock").touch()
    (tmp_path / ".folder.other.00000000.partial.lock").touch()  # of another folder
    with pytest.raises(InputError, match="folder appeared"), atomic.atomic_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"folder", ".folder.other.00000000.partial.lock"}


def test_locks_that_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without locks nothing is cleaned up, as nobody knows who lives; links are not followed."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".file.00000000.partial.txt.lock").symlink_to(tmp_path / "precious")
    (tmp_path / ".file.11111111.partial.txt.lock").touch()
    (tmp_path / ".file.11111111.partial.txt").write_text("half")

    def refuse(self: filelock.FileLock, *args: object, **options: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks")

    with monkeypatch.context() as patch:
        patch.setattr(filelock.FileLock, "acquire", refuse)
        with atomic.atomic_file(tmp_path / "file.txt") as stage:
            stage.write_text("whole")
    assert (tmp_path / "file.txt").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 5
    with atomic.atomic_file(tmp_path / "file.txt") as stage:
        stage.write_text("again")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"file.txt", "precious", ".file.00000000.partial.txt.lock"}
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Windows refuses: to flush a handle that may not write, and to open a folder."""
    fcntl = pytest.importorskip("fcntl")
    fsync, opened = os.fsync, os.open

    def flush(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fsync(handle)

    def open_file(path: str, flags: int, *args: int, **options: int | None) -> int:
        if not options and Path(path).is_dir():  # with options it is shutil's, which has another way on Windows
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "open", open_file)
    with Path(__file__).open() as file, pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(file.fileno())
    with pytest.raises(PermissionError):
        os.open(str(Path(__file__).parent), os.O_RDONLY)
    monkeypatch.setattr(sys, "platform", "win32")


def rewritten(source: Path, path: Path) -> Manifest:
    """A bundle written again, as an export does, from the files of another one."""
    manifest = Bundle(source).manifest
    with bundles.create(path, overwrite=True) as stage:
        for name in manifest.files:
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_bytes((source / name).read_bytes())
        bundles.write_manifest(stage, manifest)
    return manifest


@pytest.mark.usefixtures("windows")
def test_windows_writes_bundles_and_pictures(digits: dict[str, Path], tmp_path: Path) -> None:
    for name in ("gaussian", "bernoulli"):
        manifest = rewritten(digits[name], tmp_path / "bundle")
        opened = Bundle(tmp_path / "bundle")
        opened.check()
        assert opened.manifest == manifest
    for _ in range(2):
        images.write(tmp_path / "x.png", np.zeros((2, 1, 8, 8), np.float32), manifest.model.data)
        images.write(tmp_path / "x.npy", np.zeros((2, 1, 8, 8), np.float32), manifest.model.data)
    (tmp_path / "read-only").touch(mode=0o400)
    with atomic.atomic_folder(tmp_path / "folder") as stage:
        shutil.copy(tmp_path / "read-only", stage)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "x.png", "x.npy", "read-only", "folder"}


@pytest.mark.usefixtures("windows")
def test_windows_does_not_rename_a_folder_in_use(
    digits: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virus scanner has a file of the new folder open: the old one is put back."""
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == "new" and Path(target).name == "bundle":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))
        rename(source, target)

    manifest = rewritten(digits["gaussian"], tmp_path / "bundle")
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        rewritten(digits["bernoulli"], tmp_path / "bundle")
    assert Bundle(tmp_path / "bundle").manifest == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_in_a_line(digits: dict[str, Path]) -> None:
    opened = Bundle(digits["gaussian"])
    manifest = opened.manifest
    shown = f"Manifest('gaussian', {manifest.model.architecture} (B, 1, 8, 8) → (B, 8), {len(manifest.files)} files)"
    assert repr(manifest) == shown
    assert repr(opened) == f"Bundle({str(opened.path)!r}: {shown})"


def test_loads_while_the_bundle_is_replaced(digits: dict[str, Path], copy: Path) -> None:
    """Old or new, never an error and never a mixture."""
    program = (
        "import shutil, sys, time; from pathlib import Path; from vae_export.contract import bundle\n"
        "path, sources = Path(sys.argv[1]), sys.argv[2:]\n"
        "print(flush=True)\n"
        "for number in range(10**6):\n"
        "    with bundle.create(path, overwrite=True) as stage:\n"
        "        shutil.copytree(sources[number % 2], stage, dirs_exist_ok=True)\n"
    )
    sources = [str(digits["gaussian"]), str(digits["bernoulli"])]
    with subprocess.Popen([sys.executable, "-c", program, str(copy), *sources], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        names, end = set(), time.monotonic() + 2
        try:
            while time.monotonic() < end:
                opened = Bundle(copy)
                opened.check()
                assert set(opened.graphs()[0]) == {"encoder", "decoder"}
                names.add(opened.manifest.name)
        finally:
            writer.kill()
    assert names == {"gaussian", "bernoulli"}


def test_every_file_is_read_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is hashed, once for each file."""
    digests, new = [], hashlib.sha256

    class Counted:
        def __init__(self) -> None:
            self.inner = new()
            digests.append(self)

        def update(self, piece: bytes) -> None:
            self.inner.update(piece)

        def hexdigest(self) -> str:
            return self.inner.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", lambda *content: new(*content) if content else Counted())
    vae_export.load(copy, device="cpu").close()
    monkeypatch.undo()
    files = [copy / name for name in (bundles.MANIFEST, *Bundle(copy).manifest.files)]
    expected = sorted(new(path.read_bytes()).hexdigest() for path in files)
    assert sorted(digest.hexdigest() for digest in digests) == expected


def test_all_errors_have_one_base() -> None:
    from vae_export import errors

    leaves = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, VaeExportError)]
    assert {leaf.__name__: leaf.exit_code for leaf in leaves} == {
        "VaeExportError": 2,
        "InputError": 2,
        "VerificationError": 1,
        "BundleError": 3,
        "BackendError": 4,
    }
