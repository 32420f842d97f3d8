"""From images to training data: batches that are indexed on the device and augmented by tensor operations.

A whole data set of small images fits on any device as uint8, so there are no worker processes and no copies; every
image draws its own crop, flip, colours and erased box. From top to bottom: train_batches, test_batches, the targets and
the augmentations. The data sets are in datasets.py.

Targets are always soft: a row of K probabilities for each image, from one-hot, then label smoothing, then Mixup or
CutMix. So there is one cross-entropy, and the mean entropy of the rows is a floor that it cannot go below.

    from datasets import load_dataset
    dataset = load_dataset("cifar10", "data").to("cuda")
    for images, targets in train_batches(dataset, epoch=0, batch_size=500, seed=0, label_smoothing=0.1): ...

Letters in the comments: B images in the batch, N images in the data set, C channels, S side of an image, K classes.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F


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
