"""RS2: which images an epoch reads, by hand, and that training on fractions is training on all with a compressed schedule."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from nas import ranks
from nas.augment import Augment, normalise, permutation
from nas.bilevel import Weights
from nas.build import Built, gather
from nas.data import Data, from_dataset, from_loaders
from nas.feed import Feed
from nas.losses import CrossEntropy
from nas.order import Order, fraction_of
from nas.strategies.spos import SPOS
from search_spaces.resnet import CifarResNet
from supernets.resnet import ResNet

SEED = 3


def digits(**args: Any) -> Data:
    given: dict[str, Any] = {"batch_size": 25, "limit": 100, "augment": ["crop", "flip"]}
    return Data("digits", **(given | args))


def positions(order: Order, steps: int, start: int = 0) -> list[list[int]]:
    return [order(step)[0].tolist() for step in range(start, start + steps)]


def joined(batches: list[list[int]]) -> list[int]:
    return [position for batch in batches for position in batch]


def shuffled(n: int, epochs: int) -> list[int]:
    """The permutations of ``epochs`` epochs, end to end."""
    return torch.cat([permutation(SEED, epoch, n) for epoch in range(epochs)]).tolist()


# -- without replacement --------------------------------------------------------------------------------------------------


def test_slices_of_one_shuffle_and_a_new_one_when_it_is_exhausted() -> None:
    """n = 12, r = 1/3, B = 2: two steps an epoch, every image once in each three epochs."""
    order = Order(12, 2, SEED, "cpu", 1 / 3)
    assert order.epoch_steps == 2
    drawn = positions(order, 12)
    assert joined(drawn) == shuffled(12, 2)
    for third in (drawn[:6], drawn[6:]):
        epochs = [joined(third[k : k + 2]) for k in (0, 2, 4)]
        assert all(len(set(epoch)) == 4 for epoch in epochs) and set(joined(epochs)) == set(range(12))
    assert joined(drawn[:6]) != joined(drawn[6:])


def test_a_remainder_is_read_on_before_anything_is_read_again() -> None:
    """n = 7, r = 1/2, B = 2: one step an epoch; step 3 ends one permutation and begins the next, none is cut short."""
    order = Order(7, 2, SEED, "cpu", 0.5)
    assert order.epoch_steps == 1
    stream = shuffled(7, 4)
    assert joined(positions(order, 14)) == stream
    assert all(sorted(stream[7 * k : 7 * k + 7]) == list(range(7)) for k in range(4))
    hashed = [order(step)[1] for step in range(14)]
    assert [h if isinstance(h, int) else h.tolist() for h in hashed] == [
        0, 0, 0, [0, 1], 1, 1, 1, 2, 2, 2, [2, 3], 3, 3, 3]  # fmt: skip


def test_each_image_is_read_equally_often_whatever_divides() -> None:
    for n, batch, subset in ((23, 4, 0.5), (10, 3, 0.9), (16, 5, 0.4)):
        order = Order(n, batch, SEED, "cpu", subset)
        drawn = torch.tensor(joined(positions(order, 3 * n)))
        for end in range(0, 3 * n * batch, 7):
            counts = torch.bincount(drawn[:end], minlength=n)
            assert int(counts.max() - counts.min()) <= 1 and int(counts.max()) == -(-end // n)


# -- with replacement -----------------------------------------------------------------------------------------------------


def test_with_replacement_each_epoch_draws_for_itself() -> None:
    """n = 12, r = 1/3, B = 2: distinct images within an epoch, the first of the epoch's own permutation."""
    order = Order(12, 2, SEED, "cpu", 1 / 3, replacement=True)
    assert order.epoch_steps == 2
    epochs = [joined(positions(order, 2, 2 * k)) for k in range(300)]
    assert all(epoch == permutation(SEED, k, 12)[:4].tolist() for k, epoch in enumerate(epochs))
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert any(set(joined(epochs[k : k + 3])) != set(range(12)) for k in range(0, 300, 3))
    counts = torch.bincount(torch.tensor(joined(epochs)), minlength=12)
    assert float((counts - 100).abs().max()) < 30  # 300 epochs of a third: 100 +- 8
    assert order(5)[1] == 2


