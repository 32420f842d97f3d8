"""What a run survives: kill -9, damaged and malicious files, a second run of the same name; and torchrun, and hours."""

import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch._dynamo.utils import counters

import data
import datasets
import distill
import train
from checkpoint import load, load_model, lock, open_run
from config import parse_config, resolve

ROOT = Path(train.__file__).parent
SMALL = ["--dataset", "shapes", "--model", "vit", "--size", "tiny", "--device", "cpu", "--patch-size", "16",
         "--dim", "8", "--depth", "1", "--heads", "1", "--compile", "off", "--amp", "off"]
FEW = datasets.load_shapes(400, 100)


def run_python(code, *arguments):
    """A fresh process that runs the code beside the project's files."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(train, "load_dataset", lambda *_: FEW)


def config(tmp_path, *flags):
    return resolve(parse_config(argv=[*SMALL, "--out", str(tmp_path), "--name", "a", *flags]))


# ---- Kills

KILLS = """
import os, random, signal, sys, time
import torch, torch.utils.flop_counter
torch.set_num_threads(1)  # without a pool of threads, forking is safe
import datasets, train
from checkpoint import load
from config import parse_config, resolve
few = datasets.load_shapes(400, 100)
train.load_dataset = lambda *_: few
config = resolve(parse_config(argv=sys.argv[1:]))
last = os.path.join(config.out, config.name, "last.pt")
random.seed(0)
step = 0
for kill in range(50):
    child = os.fork()
    if child == 0:
        config.resume = os.path.exists(last)
        config.overwrite = not config.resume
        train.run(config)
        os._exit(1)
    while not os.path.exists(last):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.01)
    time.sleep(random.uniform(0.05, 0.8))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it ended by itself"
    content = load(last)
    assert content["step"] >= step and all(p.isfinite().all() for p in content["model"].values())
    step = content["step"]
print("step", step)
"""


def test_fifty_kills_leave_a_whole_checkpoint_every_time(tmp_path):
    result = run_python(KILLS, *SMALL, "--epochs", "1000000", "--batch-size", "50", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert int(re.search(r"^step (\d+)$", result.stdout, re.M)[1]) >= 50  # the runs went on from each other


# ---- Exact resume

def same_bits(a, b):
    for part in ("model", "ema_model", "curves"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(value, b[part][name]) for name, value in a[part].items()), part


needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=needs_compiler)])
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("script", ["train", "distill"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, few, script, amp, compiled):
    """Stopped in its first epoch, at the end of it, and in its last: 3 epochs of 4 steps."""
    torch._dynamo.reset(), counters.clear()
    flags = [*SMALL, "--out", str(tmp_path), "--epochs", "3", "--batch-size", "100", "--drop-path", "0.2",
             "--mixup", "1", "--ema", "0.9", "--amp", amp, "--compile", compiled]
    if script == "distill":
        train.run(config(tmp_path, "--name", "teacher", "--epochs", "1", "--batch-size", "100"))
        flags += ["--teacher", str(tmp_path / "teacher" / "model.pt")]
    command = dict(train=lambda c, loss: train.run(resolve(c), loss), distill=distill_with)[script]

    def go(name, *more, stop=None):
        steps = []

        def loss(*batch):
            steps.append(1)
            if len(steps) == stop:
                train.stopped_by.append(2)
            return train.cross_entropy(*batch)
        argv = [a if a != "--model" or script == "train" else "--student" for a in [*flags, "--name", name, *more]]
        command(parse_config({"train": train, "distill": distill}[script].Config, argv), loss)

    with pytest.MonkeyPatch.context() as patch:
        go("whole")
        for first, stop in (([], 2), (["--resume"], 2), (["--resume"], 6)):  # at steps 2, 4 and 10 of 12
            patch.setattr(train, "stopped_by", [])
            with pytest.raises(SystemExit) as end:
                go("cut", *first, stop=stop)
            assert end.value.code == 130
        patch.setattr(train, "stopped_by", [])
        assert load(tmp_path / "cut" / "last.pt")["step"] == 10
        go("cut", "--resume")
    same_bits(*(load(tmp_path / name / "last.pt") for name in ("whole", "cut")))
    assert bool(counters["stats"]["unique_graphs"]) == (compiled == "on")


def distill_with(settings, loss):
    """distill.py's command, with a loss that calls `loss` beside its own."""
    made = distill.make_loss

    def both(*arguments):
        own = made(*arguments)
        return lambda *batch: (loss(*batch), own(*batch))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "make_loss", both)
        distill.start(settings)


