"""config.py and train.py: the command line, the schedule, the optimizers, and whole runs on the shapes data set."""

import dataclasses
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import datasets
import distill
import show
import train
from checkpoint import differences, load, load_model, precision_name
from config import AUGMENTATION, PRESETS, flag_of, model_options, parse_config, resolve
from model import build_model

ROOT = Path(train.__file__).parent
SMALL = ["--dataset", "shapes", "--model", "vit", "--size", "tiny", "--device", "cpu", "--patch-size", "8",
         "--dim", "32", "--depth", "2", "--heads", "2", "--compile", "off"]


def config(*flags):
    return resolve(parse_config(argv=list(flags)))


def run(tmp_path, *flags):
    """One small run in this process. Returns its accuracy and its log."""
    settings = config(*SMALL, "--out", str(tmp_path), *flags)
    accuracy = train.run(settings)
    return accuracy, [json.loads(line) for line in open(tmp_path / settings.name / "log.jsonl")]


def command_line(*flags, **options):
    return subprocess.run([sys.executable, ROOT / "train.py", *flags], capture_output=True, text=True, **options)


def same(a, b):
    """Whether two nested containers are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- Config

@pytest.mark.parametrize("config_class", [train.Config, distill.Config])
def test_every_field_is_a_flag_with_help_and_is_read(config_class, capsys):
    with pytest.raises(SystemExit):
        parse_config(config_class, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    files = {"config", "checkpoint", "train", config_class.__module__}
    source = "".join((ROOT / f"{file}.py").read_text() for file in files)
    for field in dataclasses.fields(config_class):
        assert f"{flag_of(field)} " in text and field.metadata["help"] in text, field.name
        read = field.name in AUGMENTATION or re.search(rf"\bconfig\.{field.name}\b(?! = )", source)
        assert read, f"nothing reads {field.name}"


def test_presets_fill_what_the_command_line_leaves_open():
    tiny = config("--size", "tiny", "--device", "cpu", "--epochs", "7")
    assert (tiny.epochs, tiny.dim) == (7, PRESETS["vit", "tiny"]["dim"])
    assert config("--device", "cpu").size == "tiny"
    basic = config("--size", "base", "--recipe", "basic")
    assert basic.mixup == basic.cutmix == basic.label_smoothing == basic.drop_path == basic.ema == 0
    assert config("--size", "base", "--recipe", "basic", "--mixup", "0.3").mixup == 0.3
    assert config("--gamma-init", "none").gamma_init is None
    builtin = config("--size", "base", "--encoder", "builtin")
    assert builtin.gamma_init is None and builtin.drop_path == 0


@pytest.mark.parametrize("field, value", [("schedule", "Linear"), ("size", "small"), ("pool", "max")])
def test_a_config_from_python_is_checked_as_the_command_line_is(field, value):
    with pytest.raises(datasets.InputError, match=f"--{field} must be one of .*{value}"):
        resolve(train.Config(**{field: value}))


@pytest.mark.parametrize("flags, words", [
    (["--modle", "vit"], "--modle"), (["--model", "vgg"], "vgg"), (["--epochs", "0"], "--epochs"),
    (["--lr", "-1"], "--lr"), (["--label-smoothing", "1.5"], "--label-smoothing"), (["--epochs", "three"], "three"),
    (["--heads", "7"], "7 heads"), (["--patch-size", "5"], "patch size 5"), (["--hold-out", "7"], "7"),
    (["--model", "resnet18", "--dim", "8"], "--dim means nothing to a resnet18"),
    (["--batch-size", "100000"], "--batch-size"),
    (["--resume", "--name", "none"], "last.pt"), (["--encoder", "builtin", "--drop-path", "0.1"], "DropPath"),
    (["--data-dir", "nowhere", "--dataset", "cifar10"], "nowhere"),
    (["--optimizer", "adamw", "--muon-lr", "0.02"], "--muon-lr means nothing to adamw"),
    (["--warmup", "inf"], "--warmup"), (["--gamma-init", "inf"], "--gamma-init"),
    (["--seed", "10000000000000000000"], "--seed"),
    (["--out", "/dev/null"], "--out"), (["--resume", "--overwrite"], "choose one"),
    (["--resume", "--name", "never"], "leave --resume out"),
] + ([] if torch.cuda.is_available() else [(["--device", "cuda"], "cuda")]))
def test_a_mistake_ends_in_one_sentence(flags, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--size", "tiny", "--dataset", "shapes", *flags])
    with pytest.raises(SystemExit) as end:
        train.main()
    message = capsys.readouterr().err or str(end.value.code)
    assert end.value.code not in (0, None) and message.startswith("error: ") and words in message
    assert "\n" not in message.strip() and not list(tmp_path.rglob("*.pt"))


def test_the_exit_status_and_stderr_of_a_real_process(tmp_path):
    (tmp_path / "taken").mkdir()
    result = command_line(*SMALL, "--out", tmp_path, "--name", "taken")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and "--overwrite" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list((tmp_path / "taken").iterdir())
    result = command_line(*SMALL, "--out", tmp_path, "--name", "taken", "--resume")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "--overwrite instead of --resume" in result.stderr


@pytest.mark.parametrize("flags, words", [
    (["--name", "taken"], "exists already"), (["--resume"], "leave --resume out")])
def test_a_wrong_name_is_found_out_before_the_data_is_loaded(flags, words, monkeypatch, tmp_path):
    (tmp_path / "taken").mkdir()
    monkeypatch.setattr(train, "load_dataset", lambda *_: pytest.fail("it would be downloaded"))
    with pytest.raises(datasets.InputError, match=words):
        run(tmp_path, *flags)


def test_out_of_memory_names_the_flag_to_lower(monkeypatch):
    def fail(_):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="--overwrite .*--batch-size"):
        train.main(start=fail)


# ---- Schedule and optimizers

def test_the_schedule_at_its_corners():
    lr = [train.lr_at(step, total_steps=100, warmup_steps=10, peak=2.0) for step in range(100)]
    assert lr[0] == pytest.approx(0.2) and lr[9] == pytest.approx(2.0) and lr[10] == pytest.approx(2.0)
    assert lr[55] == pytest.approx(1.0) and 0 < lr[99] < 0.001
    assert all(a < b for a, b in zip(lr[:9], lr[1:10])) and all(a > b for a, b in zip(lr[10:], lr[11:]))
    assert train.lr_at(0, 10, 0, 1.0) == 1.0
    line = [train.lr_at(step, 100, 10, 2.0, "linear") for step in range(100)]
    assert line[:11] == lr[:11] and line[55] == pytest.approx(1.0) and line[99] == pytest.approx(2.0 / 90)
    assert line[30] < lr[30] and line[80] > lr[80]


def test_a_short_run_warms_up_for_a_fifth_of_it_at_most():
    base = lambda epochs: config("--size", "base", "--epochs", epochs, "--warmup", "10", "--batch-size", "500")
    assert train.count_steps(base("200"), 50_000, 1) == (100, 20_000, 1000)
    assert train.count_steps(base("20"), 50_000, 1) == (100, 2000, 400)
    assert train.count_steps(config("--size", "tiny", "--epochs", "1"), 50_000, 1) == (200, 200, 40)
    assert train.count_steps(config("--size", "tiny", "--warmup", "1e308"), 50_000, 1) == (200, 800, 160)


@pytest.mark.parametrize("name, encoder", [("vit", "explicit"), ("hybrid", "explicit"), ("vit", "builtin")])
def test_only_what_multiplies_is_decayed_and_muon_gets_only_what_is_inside(name, encoder):
    gamma = 1.0 if encoder == "explicit" else None
    model = build_model(name, dim=16, depth=1, num_heads=2, pool="cls", encoder=encoder, gamma_init=gamma)
    inner, outer, rest = ({n for n, p in model.named_parameters() if any(p is q for q in group)}
                          for group in train.split_parameters(model))
    assert inner | outer | rest == {n for n, _ in model.named_parameters()} and not inner & outer and not outer & rest
    assert outer == {"head.weight", "trunk.0.weight" if name == "hybrid" else "patch_embed.proj.weight"}
    for word in ("bias", "norm", "gamma", "pos_embed", "cls_token"):
        assert not any(word in n for n in inner | outer), word
    assert len([n for n in inner if n.startswith("encoder.")]) == 4  # qkv, proj, fc1, fc2


def test_the_moving_average_is_the_hand_sum_and_takes_the_batchnorm_statistics_along():
    model, averaged = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for tensor in (model.weight.data, model.running_mean):
        tensor.fill_(5)
    torch._foreach_lerp_(train.float_state(averaged), train.float_state(model), 1 - 0.9)
    torch.testing.assert_close(averaged.weight.data, torch.full((3,), 0.9 * 1 + 0.1 * 5))
    torch.testing.assert_close(averaged.running_mean, torch.full((3,), 0.5))


def test_gradients_are_clipped_by_their_common_norm():
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    for largest in (0.1, 100.0):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        train.clip_gradients(ours, largest)
        nn.utils.clip_grad_norm_(theirs.parameters(), largest)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters()))


def test_an_overflow_in_fp16_costs_one_optimizer_its_step_and_the_other_nothing():
    settings = config("--size", "tiny", "--device", "cpu", "--amp", "fp16", "--dim", "16")
    model = build_model("vit", **model_options(settings, 10))
    muon, adamw = train.make_optimizers(model, settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))  # as the loss would be
    for p in model.parameters():
        p.grad = torch.full_like(p, 8e-6)
    inner, outer, rest = train.split_parameters(model)
    inner[0].grad[0, 0] = torch.inf
    before = [p.detach().clone() for p in (*inner, *outer, *rest)]
    for optimizer in (muon, adamw):
        scaler.unscale_(optimizer)
    train.clip_gradients(model, 1.0)
    for optimizer in (muon, adamw):
        scaler.step(optimizer)
    scaler.update()
    moved = [not torch.equal(p, old) for p, old in zip((*inner, *outer, *rest), before)]
    assert moved == [False] * len(inner) + [True] * len(outer + rest)
    assert all(p.isfinite().all() for p in model.parameters()) and scaler.get_scale() == 4


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_is_in_one_group_with_its_rate_and_decay(kind):
    settings = config("--size", "tiny", "--device", "cpu", "--optimizer", kind, "--lr", "0.001", "--weight-decay",
                      "0.3", *(["--muon-lr", "0.01", "--momentum", "0.7"] if kind == "muon" else []))
    model = build_model("vit", **model_options(settings, 10))
    inner, outer, rest = ({*map(id, group)} for group in train.split_parameters(model))
    *muon, adamw = train.make_optimizers(model, settings)
    found = [({*map(id, group["params"])}, group["lr"], group["weight_decay"])
             for optimizer in (*muon, adamw) for group in optimizer.param_groups]
    if kind == "muon":
        assert found == [(inner, 0.01, 0.3), (outer, 0.001, 0.3), (rest, 0.001, 0.0)]
        assert muon[0].param_groups[0]["momentum"] == 0.7
    else:
        assert found == [(inner | outer, 0.001, 0.3), (rest, 0.001, 0.0)]
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("name", ["vit", "hybrid", "resnet18"])
def test_the_first_layer_starts_whitened_unless_that_is_off(name):
    shapes, flags = datasets.load_shapes(500, 10), ["--size", "tiny", "--device", "cpu", "--model", name]
    on, off = (train.make_model(config(*flags, "--whiten", choice), shapes).state_dict() for choice in ("on", "off"))
    torch.manual_seed(0)
    model = build_model(name, **model_options(config(*flags), 10))
    assert same(off, model.state_dict())
    train.whiten(model.patch_embed if name == "vit" else model.trunk[0], shapes.normalise(shapes.train_images))
    assert same(on, model.state_dict()) and not same(on, off)


def test_flops_are_those_of_the_formula():
    L, N, d, r, K = 4, 64, 256, 2, 10
    mac = L * N * (4 + 2 * r) * d**2 + 2 * L * N**2 * d + N * 48 * d + d * K
    options = model_options(config("--size", "tiny"), 10)
    assert train.count_flops("vit", options, (3, 32, 32)) == pytest.approx(2 * mac, rel=0.001)


# ---- Runs

def test_a_run_learns_logs_and_keeps_a_model_that_loads(tmp_path, capsys):
    accuracy, log = run(tmp_path, "--epochs", "2", "--name", "a", "--label-smoothing", "0.1", "--ema", "0.9")
    printed = capsys.readouterr().out.splitlines()
    last_line = rf"test accuracy {accuracy:.4f} \(last epoch, no TTA\) in \d+ s, {tmp_path}/a/model.pt"
    assert re.fullmatch(last_line, printed[-1])
    start, *epochs, end = log
    assert [line["event"] for line in log] == ["start", "epoch", "epoch", "end"]
    assert start["config"]["label_smoothing"] == 0.1 and start["data"]["train"] == 4000
    assert start["torch"] == torch.__version__
    floor = -(0.91 * math.log(0.91) + 9 * 0.01 * math.log(0.01))
    for line in epochs:
        assert line["loss_floor"] == pytest.approx(floor, abs=1e-4) and line["train_loss"] > floor
    assert end["test_accuracy"] == accuracy == epochs[-1]["accuracy"] and end["peak_memory_bytes"] > 1e8

    model, about = load_model(tmp_path / "a" / "model.pt")
    shapes = datasets.load_dataset("shapes")
    images = (shapes.test_images.float() / 255 - about["mean"]) / about["std"]
    found = (model(images).argmax(1) == shapes.test_labels).float().mean().item()
    assert found == pytest.approx(accuracy, abs=0.02)  # bf16 there, float32 here
    assert about["classes"] == shapes.classes


def test_each_optimizer_steps_at_its_own_rate_with_clipped_gradients(tmp_path, monkeypatch):
    seen, make = [], train.make_optimizers

    def watched(model, settings):
        def note(optimizer, *_):
            norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
            seen.append(([group["lr"] for group in optimizer.param_groups], norm))
        optimizers = make(model, settings)
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(note)
        return optimizers
    monkeypatch.setattr(train, "make_optimizers", watched)
    run(tmp_path, "--size", "tiny", "--device", "cpu", "--epochs", "2", "--batch-size", "500", "--warmup", "1",
        "--lr", "0.001", "--muon-lr", "0.01", "--clip", "0.001", "--name", "a")
    at = lambda step, peak: train.lr_at(step, 16, 3, peak, "linear")  # the warm-up is a fifth of 16 steps, not 8
    assert [rates for rates, _ in seen] == [rates for step in range(16)
                                            for rates in ([at(step, 0.01)], [at(step, 0.001)] * 2)]
    assert all(0.00099 < norm < 0.00101 for _, norm in seen)


def test_the_average_of_every_steps_weights_is_evaluated_and_kept(tmp_path, monkeypatch):
    """BatchNorm's statistics are averaged too. 32 steps; the decay has risen to 0.7 in the 21st."""
    states, evaluated, make, evaluate = [], [], train.make_optimizers, train.evaluate
    copied = lambda model: [value.clone() for value in train.float_state(model)]

    def watched(model, settings):
        states.append(copied(model))
        optimizers = make(model, settings)
        optimizers[-1].register_step_post_hook(lambda *_: states.append(copied(model)))
        return optimizers
    monkeypatch.setattr(train, "make_optimizers", watched)
    monkeypatch.setattr(train, "evaluate", lambda model, *rest: evaluated.append(copied(model))
                        or evaluate(model, *rest))
    settings = config("--dataset", "shapes", "--model", "resnet18", "--size", "tiny", "--device", "cpu", "--epochs",
                      "1", "--batch-size", "25", "--ema", "0.7", "--out", str(tmp_path), "--name", "a")
    train.run(settings, dataset=datasets.load_shapes(800, 100))
    average, *states = states
    assert len(states) == 32
    for step, state in enumerate(states):
        decay = min(0.7, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * b for a, b in zip(average, state)]
    kept, _ = load_model(tmp_path / "a" / "model.pt")
    for found in (evaluated[-1], train.float_state(kept)):
        torch.testing.assert_close(found, average, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):  # the last step's weights are others
        torch.testing.assert_close(states[-1], average, rtol=1e-2, atol=1e-3)


