"""Every verb as a person or a script runs it: what it prints, writes and exits with."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vae_export

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def failed(done: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    """An expected failure: its exit code, its words on stderr, and never a traceback."""
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_version_and_help() -> None:
    """-h is --help for each verb, and every help text is a sentence."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from vae_export.commands.app import app

    def shown(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert shown("--version") == f"{vae_export.__version__}\n"
    command: Any = get_command(app)
    assert shown("-h") == shown("--help")
    for name, verb in command.commands.items():
        assert shown(name, "-h") == shown(name, "--help")
        for parameter in verb.params:
            assert re.fullmatch(r"[A-Z].{8,}\.", parameter.help), (name, parameter.name, parameter.help)


def test_tables_at_80_columns_after_a_verdict(run: Run, digits: dict[str, Path], tmp_path: Path) -> None:
    path, few = digits["gaussian"], ("--batches", "1,300", "--verbs", "decode,elbo", "--seconds", 0.01)
    build = ("build", path, "--target", "cpu", "--batch", 1, "--seconds", 0.01, "--out")
    for verb, verdict in (
        (("verify", path), r"gaussian: certificate passed: \d+ checks; nearest to its tolerance: [a-z.]+\w+ \(\d+%\)"),
        (
            ("inspect", path),
            r".*gaussian\.bundle: a bundle; every file is intact; at its export: certificate passed.*",
        ),
        (("bench", path, *few), r"gaussian: vae_export is \d.* times as fast as the fastest other runner .*"),
        ((*build, "cpu.build"), r"cpu\.build is written, and verified"),
        (("inspect", "cpu.build"), r"cpu\.build: a build of gaussian for cpu in float32; every file is intact"),
    ):
        first, *lines = succeeded(run(*verb, COLUMNS="80")).splitlines()
        assert re.fullmatch(verdict, first), first
        tables = [line for line in lines if line.startswith((" ", "│"))]
        assert len(tables) > 5
        assert max(map(len, tables)) <= 80
        assert "…" not in "".join(tables).replace("… ", "")  # but digests, which are shown in part
    wide = succeeded(run("verify", path)).splitlines()
    assert max(map(len, wide)) > 80


def test_the_road(run: Run, tmp_path: Path) -> None:
    said = succeeded(run("train", "run", "--epochs", 2, "--model", "mlp", "--widths", "32", "--latent", 4))
    assert "run: test ELBO -" in said
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        *("config.json", "model.safetensors", "training_state.safetensors", "metrics.json", "metrics.csv"),
        *("pictures", "tensorboard", ".lock"),
    }
    said = succeeded(run("export", "run", "m.bundle"))
    assert "m.bundle is written and verified" in said
    assert "FAILED" not in said
    failed(
        run("export", "run", "m.bundle"),
        2,
        "m.bundle exists already. Choose another path, or overwrite it on purpose (--force)",
    )
    succeeded(run("export", "run", "m.bundle", "--force"))
    assert "end to end" in succeeded(run("verify", "m.bundle", "--out", "c.json"))
    assert json.loads((tmp_path / "c.json").read_text())["bundle"] == "m"
    failed(
        run("train", "run", "--epochs", 1),
        2,
        "run exists already. Continue its run (--resume), replace it (--force), or choose another folder",
    )
    assert "run: model" in succeeded(run("inspect", "run"))
    assert json.loads(succeeded(run("inspect", "run", "--json")))["kind"] == "checkpoint"


def test_a_path_with_brackets(run: Run, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["gaussian"], tmp_path / "[bold]run")
    assert "[bold]run: model" in succeeded(run("inspect", "[bold]run"))
    assert "[nope]b.bundle is written and verified" in succeeded(run("export", "[bold]run", "[nope]b.bundle"))


def test_verify(run: Run, digits: dict[str, Path]) -> None:
    plain = json.loads(succeeded(run("verify", digits["gaussian"], "--json")))
    assert plain["passed"] is True
    assert plain["measured"]["provider"] == "CPUExecutionProvider"