def same_within(a, b, atol):
    for name, value in a["model"].items():
        torch.testing.assert_close(value, b["model"][name], atol=atol, rtol=0)


@needs_compiler
def test_compiled_and_eager_runs_go_on_with_each_other(tmp_path, few):
    torch._dynamo.reset()
    ends = {}
    for name, first, second in (("a", "on", "off"), ("b", "off", "on"), ("c", "off", "off")):
        flags = ["--name", name, "--batch-size", "50"]
        train.run(config(tmp_path, *flags, "--epochs", "2", "--compile", first))
        ends[name, 2] = load(tmp_path / name / "last.pt")
        train.run(config(tmp_path, *flags, "--epochs", "3", "--compile", second, "--resume"))
        ends[name, 3] = load(tmp_path / name / "last.pt")
    for name in "ab":
        same_within(ends[name, 3], ends["c", 3], 2e-3)
    with pytest.raises(AssertionError):  # one epoch moves the weights by far more
        same_within(ends["c", 2], ends["c", 3], 2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_moves_from_the_cpu_to_the_gpu_and_back(tmp_path, few, monkeypatch):
    monkeypatch.setattr(data, "crop_and_flip", lambda images, padding: images)  # a GPU would draw others
    ends = {}
    for epochs, device in ((1, "cpu"), (2, "cuda"), (3, "cpu")):
        for name in ("stays", "moves"):
            train.run(config(tmp_path, "--name", name, "--batch-size", "50", "--ema", "0.9", "--epochs", str(epochs),
                             "--device", device if name == "moves" else "cpu", *(["--resume"] if epochs > 1 else [])))
            ends[name, epochs] = load(tmp_path / name / "last.pt")
    same_within(ends["stays", 3], ends["moves", 3], 2e-3)
    with pytest.raises(AssertionError):  # the epoch on the GPU moves the weights by far more
        same_within(ends["stays", 1], ends["stays", 2], 2e-3)


# ---- Signals

SLOW = """
import os, time
import config, datasets, train
few = datasets.load_shapes(400, 100)
train.load_dataset = lambda *_: few
def slow(*batch):
    print("a step", flush=True)
    time.sleep(float(os.environ["STEP_SECONDS"]))
    return train.cross_entropy(*batch)
train.main(start=lambda c: train.run(config.resolve(c), slow))
"""


@pytest.mark.parametrize("number, again, seconds, status", [
    (signal.SIGINT, False, "0.1", 130), (signal.SIGTERM, False, "0.1", 143),
    (signal.SIGINT, True, "60", -signal.SIGINT), (signal.SIGTERM, True, "60", -signal.SIGTERM)])
def test_a_signal_ends_the_run_after_its_step_and_a_second_one_at_once(tmp_path, number, again, seconds, status):
    """With `again`, the step takes a minute."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, *SMALL, "--out", str(tmp_path), "--name", "a"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                               env=dict(os.environ, STEP_SECONDS=seconds))
    for line in process.stdout:
        if line == "a step\n":
            break
    process.send_signal(number)
    assert process.stderr.readline() == "\n" and "once more" in process.stderr.readline()
    if again:
        process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == status
    assert ("--resume" in out) == (tmp_path / "a" / "last.pt").exists() == (not again)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_data_is_loaded_ends_the_run_at_once(tmp_path, number):
    loading = """
import time, train
def load(*_):
    print("loading", flush=True)
    time.sleep(60)
train.load_dataset = load
train.main()
"""
    process = subprocess.Popen([sys.executable, "-c", loading, *SMALL, "--out", str(tmp_path)], text=True, cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err.startswith("\nstopped before the first step: ") and err.count("\n") == 2


def test_only_between_the_first_step_and_the_end_does_a_signal_wait_for_a_step(tmp_path, few):
    """Not while a student is made after its teacher's run. A handler that is not main's stays."""
    during = []

    def loss(*batch):
        during.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
        return train.cross_entropy(*batch)
    signal.signal(signal.SIGINT, train.stop_at_once)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    train.run(config(tmp_path, "--epochs", "1", "--batch-size", "200"), loss)
    assert during == [[train.stop_after_step, signal.SIG_DFL]] * 2
    assert signal.getsignal(signal.SIGINT) is train.stop_at_once
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- A disk or a memory that is too small

def test_a_disk_that_fills_up_leaves_the_checkpoint_before_it(tmp_path):
    flags = [sys.executable, "train.py", *SMALL, "--out", str(tmp_path), "--name", "a", "--batch-size", "2000"]
    assert subprocess.run([*flags, "--epochs", "1"], cwd=ROOT, capture_output=True).returncode == 0
    whole = (tmp_path / "a" / "last.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2,) * 2)  # bytes that a file may have
    result = subprocess.run([*flags, "--epochs", "3", "--resume"], cwd=ROOT, capture_output=True, text=True,
                            preexec_fn=limit)
    assert result.returncode == 1 and "disk" in result.stderr and len(result.stderr.splitlines()) == 1
    assert (tmp_path / "a" / "last.pt").read_bytes() == whole and not (tmp_path / "a" / "last.pt.new").exists()


def test_a_memory_that_is_too_small_names_the_flag(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))  # bytes; the weights of attention need 2^35
    result = subprocess.run([sys.executable, "train.py", *SMALL, "--out", str(tmp_path), "--patch-size", "1",
                             "--batch-size", "4000", "--heads", "2"], cwd=ROOT, capture_output=True, text=True,
                            preexec_fn=limit, env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))
    assert result.returncode == 1 and "--batch-size" in result.stderr and len(result.stderr.splitlines()) == 1


# ---- Damaged and malicious files

class Evil:
    """Unpickled by a careless reader, it writes a file."""
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def damaged(whole, rng, marker):
    """Endless ways to spoil a file: cut off, bits flipped, emptied, padded, swapped for something else, malicious."""
    while True:
        kind = rng.randrange(6)
        if kind == 0:
            yield whole[: rng.randrange(len(whole))]
        elif kind in (1, 2):
            spoiled = bytearray(whole)
            for _ in range(rng.choice((1, 3, 30))):
                spoiled[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            yield bytes(spoiled)
        elif kind == 3:
            start = rng.randrange(len(whole))
            yield whole[:start] + bytes(rng.randrange(1, 200)) + whole[start + rng.randrange(200) :]
        elif kind == 4:
            foreign = io.BytesIO()
            torch.save(rng.choice(([], {}, {"step": 3}, torch.zeros(3), {"config": {}, "model": 1}, "text")), foreign)
            yield rng.choice((b"", b"PK\x05\x06" + bytes(18), b"hello", rng.randbytes(500), foreign.getvalue()))
        else:
            evil = io.BytesIO()
            torch.save({"config": Evil(marker), "state_dict": Evil(marker)}, evil)
            yield rng.choice((pickle.dumps(Evil(marker)), evil.getvalue()))


def test_a_damaged_checkpoint_is_refused_or_harmless(tmp_path, few, capsys):
    """150 broken last.pt and 150 broken model.pt: one sentence each, no other exception, and no code is run."""
    train.run(config(tmp_path, "--epochs", "1", "--batch-size", "200"))
    rng, marker, refused = random.Random(0), tmp_path / "executed", 0
    for name in ("last.pt", "model.pt"):
        path = tmp_path / "a" / name
        whole = path.read_bytes()
        for _, content in zip(range(150), damaged(whole, rng, marker)):
            path.write_bytes(content)
            try:
                if name == "last.pt":
                    train.run(config(tmp_path, "--epochs", "1", "--batch-size", "200", "--resume"))
                else:
                    load_model(path)[0](torch.zeros(1, 3, 32, 32))
            except datasets.InputError as error:
                assert "\n" not in str(error) and name in str(error)
                refused += 1
            assert not marker.exists()
        path.write_bytes(whole)
    assert refused > 270  # the others were damaged where nothing is read


def test_a_damaged_image_is_named_or_harmless(tmp_path):
    """60 broken pictures in a folder of one's own."""
    rng, refused = random.Random(1), 0
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
    for i, suffix in enumerate(("png", "jpg", "bmp", "webp") * 15):
        path, whole = tmp_path / "cat" / f"broken.{suffix}", io.BytesIO()
        Image.fromarray(noise).save(whole, format={"jpg": "jpeg"}.get(suffix, suffix))
        path.write_bytes(next(damaged(whole.getvalue(), rng, tmp_path / "executed")))
        try:
            datasets.load_dataset("folder", tmp_path)
        except datasets.InputError as error:
            assert path.name in str(error) and "\n" not in str(error)
            refused += 1
        path.unlink()
    assert refused > 20 and not (tmp_path / "executed").exists()


def test_a_damaged_file_of_cifar_is_named(tmp_path, monkeypatch):
    """35 times one of the seven files is broken, all others are whole: their sums are taken for the official ones."""
    folder, source = tmp_path / "cifar-10-batches-py", torchvision.datasets.CIFAR10
    folder.mkdir()
    names = [name for name, _ in (*source.train_list, *source.test_list)] + ["batches.meta"]
    batch = {"data": np.zeros((5, 3072), np.uint8), "labels": [0] * 5, "label_names": ["a", "b"]}
    whole = pickle.dumps(batch)
    md5 = hashlib.md5(whole).hexdigest()
    monkeypatch.setattr(source, "train_list", [[name, md5] for name in names[:5]])
    monkeypatch.setattr(source, "test_list", [[names[5], md5]])
    monkeypatch.setattr(source, "meta", dict(source.meta, md5=md5))
    for name in names:
        (folder / name).write_bytes(whole)
    datasets.load_dataset("cifar10", tmp_path)
    for name, content in zip(names * 5, damaged(whole, random.Random(2), tmp_path / "executed")):
        (folder / name).write_bytes(content)
        with pytest.raises(datasets.InputError, match=name):
            datasets.load_dataset("cifar10", tmp_path)
        (folder / name).write_bytes(whole)
    assert not (tmp_path / "executed").exists()


# ---- One run a folder

def test_a_second_run_of_the_same_name_is_refused_and_a_crash_leaves_no_lock(tmp_path):
    code = "import sys, time, checkpoint; checkpoint.lock(sys.argv[1]); print('locked', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(datasets.InputError, match="another run"):
        lock(tmp_path)
    with pytest.raises(datasets.InputError, match="another run"):  # not "no last.pt": one may come
        open_run(config(tmp_path.parent, "--name", tmp_path.name, "--resume"))
    other.kill(), other.wait()
    lock(tmp_path)
    lock(tmp_path)  # again, by the same process


# ---- Several processes

def test_two_processes_train_as_one_does(tmp_path):
    flags = [*SMALL, "--epochs", "3", "--mixup", "0.8", "--cutmix", "1", "--clip", "1", "--optimizer", "adamw", "--ema",
             "0.9", "--out", str(tmp_path)]
    one = subprocess.run([sys.executable, "train.py", *flags, "--name", "1"], capture_output=True, text=True, cwd=ROOT)
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train.py", *flags,
                          "--name", "2"], capture_output=True, text=True, cwd=ROOT)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    logs = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in "12"]
    assert [line["event"] for line in logs[0]] == [line["event"] for line in logs[1]]
    for a, b in zip(*logs):
        if a["event"] == "epoch":
            assert b["train_loss"] == pytest.approx(a["train_loss"], abs=2e-5)
            assert b["loss_floor"] == pytest.approx(a["loss_floor"], abs=1e-5)
    assert two.stdout.count("test accuracy") == 1
    weights = [load(tmp_path / name / "model.pt")["state_dict"] for name in "12"]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-3, rtol=1e-2)