def test_the_accuracy_is_that_of_all_images_whatever_the_batch_size():
    levels = torch.arange(70, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    labels = (torch.arange(70) + (torch.arange(70) >= 23)) % 10  # the model below is right about the first 23
    greys = datasets.Dataset("greys", list("abcdefghij"), levels, labels, levels, labels)

    class Reads(nn.Module):
        def forward(self, images):
            assert not self.training
            level = ((images * greys.std + greys.mean)[:, 0, 0, 0] * 255).round().long()
            return nn.functional.one_hot(level % 10, 10).float()
    for batch_size in (1, 32, 70, 100):
        assert train.evaluate(Reads(), greys, batch_size, torch.autocast("cpu", enabled=False)) == 23 / 70


def test_a_network_learns_the_shapes_in_eighty_steps(tmp_path):
    settings = config("--dataset", "shapes", "--model", "resnet18", "--size", "tiny", "--batch-size", "50",
                      "--epochs", "1", "--compile", "off", "--out", str(tmp_path))
    assert train.run(settings) > 0.3
    log = map(json.loads, open(tmp_path / settings.name / "log.jsonl"))
    assert [line["train_loss"] for line in log if line["event"] == "epoch"][0] < math.log(10) - 0.2


def test_fp16_leads_to_the_weights_that_float32_leads_to(tmp_path):
    flags = ["--size", "tiny", "--device", "cpu", "--epochs", "1", "--clip", "1", "--batch-size", "250"]
    flat = lambda state: torch.cat([value.flatten() for value in state.values()])
    ends = []
    for amp in ("off", "fp16"):
        run(tmp_path, *flags, "--amp", amp, "--name", amp)
        ends.append(flat(load(tmp_path / amp / "model.pt")["state_dict"]))
    start = flat(train.make_model(config(*SMALL, *flags), datasets.load_dataset("shapes")).state_dict())
    assert torch.dist(*ends) < 0.1 * torch.dist(start, ends[0])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_the_memory_of_a_step_is_kept_for_the_next():
    """A process of its own counts the page faults of 64 MB (15,625 pages of 4 KB), before and after."""
    code = """if True:
        import resource, torch, train
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(16_000_000)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(min(faults() for _ in range(3)))
        train.use_fast_kernels()
        print(min(faults() for _ in range(3)))"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    if before < 1000:
        pytest.skip("this system's pages are large, or their faults are not counted")
    assert after < before / 10


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_same_seed_gives_the_same_bits(tmp_path, amp):
    flags = ["--epochs", "1", "--drop-path", "0.2", "--mixup", "1", "--cutmix", "1", "--amp", amp]
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(tmp_path, "--name", name, "--seed", seed, *flags)
        weights.append(load(tmp_path / name / "model.pt")["state_dict"])
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def test_a_run_stopped_by_ctrl_c_and_resumed_ends_with_the_same_bits(tmp_path):
    flags = [*SMALL, "--epochs", "3", "--drop-path", "0.2", "--mixup", "1", "--ema", "0.99",
             "--batch-size", "50", "--out", str(tmp_path)]
    whole = command_line(*flags, "--name", "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags, "--name", "cut"], text=True,
                               stdout=subprocess.PIPE)
    for line in process.stdout:  # wait for the first epoch's line
        if line.split()[0] == "1":
            break
    process.send_signal(signal.SIGINT)
    assert "--resume" in process.stdout.read() and process.wait() == 130
    step = load(tmp_path / "cut" / "last.pt")["step"]
    assert step < 240
    refused = command_line(*flags, "--name", "cut", "--resume", "--lr", "1")
    assert refused.returncode == 1 and "--lr 0.002 -> 1.0" in refused.stderr
    resumed = command_line(*flags, "--name", "cut", "--resume")
    assert resumed.returncode == 0 and "schedule" not in resumed.stdout, resumed.stderr
    assert f"goes on from step {step} of 240\n" in resumed.stdout
    whole, cut = (load(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    for key in whole.keys() - {"config", "seconds", "speeds"}:
        assert same(whole[key], cut[key]), key
    assert cut["seconds"] > 0 and len(cut["speeds"]) == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    def broken(logits, targets, images):
        broken.step += 1
        loss, parts = train.cross_entropy(logits, targets, images)
        return loss * (math.nan if broken.step == 20 else 1), parts
    broken.step = -1
    settings = config(*SMALL, "--out", str(tmp_path), "--name", "nan", "--epochs", "3")  # 16 steps an epoch
    with pytest.raises(datasets.InputError, match="nan at step 20"):
        train.run(settings, broken)
    checkpoint = load(tmp_path / "nan" / "last.pt")
    assert checkpoint["step"] == 16 and all(torch.isfinite(p).all() for p in checkpoint["model"].values())


def test_a_full_disk_ends_in_one_sentence_and_leaves_no_broken_file(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # bytes a file may have
    result = command_line(*SMALL, "--epochs", "1", "--out", tmp_path, "--name", "full", preexec_fn=limit)
    assert result.returncode == 1 and "disk" in result.stderr and "Traceback" not in result.stderr
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["log.jsonl"]


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    run(tmp_path, "--name", "a", "--epochs", "1", "--patch-size", "16")
    whole = (tmp_path / "a" / "model.pt").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a checkpoint", whole[:-100]):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(datasets.InputError, match="broken.pt"):
            load_model(tmp_path / "broken.pt")
    with pytest.raises(datasets.InputError, match="last.pt"):
        load_model(tmp_path / "a" / "last.pt")
    (tmp_path / "a" / "last.pt").write_bytes(whole[:-100])
    with pytest.raises(datasets.InputError, match="last.pt: it is damaged.*starts again with --overwrite"):
        run(tmp_path, "--name", "a", "--epochs", "1", "--patch-size", "16", "--resume")


def test_hold_out_is_what_is_measured_and_said(tmp_path, capsys):
    _, log = run(tmp_path, "--name", "h", "--epochs", "1", "--hold-out", "500", "--patch-size", "16")
    assert log[0]["data"]["train"] == 3500
    assert log[-1]["test_accuracy"] is None and log[-1]["hold_out_accuracy"] is not None
    assert capsys.readouterr().out.splitlines()[-1].startswith("hold-out accuracy")


def test_a_resumed_run_says_if_it_has_another_number_of_epochs(tmp_path, capsys):
    """Who leaves --epochs out gets the preset's, and with it another schedule."""
    flags = ["--name", "e", "--batch-size", "2000"]
    for epochs, said in (("1", 0), ("2", 1)):
        run(tmp_path, *flags, "--epochs", epochs, *(["--resume"] if said else []))
        sentence = "it has 2 epochs now, not 1: the learning rate follows the new schedule\n"
        assert capsys.readouterr().out.count(sentence) == said


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path, capsys):
    flags = ["--name", "f", "--epochs", "2", "--patch-size", "16"]
    accuracy, log = run(tmp_path, *flags)
    for epochs in ("2", "1"):
        assert run(tmp_path, *flags, "--resume", "--epochs", epochs) == (accuracy, log)
        assert f"has had its 2 epochs already, test accuracy {accuracy:.4f}" in capsys.readouterr().out
    path = tmp_path / "f" / "model.pt"
    content = load(path)
    torch.save(dict(content, step=8, state_dict={}), path)  # as if the end had come between last.pt and model.pt
    assert run(tmp_path, *flags, "--resume")[0] == accuracy
    assert same(load(path), content)
    path.unlink()  # as if it had been stopped on the way to more epochs: it is not at the end of fewer
    with pytest.raises(datasets.InputError, match="at step 32 of 2 epochs, and 1 would end at 16: ask for more"):
        run(tmp_path, *flags, "--resume", "--epochs", "1")
    last = tmp_path / "f" / "last.pt"
    content = load(last)
    torch.save(dict(content, config=dict(content["config"], epochs=4)), last)  # as if stopped at the half of four
    with pytest.raises(datasets.InputError, match="at step 32 of 4 epochs, and 2 would end at 32: ask for more"):
        run(tmp_path, *flags, "--resume")
    assert not path.exists()


