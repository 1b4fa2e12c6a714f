"""Write down what users lean on, and compare two such records: public names, the command line, exit codes.

    python benchmarks/interface.py OUT.json
    python benchmarks/interface.py compare BEFORE.json AFTER.json

A record is made with public names and the command line of the vae_export that is installed, so that any version can be
recorded. `compare` prints every difference but those of prose, and exits with 1 where there is one.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vae_export

SKIPPED = "prose"
PUBLIC = set(vae_export.__all__)


def main(arguments: list[str]) -> int:
    """Record or compare; the exit code."""
    if arguments[0] == "compare":
        before, after = (json.loads(Path(path).read_text(encoding="utf-8")) for path in arguments[1:])
        found = list(differences(before, after))
        print("\n".join(found) or "no difference")
        return int(bool(found))
    record = {"api": api(), "help": help_texts(), "exit codes": exit_codes()}
    Path(arguments[0]).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """A line for each value that is in one record only, or differs; prose is left out."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        if before != after:
            yield f"{path}: {before!r} → {after!r}"
        return
    for name in sorted({*before, *after} - {SKIPPED}):
        place = f"{path} / {name}" if path else name
        if name not in after:
            yield f"{place}: gone, was {before[name]!r}"
        elif name not in before:
            yield f"{place}: new, {after[name]!r}"
        else:
            yield from differences(before[name], after[name], place)


def api() -> dict[str, Any]:
    """For every public name its kind and signature, and the same of a class's public members."""
    return {name: described(getattr(vae_export, name)) for name in vae_export.__all__}


def described(value: Any) -> Any:
    """The kind and signature of one object; of a class with its bases, fields and members."""
    if isinstance(value, property):
        return {"kind": "property", "signature": signature(value.fget)}
    if not inspect.isclass(value):
        return {"kind": type(value).__name__, "signature": signature(value)} if callable(value) else repr(value)
    own = [base for base in reversed(value.__mro__) if base.__module__.partition(".")[0] == "vae_export"]
    fields: dict[str, str] = {}
    members: dict[str, Any] = {}
    for base in own:
        fields |= {k: str(v) for k, v in inspect.get_annotations(base).items() if not k.startswith("_")}
        members |= {k: v for k, v in vars(base).items() if not k.startswith("_") and k not in fields}
    return {
        "kind": "class",
        "bases": [b.__name__ for b in value.__mro__[1:-1] if b.__module__ == "builtins" or b.__name__ in PUBLIC],
        "signature": signature(value),
        "fields": fields,
        "members": {
            name: described(member.__func__ if isinstance(member, (classmethod, staticmethod)) else member)
            for name, member in members.items()
        },
    }


def signature(value: Any) -> str:
    """Parameters, defaults and annotations without our modules' names; empty where Python does not know them."""
    try:
        return re.sub(r"\bvae_export(\.\w+)*\.(?=[A-Z])| at 0x\w+", "", str(inspect.signature(value)))
    except (TypeError, ValueError):
        return ""


def help_texts() -> dict[str, Any]:
    """The help of the app and of each verb."""
    whole = help_of([])
    return {"vae-export": whole, **{verb: help_of([verb]) for verb in whole["Commands"]}}


