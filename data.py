"""Images that live on the device, and the augmentation that turns a batch of them into training data.

A whole data set of small images fits on any device as uint8, so there are no worker processes and no copies: a batch is
indexed, then augmented by tensor operations in which every image draws its own crop, flip, colours and erased box.
From top to bottom: Dataset and where it comes from, train_batches (start reading there), and the augmentations.

Targets are always soft: a row of K probabilities for each image, from one-hot, then label smoothing, then Mixup or
CutMix. So there is one cross-entropy, and the mean entropy of the rows is a floor that it cannot go below.

    dataset = load_dataset("cifar10", "data").to("cuda")
    for images, targets in train_batches(dataset, epoch=0, batch_size=500, seed=0, label_smoothing=0.1): ...

Letters in the comments: B images in the batch, N images in the data set, C channels, S side of an image, K classes.
"""

import errno
import glob
import math
import os
import socket
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.datasets.folder import is_image_file
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2.functional import pil_to_tensor

DATASETS = ("auto", "cifar10", "cifar100", "folder", "shapes")
IMAGE_SIZE = 32  # the side that a folder's images are scaled to, and that shapes are drawn at


class InputError(Exception):
    """A mistake that the person at the keyboard can fix. The message is one sentence and says how."""


# ---------------------------------------------------------------------------------------------------------------------
# Data sets

@dataclass
class Dataset:
    """Training and test images with their labels.

    images uint8 (N, C, S, S), 0 to 255; labels int64 (N,), 0 to K - 1; mean and std float32 (1, C, 1, 1), of the
    training images' channels on a scale of 0 to 1. `test_split` says what the test images are: "test" or "hold-out".
    """

    name: str
    classes: list
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: torch.Tensor = None
    std: torch.Tensor = None
    test_split: str = "test"

    def __post_init__(self):
        if self.mean is None:
            # In float64 from a histogram of the 256 values: exact, and without a float copy of all images.
            values = torch.arange(256, dtype=torch.float64) / 255
            channels = self.train_images.transpose(0, 1).flatten(1)  # (C, N*S*S)
            count = torch.stack([torch.bincount(c, minlength=256) for c in channels]).double()  # (C, 256)
            mean = count @ values / channels.shape[1]  # (C,)
            var = count @ values**2 / channels.shape[1] - mean**2
            self.mean = mean.float().view(1, -1, 1, 1)
            self.std = var.clamp(min=1e-6).sqrt().float().view(1, -1, 1, 1)

    def normalise(self, images):
        """images uint8 (B, C, S, S) -> float32, each channel of the training images with mean 0 and variance 1."""
        return (images.float() / 255 - self.mean) / self.std

    def to(self, device):
        """The same data set with all its tensors on `device`."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


def load_dataset(name="auto", data_dir=None, hold_out=0, seed=0):
    """The data set of that name (one of DATASETS), as a Dataset on the CPU.

    data_dir  where it lies or is downloaded to; default $DATA_DIR, else ./data. Not needed for shapes.
    hold_out  split that many training images off, equally many of each class, chosen by `seed`; they become the
              test set, and the real one is not touched. For tuning.
    "auto" is CIFAR-10, or shapes if that is neither on the disk nor downloadable.
    InputError says in one sentence what is missing, broken or impossible, and what to do.
    """
    given = data_dir or os.environ.get("DATA_DIR")
    data_dir = given or "data"
    if name not in DATASETS:
        raise InputError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if name != "shapes" and (given or name == "folder") and not os.path.isdir(data_dir):
        raise InputError(f"the data folder {data_dir} does not exist: make it, or name another with --data-dir")
    if name == "auto" and given and not os.path.isdir(os.path.join(data_dir, torchvision.datasets.CIFAR10.base_folder)):
        if any(map(is_image_file, glob.glob(os.path.join(glob.escape(data_dir), "*", "*")))):
            raise InputError(f"{data_dir} has folders of images and no CIFAR-10: add --dataset folder to train on "
                             "them, or --dataset cifar10 to download it there")
    if name == "shapes":
        dataset = load_shapes()
    elif name == "folder":
        dataset = load_folder(data_dir)
    else:
        try:
            dataset = load_cifar("cifar10" if name == "auto" else name, data_dir)
        except ConnectionError as error:
            if name != "auto":
                raise InputError(str(error)) from None
            dataset = load_shapes()
    return split_hold_out(dataset, hold_out, seed) if hold_out else dataset


def load_cifar(name, data_dir):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), downloaded if need be, every file checked against its official MD5 sum.

    ConnectionError if it is not in data_dir and cannot be downloaded; InputError if it is there, but not whole.
    """
    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder = os.path.join(data_dir, source.base_folder)
    if not os.path.isdir(folder):
        if os.path.isfile(os.path.join(data_dir, source.test_list[0][0])):
            raise InputError(f"the files of {name} lie in {data_dir} itself: name the folder around it with --data-dir")
        print(f"{folder} not found, downloading {name}", flush=True)
        try:
            socket.setdefaulttimeout(30)  # a network that swallows packets must not hang the run
            source(data_dir, download=True)
        except (OSError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC):
                raise InputError(f"cannot write to {data_dir} ({error.strerror}): name another folder with "
                                 "--data-dir") from None
            reason = str(error).partition("\n")[0]
            raise ConnectionError(f"{name} is not in {folder} and cannot be downloaded ({reason}): name the folder "
                                  f"that holds {source.base_folder} with --data-dir or $DATA_DIR, or take --dataset "
                                  "shapes, which needs no download") from None
        finally:
            socket.setdefaulttimeout(None)
    for file, md5 in [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]:
        path = os.path.join(folder, file)
        readable = os.path.isfile(path) and os.access(path, os.R_OK)
        if not readable or not check_integrity(path, md5):
            raise InputError(f"{path} is {'altered or truncated' if readable else 'missing or unreadable'}: delete the "
                             f"folder {folder}, and the next run downloads it again")
    train, test = source(data_dir, train=True), source(data_dir, train=False)
    as_images = lambda array: torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()  # (N, C, S, S)
    return Dataset(name, train.classes, as_images(train.data), torch.tensor(train.targets),
                   as_images(test.data), torch.tensor(test.targets))


