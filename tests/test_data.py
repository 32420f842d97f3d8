"""Batches and augmentation, against plain loops that replay the same random draws.

The loops draw in the order in which data.py does: to change that order is to change every run, and fails here.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tv

import data
import datasets

BILINEAR = tv.InterpolationMode.BILINEAR

byte = lambda images: (images * 255).round().to(torch.uint8)
uniform = lambda n, low=0.0, high=1.0: torch.empty(n).uniform_(low, high).tolist()


def replay(function, *args, seed=0):
    """The function's result, with the random state set back, so that the test can draw what the function drew."""
    torch.manual_seed(seed)
    out = function(*args)
    torch.manual_seed(seed)
    return out


def noise(*shape, seed=0):
    """Random images, 0 to 1, on the 256 levels of a byte; the global random state is left alone."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)) / 255


def near(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0, check_dtype=False)


def test_crop_and_flip():
    """Each image: reflection padding, its own crop, its own flip. All 9 x 9 shifts happen, mirrored and not."""
    images = byte(noise(2501, 3, 16, 16))
    out = replay(data.crop_and_flip, images)
    shift, flip = torch.randint(-4, 5, (2, 2501)), torch.rand(2501) < 0.5
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect").byte()
    for i, (y, x) in enumerate(shift.T):
        crop = padded[i, :, 4 + y : 20 + y, 4 + x : 20 + x]
        assert torch.equal(out[i], crop.flip(2) if flip[i] else crop)  # uint8, as it was
    assert len(data.crop_and_flip(images[:1].expand(2501, -1, -1, -1)).unique(dim=0)) == 9 * 9 * 2


def test_color_jitter():
    """Brightness, contrast, saturation as torchvision's, with each image's own three factors; 0 to 1 is kept."""
    images = noise(9, 3, 16, 16)
    out = replay(data.color_jitter, images, 0.4)
    factors = [uniform(9, 0.6, 1.4) for _ in range(3)]
    for i, image in enumerate(images):
        for adjust, factor in zip((tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation), factors):
            image = adjust(image, factor[i])
        near(out[i], image, 5e-4)  # torchvision's luma weights are rounded
    assert 0 <= out.min() and out.max() <= 1


def test_random_erasing():
    """With its probability an image loses one box, drawn as said and rounded to pixels; nothing else is touched."""
    B, S, areas = 1501, 32, []
    images = noise(B, 3, S, S) + 1
    out = replay(data.random_erasing, images, 0.25)
    draws = uniform(B, 0.02, 0.33), uniform(B, math.log(0.3), math.log(3.3)), uniform(B), uniform(B), uniform(B)
    for i, (area, ratio, top, left, coin) in enumerate(zip(*draws)):
        height, width = (min(S, max(1, round(S * math.sqrt(area * math.exp(r))))) for r in (ratio, -ratio))
        y, x = int(top * (S - height + 1)), int(left * (S - width + 1))
        expected = images[i].clone()
        if coin < 0.25:
            expected[:, y : y + height, x : x + width] = 0
            areas.append(float((expected == 0).float().mean()))
        assert torch.equal(out[i], expected)
    assert abs(len(areas) - 0.25 * B) < 4 * math.sqrt(B * 0.25 * 0.75) and (out == 0).any(dim=0).all()
    assert 0.012 < min(areas) < 0.03 and 0.3 < max(areas) < 0.36  # a side is rounded by up to half a pixel


def test_soft_targets_and_entropy():
    """1 - s + s/K and s/K by hand; the entropy is a hand sum."""
    targets = data.soft_targets(torch.tensor([2, 0]), 4, 0.2)
    near(targets, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]))
    assert data.soft_targets(torch.tensor([1]), 3).tolist() == [[0, 1, 0]] and data.entropy(torch.eye(3)) == 0
    targets[1] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    near(data.entropy(targets), torch.tensor(-sum(t * math.log(t) for row in targets.tolist() for t in row) / 2))


@pytest.mark.parametrize("B", [1, 7, 8])
def test_mix_up(B):
    """Images and targets are blended by the same share with the same partner."""
    images, targets = noise(B, 3, 8, 8), data.soft_targets(torch.arange(B) % 5, 5, 0.1)
    mixed, mixed_targets = replay(data.mix_up, images, targets, 0.8)
    share, partner = torch.distributions.Beta(0.8, 0.8).sample().item(), torch.randperm(B).tolist()
    for i, j in enumerate(partner):
        for out, a in ((mixed, images.numpy()), (mixed_targets, targets.numpy())):
            np.testing.assert_allclose(out[i], (1 - share) * a[i] + share * a[j], atol=1e-6)


def test_cut_mix():
    """Pixels come from the partner inside of the box; the targets' share is counted from pixels, clipped box or not."""
    B, S, clipped = 7, 32, 0
    images, targets = torch.arange(1.0, B + 1).view(B, 1, 1, 1).expand(B, 3, S, S).numpy(), torch.eye(B)
    for seed in range(60):
        mixed, mixed_targets = replay(data.cut_mix, torch.tensor(images), targets, 1.0, seed=seed)
        half = S / 2 * math.sqrt(1 - torch.distributions.Beta(1.0, 1.0).sample().item())
        (row, col), partner = torch.randint(S, (2,)).tolist(), torch.randperm(B)
        rows, cols = ([round(c - half) <= i < round(c + half) for i in range(S)] for c in (row, col))
        np.testing.assert_array_equal(mixed, np.where(np.outer(rows, cols), images[partner], images))
        changed = (mixed != torch.tensor(images)).float().mean(dim=(1, 2, 3))[:, None]  # 0 where an image meets itself
        near(mixed_targets, (1 - changed) * targets + changed * targets[partner])
        clipped += min(row, col) < half or max(row, col) + half > S
    assert 10 < clipped < 60


