"""distill.py: the loss against hand sums and closed forms, the teacher left as it was, and whole runs on shapes."""

import dataclasses
import fcntl
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import datasets
import distill
import train
from checkpoint import load, load_model
from config import FIXED, PRESETS, parse_config, resolve
from distill import distillation_loss
from model import build_model

ROOT = Path(train.__file__).parent
SMALL = ["--dataset", "shapes", "--patch-size", "8", "--dim", "32", "--depth", "2", "--heads", "2", "--compile", "off",
         "--size", "tiny", "--device", "cpu"]


def logits(*shape, scale=3.0):
    return scale * torch.randn(*shape, dtype=torch.float64)


def start(tmp_path, *flags):
    """One small distillation in this process. Returns its accuracy and its log."""
    config = parse_config(distill.Config, [*SMALL, "--out", str(tmp_path), *flags])
    accuracy = distill.start(config)
    name = config.name or ("control" if not config.alpha else "distill") + "-vit-tiny-full-shapes-0"
    return accuracy, [json.loads(line) for line in open(tmp_path / name / "log.jsonl")]


@pytest.fixture(scope="module", autouse=True)
def fewer_shapes():
    """For speed: half of the shapes, and trunks of a quarter of the width."""
    fewer = datasets.load_shapes(2000, 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_dataset", lambda *_: fewer)
        for model in ("resnet18", "hybrid"):
            patch.setitem(FIXED, (model, "tiny"), dict(FIXED[model, "tiny"], widths=(8, 16, 32, 64)))
        yield fewer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, fewer_shapes):
    """The model.pt of a teacher that has learned something of the shapes."""
    folder = tmp_path_factory.mktemp("teacher")
    config = parse_config(argv=["--dataset", "shapes", "--model", "resnet18", "--epochs", "3", "--batch-size",
                                "50", "--size", "tiny", "--device", "cpu", "--compile", "off", "--out",
                                str(folder), "--name", "t"])
    assert train.run(resolve(config)) > 0.5
    return folder / "t" / "model.pt"


# ---- The loss

@pytest.mark.parametrize("temperature, alpha", [(1.0, 0.5), (4.0, 0.9), (2.0, 0.0), (3.0, 1.0)])
def test_the_loss_is_the_hand_sum(temperature, alpha):
    student, teacher, targets = logits(4, 5), logits(4, 5), logits(4, 5).softmax(1)
    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), targets.tolist()):
        softmax = lambda z, T: [math.exp(v / T) / sum(math.exp(w / T) for w in z) for v in z]
        p, q, plain = softmax(t, temperature), softmax(s, temperature), softmax(s, 1)
        kl = sum(a * math.log(a / b) for a, b in zip(p, q))
        ce = -sum(a * math.log(b) for a, b in zip(y, plain))
        total += (alpha * temperature**2 * kl + (1 - alpha) * ce) / 4
    assert distillation_loss(student, teacher, targets, temperature, alpha).item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("temperature, alpha", [(1.0, 1.0), (4.0, 0.7)])
def test_the_gradient_is_the_closed_form(temperature, alpha):
    student, teacher, targets = logits(6, 5).requires_grad_(), logits(6, 5), logits(6, 5).softmax(1)
    distillation_loss(student, teacher, targets, temperature, alpha).backward()
    p = lambda z, T: (z.detach() / T).softmax(1)
    by_teacher = temperature * (p(student, temperature) - p(teacher, temperature)) / 6
    by_label = (p(student, 1) - targets) / 6
    torch.testing.assert_close(student.grad, alpha * by_teacher + (1 - alpha) * by_label)


def test_a_high_temperature_matches_logits():
    """Hinton et al.: for large T the gradient is that of half the mean squared difference of the centred logits."""
    student, teacher = logits(6, 5).requires_grad_(), logits(6, 5)
    distillation_loss(student, teacher, teacher.softmax(1), 1e6, 1.0).backward()
    center = lambda z: z - z.mean(dim=1, keepdim=True)
    torch.testing.assert_close(student.grad, (center(student.detach()) - center(teacher)) / 5 / 6, rtol=1e-4,
                               atol=1e-7)