def read_image(path):
    """A picture file as uint8 (3, S, S), S = 32: RGB, scaled and cropped, on white. InputError if it cannot be read."""
    try:
        with Image.open(path) as image:
            kind = image.format
            image = ImageOps.exif_transpose(image)  # cameras store which side is up in EXIF
            # 16 bits of grey, which some formats store as 32: convert would turn all above 255 into white.
            if image.mode.startswith("I;16") or image.mode == "I" and kind in ("PNG", "PPM"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError("its numbers have no fixed range: save it with 8 or 16 bits")
            if image.has_transparency_data:  # on white: what lies under it is anything, often black
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
            return pil_to_tensor(image)
    except FileNotFoundError:
        raise InputError(f"there is no image {path}: name another, or leave it out") from None
    except Exception as error:  # PIL raises almost anything, by format and damage
        raise InputError(f"cannot read the image {path} ({error}): repair or delete it, or leave it out") from None


def load_folder(data_dir):
    """Images of one's own: data_dir/train/CLASS/FILE and data_dir/test/CLASS/FILE, scaled and cropped to 32 x 32 RGB.

    The test folder may be called val or valid as well. Without those two folders, data_dir/CLASS/FILE; then every fifth
    image of a class is a test image.
    InputError for a folder without images or with deeper ones, with a single class, or with a broken image (which is
    named).
    """
    def read(folder):
        try:
            files = torchvision.datasets.ImageFolder(folder)
        except (FileNotFoundError, PermissionError) as error:
            reason = str(error).split(". ")[0]
            raise InputError(f"cannot use the image folder {folder} ({reason}): it needs one folder of images for each "
                             "class; --data-dir names another") from None
        for path, _ in files.samples:
            if os.path.relpath(path, folder).count(os.sep) > 1:  # else parts would be taken for classes
                raise InputError(f"{path} lies deeper than {folder}/CLASS/FILE: name the folders of the two parts "
                                 "train and test, or move the images up")
        images = torch.stack([read_image(path) for path, _ in files.samples])  # (N, C, S, S)
        return images, torch.tensor(files.targets), files.classes

    parts = [os.path.join(data_dir, part) for part in ("train", "test", "val", "valid")]
    split = [part for part in parts if os.path.isdir(part)][:2]
    if len(split) == 2 and split[0] == parts[0]:
        (images, labels, classes), (test_images, test_labels, test_classes) = map(read, split)
        if classes != test_classes:
            raise InputError(f"{split[0]} and {split[1]} have different classes: give both the same folders")
    else:
        images, labels, classes = read(data_dir)
        # Each image's place among those of its class: the labels are sorted.
        rank = torch.arange(len(labels)) - torch.searchsorted(labels, labels)
        test = rank % 5 == 4
        images, labels, test_images, test_labels = images[~test], labels[~test], images[test], labels[test]
    if len(classes) < 2:
        raise InputError(f"{data_dir} has only one class, {classes[0]}: it needs one folder of images for each class")
    if len(test_labels) == 0:
        raise InputError(f"{data_dir} has too few images for a test set: give a class at least five")
    return Dataset("folder", classes, images, labels, test_images, test_labels)


SHAPES = ("bar", "bowtie", "crescent", "disc", "frame", "plus", "ring", "square", "star", "triangle")


def load_shapes(num_train=4000, num_test=1000, seed=0):
    """Ten classes of drawn figures, made on the spot: any place, size, turn and colour, over textured, noisy grounds.

    The same images for the same seed. No download: for tests and first tries. A linear classifier stays under 50 %.
    """
    N, S = num_train + num_test, IMAGE_SIZE
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: torch.rand(shape, generator=g) * (high - low) + low
    labels = torch.arange(N) % len(SHAPES)
    labels = labels[torch.randperm(N, generator=g)]
    # The pixel grid in the figure's own frame: moved, turned, and scaled so that the figure fills about [-1, 1].
    radius = uniform(8, 14, N, 1, 1)  # (N, 1, 1), pixels
    center = uniform(0, 1, 2, N, 1, 1) * (S - 2 * radius) + radius  # (2, N, 1, 1)
    angle = uniform(0, 2 * math.pi, N, 1, 1)
    pixel = torch.arange(S) + 0.5
    y, x = (pixel[:, None] - center[0]) / radius, (pixel[None, :] - center[1]) / radius  # (N, S, 1), (N, 1, S)
    u, v = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x  # (N, S, S)
    # How far each pixel lies outside of the figure, negative inside; one pixel of transition is the anti-aliasing.
    distance = torch.empty(N, S, S)
    for k, shape in enumerate(SHAPES):
        distance[labels == k] = outside(shape, u[labels == k], v[labels == k])
    cover = (0.5 - distance * radius).clamp(0, 1)[:, None]  # (N, 1, S, S)
    # Two colours that differ in every channel by at least 0.35, each with a texture of soft blots, and noise over all.
    ground = uniform(0, 1, N, 3, 1, 1)  # (N, 3, 1, 1)
    figure = (ground + uniform(0.35, 0.65, N, 3, 1, 1)) % 1
    blots = lambda: 0.2 * F.interpolate(uniform(-1, 1, N, 3, 6, 6), size=(S, S), mode="bilinear")  # (N, 3, S, S)
    images = torch.lerp(ground + blots(), figure + blots(), cover) + 0.05 * torch.randn(N, 3, S, S, generator=g)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Dataset("shapes", list(SHAPES), images[:num_train], labels[:num_train],
                   images[num_train:], labels[num_train:])


def outside(shape, u, v):
    """Roughly how far the points (u, v) lie outside the figure of that name, which fills about [-1, 1]; inside < 0."""
    r, a, b = torch.hypot(u, v), u.abs(), v.abs()
    box = torch.maximum(a, b)
    if shape == "bar":
        return torch.maximum(a - 1, b - 0.25)
    if shape == "bowtie":
        return torch.maximum(a - 0.9, b - a)
    if shape == "crescent":
        return torch.maximum(r - 0.95, 0.8 - torch.hypot(u - 0.45, v))
    if shape == "disc":
        return r - 0.85
    if shape == "frame":
        return (box - 0.65).abs() - 0.17
    if shape == "plus":
        return torch.minimum(torch.maximum(a - 0.95, b - 0.28), torch.maximum(a - 0.28, b - 0.95))
    if shape == "ring":
        return (r - 0.75).abs() - 0.17
    if shape == "square":
        return box - 0.75
    if shape == "star":  # the outline swings between two radii five times
        tip = (torch.atan2(v, u) / (2 * math.pi) * 5 % 1 - 0.5).abs() * 2  # 0 between two tips, 1 at a tip
        return r - (0.4 + 0.6 * tip)
    if shape == "triangle":
        edges = [u * math.cos(t) + v * math.sin(t) for t in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
        return torch.stack(edges).amax(0) - 0.5


def split_hold_out(dataset, hold_out, seed):
    """Put `hold_out` training images, equally many of each class and chosen by `seed`, in the place of the test set."""
    K = len(dataset.classes)
    per_class = hold_out // K
    counts = torch.bincount(dataset.train_labels, minlength=K)
    if hold_out < 0 or hold_out % K or per_class >= int(counts.min()):
        raise InputError(f"cannot hold out {hold_out} images: give a positive multiple of the {K} classes, below {K} "
                         f"times the {int(counts.min())} images of the smallest class")
    g = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(dataset.train_labels), dtype=torch.bool)
    for k in range(K):
        members = (dataset.train_labels == k).nonzero().squeeze(1)
        held[members[torch.randperm(len(members), generator=g)[:per_class]]] = True
    return replace(dataset, train_images=dataset.train_images[~held], train_labels=dataset.train_labels[~held],
                   test_images=dataset.train_images[held], test_labels=dataset.train_labels[held],
                   mean=None, std=None, test_split="hold-out")


# ---------------------------------------------------------------------------------------------------------------------
# Batches

def train_batches(dataset, epoch, batch_size, seed, first_step=0, crop=4, trivial=0.0, jitter=0.0, erasing=0.0,
                  label_smoothing=0.0, mixup=0.0, cutmix=0.0, together=None):
    """The batches of one epoch, shuffled and augmented: images float32 (B, C, S, S), normalised; targets (B, K).

    Every image is shifted by up to `crop` pixels, and half are flipped; the keywords turn the rest on, see below.
    The epoch's last, smaller batch is dropped, because another shape would be compiled anew.
    `together` batches are augmented at once: on a GPU by default as many as hold 4,096 images, because launching the
    two hundred small operations of the full recipe takes the host longer than computing them takes the GPU; on a CPU 1.
    Before each such group, and again before each of its batches is mixed, the global random state is set from (seed,
    epoch, step). So a run that is resumed, on the same kind of device, can start at `first_step` and get the same
    batches, without a saved random state.
    """
    device, N, B = dataset.train_images.device, len(dataset.train_labels), batch_size
    if together is None:
        together = 1 if device.type == "cpu" else max(1, 4096 // B)
    set_seed = lambda *key: torch.manual_seed(int(np.random.default_rng(key).integers(2**63)))
    order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(N)).to(device)
    steps = N // B
    for start in range(first_step - first_step % together, steps, together):
        set_seed(seed, epoch, start + 1)  # + 1: numpy pads with zeros, so (seed, epoch, 0) would be the order's seed
        index = order[start * B : min(start + together, steps) * B]  # (together*B,)
        images = crop_and_flip(dataset.train_images[index], crop)  # (together*B, C, S, S) uint8
        images = images.float() / 255
        if trivial:
            images = trivial_augment(images, trivial)
        if jitter:
            images = color_jitter(images, jitter)
        images = (images - dataset.mean) / dataset.std
        if erasing:
            images = random_erasing(images, erasing)
        targets = soft_targets(dataset.train_labels[index], len(dataset.classes), label_smoothing)
        for step, (x, y) in enumerate(zip(images.split(B), targets.split(B)), start):  # (B, C, S, S), (B, K)
            if step < first_step:  # a resumed run has had it
                continue
            set_seed(seed, epoch, step + 1, 1)
            # One of the two for the whole batch; with both on, a coin decides.
            if mixup and (not cutmix or torch.rand(()) < 0.5):
                x, y = mix_up(x, y, mixup)
            elif cutmix:
                x, y = cut_mix(x, y, cutmix)
            # Convolutions are faster with the channels last; and another layout would be compiled anew.
            yield x.contiguous(memory_format=torch.channels_last), y


def test_batches(dataset, batch_size):
    """All test images in order: images float32 (batch_size, C, S, S), normalised, and labels (n,), n <= batch_size.

    The last batch is filled up with black images to the same shape: for another one, cuDNN would choose its kernels
    anew.
    """
    for images, labels in zip(dataset.test_images.split(batch_size), dataset.test_labels.split(batch_size)):
        images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, batch_size - len(images)))  # (batch_size, C, S, S)
        yield dataset.normalise(images).contiguous(memory_format=torch.channels_last), labels


