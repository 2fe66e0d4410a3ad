"""The terms of ``plain`` that the evaluation of DARTS adds, by hand in float64: auxiliary loss, drop path, schedules."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest import approx
from torch import Tensor, nn

from nas.engine import moment
from nas.losses import CrossEntropy, distillation
from nas.protocols import Batch, Setup
from nas.strategies.plain import Plain
from supernets.extract import DropPath, TrainingForm

STEPS, EPOCH_STEPS = 12, 3
X = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0]], dtype=torch.float64)
Y = torch.tensor([0, 1, 1])


class Two(nn.Module):
    """z = W x, and v W x for the head: two parameters that both losses reach, one that only the head's does."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.tensor([[0.5, -0.2], [0.1, 0.4]], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.drops: list[float] = []

    def forward(self, x: Tensor, drop: float = 0.0) -> Tensor:
        self.drops.append(drop)
        z = x @ self.W.T
        return torch.stack([z, self.v * z])


class One(nn.Module):
    """z = W x, as a network without a head answers."""

    def __init__(self) -> None:
        super().__init__()
        self.W = Two().W
        self.drops: list[float] = []

    def forward(self, x: Tensor, *drop: float) -> Tensor:
        self.drops += drop
        return x @ self.W.T


def draw(split: str, size: Any = None, odds: Any = None) -> Batch:
    assert split == "train"
    return Batch(X, Y, torch.arange(3))


def started(net: nn.Module, teacher: nn.Module | None = None, **settings: Any) -> Plain:
    still: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "cosine"}
    strategy = Plain(**(still | settings))
    strategy.start(Setup(net, None, None, CrossEntropy(), teacher, STEPS, EPOCH_STEPS, 3))
    return strategy


def gradient_of_cross_entropy(z: Tensor) -> Tensor:
    """dL/dz of the mean over the batch, by hand: (softmax(z) - onehot(y)) / B."""
    p = z.exp() / z.exp().sum(1, keepdim=True)
    return (p - torch.eye(2, dtype=torch.float64)[Y]) / len(z)


def cross_entropy(z: Tensor) -> float:
    return float(-(z[torch.arange(3), Y] - z.exp().sum(1).log()).mean())


# -- auxiliary ------------------------------------------------------------------------------------------------------------


def test_the_auxiliary_loss_and_its_gradients() -> None:
    """L = CE(z) + 0.4 CE(v z): dL/dW = (g + 0.4 v g')^T x, dL/dv = 0.4 <g', z>."""
    net = Two()
    W, v = net.W.detach().clone(), 1.5
    strategy = started(net, auxiliary=0.4)
    metrics = dict(strategy.update(draw, moment(0, STEPS, EPOCH_STEPS, 1)))
    z = X @ W.T
    g, g_auxiliary = gradient_of_cross_entropy(z), gradient_of_cross_entropy(v * z)
    assert float(metrics["train/auxiliary"]) == approx(cross_entropy(v * z), abs=1e-12)
    assert float(metrics["train/loss"]) == approx(cross_entropy(z) + 0.4 * cross_entropy(v * z), abs=1e-12)
    assert (net.W - (W - 0.1 * (g + 0.4 * v * g_auxiliary).T @ X)).abs().max() < 1e-12
    assert net.v.item() == approx(v - 0.1 * 0.4 * float((g_auxiliary * z).sum()), abs=1e-12)
    assert net.drops == [0.0]


def test_the_auxiliary_loss_is_of_the_labels_beside_a_teacher() -> None:
    """L = distillation(z, z_teacher, y) + 0.4 CE(v z): the teacher speaks to the network alone."""
    net, teacher = Two(), One()
    with torch.no_grad():
        teacher.W.mul_(-1.0)
    strategy = started(net, teacher, auxiliary=0.4, lam=0.7, T=3.0)
    z = X @ net.W.detach().T
    wanted = distillation(z, -z, Y, 0.7, 3.0, CrossEntropy()) + 0.4 * cross_entropy(1.5 * z)
    metrics = dict(strategy.update(draw, moment(0, STEPS, EPOCH_STEPS, 1)))
    assert float(metrics["train/loss"]) == approx(float(wanted), abs=1e-12)


def test_without_the_new_terms_the_net_takes_x_alone_and_nothing_changes() -> None:
    net = One()
    W = net.W.detach().clone()
    metrics = dict(started(net).update(draw, moment(4, STEPS, EPOCH_STEPS, 1)))
    assert net.drops == [] and metrics.keys() == {"train/loss", "train/top1", "train/lr", "train/grad_norm"}
    assert (net.W - (W - 0.1 * gradient_of_cross_entropy(X @ W.T).T @ X)).abs().max() < 1e-12


