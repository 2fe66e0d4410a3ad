"""Your own datasets and loaders."""
import json

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from nas.benchmarks import loader as benchmark
from nas.data import from_dataset, from_loaders


class Squares(Dataset):
    """Image i is i everywhere; with ``noisy`` a random transform of its own."""

    def __init__(self, kind="uint8", noisy=False):
        self.kind, self.noisy = kind, noisy

    def __len__(self):
        return 100

    def __getitem__(self, i):
        image = torch.full((1, 8, 8), i, dtype=torch.uint8)
        if self.noisy:
            image = image + torch.randint(0, 50, (1, 8, 8), dtype=torch.uint8)
        if self.kind == "float":
            return image / 255, i % 2
        if self.kind == "pil":
            return Image.fromarray(image[0].numpy()).resize((8 + i % 3, 9)), i % 2
        return image, i % 2


@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_from_dataset(kind):
    data = from_dataset(Squares(kind), classes=["even", "odd"], batch_size=10, valid_fraction=0.5, augment=["flip"])
    assert data.classes == ["even", "odd"] and data.shape == (1, 8, 8)
    assert (data.count("train"), data.count("valid"), data.count("test")) == (40, 40, 20)
    assert data.preprocess["mean"] == pytest.approx([49.5 / 255], abs=1e-5)
    x, y, index = data.feed(seed=1, device="cpu")("train")
    assert x.shape == (10, 1, 8, 8) and x.dtype == torch.float32
    values = (x[:, 0, 0, 0] * data.preprocess["std"][0] + data.preprocess["mean"][0]) * 255
    rows = data.splits["train"].rows[index]
    torch.testing.assert_close(values, rows.float(), atol=1e-2, rtol=0)
    assert torch.equal(y, rows % 2)


def test_from_dataset_of_pil_images_of_mixed_sizes():
    data = from_dataset(Squares("pil"), Squares("pil"), size=6, batch_size=20, workers=1)
    assert data.shape == (1, 6, 6) and data.count("train") == data.count("test") == 100
    assert sum(len(b.x) for b in data.batches("test", "cpu")) == 100
    with pytest.raises(ValueError, match=r"Give --data.size"):
        list(from_dataset(Squares("pil"), batch_size=20).batches("train", "cpu"))


def test_random_transforms_of_a_dataset_repeat_by_seed_and_epoch():
    data = from_dataset(Squares(noisy=True), batch_size=80)

    def epoch(seed, skip=0):
        draw = data.feed(seed, "cpu")
        draw.load_state_dict({"train": skip})
        batch = draw("train")
        return batch.x[batch.index.argsort()]

    torch.manual_seed(0)
    first = epoch(1)
    torch.manual_seed(1)
    assert torch.equal(epoch(1), first)
    assert not torch.equal(epoch(1, skip=1), first) and not torch.equal(epoch(2), first)


@pytest.mark.parametrize(
    ("train", "args", "why"),
    [
        (Squares(), {"classes": ["one"]}, "a label is outside 0 .. 0, the 1 classes"),
        (Squares(), {"batchsize": 3}, "'batchsize' is unknown. Allowed: batch_size"),
        (TensorDataset(torch.zeros(4, 8), torch.zeros(4)), {}, "Image 0 is a Tensor. Allowed: PIL images, tensors"),
        ([], {}, "holds no image"),
    ],
)
def test_bad_datasets(train, args, why):
    with pytest.raises(ValueError, match=why):
        from_dataset(train, **args)


