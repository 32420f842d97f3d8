"""Look at what runs did: pictures, tables, and what a trained model says of your own photographs.

    python show.py augment                     one batch before and after each augmentation, augment.png
    python show.py attention                   where a trained model looks, attention.png
    python show.py confusion                   accuracy for each class, confusion matrix, calibration
    python show.py predict cat.jpg dog.png     the likeliest classes of any pictures
    python show.py curves runs/A runs/B        loss, floor and accuracy over the epochs, curves.png (needs matplotlib)
    python show.py table                       the logs in results/ as Markdown

`--model` names the model.pt to look at, or its folder; without it, the newest in runs/ is taken.
"""

import argparse
import collections
import dataclasses
import glob
import json
import os
import signal
import statistics
import string
import sys

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import to_pil_image

import data
from checkpoint import load_model, out_of_memory, precision_name
from config import AUGMENTATION, PRESETS, Parser
from data import soft_targets, test_batches
from datasets import DATASETS, IMAGE_SIZE, InputError, load_dataset, read_image

ROOT = os.path.dirname(os.path.abspath(__file__))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def write(save, path):
    """Let `save` write the picture, and say so. InputError if it cannot."""
    try:
        save(path)
    except (OSError, ValueError) as error:  # ValueError: of a kind that it does not know
        raise InputError(f"cannot write {path} ({error}): name another picture, such as x.png, with --out") from None
    print(path)