# -- drop path ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auxiliary", [0.0, 0.4])
def test_drop_path_grows_by_the_epoch(auxiliary: float) -> None:
    """0.2 * epoch / epochs, as published: 0 in the first of four epochs, 0.15 in the last."""
    net: Any = Two() if auxiliary else One()
    strategy, said = started(net, drop_path=0.2, auxiliary=auxiliary), []
    for step in range(STEPS):
        said.append(dict(strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, 1)))["train/drop_path"])
    wanted = [0.2 * epoch / 4 for epoch in range(4) for _ in range(EPOCH_STEPS)]
    assert net.drops == approx(wanted, abs=1e-15) and said == approx(wanted, abs=1e-15)


class Branches(nn.Module):
    """z = drop(x W^T), and the features that a head would read."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.drop = Two().W, DropPath()

    def forward(self, x: Tensor, drop: float) -> tuple[Tensor, Tensor]:
        z = self.drop((x @ self.W.T)[:, :, None, None], drop)[:, :, 0, 0]
        return z, z


def test_a_sample_is_dropped_whole_and_the_kept_are_scaled() -> None:
    """The gradient of a kept sample is g x / keep at the scaled logits; a dropped one has logits 0 and no gradient in W."""
    form: Any = TrainingForm(Branches(), None)  # type: ignore[arg-type]
    W = form.network.W.detach().clone()
    strategy = started(form, drop_path=0.8)
    now = moment(9, STEPS, EPOCH_STEPS, 1)  # epoch 3 of 4: strength 0.6
    keep = 0.4
    torch.manual_seed(5)
    mask = torch.empty(3, 1, 1, 1, dtype=torch.float64).bernoulli_(keep)[:, :, 0, 0]
    assert 0 < mask.sum() < 3
    torch.manual_seed(5)
    loss = dict(strategy.update(draw, now))["train/loss"]
    z = X @ W.T / keep * mask
    assert float(loss) == approx(cross_entropy(z), abs=1e-12)
    step = (gradient_of_cross_entropy(z) * mask / keep).T @ X
    assert (form.network.W - (W - 0.1 * step)).abs().max() < 1e-12


def test_masks_are_the_steps_own() -> None:
    """``moment`` seeds torch's generators from (seed, step): a resumed run drops what an unbroken one does."""
    losses = []
    for seed, step in ((1, 7), (1, 7), (1, 8), (2, 7)):
        strategy = started(TrainingForm(Branches(), None), drop_path=0.9)  # type: ignore[arg-type]
        batch = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        labels = torch.arange(64) % 2
        now = moment(step, STEPS, EPOCH_STEPS, seed)
        losses.append(float(dict(strategy.update(lambda _: Batch(batch, labels, labels), now))["train/loss"]))  # type: ignore  # noqa: B023
    assert losses[0] == losses[1] and len(set(losses)) == 3


# -- schedules ------------------------------------------------------------------------------------------------------------


def test_the_rate_falls_by_gamma_every_epoch() -> None:
    """ImageNet, as published: 0.1, times 0.97 every epoch; here after a warm-up of one epoch."""
    strategy = started(One(), schedule="exponential", gamma=0.97, warmup_epochs=1)
    rates = [float(dict(strategy.update(draw, moment(s, STEPS, EPOCH_STEPS, 1)))["train/lr"]) for s in range(STEPS)]
    wanted = [0.1 / 3, 0.2 / 3, 0.1, *(0.1 * 0.97**epoch for epoch in range(3) for _ in range(EPOCH_STEPS))]
    assert rates == approx(wanted, abs=1e-15)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_nesterovs_or_plain(nesterov: bool) -> None:
    """Two steps: b <- mu b + g; w <- w - lr (g + mu b), or w - lr b."""
    net = One()
    strategy = started(net, momentum=0.9, nesterov=nesterov, schedule="exponential", gamma=1.0)
    W, b = net.W.detach().clone(), torch.zeros(2, 2, dtype=torch.float64)
    for step in range(2):
        g = gradient_of_cross_entropy(X @ W.T).T @ X
        b = 0.9 * b + g
        W = W - 0.1 * (g + 0.9 * b if nesterov else b)
        strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, 1))
    assert (net.W - W).abs().max() < 1e-12


@pytest.mark.parametrize("settings, words", [
    ({"schedule": "linear"}, "Allowed: cosine_per_epoch, cosine, exponential"),
    ({"auxiliary": -0.1}, "auxiliary = -0.1"), ({"drop_path": 1.0}, r"drop_path = 1\.0"), ({"gamma": 0.0}, r"gamma = 0\.0"),
])
def test_settings_off_their_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        Plain(**settings)
    assert "\n" not in str(error.value)
