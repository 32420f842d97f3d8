"""Distil a ResNet into a Vision Transformer: the run of train.py, with a teacher's term in the loss.

    python distill.py              train the resnet18 of the size, unless runs/ has it, then a ViT that learns from it
    python distill.py --alpha 0    its control: the same run without a teacher

On two CPU cores (tiny, bf16, torch 2.14): 81.71 +- 0.38 % with the teacher, 80.41 +- 0.14 % without (n = 3).
On one H200 (base, bf16, torch 2.11): 95.98 % with a teacher of 50 epochs, 94.61 % without (n = 1). Base's resnet18 is
ResNet-18, tiny's a small network of its blocks.

From top to bottom: the options, the loss, the teacher, and the run. The loop is train.py's own.
"""

import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import config as settings
import train
from checkpoint import FREE_FIELDS, check_folder, differences, load, load_last, load_model, open_run
from config import option
from data import entropy, test_batches
from datasets import InputError


@dataclass
class Config(settings.Config):
    """train.py's options, and the teacher's."""

    model: str = option("vit", "what to train", choices=("vit", "hybrid"), flag="student")
    teacher: str = option(None, "a model.pt that train.py wrote, or its folder (default: that of the resnet18 that "
                                "train.py would train with the same size, data set and seed; it is trained first if "
                                "--out has none)")
    temperature: float = option(2.0, "softens the probabilities of both", low=0.01)
    alpha: float = option(0.9, "the teacher's share of the loss, the labels have the rest; 0: no teacher", low=0,
                          high=1)
    hard: bool = option(False, "learn the teacher's first choice as a label, not its probabilities")
    distill_token: bool = option(False, "learn from the teacher through a token and a head of its own, as in DeiT")


# ---------------------------------------------------------------------------------------------------------------------
# The loss

def kl_divergence(student_logits, teacher_logits, temperature):
    """KL(teacher || student) of the softmaxes at that temperature, in nats, mean over the batch. logits (B, K)."""
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def split_heads(logits):
    """What a student says to the labels and to the teacher, (B, K) each: with logits (B, 2, K) not the same."""
    return logits.unbind(1) if logits.ndim == 3 else (logits, logits)


def distillation_loss(student_logits, teacher_logits, targets, temperature, alpha, hard=False):
    """alpha * T^2 * KL(teacher || student) at temperature T, plus (1 - alpha) * cross-entropy.

    Hinton et al. 2015, 1503.02531.

    student_logits, teacher_logits, targets: float (B, K) -> a scalar. Student logits of a distillation token's model
    are (B, 2, K): the first head learns from the targets, the second from the teacher (DeiT, 2012.12877).
    hard: instead of T^2 KL, the cross-entropy with the teacher's first choice.

    Why T^2? With p = softmax(z / T), the gradient of KL with respect to a student's logit is (p_student - p_teacher)
    / T, and for large T each p is about 1/K + (z - mean z) / (K T): the difference shrinks with 1/T once more. T^2
    undoes both, so that alpha keeps its meaning at every temperature.
    """
    by_label, by_teacher = split_heads(student_logits)
    if hard:
        from_teacher = F.cross_entropy(by_teacher, teacher_logits.argmax(dim=1))
    else:
        from_teacher = temperature**2 * kl_divergence(by_teacher, teacher_logits, temperature)
    return alpha * from_teacher + (1 - alpha) * F.cross_entropy(by_label, targets)


def make_loss(teacher, config):
    """The loss function that train.run calls with each batch. It logs its two parts, and how often both agree.

    The teacher sees the very images that the student sees, cropped, coloured and mixed alike: what it says of the clean
    picture is no answer to a mixed one.
    """
    autocast = train.make_autocast(config)

    def loss_function(logits, targets, images):
        with torch.no_grad(), autocast:
            teacher_logits = teacher(images).float()  # (B, K)
        loss = distillation_loss(logits, teacher_logits, targets, config.temperature, config.alpha, config.hard)
        with torch.no_grad():
            by_label, by_teacher = split_heads(logits)
            agree = (by_teacher.argmax(dim=1) == teacher_logits.argmax(dim=1)).float().mean()
            # The teacher's term can fall to 0, the labels' to their entropy: both at once only if teacher and labels
            # agree, or have a head each.
            parts = dict(floor=(1 - config.alpha) * entropy(targets),
                         kl=kl_divergence(by_teacher, teacher_logits, config.temperature),
                         cross_entropy=F.cross_entropy(by_label, targets), agreement=agree)
        return loss, parts

    return loss_function


# ---------------------------------------------------------------------------------------------------------------------
# The teacher

