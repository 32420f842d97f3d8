"""show.py: the numbers it prints against hand counts, its pictures by their pixels, its table against the logs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import show
import train

ROOT = Path(train.__file__).parent


def call(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(sys, "argv", ["show.py", *map(str, arguments)])
    monkeypatch.chdir(tmp_path)
    show.main()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of a ViT with a class token and of a hybrid, both tiny."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (("vit", ["--patch-size", "8", "--heads", "2", "--pool", "cls"]), ("hybrid", ["--heads", "2"])):
        argv = ["--model", name, "--dataset", "shapes", "--size", "tiny", "--device", "cpu", "--epochs", "1",
                "--dim", "16", "--compile", "off", "--depth", "2", "--out", str(folder), "--name", name, *flags]
        train.run(train.resolve(train.parse_config(argv=argv)))
    return folder


def test_augment_shows_the_images_and_what_became_of_them(tmp_path, monkeypatch):
    call(monkeypatch, tmp_path, "augment", "--dataset", "shapes", "--count", 4)
    picture = Image.open(tmp_path / "augment.png").convert("RGB")
    assert picture.size == (120 + 4 * 100, 8 * 120)
    first = data.load_dataset("shapes").train_images[0]
    assert picture.getpixel((120 + 1, 1)) == tuple(first[:, 0, 0].tolist())  # scaled up by 3
    assert picture.getpixel((120 + 46, 46)) == tuple(first[:, 15, 15].tolist())


@pytest.mark.parametrize("name, heads", [("vit", 2), ("hybrid", 2)])
def test_attention_draws_every_head_and_the_rollout(tmp_path, monkeypatch, runs, name, heads):
    call(monkeypatch, tmp_path, "attention", "--model", runs / name / "model.pt", "--dataset", "shapes", "--count", 3,
         "--out", "a.png")
    assert Image.open(tmp_path / "a.png").size == (120 + 3 * 100, (2 + heads) * 120)


def test_attention_weights_are_those_of_the_forward_pass(runs):
    model, _ = train.load_model(runs / "vit" / "model.pt")
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
    call(monkeypatch, tmp_path, "confusion", "--model", path, "--dataset", "shapes")
    out = capsys.readouterr().out
    model, about = train.load_model(path)
    shapes = data.load_dataset("shapes")
    images = (shapes.test_images.float() / 255 - about["mean"]) / about["std"]
    with torch.no_grad():
        choice = model(images).argmax(1)
        both = (model(images).softmax(1) + model(images.flip(3)).softmax(1)).argmax(1)
    accuracy = [float(found) for found in re.findall(r"accuracy ([\d.]+)", out)]
    assert accuracy == [pytest.approx((c == shapes.test_labels).float().mean().item(), abs=0.0015) for c in (choice, both)]
    rows = [list(map(int, line.split()[2:])) for line in out.splitlines()[-10:]]
    assert sum(map(sum, rows)) == 1000
    assert sum(rows[k][k] for k in range(10)) == pytest.approx(1000 * accuracy[0], abs=0.6)


def test_predict_takes_pictures_of_any_size_and_finds_the_newest_model(tmp_path, monkeypatch, runs, capsys):
    Image.new("L", (50, 90), 128).save(tmp_path / "grey.png")
    Image.new("RGBA", (20, 10), "red").save(tmp_path / "small.png")
    (tmp_path / "runs").symlink_to(runs)
    call(monkeypatch, tmp_path, "predict", "grey.png", "small.png")
    model, *lines = capsys.readouterr().out.splitlines()
    assert model == "model runs/hybrid/model.pt"
    for line, name in zip(lines, ("grey.png", "small.png"), strict=True):
        shares = re.findall(r"(\w+) ([\d.]+)%", line)
        assert line.startswith(name + ": ") and len(shares) == 3 and shares[0][0] in data.SHAPES
        assert float(shares[0][1]) >= float(shares[1][1]) >= float(shares[2][1])


def test_curves(tmp_path, monkeypatch, runs):
    pytest.importorskip("matplotlib", reason="matplotlib is optional, for this picture alone")
    call(monkeypatch, tmp_path, "curves", runs / "vit", runs / "hybrid")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000


@pytest.mark.parametrize("arguments, words", [
    (["predict", "none.jpg", "--model", "MODEL"], "none.jpg"), (["attention"], "no model.pt"),
    (["confusion", "--model", "gone.pt"], "gone.pt"), (["curves", "gone"], "gone|matplotlib"),
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


# ---- The table

def write_log(path, accuracy, machine="a machine"):
    start = dict(event="start", machine=machine, torch="2.9.0", amp="bf16", parameters=2_000_000, forward_flops=5 * 10**8,
                 config=dict(epochs=3), data=dict(name="cifar10"))
    end = dict(event="end", test_accuracy=accuracy, seconds=100.4, images_per_second=50.0, peak_memory_bytes=2 * 10**9)
    path.write_text("".join(json.dumps(line) + "\n" for line in (start, end)))


def test_the_table_has_mean_std_and_n_and_says_what_was_not_run(tmp_path, monkeypatch):
    (tmp_path / "results" / "tiny").mkdir(parents=True)
    (tmp_path / "results" / "reproduce.sh").write_text((ROOT / "results" / "reproduce.sh").read_text())
    monkeypatch.setattr(show, "ROOT", str(tmp_path))
    write_log(tmp_path / "results" / "tiny" / "vit-0.jsonl", 0.80)
    write_log(tmp_path / "results" / "tiny" / "vit-1.jsonl", 0.82)
    write_log(tmp_path / "results" / "tiny" / "vit-basic-0.jsonl", 0.7)
    write_log(tmp_path / "results" / "tiny" / "vit-1-0.jsonl", 0.5)  # not a seed of vit
    (tmp_path / "results" / "tiny" / "hybrid-0.jsonl").write_text('{"event": "start"}\n{"event": "epoch"}\n')  # unfinished
    rows = {line.split(" | ")[0].strip("| "): line for line in show.markdown_table("tiny").splitlines() if "|" in line}
    assert "| 81.00 ± 1.41 | 2 | 2.00 | 0.500 | 3 | 100 | 50 | 2.00 | `python train.py --model vit --size tiny` |" in rows["vit"]
    assert "| 70.00 | 1 |" in rows["vit-basic"]
    assert "not run" in rows["hybrid"] and "not run" in rows["resnet18"]
    assert "a machine, torch 2.9.0, bf16" in show.markdown_table("tiny")
    assert "not run yet" in show.markdown_table("base")


def test_ablations_are_measured_against_the_base_run_seed_by_seed(tmp_path, monkeypatch):
    (tmp_path / "results" / "tiny").mkdir(parents=True)
    (tmp_path / "results" / "reproduce.sh").write_text((ROOT / "results" / "reproduce.sh").read_text())
    monkeypatch.setattr(show, "ROOT", str(tmp_path))
    assert show.ablation_table("tiny") == ""
    for name, accuracy in (("vit-1-0", 0.5), ("vit-1-1", 0.6), ("vit-1-2", 0.1), ("patch-8-0", 0.52), ("patch-8-1", 0.64)):
        write_log(tmp_path / "results" / "tiny" / f"{name}.jsonl", accuracy)
    table = show.ablation_table("tiny")
    assert ("| patch-8 | 58.00 ± 8.49 | +3.00 ± 1.41 | 2 | 0.500 | 100 | "
            "`python train.py --model vit --patch-size 8 --epochs 1 --size tiny` |") in table
    assert "against vit-1 |" in table and "Not run: patch-2, cls," in table


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_every_row_is_a_command_that_parses_and_changes_something(size):
    import distill
    base = vars(train.resolve(train.parse_config(train.Config, ["--size", size])))
    for part in ("ROWS", "ABLATIONS"):
        for name, command in show.planned_rows(size, part).items():
            script, *flags = command.split()
            config_class = {"train.py": train.Config, "distill.py": distill.Config}[script]
            config = vars(train.resolve(train.parse_config(config_class, [*flags, "--size", size])))
            if part == "ABLATIONS":
                same = ("epochs", "name") if size == "tiny" else ("name",)
                assert script == "distill.py" or any(base[k] != config[k] for k in base if k not in same), name
                assert config["epochs"] == 1 or size == "base"


def test_reproduce_runs_a_row_once_and_goes_on_from_a_stop(tmp_path):
    """With a stand-in for python: the script's own work is to choose, to name, to skip and to copy."""
    (tmp_path / "results").mkdir()
    script = tmp_path / "results" / "reproduce.sh"
    script.write_text((ROOT / "results" / "reproduce.sh").read_text())
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python"
    fake.write_text('#!/usr/bin/env bash\nif [ "$1" = -c ]; then echo 0; exit; fi\necho "$@" >> calls\n'
                    'while [ $# -gt 0 ]; do case $1 in --name) name=$2;; --out) out=$2;; esac; shift; done\n'
                    'mkdir -p "$out/$name"; echo "{}" > "$out/$name/log.jsonl"\n')
    fake.chmod(0o755)
    start = lambda *arguments: subprocess.run(["bash", script, *arguments], env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
                                              capture_output=True, text=True)
    stopped = tmp_path / "runs" / "reproduce-tiny" / "vit-1"
    stopped.mkdir(parents=True)
    (stopped / "last.pt").touch()
    assert start("--seeds", "2", "vit", "resnet18").returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4 and calls[0] == ("train.py --model vit --size tiny --seed 0 --name vit-0 "
                                            "--out runs/reproduce-tiny --dataset cifar10")
    assert calls[1].endswith("--resume") and "resnet18" in calls[3]
    assert {p.name for p in (tmp_path / "results" / "tiny").iterdir()} == {
        "vit-0.jsonl", "vit-1.jsonl", "resnet18-0.jsonl", "resnet18-1.jsonl"}
    assert start("--seeds", "2", "vit").returncode == 0 and len((tmp_path / "calls").read_text().splitlines()) == 4
    for wrong in (["vgg"], ["--size", "huge"], ["--sedes", "2"]):
        result = start(*wrong)
        assert result.returncode == 2 and result.stderr.startswith("error: ")