def soft_targets(labels, num_classes, label_smoothing=0.0):
    """labels int64 (B,) -> rows of probabilities (B, K) float32: 1 - s + s/K for the label, s/K for each other class.

    Label smoothing: Szegedy et al. 2016, 1512.00567.
    """
    return F.one_hot(labels, num_classes) * (1 - label_smoothing) + label_smoothing / num_classes  # (B, K)


def entropy(targets):
    """Mean entropy of the rows of targets (B, K), in nats: the lowest value that a cross-entropy with them can take."""
    return -torch.xlogy(targets, targets).sum(dim=1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation. Each image draws for itself, except in Mixup and CutMix, where the batch draws once.

def per_image(images, low, high):
    """A uniform draw for each image, broadcast over its pixels: (B, 1, 1, 1)."""
    return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)


def crop_and_flip(images, padding=4):
    """Shift every image by up to `padding` pixels each way and mirror half of them. images (B, C, S, S), any dtype.

    The same as padding by reflection, cropping and flipping, in a single gather: the padding is never built.
    """
    B, _, S, _ = images.shape
    device = images.device
    shift = torch.randint(-padding, padding + 1, (2, B, 1), device=device)  # (2, B, 1)
    flip = torch.rand(B, 1, device=device) < 0.5
    pixel = torch.arange(S, device=device)
    rows = pixel + shift[0]  # (B, S)
    cols = torch.where(flip, S - 1 - pixel, pixel) + shift[1]  # (B, S)
    reflect = lambda i: S - 1 - (S - 1 - i.abs()).abs()  # -1 -> 1, S -> S - 2
    rows, cols = reflect(rows)[:, :, None], reflect(cols)[:, None, :]  # (B, S, 1), (B, 1, S)
    images = images[torch.arange(B, device=device)[:, None, None], :, rows, cols]  # (B, S, S, C)
    return images.permute(0, 3, 1, 2)  # (B, C, S, S)