def test_verify_says_no(run: Run, digits: dict[str, Path], tmp_path: Path) -> None:
    from test_verify import change, one_bias

    path = Path(shutil.copytree(digits["gaussian"], tmp_path / "b"))
    change(path, "decoder", one_bias)
    done = run("verify", path)
    failed(done, 1, "gaussian differs from its reference:\n  ")
    assert "decoder: sample, worst of draws from the prior is" in done.stderr
    assert "FAILED" in done.stdout
    done = run("verify", path, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["passed"] is False


def test_inspect(run: Run, digits: dict[str, Path], tmp_path: Path) -> None:
    shown = succeeded(run("inspect", digits["gaussian"]))
    for part in ("conv, ", "(B, 1, 8, 8) in [0, 1]", "gaussian, logvar clamped to [-6, 4]", "vae_decoder/model.onnx"):
        assert part in shown
    plain = json.loads(succeeded(run("inspect", digits["gaussian"], "--json")))
    assert plain["kind"] == "bundle"
    assert plain["certificate"]["passed"] is True
    copy = Path(shutil.copytree(digits["gaussian"], tmp_path / "copy"))
    (copy / "extra").touch()
    assert "extra (never read)" in succeeded(run("inspect", copy))
    failed(run("inspect", tmp_path / "nothing"), 2, "nothing does not exist; expected the folder of a bundle")


def test_sample(run: Run, digits: dict[str, Path], tmp_path: Path) -> None:
    assert "a.npy: 10 samples, seed 3, from 2" in succeeded(
        run("sample", digits["gaussian"], "--out", "a.npy", "--n", 10, "--seed", 3, "--start", 2)
    )
    with vae_export.load(digits["gaussian"]) as vae:
        assert np.array_equal(np.load(tmp_path / "a.npy"), vae.sample(10, seed=3, start=2))
    succeeded(run("sample", digits["gaussian"], "--out", "deep/er/s.png", "--n", 6))
    with Image.open(tmp_path / "deep/er/s.png") as picture:
        assert picture.size == (3 * (48 + 3) + 3, 2 * (48 + 3) + 3)
    succeeded(run("sample", digits["bernoulli"], "--out", "d.npy", "--draw"))
    assert set(np.unique(np.load(tmp_path / "d.npy"))) == {0.0, 1.0}
    failed(run("sample", digits["gaussian"], "--out", "s.gif"), 2, "s.gif: expected a file that ends in .png")
    failed(run("sample", digits["gaussian"], "--out", "s.png", "--n", 0), 2, "n is 0; expected 1 or more")
    failed(run("sample", digits["gaussian"]), 2, "--out")


def test_reconstruct_and_every_input(run: Run, digits: dict[str, Path], images: np.ndarray, tmp_path: Path) -> None:
    bundle = digits["gaussian"]
    pixels = np.rint(images[:5, 0] * 255).astype(np.uint8)
    np.save(tmp_path / "x.npy", images[:5])
    np.savez(tmp_path / "x.npz", good=images[:5], bytes=pixels[:, None])
    (tmp_path / "folder").mkdir()
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "folder" / f"{index}.png")
    (tmp_path / "folder" / "notes.txt").write_text("not a picture")
    os.mkfifo(tmp_path / "folder" / "pipe.png")
    with vae_export.load(bundle) as vae:
        exact, rounded = vae.reconstruct(images[:5]), vae.reconstruct(pixels[:, None])
    for given, expected in (
        ("x.npy", exact),
        ("x.npz:good", exact),
        ("x.npz:bytes", rounded),
        ("folder", rounded),
        ("folder/3.png", rounded[3:4]),
    ):
        succeeded(run("reconstruct", bundle, given, "--out", "r.npy"))
        np.testing.assert_allclose(np.load(tmp_path / "r.npy"), expected, atol=1e-6)
    succeeded(run("reconstruct", bundle, "folder", "--out", "r.png"))
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.size[1] == 2 * (48 + 3) + 3  # an original above its reconstruction
    succeeded(run("reconstruct", bundle, "x.npy", "--seed", 4, "--start", 7, "--out", "r.npy"))
    with vae_export.load(bundle) as vae:
        assert np.array_equal(np.load(tmp_path / "r.npy"), vae.reconstruct(images[:5], seed=4, start=7))


def test_score(run: Run, digits: dict[str, Path], images: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images[:1500])
    with vae_export.load(digits["gaussian"]) as vae:
        exact = vae.elbo(images[:1500], seed=2)
        bound = vae.log_likelihood(images[:20], k=4)
    rows = list(csv.DictReader(succeeded(run("score", digits["gaussian"], "x.npy", "--seed", 2)).splitlines()))
    assert list(rows[0]) == ["index", "elbo", "reconstruction", "kl"]
    np.testing.assert_allclose([float(row["elbo"]) for row in rows], exact.elbo, rtol=1e-9)
    assert [int(row["index"]) for row in rows] == list(range(1500))
    np.save(tmp_path / "x.npy", images[:20])
    succeeded(run("score", digits["gaussian"], "x.npy", "--k", 4, "--json", "--out", "s.json"))
    scores = json.loads((tmp_path / "s.json").read_text())
    np.testing.assert_allclose([row["log_likelihood"] for row in scores], bound, rtol=1e-9)


