"""Data sets, batches and augmentation, against plain loops that replay the same random draws.

The loops draw in the order in which data.py does: to change that order is to change every run, and fails here.
"""

import hashlib
import math
import os
import pickle
import urllib.request
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as tv
from PIL import Image

import data

BILINEAR = tv.InterpolationMode.BILINEAR
REAL_DATA = os.path.abspath(os.environ.get("DATA_DIR", os.devnull))
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")

byte = lambda images: (images * 255).round().to(torch.uint8)
uniform = lambda n, low=0.0, high=1.0: torch.empty(n).uniform_(low, high).tolist()


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test reaches the network, reads $DATA_DIR unasked, or writes to the folder that it was started in."""
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=urllib.error.URLError("no network in tests")))
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def shapes():
    return data.load_shapes()


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


def test_shapes(shapes):
    """Ten balanced classes; the same bits for the same seed only; too hard for ridge regression on the pixels."""
    assert shapes.train_images.shape[1:] == (3, 32, 32) and shapes.train_images.dtype == torch.uint8
    assert len(torch.bincount(torch.cat([shapes.train_labels, shapes.test_labels])).unique()) == 1
    assert len(shapes.classes) == 10 and torch.bincount(shapes.test_labels, minlength=10).min() > 70
    a, b, c = (data.load_shapes(110, 50, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.train_images, b.train_images) and torch.equal(a.test_labels, b.test_labels)
    assert not any(torch.equal(x, y) for x, y in zip(a.train_images, c.train_images))
    x, z = (images.flatten(1) / 255 - 0.5 for images in (shapes.train_images, shapes.test_images))
    weights = torch.linalg.solve(x.T @ x + 100 * torch.eye(3072), x.T @ (F.one_hot(shapes.train_labels, 10) - 0.1))
    assert ((z @ weights).argmax(1) == shapes.test_labels).float().mean() < 0.5


def test_hold_out(shapes, monkeypatch):
    """Equal shares of each class leave the training images and replace the test images, or the number is refused."""
    pairs = lambda images, labels: {(image.numpy().tobytes(), int(k)) for image, k in zip(images, labels)}
    monkeypatch.setattr(data, "load_shapes", lambda: shapes)
    a, b, c = (data.load_dataset("shapes", hold_out=1000, seed=seed) for seed in (3, 3, 4))
    held, kept = pairs(a.test_images, a.test_labels), pairs(a.train_images, a.train_labels)
    whole = pairs(shapes.train_images, shapes.train_labels)  # with their labels, and without the real test images
    assert len(whole) == len(shapes.train_labels) and not held & kept and held | kept == whole
    assert torch.bincount(a.test_labels).tolist() == [100] * 10 and a.test_split == "hold-out"
    assert torch.equal(a.test_images, b.test_images) and torch.equal(a.train_images, b.train_images)
    assert held != pairs(c.test_images, c.test_labels) and not held & pairs(shapes.test_images, shapes.test_labels)
    x = (a.train_images.double() / 255 - a.mean) / a.std  # of the remaining images: mean 0, standard deviation 1
    near(torch.stack(torch.std_mean(x, dim=(0, 2, 3))), torch.tensor([[1.0] * 3, [0.0] * 3]), 1e-5)
    small = data.Dataset("small", shapes.classes, shapes.train_images[:99], shapes.train_labels[:99], None, None)
    monkeypatch.setattr(data, "load_shapes", lambda: small)
    limit = 10 * int(torch.bincount(small.train_labels).min())  # that many would leave a class with no image
    assert len(data.load_dataset("shapes", hold_out=limit - 10).test_labels) == limit - 10
    for hold_out in (-10, -1, 7, limit, 5000):
        with pytest.raises(data.InputError, match=f"hold out {hold_out} images"):
            data.load_dataset("shapes", hold_out=hold_out)


def write_images(folder, count, height=32, width=32, channels=3):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        torchvision.io.write_png(byte(noise(channels, height, width, seed=i)), str(folder / f"{i}.png"))


def test_folder(tmp_path, monkeypatch):
    """Every fifth image of a class is a test image, or what lies in test. Any size, and grey, become 32 x 32 RGB."""
    write_images(tmp_path / "a", 5)
    write_images(tmp_path / "b", 11, height=50, width=70)
    write_images(tmp_path / "c", 4, height=90, width=40, channels=1)
    dataset = data.load_dataset("folder", str(tmp_path))
    assert dataset.train_images.shape == (17, 3, 32, 32) and dataset.test_labels.tolist() == [0, 1, 1]
    assert dataset.train_labels.tolist() == [0] * 4 + [1] * 9 + [2] * 4 and dataset.classes == ["a", "b", "c"]
    assert torch.equal(dataset.test_images[0], byte(noise(3, 32, 32, seed=4)))
    grey = dataset.train_images[-4:].float()
    assert torch.equal(grey, grey[:, :1].expand(-1, 3, -1, -1)) and grey.std() > 1
    for name in ("cat", "dog"):
        write_images(tmp_path / "both" / "train" / name, 3, height=33)
        write_images(tmp_path / "both" / "test" / name, 2)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "both"))
    dataset = data.load_dataset("folder")
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and dataset.test_labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(dataset.test_images[3], byte(noise(3, 32, 32, seed=1)))
    (tmp_path / "both" / "test").rename(tmp_path / "both" / "valid")
    assert torch.equal(data.load_dataset("folder").test_images, dataset.test_images)


def test_a_photo_that_lies_on_its_side_is_turned(tmp_path):
    upright = Image.new("RGB", (32, 32), "red")
    upright.paste("blue", (0, 0, 32, 16))  # the sky
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the file's left is the picture's top
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 5)
        upright.rotate(90).save(tmp_path / name / "0.png", exif=exif)
    near(data.load_dataset("folder", str(tmp_path)).train_images[0].float(),
         torch.from_numpy(np.array(upright)).permute(2, 0, 1).float(), 1)


def test_a_picture_of_16_bits_is_scaled_and_not_cut_off(tmp_path):
    """Of either byte order, in any format, and turned as its EXIF says. Of 32 bits, the range is unknown."""
    ramp = np.arange(32 * 32).reshape(32, 32) * 64  # from 0 to nearly 65,536
    exif = Image.Exif()
    exif[0x0112] = 6  # the file's left is the picture's top
    little, big = ramp.astype("<u2"), ramp.astype(">u2")
    Image.fromarray(little).save(tmp_path / "a.png")
    Image.fromarray(little).save(tmp_path / "a.tif")
    Image.frombytes("I;16B", (32, 32), big.tobytes()).save(tmp_path / "b.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 32 32 65535\n" + big.tobytes())
    Image.fromarray(little).save(tmp_path / "turned.png", exif=exif)
    expected = torch.from_numpy(ramp // 256).to(torch.uint8)  # (S, S)
    for name in ("a.png", "a.tif", "b.tif", "a.pgm"):
        assert torch.equal(data.read_image(tmp_path / name), expected.expand(3, -1, -1)), name
    assert torch.equal(data.read_image(tmp_path / "turned.png")[0], expected.rot90(-1))
    for name, dtype in (("f.tif", np.float32), ("i.tif", np.int32)):
        Image.fromarray(ramp.astype(dtype)).save(tmp_path / name)
        with pytest.raises(data.InputError, match=f"{name} .*8 or 16 bits"):
            data.read_image(tmp_path / name)


def test_a_transparent_picture_is_seen_on_white(tmp_path):
    picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))  # black, but not to be seen
    picture.paste((200, 0, 0, 255), (0, 0, 32, 16))
    picture.save(tmp_path / "rgba.png")
    picture.convert("LA").save(tmp_path / "la.png")
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.paste(1, (0, 0, 32, 16))
    palette.save(tmp_path / "p.gif", transparency=0)
    for name, red in (("rgba.png", [200, 0, 0]), ("la.png", [60, 60, 60]), ("p.gif", [200, 0, 0])):
        image = data.read_image(tmp_path / name)  # (3, 32, 32)
        assert image[:, 8, 8].tolist() == red and image[:, 24, 8].tolist() == [255, 255, 255], name


def test_folder_that_cannot_be_used(tmp_path):
    """No, too few or broken images, one class, differing classes, unknown parts: InputError with the name in it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "dog").mkdir(parents=True)
    for folder in ("hollow/cat", "one/cat", "broken/cat", "broken/dog", "differ/train/cat", "differ/test/dog",
                   "few/cat", "few/dog", "deep/train/cat", "deep/train/dog", "deep/validation/cat"):
        write_images(tmp_path / folder, 4)
    path = tmp_path / "broken" / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:600])
    for folder, words in (("empty", "class folder"), ("hollow", "dog"), ("one", "only one class, cat"),
                          ("few", "too few"), ("differ", "different classes"), ("deep", "deeper .* train and test"),
                          ("broken", "cannot read .*dog.3.png")):
        with pytest.raises(data.InputError, match=words) as caught:
            data.load_dataset("folder", str(tmp_path / folder))
        assert str(tmp_path / folder) in str(caught.value)