def luma(images):
    """The brightness of RGB images (B, 3, S, S) as the eye weighs it, (B, 1, S, S)."""
    red, green, blue = images.split(1, dim=1)  # (B, 1, S, S)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def color_jitter(images, strength):
    """Brightness, contrast and saturation, in this order, each times a factor drawn from 1 - strength to 1 + strength.

    images float (B, 3, S, S), 0 to 1 -> the same. Each is a step away from, or towards, a plainer image: black, the
    mean grey, the grey image.
    """
    plainer = (lambda x: 0.0, lambda x: luma(x).mean(dim=(2, 3), keepdim=True), luma)
    for plain in plainer:
        factor = per_image(images, 1 - strength, 1 + strength)
        images = (factor * images + (1 - factor) * plain(images)).clamp(0, 1)
    return images


def random_erasing(images, probability, area=(0.02, 0.33), ratio=(0.3, 3.3)):
    """Blank a random box of an image with that probability (Zhong et al. 2020, 1708.04896).

    images float (B, C, S, S), normalised, so that 0 is the mean colour -> the same. The box takes a share of the image
    drawn from `area`, has height / width drawn from `ratio` (on a log scale), and lies wholly inside.
    """
    B, _, S, _ = images.shape
    size = per_image(images, *area) * S * S  # (B, 1, 1, 1)
    tall = per_image(images, math.log(ratio[0]), math.log(ratio[1])).exp()  # (B, 1, 1, 1)
    height, width = (size * tall).sqrt().round().clamp(1, S), (size / tall).sqrt().round().clamp(1, S)  # (B, 1, 1, 1)
    top = (per_image(images, 0, 1) * (S - height + 1)).floor()
    left = (per_image(images, 0, 1) * (S - width + 1)).floor()
    pixel = torch.arange(S, device=images.device)
    rows, cols = pixel.view(1, 1, S, 1), pixel.view(1, 1, 1, S)
    box = (rows >= top) & (rows < top + height) & (cols >= left) & (cols < left + width)  # (B, 1, S, S)
    return images.masked_fill(box & (per_image(images, 0, 1) < probability), 0)