def misnamed(save: Callable[..., None], path: Path) -> None:
    with path.open("wb") as file:
        save(file, np.zeros(3))


def half_an_archive(path: Path) -> None:
    path = path.with_name("half.npz")
    np.savez(path, a=np.arange(1000))
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("gone.npy", None, "gone.npy does not exist; expected a picture, a folder, array.npy or arrays.npz:key"),
        ("gone.npz:x", None, "gone.npz does not exist"),
        ("cut.npy", lambda p: p.write_bytes(b"\x93NUMPY\x01"), "cut.npy is not a plain NumPy array: "),
        ("o.npy", lambda p: np.save(p, np.array([{}])), "o.npy is not a plain NumPy array: "),
        ("x.npz", lambda p: np.savez(p, a=np.zeros(3)), "x.npz has the arrays a; name one: x.npz:KEY"),
        ("x.npz:b", lambda p: np.savez(p.with_name("x.npz"), a=np.zeros(3)), "x.npz has the arrays a; name one"),
        ("junk.npz:a", lambda p: p.with_name("junk.npz").write_bytes(b"junk"), "junk.npz is not a NumPy archive: "),
        ("empty", lambda p: p.mkdir(), "empty has no pictures in it (.bmp, .gif"),
        ("bad.png", lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\njunk"), "bad.png is not a picture that can be read: "),
        ("big.png", lambda p: Image.new("L", (9, 7)).save(p), "big.png has 9 × 7 pixels; this bundle expects 8 × 8"),
        ("f64.npy", lambda p: np.save(p, np.zeros((2, 1, 8, 8))), "x has dtype float64; expected float32"),
        ("be.npy", lambda p: np.save(p, np.zeros((2, 1, 8, 8), ">f4")), "x is big-endian float32"),
        ("flat.npy", lambda p: np.save(p, np.zeros(64, np.float32)), "x has shape (64,); this bundle expects"),
        ("none.npy", lambda p: np.save(p, np.zeros((0, 1, 8, 8), np.float32)), "The batch is empty"),
        ("zero.npy", lambda p: np.save(p, np.float32(0)), "x has shape (); this bundle expects (B, 1, 8, 8)"),
        ("zip.npy", lambda p: misnamed(np.savez, p), "zip.npy is not a plain NumPy array; is it an"),
        ("npy.npz:a", lambda p: misnamed(np.save, p.with_name("npy.npz")), "npy.npz is not a NumPy arch"),
        ("half.npz:a", half_an_archive, "half.npz is not a NumPy archive: "),
        ("pipe.png", os.mkfifo, "pipe.png is not a regular file; expected a picture"),
        ("nan.npy", lambda p: np.save(p, np.full((1, 1, 8, 8), np.nan, "f4")), "is nan, one of 64 such values"),
    ],
)
def test_bad_inputs(
    run: Run, digits: dict[str, Path], tmp_path: Path, name: str, make: Callable[[Path], object] | None, message: str
) -> None:
    if make:
        make(tmp_path / name)
    for verb in (["score"], ["reconstruct", "--out", "r.png"]):
        failed(run(verb[0], digits["bernoulli"], name, *verb[1:]), 2, message)


def test_resize(run: Run, digits: dict[str, Path], tmp_path: Path) -> None:
    for mode in ("RGB", "P", "L", "1"):
        Image.new(mode, (20, 16)).save(tmp_path / "p.png")
        succeeded(run("score", digits["gaussian"], "p.png", "--resize"))


def test_pictures_that_would_be_misread(run: Run, digits: dict[str, Path], tmp_path: Path) -> None:
    """Alpha, more than 8 bits, several frames: none can be shown as one 8-bit picture without a decision."""
    for mode, suffix in (("RGBA", "png"), ("LA", "png"), ("I;16", "png"), ("F", "tif")):
        Image.new(mode, (8, 8)).save(tmp_path / f"p.{suffix}")
        failed(run("score", digits["gaussian"], f"p.{suffix}"), 2, "has transparency or more than 8 bits (mode ")
    frames = [Image.new("L", (8, 8), value) for value in (0, 255)]
    frames[0].save(tmp_path / "p.gif", save_all=True, append_images=frames[1:])
    failed(run("score", digits["gaussian"], "p.gif"), 2, "has 2 frames; convert it to one 8-bit grey or RGB picture")


