"""Train a Vision Transformer, a ResNet-18 + Transformer hybrid or a ResNet-18 from scratch on CIFAR-10.

    python train.py                       a ViT: 94.61 % on an H200 (n = 1), 80.41 +- 0.14 % on two CPU cores (n = 3)
    python train.py --model hybrid        96.45 % on an H200 (n = 1), 90.29 +- 0.08 % on two CPU cores (n = 5, 337 s)
    python train.py --help                every option, with its default

In bf16, with torch 2.11 on the H200 and 2.14 on the CPU (AMD EPYC).

From top to bottom: the model, the schedule, the parameter groups, precision, evaluation, several processes, and `run`,
the loop itself. It writes runs/NAME/log.jsonl (one JSON object a line), last.pt (all it takes to resume) and model.pt
(the weights, and what it takes to rebuild the model). Options and presets are in config.py, Muon is in muon.py; how
files are written and read is in checkpoint.py.
"""

import copy
import ctypes
import dataclasses
import errno
import importlib.util
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (append_line, check_folder, describe_machine, git_commit, load, load_last, open_run,
                        out_of_memory, peak_memory, precision_name, save)
from config import AUGMENTATION, Config, model_options, parse_config, resolve
from data import entropy, test_batches, train_batches
from datasets import InputError, load_dataset
from model import build_model, whiten
from muon import Muon


# ---------------------------------------------------------------------------------------------------------------------
# The model

def first_layer(model):
    """The layer that sees the pixels: a convolution or a PatchEmbed."""
    return model.trunk[0] if hasattr(model, "trunk") else model.patch_embed


def make_model(config, dataset):
    """The model of a resolved config, on the CPU. Its weights depend on the seed and the training images alone."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, **model_options(config, len(dataset.classes)))
    if config.whiten == "on":  # what this gains is in the README, under "What is unusual here"
        sample = dataset.train_images[:: max(1, len(dataset.train_images) // 5000)]
        whiten(first_layer(model), dataset.normalise(sample).cpu())
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Schedule and parameter groups

def lr_at(step, total_steps, warmup_steps, peak, schedule="cosine"):
    """The learning rate of a step, 0 <= step < total_steps: a line up to `peak`, then down towards 0.

    The first step already moves (peak / warmup_steps), step warmup_steps - 1 is the first at the peak. The way down is
    half a cosine, or a line, which gives fewer steps to the high rates and is better for a short run.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * (1 - done) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))


def split_parameters(model):
    """The model's parameters by what they are: inner matrices and kernels, other matrices, and all the rest.

    Matrices and kernels multiply what comes in, and are decayed towards zero; biases, norms, gamma, position and class
    embeddings are added or scale, and are not. `inner` leaves out the layers at both ends, which face pixels and
    classes: Muon is not for them.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.MultiheadAttention))]
    matrices = [m.in_proj_weight if isinstance(m, nn.MultiheadAttention) else m.weight for m in layers]
    ends = {id(p) for layer in (first_layer(model), model.head) for p in layer.parameters()}
    inner = [p for p in matrices if id(p) not in ends]
    outer = [p for p in matrices if id(p) in ends]
    known = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in known]
    return inner, outer, rest


def make_optimizers(model, config):
    """AdamW for all parameters, or Muon for the inner matrices and AdamW for the rest, as a list.

    Each parameter group remembers its peak learning rate, which `lr_at` scales, as "peak_lr".
    """
    inner, outer, rest = split_parameters(model)
    optimizers = []
    if config.optimizer == "muon":
        optimizers.append(Muon(inner, lr=config.muon_lr, momentum=config.momentum, weight_decay=config.weight_decay,
                               dtype=DTYPES[choose_amp(config)]))
        inner = []
    groups = [dict(params=inner + outer, weight_decay=config.weight_decay), dict(params=rest, weight_decay=0.0)]
    # The second beta is not 0.999, which looks back 1,000 steps: all that a tiny run has. For base it was not tuned.
    optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def clip_gradients(model, largest):
    """Scale all gradients by one factor, so that their common norm is at most `largest`.

    If the norm is not finite, they stay as they are: in fp16 the GradScaler then leaves out the step of the optimizer
    whose gradients overflowed, and the other one takes its own unclipped.
    """
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm.nan_to_num(nan=0.0, posinf=0.0))


def step_optimizers(model, optimizers, scaler, clip):
    """Clip the gradients that a backward pass has left, step along them, and forget them.

    The scaler takes its factor out of them first; it has one only in fp16. `clip`: the largest norm, or 0.
    """
    if clip:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        clip_gradients(model, clip)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    model.zero_grad(set_to_none=True)  # not to zeros: the next step reuses a CUDA graph's memory


def float_state(model):
    """The model's weights and BatchNorm statistics, as a list of tensors: what a moving average is taken of."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


