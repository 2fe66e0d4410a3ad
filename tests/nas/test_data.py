"""Splits, batches and feeds of ``Data``."""
import inspect
from collections import Counter

import pytest
import torch

from nas.augment import Augment, normalise
from nas.data import Data, from_dataset, stratified
from nas.order import Order


def digits(**args):
    return Data("digits", batch_size=args.pop("batch_size", 100), **args)


def test_digits():
    data = digits()
    assert data.shape == (1, 8, 8) and data.classes == [str(d) for d in range(10)]
    assert data.describe() == (
        "train 1,438, valid 0, select 0, test 359; test is 20% of the images, stratified, always the same"
    )
    assert data.preprocess["channels"] == "L" and data.preprocess["size"] == [8, 8]
    x = torch.cat([batch.x for split in ("train", "test") for batch in data.batches(split, "cpu")])
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.float32
    assert float(x.mean()) == pytest.approx(0, abs=1e-4) and float(x.std()) == pytest.approx(1, abs=1e-3)


def test_splits_are_stratified_disjoint_and_follow_the_seed():
    data = digits(valid_fraction=0.5, select_fraction=0.1)
    rows = {name: set(data.splits[name].rows.tolist()) for name in ("train", "valid", "select", "test")}
    assert [len(r) for r in rows.values()] == [575, 719, 144, 359]
    assert set.union(*rows.values()) == set(range(1797)) and sum(len(r) for r in rows.values()) == 1797
    for split, share in (("valid", 0.4), ("test", 0.2), ("select", 0.08)):
        for label, n in Counter(data.splits[split].labels.tolist()).items():
            assert abs(n - share * int((data.splits["train"].images.labels == label).sum())) <= 1.5
    again, other = digits(valid_fraction=0.5, select_fraction=0.1), digits(valid_fraction=0.5, split_seed=2)
    assert torch.equal(again.splits["valid"].rows, data.splits["valid"].rows)
    assert torch.equal(other.splits["test"].rows, data.splits["test"].rows)
    assert set(other.splits["valid"].rows.tolist()) != rows["valid"]
    cut = "of train, stratified, seed 111"
    assert data.describe().startswith(f"train 575, valid 719 (50% {cut}), select 144 (10% {cut}), test 359; ")


def test_stratified_takes_each_class_by_its_share():
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    chosen = stratified(labels, 20, 1, 0)
    assert torch.bincount(labels[chosen]).tolist() == [14, 4, 2]
    assert torch.equal(chosen, chosen.sort().values) and len(chosen.unique()) == 20
    assert torch.bincount(labels[stratified(labels, 11, 1, 0)]).tolist() == [8, 2, 1]
    assert len(stratified(labels, 0, 1, 0)) == 0 and len(stratified(labels, 100, 1, 0)) == 100


def test_limit_keeps_a_stratified_subset():
    data = digits(limit=100, batch_size=10, valid_fraction=0.2)
    assert (data.count("train"), data.count("valid"), data.count("test")) == (80, 20, 359)
    assert min(Counter(data.splits["train"].labels.tolist()).values()) >= 7
    assert "100 of 1,438 training images, stratified, seed 111" in data.describe()


def test_picks_read_valid_where_select_is_empty():
    data = digits(valid_fraction=0.2)
    assert data.reads("select") == "valid" and data.count("select") == data.count("valid") == 288
    assert digits(valid_fraction=0.2, select_fraction=0.2).reads("select") == "select"
    assert data.holds("select") and not digits().holds("select") and not digits().holds("valid")
    for split in ("valid", "select"):
        with pytest.raises(ValueError, match=rf"split '{split}' holds no image.*valid_fraction"):
            digits().count(split)
    with pytest.raises(ValueError, match=r"no split 'dev'.*train, valid, select, test"):
        data.count("dev")


def test_batches_are_in_order_and_whole():
    data = digits()
    batches = list(data.batches("test", "cpu", batch_size=100))
    assert [len(b.x) for b in batches] == [100, 100, 100, 59]
    assert torch.equal(torch.cat([b.index for b in batches]), torch.arange(359))
    part = data.splits["test"]
    assert torch.equal(torch.cat([b.y for b in batches]), part.labels)
    raw = normalise(part.images.pixels[part.rows], data.preprocess["mean"], data.preprocess["std"])
    assert torch.equal(torch.cat([b.x for b in batches]), raw)
    few = torch.cat([b.y for b in data.batches("test", "cpu", limit=50)])
    assert sorted(Counter(few.tolist()).values()) == [5] * 10
    assert next(data.batches("test", "cpu", size=12)).x.shape == (100, 1, 12, 12)
    with pytest.raises(ValueError, match="limit = 0"):
        next(data.batches("test", "cpu", limit=0))


