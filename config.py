"""What decides a run: Config, whose fields are the flags of the command line, and the presets.

From top to bottom: Config, the presets of each model and size, the command line, `model_options`, which is what a model
takes of a config, and `resolve`, which puts a preset's values where the command line has none and checks all of them.
"""

import argparse
import dataclasses
import math
import os
from dataclasses import dataclass

import torch

from datasets import DATASETS, InputError
from model import MODELS, build_model


# ---------------------------------------------------------------------------------------------------------------------
# Config

def option(default, help, choices=None, low=None, high=None, flag=None):
    """A field of Config: its default (None: the preset's), its help, and the values allowed (low and high included).

    The flag is the field's name, unless `flag` gives another."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high, flag=flag))


def flag_of(field):
    return "--" + (field.metadata["flag"] or field.name).replace("_", "-")


def number(text):
    """What --gamma-init takes: a number, or none. argparse also hands its default through here, "preset"."""
    return None if text == "none" else text if text == "preset" else float(text)


@dataclass
class Config:
    """Everything that decides a run. Every field is a flag of the command line.

    None, and for gamma_init "preset", stands for the preset's value where there is one.
    """

    model: str = option("vit", "what to train; tiny's resnet18 is a small network of ResNet-18's blocks",
                        choices=tuple(MODELS))
    size: str = option("auto", "tiny: minutes on two CPU cores; base: for a GPU; auto: base with CUDA, else tiny",
                       choices=("auto", "tiny", "base"))
    recipe: str = option("full", "basic: crop, flip and weight decay are all the regularisation; full: the preset's",
                         choices=("basic", "full"))
    encoder: str = option("explicit", "our Transformer blocks, or torch's nn.TransformerEncoder",
                          choices=("explicit", "builtin"))
    pool: str = option("mean", "classify the mean of the tokens, or a class token", choices=("mean", "cls"))
    pos_init: str = option(None, "position embeddings start from small noise, or from sines and cosines of the place",
                           choices=("noise", "sine"))
    whiten: str = option("on", "start the first layer from the principal components of the training images",
                         choices=("on", "off"))

    dataset: str = option("auto", "auto: CIFAR-10 from --data-dir or downloaded, else shapes, which are drawn on the "
                                  "spot; folder: images of your own, --data-dir/CLASS/FILE", choices=DATASETS)
    data_dir: str = option(None, "where the data set lies or is downloaded to (default: $DATA_DIR, else ./data)")
    hold_out: int = option(0, "tune on this many images split off the training set; the test set is left alone", low=0)

    epochs: int = option(None, "passes over the training set", low=1)
    batch_size: int = option(None, "images in a step", low=1)
    optimizer: str = option(None, "adamw, or muon for the matrices and kernels inside and adamw for the rest",
                            choices=("adamw", "muon"))
    lr: float = option(None, "peak learning rate of AdamW; beside Muon that is for biases, norms, embeddings and the "
                             "first and last layer", low=0)
    muon_lr: float = option(None, "peak learning rate of Muon, scaled to match AdamW's update size", low=0)
    momentum: float = option(None, "momentum of Muon", low=0, high=0.999)
    weight_decay: float = option(None, "each step shrinks the weights by lr times this", low=0)
    warmup: float = option(None, "epochs over which the learning rate rises from 0, at most a fifth of the run", low=0)
    schedule: str = option(None, "how the learning rate falls to 0 afterwards", choices=("cosine", "linear"))
    clip: float = option(None, "largest norm of the gradient; 0: no clipping", low=0)
    ema: float = option(None, "decay of the weights' moving average, which is then evaluated and kept; 0: none", low=0,
                        high=0.99999)

    patch_size: int = option(None, "side of a ViT's patches, in pixels", low=1)
    dim: int = option(None, "width of a token", low=1)
    depth: int = option(None, "number of Transformer blocks", low=1)
    heads: int = option(None, "number of attention heads", low=1)
    drop_path: float = option(None, "probability that an image skips a branch of the last block; less in earlier ones",
                              low=0, high=0.99)
    gamma_init: float = option("preset", "start value of gamma, the learned scale of a branch; none: no gamma")

    crop: int = option(None, "largest random shift of an image, in pixels", low=0, high=31)
    trivial: float = option(None, "share of images that get one TrivialAugment operation", low=0, high=1)
    jitter: float = option(None, "range of random brightness, contrast and saturation", low=0, high=1)
    erasing: float = option(None, "share of images in which a random box is blanked", low=0, high=1)
    label_smoothing: float = option(None, "probability spread over all classes", low=0, high=0.99)
    mixup: float = option(None, "alpha of Mixup's Beta distribution; 0: off", low=0)
    cutmix: float = option(None, "alpha of CutMix's Beta distribution; 0: off; with both on, a coin chooses one for "
                                 "each batch", low=0)

    seed: int = option(0, "random seed of the weights, the batches, the augmentation and the images held out", low=0,
                       high=2**63 - 1)
    device: str = option("auto", "where to compute", choices=("auto", "cuda", "mps", "cpu"))
    amp: str = option("auto", "precision of matrix products and convolutions", choices=("auto", "bf16", "fp16", "off"))
    compile: str = option("auto", "torch.compile; auto: base runs with CUDA that see a million images or more, twenty "
                                  "epochs of CIFAR-10", choices=("auto", "on", "off"))
    name: str = option(None, "the run's folder in --out (default: made of model, size, recipe, data set, seed)")
    out: str = option("runs", "the folder that holds the runs' folders")
    resume: bool = option(False, "go on from the run's last.pt")
    overwrite: bool = option(False, "replace a run of the same name")

    folder = property(lambda config: os.path.join(config.out, config.name), doc="Where the run's files are.")


# ---------------------------------------------------------------------------------------------------------------------
# Presets

# How each size trains. A tiny run sees every image only a few times: it underfits, and strong regularisation would only
# slow it down, so its full recipe is label smoothing. A base run sees every image 100 times, and needs all there is.
NO_REGULARISATION = dict(trivial=0.0, jitter=0.0, erasing=0.0, label_smoothing=0.0, mixup=0.0, cutmix=0.0)
AUGMENTATION = ("crop", *NO_REGULARISATION)  # the options that train_batches takes
TINY = dict(NO_REGULARISATION, crop=2, label_smoothing=0.1, batch_size=250, optimizer="muon", lr=4e-3, muon_lr=0.015,
            momentum=0.6, weight_decay=0.01, warmup=0.2, schedule="linear", clip=0.0, ema=0.0)
BASE = dict(crop=4, trivial=0.5, jitter=0.1, erasing=0.25, label_smoothing=0.1, mixup=0.2, cutmix=1.0, epochs=100,
            batch_size=512, optimizer="muon", lr=2e-3, muon_lr=0.005, momentum=0.95, weight_decay=0.1,
            warmup=3.0, schedule="cosine", clip=1.0, ema=0.998)
PRESETS = {
    ("vit", "tiny"): dict(TINY, epochs=4, lr=2e-3, muon_lr=0.005, momentum=0.9, patch_size=4, dim=256, depth=4, heads=4,
                          drop_path=0.0, gamma_init=1.0, pos_init="sine"),
    ("hybrid", "tiny"): dict(TINY, epochs=5, dim=256, depth=2, heads=4, drop_path=0.0, gamma_init=1.0,
                             pos_init="noise"),
    ("resnet18", "tiny"): dict(TINY, epochs=5),
    ("vit", "base"): dict(BASE, muon_lr=0.0025, patch_size=4, dim=384, depth=7, heads=6, drop_path=0.1,
                          gamma_init=1.0, pos_init="sine"),
    ("hybrid", "base"): dict(BASE, dim=256, depth=6, heads=4, drop_path=0.1, gamma_init=1.0, pos_init="noise"),
    ("resnet18", "base"): BASE,
}
# Parts of the models that a size fixes. Layers at full resolution cost the most and, with few channels, use a CPU
# poorly. So the tiny trunk has its stem alone there, is wide at low resolution, and ends at 4 x 4: 16 tokens.
TINY_TRUNK = dict(widths=(32, 64, 128, 256), depths=(0, 1, 1, 1), downsample="pool", activation="gelu")
FIXED = {("vit", "tiny"): dict(mlp_ratio=2.0), ("hybrid", "tiny"): dict(TINY_TRUNK, mlp_ratio=2.0),
         ("resnet18", "tiny"): TINY_TRUNK}


# ---------------------------------------------------------------------------------------------------------------------
# From the command line to a whole config

class Parser(argparse.ArgumentParser):
    """An argument parser. A mistake ends the program with one sentence, and without the list of all options."""

    def error(self, message):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def parse_config(config_class=Config, argv=None, description=None):
    """The command line as a config_class, whose fields are the flags. A mistake ends the program with one sentence.

    argv: its words (default: the program's own); description: what --help says first.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(config_class):
        flag, kind, meta = flag_of(field), field.type, field.metadata
        if kind is bool:
            parser.add_argument(flag, dest=field.name, action="store_true", help=meta["help"])
            continue
        per_preset = {f"{model} {size}": preset[field.name] for (model, size), preset in PRESETS.items()
                      if field.name in preset}
        default = ("preset: " + ", ".join(f"{who} {value}" for who, value in per_preset.items()) if per_preset
                   else field.default)
        text = meta["help"] + (f" (default: {default})" if default is not None else "")
        parser.add_argument(flag, dest=field.name, type=number if field.name == "gamma_init" else kind,
                            default=field.default, choices=meta["choices"],
                            metavar=None if meta["choices"] else kind.__name__.upper(), help=text.replace("%", "%%"))
    return config_class(**vars(parser.parse_args(argv)))


def model_options(config, num_classes):
    """The keyword arguments with which build_model makes the model of a resolved config."""
    options = dict(FIXED.get((config.model, config.size), {}), num_classes=num_classes)
    if config.dim is not None:  # it has an Encoder
        options.update(dim=config.dim, depth=config.depth, num_heads=config.heads, drop_path=config.drop_path,
                       gamma_init=config.gamma_init, pool=config.pool, pos_init=config.pos_init,
                       encoder=config.encoder)
    if config.patch_size is not None:
        options["patch_size"] = config.patch_size
    return options


def resolve(config):
    """Put the preset's values where the config has none, and check all values. InputError if one is impossible."""
    config = dataclasses.replace(config)
    for field in dataclasses.fields(config):
        choices, value = field.metadata["choices"], getattr(config, field.name)
        if choices and value != field.default and value not in choices:
            raise InputError(f"{flag_of(field)} must be one of {', '.join(choices)}, not {value!r}")
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if config.device == "auto":
        config.device = next(device for device, there in available.items() if there)
    if not available[config.device]:
        raise InputError(f"torch finds no {config.device} device here: try --device cpu")
    if config.size == "auto":
        config.size = "base" if config.device == "cuda" else "tiny"
    preset = dict(PRESETS[config.model, config.size])
    if config.recipe == "basic":
        preset.update({name: 0.0 for name in (*NO_REGULARISATION, "drop_path", "ema") if name in preset})
    if config.encoder == "builtin":
        preset.update(drop_path=0.0, gamma_init=None)
    # The options that this model or optimizer does not have, and which of the two that is.
    foreign = {name: f"a {config.model}" for other in PRESETS.values() for name in other if name not in preset}
    if "dim" not in preset:
        foreign |= dict.fromkeys(("encoder", "pool"), f"a {config.model}")
    optimizer = config.optimizer or preset["optimizer"]
    if optimizer != "muon":
        foreign |= dict.fromkeys(("muon_lr", "momentum"), optimizer)
    for field in dataclasses.fields(config):
        value, low, high = getattr(config, field.name), field.metadata["low"], field.metadata["high"]
        if field.name in foreign:
            if value != field.default:
                raise InputError(f"{flag_of(field)} means nothing to {foreign[field.name]}: leave it out")
            value = None
        elif field.name in preset and value == field.default:
            value = preset[field.name]
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{flag_of(field)} must be a finite number, not {value}")
        if value is not None and low is not None and not low <= value <= (math.inf if high is None else high):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            raise InputError(f"{flag_of(field)} must be {allowed}, not {value}")
        setattr(config, field.name, value)
    if not config.name:
        config.name = f"{config.model}-{config.size}-{config.recipe}-{config.dataset}-{config.seed}"
        config.name += f"-hold-out-{config.hold_out}" if config.hold_out else ""
    try:
        with torch.device("meta"):  # without memory or time: only to see whether the sizes fit together
            build_model(config.model, **model_options(config, num_classes=10))
    except ValueError as error:
        raise InputError(f"{error} (--help lists the flags)") from None
    return config