def mix_up(images, targets, alpha):
    """Mixup: blend every image and its target with a partner's (Zhang et al. 2018, 1710.09412).

    images (B, C, S, S), targets (B, K) -> the same. The partner's share is drawn once from Beta(alpha, alpha); the
    partners are a random permutation, so any batch size will do.
    """
    # 1 - lambda, which has the same distribution. Drawn on the host: nothing waits for the device.
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    partner = torch.randperm(len(images), device=images.device)
    return torch.lerp(images, images[partner], share), torch.lerp(targets, targets[partner], share)


def cut_mix(images, targets, alpha):
    """CutMix: paste a box of a partner into every image (Yun et al. 2019, 1905.04899).

    images (B, C, S, S), targets (B, K) -> the same. The box is the same for the batch. Its centre may be anywhere, so
    the border can cut it: the targets are mixed by the share of pixels that really changed, not by the one drawn from
    Beta(alpha, alpha).
    """
    S = images.shape[-1]
    half = S / 2 * math.sqrt(1 - float(torch.distributions.Beta(alpha, alpha).sample()))  # the side: S sqrt(1 - lambda)
    row, col = torch.randint(S, (2,)).tolist()
    top, bottom = max(0, round(row - half)), min(S, round(row + half))
    left, right = max(0, round(col - half)), min(S, round(col + half))
    share = (bottom - top) * (right - left) / S**2  # 1 - lambda, of the box as it is cut
    partner = torch.randperm(len(images), device=images.device)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    return mixed, torch.lerp(targets, targets[partner], share)