def help_of(verb: list[str]) -> dict[str, Any]:
    """Usage and, panel by panel, each entry: names, metavar, default and whether it is required, and its prose."""
    wide = {"COLUMNS": "600", "TERMINAL_WIDTH": "600"}
    done = run([*verb, "--help"], Path(tempfile.gettempdir()), **wide)
    assert done.returncode == 0, done.stderr
    panels: dict[str, Any] = {"prose": ""}
    entries: dict[str, Any] = {}
    entry: dict[str, Any] = {}
    panel = ""
    for line in done.stdout.splitlines():
        if title := re.match(r"╭─ (.+?) ─+╮", line):
            panel, entries = title[1], {}
            panels[panel] = entries
        elif line.startswith("│"):
            text = line.strip("│ ")
            cells = re.split(r"\s{2,}", text.removeprefix("*").strip())
            if cells[0].startswith("-") or panel in ("Arguments", "Commands"):
                names = [cell for cell in cells if re.fullmatch(r"-\S+", cell)] or cells[:1]
                cells = cells[len(names) :]
                metavar = cells.pop(0) if cells and re.fullmatch(r"<.+>|[A-Z]+|\[.+\|.+\]", cells[0]) else ""
                entry = entries[max(names, key=len)] = {"names": sorted(names), "metavar": metavar, "prose": ""}
            entry["prose"] = " ".join([entry["prose"], *cells]).strip()
            if default := re.search(r"\[default: (.*?)\]", entry["prose"]):
                entry["default"] = default[1]
            entry["required"] = "[required]" in entry["prose"]
        elif text := line.strip():
            if usage := re.match(r"Usage: \S+(?: -m \S+)? (.+)", text):
                panels["usage"] = usage[1]
            elif not line.startswith("╰"):
                panels["prose"] = f"{panels['prose']} {text}".strip()
    return panels


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command of the command line, in a folder."""
    command = [sys.executable, "-m", "vae_export", *arguments]
    known = os.environ | {"VAE_EXPORT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=known, check=False)


#: Commands that leave what the others need: they end with 0.
PREPARED = """\
train run --epochs 1 --model mlp --widths 16 --latent 2
export run b.bundle
sample b.bundle --out x.npy --n 4
build b.bundle --target cpu --seconds 0.01 --batch 1 --out cpu.build"""
#: Commands in a folder with that run, its bundle, a build of it and four samples: the empty one is of no arguments.
COMMANDS = """
--help; frobnicate; --frobnicate; doctor; doctor --json
sample; sample gone --out s.png; sample b.bundle; sample b.bundle --out s.gif; sample b.bundle --out x.npy/s.png
sample b.bundle --out s.png --n 0; sample b.bundle --out s.png --device tpu; sample b.bundle --out b.bundle/s.png
sample b.bundle --out s.png --build cpu.build; sample b.bundle --out s.png --build cpu.build --no-build
sample b.bundle --out s.png --size height=8; reconstruct b.bundle x.npy --out r.npy
reconstruct b.bundle gone.npy --out r.npy; score b.bundle x.npy; score b.bundle x.npy --json; score b.bundle x.npy --k 0
verify b.bundle; verify b.bundle --json; verify b.bundle --build cpu.build; verify b.bundle --target cuda
verify damaged.bundle; verify wrong.bundle; verify wrong.bundle --json; bench damaged.bundle; inspect damaged.bundle
inspect b.bundle; inspect run; inspect run --json; inspect cpu.build; inspect gone; inspect x.npy
build; build b.bundle; build b.bundle --target tpu; build b.bundle --target cpu --batch 0; build --passes list
build b.bundle --target cpu --out cpu.build; build b.bundle --refit cpu.build; build b.bundle --precision fp8
bench b.bundle --batches 1 --seconds 0.01; bench b.bundle --batches 0; bench b.bundle --source run
bench b.bundle --verbs fly; bench b.bundle --plot p.svg
train run --epochs 1; train run --epochs 1 --resume; train r --model unet; train r --resume --force
export run b.bundle --layout bundle; export gone c.bundle; export run cpu.build --force; export os:getcwd c.bundle
export run copy.optimum --layout optimum"""
#: Packages and commands that are run where they are missing.
MISSING = """\
onnxruntime sample b.bundle --out s.png
onnxruntime doctor
torch export run c.bundle
torch train r
onnx_ir build --passes list
openvino doctor"""


def exit_codes() -> dict[str, int]:
    """What each command exits with."""
    codes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for line in PREPARED.splitlines():
            done = run(line.split(), folder)
            assert done.returncode == 0, done.stderr
            codes[line] = done.returncode
        damaged, wrong = (
            Path(shutil.copytree(folder / "b.bundle", folder / f"{n}.bundle")) for n in ("damaged", "wrong")
        )
        (damaged / "golden.safetensors").write_bytes(b"")
        change_weights(wrong)
        for line in re.split(r"; |\n", COMMANDS):
            codes[line] = run(line.split(), folder).returncode
        for package, _, line in (line.partition(" ") for line in MISSING.splitlines()):
            path = folder / f"no-{package}"
            path.mkdir(exist_ok=True)
            (path / f"{package}.py").write_text(f"raise ModuleNotFoundError('none', name={package!r})\n")
            codes[f"{line} (no {package})"] = run(line.split(), folder, PYTHONPATH=str(path)).returncode
        codes["inspect b.bundle (nobody reads)"] = unread(folder)
        for number in (signal.SIGINT, signal.SIGTERM):
            codes[f"train ({number.name})"] = interrupted(folder, number)
    return codes


def change_weights(bundle: Path) -> None:
    """Double a decoder's weights, and write a manifest that fits."""
    import onnx
    from onnx import numpy_helper

    path, manifest = bundle / "vae_decoder" / "model.onnx", bundle / "manifest.json"
    before = path.read_bytes()
    model = onnx.load_from_string(before)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.name == "float32" and values.ndim > 1:
            tensor.CopyFrom(numpy_helper.from_array(2 * values, tensor.name))
    after = model.SerializeToString()
    assert len(after) == len(before)
    path.write_bytes(after)
    old, new = (hashlib.sha256(content).hexdigest() for content in (before, after))
    text = manifest.read_text(encoding="utf-8").replace(old, new)
    text = re.sub(r'"digest": "\w+"', '"digest": ""', text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    manifest.write_text(text.replace('"digest": ""', f'"digest": "{digest}"'), encoding="utf-8")


def unread(folder: Path) -> int:
    """The exit code where the reader of a pipe is gone."""
    command = [sys.executable, "-m", "vae_export", "inspect", "b.bundle"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.close()
        return process.wait()


def interrupted(folder: Path, number: signal.Signals) -> int:
    """The exit code of a training that gets a signal."""
    out = folder / f"run-{number.name}"
    command = [sys.executable, "-m", "vae_export", "train", str(out), "--epochs", "100000"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        while process.poll() is None and not (out / "metrics.csv").exists():
            time.sleep(0.2)
        process.send_signal(number)
        return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