def save_grid(rows, titles, captions, path, scale=3):
    """Write a PNG: rows of pictures, float (n, 3, S, S), 0 to 1, a title for each row, a caption for each picture."""
    S, left, below = IMAGE_SIZE * scale, 120, 24
    canvas = Image.new("RGB", (left + (S + 4) * max(map(len, rows)), (S + below) * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (row, title) in enumerate(zip(rows, titles)):
        draw.text((4, r * (S + below) + S // 2 - 6), title, fill="black")
        for i, image in enumerate(row):
            corner = (left + i * (S + 4), r * (S + below))
            picture = to_pil_image(image.float().clamp(0, 1).cpu()).resize((S, S), Image.NEAREST)
            canvas.paste(picture, corner)
            draw.text((corner[0], corner[1] + S), captions[r][i], fill="black", spacing=0, font_size=10)
    write(canvas.save, path)


def augment(args):
    """A row for each augmentation, and one for all of them together, as the base preset has them."""
    dataset = load_dataset(args.dataset or "auto", args.data_dir)
    fell_back = dataset.name == "shapes" and args.dataset in (None, "auto")
    print(f"data set {dataset.name}" + (", as CIFAR-10 was not found" if fell_back else ""))
    preset = PRESETS["vit", "base"]
    images = dataset.train_images[: args.count].float() / 255  # (B, 3, S, S)
    targets = soft_targets(dataset.train_labels[: args.count], len(dataset.classes))  # (B, K)
    torch.manual_seed(args.seed)

    def label(target):
        """The classes of a soft target that have 5 % or more, as the lines below a picture."""
        shares, classes = target.topk(2)
        return "\n".join(f"{share:.0%} {dataset.classes[k]}" if share < 0.99 else dataset.classes[k]
                         for share, k in zip(shares.tolist(), classes.tolist()) if share >= 0.05)

    def rows():
        mean = dataset.mean  # erasing paints what normalisation makes 0
        yield "as it is", images, targets
        yield f"crop {preset['crop']} and flip", data.crop_and_flip(images, preset["crop"]), targets
        yield "TrivialAugment on all", data.trivial_augment(images, 1.0), targets
        yield f"jitter {preset['jitter']}", data.color_jitter(images, preset["jitter"]), targets
        yield "erasing on all", data.random_erasing(images - mean, 1.0) + mean, targets
        yield f"Mixup {preset['mixup']}", *data.mix_up(images, targets, preset["mixup"])
        yield f"CutMix {preset['cutmix']}", *data.cut_mix(images, targets, preset["cutmix"])
        # Without label smoothing: the captions show what was mixed.
        recipe = {name: preset[name] for name in AUGMENTATION if name != "label_smoothing"}
        few = dataclasses.replace(dataset, train_images=dataset.train_images[: args.count],
                                  train_labels=dataset.train_labels[: args.count])
        batch, mixed = next(data.train_batches(few, epoch=0, batch_size=len(images), seed=args.seed, **recipe))
        yield "all together, shuffled", batch * dataset.std + mean, mixed

    titles, pictures, labels = zip(*rows())
    save_grid(pictures, titles, [[label(target) for target in row] for row in labels], args.out or "augment.png")


def attention_weights(model, images):
    """The attention weights of every block, (L, B, H, N, N) for L blocks, from the explicit path."""
    kept = []
    keep = lambda attn, inputs: kept.append(attn.forward(*inputs, return_weights=True)[1])
    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.encoder.blocks]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return torch.stack(kept)


def rollout(weights):
    """How much each token's output owes to each input token, through all blocks (Abnar & Zuidema 2020, 2005.00928).

    weights (L, B, H, N, N) -> (B, N, N), rows sum to one. The residual connection is counted as half of each block.
    """
    mixing = 0.5 * weights.mean(dim=2) + 0.5 * torch.eye(weights.shape[-1])  # (L, B, N, N)
    total = mixing[0]
    for block in mixing[1:]:
        total = block @ total
    return total


def attention(args):
    """Pictures, each beside what the last block's heads look at, and beside the rollout through all blocks."""
    model, about = load_trained(args)
    if not hasattr(model, "encoder") or not isinstance(model.encoder.blocks, torch.nn.Sequential):
        raise InputError(f"{args.model} has no attention that could be shown: name a vit or a hybrid with our encoder")
    dataset = load_for(about, args)
    pixels = dataset.test_images[: args.count].float() / 255  # (B, 3, S, S)
    weights = attention_weights(model, (pixels - about["mean"]) / about["std"])  # (L, B, H, N, N)
    extra = 0 if model.encoder.cls_token is None else model.encoder.cls_token.shape[1]

    def light(looks):
        """Pictures lit by how much each patch is looked at: looks (B, N, N), from every token to every token."""
        # The class token's row where there is one; else the mean over all tokens, as the classifier takes it.
        seen = (looks[:, 0] if extra else looks.mean(dim=1))[:, extra:]  # (B, patches)
        side = round(seen.shape[1] ** 0.5)
        seen = F.interpolate(seen.view(-1, 1, side, side), size=IMAGE_SIZE, mode="bilinear")  # (B, 1, S, S)
        return pixels * (0.15 + 0.85 * seen / seen.amax(dim=(2, 3), keepdim=True))

    columns = [pixels] + [light(head) for head in weights[-1].unbind(1)] + [light(rollout(weights))]
    names = ["image"] + [f"last block, head {h + 1}" for h in range(weights.shape[2])] + ["rollout"]
    labels = [dataset.classes[k] for k in dataset.test_labels[: args.count].tolist()]
    save_grid(columns, names, [labels] * len(columns), args.out or "attention.png")


def curves(args):
    """Training loss with its floor, what lies between them, and accuracy, over the epochs of several runs."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("curves needs matplotlib: pip install matplotlib") from None
    figure, (losses, above, accuracies) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for path in args.paths:
        name = os.path.basename(os.path.abspath(path).removesuffix("/log.jsonl")).removesuffix(".jsonl")
        path = os.path.join(path, "log.jsonl") if os.path.isdir(path) else path
        log = read_log(path)
        epochs = [line for line in log if line["event"] == "epoch"]
        if not epochs:
            raise InputError(f"{path} has no epoch yet: wait for the end of its first one")
        x, loss, floor = zip(*((line["epoch"], line["train_loss"], line["loss_floor"]) for line in epochs))
        color = losses.plot(x, loss, marker=".", label=name)[0].get_color()
        losses.plot(x, floor, color=color, linestyle="--")
        above.plot(x, [a - b for a, b in zip(loss, floor)], marker=".", label=name)
        accuracies.plot(x, [100 * line["accuracy"] for line in epochs], marker=".", label=name)
    for axes, title in ((losses, "training loss, and its floor (dashed)"), (above, "training loss above its floor"),
                        (accuracies, "accuracy, %")):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")
    write(lambda path: figure.savefig(path, dpi=100), args.out or "curves.png")


# ---------------------------------------------------------------------------------------------------------------------
# A trained model

def load_trained(args):
    """The model of --model, or the newest in runs/, with the rest of its file; see checkpoint.load_model."""
    if not args.model:
        found = glob.glob(os.path.join("runs", "**", "model.pt"), recursive=True)
        if not found:
            raise InputError("there is no model.pt in runs/: train one, or name one with --model")
        args.model = max(found, key=os.path.getmtime)
        print(f"model {args.model}")
    return load_model(args.model)


def load_for(about, args):
    """The data set of the command line, or the model's own; if that run held images out, they are the test set.

    InputError if its classes are not those of the model, or if other images were held out.
    """
    name = args.dataset or about.get("dataset", "auto")
    own = name in ("auto", about.get("dataset"))  # auto: if it is another, its classes say so
    hold_out = about.get("hold_out", 0) if own else 0
    dataset = load_dataset(name, args.data_dir, hold_out, about.get("seed", 0))
    if dataset.classes != about["classes"]:
        raise InputError(f"{args.model} was trained on other classes than these of {dataset.name}: name its own data "
                         "with --dataset and --data-dir")
    if own and not torch.allclose(dataset.mean, about["mean"], atol=1e-6):
        if hold_out:
            raise InputError(f"{args.model} was trained on other images than these of {name}, so those held out are "
                             "not known: name its own data with --data-dir")
        print(f"{args.model} was trained on other images than these of {name}: it may have seen some test images")
    return dataset


@torch.no_grad()
def probabilities(model, dataset):
    """What the model gives each class for every test image, (N, K), on the CPU; computed on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, dataset = model.to(device), dataset.to(device)
    batches = test_batches(dataset, 250)
    return torch.cat([model(images)[: len(labels)].softmax(dim=1) for images, labels in batches]).cpu()


def calibration_error(probability, labels, bins=15):
    """Expected calibration error: how far confidence and accuracy lie apart, over bins of confidence (Guo et al. 2017).

    probability (N, K), labels (N,) -> a number from 0 to 1. 1706.04599.
    """
    confidence, prediction = probability.max(dim=1)  # (N,), (N,)
    correct = (prediction == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, index, correct - confidence.double())  # (bins,)
    return gap.abs().sum().item() / len(labels)


def confusion(args):
    """Per-class accuracy, confusion matrix and calibration error, without and with flip TTA, on load_for's images."""
    model, about = load_trained(args)
    dataset = load_for(about, args)
    dataset.mean, dataset.std = about["mean"], about["std"]
    labels, K = dataset.test_labels, len(dataset.classes)
    print(f"{dataset.name}, {len(labels)} {dataset.test_split} images")
    plain = probabilities(model, dataset)  # (N, K)
    mirrored = probabilities(model, dataclasses.replace(dataset, test_images=dataset.test_images.flip(3)))  # (N, K)
    for kind, probability in (("without", plain), ("with", (plain + mirrored) / 2)):
        print(f"{kind} flip TTA: accuracy {(probability.argmax(dim=1) == labels).double().mean():.4f}, "
              f"calibration error {calibration_error(probability, labels):.4f}")
    # Rows: true, columns: chosen.
    counts = torch.bincount(labels * K + plain.argmax(dim=1), minlength=K * K).view(K, K)  # (K, K)
    shares = counts.diag() / counts.sum(dim=1).clamp(min=1)  # (K,)
    width = max(map(len, dataset.classes))
    print("\nwithout TTA; a row for each true class, a column for each chosen one")
    print(" " * width + "  accuracy  " + " ".join(f"{name[:5]:>5}" for name in dataset.classes))
    for name, share, row in zip(dataset.classes, shares.tolist(), counts.tolist()):
        print(f"{name:>{width}}  {share:8.3f}  " + " ".join(f"{n:5d}" for n in row))


def predict(args):
    """The three likeliest classes of each picture, which is scaled and cropped to the size that the model knows."""
    model, about = load_trained(args)
    for path in args.paths:
        image = read_image(path)[None] / 255  # (1, 3, S, S)
        with torch.no_grad():
            probability = model((image - about["mean"]) / about["std"])[0].softmax(dim=0)  # (K,)
        best = probability.topk(min(3, len(probability)))
        found = zip(best.values.tolist(), best.indices.tolist())
        print(f"{path}: " + ", ".join(f"{about['classes'][k]} {share:.1%}" for share, k in found))


# ---------------------------------------------------------------------------------------------------------------------
# The table

def read_log(path):
    """The lines of a log.jsonl, as dicts. InputError if it cannot be read or is empty.

    A run that was killed and resumed does the epochs after its last save again: those that were lost do not count.
    """
    try:
        lines = []
        with open(path) as file:
            for line in map(json.loads, file):
                if line["event"] == "resume":
                    lines = [old for old in lines if old["event"] != "epoch" or old["step"] <= line["step"]]
                lines.append(line)
        if not lines:
            raise ValueError("it is empty")
        return lines
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the log {path} ({error})") from None
    except (KeyError, TypeError):
        raise InputError(f"{path} is not a log.jsonl of this project") from None


def planned(size, ablations=False):
    """What results/runs.txt has at that size: rows, {name: command}, or ablations, {name: (changed row, command)}."""
    with open(os.path.join(ROOT, "results", "runs.txt")) as file:
        runs = [line.rstrip().split(maxsplit=3) for line in file if line.strip() and not line.startswith("#")]
    runs = [run for run in runs if run[1] in (size, "both") and (run[2] != "-") == ablations]
    return {name: (base, command) if ablations else command for name, _, base, command in runs}


def finished_runs(size, name):
    """{seed: log} of the finished runs on CIFAR-10 whose logs are results/SIZE/NAME-SEED.jsonl."""
    logs = {}
    for path in sorted(glob.glob(os.path.join(ROOT, "results", size, f"{name}-*.jsonl"))):
        seed = os.path.basename(path)[len(name) + 1 : -len(".jsonl")]
        if not seed.isdigit():  # another row's, whose name begins alike
            continue
        log = read_log(path)
        if log[-1]["event"] == "end" and log[-1]["test_accuracy"] is not None and log[0]["data"]["name"] == "cifar10":
            logs[int(seed)] = log
    return logs


def mean_and_std(values, sign=""):
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def place(log):
    """Where a run was made and in which precision: what its seconds depend on."""
    return f"{log[0]['machine']}, {precision_name(log[0]['amp'], log[0]['config'].get('device'))}"


def lettered(size):
    """A letter for each place where runs of that size were made, the same in both tables: {place: letter}.

    In the order of how many of the rows were made there, and then of the ablations.
    """
    places = []
    for ablations in (False, True):
        logs = [log for name in planned(size, ablations) for log in finished_runs(size, name).values()]
        places += [where for where, _ in collections.Counter(map(place, logs)).most_common()]
    return dict(zip(dict.fromkeys(places), string.ascii_lowercase))


def by_machine(logs, letters):
    """A row's runs on the one of its machines that has the first letter, and how many were made where, as text.

    The text is "a", or "5 a, 1 d". Seconds on unlike machines have no mean, so a row shows those of the first.
    """
    where = [letters[place(log)] for log in logs]
    first = [log for log, letter in zip(logs, where) if letter == min(where)]
    count = sorted(collections.Counter(where).items())
    return first, ", ".join(f"{n} {letter}" if len(count) > 1 else letter for letter, n in count)


def as_markdown(head, lines, rows, letters):
    """A Markdown table, and below it what the letters stand for."""
    text = "".join("| " + " | ".join(line) + " |\n" for line in [head, ["---"] * len(head), *lines])
    for name, letter in letters.items():
        versions = sorted({log[0]["torch"] for logs in rows.values() for log in logs if place(log) == name})
        text += f"\n{letter}: {name}, torch {' and '.join(versions)}\n" if versions else ""
    return text


def mean(logs, key):
    """The mean over runs of what their last line says."""
    return statistics.mean(log[-1][key] for log in logs)


def markdown_table(size):
    """The results of that size as a Markdown table: a line for each row of runs.txt, over its seeds."""
    head = ["run", "accuracy, % (mean ± std)", "n", "M parameters", "GFLOP/image", "epochs", "seconds", "images/s",
            "peak GB", "on", "command"]
    rows = {name: list(finished_runs(size, name).values()) for name in planned(size)}
    lines, letters = [], lettered(size)
    for name, command in planned(size).items():
        logs = rows[name]
        command = f"`python {command} --size {size}`"
        if not logs:
            lines.append([name, "not run", *["-"] * 8, command])
            continue
        start, (alike, where) = logs[0][0], by_machine(logs, letters)
        config = [line["config"] for line in logs[0] if "config" in line][-1]  # --resume can have changed the epochs
        lines.append([name, mean_and_std([100 * log[-1]["test_accuracy"] for log in logs]), str(len(logs)),
                      f"{start['parameters'] / 1e6:.2f}", f"{start['forward_flops'] / 1e9:.3f}",
                      str(config["epochs"]), f"{mean(alike, 'seconds'):.0f}", f"{mean(alike, 'images_per_second'):.0f}",
                      f"{mean(alike, 'peak_memory_bytes') / 1e9:.2f}", where, command])
    return f"{size}:\n\n" + as_markdown(head, lines, rows, letters)


def ablation_table(size):
    """Each ablation beside the row that it changes: accuracy, and the difference over the seeds that both have."""
    plan, pairs = planned(size, ablations=True), {}
    for name, (base_name, _) in plan.items():
        logs, base = finished_runs(size, name), finished_runs(size, base_name)
        pairs[name] = [(log, base[seed]) for seed, log in logs.items() if seed in base]
    rows = {name: [log for log, _ in some] for name, some in pairs.items() if some}
    if not rows:
        return ""
    lines, letters, accuracy = [], lettered(size), lambda log: 100 * log[-1]["test_accuracy"]
    for name, logs in rows.items():
        (base_name, command), (alike, where) = plan[name], by_machine(logs, letters)
        lines.append([name, mean_and_std([accuracy(log) for log in logs]),
                      mean_and_std([accuracy(log) - accuracy(base) for log, base in pairs[name]], "+"), base_name,
                      str(len(logs)), f"{logs[0][0]['forward_flops'] / 1e9:.3f}",
                      f"{mean(alike, 'seconds'):.0f}", where, f"`python {command} --size {size}`"])
    head = ["ablation", "accuracy, %", "difference", "from", "n", "GFLOP/image", "seconds", "on", "command"]
    missing = len(plan) - len(rows)
    rest = f"\nNot run: {missing} more that `results/runs.txt` has.\n" if missing else ""
    return f"{size}, ablations:\n\n" + as_markdown(head, lines, rows, letters) + rest


def table(args):
    """Both sizes' tables and ablations, which README.md and results/README.md hold between two markers each."""
    print("\n".join(made(size) for made in (markdown_table, ablation_table) for size in ("tiny", "base")), end="")


# ---------------------------------------------------------------------------------------------------------------------

COMMANDS = dict(augment=augment, attention=attention, curves=curves, confusion=confusion, predict=predict, table=table)


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", metavar="COMMAND", help="see above", choices=COMMANDS)
    parser.add_argument("paths", nargs="*", default=[], help="pictures for predict; runs or their logs for curves")
    parser.add_argument("--model", help="a model.pt or its folder (default: the newest in runs/)")
    parser.add_argument("--dataset", choices=DATASETS, help="default: the model's own; for augment CIFAR-10")
    parser.add_argument("--data-dir", help="where the data set lies (default: $DATA_DIR, else ./data)")
    parser.add_argument("--count", type=int, default=10, help="pictures in a row (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the augmentation (default: 0)")
    parser.add_argument("--out", help="the PNG of augment, attention or curves (default: the command's name)")
    args = parser.parse_intermixed_args()  # paths may stand before and after the options
    if args.what in ("curves", "predict") and not args.paths:
        parser.error(f"{args.what} needs at least one path")
    if args.paths and args.what not in ("curves", "predict"):
        advice = ": --model names a model" if args.what in ("attention", "confusion") else ""
        parser.error(f"{args.what} takes no paths{advice}")
    if args.count < 1 or args.seed < 0:
        parser.error("--count must be at least 1, and --seed at least 0")
    try:
        if args.out and not (os.path.splitext(args.out)[1] and os.path.isdir(os.path.dirname(args.out) or ".")):
            raise InputError(f"cannot write {args.out}: --out names a picture, such as x.png, in a folder that exists")
        COMMANDS[args.what](args)
    except InputError as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.exit("error: out of memory: close other programs, or look at fewer pictures with --count")


if __name__ == "__main__":
    main()