def test_hard_labels_are_the_teachers_first_choice():
    student, teacher, targets = logits(6, 5), logits(6, 5), logits(6, 5).softmax(1)
    one_hot = F.one_hot(teacher.argmax(1), 5).double()
    expected = 0.7 * F.cross_entropy(student, one_hot) + 0.3 * F.cross_entropy(student, targets)
    torch.testing.assert_close(distillation_loss(student, teacher, targets, 9.0, 0.7, hard=True), expected)


def test_each_token_has_its_own_teacher():
    both, teacher, targets = logits(6, 2, 5).requires_grad_(), logits(6, 5), logits(6, 5).softmax(1)
    distillation_loss(both, teacher, targets, 2.0, 0.5).backward()
    by_label = distillation_loss(a := both.detach()[:, 0].requires_grad_(), teacher, targets, 2.0, 0.0)
    by_teacher = distillation_loss(b := both.detach()[:, 1].requires_grad_(), teacher, targets, 2.0, 1.0)
    (0.5 * by_label + 0.5 * by_teacher).backward()
    torch.testing.assert_close(both.grad, torch.stack([a.grad, b.grad], dim=1))


def test_a_model_with_a_distillation_token_has_two_heads_in_training_and_their_mean_after_it():
    model = build_model("vit", dim=16, depth=1, num_heads=2, pool="distill")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images, seen = torch.randn(3, 3, 32, 32), []
    model.head.register_forward_hook(lambda head, x, out: seen.append((x[0], out)))
    trained, evaluated = model.train()(images), model.eval()(images)
    assert trained.shape == (3, 2, 10)
    tokens, encoder = seen[0][0], model.encoder  # (3, 2, 16): those of the class and of the teacher come first
    x = torch.cat([encoder.cls_token.expand(3, -1, -1), model.patch_embed(images)], dim=1) + encoder.pos_embed
    torch.testing.assert_close(tokens, encoder.norm(encoder.blocks(x))[:, :2])
    by_label, by_teacher = model.head.by_label(tokens[:, 0]), model.head.by_teacher(tokens[:, 1])
    torch.testing.assert_close(trained, torch.stack([by_label, by_teacher], dim=1))
    torch.testing.assert_close(evaluated, trained.mean(dim=1))
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])


# ---- The teacher

def small_config(**values):
    config = parse_config(distill.Config, [*SMALL, "--amp", "off"])
    return dataclasses.replace(resolve(config), **values)


def test_the_teacher_sees_the_students_batch_and_stays_as_it_was(teacher, fewer_shapes):
    model = distill.load_teacher(teacher, fewer_shapes, "cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out.requires_grad)))
    loss_function = distill.make_loss(model, small_config(temperature=2.0, alpha=0.5))
    images, targets = next(data.train_batches(fewer_shapes, 0, 50, 0, mixup=1.0))
    student = torch.randn(50, 10, requires_grad=True)
    loss, parts = loss_function(student, targets, images)
    loss.backward()
    assert seen[0][0] is images and not seen[0][1]
    assert not model.training and all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert student.grad.abs().sum() > 0
    torch.testing.assert_close(loss, 0.5 * 4 * parts["kl"] + 0.5 * parts["cross_entropy"])
    expected = (student.argmax(1) == model(images).argmax(1)).float().mean()
    assert parts["agreement"] == expected


def test_the_loss_falls_over_a_few_steps(teacher, fewer_shapes):
    loss_function = distill.make_loss(distill.load_teacher(teacher, fewer_shapes, "cpu"), small_config(alpha=0.9))
    student = build_model("vit", patch_size=8, dim=32, depth=2, num_heads=2, gamma_init=1.0)
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=3e-3), []
    images, targets = next(data.train_batches(fewer_shapes, 0, 50, 0))
    for _ in range(30):
        loss, _ = loss_function(student(images), targets, images)
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_teacher_whose_answers_are_shuffled_teaches_worse_than_a_true_one(tmp_path, teacher, monkeypatch):
    """A loss that ignored the teacher would not notice."""
    def shuffled(*arguments):
        model = load_teacher(*arguments)
        model.register_forward_hook(lambda module, inputs, out: out[torch.randperm(len(out))])
        return model
    load_teacher, accuracy = distill.load_teacher, []
    for loader in (load_teacher, shuffled):
        monkeypatch.setattr(distill, "load_teacher", loader)
        flags = ["--dataset", "shapes", "--size", "tiny", "--device", "cpu", "--student", "hybrid",
                 "--batch-size", "25", "--epochs", "1", "--alpha", "1", "--teacher", str(teacher), "--overwrite",
                 "--out", str(tmp_path)]
        accuracy.append(distill.start(parse_config(distill.Config, flags)))
    assert accuracy[0] > accuracy[1] + 0.2