def test_a_bundle_is_never_written_into(run: Run, digits: dict[str, Path], images: np.ndarray, tmp_path: Path) -> None:
    bundle = digits["gaussian"]
    np.save(tmp_path / "x.npy", images[:2])
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    for verb in (["verify"], ["sample"], ["reconstruct", "x.npy"], ["score", "x.npy"]):
        done = run(verb[0], bundle, *verb[1:], "--out", bundle / "verification.json")
        failed(done, 2, "lies inside the bundle, which is never changed. Choose a path outside of it")
    assert {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()} == before


def test_force_replaces_only_what_we_made(run: Run, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "my web app"}')
    failed(run("export", checkpoints["gaussian"], "app", "--force"), 2, "exists and is not a whole bundle")
    failed(run("train", "app", "--epochs", 1, "--force"), 2, "app is not just a run: it also has manifest.json")
    assert (tmp_path / "app" / "manifest.json").exists()


def test_a_strangers_names_are_only_text(run: Run, digits: dict[str, Path], tmp_path: Path) -> None:
    from test_bundle import reseal

    path = Path(shutil.copytree(digits["gaussian"], tmp_path / "b"))
    reseal(path, name="[bold red]x[nope]")
    for verb in ("inspect", "verify"):
        assert "[bold red]x[nope]" in succeeded(run(verb, path))


def test_a_terminal_without_unicode(run: Run, digits: dict[str, Path]) -> None:
    succeeded(run("inspect", digits["gaussian"], PYTHONIOENCODING="ascii", PYTHONUTF8="0"))


def test_an_index_beyond_signed_integers(run: Run, digits: dict[str, Path], images: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images[:2])
    said = succeeded(run("score", digits["gaussian"], "x.npy", "--start", 2**63 - 1))
    assert [line.partition(",")[0] for line in said.splitlines()[1:]] == [str(2**63 - 1), str(2**63)]


def test_hidden_graphs_are_refused_by_bench_too(run: Run, digits: dict[str, Path], tmp_path: Path) -> None:
    import onnx
    from test_bundle import reseal

    path = Path(shutil.copytree(digits["gaussian"], tmp_path / "b"))
    model = onnx.load(path / "vae_decoder" / "model.onnx")
    model.graph.node.append(onnx.helper.make_node("Loop", [], []))
    (path / "vae_decoder" / "model.onnx").write_bytes(model.SerializeToString())
    reseal(path)
    failed(run("bench", path, "--batches", "1"), 3, "decoder: the graph has a Loop, which may never end")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "o", "--model", "unet"], "'unet' is not one of"),
        (["train", "o", "--likelihood", "poisson"], "'poisson' is not one of"),
        (["train", "o", "--data", "mnist"], "data set 'mnist' needs a path; expected mnist:DIR"),
        (["train", "o", "--widths", "a,b"], "train: widths are 'a,b'; expected numbers such as 8,64"),
        (["train", "o", "--latent", "0"], "latent is 0; expected 1 to 65,536"),
        (["train", "../o", "--data", "images:."], "has no pictures in it (.bmp, .gif, .jpeg,"),
        (["train", "o", "--data", "array:gone.npy"], "gone.npy does not exist; expected a file"),
        (["train", "o", "--size", "8y"], "train: sides are '8y'; expected numbers such as 8x64"),
        (["train", "o", "--range", "1"], "train: range is '1'; expected two numbers such as -1,1"),
        (["train", "o", "--resume", "--force"], "--resume continues a run, --force replaces it. Choose one of the"),
        (["train", "o", "--objective", "map"], "'map' is not one of"),
        (["train", "o", "--download"], "data set 'digits' cannot be downloaded; expected mnist, fashion, cifar10"),
        (["train", "o", "--widths", "4,4,4,4"], "8 × 8 is not divisible by 16"),
        (["export", "gone", "b"], "gone does not exist"),
        (["bench", "gone"], "gone does not exist"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["sample"], "Missing argument 'BUNDLE'"),
        (["verify", "b", "--device", "tpu"], "tpu"),
    ],
)
def test_bad_usage(run: Run, arguments: list[str], message: str) -> None:
    failed(run(*arguments), 2, message)


