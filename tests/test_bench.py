"""bench.py: the contestants are of the same shape, and a small run of each measurement gives a table."""

import dataclasses
import json
import mmap
import os
import shutil

import pytest
import torch

import bench
import show
import train
from checkpoint import describe_machine, git_commit
from config import model_options, parse_config, resolve
from model import build_model


@pytest.mark.parametrize("model", ["vit", "resnet18"])
def test_the_peer_has_exactly_our_parameters(model):
    flags = ["--model", model, "--size", "base"] + (["--pool", "cls", "--gamma-init", "none"] if model == "vit" else [])
    config = resolve(parse_config(argv=flags))
    count = lambda module: sum(p.numel() for p in module.parameters())
    ours = build_model(model, **model_options(config, 10))
    peer = bench.torchvision_model(config, 10)
    assert count(ours) == count(peer)
    x = torch.randn(2, 3, 32, 32)
    assert peer.eval()(x).shape == ours.eval()(x).shape


def test_models_beside_their_peers(tmp_path, capsys):
    path = tmp_path / "b.json"
    bench.main(["--device", "cpu", "--size", "tiny", "--models", "vit", "--peer", "torchvision", "--windows", "1",
                "--seconds", "0.1", "--dataset", "shapes", "--batch-size", "20", "--json", str(path)])
    result = json.loads(path.read_text())
    assert capsys.readouterr().out == bench.markdown(result)
    ours, in_our_loop, usual = result["rows"]
    assert ours["times_slower"] == 1 and sum(ours["shares"].values()) == pytest.approx(1)
    assert 0 < ours["of_matrix_rate"] < 1 and ours["peak_bytes"] > 1e8
    assert all(0 < ours["shares"][part] < 1 for part in ("augment", "forward", "backward", "optimizer"))
    for row in (in_our_loop, usual):
        assert row["times_slower"] == pytest.approx(ours["images_per_second"] / row["images_per_second"])


def test_a_compiled_model_runs_beside_itself_not_compiled(monkeypatch):
    compiled = {}

    def compare(contestants, *_):
        compiled.update({label: loop.model._compiled_call_impl is not None for label, loop in contestants.items()})
        return dict.fromkeys(contestants, 1.0), dict.fromkeys(contestants, 1.0)
    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setattr(bench, "split", lambda *_: dict.fromkeys(bench.PARTS, 0.2))
    monkeypatch.setattr(bench, "alone", lambda *_: (1.0, 10**9))
    bench.main(["--device", "cpu", "--size", "tiny", "--models", "vit", "--compile", "on", "--dataset", "shapes"])
    assert compiled == {"vit, tiny": True, "vit, tiny: not compiled": False}


def test_a_step_of_the_bench_is_a_step_of_train(tmp_path, monkeypatch):
    """Both take the same batches to the same losses, at the same learning rate."""
    losses, loss = {"bench": [], "train": []}, train.cross_entropy

    def noted(who):
        def function(*batch):
            value, parts = loss(*batch)
            losses[who].append(value.item())
            return value, parts
        return function
    flags = ["--dataset", "shapes", "--size", "tiny", "--device", "cpu", "--patch-size", "8", "--dim", "16",
             "--heads", "2", "--epochs", "1", "--batch-size", "500", "--mixup", "1", "--clip", "1", "--ema", "0.9",
             "--out", str(tmp_path)]
    config = resolve(parse_config(argv=flags))
    monkeypatch.setattr(train, "lr_at", lambda *_: 1e-5)
    train.run(config, noted("train"))
    monkeypatch.setattr(train, "cross_entropy", noted("bench"))
    loop = bench.Ours(config, bench.load_dataset("shapes"))
    for _ in range(8):
        loop.step()
    assert losses["bench"] == losses["train"]