# ---- Runs

def test_alpha_0_is_train_py_to_the_bit(tmp_path):
    flags = ["--epochs", "2", "--drop-path", "0.2", "--mixup", "1", "--cutmix", "1", "--out", str(tmp_path)]
    start(tmp_path, *flags, "--alpha", "0")
    train.run(resolve(parse_config(argv=["--model", "vit", *SMALL, *flags])))
    ours, theirs = (torch.load(tmp_path / name / "last.pt") for name in
                    ("control-vit-tiny-full-shapes-0", "vit-tiny-full-shapes-0"))
    for key in ("model", "ema_model"):
        assert all(torch.equal(value, theirs[key][name]) for name, value in ours[key].items())
    assert torch.equal(ours["curves"]["loss"], theirs["curves"]["loss"])


def test_a_run_logs_the_teacher_and_the_parts_of_the_loss(tmp_path, teacher, capsys):
    _, log = start(tmp_path, "--teacher", str(teacher), "--epochs", "2", "--temperature", "3", "--alpha", "0.7")
    about, epochs = log[0]["teacher"], [line for line in log if line["event"] == "epoch"]
    assert about["path"] == str(teacher) and about["accuracy"] > 0.5 and about["seconds_per_step"] > 0
    assert re.search(rf"accuracy {about['accuracy']:.4f}, adds [\d.]+ ms to a step", capsys.readouterr().out)
    for line in epochs:
        expected = 0.7 * 9 * line["kl"] + 0.3 * line["cross_entropy"]
        assert line["train_loss"] == pytest.approx(expected, rel=1e-4) and 0 <= line["agreement"] <= 1
        smoothed = 0.91 * -math.log(0.91) + 9 * 0.01 * -math.log(0.01)  # the entropy of each target, at 0.1
        assert line["loss_floor"] == pytest.approx(0.3 * smoothed, rel=1e-4) and line["loss_floor"] < line["train_loss"]


@pytest.mark.parametrize("flags", [["--hard"], ["--distill-token"], ["--hard", "--distill-token"]])
def test_the_other_ways_to_listen_run_and_their_models_load(tmp_path, teacher, flags):
    start(tmp_path, "--teacher", str(teacher), "--epochs", "1", "--name", "a", *flags)
    model, about = load_model(tmp_path / "a" / "model.pt")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert (about["options"]["pool"] == "distill") == ("--distill-token" in flags)


