"""show.py: the numbers it prints against hand counts, its pictures by their pixels, its table against the logs."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import datasets
import show
import train
from checkpoint import load_model
from config import FIXED, parse_config, resolve

ROOT = Path(train.__file__).parent


def call(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(sys, "argv", ["show.py", *map(str, arguments)])
    monkeypatch.chdir(tmp_path)
    show.main()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of a ViT with a class token and of a hybrid with a narrow trunk, both tiny."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FIXED, ("hybrid", "tiny"), dict(FIXED["hybrid", "tiny"], widths=(8, 16, 32, 64)))
        for name, flags in (("vit", ["--patch-size", "8", "--pool", "cls"]), ("hybrid", [])):
            argv = ["--model", name, "--dataset", "shapes", "--size", "tiny", "--device", "cpu", "--epochs", "1",
                    "--batch-size", "50", "--dim", "16", "--heads", "2", "--depth", "2", "--compile", "off", "--out",
                    str(folder), "--name", name, *flags]
            train.run(resolve(parse_config(argv=argv)))
    return folder


def test_augment_says_that_cifar_was_not_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show, "load_dataset", lambda *_: datasets.load_shapes(100, 20))
    call(monkeypatch, tmp_path, "augment", "--count", 2)
    assert "data set shapes, as CIFAR-10 was not found\n" in capsys.readouterr().out


def test_augment_shows_the_images_and_what_became_of_them(tmp_path, monkeypatch, capsys):
    call(monkeypatch, tmp_path, "augment", "--dataset", "shapes", "--count", 4)
    assert "data set shapes\n" in capsys.readouterr().out
    picture = Image.open(tmp_path / "augment.png").convert("RGB")
    assert picture.size == (120 + 4 * 100, 8 * 120)
    first = datasets.load_dataset("shapes").train_images[0]
    assert picture.getpixel((120 + 1, 1)) == tuple(first[:, 0, 0].tolist())  # scaled up by 3
    assert picture.getpixel((120 + 46, 46)) == tuple(first[:, 15, 15].tolist())


def test_augment_has_a_row_for_each_augmentation(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(show, "save_grid", lambda *grid: drawn.extend(grid))
    call(monkeypatch, tmp_path, "augment", "--dataset", "shapes", "--count", 6)
    rows, titles, captions, _ = drawn
    plain, cropped, trivial, jittered, erased, mixed, pasted, together = rows
    dataset = datasets.load_dataset("shapes")
    torch.testing.assert_close(plain, dataset.train_images[:6] / 255)
    for row, title in zip(rows[1:], titles[1:]):
        assert row.shape == plain.shape and (row - plain).abs().max() > 0.05, title
    # In every image a box of the mean colour, and nothing else; in most (one can be its own partner) a pasted box.
    changed = (erased != plain).any(dim=1, keepdim=True) & ((erased - plain).abs() > 1e-6)
    assert torch.where(changed, erased - dataset.mean, 0.0).abs().max() < 1e-6 and changed.any(dim=(1, 2, 3)).all()
    kept = (pasted == plain).all(dim=1).float().mean(dim=(1, 2))
    assert (kept < 1).sum() >= 3 and kept.min() > 0
    names = [dataset.classes[k] for k in dataset.train_labels[:6].tolist()]
    assert all(captions[row] == names for row in range(5))
    # Two classes and their shares, or one if the partner is of the same or has next to nothing.
    shares = [[int(share) for share in re.findall(r"(\d+)%", caption)] for caption in captions[5] + captions[6]]
    assert any(shares) and all(95 <= sum(share) <= 101 for share in shares if share)


@pytest.mark.parametrize("name, heads", [("vit", 2), ("hybrid", 2)])
def test_attention_draws_every_head_and_the_rollout(tmp_path, monkeypatch, runs, name, heads):
    call(monkeypatch, tmp_path, "attention", "--model", runs / name / "model.pt", "--dataset", "shapes", "--count", 3,
         "--out", "a.png")
    assert Image.open(tmp_path / "a.png").size == (120 + 3 * 100, (2 + heads) * 120)


@pytest.mark.parametrize("name, extra", [("vit", 1), ("hybrid", 0)])
def test_attention_lights_the_patch_that_is_looked_at(tmp_path, monkeypatch, runs, name, extra):
    weights, drawn = torch.zeros(2, 1, 2, 16 + extra, 16 + extra), []
    weights[..., extra + 5] = 1  # all tokens look at the second patch of the second row, of 4 x 4
    monkeypatch.setattr(show, "attention_weights", lambda *_: weights)
    monkeypatch.setattr(show, "save_grid", lambda rows, *_: drawn.extend(rows))
    call(monkeypatch, tmp_path, "attention", "--model", runs / name / "model.pt", "--count", 1)
    picture, *heads, combined = drawn
    for lit in (*heads, combined):
        share = (lit / picture.clamp(min=1e-3))[0]  # (3, S, S)
        assert share[:, 12, 12].min() > 0.9 and share[:, 28, 28].max() < 0.4


def test_attention_weights_are_those_of_the_forward_pass(runs):
    model, _ = load_model(runs / "vit" / "model.pt")
    images = torch.randn(3, 3, 32, 32)
    weights = show.attention_weights(model, images)
    assert weights.shape == (2, 3, 2, 17, 17)
    x = model.patch_embed(images)
    x = torch.cat([model.encoder.cls_token.expand(3, -1, -1), x], dim=1) + model.encoder.pos_embed
    for block, found in zip(model.encoder.blocks, weights, strict=True):
        torch.testing.assert_close(found, block.attn(block.norm1(x), return_weights=True)[1], atol=1e-5, rtol=1e-4)
        x = block(x)


def test_rollout_by_hand():
    a, b = (torch.rand(1, 2, 3, 3).softmax(dim=-1) for _ in range(2))
    eye = torch.eye(3)
    expected = (0.5 * b[0].mean(0) + 0.5 * eye) @ (0.5 * a[0].mean(0) + 0.5 * eye)
    found = show.rollout(torch.stack([a, b]))
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(1, 3))


def test_calibration_error_by_hand():
    probability = torch.tensor([[0.9, 0.1], [0.92, 0.08], [0.4, 0.6], [0.3, 0.7]])
    labels = torch.tensor([0, 1, 1, 1])
    # bins of 1/15: 0.9 and 0.92 together (13), sure 0.91, right 0.5; 0.6 alone (9), 0.7 alone (10), both right
    expected = (2 * 0.41 + 0.4 + 0.3) / 4
    assert show.calibration_error(probability, labels) == pytest.approx(expected, abs=1e-6)
    assert show.calibration_error(torch.eye(2), torch.arange(2)) == 0


def test_confusion_counts_every_image(tmp_path, monkeypatch, runs, capsys):
    path = runs / "hybrid" / "model.pt"
    call(monkeypatch, tmp_path, "confusion", "--model", path)  # the model knows that it is of shapes
    out = capsys.readouterr().out
    model, about = load_model(path)
    shapes = datasets.load_dataset("shapes")
    images = (shapes.test_images.float() / 255 - about["mean"]) / about["std"]
    with torch.no_grad():
        choice = model(images).argmax(1)
        both = (model(images).softmax(1) + model(images.flip(3)).softmax(1)).argmax(1)
    assert len(choice.unique()) > 3  # else counting would show nothing
    accuracy = [float(found) for found in re.findall(r"accuracy ([\d.]+)", out)]
    expected = [(c == shapes.test_labels).float().mean().item() for c in (choice, both)]
    assert accuracy == pytest.approx(expected, abs=0.0015)
    lines = [line.split() for line in out.splitlines()[-10:]]
    rows = torch.tensor([list(map(int, line[2:])) for line in lines])
    counts = torch.bincount(shapes.test_labels * 10 + choice, minlength=100).view(10, 10)
    assert rows.diag().sum().item() == pytest.approx(1000 * accuracy[0], abs=0.6)
    assert rows.sum() == 1000 and (rows - counts).abs().sum() <= 4  # near ties may end either way
    assert [float(line[1]) for line in lines] == pytest.approx((rows.diag() / rows.sum(1)).tolist(), abs=0.001)
    assert [line[0] for line in lines] == list(datasets.SHAPES)


def test_confusion_leaves_the_test_set_alone_if_the_run_did(tmp_path, monkeypatch, capsys):
    argv = ["--model", "vit", "--dataset", "shapes", "--size", "tiny", "--device", "cpu", "--epochs", "1", "--seed",
            "3", "--dim", "16", "--depth", "1", "--heads", "2", "--hold-out", "500", "--out", str(tmp_path)]
    train.run(resolve(parse_config(argv=[*argv, "--name", "h"])))
    capsys.readouterr()
    seen, probabilities = [], show.probabilities
    monkeypatch.setattr(show, "probabilities", lambda *given: seen.append(given[1]) or probabilities(*given))
    call(monkeypatch, tmp_path, "confusion", "--model", "h/model.pt")
    assert capsys.readouterr().out.splitlines()[0] == "shapes, 500 hold-out images"
    held_out = datasets.load_dataset("shapes", hold_out=500, seed=3)
    assert torch.equal(seen[0].test_images, held_out.test_images)

    def no_network(*_):
        raise ConnectionError
    monkeypatch.setattr(datasets, "load_cifar", no_network)  # so auto is shapes too
    call(monkeypatch, tmp_path, "confusion", "--model", "h/model.pt", "--dataset", "auto")
    assert capsys.readouterr().out.splitlines()[0] == "shapes, 500 hold-out images"
    path = tmp_path / "h" / "model.pt"
    content = torch.load(path)
    torch.save(content | dict(mean=content["mean"] + 0.01), path)  # as if images had been added since
    with pytest.raises(SystemExit, match="held out are not known"):
        call(monkeypatch, tmp_path, "confusion", "--model", "h/model.pt")
    torch.save(content | dict(dataset="folder"), path)  # to other data than its own it may be shown, whole
    call(monkeypatch, tmp_path, "confusion", "--model", "h/model.pt", "--dataset", "shapes")
    assert capsys.readouterr().out.splitlines()[0] == "shapes, 1000 test images"
    torch.save(content | dict(hold_out=0, mean=content["mean"] + 0.01), path)
    call(monkeypatch, tmp_path, "confusion", "--model", "h/model.pt")
    assert "may have seen some test images" in capsys.readouterr().out
    path.unlink()  # as if the run had been stopped
    for name in ("h/model.pt", "h"):
        with pytest.raises(SystemExit, match="no h/model.pt yet: .*--resume"):
            call(monkeypatch, tmp_path, "confusion", "--model", name)


def test_predict_takes_pictures_of_any_size_and_finds_the_newest_model(tmp_path, monkeypatch, runs, capsys):
    Image.new("L", (50, 90), 128).save(tmp_path / "grey.png")
    Image.new("RGBA", (20, 10), "red").save(tmp_path / "small.png")
    (tmp_path / "runs").symlink_to(runs)
    call(monkeypatch, tmp_path, "predict", "grey.png", "small.png")
    model, *lines = capsys.readouterr().out.splitlines()
    assert model == "model runs/hybrid/model.pt"
    for line, name in zip(lines, ("grey.png", "small.png"), strict=True):
        shares = re.findall(r"(\w+) ([\d.]+)%", line)
        assert line.startswith(name + ": ") and len(shares) == 3 and shares[0][0] in datasets.SHAPES
        assert float(shares[0][1]) >= float(shares[1][1]) >= float(shares[2][1])
    for name in ("runs/hybrid/model.pt", "runs/hybrid"):
        call(monkeypatch, tmp_path, "predict", "--model", name, "grey.png", "small.png")
        assert capsys.readouterr().out.splitlines() == lines
    with pytest.raises(SystemExit, match="there is no image absent.png: name another"):
        call(monkeypatch, tmp_path, "predict", "absent.png")


def test_predict_says_what_the_model_says(tmp_path, monkeypatch, runs, capsys):
    image, path = datasets.load_dataset("shapes").test_images[0], runs / "hybrid" / "model.pt"
    show.to_pil_image(image).save(tmp_path / "s.png")
    call(monkeypatch, tmp_path, "predict", "--model", path, "s.png")
    model, about = load_model(path)
    best = model((image[None] / 255 - about["mean"]) / about["std"])[0].softmax(dim=0).topk(3)
    assert capsys.readouterr().out == "s.png: " + ", ".join(
        f"{about['classes'][k]} {share:.1%}" for share, k in zip(best.values.tolist(), best.indices.tolist())) + "\n"


def test_curves(tmp_path, monkeypatch, runs):
    pytest.importorskip("matplotlib", reason="matplotlib is optional, for this picture alone")
    shutil.copy(runs / "vit" / "log.jsonl", tmp_path / "renamed-0.jsonl")
    call(monkeypatch, tmp_path, "curves", runs / "vit", runs / "hybrid" / "log.jsonl", "renamed-0.jsonl")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
    from matplotlib import pyplot as plt
    losses, above, accuracies = plt.gcf().axes
    assert losses.get_legend_handles_labels()[1] == ["vit", "hybrid", "renamed-0"]
    [line] = [line for line in show.read_log(runs / "hybrid" / "log.jsonl") if line["event"] == "epoch"]
    drawn = [[float(curve.get_ydata()[0]) for curve in axes.lines] for axes in (losses, above, accuracies)]
    assert drawn[0][2:4] == [line["train_loss"], line["loss_floor"]]  # each run's loss, then its floor
    assert (drawn[1][1], drawn[2][1]) == (line["train_loss"] - line["loss_floor"], 100 * line["accuracy"])


@pytest.mark.parametrize("arguments, words", [
    (["predict", "none.jpg", "--model", "MODEL"], "none.jpg"), (["attention"], "no model.pt"),
    (["confusion", "--model", "gone.pt"], "gone.pt"), (["curves", "gone"], "gone|matplotlib"),
    (["augment", "--out", "gone/x.png"], "gone/x.png"), (["augment", "--out", "x"], ".png"),
    (["augment", "--dataset", "shapes", "--out", "x.foo"], "unknown file extension"),
    (["augment", "--dataset", "shapes", "--out", "/sys/x.png"], "/sys/x.png"),
    (["confusion", "--model", "MODEL", "--dataset", "folder", "--data-dir", "FOLDER"], "other classes")])
def test_a_mistake_ends_in_one_sentence(tmp_path, monkeypatch, runs, arguments, words):
    for name in ("cat", "dog"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (32, 32)).save(tmp_path / "folder" / name / f"{i}.png")
    known = {"MODEL": runs / "vit" / "model.pt", "FOLDER": tmp_path / "folder"}
    with pytest.raises(SystemExit, match=words) as end:
        call(monkeypatch, tmp_path, *[known.get(argument, argument) for argument in arguments])
    assert str(end.value.code).startswith("error: ") and "\n" not in str(end.value.code)


def test_out_of_memory_ends_in_one_sentence(tmp_path, monkeypatch, runs):
    def too_much(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr(torch, "load", too_much)
    with pytest.raises(SystemExit, match="out of memory"):
        call(monkeypatch, tmp_path, "predict", "x.png", "--model", runs / "vit" / "model.pt")


@pytest.mark.parametrize("arguments, words", [
    (["predict"], "at least one path"), (["confusion", "runs/a/model.pt"], "--model"),
    (["augment", "--seed", "-1"], "--seed")])
def test_a_command_line_that_means_nothing_is_refused(tmp_path, monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, *arguments)
    assert words in capsys.readouterr().err


# ---- The table

def test_epochs_that_a_killed_run_did_twice_count_once(tmp_path):
    """Of three epochs, of four steps each, the first was saved: the others are lost, before they come again too."""
    epoch = lambda n, accuracy: dict(event="epoch", epoch=n, step=4 * n, accuracy=accuracy)
    lines = [dict(event="start", step=0), epoch(1, 0.1), epoch(2, 0.2), epoch(3, 0.3),
             dict(event="resume", step=4), epoch(2, 0.4), dict(event="end")]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert show.read_log(tmp_path / "log.jsonl") == lines[:2] + lines[4:]
    (tmp_path / "log.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(datasets.InputError, match="not a log"):
        show.read_log(tmp_path / "log.jsonl")


def write_log(path, accuracy, machine="a machine", seconds=100.4):
    start = dict(event="start", machine=machine, torch="2.9.0", amp="bf16", parameters=2_000_000,
                 forward_flops=5 * 10**8, config=dict(epochs=3), data=dict(name="cifar10"))
    end = dict(event="end", test_accuracy=accuracy, seconds=seconds, images_per_second=50.0,
               peak_memory_bytes=2 * 10**9)
    path.write_text("".join(json.dumps(line) + "\n" for line in (start, end)))


def test_the_table_has_mean_std_and_n_and_says_what_was_not_run(tmp_path, monkeypatch):
    (tmp_path / "results" / "tiny").mkdir(parents=True)
    shutil.copy(ROOT / "results" / "runs.txt", tmp_path / "results")
    monkeypatch.setattr(show, "ROOT", str(tmp_path))
    write_log(tmp_path / "results" / "tiny" / "vit-0.jsonl", 0.80)
    write_log(tmp_path / "results" / "tiny" / "vit-1.jsonl", 0.82)
    write_log(tmp_path / "results" / "tiny" / "vit-basic-0.jsonl", 0.7)
    write_log(tmp_path / "results" / "tiny" / "vit-1-0.jsonl", 0.5)  # not a seed of vit
    unfinished = '{"event": "start"}\n{"event": "epoch", "epoch": 1}\n'
    (tmp_path / "results" / "tiny" / "hybrid-0.jsonl").write_text(unfinished)
    rows = {line.split(" | ")[0].strip("| "): line for line in show.markdown_table("tiny").splitlines() if "|" in line}
    assert rows["vit"].endswith("| 81.00 ± 1.41 | 2 | 2.00 | 0.500 | 3 | 100 | 50 | 2.00 | a | "
                                "`python train.py --model vit --size tiny` |")
    assert "| 70.00 | 1 |" in rows["vit-basic"]
    assert "not run" in rows["hybrid"] and "not run" in rows["resnet18"]
    assert "a: a machine, bf16, torch 2.9.0" in show.markdown_table("tiny")
    assert "| not run |" in show.markdown_table("base")


def test_seconds_are_those_of_one_machine_and_each_row_says_where_it_ran(tmp_path, monkeypatch):
    (tmp_path / "results" / "tiny").mkdir(parents=True)
    shutil.copy(ROOT / "results" / "runs.txt", tmp_path / "results")
    monkeypatch.setattr(show, "ROOT", str(tmp_path))
    for name, machine, seconds in (("vit-0", "fast", 100), ("vit-1", "slow", 500), ("vit-2", "slow", 700),
                                   ("hybrid-0", "fast", 10), ("hybrid-1", "fast", 20), ("hybrid-2", "fast", 15),
                                   ("resnet18-0", "slow", 300)):
        write_log(tmp_path / "results" / "tiny" / f"{name}.jsonl", 0.8, machine, seconds)
    table = show.markdown_table("tiny")
    rows = {cells[0]: cells for cells in (line.strip("| ").split(" | ") for line in table.splitlines())}
    assert [(rows[name][6], rows[name][9]) for name in ("vit", "hybrid", "resnet18")] \
        == [("100", "1 a, 2 b"), ("15", "a"), ("300", "b")]
    assert "\na: fast, bf16, torch 2.9.0\n" in table and "\nb: slow, bf16, torch 2.9.0\n" in table
    for seed, machine in enumerate(("third", "slow", "slow")):
        write_log(tmp_path / "results" / "tiny" / f"cls-{seed}.jsonl", 0.8, machine)
    ablations = show.ablation_table("tiny")  # their letters are those of the rows, and go on from there
    assert "| 2 b, 1 c |" in ablations and "\nb: slow" in ablations and "\nc: third" in ablations
    assert "a: fast" not in ablations


def test_ablations_are_measured_against_the_row_they_change_seed_by_seed(tmp_path, monkeypatch):
    (tmp_path / "results" / "tiny").mkdir(parents=True)
    shutil.copy(ROOT / "results" / "runs.txt", tmp_path / "results")
    monkeypatch.setattr(show, "ROOT", str(tmp_path))
    assert show.ablation_table("tiny") == ""
    for name, accuracy in (("vit-0", 0.5), ("vit-1", 0.6), ("patch-8-0", 0.52), ("patch-8-1", 0.64),
                           ("patch-8-2", 0.7), ("vit-distilled-0", 0.7), ("hard-0", 0.65), ("alpha-1-3", 0.5)):
        write_log(tmp_path / "results" / "tiny" / f"{name}.jsonl", accuracy)
    table = show.ablation_table("tiny")
    assert ("| patch-8 | 58.00 ± 8.49 | +3.00 ± 1.41 | vit | 2 | 0.500 | 100 | a | "
            "`python train.py --model vit --patch-size 8 --size tiny` |") in table
    assert "| hard | 65.00 | -5.00 | vit-distilled | 1 |" in table
    assert "alpha-1" not in table  # there is nothing of its seed to compare it with
    assert f"Not run: {len(show.planned('tiny', ablations=True)) - 2} more" in table


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_every_row_is_a_command_that_parses_and_every_ablation_changes_its_base(size):
    import distill

    def config(command):
        script, *flags = command.split()
        config_class = {"train.py": train.Config, "distill.py": distill.Config}[script]
        settings = resolve(parse_config(config_class, [*flags, "--size", size]))
        return {key: value for key, value in vars(settings).items() if key != "name"}
    rows, changes = show.planned(size), show.planned(size, ablations=True)
    commands = rows | {name: command for name, (_, command) in changes.items()}
    for name, command in commands.items():
        assert config(command), name
    for name, (base, command) in changes.items():
        before, after = config(commands[base]), config(command)
        assert before.keys() == after.keys() and before != after, name


FAKE_PYTHON = """#!/usr/bin/env bash
echo "$@" >> calls
echo "${OMP_NUM_THREADS-all}" >> threads
echo "${DATA_DIR-data}" >> data_dirs
[ "$1" != -c ] || { mkdir -p data/cifar-10-batches-py; exit; }
while [ $# -gt 0 ]; do case $1 in --name) name=$2;; --out) out=$2;; esac; shift; done
mkdir -p "$out/$name"
trap 'sleep 0.5; echo saved > "$out/$name/last.pt"; exit 143' TERM
[ ! -e slow ] || { touch running; for i in $(seq 300); do sleep 0.1; done; }
[ "$name" != hybrid-0 ] || exit 1
echo "{}" > "$out/$name/log.jsonl"
touch "$out/$name/model.pt"
"""


@pytest.fixture
def reproduce(tmp_path):
    """reproduce.sh with a stand-in for python: its own work is to choose, to name, to skip and to copy."""
    (tmp_path / "results").mkdir()
    (tmp_path / "bin").mkdir()
    script, fake = tmp_path / "results" / "reproduce.sh", tmp_path / "bin" / "python"
    for file in ("reproduce.sh", "runs.txt"):
        shutil.copy(ROOT / "results" / file, tmp_path / "results")
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    (tmp_path / "bin" / "getconf").write_text("#!/bin/sh\necho 8\n")  # the machine's cores
    (tmp_path / "bin" / "getconf").chmod(0o755)
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    return lambda *arguments, **variables: subprocess.Popen(
        ["bash", script, *arguments], stderr=subprocess.PIPE, text=True,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", **variables})


def test_reproduce_runs_a_row_once_and_goes_on_from_a_stop(tmp_path, reproduce):
    calls = lambda: (tmp_path / "calls").read_text().splitlines()
    stopped = tmp_path / "runs" / "reproduce-tiny" / "vit-1"
    stopped.mkdir(parents=True)
    (stopped / "last.pt").touch()
    assert reproduce("--seeds", "2", "vit", "resnet18").wait() == 0
    assert len(calls()) == 4 and calls()[0] == ("train.py --model vit --size tiny --seed 0 --name vit-0 "
                                                "--out runs/reproduce-tiny --dataset cifar10")
    assert calls()[1].endswith("--resume") and "resnet18" in calls()[3]
    assert {p.name for p in (tmp_path / "results" / "tiny").iterdir()} == {
        "vit-0.jsonl", "vit-1.jsonl", "resnet18-0.jsonl", "resnet18-1.jsonl"}
    assert reproduce("--seeds", "2", "vit").wait() == 0 and len(calls()) == 4
    assert reproduce("--help").wait() == 0
    for wrong in (["vgg"], ["--size", "huge"], ["--sedes", "2"], ["--seeds", "0"], ["--jobs"]):
        process = reproduce(*wrong)
        assert process.wait() == 2 and process.stderr.read().startswith("error: ")


def test_reproduce_runs_ablations_side_by_side_and_a_teacher_before_its_students(tmp_path, reproduce):
    assert reproduce("--jobs", "3", "hard", "patch-8", "cls").wait() == 0
    *others, teacher, student = (tmp_path / "calls").read_text().splitlines()
    assert sorted(others) == [
        f"train.py --model vit {flag} --size tiny --seed 0 --name {name}-0 --out runs/reproduce-tiny "
        "--dataset cifar10" for flag, name in (("--patch-size 8", "patch-8"), ("--pool cls", "cls"))]
    assert "--model resnet18" in teacher and "--epochs" not in teacher
    assert student.startswith("distill.py --student vit --hard --size tiny ")
    assert student.endswith("--teacher runs/reproduce-tiny/resnet18-0/model.pt")
    assert {p.name for p in (tmp_path / "results" / "tiny").iterdir()} == {
        "hard-0.jsonl", "patch-8-0.jsonl", "cls-0.jsonl", "resnet18-0.jsonl"}
    assert reproduce("--seeds", "2", "hard").wait() == 0  # a second seed has a teacher of its own
    teacher, student = (tmp_path / "calls").read_text().splitlines()[4:]
    assert "--seed 1 --name resnet18-1 " in teacher
    assert "--seed 1 --name hard-1 " in student
    assert student.endswith("--teacher runs/reproduce-tiny/resnet18-1/model.pt")


def test_the_students_of_base_learn_from_the_teacher_that_its_logs_name(tmp_path, reproduce):
    assert reproduce("--size", "base", "hard").wait() == 0
    teacher, student = (tmp_path / "calls").read_text().splitlines()
    assert teacher.startswith("train.py --model resnet18 --epochs 50 --size base --seed 0 --name resnet18-50-epochs-0 ")
    taught = json.loads((ROOT / "results" / "base" / "vit-distilled-0.jsonl").read_text().splitlines()[0])
    alone = json.loads((ROOT / "results" / "base" / "resnet18-50-epochs-0.jsonl").read_text().splitlines()[-1])
    assert student.endswith("--teacher runs/reproduce-base/resnet18-50-epochs-0/model.pt")
    assert abs(taught["teacher"]["accuracy"] - alone["test_accuracy"]) < 5e-4  # it was measured with other kernels


@pytest.mark.parametrize("jobs, variables, threads", [
    ("1", {}, "all"), ("3", {}, "2"), ("9", {}, "1"), ("3", {"OMP_NUM_THREADS": "5"}, "5")])
def test_runs_side_by_side_share_the_cores(tmp_path, reproduce, jobs, variables, threads):
    assert reproduce("--jobs", jobs, "vit", **variables).wait() == 0
    assert (tmp_path / "threads").read_text().split() == [threads]


def test_one_process_downloads_for_runs_side_by_side(tmp_path, reproduce):
    (tmp_path / "data" / "cifar-10-batches-py").rmdir()
    assert reproduce("--jobs", "2", "vit", "cls").wait() == 0
    first, *runs = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith("-c ") and 'load_dataset("cifar10")' in first
    assert [run.split()[0] for run in runs] == ["train.py"] * 2
    assert reproduce("--jobs", "2", "hybrid-builtin", DATA_DIR="elsewhere").wait() == 0
    assert [call.split()[0] for call in (tmp_path / "calls").read_text().splitlines()[3:]] == ["-c", "train.py"]
    assert (tmp_path / "data_dirs").read_text().split() == ["data"] * 3 + [f"{os.getcwd()}/elsewhere"] * 2


def test_reproduce_says_which_run_failed(tmp_path, reproduce):
    process = reproduce("hybrid", "resnet18")
    assert process.wait() != 0 and "hybrid-0 failed" in process.stderr.read()
    assert not list((tmp_path / "results" / "tiny").iterdir())


def test_reproduce_waits_until_a_stopped_run_has_saved(tmp_path, reproduce):
    (tmp_path / "slow").touch()
    process = reproduce("vit")
    while not (tmp_path / "running").exists():
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 130
    assert (tmp_path / "runs" / "reproduce-tiny" / "vit-0" / "last.pt").read_text() == "saved\n"
