"""How fast training is, and against what one would otherwise write. Prints Markdown.

    python tests/bench.py                      our models: images/s, the parts of a step, memory
    python tests/bench.py --peer torchvision   beside them torchvision's models, in the usual loop and in ours
    python tests/bench.py --scaling            images/s and memory by batch size, patch size and depth
    python tests/bench.py --traps              attention's kernels at 64 and 65 tokens; max-autotune; compiled DropPath

Images/s are of whole training steps, augmentation included: the median over windows in which the contestants take
turns, so that a processor that slows down slows all of them. The data set lies where train.py finds it.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.transforms import v2

import train
from data import InputError, load_dataset, train_batches
from model import Attention, DropPath, build_model

PARTS = ("augment", "forward", "backward", "optimizer", "EMA")


# ---------------------------------------------------------------------------------------------------------------------
# Time

def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device, dtype=torch.bfloat16):
    """Floating point operations a second of a large product of square matrices, the median of 20."""
    n = 8192 if device == "cuda" else 2048
    a, b, seconds = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(25):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[5:])


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
        """The share of each part in the time between the first and the last mark."""
        wait(self.device)
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, end) in itertools.pairwise(self.moments):
            if part in seconds:
                seconds[part] += start.elapsed_time(end) if self.device == "cuda" else end - start
        return {part: value / sum(seconds.values()) for part, value in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The contestants

class Ours:
    """Training steps as train.run makes them. `model`: another one in the place of the config's, with plain AdamW."""

    def __init__(self, config, dataset, model=None):
        self.config = config
        torch.manual_seed(0)
        self.model = model or build_model(config.model, **train.model_options(config, len(dataset.classes)))
        self.model = self.model.to(config.device, memory_format=torch.channels_last).train()
        self.optimizers = ([torch.optim.AdamW(self.model.parameters(), fused=True)] if model
                           else train.make_optimizers(self.model, config))
        for group in itertools.chain(*(optimizer.param_groups for optimizer in self.optimizers)):
            group["lr"] = 1e-5
        self.averaged, self.weights = [p.clone() for p in train.float_state(self.model)], train.float_state(self.model)
        self.autocast = train.make_autocast(config)
        if train.choose_compile(config):
            self.model.compile()
        recipe = ("crop", "trivial", "jitter", "erasing", "label_smoothing", "mixup", "cutmix")
        self.batches = itertools.chain.from_iterable(
            train_batches(dataset, epoch, config.batch_size, 0, **{name: getattr(config, name) for name in recipe})
            for epoch in itertools.count())

    def step(self, mark=lambda part: None):
        mark("augment")
        images, targets = next(self.batches)
        mark("forward")
        with self.autocast:
            logits = self.model(images)
        loss, _ = train.cross_entropy(logits.float(), targets, images)
        mark("backward")
        loss.backward()
        mark("optimizer")
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        mark("EMA")
        if self.config.ema:
            get_ema_multi_avg_fn(self.config.ema)(self.averaged, self.weights, None)
        mark("end")


class Pictures(torch.utils.data.Dataset):
    """A Dataset as torchvision hands one out: PIL images, one at a time."""

    def __init__(self, dataset, transform):
        self.images = dataset.train_images.cpu().permute(0, 2, 3, 1).numpy()  # (N, S, S, C)
        self.labels, self.transform = dataset.train_labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


class Usual:
    """The loop that most people write: DataLoader with workers, torchvision's transforms, eager, AdamW, the same AMP."""

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
        workers = os.cpu_count()
        loader = torch.utils.data.DataLoader(Pictures(dataset, transform), config.batch_size, shuffle=True,
                                             num_workers=workers, drop_last=True, persistent_workers=True,
                                             pin_memory=config.device == "cuda")
        self.batches = itertools.chain.from_iterable(loader for _ in itertools.count())
        self.ready = 2 * workers  # batches that the workers prepare while others take their turn
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
    """The config's model as torchvision has it: same shape (with a class token), same stem. None for a hybrid."""
    options = train.model_options(config, num_classes)
    if config.model == "vit":
        hidden = int(config.dim * options.get("mlp_ratio", 4))
        return torchvision.models.VisionTransformer(32, config.patch_size, config.depth, config.heads, config.dim, hidden,
                                                    num_classes=num_classes)
    if config.model == "resnet18":
        model = torchvision.models.resnet18(num_classes=num_classes)
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        return model


# ---------------------------------------------------------------------------------------------------------------------
# The measurements