def test_the_teacher_is_trained_once_and_used_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, ("resnet18", "tiny"), dict(PRESETS["resnet18", "tiny"], epochs=1))
    start(tmp_path, "--epochs", "1")
    path = tmp_path / "resnet18-tiny-full-shapes-0" / "model.pt"
    written = path.stat().st_mtime_ns
    assert capsys.readouterr().out.count("train loss") == 2
    start(tmp_path, "--epochs", "1", "--overwrite")
    assert capsys.readouterr().out.count("train loss") == 1 and path.stat().st_mtime_ns == written
    monkeypatch.setitem(PRESETS, ("resnet18", "tiny"), dict(PRESETS["resnet18", "tiny"], epochs=2))
    with pytest.raises(datasets.InputError, match="--epochs 1 -> 2.*--teacher"):  # a quick try is no teacher
        start(tmp_path, "--epochs", "1", "--overwrite")
    start(tmp_path, "--epochs", "1", "--overwrite", "--teacher", str(path))
    last = path.with_name("last.pt")
    checkpoint = load(last)
    checkpoint["config"]["epochs"] = 2  # as if the teacher had been resumed for more epochs, and stopped
    torch.save(checkpoint | dict(step=checkpoint["step"] - 1), last)
    start(tmp_path, "--epochs", "1", "--overwrite")
    assert load(path)["step"] == 2 * checkpoint["step"]


def test_a_teacher_whose_batch_does_not_fit_takes_the_students_and_teaches_the_next_one_too(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, ("resnet18", "tiny"), dict(PRESETS["resnet18", "tiny"], epochs=1, batch_size=5000))
    monkeypatch.setattr(train, "stopped_by", [2])
    with pytest.raises(SystemExit):
        start(tmp_path, "--epochs", "1", "--batch-size", "100")
    monkeypatch.setattr(train, "stopped_by", [])
    path = tmp_path / "resnet18-tiny-full-shapes-0" / "model.pt"
    assert not path.exists()
    start(tmp_path, "--epochs", "1", "--batch-size", "50", "--name", "next")  # goes on with the teacher as it is
    assert load(path)["step"] == 2000 // 100
    start(tmp_path, "--epochs", "1", "--batch-size", "40", "--name", "third")
    assert load(path)["step"] == 2000 // 100


def test_a_teacher_that_was_stopped_with_other_options_is_refused(tmp_path, monkeypatch):
    """The student's command line cannot change them, so the advice is not to resume it with its own."""
    folder = tmp_path / "resnet18-tiny-full-shapes-0"
    monkeypatch.setattr(train, "stopped_by", [2])
    with pytest.raises(SystemExit):
        train.run(resolve(parse_config(argv=["--model", "resnet18", "--epochs", "30", "--lr", "0.001", "--dataset",
                                             "shapes", "--size", "tiny", "--device", "cpu", "--out", str(tmp_path)])))
    monkeypatch.setattr(train, "stopped_by", [])
    assert (folder / "last.pt").exists() and not (folder / "model.pt").exists()
    with pytest.raises(datasets.InputError, match=r"--epochs 30 -> 5, --lr 0.001 -> 0.004\): move that folder away"):
        start(tmp_path, "--epochs", "1")
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:2000])
    for _ in range(2):
        with pytest.raises(datasets.InputError, match="cannot read .*last.pt, the teacher's: move .*resnet18.* away"):
            start(tmp_path, "--epochs", "1")
        torch.save(dict(config=3), folder / "last.pt")  # whole, but of something else


def test_the_teacher_is_of_the_students_seed_and_split(tmp_path, monkeypatch, fewer_shapes):
    made = []
    monkeypatch.setattr(train, "run", lambda config, **_: made.append(config))
    flags = [*SMALL, "--seed", "3", "--hold-out", "100", "--out", str(tmp_path)]
    path = distill.train_teacher(distill.resolve(parse_config(distill.Config, flags)), fewer_shapes)
    assert path == str(tmp_path / "resnet18-tiny-full-shapes-3-hold-out-100" / "model.pt")
    assert (made[0].model, made[0].seed, made[0].hold_out) == ("resnet18", 3, 100)
    # A batch of the preset's size that is more than all images gives way to the student's.
    few = dataclasses.replace(fewer_shapes, train_images=fewer_shapes.train_images[:60],
                              train_labels=fewer_shapes.train_labels[:60])
    flags += ["--batch-size", "30", "--overwrite"]
    distill.train_teacher(distill.resolve(parse_config(distill.Config, flags)), few)
    assert [config.batch_size for config in made] == [PRESETS["resnet18", "tiny"]["batch_size"], 30]


