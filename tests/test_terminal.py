"""Output on a terminal: text from outside cannot steer it, and a progress bar is shown only there."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vae_export
from vae_export import progress
from vae_export.commands import terminal

Run = Callable[..., "subprocess.CompletedProcess[str]"]
#: A colour, a window's title, a line that goes back over itself, and text from right to left.
HOSTILE = "a\x1b[31mb\x1b]0;c\x07d\re\u202ef\u2066g"
SHOWN = r"a\x1b[31mb\x1b]0;c\x07d\re\u202ef\u2066g"
IN_TABLE = SHOWN.replace(r"\x07", "").replace(r"\r", "")  # rich drops the others


def test_lines_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(f"{HOSTILE}\n2")
    terminal.say(HOSTILE, err=True)
    terminal.console().print(HOSTILE, markup=False)
    captured = capsys.readouterr()
    assert captured.out == f"{SHOWN}\n2\n{IN_TABLE}\n"
    assert captured.err == f"{SHOWN}\n"


def test_the_width(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pipe: that of COLUMNS, or one at which tables are not broken."""
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal.console().width == terminal.PIPE_WIDTH
    monkeypatch.setenv("COLUMNS", "77")
    assert terminal.console().width == terminal.console(err=True).width == 77


def test_doctor_shows_what_packages_and_variables_say_as_text(run: Run, tmp_path: Path) -> None:
    info = tmp_path / "site" / "onnxruntime_gpu-1.0.dist-info"
    info.mkdir(parents=True)
    version = HOSTILE.replace("\r", "")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: {version}\n")
    (tmp_path / "site" / "onnxruntime.py").write_text(f"raise OSError({HOSTILE!r})")
    cache = tmp_path / HOSTILE
    done = run("doctor", PYTHONPATH=str(tmp_path / "site"), VAE_EXPORT_CACHE=str(cache))
    assert done.returncode == 4
    assert rf"onnxruntime is installed and does not load: {SHOWN}" in done.stderr
    shown = done.stdout.replace(" ", "").replace("│", "").replace("\n", "")
    assert shown.count(IN_TABLE) == 2  # the version, and the cache
    for character in set(HOSTILE) - set("abcdefg[]0;31m"):
        assert character not in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["verify", "b", HOSTILE], [HOSTILE], ["verify", HOSTILE], ["inspect", HOSTILE]])
def test_what_was_typed(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert r"\x1b[31m" in done.stderr
    for character in "\x1b\u202e\r\x07":
        assert character not in done.stdout + done.stderr


def test_a_strangers_certificate_has_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from vae_export.certification.certificate import Certificate, Check
    from vae_export.commands import tables

    check = Check(
        id="x", graph="encoder", quantity="[red]q[/]", unit="[link=file:///]u[/]", measured=0.0, tolerance=1.0
    )
    certificate = Certificate(
        bundle="[b]n[/]", created="", reference="r", measured={}, precision="float32", examples={}, batches=(1,),
        splits_identical=True, checks=(check,),
    )  # fmt: skip
    terminal.console().print(tables.certificate(certificate))
    shown = capsys.readouterr().out
    for part in ("[red]q[/]", "[link=file:///]u[/]", "[b]n[/]: certificate"):
        assert part in shown


def test_a_bar_for_who_looks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with progress.bar(terminal.console(err=True)) as tell:
        tell("working", 0.5)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", seen := io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    with progress.bar(terminal.console(err=True)) as tell:
        tell("working", 0.5)
    assert "working" in seen.getvalue()
    assert "left:" in seen.getvalue()
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_verify_shows_how_far_it_is(digits: dict[str, Path], tmp_path: Path) -> None:
    """On stderr, and only where that is a terminal: stdout may be JSON for a script."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "vae_export", "verify", str(digits["gaussian"]), "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"}
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert process.stdout is not None
        assert process.stdout.read().startswith(b"{\n")
    os.close(ours)
    assert process.returncode == 0
    assert b"measuring the certificate" in seen
    assert b"left:" in seen
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.count("\n") == 1
    assert "the bundle's own graphs" in done.stderr


def test_verify_tells_its_progress(digits: dict[str, Path]) -> None:
    told: list[tuple[str, float | None]] = []
    vae_export.verify(digits["gaussian"], progress=lambda step, share=None: told.append((step, share)))
    shares = [share for _, share in told]
    assert {step for step, _ in told} == {"measuring the certificate"}
    assert shares == sorted(shares)
    assert len(shares) > 4
    assert (shares[0], shares[-1]) == (0.0, 1.0)


def test_unwritable_names_are_escaped_not_lost(run: Run, digits: dict[str, Path], tmp_path: Path) -> None:
    """A name that is no UTF-8."""
    name = os.fsdecode(b"b\xff")
    shutil.copytree(digits["gaussian"], tmp_path / name)
    done = run("verify", name)
    assert done.returncode == 0, done.stderr
    assert "\\udcff" in run("sample", name, "--n", "1", "--out", os.fsdecode(b"s\xff.npy")).stdout