def train_teacher(config, dataset):
    """The path of the model.pt that `python train.py --model resnet18` makes, trained now if need be on `dataset`.

    If the preset's batch size does not fit the data set or the processes, the teacher takes the student's.
    """
    shared = ("size", "dataset", "data_dir", "hold_out", "seed", "device", "amp", "compile", "out")
    teacher = settings.resolve(settings.Config(model="resnet18", **{name: getattr(config, name) for name in shared}))
    rank, processes = train.join_processes(config)
    fits = teacher.batch_size <= len(dataset.train_labels) and teacher.batch_size % processes == 0
    if not fits:
        teacher.batch_size = config.batch_size  # which does: start has seen to it
    path, last = os.path.join(teacher.folder, "model.pt"), os.path.join(teacher.folder, "last.pt")
    trained = os.path.exists(path)
    if os.path.exists(last):
        take_it = f"name {path} with --teacher to take it all the same, or " if trained else ""
        try:
            checkpoint = load_last(teacher.folder)
        except InputError:
            raise InputError(f"cannot read {last}, the teacher's: {take_it}move {teacher.folder} away") from None
        if not fits:
            teacher.batch_size = checkpoint["config"].get("batch_size")  # an earlier student's
        differ = differences(checkpoint["config"], teacher, {"amp", *FREE_FIELDS} - {"epochs"})
        if differ:
            raise InputError(f"the teacher in {teacher.folder} is not of its preset ({differ}): {take_it}move that "
                             "folder away")
        # If last.pt is at another step, the teacher was resumed for more epochs, and stopped.
        trained = trained and load(path).get("step") == checkpoint.get("step")
    if not trained:
        teacher.resume = os.path.exists(last)
        teacher.overwrite = not teacher.resume
        if rank == 0:
            open_run(teacher)  # first: if it is refused, nothing of the student's was touched
            if not config.resume:
                open_run(config)  # the student's folder: the name is taken, and --resume finds it if this is stopped
        config.overwrite = not config.resume  # of that folder, which is empty now
        print(f"first the teacher, {teacher.folder}")
        train.run(teacher, dataset=dataset)
        # Forget what was compiled for its batch size: for a second one torch would compile a slower program for any.
        torch.compiler.reset()
        print()
    return path


def load_teacher(path, dataset, device):
    """The model of that file, frozen and in eval mode. InputError if it does not fit the data set."""
    teacher, about = load_model(path, device)
    num_classes = about["options"]["num_classes"]
    if num_classes != len(dataset.classes):
        raise InputError(f"the teacher {path} knows {num_classes} classes, and {dataset.name} has "
                         f"{len(dataset.classes)}: name another with --teacher")
    if not torch.allclose(about["mean"].cpu(), dataset.mean.cpu(), atol=1e-6):
        split = f"--hold-out {about.get('hold_out', 0)}, --seed {about.get('seed', 0)}"
        raise InputError(f"the teacher {path} was trained on images of {about['dataset']} ({split}), and not on these "
                         f"of {dataset.name} (their mean colour is another): train it with the same --dataset, "
                         "--hold-out and --seed")
    return teacher.to(memory_format=torch.channels_last).requires_grad_(False)


def seconds_per_step(teacher, dataset, config, processes=1):
    """What the teacher adds to a training step: the seconds of one forward pass, the median of five."""
    images, _ = next(test_batches(dataset, config.batch_size // processes))  # (B, C, S, S)
    seconds = []
    for _ in range(7):  # two to warm up, and to compile
        train.synchronize(config.device)
        start = time.perf_counter()
        with torch.no_grad(), train.make_autocast(config):
            teacher(images)
        train.synchronize(config.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


# ---------------------------------------------------------------------------------------------------------------------
# The run

def resolve(config):
    """config.resolve, and the same for the teacher's options. InputError if one is impossible."""
    of_teacher = ("teacher", "temperature", "hard", "distill_token")
    if not config.alpha and any(getattr(config, name) != getattr(Config, name) for name in of_teacher):
        raise InputError("--alpha 0 has no teacher: leave --teacher, --temperature, --hard and --distill-token out")
    if config.distill_token and config.pool == "cls":
        raise InputError("--distill-token adds a class token too: leave --pool out")
    if config.hard and config.temperature != Config.temperature:
        raise InputError("--hard takes the teacher's first choice, whatever the temperature: leave --temperature out")
    given = config.name
    config = settings.resolve(config)
    if config.teacher and os.path.isdir(config.teacher):
        config.teacher = os.path.join(config.teacher, "model.pt")  # one spelling, which --resume compares
    if config.distill_token:
        config.pool = "distill"
    config.name = given or ("distill-" if config.alpha else "control-") + config.name
    return config


def start(config):
    """Train the student of the command line, and its teacher first if there is none."""
    config = resolve(config)
    if not config.alpha:
        return train.run(config)
    _, processes = train.join_processes(config)
    train.use_fast_kernels()
    check_folder(config)  # a taken name is reported before the teacher's training, not after
    if config.resume and not os.path.exists(os.path.join(config.folder, "last.pt")):
        if os.path.exists(os.path.join(config.folder, "model.pt")):
            raise InputError(f"{config.folder} has no last.pt to resume from: choose another --name, or --overwrite "
                             "it")
        # It was stopped while its teacher was being trained, or killed before it first saved.
        print(f"{config.folder} has no last.pt yet: the student starts from the beginning")
        config.resume, config.overwrite = False, True
    dataset = train.load_for_all(config)
    # A batch size or --compile that does not fit is reported before the teacher's training as well.
    train.count_steps(config, len(dataset.train_labels), processes)
    compiled = train.choose_compile(config, len(dataset.train_labels), processes)
    path = config.teacher or train_teacher(config, dataset)
    teacher = load_teacher(path, dataset, config.device)
    if compiled:
        teacher.compile()  # without CUDA graphs: it runs between the student's two passes, which are such
    accuracy = train.evaluate(teacher, dataset, config.batch_size, train.make_autocast(config))
    seconds = seconds_per_step(teacher, dataset, config, processes)
    print(f"teacher {path}: {dataset.test_split} accuracy {accuracy:.4f}, adds {1000 * seconds:.1f} ms to a step")
    about = dict(path=path, accuracy=accuracy, seconds_per_step=seconds)
    return train.run(config, make_loss(teacher, config), dataset, teacher=about)


if __name__ == "__main__":
    train.main(Config, start, __doc__)