def test_a_run_that_ends_on_a_full_disk_can_be_finished(tmp_path, monkeypatch):
    """The log's last line is cut off, then model.pt cannot be written: both times --resume makes the run whole."""
    flags = ["--name", "f", "--epochs", "1", "--patch-size", "16"]
    accuracy, _ = run(tmp_path, *flags)
    model, file = tmp_path / "f" / "model.pt", tmp_path / "f" / "log.jsonl"
    weights = load(model)
    model.unlink()
    file.write_bytes(file.read_bytes()[:-100])

    def full(content, path):
        raise datasets.InputError(f"cannot write {path}")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", full)
        with pytest.raises(datasets.InputError, match="model.pt"):
            run(tmp_path, *flags, "--resume")
    assert not model.exists()
    assert run(tmp_path, *flags, "--resume")[0] == accuracy and same(load(model), weights)
    events = [line["event"] for line in show.read_log(file)]
    assert events == ["start", "epoch", "resume", "end", "resume", "end"]


def test_out_of_memory_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    """Else one would be told to --overwrite a good run."""
    flags = ["--name", "m", "--epochs", "1", "--patch-size", "16"]
    run(tmp_path, *flags)

    def too_much(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    for owner, name in ((torch, "load"), (torch.nn.Module, "load_state_dict")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, too_much)
            with pytest.raises(RuntimeError, match="allocate"):
                load_model(tmp_path / "m" / "model.pt")
            with pytest.raises(RuntimeError, match="allocate"):
                run(tmp_path, *flags, "--resume")
    monkeypatch.setattr(torch, "save", too_much)
    with pytest.raises(RuntimeError, match="allocate"):
        run(tmp_path, *flags, "--overwrite")


def test_an_option_that_is_newer_than_the_run_may_be_off():
    settings = config("--size", "tiny", "--device", "cpu", "--erasing", "0.1")
    was = dataclasses.asdict(settings)
    assert not differences(was, settings, ())
    del was["mixup"], was["erasing"]  # as if both were new: one is 0
    assert differences(was, settings, ()) == "--erasing None -> 0.1"
    assert differences(was | dict(mixup=None, erasing=0.1), settings, ()) == "--mixup None -> 0.0"


def test_a_resumed_run_that_misses_cifar_names_the_cause(tmp_path, monkeypatch, capsys):
    flags = ["--name", "c", "--epochs", "1", "--patch-size", "16", "--batch-size", "100", "--dataset", "auto"]
    few = datasets.load_shapes(400, 100)
    monkeypatch.setattr(train, "load_dataset", lambda *_: dataclasses.replace(few, name="cifar10"))
    run(tmp_path, *flags)
    monkeypatch.setattr(train, "load_dataset", lambda *_: few)
    with pytest.raises(datasets.InputError, match="of cifar10, not on these 400 of shapes, as CIFAR-10 was not found"):
        run(tmp_path, *flags, "--resume")
    run(tmp_path, *flags, "--overwrite")
    run(tmp_path, *flags, "--resume")
    assert re.search("CIFAR-10 was not found, so .*has had its 1 epochs", capsys.readouterr().out)
    monkeypatch.setattr(train, "load_dataset", lambda *_: dataclasses.replace(few, name="cifar10"))
    with pytest.raises(datasets.InputError, match="on shapes, as CIFAR-10 was not found then: start again"):
        run(tmp_path, *flags, "--resume")


def test_a_run_does_not_go_on_with_other_images(tmp_path, monkeypatch):
    """As many, and of classes of the same names. A checkpoint that does not know their mean colour goes on."""
    flags = ["--name", "o", "--epochs", "1", "--patch-size", "16", "--batch-size", "100"]
    for seed, more in ((0, []), (1, ["--resume"])):
        monkeypatch.setattr(train, "load_dataset", lambda *_: datasets.load_shapes(400, 100, seed))
        if more:
            with pytest.raises(datasets.InputError, match="trained on .* images of shapes, not on these .*--data-dir"):
                run(tmp_path, *flags, *more)
        else:
            run(tmp_path, *flags)
    path = tmp_path / "o" / "last.pt"
    content = load(path)
    del content["data"]["mean"]
    torch.save(content, path)
    run(tmp_path, *flags, "--resume")


def test_auto_falls_back_to_shapes_and_says_so_first_and_last(tmp_path, capsys, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.torchvision.datasets.CIFAR10, "download", unreachable)
    _, log = run(tmp_path, "--name", "f", "--epochs", "1", "--patch-size", "16", "--dataset", "auto")
    lines = capsys.readouterr().out.splitlines()
    assert any("shapes data set" in line for line in lines[:2]) and "shapes data set" in lines[-1]
    assert log[0]["data"]["name"] == "shapes" and log[0]["data"]["fell_back"]


@pytest.mark.parametrize("bf16, capability, has, size, amp, compiled", [
    (True, (9, 0), "triton gcc", "base", "bf16", True), (True, (9, 0), "triton gcc", "tiny", "bf16", False),
    (False, (7, 5), "triton clang", "base", "fp16", True), (False, (7, 5), "triton gcc", "tiny", "fp16", False),
    (False, (6, 1), "triton gcc", "base", "fp16", False), (True, (9, 0), "gcc", "base", "bf16", False),
    (True, (9, 0), "triton", "base", "bf16", False), (True, (9, 0), "triton CC", "base", "bf16", True)])
def test_auto_chooses_what_the_gpu_can_do(monkeypatch, bf16, capability, has, size, amp, compiled):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: name if name in has else None)
    monkeypatch.setattr(train.shutil, "which", lambda name: name if name in has else None)
    monkeypatch.setenv("CC", "a compiler") if "CC" in has else monkeypatch.delenv("CC", raising=False)
    chosen = config("--size", size, "--model", "vit")
    assert (chosen.device, train.choose_amp(chosen), train.choose_compile(chosen)) == ("cuda", amp, compiled)
    assert train.choose_compile(config("--size", size, "--epochs", "20")) == compiled
    assert not train.choose_compile(config("--size", size, "--epochs", "19"))  # too short to win the time back
    assert not train.choose_compile(chosen, images=4000) and not train.choose_compile(chosen, processes=2)
    assert train.choose_amp(config("--size", size, "--optimizer", "adamw")) == ("bf16" if bf16 else "fp16")


