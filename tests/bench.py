"""How fast training is, beside what one would otherwise write. Prints Markdown.

    python tests/bench.py                      our models: images/s, the parts of a step, memory
    python tests/bench.py --peer torchvision   beside them torchvision's models, in the usual loop and in ours
    python tests/bench.py scaling              the ViT's images/s and memory by batch size, patch size and depth
    python tests/bench.py traps                attention's kernels at 64 and 65 tokens; Muon; memory; compiling
    python tests/bench.py accuracy             the fewest epochs, and seconds, to 90, 94, 95 and 96 % on the test set

Images/s are of whole training steps, augmentation included: the median over windows in which the contestants take
turns, so that a processor that slows down slows all of them. The data set lies where train.py finds it.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torchvision.transforms import v2

import show
import train
from checkpoint import FREE_FIELDS, describe_machine, git_commit, out_of_memory, peak_memory, precision_name
from config import AUGMENTATION, model_options, parse_config, resolve
from data import train_batches
from datasets import DATASETS, InputError, load_dataset
from model import MODELS, Attention, DropPath, build_model
from muon import capture_graph

PARTS = ("augment", "forward", "backward", "optimizer", "EMA")


# ---------------------------------------------------------------------------------------------------------------------
# Time

def matrix_rate(config):
    """Floating point operations a second of a large product, in the precision of the config's autocast."""
    n = 8192 if config.device == "cuda" else 2048
    dtype = train.DTYPES[train.choose_amp(config)]
    a, b = (torch.randn(n, n, device=config.device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals=dict(a=a, b=b), num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=1).median


class Marks:
    """Moments of a step, on the device's own clock: a GPU notes them when its work gets there, and nothing waits."""

    def __init__(self, device):
        self.device, self.moments = device, []

    def __call__(self, part):
        if self.device == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.moments.append((part, moment))

    def shares(self):
        """The share of each part in the time of all parts."""
        train.synchronize(self.device)
        spent = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, end) in itertools.pairwise(self.moments):
            if part in spent:
                spent[part] += start.elapsed_time(end) if self.device == "cuda" else end - start
        return {part: value / sum(spent.values()) for part, value in spent.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The contestants

class Ours:
    """Training steps as train.run makes them, at a fixed learning rate.

    `model`: another one in the place of the config's, with AdamW alone."""

    ready = 0  # batches that are prepared while others take their turn

    def __init__(self, config, dataset, model=None):
        if config.batch_size > len(dataset.train_labels):
            raise InputError(f"--batch-size {config.batch_size} is more than {dataset.name}'s training images")
        self.config = config
        self.model = train.make_model(config, dataset) if model is None else model
        self.model.to(config.device, memory_format=torch.channels_last).train()
        self.optimizers = (train.make_optimizers(self.model, config) if model is None
                           else [torch.optim.AdamW(model.parameters(), fused=True)])
        for group in itertools.chain(*(optimizer.param_groups for optimizer in self.optimizers)):
            group["lr"] = 1e-5
        self.weights = train.float_state(self.model) if config.ema else []
        self.averaged = [value.clone() for value in self.weights]
        self.autocast = train.make_autocast(config)
        self.scaler = torch.amp.GradScaler(config.device, enabled=train.choose_amp(config) == "fp16")
        self.compiled = train.choose_compile(config)
        if self.compiled:
            train.compile_training(self.model)
        augmentation = {name: getattr(config, name) for name in AUGMENTATION}
        self.batches = itertools.chain.from_iterable(
            train_batches(dataset, epoch, config.batch_size, 0, **augmentation) for epoch in itertools.count())

    def step(self, mark=lambda part: None):
        mark("augment")
        images, targets = next(self.batches)
        mark("forward")
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with self.autocast:
            logits = self.model(images)
        loss, _ = train.cross_entropy(logits.float(), targets, images)
        mark("backward")
        self.scaler.scale(loss).backward()
        mark("optimizer")
        train.step_optimizers(self.model, self.optimizers, self.scaler, self.config.clip)
        mark("EMA")
        if self.config.ema:
            torch._foreach_lerp_(self.averaged, self.weights, 1 - self.config.ema)
        mark("end")


class Pictures(torch.utils.data.Dataset):
    """A Dataset as torchvision hands one out: PIL images, one at a time."""

    def __init__(self, dataset, transform):
        self.images = dataset.train_images.cpu().permute(0, 2, 3, 1).contiguous().numpy()  # (N, S, S, C)
        self.labels, self.transform = dataset.train_labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


class Usual:
    """The loop that most people write: a DataLoader with workers, torchvision's transforms, eager, the same AMP."""

    def __init__(self, config, dataset, model):
        self.config, self.model, K = config, model.to(config.device).train(), len(dataset.classes)
        jitter = [config.jitter] * 3
        transform = v2.Compose([
            v2.RandomCrop(dataset.train_images.shape[-1], padding=config.crop), v2.RandomHorizontalFlip(),
            *([v2.RandomApply([v2.TrivialAugmentWide()], config.trivial)] if config.trivial else []),
            *([v2.ColorJitter(*jitter)] if config.jitter else []),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(dataset.mean.flatten().tolist(), dataset.std.flatten().tolist()),
            *([v2.RandomErasing(config.erasing)] if config.erasing else [])])
        mixing = ([v2.MixUp(alpha=config.mixup, num_classes=K)] if config.mixup else []) \
            + ([v2.CutMix(alpha=config.cutmix, num_classes=K)] if config.cutmix else [])
        self.mix = v2.RandomChoice(mixing) if mixing else None
        workers = torch.get_num_threads()
        loader = torch.utils.data.DataLoader(Pictures(dataset, transform), config.batch_size, shuffle=True,
                                             num_workers=workers, drop_last=True, persistent_workers=True,
                                             pin_memory=config.device == "cuda")
        self.batches = itertools.chain.from_iterable(loader for _ in itertools.count())
        self.ready = 2 * workers
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.autocast = train.make_autocast(config)

    def step(self):
        images, labels = (t.to(self.config.device, non_blocking=True) for t in next(self.batches))
        if self.mix:
            images, labels = self.mix(images, labels)
        with self.autocast:
            loss = F.cross_entropy(self.model(images).float(), labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()


def torchvision_model(config, num_classes):
    """The config's ViT or ResNet-18 as torchvision has it: same shape (with a class token), same stem."""
    if config.model == "vit":
        hidden = int(config.dim * model_options(config, num_classes).get("mlp_ratio", 4))
        return torchvision.models.VisionTransformer(32, config.patch_size, config.depth, config.heads, config.dim,
                                                    hidden, num_classes=num_classes)
    model = torchvision.models.resnet18(num_classes=num_classes)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The measurements

def compare(contestants, device, windows, seconds):
    """{label: images/s, the median over the windows}, and {label: seconds of the first step}. In turns."""
    first, steps, speeds = {}, {}, {label: [] for label in contestants}

    def clocked(loop, n):
        train.synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            loop.step()
        train.synchronize(device)
        return time.perf_counter() - start

    for label, loop in contestants.items():
        first[label] = clocked(loop, 1)
        clocked(loop, loop.ready + 2)
        steps[label] = max(1, round((2 + loop.ready) * seconds / clocked(loop, 2 + loop.ready)))
    for _ in range(windows):
        for label, loop in contestants.items():
            pause = clocked(loop, loop.ready)  # what was prepared outside of the window does not count
            speeds[label].append(steps[label] * loop.config.batch_size / clocked(loop, steps[label]))
            time.sleep(2 * pause)  # until its workers have prepared the next ones, and leave the processor to others
    return {label: statistics.median(values) for label, values in speeds.items()}, first


def split(loop, device, seconds):
    """The share of each part of a step in its time."""
    marks, end = Marks(device), time.perf_counter() + seconds
    while time.perf_counter() < end:
        loop.step(marks)
    return marks.shares()


def alone(argv, windows, seconds, kept=True):
    """(images/s, peak bytes) of our loop in a process of its own; (None, None) if the memory does not suffice.

    kept: with train.keep_memory, as in a run."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(in_own_process, argv, windows, seconds, kept).result()
    except BrokenProcessPool:  # the system ended it
        return None, None


def in_own_process(argv, windows, seconds, kept=True):
    if not kept:
        train.keep_memory = lambda: None
    train.use_fast_kernels()
    config = resolve(parse_config(argv=argv))
    try:
        loop = Ours(config, load_dataset(config.dataset, config.data_dir).to(config.device))
        speeds, _ = compare({"": loop}, config.device, windows, seconds)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None, None
    return speeds[""], peak_memory(config.device)


def command_line(args, model, size, *more):
    """The command line of train.py for a model of the benchmark."""
    return ["--model", model, "--size", size, "--device", args.device, "--compile", args.compile,
            "--dataset", args.dataset, *more, *(["--data-dir", args.data_dir] if args.data_dir else [])]


def models(args):
    """One row for each model, and for each peer."""
    chosen = dict.fromkeys((name, args.size) for name in args.models)
    if "resnet18" in args.models:
        chosen["resnet18", "base"] = None  # the one that torchvision has
    dataset, rows = load_dataset(args.dataset, args.data_dir), []
    K = len(dataset.classes)
    for name, size in chosen:
        # On a CPU a base model gets small batches, or a step would take many seconds.
        batch_size = args.batch_size or (None if size == args.size else 125)
        argv = command_line(args, name, size, *(["--batch-size", str(batch_size)] if batch_size else []))
        label = f"{name}, {size}"
        config = resolve(parse_config(argv=argv))
        on_device, rate = dataset.to(config.device), matrix_rate(config)
        torch.compiler.reset()
        contestants = {label: Ours(config, on_device)}
        if train.choose_compile(config):
            contestants[f"{label}: not compiled"] = Ours(dataclasses.replace(config, compile="off"), on_device)
        if args.peer and (name == "vit" or (name, size) == ("resnet18", "base")):
            contestants |= {f"{label}: torchvision's, our loop": Ours(config, on_device, torchvision_model(config, K)),
                            f"{label}: torchvision's, usual loop": Usual(config, dataset, torchvision_model(config, K))}
        speeds, first = compare(contestants, config.device, args.windows, args.seconds)
        for who, speed in speeds.items():
            print(f"{who}: {speed:.0f} images/s", file=sys.stderr)
        shares = split(contestants[label], config.device, args.seconds)
        del contestants
        if config.device == "cuda":
            torch.cuda.empty_cache()  # for the process that measures the memory
        _, peak = alone(argv, 1, 0)
        flops = 3 * train.count_flops(name, model_options(config, K), dataset.train_images.shape[1:])
        for who, speed in speeds.items():
            own = dict(training_flops=flops, of_matrix_rate=flops * speed / rate, peak_bytes=peak, shares=shares)
            rows.append(dict(label=who, batch_size=config.batch_size, images_per_second=speed,
                             times_slower=speeds[label] / speed, first_step_seconds=first[who],
                             **(own if who == label else dict.fromkeys(own))))
    return dict(rows=rows)


def scaling(args):
    """The ViT by batch size, patch size and depth, each in a process of its own."""
    config = resolve(parse_config(argv=command_line(args, "vit", args.size)))
    batch_sizes = (64, 256, 512, 1024, 4096) if args.device == "cuda" else (64, 250, 1000)
    points = ([("batch size", "--batch-size", value) for value in batch_sizes]
              + [("patch size", "--patch-size", value) for value in (2, 4, 8, 16)]
              + [("depth", "--depth", value) for value in (config.depth // 2, config.depth, 2 * config.depth)])
    rate, rows = matrix_rate(config), []
    for what, flag, value in points:
        argv = command_line(args, "vit", args.size, flag, str(value))
        options = model_options(resolve(parse_config(argv=argv)), 10)
        speed, peak = alone(argv, args.windows, args.seconds)
        rows.append(dict(what=what, value=value, images_per_second=speed, peak_bytes=peak,
                         training_flops=3 * train.count_flops("vit", options, (3, 32, 32))))
        print(f"{what} {value}: {f'{speed:.0f} images/s' if speed else 'out of memory'}", file=sys.stderr)
    return dict(matrix_flops_per_second=rate, rows=rows)


def finished(path, config):
    """The last line of that log if its run has ended and was one of this config, code and machine, else None."""
    try:
        start, *_, end = show.read_log(path)
    except (InputError, ValueError):  # there is none, or it was cut off
        return None
    same = all(start["config"].get(name) == value for name, value in vars(config).items()
               if name not in FREE_FIELDS or name in ("epochs", "compile"))
    here = dict(commit=git_commit(), **describe_machine(config.device))
    same = same and all(start.get(name) == here[name] for name in ("commit", "machine", "torch"))
    return end if same and start["event"] == "start" and end["event"] == "end" else None


def trained(args, model, epochs, seed):
    """The last line of the log of one run of train.py, which is made now unless --out has it."""
    name = f"{model}-{args.size}-{epochs}-{seed}"
    path = os.path.join(args.out, name, "log.jsonl")
    argv = command_line(args, model, args.size, *shlex.split(args.flags), "--epochs", str(epochs), "--seed", str(seed),
                        "--name", name, "--out", args.out, "--overwrite")
    config = resolve(parse_config(argv=argv))
    end = finished(path, config)
    if not end:
        if subprocess.run([sys.executable, train.__file__, *argv], stdout=subprocess.DEVNULL).returncode:
            raise InputError(f"the run {name} failed: see above")
        end = show.read_log(path)[-1]
        print(f"{name}: {reached(end):.4f}", file=sys.stderr)
    return end


def reached(end):
    """The accuracy that a run's last line tells: on the test set, or on the images held out."""
    return end["hold_out_accuracy"] if end["test_accuracy"] is None else end["test_accuracy"]


def accuracy(args):
    """For each mark, the fewest epochs with which the runs of all seeds pass it on average, and their seconds.

    The number of epochs doubles until a schedule passes, then halves the distance to the longest one that did not. A
    schedule whose first seed falls short by a point and more is not tried with the others. It is chosen by the accuracy
    that is reported, so the means are a little flattering: with `--flags "--hold-out 5000"` they are not the test
    set's.
    A model is compiled in its first run alone; the others find that done, so their first steps are shorter. Training is
    timed from the second step on.
    """
    rows = []
    for model in args.models:
        failed = 0  # the longest schedule that did not pass this mark or a lower one
        for mark in sorted(args.marks):
            def passes(epochs):
                ends = []
                for seed in range(args.seeds):
                    ends.append(trained(args, model, epochs, seed))
                    if reached(ends[0]) < mark - 0.01:
                        return None
                return ends if statistics.mean(map(reached, ends)) >= mark else None

            epochs, best = failed + 1, None
            while epochs <= args.most_epochs and not (best := passes(epochs)):
                failed, epochs = epochs, min(2 * epochs, max(epochs + 1, args.most_epochs))
            while best and epochs - failed > 1:
                middle = (failed + epochs) // 2
                if ends := passes(middle):
                    epochs, best = middle, ends
                else:
                    failed = middle
            ends = best or []
            rows.append(dict(model=model, mark=mark, epochs=epochs if best else None,
                             accuracies=[reached(end) for end in ends],
                             seconds=[end["training_seconds"] - end["first_step_seconds"] for end in ends],
                             first_step_seconds=[end["first_step_seconds"] for end in ends]))
            if not best:
                break  # nor will a higher mark be passed
    return dict(rows=rows)


def traps(args):
    """What is known to go wrong: slow or nan attention kernels, Muon in emulated bf16, memory that is given back after
    every step, nan under max-autotune, one draw for a whole batch."""
    device, rows = args.device, []
    config = resolve(parse_config(argv=command_line(args, "vit", args.size, "--optimizer", "muon")))
    dtype = train.DTYPES[train.choose_amp(config)]

    def milliseconds(function):
        timer = Timer("function()", globals=dict(function=function), num_threads=torch.get_num_threads())
        return f"{1000 * timer.blocked_autorange(min_run_time=args.seconds).median:.2f} ms"

    def report(trap, outcome):
        rows.append(dict(trap=trap, outcome=outcome))
        print(f"{trap}: {outcome}", file=sys.stderr)

    B, H, E = (512, 6, 64) if device == "cuda" else (250, 4, 64)
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    for N in (64, 65):
        qkv = torch.randn(B, N, 3, H, E, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn(B, H, N, E, device=device, dtype=dtype)

        def forward_and_backward(kernel):
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, E) each, laid out as in the model
            if kernel is None:
                out = ((q * E**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
            else:
                with sdpa_kernel(kernel):
                    out = F.scaled_dot_product_attention(q, k, v)
            return torch.autograd.grad(out, qkv, grad)[0]

        chosen = SDPBackend(torch._fused_sdp_choice(*qkv.permute(2, 0, 3, 1, 4)))
        for kernel in [*kernels, None]:
            try:
                finite = forward_and_backward(kernel).isfinite().all()
                step = lambda: forward_and_backward(kernel)
                outcome = milliseconds(capture_graph(step) if device == "cuda" else step)
                outcome += "" if finite else ", NAN in the gradient"
            except RuntimeError as error:  # no available kernel
                outcome = "out of memory" if out_of_memory(error) else "not available"
            name = kernel.name.lower() if kernel else "written out"
            report(f"attention, forward and backward, {B} x {H} x {N} x {E}: {name}"
                   f"{' (what torch takes)' if kernel == chosen else ''}", outcome)
    model = build_model(config.model, **model_options(config, 10)).to(device)
    matrices, _, _ = train.split_parameters(model)
    for p in matrices:
        p.grad = torch.randn_like(p)
    muons = {"torch.optim.Muon": torch.optim.Muon(matrices), "ours": train.make_optimizers(model, config)[0]}
    for who, muon in muons.items():
        report(f"Muon, a step of the {args.size} ViT's {len(matrices)} matrices: {who}", milliseconds(muon.step))
    if device == "cpu":
        for name in ("vit", "hybrid"):
            speeds = {False: [], True: []}
            for kept in (False, True) * args.windows:  # in turns
                speeds[kept].append(alone(command_line(args, name, args.size), 1, args.seconds, kept=kept)[0])
            for kept, found in speeds.items():
                report(f"{args.size} {name}, freed memory {'kept' if kept else 'given back'}",
                       "out of memory" if None in found else f"{statistics.median(found):.0f} images/s")
    if device == "cuda":
        attention, finite = Attention(384, 6).to(device).train(), True
        attention.compile(mode="max-autotune")
        for _ in range(5):  # a CUDA graph is captured in the second, and replayed from the third
            torch.compiler.cudagraph_mark_step_begin()
            x = torch.randn(1024, 64, 384, device=device, requires_grad=True)
            with torch.autocast(device, dtype=torch.bfloat16):
                out = attention(x)
            grads = torch.autograd.grad(out.float().square().sum(), [x, *attention.parameters()])
            finite = finite and all(grad.isfinite().all() for grad in grads)
        report("max-autotune, 1024 x 64 tokens", "finite" if finite else "NAN")
    drop = DropPath(0.5).train()
    drop.compile()
    kept = (drop(torch.ones(1000, 2, device=device))[:, 0] > 0).float().mean()
    report("compiled DropPath of rate 0.5: share of 1,000 images kept (0 or 100 %: one draw for all)", f"{kept:.1%}")
    return dict(rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Markdown

def markdown(result):
    """The table of one result, as --json writes it."""
    number = lambda value, form: "-" if value is None else format(value, form)
    gigabytes = lambda row: number(row["peak_bytes"] and row["peak_bytes"] / 1e9, ".2f")
    rates = []  # of the large matrix product that MFU is a share of
    if result["what"] == "models":
        rates = [row["training_flops"] * row["images_per_second"] / row["of_matrix_rate"] for row in result["rows"]
                 if row["of_matrix_rate"]]
        head = ["model", "batch", "images/s", "time per image, ours = 1", "MFU", *PARTS, "peak GB",
                "first step, s"]
        lines = [[row["label"], row["batch_size"], f"{row['images_per_second']:,.0f}", f"{row['times_slower']:.2f}",
                  number(row["of_matrix_rate"], ".0%"),
                  *(number(row["shares"] and row["shares"][part], ".0%") for part in PARTS), gigabytes(row),
                  f"{row['first_step_seconds']:.1f}"] for row in result["rows"]]
    elif result["what"] == "scaling":
        head = ["ViT", "GFLOP/training image", "images/s", "MFU", "peak GB"]
        rates = [result["matrix_flops_per_second"]]
        share = lambda row: row["training_flops"] * row["images_per_second"] / rates[0]
        lines = [[f"{row['what']} {row['value']}", f"{row['training_flops'] / 1e9:.2f}",
                  *([f"{row['images_per_second']:,.0f}", f"{share(row):.0%}"] if row["images_per_second"]
                    else ["out of memory", "-"]), gigabytes(row)] for row in result["rows"]]
    elif result["what"] == "accuracy":
        flags = f" {result['arguments']['flags']}".rstrip()
        head = ["accuracy", "epochs", "reached, %", "n", "seconds of training", "longest first step, s", "command"]
        lines = [[f"{100 * row['mark']:g}%", row["epochs"],
                  show.mean_and_std([100 * value for value in row["accuracies"]]),
                  len(row["accuracies"]), f"{statistics.mean(row['seconds']):.1f}",
                  f"{max(row['first_step_seconds']):.1f}",
                  f"`python train.py --model {row['model']} --size {result['arguments']['size']}{flags} "
                  f"--epochs {row['epochs']}`"] if row["epochs"] else
                 [f"{100 * row['mark']:g}%", f"more than {result['arguments']['most_epochs']}", *["-"] * 4,
                  f"`python train.py --model {row['model']} --size {result['arguments']['size']}{flags}`"]
                 for row in result["rows"]]
    else:
        head = ["trap", "outcome"]
        lines = [[row["trap"], row["outcome"]] for row in result["rows"] if row["outcome"] != "not available"]
    ends = dict.fromkeys(f"{rate / 1e12:.3g}" for rate in (min(rates), max(rates))) if rates else {}
    before = " before each model" if len(rates) > 1 else ""
    rate = f"; MFU: of the {' to '.join(ends)} TFLOP/s that a large matrix product reached{before}" if rates else ""
    precision = precision_name(result["amp"], result["arguments"]["device"])
    compiled = ", compiled" if result["compiled"] else ", not compiled"
    if result["what"] in ("accuracy", "traps"):  # there each run decides that by its length, and each trap says it
        compiled = ""
    return (f"On {result['machine']}, torch {result['torch']}, {precision}{compiled}{rate}:\n\n"
            + "".join("| " + " | ".join(map(str, line)) + " |\n" for line in [head, ["---"] * len(head), *lines]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("models", "scaling", "traps", "accuracy"), default="models")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("tiny", "base"), help="default: base on a GPU, tiny on a CPU")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="as train.py's")
    parser.add_argument("--peer", choices=("torchvision",), help="measure these beside ours")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--batch-size", type=int, help="of the models (default: the preset's)")
    parser.add_argument("--windows", type=int, default=5, help="whose median counts (default: 5)")
    parser.add_argument("--seconds", type=float, default=5, help="length of a window, about (default: 5)")
    parser.add_argument("--marks", nargs="+", type=float, default=[0.9, 0.94, 0.95, 0.96],
                        help="accuracies to reach (default: 0.90 0.94 0.95 0.96)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of a schedule, for accuracy (default: 5)")
    parser.add_argument("--most-epochs", type=int, default=200, help="of a schedule, for accuracy (default: 200)")
    parser.add_argument("--flags", default="", help="more of train.py's, for accuracy, in one string")
    parser.add_argument("--out", default="runs/accuracy", help="the folder of accuracy's runs: what is there counts")
    parser.add_argument("--dataset", default="auto", choices=DATASETS)
    parser.add_argument("--data-dir")
    parser.add_argument("--json", metavar="FILE", help="keep the result")
    args = parser.parse_args(argv)
    if args.flags and args.what != "accuracy":
        parser.error("--flags is for accuracy")
    args.size = args.size or ("base" if args.device == "cuda" else "tiny")
    train.use_fast_kernels()
    with tempfile.TemporaryDirectory() as empty:  # so that a model's first step compiles, and does not find it done
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=empty, TRITON_CACHE_DIR=empty)
        try:
            flags = shlex.split(args.flags)
            config = resolve(parse_config(argv=command_line(args, args.models[0], args.size, *flags)))
            arguments = {name: value for name, value in vars(args).items() if name not in ("data_dir", "json", "out")}
            result = dict(what=args.what, amp=train.choose_amp(config), compiled=train.choose_compile(config),
                          commit=git_commit(), arguments=arguments, **describe_machine(args.device),
                          **dict(models=models, scaling=scaling, traps=traps, accuracy=accuracy)[args.what](args))
        except InputError as error:
            sys.exit(f"error: {error}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    print(markdown(result), end="")


if __name__ == "__main__":
    main()
