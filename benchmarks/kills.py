"""Kill training runs at random moments with SIGKILL, resume them, and compare them with an uninterrupted run.

    make kills

Prints each run that was lost or differs, and exits with 1 if there is one. Every run writes its
checkpoint after every step, so that many moments lie within a write.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import torch

from vae_export.trainers import checkpoint, datasets
from vae_export.trainers import config as configs
from vae_export.trainers.config import DataConfig, ModelConfig, TrainConfig
from vae_export.trainers.fit import fit

MODEL = ModelConfig(model="mlp", data_shape=(1, 8, 8), likelihood="gaussian", widths=(32,), latent=4)
TRAIN = TrainConfig(epochs=2, importance_draws=1, device="cpu")


def main(count: int) -> int:
    """Kill and continue `count` runs."""
    choose = random.Random(0)
    datasets.load(DataConfig(), 0)  # imported before: imports take longer than the training that is to be killed
    torch.set_num_threads(1)  # for all: a process that is forked has no threads of its own to lose
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        began = time.perf_counter()
        wait(start(whole))
        duration = time.perf_counter() - began
        steps: list[int] = []
        bad = 0
        for number in range(count):
            path = Path(folder, "killed")
            shutil.rmtree(path, ignore_errors=True)
            child = start(path)
            time.sleep(choose.uniform(0, duration))
            os.kill(child, signal.SIGKILL)
            wait(child)
            try:
                kept = checkpoint.read_state(path)
                code = wait(start(path))
                said = path.with_suffix(".log").read_text()[-500:]
                problem = f"the resumed run ended with {code}: {said}" if code else difference(whole, path)
            except Exception as error:  # any error of a damaged run counts
                kept, problem = None, f"lost: {error}"
            steps.append(kept[0].step if kept else 0)
            if problem:
                bad += 1
                print(f"{number}: {problem}")
    later = sorted(step for step in steps if step)
    print(f"{count} runs killed and continued: {steps.count(0)} before their first checkpoint, the others after steps")
    print(f"{later}\nlost or different: {bad}")
    return int(bad > 0)


def start(path: Path) -> int:
    """Start or resume the run in `path` in a forked process; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr = path.with_suffix(".log").open("w")
        fit(path, MODEL, TRAIN, resume=True, checkpoint_seconds=0.0)
        code = 0
    except BaseException as error:  # the process ends here: nothing else reports it
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def difference(one: Path, other: Path) -> str | None:
    """The first difference between two runs in weights, state, history or result, to the bit; None if there is none."""
    states = [checkpoint.read_state(path) for path in (one, other)]
    weights = [checkpoint.read_weights(path) for path in (one, other)]
    assert states[0]
    if states[1] is None:
        return "no state"
    if states[0][0].step != states[1][0].step:
        return f"step {states[1][0].step} and not {states[0][0].step}"
    for a, b in ((states[0][1], states[1][1]), weights):
        if a.keys() != b.keys():
            return "other tensors"
        for name in a:
            if not torch.equal(a[name], b[name]):
                return f"{name} differs"
    histories = [[msgspec.structs.replace(row, images_per_second=0.0) for row in state[0].history] for state in states]
    if histories[0] != histories[1]:
        return "another history"
    results = [configs.read(path).result for path in (one, other)]
    return None if results[0] == results[1] else "other results"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
