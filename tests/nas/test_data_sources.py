"""Folders, tar files and torchvision sets: what is read, cached and refused."""
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nas.sources as sources
from nas.augment import normalise
from nas.data import Data

CIFAR = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10-jpg.tar.gz"


def load(name: str, root: str) -> Any:  # a Source, whose optional parts the tests know to be there
    return sources.load(name, root)


def pixels(seed, size=(8, 8), grey=False):
    shape = (size[1], size[0]) if grey else (size[1], size[0], 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def fill(root, parts=(("train", 10), ("test", 4)), classes=("cat", "ant"), size=lambda i: (8, 8), grey=False):
    """PNG files; image i of class c in part p has the seed of its name."""
    for part, n in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                seed = sum(f"{part}/{name}/{i}".encode()) * 100 + i
                Image.fromarray(pixels(seed, size(i), grey)).save(root / part / name / f"{i:02}.png")
    return root


def pack(folder, path, top=""):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        tar.add(folder, arcname=top or ".")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_folder_is_read_in_order_of_names(tmp_path):
    root = fill(tmp_path / "set")
    source = load("folder", str(root))
    assert source.classes == ["ant", "cat"]
    assert source.train.labels.tolist() == [0] * 10 + [1] * 10 and len(source.test) == 8
    files = sorted((root / "train").rglob("*.png"))
    expected = np.stack([np.asarray(Image.open(f)).transpose(2, 0, 1) for f in files])
    assert source.train.pixels.dtype == torch.uint8
    np.testing.assert_array_equal(source.train.pixels.numpy(), expected)


def test_the_cache_is_used_and_follows_the_files(tmp_path, monkeypatch):
    root = fill(tmp_path / "set")
    first = load("folder", str(root))
    (entry,) = (tmp_path / "set.cache").iterdir()
    assert sorted(f.name for f in entry.iterdir()) == [
        "index.json", "test.labels.npy", "test.npy", "train.labels.npy", "train.npy",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_decode_all", lambda *a: pytest.fail("decoded again"))
        assert torch.equal(load("folder", str(root)).train.pixels, first.train.pixels)
        patch.setattr(sources, "MAP_BYTES", 10)
        assert torch.equal(load("folder", str(root)).train.pixels, first.train.pixels)
    Image.fromarray(pixels(1)).save(root / "train" / "ant" / "99.png")
    assert len(load("folder", str(root)).train) == 21
    (entry / "train.npy").write_bytes(b"nonsense")
    (root / "train" / "ant" / "99.png").unlink()
    with pytest.raises(ValueError, match=r"set.cache/\w+ is damaged .*Delete it"):
        load("folder", str(root))


def test_a_failed_build_leaves_nothing(tmp_path):
    root = fill(tmp_path / "set")
    bad = root / "train" / "ant" / "05.png"
    bad.write_bytes(bad.read_bytes()[:80])
    with pytest.raises(ValueError, match=r"ant/05.png is corrupt or not an image"):
        load("folder", str(root))
    assert not list((tmp_path / "set.cache").iterdir())
    bad.write_text("no image")
    with pytest.raises(ValueError, match=r"ant/05.png is corrupt or not an image: no known format"):
        load("folder", str(root))


def test_a_place_that_cannot_be_written_is_cached_at_home(tmp_path, caplog):
    root = fill(tmp_path / "locked" / "set")
    os.chmod(root.parent, 0o555)
    try:
        with caplog.at_level("INFO", logger="nas"):
            load("folder", str(root))
    finally:
        os.chmod(root.parent, 0o755)
    assert not (root.parent / "set.cache").exists()
    assert list((tmp_path / "home" / ".cache" / "supernas").glob("set-*/*/train.npy"))
    assert "cannot be written: the decoded images are cached in" in caplog.text


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz"])
@pytest.mark.parametrize("top", ["", "top"])
def test_a_tar_equals_its_folder(tmp_path, name, top):
    root = fill(tmp_path / "set")
    folder, tar = load("folder", str(root)), load("cifar10", str(pack(root, tmp_path / name, top)))
    assert torch.equal(folder.train.pixels, tar.train.pixels) and torch.equal(folder.test.labels, tar.test.labels)
    assert not list((tmp_path / f"{name}.cache").rglob("images.tar"))


def test_val_is_the_test_split_and_a_second_one_is_named(tmp_path):
    assert len(load("folder", str(fill(tmp_path / "a", (("train", 3), ("val", 2))))).test) == 4
    root = fill(tmp_path / "b", (("train", 3), ("val", 2), ("test", 1)))
    data = Data("folder", str(root), batch_size=2)
    assert data.count("test") == 2 and data.describe().endswith("; val/ is not read: test/ is the test split")


def test_without_a_test_folder_one_is_cut(tmp_path):
    data = Data("folder", str(fill(tmp_path / "set", (("train", 10),))), batch_size=4)
    assert data.describe() == (
        "train 16, valid 0, select 0, test 4; test is 20% of the images, stratified, always the same"
    )
    assert data.splits["test"].labels.tolist() == [0, 0, 1, 1]


def test_grey_and_colour(tmp_path):
    root = fill(tmp_path / "set", grey=True)
    data = Data("folder", str(root), batch_size=4)
    assert data.shape == (1, 8, 8) and data.preprocess["channels"] == "L"
    Image.fromarray(pixels(1)).save(root / "train" / "ant" / "00.png")
    colour = Data("folder", str(root), batch_size=4)
    assert colour.shape == (3, 8, 8) and colour.preprocess["channels"] == "RGB"
    x: Any = colour.splits["train"].images.pixels
    assert torch.equal(x[1, 0], x[1, 2]) and not torch.equal(x[0, 0], x[0, 2])
    values = x.double().permute(1, 0, 2, 3).flatten(1) / 255
    assert colour.preprocess["mean"] == pytest.approx(values.mean(1).tolist(), abs=1e-5)
    assert colour.preprocess["std"] == pytest.approx(values.std(1, correction=0).tolist(), abs=1e-5)


def deep(root):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(root / "train" / "ant" / "00.png")


def empty(root):
    (root / "train" / "bee").mkdir()


def unknown(root):
    fill(root, (("test", 1),), ("bee",))


def other_files(root):
    (root / "train" / "bee").mkdir()
    (root / "train" / "bee" / "notes.txt").write_text("x")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (deep, "ant/00.png has more than 8 bits"),
        (empty, "train/bee holds no image"),
        (other_files, "train/bee holds no image"),
        (unknown, "test has the class 'bee', which train has not. Allowed: ant, cat"),
    ],
)
def test_what_is_wrong_with_a_place_is_said_in_one_line(tmp_path, spoil, why):
    root = fill(tmp_path / "set", (("train", 2), ("test", 1)))
    spoil(root)
    for place in (root, pack(root, tmp_path / "set.tar.gz")):
        with pytest.raises(ValueError, match=why) as error:
            load("folder", str(place))
        assert "\n" not in str(error.value)