def test_augmented_batches_are_shuffled_and_repeat():
    data = digits(augment=["crop", "flip"])
    first, again, other = (next(data.batches("train", "cpu", augmented=True, seed=s)) for s in (0, 0, 1))
    assert torch.equal(first.index, again.index) and torch.equal(first.x, again.x)
    assert not torch.equal(first.index, other.index) and not torch.equal(first.index, torch.arange(100))
    part = data.splits["train"]
    x = Augment(1, True).pixels(part.images.pixels[part.rows[first.index]], 0, 0, first.index)
    assert torch.equal(first.x, normalise(x, data.preprocess["mean"], data.preprocess["std"]))
    assert torch.equal(first.y, part.labels[first.index])


def test_an_epoch_visits_each_image_once_and_drops_the_rest():
    draw = digits().feed(1, "cpu")
    assert draw.epoch_steps() == 14
    epochs = [torch.cat([draw("train").index for _ in range(14)]) for _ in range(2)]
    assert all(len(e) == len(e.unique()) == 1400 for e in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_a_feed_labels_and_augments_what_it_says():
    data = digits(augment=["crop"], pad=3, cutout=2, valid_fraction=0.3)
    batch = data.feed(1, "cpu")("valid")
    part = data.splits["valid"]
    assert part.images.pixels is not None
    assert torch.equal(batch.y, part.labels[batch.index])
    plain = normalise(part.images.pixels[part.rows[batch.index]], data.preprocess["mean"], data.preprocess["std"])
    assert data.augment == Augment(3, False, 2) and not torch.equal(batch.x, plain)
    select = data.feed(1, "cpu")("select")  # picks are not augmented
    pixels = part.images.pixels[part.rows[select.index]]
    assert torch.equal(select.x, normalise(pixels, data.preprocess["mean"], data.preprocess["std"]))
    assert data.feed(1, "cpu")("train", size=16).x.shape == (100, 1, 16, 16)


def test_resume_is_exact():
    data = digits(augment=["crop", "flip"], valid_fraction=0.2)

    def drawn(draw, steps):
        return [draw("valid" if s % 3 == 2 else "train", odds=torch.arange(1150.0) if s % 3 == 1 else None)
                for s in range(steps)]  # fmt: skip

    whole, draw = drawn(data.feed(4, "cpu"), 42), data.feed(4, "cpu")
    drawn(draw, 21)
    state = draw.state_dict()
    assert state == {"train": 14, "valid": 7}
    resumed = data.feed(4, "cpu")
    resumed.load_state_dict(state)
    for a, b in zip(drawn(resumed, 21), whole[21:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for wrong in ({"test": 3}, {"train": -1}, {"train": "4"}):
        with pytest.raises(ValueError, match="feed's state"):
            resumed.load_state_dict(wrong)


@pytest.mark.parametrize("odds", [None, 1.0, torch.arange(1438.0)])
def test_ranks_share_the_global_batch(odds):
    data = digits(augment=["crop", "flip"])
    one = data.feed(4, "cpu")("train", odds=odds)
    shares = [data.feed(4, "cpu", rank, 4)("train", odds=odds) for rank in range(4)]
    for part in range(3):
        assert torch.equal(torch.cat([s[part] for s in shares]), one[part])


def test_odds_that_are_changed_in_place_are_read_again():
    draw, odds = digits().feed(0, "cpu"), torch.zeros(1438)
    odds[7] = 1
    assert set(draw("train", odds=odds).index.tolist()) == {7}
    odds.zero_()[9] = 1
    assert set(draw("train", odds=odds).index.tolist()) == {9}


def test_odds_are_drawn_in_proportion_with_replacement():
    order = Order(4, 1000, 3, "cpu")
    index = torch.cat([order(step, torch.tensor([0.0, 1.0, 3.0, 0.0]))[0] for step in range(4)])
    counts = torch.bincount(index, minlength=4)
    assert counts[0] == counts[3] == 0 and abs(int(counts[2]) - 3000) < 120
    flat = torch.bincount(order(0, 1.0)[0], minlength=4)
    assert float((flat - 250).abs().max()) < 60
    assert not torch.equal(order(0, 1.0)[0], order(1, 1.0)[0])


def test_a_repeated_image_is_augmented_anew():
    data = digits(augment=["crop"], pad=4)
    odds = torch.zeros(1438)
    odds[7] = 1
    batch = data.feed(0, "cpu")("train", odds=odds)
    assert batch.index.tolist() == [7] * 100 and len(batch.x.unique(dim=0)) > 20


@pytest.mark.parametrize(
    ("odds", "why"), [(torch.ones(5), "1438"), (-torch.ones(1438), "from 0"), (torch.zeros(1438), "not all 0")]
)
def test_odds_are_checked(odds, why):
    with pytest.raises(ValueError, match=why):
        digits().feed(0, "cpu")("train", odds=odds)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"name": "imagenet"}, "'imagenet' is unknown. Allowed: digits, mnist"),
        ({"augment": ["crop", "cutout"]}, "'cutout' is unknown.*--data.cutout 16"),
        ({"augment": ["colour"]}, "colour is for images resized on the fly"),
        ({"pad": 2}, "pad = 2: allowed from 1, with augment"),
        ({"cutout": 9}, "cutout = 9 pixels. Allowed: 0 .none. to 8"),
        ({"valid_fraction": 0.6, "select_fraction": 0.4}, "together below 1"),
        ({"valid_fraction": -0.1}, "allowed from 0"),
        ({"valid_fraction": 0.0001}, "valid_fraction = 0.0001 of 1438 images is none"),
        ({"limit": 5}, r"limit = 5. Allowed: 10 \(one a class\) to 1438"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"size": 0}, "size = 0"),
        ({"name": "folder"}, "needs --data.root"),
    ],
)
def test_bad_arguments(args, why):
    with pytest.raises(ValueError, match=why) as error:
        Data(**args)
    assert "\n" not in str(error.value)


