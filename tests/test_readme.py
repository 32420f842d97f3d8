"""README.md and results/README.md: their commands parse, their files exist, their numbers are those of the logs."""

import ast
import inspect
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import bench
import data
import distill
import show
import train
from checkpoint import differences, save
from config import FIXED, PRESETS, parse_config, resolve
from model import build_model

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
BOTH = README + (ROOT / "results" / "README.md").read_text()


def test_every_command_is_valid():
    commands = re.findall(r"python (train|distill)\.py([^\n`#&|]*)", BOTH)
    assert len(commands) >= 10
    for script, flags in commands:
        if "--help" not in flags and "..." not in flags:
            config_class = train.Config if script == "train" else distill.Config
            resolve(parse_config(config_class, shlex.split(flags)))


def test_every_file_that_is_named_exists():
    for name in re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|txt|jsonl|sh))`", BOTH):
        assert name in ("log.jsonl",) or (ROOT / name).exists() or (ROOT / "results" / name).exists(), name
    for folder in (ROOT, ROOT / "results"):  # links and pictures
        for name in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (folder / "README.md").read_text()):
            assert (folder / name).exists(), name


def test_each_file_imports_only_from_those_above_it_in_the_table():
    files = re.findall(r"^\| `(\w+)\.py` \|", README, re.MULTILINE)
    assert {f"{file}.py" for file in files} == {path.name for path in ROOT.glob("*.py")}
    for i, file in enumerate(files):
        nodes = list(ast.walk(ast.parse((ROOT / f"{file}.py").read_text())))
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        imported |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
        assert not imported & set(files[i:]), file


def test_the_table_of_sizes_is_that_of_the_presets():
    rows = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in README.splitlines())
            if len(cells) == 8}
    for (model, size), preset in PRESETS.items():
        shape, _, _, muon_lr, batch_size, epochs, augmentation = rows[f"{model}, {size}"]
        options = FIXED.get((model, size), {})
        if "dim" in preset:
            hidden = int(preset["dim"] * options.get("mlp_ratio", 4))
            assert shape == f"{preset['dim']}, {preset['depth']}, {preset['heads']}, {hidden}"
        assert (batch_size, epochs) == (str(preset["batch_size"]), str(preset["epochs"]))
        assert (preset["optimizer"], preset["muon_lr"]) == ("muon", float(muon_lr))
        assert augmentation == ("all" if preset["mixup"] else f"crop {preset['crop']}, flip")


def test_every_log_is_of_the_presets_as_they_are_now():
    """Else the table would show numbers that its commands no longer give."""
    logs = [path for size in ("tiny", "base") for path in sorted((ROOT / "results" / size).glob("*.jsonl"))]
    assert len(logs) >= 3
    for path in logs:
        start, *_, last_epoch, end = map(json.loads, open(path))
        was = dict(pos_init="noise") | start["config"]  # before it was an option
        size = path.parent.name
        assert start["event"] == "start" and last_epoch["accuracy"] == end["test_accuracy"] and not was["hold_out"]
        assert was["size"] == size and start["data"] | dict(train=50000, test=10000, name="cifar10") == start["data"]
        name, seed = path.stem.rsplit("-", 1)
        changes = {change: command for change, (_, command) in show.planned(size, ablations=True).items()}
        script, *flags = (show.planned(size) | changes)[name].split()
        program = distill if script == "distill.py" else train
        now = program.resolve(parse_config(program.Config, [*flags, "--size", size, "--seed", seed]))
        free = ("device", "name", "out", "data_dir", "dataset", "overwrite", "resume", "teacher")
        free += ("muon_lr", "momentum") if now.optimizer == "adamw" else ()
        assert not differences(was, now, free), path


@pytest.mark.parametrize("marker, made", [("table", show.markdown_table), ("ablations", show.ablation_table)])
def test_the_generated_tables_are_current(marker, made):
    found = re.search(rf"<!-- {marker} -->\n(.*)<!-- end of {marker} -->", BOTH, re.DOTALL)[1]
    assert found.strip() == "\n".join(map(made, ("tiny", "base"))).strip()


def test_the_tables_of_the_benchmark_are_current():
    results = sorted((ROOT / "results").glob("bench-*.json"))
    assert results
    for path in results:
        found = re.search(rf"<!-- {path.name} -->\n(.*?)<!-- end of {path.name} -->", BOTH, re.DOTALL)[1]
        assert found == bench.markdown(json.loads(path.read_text())), path.name


def test_what_can_be_copied_from_the_other_files_needs_what_is_named_with_it():
    """Each function that "Copy from it" names, with the neighbours that it names there, torch, math and the like."""
    images, targets, other = torch.rand(4, 3, 32, 32), torch.eye(4), torch.randn(4, 4)
    for module, neighbours, use in [
            (data, ["mix_up"], lambda f: f["mix_up"](images, targets, 0.2)),
            (data, ["cut_mix"], lambda f: f["cut_mix"](images, targets, 1.0)),
            (data, ["crop_and_flip"], lambda f: f["crop_and_flip"](images)),
            (data, ["random_erasing", "per_image", "luma"], lambda f: f["random_erasing"](images, 1.0)),
            (data, ["color_jitter", "per_image", "luma"], lambda f: f["color_jitter"](images, 0.1)),
            (data, ["trivial_augment", "per_image", "luma"], lambda f: f["trivial_augment"](images, 1.0)),
            (distill, ["distillation_loss", "kl_divergence", "split_heads"],
             lambda f: f["distillation_loss"](other, targets, targets, 2.0, 0.9))]:
        copied = dict(torch=torch, F=torch.nn.functional, math=math, TRIVIAL_OPS=data.TRIVIAL_OPS)
        for name in neighbours:
            assert f"`{name}`" in README
            exec(inspect.getsource(getattr(module, name)), copied)
        use(copied)


def test_muon_can_be_copied_as_a_file():
    imported = re.findall(r"^ *(?:from|import) (\w+)", (ROOT / "muon.py").read_text(), re.MULTILINE)
    assert set(imported) == {"gc", "functools", "torch"}


def test_the_python_runs_as_shown(tmp_path, monkeypatch, capsys):
    options = dict(dim=16, depth=1, num_heads=2)
    model, folder = build_model("vit", **options), tmp_path / "runs" / "vit-tiny-full-auto-0"
    folder.mkdir(parents=True)
    save(dict(model="vit", options=options, classes=list("abcdefghij"), mean=torch.zeros(3, 1, 1),
              std=torch.ones(3, 1, 1), state_dict=model.state_dict()), str(folder / "model.pt"))
    Image.new("RGB", (50, 40)).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    pieces = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for code in pieces:
        exec(compile(code, "README", "exec"), {})
    assert len(pieces) == 2 and re.fullmatch(r"[a-j]\n", capsys.readouterr().out)