def compare(contestants, device, windows, seconds):
    """{label: images/s, the median over the windows}, and {label: seconds of the first step}. Round about, in turns."""
    first, speeds, count = {}, {label: [] for label in contestants}, {}
    for label, loop in contestants.items():
        start = time.perf_counter()
        loop.step()
        wait(device)
        first[label] = time.perf_counter() - start
        for _ in range(getattr(loop, "ready", 2)):
            loop.step()
        wait(device)
        start = time.perf_counter()
        loop.step()
        wait(device)
        count[label] = max(1, round(seconds / (time.perf_counter() - start)))
    for _ in range(windows):
        for label, loop in contestants.items():
            for _ in range(getattr(loop, "ready", 0)):  # what was prepared outside of the window does not count
                loop.step()
            wait(device)
            start = time.perf_counter()
            for _ in range(count[label]):
                loop.step()
            wait(device)
            speeds[label].append(count[label] * loop.config.batch_size / (time.perf_counter() - start))
    return {label: statistics.median(values) for label, values in speeds.items()}, first


def split(loop, device, seconds):
    """The share of each part of a step in its time."""
    marks, end = Marks(device), time.perf_counter() + seconds
    while time.perf_counter() < end:
        loop.step(marks)
    return marks.shares()


def alone(argv, steps):
    """(images/s, peak bytes) of a few steps in a process of their own. None twice if the memory does not suffice."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(few_steps, (argv, steps))


def few_steps(argv, steps):
    config = train.resolve(train.parse_config(argv=argv))
    try:
        loop, seconds = Ours(config, load_dataset(config.dataset, config.data_dir).to(config.device)), []
        for _ in range(steps + 2):
            start = time.perf_counter()
            loop.step()
            wait(config.device)
            seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return None, None
    return config.batch_size / statistics.median(seconds[2:]), train.peak_memory(config.device)


def models(args):
    """One row for each model, and for each peer."""
    dataset = load_dataset(args.dataset, args.data_dir)
    rate, rows = matrix_rate(args.device), []
    for name, size in [("vit", args.size), ("hybrid", args.size), ("resnet18", args.size), ("resnet18", "base")]:
        if name not in args.models or (name, size) in [(row["model"], row["size"]) for row in rows]:
            continue
        flags = ["--model", name, "--size", size, "--device", args.device, "--dataset", args.dataset,
                 *(["--data-dir", args.data_dir] if args.data_dir else []),
                 *(["--batch-size", str(args.batch_size)] if args.batch_size else [])]
        config = train.resolve(train.parse_config(argv=flags))
        on_device = dataset.to(config.device)
        _, peak = alone(flags, 2)
        options = train.model_options(config, len(dataset.classes))
        flops = train.count_flops(name, options, dataset.train_images.shape[1:])
        label = f"{name}, {size}"
        contestants = {label: Ours(config, on_device)}
        peer = torchvision_model(config, len(dataset.classes)) if (name, size) != ("resnet18", "tiny") else None
        if args.peer and peer:
            contestants[f"{label}: torchvision's, our loop"] = Ours(config, on_device, peer)
            contestants[f"{label}: torchvision's, usual loop"] = Usual(config, dataset,
                                                                       torchvision_model(config, len(dataset.classes)))
        speeds, first = compare(contestants, config.device, args.windows, args.seconds)
        shares = split(contestants[label], config.device, args.seconds)
        for who, speed in speeds.items():
            own = who == label
            rows.append(dict(model=name, size=size, label=who, batch_size=config.batch_size, images_per_second=speed,
                             times_slower=speeds[label] / speed, flops=flops, first_step_seconds=first[who],
                             of_matrix_rate=3 * flops * speed / rate if own else None,
                             peak_bytes=peak if own else None, shares=shares if own else None))
            print(f"{who}: {speed:.0f} images/s", file=sys.stderr)
        del contestants
    return dict(matrix_flops_per_second=rate, rows=rows)


def scaling(args):
    """The ViT by batch size, patch size and depth, each in a process of its own."""
    batch_sizes = (64, 256, 1024, 4096) if args.device == "cuda" else (64, 250, 1000)
    depth = train.PRESETS["vit", args.size]["depth"]
    points = ([("batch size", "--batch-size", value) for value in batch_sizes]
              + [("patch size", "--patch-size", value) for value in (2, 4, 8, 16)]
              + [("depth", "--depth", value) for value in (depth // 2, depth, 2 * depth)])
    rows = []
    for what, flag, value in points:
        argv = ["--model", "vit", "--size", args.size, "--device", args.device, "--dataset", args.dataset,
                *(["--data-dir", args.data_dir] if args.data_dir else []), flag, str(value)]
        config = train.resolve(train.parse_config(argv=argv))
        speed, peak = alone(argv, args.windows)
        flops = train.count_flops("vit", train.model_options(config, 10), (3, 32, 32))
        rows.append(dict(what=what, value=value, images_per_second=speed, peak_bytes=peak, flops=flops))
        print(f"{what} {value}: {speed} images/s", file=sys.stderr)
    return dict(matrix_flops_per_second=matrix_rate(args.device), rows=rows)


def traps(args):
    """What is known to go wrong: slow or nan attention kernels, nan under max-autotune, one draw for a whole batch."""
    device, rows = args.device, []
    B, H, E = (512, 6, 64) if device == "cuda" else (250, 4, 64)
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    for N in (64, 65):
        q, k, v = (torch.randn(B, H, N, E, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        written_out = lambda: ((q * E**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        for kernel in [*kernels, None]:
            seconds = []
            try:
                for _ in range(3 + args.windows):
                    wait(device)
                    start = time.perf_counter()
                    if kernel is None:
                        out = written_out()
                    else:
                        with sdpa_kernel(kernel):
                            out = F.scaled_dot_product_attention(q, k, v)
                    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
                    wait(device)
                    seconds.append(time.perf_counter() - start)
                outcome = f"{1000 * statistics.median(seconds[3:]):.2f} ms"
                outcome += "" if all(g.isfinite().all() for g in grads) else ", NAN in the gradient"
            except RuntimeError:
                outcome = "not to be had"
            rows.append(dict(trap=f"attention there and back, {B} x {H} x {N} x {E}: "
                                  f"{kernel.name.lower() if kernel else 'written out'}", outcome=outcome))
    if device == "cuda":
        attention = Attention(384, 6).to(device).train()
        attention.compile(mode="max-autotune")
        with torch.autocast(device, dtype=torch.bfloat16):
            x = torch.randn(1024, 64, 384, device=device, requires_grad=True)
            grad, = torch.autograd.grad(attention(x).float().square().sum(), x)
        rows.append(dict(trap="max-autotune, 1024 x 64 tokens", outcome="finite" if grad.isfinite().all() else "NAN"))
    drop = DropPath(0.5).train()
    drop.compile()
    out = drop(torch.ones(1000, 2, device=device))
    kept = out[:, 0].mean().item() / 2
    rows.append(dict(trap="a compiled DropPath of rate 0.5, 1000 images", outcome=f"keeps {kept:.3f} of them"))
    return dict(rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# Markdown

def markdown(result):
    """The table of one result, as --json writes it."""
    gigabytes = lambda row: f"{row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else "-"
    percent = lambda value: f"{value:.0%}"
    if result["what"] == "models":
        head = ["model", "batch", "images/s", "times slower", "of the matrix rate", *PARTS, "peak GB", "first step, s"]
        lines = [[row["label"], row["batch_size"], f"{row['images_per_second']:,.0f}", f"{row['times_slower']:.2f}",
                  percent(row["of_matrix_rate"]) if row["of_matrix_rate"] else "-",
                  *(percent(row["shares"][part]) if row["shares"] else "-" for part in PARTS), gigabytes(row),
                  f"{row['first_step_seconds']:.1f}"] for row in result["rows"]]
    elif result["what"] == "scaling":
        head = ["ViT", "GFLOP/image", "images/s", "of the matrix rate", "peak GB"]
        lines = [[f"{row['what']} {row['value']}", f"{row['flops'] / 1e9:.3f}",
                  *([f"{row['images_per_second']:,.0f}",
                     percent(3 * row["flops"] * row["images_per_second"] / result["matrix_flops_per_second"])]
                    if row["images_per_second"] else ["out of memory", "-"]), gigabytes(row)] for row in result["rows"]]
    else:
        head, lines = ["trap", "outcome"], [[row["trap"], row["outcome"]] for row in result["rows"]]
    lines = [head, ["---"] * len(head), *lines]
    rate = (f", a large bf16 product runs at {result['matrix_flops_per_second'] / 1e12:.3g} TFLOP/s"
            if "matrix_flops_per_second" in result else "")
    return (f"On {result['machine']}, torch {result['torch']}{rate}:\n\n"
            + "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("tiny", "base"), help="default: base on a GPU, tiny on a CPU")
    parser.add_argument("--peer", choices=("torchvision",))
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--traps", action="store_true")
    parser.add_argument("--models", nargs="+", choices=tuple(train.MODELS), default=list(train.MODELS))
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of a window, about (default: 5)")
    parser.add_argument("--dataset", default="auto")
    parser.add_argument("--data-dir")
    parser.add_argument("--json", metavar="FILE", help="keep the result")
    args = parser.parse_args(argv)
    args.size = args.size or ("base" if args.device == "cuda" else "tiny")
    measure = scaling if args.scaling else traps if args.traps else models
    try:
        result = dict(what=measure.__name__, **train.describe_machine(args.device), **measure(args))
    except InputError as error:
        sys.exit(f"error: {error}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    print(markdown(result), end="")


if __name__ == "__main__":
    main()