# -- how many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "subset", "images"),
    [(1000, 0.1, 100), (100, 0.29, 29), (30, 1 / 3, 10), (10, 0.7, 7), (1438, 0.1, 143), (7, 0.5, 3), (50, None, 50)],
)
def test_the_images_of_an_epoch(n: int, subset: float | None, images: int) -> None:
    """floor(r n), for decimals that no float holds too; of them whole batches."""
    assert fraction_of(n, subset) == images
    assert Order(n, 3, 0, "cpu", subset).epoch_steps == images // 3


def test_without_it_and_with_all_of_it_nothing_changes() -> None:
    order = Order(10, 4, SEED, "cpu")
    assert order.epoch_steps == 2
    assert positions(order, 4) == [permutation(SEED, e, 10)[s : s + 4].tolist() for e in (0, 1) for s in (0, 4)]
    assert [order(step)[1] for step in range(4)] == [0, 0, 1, 1]
    plain, whole = digits(batch_size=30), digits(batch_size=30, subset=1.0, subset_replacement=True)
    assert whole.subset is None and whole.describe() == plain.describe() and "RS2" not in plain.describe()
    a, b = plain.feed(1, "cpu"), whole.feed(1, "cpu")
    assert all(torch.equal(x, y) for _ in range(7) for x, y in zip(a("train"), b("train"), strict=True))


# -- the feed -------------------------------------------------------------------------------------------------------------


def built(data: Data, epochs: int, strategy: SPOS | None = None) -> Built:
    net = ResNet(CifarResNet(8, widths=[2, 3, 4]), channels=1, classes=10)
    return gather(data, net, strategy or SPOS(), CrossEntropy(), epochs=epochs, seed=1, device=torch.device("cpu"),
                  group=ranks.Ranks(0, 1, 0, True))  # fmt: skip


def test_it_equals_all_images_with_the_schedule_compressed() -> None:
    """r = 1/4 for 8 epochs, and all images for 2: the same images in the same order and views, the same rates."""
    small, full = digits(subset=0.25), digits()
    one, two = built(small, 8), built(full, 2)
    assert (one.setup.steps, one.setup.epoch_steps) == (8, 1) and (two.setup.steps, two.setup.epoch_steps) == (8, 4)
    assert one.setup.images == two.setup.images == 100
    a, b = small.feed(1, "cpu"), full.feed(1, "cpu")
    for _ in range(one.setup.steps):
        assert all(torch.equal(x, y) for x, y in zip(a("train"), b("train"), strict=True))
    rule = Weights(per_epoch=False)
    rates = [[rule.factor(part.setup)(step) for step in range(8)] for part in (one, two)]
    assert rates[0] == rates[1] and rates[0][0] == 1.0 and rates[0][-1] < 0.1
    other, b = digits(subset=0.25, subset_replacement=True).feed(1, "cpu"), full.feed(1, "cpu")
    same = [torch.equal(other("train").index, b("train").index) for _ in range(8)]
    assert same == [True] + [False] * 7  # the first batch of the first permutation


def test_a_schedule_and_an_epoch_count_the_shorter_epochs() -> None:
    """90 of 100 images in batches of 25: 3 steps an epoch; accumulated by 2, one."""
    data = digits(subset=0.9)
    assert data.feed(0, "cpu").epoch_steps() == 3
    assert (built(data, 5).setup.steps, built(data, 5).setup.epoch_steps) == (15, 3)
    halved = built(data, 5, SPOS(Weights(accumulate=2))).setup
    assert (halved.steps, halved.epoch_steps) == (5, 1)


def drawn(feed: Feed, steps: int) -> list[Any]:
    return [feed("train", odds=1.0 if step % 4 == 3 else None) for step in range(steps)]