def test_a_select_split_smaller_than_a_batch_is_drawn_whole():
    """What judges at the end of a training must not refuse there."""
    data = digits(batch_size=50, valid_fraction=0.2, select_fraction=0.02, augment=["crop"])
    n = data.count("select")
    assert n == 29
    draw = data.feed(0, "cpu")
    assert [sorted(draw("select").index.tolist()) for _ in range(2)] == [list(range(29))] * 2
    assert len(draw("select", odds=1.0).y) == 29 and draw.epoch_steps("select") == 1
    two = [data.feed(0, "cpu", rank, 2)("select").index.tolist() for rank in range(2)]
    assert [len(share) for share in two] == [14, 14] and len({*two[0], *two[1]}) == 28


def test_bad_feeds():
    data = digits(batch_size=50, valid_fraction=0.02)
    with pytest.raises(ValueError, match="batch_size = 50 does not divide by 3 ranks"):
        data.feed(0, "cpu", 0, 3)
    with pytest.raises(ValueError, match="rank = 2 of world = 2"):
        data.feed(0, "cpu", 2, 2)
    with pytest.raises(ValueError, match="batch_size = 50 is above the 29 images of valid"):
        data.feed(0, "cpu")("valid")
    with pytest.raises(ValueError, match="test is read by reports"):
        data.feed(0, "cpu")("test")
    with pytest.raises(ValueError, match="above the 1438 images of train"):
        digits(batch_size=2000).feed(0, "cpu")


def test_size_brings_arrays_to_a_resolution():
    data = digits(size=12, augment=["crop"])
    assert data.shape == (1, 12, 12) and data.preprocess["size"] == [12, 12] and data.augment.pad == 1
    draw = data.feed(0, "cpu")
    assert draw("train").x.shape == (100, 1, 12, 12) and draw("train", size=8).x.shape == (100, 1, 8, 8)


def test_the_recipe_keys_are_what_from_dataset_takes():
    keys = [*inspect.signature(Data).parameters]
    assert keys[:3] == ["name", "root", "batch_size"]
    with pytest.raises(ValueError, match=r"'root' is unknown .that is for named data."):
        from_dataset([(torch.zeros(1, 2, 2), 0)], root="x")