# Each operation on one image x, at strength m from 0 to 1, or s with a sign; and how near it must come. torchvision's
# luma weights are rounded, and its equalize has whole steps: too coarse for 1024 pixels, so it gets each 64 times.
OPERATIONS = {
    "identity": (lambda x, m, s: x, 1e-5),
    "shear_x": (lambda x, m, s: tv.affine(x, 0, [0, 0], 1, [math.degrees(math.atan(0.99 * s)), 0], BILINEAR), 1e-4),
    "shear_y": (lambda x, m, s: tv.affine(x, 0, [0, 0], 1, [0, math.degrees(math.atan(0.99 * s))], BILINEAR), 1e-4),
    "translate_x": (lambda x, m, s: tv.affine(x, 0, [-16 * s, 0], 1, [0], BILINEAR), 1e-4),
    "translate_y": (lambda x, m, s: tv.affine(x, 0, [0, -16 * s], 1, [0], BILINEAR), 1e-4),
    "rotate": (lambda x, m, s: tv.rotate(x, 135 * s, BILINEAR), 1e-4),
    "brightness": (lambda x, m, s: tv.adjust_brightness(x, 1 + 0.99 * s), 1e-5),
    "saturation": (lambda x, m, s: tv.adjust_saturation(x, 1 + 0.99 * s), 5e-4),
    "contrast": (lambda x, m, s: tv.adjust_contrast(x, 1 + 0.99 * s), 5e-4),
    "sharpness": (lambda x, m, s: tv.adjust_sharpness(x, 1 + 0.99 * s), 1e-5),
    "posterize": (lambda x, m, s: tv.posterize(byte(x), 8 - round(6 * m)) / 255, 1e-5),
    "solarize": (lambda x, m, s: tv.solarize(x, 1 - m), 1e-5),
    "autocontrast": (lambda x, m, s: tv.autocontrast(x), 1e-5),
    "equalize": (lambda x, m, s: tv.equalize(byte(x).repeat(1, 8, 8))[:, :32, :32] / 255, 0.01),
}


def test_trivial_augment_operations():
    """Each image gets the operation it drew, as torchvision does it, at its own strength; one in four gets none."""
    B, before = 500, byte(noise(500, 3, 32, 32) * 0.7 + 0.1) / 255
    before[::2, :, :12] = before[::2, :, :1, :1]  # every other image has a large area of one colour
    after = replay(data.trivial_augment, before, 0.75)
    draws = torch.randint(14, (B,)).tolist(), uniform(B), uniform(B), uniform(B)
    for i, (op, coin, strength, sign) in enumerate(zip(*draws)):
        name = data.TRIVIAL_OPS[op] if coin < 0.75 else "identity"
        operation, tolerance = OPERATIONS[name]
        expected = operation(before[i], strength, -strength if sign < 0.5 else strength)
        assert (after[i] - expected).abs().max() <= tolerance, f"{name} at {strength}"
    assert min(draws[0].count(op) for op in range(14)) > 15


def test_trivial_augment_keeps_the_range():
    """Probability 0 changes nothing; any operation on any image, constant ones too, stays finite and in 0 to 1."""
    near(data.trivial_augment(noise(50, 3, 32, 32), 0.0), noise(50, 3, 32, 32), 1e-5)
    levels = torch.linspace(0, 1, 256).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    for images in (noise(200, 3, 32, 32), levels, torch.zeros(200, 3, 16, 16), torch.ones(200, 3, 16, 16)):
        out = replay(data.trivial_augment, images, 1.0)
        assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1 + 1e-5  # rounding when resampled