# ---- Mistakes

def a_model(path, dataset, **options):
    options = dict(num_classes=10, widths=(4, 4), depths=(1, 1)) | options
    torch.save(dict(model="resnet18", options=options, dataset=dataset.name, classes=[], mean=dataset.mean,
                    std=dataset.std, state_dict=build_model("resnet18", **options).state_dict()), path)


def test_resume_goes_on_if_the_run_was_stopped_while_its_teacher_was_trained(tmp_path, teacher, monkeypatch, capsys):
    flags, student = ["--epochs", "1", "--name", "a"], tmp_path / "a" / "model.pt"
    student.parent.mkdir()
    student.touch()  # of an earlier run, which is not to be taken for this one
    with monkeypatch.context() as patch:
        patch.setattr(train, "stopped_by", [2])
        with pytest.raises(SystemExit):
            start(tmp_path, *flags, "--overwrite")
    assert not student.exists() and not (tmp_path / "resnet18-tiny-full-shapes-0" / "model.pt").exists()
    with pytest.raises(datasets.InputError, match="exists already"):  # the name is taken
        start(tmp_path, *flags)
    start(tmp_path, *flags, "--resume")
    assert student.exists() and "starts from the beginning" in capsys.readouterr().out
    (tmp_path / "killed").mkdir()  # before it first saved
    start(tmp_path, "--teacher", str(teacher), "--epochs", "1", "--name", "killed", "--resume")
    assert (tmp_path / "killed" / "model.pt").exists() and "starts from the beginning" in capsys.readouterr().out
    with pytest.raises(datasets.InputError, match="no .*misspelt/last.pt"):
        start(tmp_path, "--epochs", "1", "--name", "misspelt", "--resume")
    with pytest.raises(datasets.InputError, match="no .*last.pt"):  # without a teacher there was nothing to wait for
        start(tmp_path, "--alpha", "0", "--epochs", "1", "--name", "b", "--resume")


def test_a_teacher_that_another_run_is_training_costs_the_student_nothing(tmp_path):
    earlier, folder = tmp_path / "old" / "model.pt", tmp_path / "resnet18-tiny-full-shapes-0"
    folder.mkdir(), earlier.parent.mkdir(), earlier.touch()
    number = os.open(folder, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)  # as another process would
    for flags in (["--name", "new"], ["--name", "old", "--overwrite"]):
        with pytest.raises(datasets.InputError, match="another run is writing to .*resnet18"):
            start(tmp_path, "--epochs", "1", *flags)
    os.close(number)
    assert earlier.exists() and not (tmp_path / "new").exists()


def test_of_several_processes_a_refusal_costs_the_student_nothing_and_the_teachers_batches_can_be_shared(
        tmp_path, fewer_shapes, monkeypatch):
    def stop(config, dataset):
        batch_sizes.append(config.batch_size)
        raise datasets.InputError("enough")
    batch_sizes, old = [], tmp_path / "s" / "model.pt"
    old.parent.mkdir(), old.touch()
    monkeypatch.setattr(train, "join_processes", lambda _: (0, 3))
    monkeypatch.setattr(train, "load_for_all", lambda _: fewer_shapes)
    monkeypatch.setattr(train, "run", stop)
    with pytest.raises(datasets.InputError, match="--compile on is for one process"):
        start(tmp_path, "--name", "s", "--overwrite", "--batch-size", "30", "--compile", "on")
    assert old.exists()
    with pytest.raises(datasets.InputError, match="enough"):
        start(tmp_path, "--name", "s", "--overwrite", "--batch-size", "30")
    assert batch_sizes == [30]  # its preset's 250 are not divisible by 3