def test_missing_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load("folder", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="has no train/<class>/ folder"):
        load("folder", str(tmp_path))
    (tmp_path / "x.tar.gz").write_text("no tar")
    with pytest.raises(ValueError, match=r"x.tar.gz cannot be read as .tar, .tar.gz or .tgz"):
        load("folder", str(tmp_path / "x.tar.gz"))
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100"):
        with pytest.raises(FileNotFoundError, match=f"{name} is not in .*--data.root FOLDER.*--data.download true"):
            load(name, str(tmp_path))


def test_other_files_are_left_out(tmp_path):
    root = fill(tmp_path / "set")
    (root / "train" / "ant" / "notes.txt").write_text("x")
    (root / "train" / "ant" / ".hidden.png").write_text("x")
    (root / "train" / ".git").mkdir()
    source = load("folder", str(root))
    assert len(source.train) == 20 and source.classes == ["ant", "cat"]


def mixed(i):
    return (20 + i, 30 - i)


@pytest.mark.parametrize("kind", ["folder", "set.tar", "set.tar.gz"])
def test_mixed_sizes_are_decoded_on_the_fly(tmp_path, kind):
    root = fill(tmp_path / "set", size=mixed)
    place = root if kind == "folder" else pack(root, tmp_path / kind)
    with pytest.raises(ValueError, match=r"different sizes \(20x30 and 21x29\). Give --data.size"):
        load("folder", str(place))
    data = Data("folder", str(place), batch_size=4, size=7)
    assert data.on_the_fly and data.shape == (3, 7, 7) and data.preprocess["resize"] == 8
    batch = next(data.batches("train", "cpu"))
    image = Image.open(root / "train" / "ant" / "00.png").resize((8, 12), Image.Resampling.BILINEAR).crop((0, 2, 7, 9))
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    assert torch.equal(batch.x[:1], normalise(x, data.preprocess["mean"], data.preprocess["std"]))
    assert batch.y.tolist() == [0] * 4