def cross_entropy(logits, targets, images):
    """The loss of a plain run. logits float32 (B, K), targets (B, K); a teacher would look at the images as well.

    Returns the loss and a dict of what else to log, scalars. "floor" is among them: what the loss cannot go below.
    """
    return F.cross_entropy(logits, targets), dict(floor=entropy(targets))


# ---------------------------------------------------------------------------------------------------------------------
# Precision, compilation and evaluation

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16, off=torch.float32)


def choose_amp(config):
    """A key of DTYPES for a resolved config's device. bf16 has float32's range; fp16 needs the loss to be scaled."""
    if config.amp != "auto":
        return config.amp
    if config.device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    fast = config.device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if fast else "off"  # emulated bf16 is slower than float32


def make_autocast(config):
    """The context of every forward pass: matrix products and convolutions in half precision, where that is faster."""
    amp = choose_amp(config)
    return torch.autocast(config.device, dtype=DTYPES[amp] if amp != "off" else None, enabled=amp != "off")


def use_fast_kernels():
    """Faster, a little less exact: TF32 for a GPU's float32 products, cuDNN's fastest kernels. On CPUs: keep_memory."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    keep_memory()


def keep_memory():
    """Let glibc's malloc keep the memory that a step frees for the next one: what makes a run on a CPU faster.

    By default every large block that is freed goes back to the system, and when the next step asks for it, it is mapped
    and zeroed again, page by page. Keeping it makes a tiny ViT 12 % and a hybrid 14 % faster (results/README.md,
    "Known traps"). The memory of a GPU is kept by torch.
    """
    if platform.libc_ver()[0] == "glibc":
        set_malloc_option = ctypes.CDLL(None).mallopt
        set_malloc_option(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own, which ends when it is freed
        set_malloc_option(-1, -1)  # M_TRIM_THRESHOLD: the free end of the heap is never given back


def choose_compile(config, images=50_000, processes=1):
    """Whether to compile a run with that many training images and processes: several are never compiled.

    auto: base runs with CUDA, if Triton and a C compiler are there, and if the run is long enough to win the time back,
    twenty epochs or more: on one H200, compiling a ViT takes 24 s, and then saves 1.4 s of every 50,000 images. Tiny
    runs are not compiled: on two CPU cores it saves a ViT's run ten seconds, and makes a hybrid's slower.
    """
    if processes > 1 and config.compile == "on":
        raise InputError("--compile on is for one process: leave it out with torchrun")
    if processes > 1 or config.compile != "auto":
        return config.compile == "on"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return (config.device == "cuda" and config.size == "base" and config.epochs * images >= 1_000_000
            and compiler is not None and importlib.util.find_spec("triton") is not None
            and torch.cuda.get_device_capability() >= (7, 0))


def compile_training(model):
    """Compile the model's forward and backward pass, in place: unlike torch.compile(model), it keeps all names.

    "reduce-overhead" captures each pass as a CUDA graph, which is launched as a whole. Without graphs an H200 spends
    more than half of a base ViT's step waiting for Python to launch one kernel after another. A graph reuses its
    memory: after torch.compiler.cudagraph_mark_step_begin() the last step's logits and gradients are gone.
    """
    model.compile(mode="reduce-overhead")


def count_flops(name, options, image_shape):
    """Floating point operations (2 for a multiply-add) of one image's forward pass. Runs on torch's meta device."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        build_model(name, **options).eval()(torch.empty(1, *image_shape))
    return counter.get_total_flops()