def test_resuming_knows_a_teacher_by_its_folder_too(tmp_path, teacher, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "stopped_by", [2])
        with pytest.raises(SystemExit):
            start(tmp_path, "--epochs", "1", "--name", "a", "--teacher", str(teacher.parent))
    start(tmp_path, "--epochs", "1", "--name", "a", "--resume", "--teacher", str(teacher))
    with pytest.raises(datasets.InputError, match="model.pt yet: that run has not ended"):
        (tmp_path / "a" / "model.pt").unlink()
        start(tmp_path, "--epochs", "1", "--name", "b", "--teacher", str(tmp_path / "a"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [[], ["--distill-token", "--student", "hybrid", "--compile", "on"]])
def test_a_teacher_teaches_on_a_gpu(tmp_path, teacher, flags):
    argv = ["--dataset", "shapes", "--size", "tiny", "--device", "cuda", "--epochs", "2", "--teacher", str(teacher),
            "--out", str(tmp_path), "--name", "g", *flags]
    distill.start(parse_config(distill.Config, argv))
    epochs = [line for line in map(json.loads, open(tmp_path / "g" / "log.jsonl")) if line["event"] == "epoch"]
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]


@pytest.mark.parametrize("kind, words", [
    ("missing", "No such file"), ("truncated", "damaged.*comes back if"), ("foreign", "not a model.pt"),
    ("classes", "7 classes"), ("colour", "images of shapes .--hold-out 0, --seed 0.*mean colour")])
def test_a_teacher_that_does_not_fit_is_refused(tmp_path, fewer_shapes, kind, words):
    path = tmp_path / "t.pt"
    if kind != "missing":
        a_model(path, fewer_shapes, **(dict(num_classes=7) if kind == "classes" else {}))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    if kind == "foreign":
        torch.save(dict(weights=torch.zeros(3)), path)
    if kind == "colour":
        content = torch.load(path)
        torch.save(content | dict(mean=content["mean"] + 0.01), path)
    with pytest.raises(datasets.InputError, match=words):
        start(tmp_path, "--teacher", str(path))
    assert not list(tmp_path.glob("*/log.jsonl"))


@pytest.mark.parametrize("flags, words", [
    (["--temperature", "0"], "--temperature"), (["--temperature", "-1"], "--temperature"),
    (["--alpha", "1.1"], "--alpha"),
    (["--alpha", "-0.1"], "--alpha"), (["--student", "resnet18"], "resnet18"), (["--model", "vit"], "--model"),
    (["--alpha", "0", "--distill-token"], "--alpha 0"), (["--alpha", "0", "--teacher", "a.pt"], "--alpha 0"),
    (["--alpha", "0", "--temperature", "4"], "--alpha 0"), (["--hard", "--temperature", "4"], "--temperature"),
    (["--teacher", "nowhere.pt"], "nowhere.pt"), (["--patch-size", "5"], "patch size 5"),
    (["--distill-token", "--pool", "cls"], "--pool"),
    (["--batch-size", "4001"], "--batch-size 4001")])
def test_a_mistake_ends_in_one_sentence(flags, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill.py", "--size", "tiny", "--dataset", "shapes", *flags])
    with pytest.raises(SystemExit) as end:
        train.main(distill.Config, distill.start)
    message = capsys.readouterr().err or str(end.value.code)
    assert end.value.code not in (0, None) and message.startswith("error: ") and words in message
    assert "\n" not in message.strip() and not list(tmp_path.rglob("*.pt"))


def test_a_taken_name_is_found_out_before_the_teacher_is_trained(tmp_path):
    (tmp_path / "distill-vit-tiny-full-shapes-0").mkdir()
    with pytest.raises(datasets.InputError, match="another --name, or --overwrite it"):  # there is nothing to resume
        start(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_command_line_of_a_real_process(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "distill.py", *SMALL, "--teacher", "none.pt", "--out", tmp_path],
                            capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