@pytest.mark.parametrize("replacement", [False, True])
def test_resumption_is_exact_and_ranks_share_the_batch(replacement: bool) -> None:
    data = digits(batch_size=32, subset=0.7, subset_replacement=replacement)
    whole = drawn(data.feed(4, "cpu"), 16)
    first = data.feed(4, "cpu")
    drawn(first, 8)
    rest = data.feed(4, "cpu")
    rest.load_state_dict(first.state_dict())
    for a, b in zip(drawn(rest, 8), whole[8:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    shares = [drawn(data.feed(4, "cpu", rank, 2), 16) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert all(torch.equal(torch.cat([s[step][part] for s in shares]), batch[part]) for part in range(3))


def test_a_batch_across_two_permutations_shows_each_image_in_its_own_view() -> None:
    data = digits(batch_size=30, subset=0.5)
    feed, part = data.feed(2, "cpu"), data.splits["train"]
    batches = [feed("train") for _ in range(4)]
    seed = feed._track("train").seed
    assert part.images.pixels is not None
    x, _, index = batches[3]  # positions 90 to 119 of the stream of 100
    pixels = part.images.pixels[part.rows[index]]
    view = Augment(1, True)
    expected = torch.cat([view.pixels(pixels[:10], seed, 0, index[:10]), view.pixels(pixels[10:], seed, 1, index[10:])])
    assert torch.equal(x, normalise(expected, data.preprocess["mean"], data.preprocess["std"]))
    assert torch.equal(index, torch.cat([permutation(seed, 0, 100)[90:], permutation(seed, 1, 100)[:20]]))


class Pictures(torch.utils.data.Dataset):
    """PIL images, which workers decode on the fly."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.new("L", (4, 4), 25 * i), i % 2


def test_images_decoded_on_the_fly_come_in_the_same_order() -> None:
    data = from_dataset(Pictures(), Pictures(), classes=["a", "b"], batch_size=4, subset=0.5)
    feed = data.feed(0, "cpu")
    assert feed.epoch_steps() == 1 and data.on_the_fly
    batches = [feed("train") for _ in range(5)]
    assert torch.equal(torch.bincount(torch.cat([b.index for b in batches])), torch.full((10,), 2))
    shown = torch.cat([b.x[:, 0, 0, 0] for b in batches])
    values = torch.arange(10) * 25 / 255
    mean, std = data.preprocess["mean"][0], data.preprocess["std"][0]
    assert torch.allclose(shown, (values[torch.cat([b.index for b in batches])] - mean) / std, atol=1e-5)


def test_only_the_feed_of_train_is_cut() -> None:
    small, full = digits(valid_fraction=0.5, subset=0.5), digits(valid_fraction=0.5)
    a, b = small.feed(1, "cpu"), full.feed(1, "cpu")
    assert (a.epoch_steps(), b.epoch_steps()) == (1, 2)
    for split in ("valid", "select"):
        assert a.epoch_steps(split) == b.epoch_steps(split) == 2
        assert all(torch.equal(a(split).index, b(split).index) for _ in range(3))
    assert small.count("train") == 50 and sum(len(batch.y) for batch in small.batches("train", "cpu")) == 50


def test_draws_with_odds_are_of_all_images() -> None:
    odds: Tensor = torch.arange(100.0)
    a, b = digits(subset=0.25).feed(1, "cpu"), digits().feed(1, "cpu")
    assert all(torch.equal(a("train", odds=odds).x, b("train", odds=odds).x) for _ in range(3))


# -- words ----------------------------------------------------------------------------------------------------------------


def test_it_is_said() -> None:
    said = digits(subset=0.6).describe()
    assert said.endswith("; an epoch reads 50 of train (the whole batches of 60%, RS2 without replacement)")
    said = digits(subset=0.6, subset_replacement=True).describe()
    assert said.endswith("; an epoch reads 50 of train (the whole batches of 60%, RS2 with replacement)")


@pytest.mark.parametrize("subset", [0.0, -0.1, 1.01, float("nan")])
def test_no_fraction_is_refused(subset: float) -> None:
    with pytest.raises(ValueError, match=r"data.subset = \S+ is no fraction of an epoch\. Allowed: above 0 to 1, or null"):
        digits(subset=subset)


def test_less_than_a_batch_is_refused_with_what_would_do() -> None:
    data = digits(batch_size=30, subset=0.299)
    with pytest.raises(ValueError, match=r"data.subset = 0.299 of the 100 images of train fills no batch of 30\. Give 0.3"):
        data.feed(0, "cpu")
    assert digits(batch_size=30, subset=0.3).feed(0, "cpu").epoch_steps() == 1


def test_your_own_loaders_refuse_it() -> None:
    loader: Any = DataLoader(TensorDataset(torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)), batch_size=2)
    with pytest.raises(ValueError, match=r"from_loaders: 'subset' is unknown\. .*give train a sampler") as error:
        from_loaders(loader, subset=0.5)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"'size' is unknown\. Allowed: train, valid, select, test, classes, preprocess\.$"):
        from_loaders(loader, size=8)