@torch.no_grad()
def evaluate(model, dataset, batch_size, autocast):
    """The share of test images that the model, in eval mode, gives their label's class. No test-time augmentation.

    Not compiled, even if the training is: it would be compiled once more, and these passes are short.
    """
    model.eval()
    correct = torch.zeros((), device=dataset.test_labels.device)
    for images, labels in test_batches(dataset, batch_size):
        with autocast:
            logits = model.forward(images)  # model(images) would be what was compiled
        correct += (logits[: len(labels)].argmax(dim=1) == labels).sum()
    return correct.item() / len(dataset.test_labels)


# ---------------------------------------------------------------------------------------------------------------------
# Processes

def join_processes(config):
    """This process's rank, and how many processes torchrun started for this run; (0, 1) without torchrun."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    return dist.get_rank(), dist.get_world_size()


def load_for_all(config):
    """The run's data set, on its device. Of several processes the first downloads for all, and says which it is."""
    rank, processes = join_processes(config)
    load = lambda name: load_dataset(name, config.data_dir, config.hold_out, config.seed).to(config.device)
    dataset = load(config.dataset) if rank == 0 else None
    found = [dataset and dataset.name]  # with --dataset auto all are to have the same
    if processes > 1:
        dist.broadcast_object_list(found)
    return dataset or load(found[0])


# ---------------------------------------------------------------------------------------------------------------------
# The run

def synchronize(device):
    """Wait until the device has done all that it was told to."""
    if device != "cpu":
        torch.accelerator.synchronize()


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def check_finite(losses, step, model, lr):
    """InputError if a loss or a weight is not finite, so that a ruined model never replaces a good one.

    losses: a list, the last one that of step `step` - 1; lr: the learning rate as a function of the step. Waits for the
    device.
    """
    def stop(what, at):
        raise InputError(f"{what} at step {at}, lr {lr(at):.2g}: start again with --overwrite and a lower --lr or "
                         "--muon-lr, or with --clip 1 (last.pt, if there is one, was saved before)")

    for at, loss in enumerate(losses, start=step - len(losses)):
        if not math.isfinite(loss):
            stop(f"the loss became {loss}", at)
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        stop("a weight became infinite or nan", step - 1)