TRIVIAL_OPS = ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "saturation",
               "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize")


def trivial_augment(images, probability):
    """TrivialAugment: with that probability, one operation of random kind and strength.

    Müller & Hutter 2021, 2103.10158.

    images float (B, 3, S, S), 0 to 1 -> the same. The operations and their ranges are the paper's ("wide"), except
    that strengths are not rounded to 31 levels, that an image is shifted by at most half its side, not by all of it,
    and sheared about its middle, not about a corner, so that more of it stays in sight. Moved pixels are interpolated.
    All operations are computed for the whole batch and each image takes its own: to gather the images that drew one,
    the host would have to wait for the device to count them.
    """
    B, C, S, _ = images.shape
    op = torch.randint(len(TRIVIAL_OPS), (B, 1, 1, 1), device=images.device)  # (B, 1, 1, 1)
    op = torch.where(per_image(images, 0, 1) < probability, op, 0)
    drew = lambda name: op == TRIVIAL_OPS.index(name)  # (B, 1, 1, 1)
    strength = per_image(images, 0, 1)
    signed = strength * torch.where(per_image(images, 0, 1) < 0.5, -1, 1)

    # One affine map for shear, shift and turn: where in the image the result's pixel (x, y) comes from,
    #     x' = cos(a) x + (shear_x - sin(a)) y + shift_x,    y' = (shear_y + sin(a)) x + cos(a) y + shift_y.
    # The image spans -1 to 1, so a shift of 1 is half its side. What an image did not draw is 0.
    amount = lambda name, largest: torch.where(drew(name), signed * largest, 0.0).view(B)
    angle = amount("rotate", math.radians(135))  # (B,), as are the next four
    shear_x, shear_y = amount("shear_x", 0.99), amount("shear_y", 0.99)
    shift_x, shift_y = amount("translate_x", 1.0), amount("translate_y", 1.0)
    x_row = torch.stack([angle.cos(), shear_x - angle.sin(), shift_x], dim=1)  # (B, 3)
    y_row = torch.stack([shear_y + angle.sin(), angle.cos(), shift_y], dim=1)  # (B, 3)
    grid = F.affine_grid(torch.stack([x_row, y_row], dim=1), images.shape, align_corners=False)  # (B, S, S, 2)
    out = F.grid_sample(images, grid, align_corners=False)  # identical where the map is the identity, but for rounding

    # Four operations move away from, or towards, a plainer image.
    grey = luma(images)  # (B, 1, S, S)
    smooth = images.clone()  # the border stays as it is; inside, a mean over 3 x 3 in which the middle counts 5 times
    smooth[:, :, 1:-1, 1:-1] = (9 * F.avg_pool2d(images, 3, stride=1) + 4 * images[:, :, 1:-1, 1:-1]) / 13
    plain = torch.where(drew("saturation"), grey, torch.where(drew("sharpness"), smooth, 0.0))
    plain = torch.where(drew("contrast"), grey.mean(dim=(2, 3), keepdim=True), plain)
    blend = drew("brightness") | drew("saturation") | drew("contrast") | drew("sharpness")
    out = torch.where(blend, (plain + (1 + 0.99 * signed) * (images - plain)).clamp(0, 1), out)

    step = 2 ** (6 * strength).round()  # keep the upper 8 to 2 bits
    out = torch.where(drew("posterize"), (images * 255 / step).floor() * step / 255, out)
    out = torch.where(drew("solarize") & (images > 1 - strength), 1 - images, out)
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    varied = high > low  # a channel of one value has nothing to stretch
    out = torch.where(drew("autocontrast") & varied, (images - low) / (high - low).clamp(min=1 / 255), out)

    # Equalize: a pixel's new value is the share of darker pixels in its channel, of those below the brightest level.
    level = (images * 255).round().long().flatten(2)  # (B, C, S*S)
    one = torch.ones_like(images).flatten(2)  # (B, C, S*S)
    count = torch.zeros(B, C, 256, device=images.device).scatter_add(2, level, one)  # (B, C, 256)
    darker = (count.cumsum(dim=2) - count).gather(2, level)  # (B, C, S*S)
    brightest = count.gather(2, level.amax(dim=2, keepdim=True))  # (B, C, 1)
    share = (darker / (S**2 - brightest).clamp(min=1)).view_as(images)  # (B, C, S, S)
    return torch.where(drew("equalize") & varied, share, out)