def test_broken_bundle(run: Run, digits: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(digits["gaussian"], tmp_path / "b"))
    (path / "golden.safetensors").write_bytes(b"")
    for verb in (["verify"], ["inspect"], ["sample", "--out", "s.png"], ["score", "x.npy"]):
        failed(run(verb[0], path, *verb[1:]), 3, "golden.safetensors: has 0 bytes, expected")


def test_no_such_device(run: Run, digits: dict[str, Path]) -> None:
    failed(run("sample", digits["gaussian"], "--out", "s.png", "--device", "cuda"), 4, "CUDAExecutionProvider")


def test_unwritable(run: Run, digits: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed(run("sample", digits["gaussian"], "--out", "file/s.png"), 2, "error: file")


def test_named_sizes(run: Run, member: Callable[[str], object], tmp_path: Path) -> None:
    bundle = member("spatial-named").bundle
    succeeded(run("sample", bundle, "--out", "s.NPY", "--n", 2, "--size", "height=8,width=12"))
    assert np.load(tmp_path / "s.NPY").shape == (2, 3, 8, 12)
    assert [p.name for p in tmp_path.iterdir()] == ["s.NPY"]
    failed(run("sample", bundle, "--out", "s.npy", "--size", "8x12"), 2, "size is '8x12'; expected names and numbers")
    failed(run("sample", bundle, "--out", "s.npy"), 2, "this model takes height (a multiple of 4), width")
    (tmp_path / "folder").mkdir()
    for name, size in (("a.png", (8, 12)), ("b.png", (12, 12))):
        Image.new("RGB", size).save(tmp_path / "folder" / name)
    failed(run("score", bundle, "folder"), 2, "b.png has 12 × 12 pixels and a.png has 8 × 12; pictures of one folder")
    timed = succeeded(run("bench", bundle, "--batches", "2", "--seconds", 0.05, "--size", "height=8,width=8", "--json"))
    assert len(json.loads(timed)["rows"]) == 10


def test_the_choices_are_those_of_the_contract() -> None:
    from typing import Literal, get_args, get_origin, get_type_hints

    from vae_export.commands.train import train
    from vae_export.trainers.config import DataConfig, ModelConfig, TrainConfig

    records = (DataConfig, ModelConfig, TrainConfig)
    hints = {name: hint for record in records for name, hint in get_type_hints(record).items()}
    said = {"OUT": "out", "resume": "", "force": "", "download": "", "data": "spec"}
    said_otherwise = {
        "data_shape",
        "data_range",
        "posterior",
        "noise_floor",
        "logvar_clamp",
        "sample_logvar_clamp",
        "log_scale_clamp",
    }
    options = {said.get(name, name): hint for name, hint in get_type_hints(train).items() if name != "return"}
    assert set(options) - {"out", ""} == set(hints) - said_otherwise
    chosen = 0
    for name, hint in options.items():
        (plain, *_) = get_args(hint) or (hint,)
        if get_origin(plain) is Literal:
            assert plain == hints[name]
            chosen += 1
    assert chosen == 7


def test_doctor(run: Run) -> None:
    plain = json.loads(succeeded(run("doctor", "--json")))
    assert plain["onnxruntime"]["providers"][-1] == "CPUExecutionProvider"
    assert plain["extras"]["cpu"]["packages"]["onnxruntime"]
    assert plain["extras"]["cpu"]["install"] is None
    assert plain["extras"]["openvino"]["install"] is None
    if plain["extras"]["gpu"]["packages"]["onnxruntime-gpu"] is None:
        install = "pip uninstall -y onnxruntime; pip install 'vae-export[gpu]'"
        assert plain["extras"]["gpu"]["install"] == install
    assert plain["problems"] == []
    shown = succeeded(run("doctor"))
    assert "│ [export]" in shown
    assert "\\" not in shown
    assert "make bundles: onnx " in shown


def test_doctor_finds_the_clash_and_the_lack(run: Run, tmp_path: Path) -> None:
    """Real metadata of both packages on the path; and an onnxruntime that does not load."""
    for name in ("onnxruntime", "onnxruntime_gpu"):
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    done = run("doctor", PYTHONPATH=str(tmp_path / "site"))
    failed(done, 0, "problem: onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files")
    (tmp_path / "site" / "onnxruntime.py").write_text("raise OSError('libcudart.so.13 is missing')")
    done = run("doctor", PYTHONPATH=str(tmp_path / "site"))
    failed(done, 4, "onnxruntime is installed and does not load: libcudart.so.13 is missing")


def test_bench(run: Run, digits: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path, source = digits["gaussian"], checkpoints["gaussian"]
    few = ("--batches", "1,3", "--verbs", "decode,encode", "--seconds", 0.05, "--threads", 1)
    built = vae_export.build(path, "cpu", out=tmp_path / "fp16.build", precision="fp16").path
    plain = json.loads(succeeded(run("bench", path, "--build", built, "--json", "--plot", "p.png", *few)))
    assert {row["runner"] for row in plain["rows"]} == {"vae_export fp16", "ONNX Runtime"}
    assert {(row["verb"], row["batch"]) for row in plain["rows"]} == {
        (verb, batch) for verb in ("encode", "decode") for batch in (1, 3)
    }
    assert all(0 < row["p10_us"] <= row["p50_us"] <= row["p90_us"] for row in plain["rows"])
    assert (tmp_path / "p.png").is_file()
    shown = succeeded(run("bench", path, "--source", source, "--peers", "--batches", 1, "--verbs", "decode", *few[4:]))
    for part in ("vae_export ", "ONNX Runtime", "PyTorch eager", "torch.compile", "OpenVINO f32", "NumPy's matrix pro"):
        assert part in shown
    failed(run("bench", path, "--batches", "x"), 2, "batches are 'x'; expected numbers such as 8,64")
    failed(run("bench", path, "--batches", "0"), 2, "batches are [0]; expected numbers from 1 on")
    failed(run("bench", path, "--batches", 2**40), 2, "expected numbers from 1 on, at most 2147483647")
    failed(
        run("bench", path, "--target", "cuda"),
        2,
        "bench: the cache has no build for cuda in fp32. Run: vae-export build",
    )
    failed(run("bench", path, "--source", source), 2, "which is a peer, and no peers are timed. Add --peers")
    failed(run("bench", path, "--plot", "p.svg"), 2, "the plot's path is p.svg; expected a name that ends in .png")
    failed(run("bench", path, "--plot", path / "p.png"), 2, "lies inside the bundle, which is never changed")


SIGNAL_IN_THE_LOOP = """
import os, sys
from vae_export.trainers.batches import Batches
from vae_export.commands.app import main

before = Batches.__getitem__
def item(batches, step):
    if step == 3:
        os.kill(os.getpid(), {number})
    return before(batches, step)
Batches.__getitem__ = item
sys.argv[1:] = ["train", "out", "--epochs", "100000"]
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(run: Run, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """In the middle of training: saved, the signal's exit code, no traceback; and it can go on."""
    command = [sys.executable, "-c", SIGNAL_IN_THE_LOOP.format(number=int(number))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert "out: stopped after step 4 and saved; continue with --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(".lock", "config.json", "metrics.csv", "tensorboard", "training_state.safetensors"),
    }
    failed(run("export", "out", "b"), 2, "out is a run that was stopped before its first evaluation. Continue it: ")
    failed(
        run("train", "out", "--resume", "--epochs", "2"),
        2,
        "train.epochs was 100000 and is now 2. Use the old value, or start a new run in another folder",
    )


def test_a_closed_pipe_is_no_accident(digits: dict[str, Path], tmp_path: Path, images: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", np.tile(images, (3, 1, 1, 1)))
    command = (
        f"{shlex.quote(sys.executable)} -m vae_export score {shlex.quote(str(digits['gaussian']))} x.npy | head -1"
    )
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "index,elbo,reconstruction,kl\n"
    assert "Traceback" not in done.stderr


def test_nobody_reads(digits: dict[str, Path]) -> None:
    """A broken pipe is no failed verification, and says nothing."""
    command = [sys.executable, "-m", "vae_export", "inspect", str(digits["gaussian"]), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_fault_of_ours_asks_for_a_report() -> None:
    program = (
        "from vae_export.commands import app\ndef fault(): raise KeyError('\\x1b[31m')\napp.app = fault\napp.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 70
    assert "Traceback" in done.stderr
    assert "error: this is a fault of vae_export itself: KeyError: " in done.stderr
    assert "Please report it, with the lines above" in done.stderr
    assert "\x1b" not in done.stderr
