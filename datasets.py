"""Where the images come from: CIFAR-10 and CIFAR-100, folders of one's own pictures, and shapes drawn on the spot.

Each is a Dataset: all its images in one uint8 tensor, which fits on any device. data.py makes batches of it.

    dataset = load_dataset("cifar10", "data").to("cuda")

Letters in the comments: N images in the data set, C channels, S side of an image, K classes, B images in a batch.
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