def test_cifar(tmp_path, monkeypatch):
    """Batches are joined in order, a row of 3072 bytes is an image; one bad file is refused by its name."""
    source, folder, g = torchvision.datasets.CIFAR10, tmp_path / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    # Six batches of 20 images, with the sums that torchvision then takes for the official ones.
    batches = [{"data": g.integers(256, size=(20, 3072), dtype=np.uint8), "labels": [*range(10)] * 2} for _ in range(6)]
    monkeypatch.setattr(source, "train_list", [write(f"data_batch_{i + 1}", batches[i]) for i in range(5)])
    monkeypatch.setattr(source, "test_list", [write("test_batch", batches[5])])
    meta, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(source, "meta", {"filename": meta, "key": "label_names", "md5": md5})
    dataset = data.load_dataset("auto", str(tmp_path))
    assert dataset.classes == list("abcdefghij") and dataset.train_labels.tolist() == [*range(10)] * 10
    assert dataset.train_images.shape == (100, 3, 32, 32) and dataset.test_images.shape == (20, 3, 32, 32)
    assert torch.equal(dataset.train_images[20:40].flatten(1), torch.from_numpy(batches[1]["data"]))
    for path in (folder / file for file in ("data_batch_3", "test_batch", "batches.meta")):
        whole = path.read_bytes()
        for content, words in ((whole[:-1] + b"!", "altered"), (whole[:-9], "truncated"), (None, "missing")):
            path.unlink() if content is None else path.write_bytes(content)
            for name in ("auto", "cifar10"):
                with pytest.raises(data.InputError, match=f"{path.name} is .*{words}"):
                    data.load_dataset(name, str(tmp_path))
        path.write_bytes(whole)
    for name in ("auto", "cifar10"):
        with pytest.raises(data.InputError, match="cifar-10-batches-py itself: name the folder around it"):
            data.load_dataset(name, str(folder))