def test_without_amp_a_gpu_computes_in_tf32_and_is_said_to():
    train.use_fast_kernels()
    assert torch.get_float32_matmul_precision() == "high"  # TF32 with CUDA; a CPU and a Mac have none
    names = [precision_name("off", device) for device in ("cuda", "cpu", "mps")]
    assert names == ["TF32", "float32", "float32"] and precision_name("bf16", "cuda") == "bf16"


def test_all_processes_take_the_data_set_that_the_first_one_found(monkeypatch):
    loaded, told, few = [], [], datasets.load_shapes(20, 10)
    monkeypatch.setattr(train, "load_dataset", lambda name, *_: loaded.append(name) or few)
    monkeypatch.setattr(train.dist, "broadcast_object_list", lambda found: told.append(found[0]))
    monkeypatch.setattr(train, "join_processes", lambda _: (0, 2))
    train.load_for_all(config("--device", "cpu"))
    monkeypatch.setattr(train.dist, "broadcast_object_list", lambda found: found.__setitem__(0, told[0]))
    monkeypatch.setattr(train, "join_processes", lambda _: (1, 2))
    train.load_for_all(config("--device", "cpu"))
    assert loaded == ["auto", "shapes"]


def test_several_processes_are_not_compiled():
    with pytest.raises(train.InputError, match="--compile on .*leave it out with torchrun"):
        train.choose_compile(config("--compile", "on"), processes=2)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("ema", ["0", "0.9"])  # with 0, what is evaluated is the compiled model itself