def test_scaling_measures_each_point_and_says_where_the_memory_ends(monkeypatch, capsys, tmp_path):
    path, asked = tmp_path / "s.json", []

    def alone(argv, windows, seconds):
        asked.append(argv)
        return (None, None) if "1000" in argv else bench.in_own_process(
            [*argv, "--dim", "16", "--batch-size", "20"], windows, seconds)
    monkeypatch.setattr(bench, "alone", alone)
    bench.main(["scaling", "--device", "cpu", "--windows", "1", "--seconds", "0", "--dataset", "shapes",
                "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(asked) == 10 and capsys.readouterr().out.count("out of memory") == 1
    assert all(row["images_per_second"] > 0 and row["peak_bytes"] > 1e8 for row in rows if row["value"] != 1000)


def test_the_shortest_schedule_that_passes_a_mark_is_found(monkeypatch, capsys):
    reached, made = {1: 0.5, 2: 0.7, 3: 0.8, 4: 0.85, 5: 0.904, 6: 0.91, 7: 0.92, 8: 0.93}, []

    def trained(args, model, epochs, seed):
        made.append((epochs, seed))
        spread = 0.008 * (seed - 1)
        return dict(test_accuracy=reached.get(epochs, 0.935) + spread, training_seconds=10 * epochs + 4,
                    first_step_seconds=4)
    monkeypatch.setattr(bench, "trained", trained)
    bench.main(["accuracy", "--device", "cpu", "--models", "hybrid", "--seeds", "3", "--marks", "0.99", "0.905", "0.7",
                "--most-epochs", "9", "--flags", "--optimizer adamw"])
    rows = capsys.readouterr().out.splitlines()[-3:]
    command = "`python train.py --model hybrid --size tiny --optimizer adamw"
    assert rows == [f"| 70% | 2 | 70.00 ± 0.80 | 3 | 20.0 | 4.0 | {command} --epochs 2` |",
                    f"| 90.5% | 6 | 91.00 ± 0.80 | 3 | 60.0 | 4.0 | {command} --epochs 6` |",
                    f"| 99% | more than 9 | - | - | - | - | {command}` |"]
    assert (1, 1) not in made and (4, 1) not in made  # far too short: seed 0 says so
    assert (5, 2) in made  # 90.4 % on average fails, though one seed passes


def test_a_run_to_a_mark_is_made_once(tmp_path, capsys):
    flags = ["accuracy", "--device", "cpu", "--models", "vit", "--seeds", "1", "--marks", "0.05", "--dataset", "shapes",
             "--flags", "--patch-size 16 --dim 16 --heads 1", "--out", str(tmp_path)]
    outputs = []
    for _ in range(2):
        bench.main(flags)
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out and "| 5% | 1 |" in outputs[0].out
    assert "vit-tiny-1-0: 0." in outputs[0].err and not outputs[1].err
    bench.main([*flags, "--flags", "--patch-size 16 --dim 16 --heads 1 --hold-out 1000"])
    assert "vit-tiny-1-0: 0." in capsys.readouterr().err  # other flags are another run
    assert 0 < show.read_log(tmp_path / "vit-tiny-1-0" / "log.jsonl")[-1]["first_step_seconds"] < 30
    with pytest.raises(SystemExit, match="vit-tiny-1-0 failed"):
        bench.main([*flags, "--flags", "--batch-size 5000"])


def test_a_run_of_other_code_or_another_machine_does_not_count(tmp_path):
    config = resolve(parse_config(argv=["--dataset", "shapes", "--device", "cpu", "--size", "tiny"]))
    here = dict(commit=git_commit(), **describe_machine("cpu"))
    path, end = tmp_path / "log.jsonl", dict(event="end", test_accuracy=0.5)

    def finished(**changed):
        start = dict(event="start", config=dataclasses.asdict(config), **here | changed)
        path.write_text("\n".join(map(json.dumps, (start, end))))
        return bench.finished(path, config)
    assert finished() == end
    assert not (finished(commit="0000000") or finished(torch="1.0") or finished(machine="a mainframe"))
    with pytest.raises(SystemExit):
        bench.main(["scaling", "--device", "cpu", "--flags", "--amp off"])  # would be ignored


def test_a_batch_that_is_too_large_is_an_error():
    with pytest.raises(SystemExit, match="--batch-size 5000"):
        bench.main(["--device", "cpu", "--dataset", "shapes", "--batch-size", "5000"])


def test_a_process_of_its_own_tells_its_own_peak():
    """Not that of the process that started it: the system would count that in."""
    held = mmap.mmap(-1, 2 * 10**9)
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    argv = ["--dataset", "shapes", "--size", "tiny", "--device", "cpu", "--patch-size", "16", "--dim", "16",
            "--heads", "1"]
    speed, peak = bench.alone(argv, 1, 0, kept=False)
    assert speed > 0 and 1e8 < peak < len(held)
    held.close()


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_traps_are_looked_at(monkeypatch, capsys):
    monkeypatch.setattr(bench, "alone", lambda *_, kept: (500.0 if kept else 400.0, 10**9))
    bench.main(["traps", "--device", "cpu", "--seconds", "0.01", "--windows", "1", "--dataset", "shapes"])
    out = capsys.readouterr().out
    assert "written out" in out and "NAN" not in out
    assert "memory given back | 400 images/s" in out and "memory kept | 500 images/s" in out
    kept = float(out.split("| ")[-1].split("%")[0])
    assert 40 < kept < 60