def test_a_folder_of_images_is_not_taken_for_a_place_to_download_to(tmp_path, monkeypatch):
    def download(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.JPG").touch()
    with pytest.raises(data.InputError, match="folders of images and no CIFAR-10: add --dataset folder"):
        data.load_dataset("auto", str(tmp_path))
    with pytest.raises(data.InputError, match=r"cannot be downloaded \(no network\)"):  # who names it, means it
        data.load_dataset("cifar10", str(tmp_path))


def test_without_data(tmp_path, monkeypatch):
    """A data folder that does not exist is refused. Offline, cifar10 says what to do, and auto takes shapes."""
    monkeypatch.setattr(data, "load_shapes", lambda: "shapes instead")
    for name in ("auto", "cifar10", "folder"):
        with pytest.raises(data.InputError, match="nowhere does not exist.*--data-dir"):
            data.load_dataset(name, str(tmp_path / "nowhere"))
    for data_dir in (None, str(tmp_path)):
        with pytest.raises(data.InputError, match="cannot be downloaded.*--data-dir.*--dataset shapes"):
            data.load_dataset("cifar10", data_dir)
        assert data.load_dataset("auto", data_dir) == "shapes instead"


@pytest.mark.skipif(not os.path.isdir(os.path.join(REAL_DATA, "cifar-10-batches-py")),
                    reason="DATA_DIR names no folder with cifar-10-batches-py")
def test_real_cifar10():
    """The real CIFAR-10: 50,000 and 10,000 images, equal classes, the well-known channel means."""
    dataset = data.load_dataset("cifar10", REAL_DATA)
    assert dataset.train_images.shape == (50000, 3, 32, 32) and dataset.test_images.shape == (10000, 3, 32, 32)
    assert torch.bincount(dataset.train_labels).tolist() == [5000] * 10
    assert torch.bincount(dataset.test_labels).tolist() == [1000] * 10 and dataset.classes[6] == "frog"
    near(dataset.mean.flatten(), torch.tensor([0.4914, 0.4822, 0.4465]), 1e-3)


@pytest.mark.parametrize("together", [1, 3])
def test_train_batches_depend_on_seed_epoch_step_only(together):
    """Any random state before, and any first step, lead to the same bits with everything on; seeds, epochs differ."""
    small = data.load_shapes(num_train=70, num_test=10)
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
    greys = data.Dataset("greys", list("abcdefghij"), levels, torch.arange(200) % 10, None, None)
    plain = [bool((x == x[:, :, :1, :1]).all()) for epoch in range(30)
             for x, _ in data.train_batches(greys, epoch, 50, 0, crop=0, mixup=1.0, cutmix=1.0)]
    assert 0.35 < sum(plain) / len(plain) < 0.65


@pytest.mark.parametrize("together", [1, 3])
def test_train_batches_take_each_image_once(together):
    """An epoch is a permutation less its last small batch, another one each epoch; labels go with their images."""
    levels = torch.arange(230, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)  # a grey of its own for each
    dataset, orders = data.Dataset("greys", list("abcdefghij"), levels, torch.arange(230) % 10, None, None), []
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