def test_nothing_is_compiled_after_the_first_epoch_and_checkpoints_keep_their_names(tmp_path, ema):
    from torch._dynamo.utils import counters
    graphs = []
    for epochs in ("1", "3"):
        torch._dynamo.reset(), counters.clear()
        run(tmp_path, "--name", epochs, "--epochs", epochs, "--compile", "on",
            "--batch-size", "300", "--drop-path", "0.1", "--ema", ema)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == 1  # for training: evaluation does without
    names = load(tmp_path / "3" / "last.pt")["model"].keys()
    assert not any("_orig_mod" in name for name in names)


@pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get("DATA_DIR", ""), "cifar-10-batches-py")),
                    reason="needs $DATA_DIR with cifar-10-batches-py")
def test_the_hybrid_passes_40_percent_on_cifar10_after_sixty_steps(tmp_path):
    dataset = datasets.load_dataset("cifar10")
    few = dataclasses.replace(
        dataset, train_images=dataset.train_images[:6000], train_labels=dataset.train_labels[:6000],
        test_images=dataset.test_images[:1000], test_labels=dataset.test_labels[:1000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_dataset", lambda *_: few)
        settings = config("--model", "hybrid", "--size", "tiny", "--epochs", "1", "--batch-size", "100",
                          "--out", str(tmp_path))
        assert train.run(settings) > 0.4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model, size", [("vit", "base"), ("hybrid", "base"), ("resnet18", "base"), ("hybrid", "tiny")])
@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_every_model_trains_on_a_gpu(tmp_path, model, size, amp):
    settings = config("--dataset", "shapes", "--model", model, "--size", size, "--epochs", "3", "--amp", amp,
                      "--device", "cuda", "--batch-size", "200", "--out", str(tmp_path), "--warmup", "0.5",
                      "--compile", "on")
    train.run(settings)
    log = map(json.loads, open(tmp_path / settings.name / "log.jsonl"))
    losses = [line["train_loss"] for line in log if line["event"] == "epoch"]
    assert losses[-1] < losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", ["vit", "hybrid", "hybrid --encoder builtin", "resnet18"])
def test_inside_an_epoch_no_step_waits_for_the_gpu_and_nothing_is_compiled_anew(tmp_path, model, monkeypatch):
    from torch._dynamo.utils import counters
    steps, graphs, shapes = [], [], datasets.load_shapes(12_000, 500)
    monkeypatch.setattr(train, "load_dataset", lambda *_: shapes)

    def watch(*batch):
        steps.append(1)
        if len(steps) == 3:  # past compilation; an epoch has 30 steps, and each tenth augments ten batches
            graphs.append(counters["stats"]["unique_graphs"])
        torch.cuda.set_sync_debug_mode("error" if len(steps) in (*range(3, 30), *range(33, 60)) else "default")
        return train.cross_entropy(*batch)
    torch._dynamo.reset(), counters.clear()
    settings = config("--dataset", "shapes", "--model", *model.split(), "--size", "base", "--epochs", "2",
                      "--batch-size", "400", "--device", "cuda", "--compile", "on", "--out", str(tmp_path))
    try:
        train.run(settings, watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graphs[0] > 0 and counters["stats"]["unique_graphs"] == graphs[0]
    # Each pass is one CUDA graph: none was left out, and none cut in two by something that a graph cannot hold.
    assert not counters["inductor"]["cudagraph_skips"] and not counters["inductor"]["cudagraph_partitions"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_compiled_run_learns_as_much_as_one_that_is_not(tmp_path):
    losses = []
    for compiled in ("on", "off"):
        settings = config("--dataset", "shapes", "--model", "hybrid", "--size", "base", "--recipe", "basic",
                          "--epochs", "3", "--batch-size", "100", "--device", "cuda", "--compile", compiled,
                          "--name", compiled, "--out", str(tmp_path))
        train.run(settings)
        log = map(json.loads, open(tmp_path / compiled / "log.jsonl"))
        losses.append([line["train_loss"] for line in log if line["event"] == "epoch"])
    learned = losses[1][0] - losses[1][-1]
    assert learned > 0.1 and abs(losses[0][-1] - losses[1][-1]) < 0.1 * learned