def loaders(workers=0, persistent=False, generator=None, **more):
    x = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 3, 8, 8)

    class Noisy(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + 0.5 * torch.rand(()), y

    train = Noisy(x[:25], torch.arange(25) % 4)
    more = {"valid": DataLoader(TensorDataset(x[25:], torch.arange(15) % 4), batch_size=5), **more}
    return from_loaders(
        DataLoader(train, 4, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=persistent,
                   generator=generator), **more)  # fmt: skip


def test_from_loaders():
    data = loaders()
    assert data.classes == ["0", "1", "2", "3"] and data.shape == (3, 8, 8)
    assert data.describe() == "train 25, valid 15 (your own loaders)"
    assert data.preprocess == {"mean": [0.0] * 3, "std": [1.0] * 3, "channels": "RGB", "size": [8, 8]}
    assert data.count("select") == 15 and data.reads("select") == "valid"
    assert data.holds("select") and not data.holds("test")
    draw = data.feed(1, "cpu")
    assert draw.epoch_steps() == 6 and draw.epoch_steps("valid") == 3
    first, second = draw("valid"), draw("valid", size=4)
    assert first.x[:, 0, 0, 0].tolist() == [25, 26, 27, 28, 29] and first.index.tolist() == [0, 1, 2, 3, 4]
    assert second.x.shape == (5, 3, 4, 4) and second.index.tolist() == [5, 6, 7, 8, 9]
    assert [len(b.x) for b in data.batches("valid", "cpu", limit=7)] == [5, 2]
    assert torch.cat([b.y for b in data.batches("valid", "cpu")]).tolist() == [i % 4 for i in range(15)]


@pytest.mark.parametrize(
    ("workers", "persistent", "generator"), [(0, False, False), (0, False, True), (1, False, False), (1, True, False)]
)
def test_from_loaders_resumes_exactly(workers, persistent, generator):
    def fresh():
        return loaders(workers, persistent, torch.Generator() if generator else None)

    torch.manual_seed(0)
    draw = fresh().feed(1, "cpu")
    whole = [draw("train") for _ in range(15)]
    assert len({float(v) // 1 for b in whole[:6] for v in b.x[:, 0, 0, 0]}) == 24
    assert not torch.equal(whole[0].x, whole[6].x)
    torch.manual_seed(5)
    data = fresh()
    again = data.feed(1, "cpu")
    again.load_state_dict({"train": 8})
    for step in range(8, 15):
        if step == 10:
            list(data.batches("train", "cpu", limit=5))  # a reading in between does not disturb the feed
        batch = again("train")
        assert torch.equal(batch.index, whole[step].index)
        if persistent:  # their random transforms are torch's to seed, once in their life; the order is ours
            assert torch.equal(batch.x.floor(), whole[step].x.floor())
        else:
            assert torch.equal(batch.x, whole[step].x)
    assert again.state_dict() == {"train": 15}


def test_bad_loaders():
    data = loaders()
    draw = data.feed(1, "cpu")
    with pytest.raises(ValueError, match="odds do not apply"):
        draw("train", odds=torch.ones(40))
    with pytest.raises(ValueError, match="test is read by reports"):
        draw("test")
    with pytest.raises(ValueError, match="'test' has no loader"):
        data.count("test")
    with pytest.raises(ValueError, match="2 ranks would read the same images"):
        data.feed(1, "cpu", 0, 2)
    with pytest.raises(ValueError, match="train must be a DataLoader"):
        from_loaders([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a batch must be x"):
        from_loaders(DataLoader(TensorDataset(torch.zeros(4, 2), torch.zeros(4))))


def test_loaders_of_ranks():
    images = TensorDataset(torch.arange(8.0).view(8, 1, 1, 1), torch.zeros(8, dtype=torch.int64))
    seen = []
    for rank in range(2):
        sampler: DistributedSampler = DistributedSampler(images, num_replicas=2, rank=rank, shuffle=True)
        draw = from_loaders(DataLoader(images, 2, sampler=sampler)).feed(1, "cpu", rank, 2)
        seen.append([draw("train").x.flatten().tolist() for _ in range(4)])
    first = [v for rank in seen for batch in rank[:2] for v in batch]
    assert sorted(first) == list(range(8)) and seen[0][:2] != seen[0][2:]


def test_the_docstring_of_from_loaders_runs():
    half = TensorDataset(torch.rand(50, 3, 8, 8), torch.arange(50) % 4)
    data = from_loaders(train=DataLoader(half, batch_size=10), valid=DataLoader(half, batch_size=10))
    x, y, index = data.feed(seed=1, device="cpu")("valid")
    assert x.shape == (10, 3, 8, 8) and y.shape == (10,) and index.tolist() == list(range(10))


def test_the_benchmark_measures_both_sides(tmp_path, capsys):
    root, out = tmp_path / "set", tmp_path / "figures.json"
    for name in ("train/ant", "train/cat", "test/ant"):
        (root / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (i, 9 * i, 20 * i)).save(root / name / f"{i}.jpg")
    figures = benchmark.main(["--root", str(root), "--batch-size", "4", "--rounds", "2", "--steps", "2",
                              "--limit", "12", "--out", str(out)])  # fmt: skip
    assert json.loads(out.read_text()) == figures and figures["images"] == 12 and figures["pad"] == 1
    low, high = figures["interval90"]
    assert 0 < low <= figures["ratio"] <= high
    assert figures["batched_images_per_s"] > 0 and figures["pil_images_per_s"] > 0
    assert "ratio" in capsys.readouterr().out
    with pytest.raises(ValueError, match="processes = 0"):
        benchmark.measure(str(root), processes=0)
