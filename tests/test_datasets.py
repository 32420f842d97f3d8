"""datasets.py: CIFAR as its archive has it, folders of pictures, the shapes, images held out, and what goes wrong."""

import hashlib
import os
import pickle
import urllib.request
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import datasets
from test_data import byte, near, noise

REAL_DATA = os.path.abspath(os.environ.get("DATA_DIR", os.devnull))
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test reaches the network, reads $DATA_DIR unasked, or writes to the folder that it was started in."""
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=urllib.error.URLError("no network in tests")))
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)


def test_shapes(shapes):
    """Ten balanced classes; the same bits for the same seed only; too hard for ridge regression on the pixels."""
    assert shapes.train_images.shape[1:] == (3, 32, 32) and shapes.train_images.dtype == torch.uint8
    assert len(torch.bincount(torch.cat([shapes.train_labels, shapes.test_labels])).unique()) == 1
    assert len(shapes.classes) == 10 and torch.bincount(shapes.test_labels, minlength=10).min() > 70
    a, b, c = (datasets.load_shapes(110, 50, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.train_images, b.train_images) and torch.equal(a.test_labels, b.test_labels)
    assert not any(torch.equal(x, y) for x, y in zip(a.train_images, c.train_images))
    x, z = (images.flatten(1) / 255 - 0.5 for images in (shapes.train_images, shapes.test_images))
    weights = torch.linalg.solve(x.T @ x + 100 * torch.eye(3072), x.T @ (F.one_hot(shapes.train_labels, 10) - 0.1))
    assert ((z @ weights).argmax(1) == shapes.test_labels).float().mean() < 0.5


def test_hold_out(shapes, monkeypatch):
    """Equal shares of each class leave the training images and replace the test images, or the number is refused."""
    pairs = lambda images, labels: {(image.numpy().tobytes(), int(k)) for image, k in zip(images, labels)}
    monkeypatch.setattr(datasets, "load_shapes", lambda: shapes)
    a, b, c = (datasets.load_dataset("shapes", hold_out=1000, seed=seed) for seed in (3, 3, 4))
    held, kept = pairs(a.test_images, a.test_labels), pairs(a.train_images, a.train_labels)
    whole = pairs(shapes.train_images, shapes.train_labels)  # with their labels, and without the real test images
    assert len(whole) == len(shapes.train_labels) and not held & kept and held | kept == whole
    assert torch.bincount(a.test_labels).tolist() == [100] * 10 and a.test_split == "hold-out"
    assert torch.equal(a.test_images, b.test_images) and torch.equal(a.train_images, b.train_images)
    assert held != pairs(c.test_images, c.test_labels) and not held & pairs(shapes.test_images, shapes.test_labels)
    x = (a.train_images.double() / 255 - a.mean) / a.std  # of the remaining images: mean 0, standard deviation 1
    near(torch.stack(torch.std_mean(x, dim=(0, 2, 3))), torch.tensor([[1.0] * 3, [0.0] * 3]), 1e-5)
    small = datasets.Dataset("small", shapes.classes, shapes.train_images[:99], shapes.train_labels[:99], None, None)
    monkeypatch.setattr(datasets, "load_shapes", lambda: small)
    limit = 10 * int(torch.bincount(small.train_labels).min())  # that many would leave a class with no image
    assert len(datasets.load_dataset("shapes", hold_out=limit - 10).test_labels) == limit - 10
    for hold_out in (-10, -1, 7, limit, 5000):
        with pytest.raises(datasets.InputError, match=f"hold out {hold_out} images"):
            datasets.load_dataset("shapes", hold_out=hold_out)


def write_images(folder, count, height=32, width=32, channels=3):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        torchvision.io.write_png(byte(noise(channels, height, width, seed=i)), str(folder / f"{i}.png"))


def test_folder(tmp_path, monkeypatch):
    """Every fifth image of a class is a test image, or what lies in test. Any size, and grey, become 32 x 32 RGB."""
    write_images(tmp_path / "a", 5)
    write_images(tmp_path / "b", 11, height=50, width=70)
    write_images(tmp_path / "c", 4, height=90, width=40, channels=1)
    dataset = datasets.load_dataset("folder", str(tmp_path))
    assert dataset.train_images.shape == (17, 3, 32, 32) and dataset.test_labels.tolist() == [0, 1, 1]
    assert dataset.train_labels.tolist() == [0] * 4 + [1] * 9 + [2] * 4 and dataset.classes == ["a", "b", "c"]
    assert torch.equal(dataset.test_images[0], byte(noise(3, 32, 32, seed=4)))
    grey = dataset.train_images[-4:].float()
    assert torch.equal(grey, grey[:, :1].expand(-1, 3, -1, -1)) and grey.std() > 1
    for name in ("cat", "dog"):
        write_images(tmp_path / "both" / "train" / name, 3, height=33)
        write_images(tmp_path / "both" / "test" / name, 2)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "both"))
    dataset = datasets.load_dataset("folder")
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and dataset.test_labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(dataset.test_images[3], byte(noise(3, 32, 32, seed=1)))
    (tmp_path / "both" / "test").rename(tmp_path / "both" / "valid")
    assert torch.equal(datasets.load_dataset("folder").test_images, dataset.test_images)


def test_a_photo_that_lies_on_its_side_is_turned(tmp_path):
    upright = Image.new("RGB", (32, 32), "red")
    upright.paste("blue", (0, 0, 32, 16))  # the sky
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the file's left is the picture's top
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 5)
        upright.rotate(90).save(tmp_path / name / "0.png", exif=exif)
    near(datasets.load_dataset("folder", str(tmp_path)).train_images[0].float(),
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
        assert torch.equal(datasets.read_image(tmp_path / name), expected.expand(3, -1, -1)), name
    assert torch.equal(datasets.read_image(tmp_path / "turned.png")[0], expected.rot90(-1))
    for name, dtype in (("f.tif", np.float32), ("i.tif", np.int32)):
        Image.fromarray(ramp.astype(dtype)).save(tmp_path / name)
        with pytest.raises(datasets.InputError, match=f"{name} .*8 or 16 bits"):
            datasets.read_image(tmp_path / name)


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
        image = datasets.read_image(tmp_path / name)  # (3, 32, 32)
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
        with pytest.raises(datasets.InputError, match=words) as caught:
            datasets.load_dataset("folder", str(tmp_path / folder))
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
    dataset = datasets.load_dataset("auto", str(tmp_path))
    assert dataset.classes == list("abcdefghij") and dataset.train_labels.tolist() == [*range(10)] * 10
    assert dataset.train_images.shape == (100, 3, 32, 32) and dataset.test_images.shape == (20, 3, 32, 32)
    assert torch.equal(dataset.train_images[20:40].flatten(1), torch.from_numpy(batches[1]["data"]))
    for path in (folder / file for file in ("data_batch_3", "test_batch", "batches.meta")):
        whole = path.read_bytes()
        for content, words in ((whole[:-1] + b"!", "altered"), (whole[:-9], "truncated"), (None, "missing")):
            path.unlink() if content is None else path.write_bytes(content)
            for name in ("auto", "cifar10"):
                with pytest.raises(datasets.InputError, match=f"{path.name} is .*{words}"):
                    datasets.load_dataset(name, str(tmp_path))
        path.write_bytes(whole)
    for name in ("auto", "cifar10"):
        with pytest.raises(datasets.InputError, match="cifar-10-batches-py itself: name the folder around it"):
            datasets.load_dataset(name, str(folder))


def test_a_folder_of_images_is_not_taken_for_a_place_to_download_to(tmp_path, monkeypatch):
    def download(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.JPG").touch()
    with pytest.raises(datasets.InputError, match="folders of images and no CIFAR-10: add --dataset folder"):
        datasets.load_dataset("auto", str(tmp_path))
    with pytest.raises(datasets.InputError, match=r"cannot be downloaded \(no network\)"):  # who names it, means it
        datasets.load_dataset("cifar10", str(tmp_path))


def test_without_data(tmp_path, monkeypatch):
    """A data folder that does not exist is refused. Offline, cifar10 says what to do, and auto takes shapes."""
    monkeypatch.setattr(datasets, "load_shapes", lambda: "shapes instead")
    for name in ("auto", "cifar10", "folder"):
        with pytest.raises(datasets.InputError, match="nowhere does not exist.*--data-dir"):
            datasets.load_dataset(name, str(tmp_path / "nowhere"))
    for data_dir in (None, str(tmp_path)):
        with pytest.raises(datasets.InputError, match="cannot be downloaded.*--data-dir.*--dataset shapes"):
            datasets.load_dataset("cifar10", data_dir)
        assert datasets.load_dataset("auto", data_dir) == "shapes instead"


@pytest.mark.skipif(not os.path.isdir(os.path.join(REAL_DATA, "cifar-10-batches-py")),
                    reason="DATA_DIR names no folder with cifar-10-batches-py")
def test_real_cifar10():
    """The real CIFAR-10: 50,000 and 10,000 images, equal classes, the well-known channel means."""
    dataset = datasets.load_dataset("cifar10", REAL_DATA)
    assert dataset.train_images.shape == (50000, 3, 32, 32) and dataset.test_images.shape == (10000, 3, 32, 32)
    assert torch.bincount(dataset.train_labels).tolist() == [5000] * 10
    assert torch.bincount(dataset.test_labels).tolist() == [1000] * 10 and dataset.classes[6] == "frog"
    near(dataset.mean.flatten(), torch.tensor([0.4914, 0.4822, 0.4465]), 1e-3)