def test_on_the_fly_is_the_same_with_workers_ranks_and_after_a_resume(tmp_path):
    root = fill(tmp_path / "set", size=mixed)
    args: dict[str, Any] = {"batch_size": 4, "size": 6}
    args |= {"augment": ["crop", "flip", "colour"], "cutout": 2, "valid_fraction": 0.2}
    alone, data = Data("folder", str(root), **args), Data("folder", str(root), workers=2, **args)
    odds = torch.tensor([1.0, 2.0] * 8)

    def drawn(draw, steps):
        return [draw("train", odds=odds * (s // 3 + 1) if s % 3 == 1 else None) for s in steps]

    whole, draw = drawn(alone.feed(3, "cpu"), range(8)), data.feed(3, "cpu")
    first = drawn(draw, range(4))
    again = data.feed(3, "cpu")
    again.load_state_dict(draw.state_dict())
    for a, b in zip(whole, first + drawn(again, range(4, 8)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    shares = [alone.feed(3, "cpu", rank, 2)("train") for rank in range(2)]
    assert torch.equal(torch.cat([s.x for s in shares]), whole[0].x)
    views = [next(data.batches("train", "cpu", augmented=a, seed=s)).x for a, s in ((True, 0), (True, 0), (True, 1))]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_a_bad_image_on_the_fly_is_named(tmp_path):
    root = fill(tmp_path / "set", size=mixed)
    bad = root / "train" / "ant" / "03.png"
    bad.write_bytes(bad.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"ant/03.png is corrupt"):
        Data("folder", str(root), batch_size=4, size=7)


def test_large_sets_are_decoded_on_the_fly(tmp_path, monkeypatch):
    root = fill(tmp_path / "set")
    array = Data("folder", str(root), batch_size=4, augment=["crop", "flip"])
    (tmp_path / "set.cache").rename(tmp_path / "put aside")
    monkeypatch.setattr(sources, "ARRAY_BYTES", 100)
    lazy = Data("folder", str(root), batch_size=4, augment=["crop", "flip"])
    assert lazy.on_the_fly and lazy.shape == (3, 8, 8) and not array.on_the_fly
    assert lazy.preprocess["mean"] == pytest.approx(array.preprocess["mean"], abs=1e-5)
    a, b = array.feed(1, "cpu")("train"), lazy.feed(1, "cpu")("train")
    torch.testing.assert_close(a.x, b.x, atol=1e-4, rtol=1e-4)
    assert torch.equal(a.index, b.index)


def test_torchvision_sets(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            n = 40 if train else 10
            assert root == str(tmp_path) and not download
            self.data: Any = np.arange(n * 32 * 32 * 3, dtype=np.int64).astype(np.uint8).reshape(n, 32, 32, 3)
            self.targets: Any = [i % 10 for i in range(n)]
            self.classes = [f"class {i}" for i in range(10)]

    class Grey(Fake):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.data, self.targets = torch.as_tensor(self.data[..., 0]), torch.tensor(self.targets)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    monkeypatch.setattr("torchvision.datasets.MNIST", Grey)
    data = Data("cifar10", str(tmp_path), batch_size=4, valid_fraction=0.5)
    assert data.describe() == "train 20, valid 20 (50% of train, stratified, seed 111), select 0, test 10"
    assert data.shape == (3, 32, 32) and data.preprocess["mean"] == [0.4914, 0.4822, 0.4465]
    expected = torch.from_numpy(Fake(str(tmp_path), True, False).data).permute(0, 3, 1, 2)
    found: Any = data.splits["train"].images.pixels
    assert torch.equal(found, expected)
    grey = Data("mnist", str(tmp_path), batch_size=4)
    assert grey.shape == (1, 32, 32) and grey.preprocess["std"] == [0.3081] and grey.classes[3] == "class 3"


def test_a_cache_is_plain_data(tmp_path):
    load("folder", str(fill(tmp_path / "set")))
    (entry,) = (tmp_path / "set.cache").iterdir()
    index = json.loads((entry / "index.json").read_text())
    assert index["format"] == "nas-images" and index["classes"] == ["ant", "cat"] and index["sizes"] == ["8x8"]
    for file in entry.glob("*.npy"):
        np.load(file, allow_pickle=False)


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason=f"{CIFAR} is not there")
def test_cifar10_as_jpeg(tmp_path):
    tar = tmp_path / CIFAR.name
    tar.symlink_to(CIFAR)  # so that the cache lies beside the link
    data = Data("cifar10", str(tar), valid_fraction=0.5)
    assert data.describe() == "train 25,000, valid 25,000 (50% of train, stratified, seed 111), select 0, test 10,000"
    assert data.classes == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert (tmp_path / f"{tar.name}.cache").is_dir()
    for split, n in (("train", 2500), ("valid", 2500), ("test", 1000)):
        assert torch.bincount(data.splits[split].labels).tolist() == [n] * 10
    images: Any = data.splits["train"].images.pixels
    assert images.shape == (50000, 3, 32, 32)
    assert (images[::97].double().mean((0, 2, 3)) / 255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.01)