@pytest.mark.parametrize("together", [1, 3])
def test_train_batches_depend_on_seed_epoch_step_only(together):
    """Any random state before, and any first step, lead to the same bits with everything on; seeds, epochs differ."""
    small = datasets.load_shapes(num_train=70, num_test=10)
    run = lambda epoch=2, seed=5, first_step=0: list(data.train_batches(
        small, epoch, 16, seed, first_step, trivial=0.7, jitter=0.3, erasing=0.5, label_smoothing=0.1,
        mixup=0.8, cutmix=1.0, together=together))
    whole = run()
    for step in (0, 1, 3, 4):
        torch.manual_seed(step)
        rest = run(first_step=step)
        assert len(rest) == 4 - step and all(map(torch.equal, sum(whole[step:], ()), sum(rest, ())))
    assert not any(torch.equal(a[0], b[0]) for a in whole for b in run(epoch=3) + run(seed=6))
    assert all(x.shape == (16, 3, 32, 32) and x.dtype == targets.dtype == torch.float32 for x, targets in whole)
    near(torch.cat([targets for _, targets in whole]).sum(1), torch.ones(64))
    for images, _ in whole + list(data.train_batches(small, 0, 16, 0)) + list(data.test_batches(small, 16)):
        assert images.is_contiguous(memory_format=torch.channels_last)  # always: another layout is compiled anew
    runs = (data.train_batches(small, epoch, 16, seed, together=together) for epoch, seed in ((0, 0), (0, 1), (1, 0)))
    assert len({float(torch.rand(())) for run in runs for _ in run}) == 12  # a random state of its own for each step


@pytest.mark.parametrize("option", ["crop", "trivial", "jitter", "erasing", "label_smoothing", "mixup", "cutmix"])
def test_train_batches_apply_each_option(shapes, option):
    with_it, without = (next(data.train_batches(shapes, 0, 16, seed=0, **{"crop": 0, **more}))
                        for more in ({option: 1}, {}))
    assert not all(map(torch.equal, with_it, without))


def test_train_batches_change_colours_before_normalising_and_erase_after_it(shapes):
    """So colours are clipped to what a picture can have, and a box is blanked to the mean colour."""
    x, _ = next(data.train_batches(shapes, 0, 64, 0, trivial=1.0, jitter=0.4, erasing=1.0))
    pixels = x * shapes.std + shapes.mean
    assert (x == 0).all(dim=1).flatten(1).any(dim=1).all()
    assert x.min() < -0.5 and -1e-4 < pixels.min() and pixels.max() < 1 + 1e-4


def test_train_batches_toss_a_coin_between_mixup_and_cutmix():
    """Mixup leaves an image of one colour so, CutMix does not. 120 batches."""
    levels = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    greys = datasets.Dataset("greys", list("abcdefghij"), levels, torch.arange(200) % 10, None, None)
    plain = [bool((x == x[:, :, :1, :1]).all()) for epoch in range(30)
             for x, _ in data.train_batches(greys, epoch, 50, 0, crop=0, mixup=1.0, cutmix=1.0)]
    assert 0.35 < sum(plain) / len(plain) < 0.65


@pytest.mark.parametrize("together", [1, 3])
def test_train_batches_take_each_image_once(together):
    """An epoch is a permutation less its last small batch, another one each epoch; labels go with their images."""
    levels = torch.arange(230, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)  # a grey of its own for each
    dataset, orders = datasets.Dataset("greys", list("abcdefghij"), levels, torch.arange(230) % 10, None, None), []
    for epoch in range(2):
        batches = list(data.train_batches(dataset, epoch, 50, seed=0, together=together))
        order = (torch.cat([images for images, _ in batches]) * dataset.std + dataset.mean)[:, 0, 9, 9] * 255
        orders.append(order.round().long())
        assert len(batches) == 4 and len(orders[epoch].unique()) == 200
        assert torch.equal(torch.cat([targets for _, targets in batches]).argmax(1), orders[epoch] % 10)
    assert (orders[0] == orders[1]).sum() < 20 and (orders[0].diff() < 0).sum() > 50


def test_test_batches(shapes):
    """All test images in order, normalised and otherwise unchanged; each label once; black fills the last batch up."""
    batches = list(data.test_batches(shapes, 300))
    assert [len(images) for images, _ in batches] == [300] * 4
    assert torch.equal(torch.cat([labels for _, labels in batches]), shapes.test_labels)
    pixels = torch.cat([images for images, _ in batches]) * shapes.std + shapes.mean
    near(pixels, F.pad(shapes.test_images / 255, (0, 0, 0, 0, 0, 0, 0, 200)))