# ---- Hours

def test_saving_takes_one_percent_of_the_time_however_short_the_epochs(tmp_path, few, monkeypatch):
    """By a clock that stands still but for a second a step, two an epoch, and half a second for each save."""
    now, saved = [0.0], []

    def save(content, path):
        saved.append(now[0])
        now[0] += 0.5

    def loss(*batch):
        now[0] += 1
        return train.cross_entropy(*batch)
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train, "save", save)
    train.run(config(tmp_path, "--epochs", "60", "--batch-size", "200"), loss)
    *during, last, model = saved
    assert during == [2.0, 52.5, 103.0] and last == 121.5


MEMORY = """
import sys
import checkpoint, config, datasets, train
few = datasets.load_shapes(400, 100)
train.load_dataset = lambda *_: few
peaks = []
def watch(*batch):
    peaks.append(checkpoint.peak_memory("cpu"))
    return train.cross_entropy(*batch)
train.run(config.resolve(config.parse_config(argv=sys.argv[1:])), watch)
steps = len(peaks) // 300
print("grown", peaks[-1] / peaks[10 * steps])
"""


def test_three_hundred_epochs_take_no_more_memory_than_ten(tmp_path):
    result = run_python(MEMORY, *SMALL, "--epochs", "300", "--batch-size", "100", "--ema", "0.9", "--mixup", "1",
                        "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"grown ([\d.]+)", result.stdout)[1]) < 1.02