def count_steps(config, images, processes):
    """Steps of an epoch, of the run, and of its warm-up. InputError if the batch size does not fit."""
    steps_per_epoch = images // config.batch_size
    if steps_per_epoch == 0:
        raise InputError(f"--batch-size {config.batch_size} is more than the {images} training images: lower it")
    if config.batch_size % processes:
        raise InputError(f"--batch-size {config.batch_size} is not divisible by {processes} processes")
    total_steps = config.epochs * steps_per_epoch
    # The warm-up is in epochs, so that --epochs leaves it alone, but never more than a fifth of a short run.
    return steps_per_epoch, total_steps, round(min(config.warmup * steps_per_epoch, total_steps // 5))


stopped_by = []  # the signal that asked the run to stop, once one did


def on_signal(handler, instead_of):
    """Let Ctrl-C and SIGTERM call the handler, where they called the other one: whoever calls run keeps their own."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is instead_of:
            signal.signal(number, handler)


def stop_at_once(number, _):
    """Ctrl-C or SIGTERM while the data is loaded or the model made: there is nothing to save yet."""
    print("\nstopped before the first step: a new run starts again with --overwrite, a resumed one with --resume",
          file=sys.stderr)
    sys.exit(128 + number)


def stop_after_step(number, _):
    """Ctrl-C or SIGTERM: the loop finishes its step, saves, and says how to go on. A second one ends it at once."""
    stopped_by.append(number)
    signal.signal(number, signal.SIG_DFL)
    print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)


def restore(checkpoint, stateful, data, config):
    """Put the states of a last.pt into the objects of `stateful`, by name. Returns (curves, step, speeds, seconds).

    InputError if the run was trained on other data, or if the file is of another version of this project.
    """
    try:
        was = data | checkpoint["data"]  # an earlier version knew less of its data
        if was != data:
            if was["fell_back"]:
                raise InputError(f"{config.folder}/last.pt was trained on shapes, as CIFAR-10 was not found then: "
                                 "start again with --overwrite, or choose another --name")
            missing = ", as CIFAR-10 was not found" if data["fell_back"] else ""
            raise InputError(f"{config.folder}/last.pt was trained on {was['train']} images of {was['name']}, not on "
                             f"these {data['train']} of {data['name']}{missing}: name its own with --dataset and "
                             "--data-dir")
        for name, part in stateful.items():
            if checkpoint[name]:  # a GradScaler that was off has no state
                part.load_state_dict(checkpoint[name])
        curves = {name: curve.to(config.device) for name, curve in checkpoint["curves"].items()}
        return curves, checkpoint["step"], checkpoint["speeds"], checkpoint["seconds"]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{config.folder}/last.pt is of another version of this project: start again with "
                         "--overwrite") from None


def is_finished(config, step, total_steps, epochs_before, processes):
    """Whether a run that is at its last step or beyond has written its model.pt.

    InputError if it has not, and its last.pt is of another number of epochs, `epochs_before`, than it is to end with.
    """
    path = os.path.join(config.folder, "model.pt")
    finished = os.path.exists(path) and load(path).get("step") == step
    if processes > 1:
        dist.barrier()  # all have looked before the first one writes it
    if (step > total_steps or config.epochs != epochs_before) and not finished:
        raise InputError(f"{config.folder}/last.pt is at step {step} of {epochs_before} epochs, and {config.epochs} "
                         f"would end at {total_steps}: ask for more with --epochs")
    return finished


def run(config, loss_function=cross_entropy, dataset=None, **about):
    """Train one model as the resolved config says. Returns the accuracy after the last epoch.

    loss_function(logits, targets, images) -> (loss, more to log), as cross_entropy, is what distill.py replaces; logits
    are float32, targets soft. `dataset`: the config's, if load_for_all has loaded it already; `about`: more fields for
    the log's first line. Raises InputError for what the person who started it can fix.
    """
    began = time.perf_counter()
    # What runs: precision, data, steps, model.
    rank, processes = join_processes(config)
    device = config.device
    use_fast_kernels()
    amp, autocast = choose_amp(config), make_autocast(config)
    if rank == 0:
        check_folder(config)  # a taken name is reported before a download, not after
    dataset = dataset or load_for_all(config)
    compiled = choose_compile(config, len(dataset.train_labels), processes)
    fell_back = config.dataset == "auto" and dataset.name == "shapes"
    note = "CIFAR-10 was not found, so this is the shapes data set: " if fell_back else ""
    data = dict(name=dataset.name, train=len(dataset.train_labels), test=len(dataset.test_labels),
                test_split=dataset.test_split, classes=len(dataset.classes), fell_back=fell_back,
                mean=[round(value, 6) for value in dataset.mean.flatten().tolist()])  # other images have another
    steps_per_epoch, total_steps, warmup_steps = count_steps(config, data["train"], processes)
    lr = lambda step, peak=config.lr: lr_at(step, total_steps, warmup_steps, peak, config.schedule)
    folder, model_path = config.folder, os.path.join(config.folder, "model.pt")
    if rank == 0:
        checkpoint = open_run(config)
    else:
        checkpoint = load_last(folder) if config.resume else None
    augmentation = {name: getattr(config, name) for name in AUGMENTATION}
    options = model_options(config, len(dataset.classes))
    model = make_model(config, dataset)
    if processes > 1 and device == "cuda":  # on a CPU every process takes the statistics of its own share
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Convolutions are faster with the channels last in memory, on GPUs and CPUs alike.
    model = model.to(device, memory_format=torch.channels_last)

    optimizers = make_optimizers(model, config)
    ema_model = copy.deepcopy(model) if config.ema else model  # the weights that are evaluated and kept
    scaler = torch.amp.GradScaler(device, enabled=amp == "fp16")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if compiled:
        compile_training(model)
    parallel = DistributedDataParallel(model) if processes > 1 else model  # averages the gradients of all processes
    ema_state, model_state = float_state(ema_model), float_state(model)
    # Each step writes its loss and the rest here, on the device; read once an epoch, so no step waits for them.
    curves = {}

    stateful = dict(model=model, ema_model=ema_model, scaler=scaler,
                    **{f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)})
    step, speeds = 0, []
    if checkpoint:
        curves, step, speeds, seconds = restore(checkpoint, stateful, data, config)
        began -= seconds  # the clock goes on from where it stood
        epochs_before = checkpoint["config"]["epochs"]
        del checkpoint  # and its copy of the weights
        if step >= total_steps:  # it has had its last epoch, and may have been stopped before it wrote model.pt
            finished = is_finished(config, step, total_steps, epochs_before, processes)
            accuracy = evaluate(ema_model, dataset, config.batch_size, autocast)
            if finished:
                print(f"{note}{folder} has had its {step // steps_per_epoch} epochs already, {dataset.test_split} "
                      f"accuracy {accuracy:.4f}: ask for more with --epochs")
                return accuracy
        print(f"goes on from step {step} of {total_steps}")
        if config.epochs != epochs_before:
            print(f"it has {config.epochs} epochs now, not {epochs_before}: the learning rate follows the new schedule")

    last_save, save_seconds = time.perf_counter(), 0.0

    def save_last():
        """Write last.pt. A run that was asked to stop ends here."""
        nonlocal last_save, save_seconds
        save_began = time.perf_counter()
        if rank == 0:  # in the middle of an epoch the curves are of the first process's share alone
            save(dict(config=dataclasses.asdict(config), data=data, step=step, curves=curves, speeds=speeds,
                      seconds=time.perf_counter() - began,
                      **{name: part.state_dict() for name, part in stateful.items()}), os.path.join(folder, "last.pt"))
        last_save = time.perf_counter()
        save_seconds = last_save - save_began
        if stopped_by and step < total_steps:
            print(f"stopped after step {step} of {total_steps}: the same command with --resume goes on from it "
                  "(without --overwrite)")
            raise SystemExit(128 + stopped_by[0])

    def log(event, **values):
        if rank == 0:
            append_line(os.path.join(folder, "log.jsonl"), dict(event=event, **values))

    parameters = sum(p.numel() for p in model.parameters())
    flops = count_flops(config.model, options, dataset.train_images.shape[1:])
    machine = describe_machine(device)
    log("start" if step == 0 else "resume", step=step, command=shlex.join(["python", *sys.argv]), commit=git_commit(),
        config=dataclasses.asdict(config), data=data, parameters=parameters, forward_flops=flops, amp=amp,
        compiled=compiled, processes=processes, **machine, **about)
    print(f"{note}{config.model}, size {config.size}, recipe {config.recipe}: {parameters / 1e6:.2f} M parameters, "
          f"{flops / 1e9:.3f} GFLOP per image forward")
    print(f"{dataset.name}: {data['train']} training and {data['test']} {dataset.test_split} images; {config.epochs} "
          f"epochs of {steps_per_epoch} steps of {config.batch_size}")
    print(f"{machine['machine']}, torch {torch.__version__}, precision {precision_name(amp, device)}, "
          f"{'compiled (the first steps wait for it)' if compiled else 'not compiled'}")
    print("epoch  train loss  floor  accuracy        lr  images/s  elapsed    left", flush=True)

    on_signal(stop_after_step, instead_of=stop_at_once)

    # The epochs. One step is a paragraph: batch, forward pass, loss, backward pass, optimizers, average.
    start_step, first_step_seconds, training_start = step, None, time.perf_counter()
    time_left = lambda: clock((total_steps - step) * (time.perf_counter() - training_start) / (step - start_step))
    for epoch in range(step // steps_per_epoch, config.epochs):
        model.train()
        epoch_start = shown = time.perf_counter()
        done = step % steps_per_epoch  # of this epoch, more than 0 only after a resume
        batches = train_batches(dataset, epoch, config.batch_size, config.seed, first_step=done, **augmentation)
        for i, (images, targets) in enumerate(batches, start=done):
            # Every process makes the whole batch, from the same seed, and trains on its share; so DropPath draws the
            # same in each. With one process the share is all: (B, C, S, S) and (B, K).
            images, targets = images[rank::processes], targets[rank::processes]
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr(step, group["peak_lr"])
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()  # the last step's logits and gradients are not needed
            with autocast:
                logits = parallel(images)  # (B, K), or (B, 2, K) with a distillation token
            loss, parts = loss_function(logits.float(), targets, images)
            scaler.scale(loss).backward()
            step_optimizers(model, optimizers, scaler, config.clip)
            if config.ema:  # the decay rises from 0.1 to config.ema, so that the first weights are forgotten
                decay = min(config.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(ema_state, model_state, 1 - decay)
            for name, value in {"loss": loss, **parts}.items():
                if name not in curves:
                    curves[name] = torch.zeros(steps_per_epoch, device=device)
                curves[name][i] = value.detach()
            step += 1

            if first_step_seconds is None:  # it also compiles, and cuDNN tries out its kernels
                synchronize(device)
                first_step_seconds = time.perf_counter() - training_start
            now = time.perf_counter()
            if i + 1 < steps_per_epoch and (stopped_by or now - last_save > 300):
                check_finite(curves["loss"][: i + 1].tolist(), step, model, lr)
                save_last()
            if sys.stdout.isatty() and now - shown > 1 and now - epoch_start > 3:
                shown, speed = now, (i + 1 - done) * config.batch_size / (now - epoch_start)
                print(f"\r{epoch + 1:5d}: step {i + 1} of {steps_per_epoch}, {speed:.0f} images/s, "
                      f"{time_left()} left  ", end="", flush=True)

        if processes > 1:
            for curve in curves.values():
                dist.all_reduce(curve.div_(processes))
        check_finite(curves["loss"].tolist(), step, model, lr)
        seconds = time.perf_counter() - epoch_start
        accuracy = evaluate(ema_model, dataset, config.batch_size, autocast)
        speeds.append((steps_per_epoch - done) * config.batch_size / seconds)
        elapsed = time.perf_counter() - began
        means = {name: statistics.fmean(curve.tolist()) for name, curve in curves.items()}
        loss, floor = means.pop("loss"), means.pop("floor")
        wipe = "\r\033[K" if sys.stdout.isatty() else ""  # the progress line
        others = "".join(f"  {name} {value:.4f}" for name, value in means.items())
        print(f"{wipe}{epoch + 1:5d}  {loss:10.4f}  {floor:5.3f}  {accuracy:8.4f}  {lr(step - 1):8.2e}  "
              f"{speeds[-1]:8.0f}  {clock(elapsed):>7}  {time_left():>6}{others}", flush=True)
        log("epoch", epoch=epoch + 1, step=step, train_loss=loss, loss_floor=floor, **means, accuracy=accuracy,
            lr=lr(step - 1), images_per_second=speeds[-1], seconds=elapsed)
        # At most 1 % of the time goes into this: short epochs are not all saved.
        if stopped_by or epoch + 1 == config.epochs or time.perf_counter() - last_save >= 100 * save_seconds:
            save_last()

    # The end: the log's last line, and then model.pt, which says that the run is complete.
    seconds = time.perf_counter() - began
    speed = statistics.median(speeds[1:] or speeds)  # the first epoch also compiles
    # Evaluations left out; an epoch that was interrupted counts as if all of it had gone as fast as its rest.
    training_seconds = sum(steps_per_epoch * config.batch_size / s for s in speeds)
    log("end", test_accuracy=accuracy if dataset.test_split == "test" else None,
        hold_out_accuracy=accuracy if dataset.test_split == "hold-out" else None, seconds=seconds,
        training_seconds=training_seconds, first_step_seconds=first_step_seconds, images_per_second=speed,
        peak_memory_bytes=peak_memory(device))
    if rank == 0:
        weights = {name: value.cpu() for name, value in ema_model.state_dict().items()}
        save(dict(model=config.model, options=options, dataset=dataset.name, hold_out=config.hold_out,
                  seed=config.seed, classes=dataset.classes, mean=dataset.mean.cpu(), std=dataset.std.cpu(), step=step,
                  state_dict=weights), model_path)
    on_signal(stop_at_once, instead_of=stop_after_step)  # a student may follow
    print(f"{note}{dataset.test_split} accuracy {accuracy:.4f} (last epoch, no TTA) in {seconds:.0f} s, {model_path}")
    if processes > 1:
        dist.barrier()  # nobody leaves before the files are written
    return accuracy


def main(config_class=Config, start=lambda config: run(resolve(config)), description=__doc__):
    """Run the command line. What the person can fix ends in one sentence on stderr and a non-zero exit status."""
    if "LOCAL_RANK" not in os.environ:  # torchrun ends its processes by itself, and they could not agree on a step
        signal.signal(signal.SIGINT, stop_at_once)
        signal.signal(signal.SIGTERM, stop_at_once)
    try:
        start(parse_config(config_class, description=description))
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.exit("error: out of memory: close other programs, or start again with --overwrite and a lower "
                 "--batch-size, or choose --size tiny")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit("error: the disk is full: make room, or choose another --out")


if __name__ == "__main__":
    main()
