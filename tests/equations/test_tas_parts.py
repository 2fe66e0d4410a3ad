"""The parts of TAS, each against the page's own words: interpolation, the sampled pair, the temperature, the cost loss,
and the folded convolution and depth merge against literal twins of (6)-(9)."""
from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2
from torch import Tensor, nn

from nas.alpha import Alpha
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Setup
from nas.strategies.tas import TAS
from search_spaces.resnet import CifarResNet
from search_spaces.sizes import Segment, fixed
from search_spaces.space import Arch, Choice, Mixture, SearchSpace
from supernets.elastic import ElasticConv, Normalise
from supernets.mixing import averaging, fold, interpolate_channels
from supernets.resnet import ResNet


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- channel-wise interpolation -----------------------------------------------------------------------------------------

CWI = [  # section 6, check 2
    (range(1, 7), [1.5, 2.5, 4.5, 5.5]),
    (range(1, 5), [1, 1.5, 2, 3, 3.5, 4]),
    (range(11), [0, 0.5, 1.5, 2, 2.5, 3.5, 4, 4.5, 5.5, 6, 6.5, 7.5, 8, 8.5, 9.5, 10]),
]


@pytest.mark.parametrize("given, expected", CWI, ids=["6 to 4", "4 to 6", "11 to 16"])
def test_interpolation_of_the_page(given: range, expected: list[float]) -> None:
    x = torch.tensor(list(given), dtype=torch.float64)[None, :, None, None].expand(2, -1, 3, 3)
    found = interpolate_channels(x, len(expected))
    assert found.shape == (2, len(expected), 3, 3)
    for b, i, j in itertools.product(range(2), range(3), range(3)):
        assert found[b, :, i, j].tolist() == expected


@pytest.mark.parametrize("c, channels", [(1, 4), (3, 8), (5, 7), (8, 8), (9, 4), (16, 64), (19, 64), (51, 57)])
def test_interpolation_is_adaptive_average_pooling(c: int, channels: int) -> None:
    x = doubles(2, c, 3, 2)
    assert torch.allclose(interpolate_channels(x, channels), cwi(x, channels), rtol=0, atol=1e-14)
    assert averaging(c, channels).sum(1).tolist() == pytest.approx([1.0] * channels)
    assert (interpolate_channels(x, channels) is x) == (c == channels)


def cwi(x: Tensor, channels: int) -> Tensor:
    """The released form: adaptive_avg_pool3d with channels as depth."""
    return F.adaptive_avg_pool3d(x[:, None], (channels, *x.shape[2:]))[:, 0]


# -- the sampled pair (3)-(5) -------------------------------------------------------------------------------------------


def alphas(rows: int, logits: list[float]) -> Alpha:
    """``rows`` choices with the same logits, float64."""
    options = tuple(range(1, len(logits) + 1))
    alpha = Alpha(SearchSpace([Choice(f"c{i}.width", options) for i in range(rows)], {})).double()
    with torch.no_grad():
        alpha.logits[str(len(logits))].copy_(torch.tensor(logits, dtype=torch.float64).expand(rows, -1))
    return alpha


def test_u_p_and_v_of_a_pair() -> None:
    logits, tau = [0.4, -0.3, 0.1, 0.9], 0.7
    alpha = alphas(3, logits)
    found = alpha.gumbel(tau, torch.Generator().manual_seed(8), count=2)
    noise = torch.Generator().manual_seed(8)
    g = -torch.empty(3, 4, dtype=torch.float64).exponential_(generator=noise).log()  # -log(Exp(1)) is Gumbel(0, 1)
    u = (torch.tensor(logits, dtype=torch.float64).log_softmax(0) + g) / tau  # (3)
    p = u.exp() / u.exp().sum(1, keepdim=True)
    drawn = torch.multinomial(p + 1e-7, 2, generator=noise)  # (4)
    for i in range(3):
        mixture = found[f"c{i}.width"]
        assert isinstance(mixture, Mixture) and mixture.active is None
        at = sorted(drawn[i].tolist())
        assert mixture.options == tuple(j + 1 for j in at)
        assert mixture.weights.tolist() == pytest.approx((p[i, at] / p[i, at].sum()).tolist(), rel=1e-12)  # (5)


def test_gradient_of_v_is_that_of_a_softmax_of_two() -> None:
    """dv_1/du_1 = v_1 v_2 = -dv_1/du_2, and log softmax drops out: nothing reaches the others, or through the draw."""
    alpha, tau = alphas(1, [0.4, -0.3, 0.1, 0.9]), 0.5
    mixture = alpha.gumbel(tau, torch.Generator().manual_seed(2), count=2)["c0.width"]
    assert isinstance(mixture, Mixture)
    (i, j), (v1, v2) = (int(option) - 1 for option in mixture.options), mixture.weights.tolist()
    (found,) = torch.autograd.grad(mixture.weights[0], alpha.logits["4"])
    expected = [0.0] * 4
    expected[i], expected[j] = v1 * v2 / tau, -v1 * v2 / tau
    assert found[0].tolist() == pytest.approx(expected, abs=1e-14)


def test_gumbel_noise_has_its_distribution() -> None:
    """At tau = 1, u - log softmax(alpha) is standard Gumbel: argmax u follows softmax(alpha)."""
    p = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    soft = alphas(6000, p.log().tolist()).gumbel(1.0, torch.Generator().manual_seed(1))
    first = torch.stack([mixture.weights for mixture in soft.values()]).argmax(1)  # type: ignore[union-attr]
    assert fit(torch.bincount(first, minlength=4), p) > 1e-3
    assert fit(torch.bincount(first, minlength=4), p.flip(0)) < 1e-6


def fit(counts: Tensor, odds: Tensor) -> float:
    """The p-value of a chi-square test."""
    expected = odds / odds.sum() * counts.sum()
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(odds) - 1))


def test_pairs_are_drawn_without_replacement() -> None:
    """tau <= 0 is the plain softmax, so p is known: P{i, j} = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
    p = [0.6, 0.25, 0.1, 0.05]
    found = alphas(6000, [math.log(odds) for odds in p]).gumbel(0.0, torch.Generator().manual_seed(1), count=2)
    pairs = list(itertools.combinations(range(4), 2))
    drawn = [tuple(int(option) - 1 for option in mixture.options) for mixture in found.values()]  # type: ignore[union-attr]
    counts = torch.tensor([drawn.count(pair) for pair in pairs])
    exact = torch.tensor([p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in pairs])
    assert exact.sum().item() == pytest.approx(1.0)
    assert fit(counts, exact) > 1e-3
    assert fit(counts, torch.tensor([p[i] * p[j] for i, j in pairs])) < 1e-6  # two independent draws, conditioned


# -- temperature --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, ends, expected", [
    ("linear", (10.0, 0.1), [10.0, 10.0 - 9.9 * 2 / 4, 0.1]),
    ("cosine", (5.0, 0.1), [5.0, 0.1 + 4.9 * (1 + math.cos(math.pi * 2 / 5)) / 2,
                            0.1 + 4.9 * (1 + math.cos(math.pi * 4 / 5)) / 2]),
])  # fmt: skip
def test_temperature_at_first_middle_and_last_epoch(schedule: str, ends: tuple[float, float], expected: list[float]) -> None:
    strategy = TAS(temperature=ends, temperature_schedule=schedule)
    found = [strategy.tau(moment(epoch * 7 + 3, 35, 7, 0)) for epoch in (0, 2, 4)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert strategy.tau(moment(14, 35, 7, 0)) == strategy.tau(moment(20, 35, 7, 0))  # constant within an epoch


def test_the_temperature_of_a_single_epoch_is_the_first() -> None:
    assert TAS().tau(moment(3, 7, 7, 0)) == 10.0


@pytest.mark.parametrize("wrong, words", [
    ({"rule": "old"}, "rule = 'old' is not known. Allowed: paper, released"),
    ({"temperature_schedule": "step"}, "temperature_schedule = 'step' is not known. Allowed: linear, cosine"),
    ({"candidates": 0}, "candidates = 0 is too few"),
    ({"tolerance": 1.0}, "tolerance = 1.0 is not a share"),
])
def test_unknown_hyper_parameters_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TAS(**wrong)


# -- cost loss ----------------------------------------------------------------------------------------------------------


def at(arch: Arch, **settings: Any) -> TAS:
    """A started TAS on a small "tas" net whose arg-max is ``arch``."""
    space = CifarResNet(14, "tas", widths=(4, 6, 8))
    net = ResNet(space, channels=1, classes=4).double()
    strategy = TAS(**settings)
    strategy.start(Setup(net, space, CostTable(net, (8, 8)), CrossEntropy(), None, 4, 2, 8))
    strategy.alpha.double()
    with torch.no_grad():
        for K, names in strategy.alpha.groups.items():
            for row, name in enumerate(names):
                strategy.alpha.logits[str(K)][row, space[name].options.index(arch[name])] += 0.5
    assert strategy.architecture() == arch
    return strategy


def shallow() -> Arch:
    """Stage 0 keeps one block of full width; the width written for its removed last block is the narrowest."""
    largest = CifarResNet(14, "tas", widths=(4, 6, 8)).largest()
    return {**largest, "stage0.depth": 1, "stage0.block1.conv1.width": 1}


def pull(strategy: TAS, R: float) -> float:
    """L_cost / log E, which is the sign."""
    strategy.R = R
    loss, E, _ = strategy.cost_loss()
    return loss.item() / math.log(E.item())


@pytest.mark.parametrize("t", [0.05, 0.2])
def test_the_papers_window_is_symmetric(t: float) -> None:
    strategy = at(shallow(), tolerance=t)
    true = strategy.costs.of(shallow())
    e = 1e-9
    assert pull(strategy, true / (1 + t) * (1 - e)) == 1.0  # F > (1 + t) R
    assert pull(strategy, true / (1 + t) * (1 + e)) == 0.0
    assert pull(strategy, true / (1 - t) * (1 - e)) == 0.0
    assert pull(strategy, true / (1 - t) * (1 + e)) == -1.0  # F < (1 - t) R
    assert strategy.cost_loss()[2] == true


@pytest.mark.parametrize("t", [0.05, 0.2])
def test_the_released_window_is_one_sided_and_reads_the_estimate(t: float) -> None:
    strategy = at(shallow(), rule="released", tolerance=t)
    true, estimate = strategy.costs.of(shallow()), strategy.costs.seen("estimated").of(shallow())
    full = strategy.costs.of(strategy.space.largest())
    assert estimate < true and strategy.F_max == full
    e = 1e-9
    assert pull(strategy, estimate * (1 - e)) == 1.0  # F > R
    assert pull(strategy, estimate * (1 + e)) == 0.0
    assert pull(strategy, estimate + t * full * (1 - e)) == 0.0
    assert pull(strategy, estimate + t * full * (1 + e)) == -1.0  # F < R - t F_max
    assert pull(strategy, (estimate + true) / 2) == 0.0  # the net that is built would be too big
    assert strategy.cost_loss()[2] == estimate


def test_the_pull_is_that_of_the_expected_cost() -> None:
    """d log E = dE / E; E by the searched view at softmax(alpha), independent of every sample."""
    strategy = at(shallow(), tolerance=0.0)
    strategy.R = 1.0
    loss, E, _ = strategy.cost_loss()
    expected = strategy.costs.seen("searched").expected(strategy.alpha.soft())
    logits = list(strategy.alpha.logits.values())
    found = torch.autograd.grad(loss, logits)
    for g, h in zip(found, torch.autograd.grad(expected, logits)):
        assert torch.allclose(g, h / E.detach(), rtol=1e-12) and bool(g.any())
    assert E.item() == expected.item() and loss.item() == math.log(expected.item())


# -- (6)-(8): one convolution of a sampled pair -------------------------------------------------------------------------


class Twin(nn.Module):
    """The page's forward, word for word: zero-pad, the FULL convolution, a BatchNorm2d per candidate, CWI, weights."""

    def __init__(self, leaf: ElasticConv) -> None:
        super().__init__()
        self.weight = nn.Parameter(leaf.weight.detach().clone())
        self.stride, self.padding, self.mixing = leaf.stride, leaf.padding, leaf.mixing
        self.norms = nn.ModuleList()
        for c in leaf.widths:
            if leaf.norm is None:
                continue
            norm = nn.BatchNorm2d(c).double()
            gamma, beta = leaf.norm.affine(c)
            norm.load_state_dict({"weight": gamma, "bias": beta, "running_mean": leaf.norm.running_mean[:c],
                                  "running_var": leaf.norm.running_var[:c], "num_batches_tracked": torch.tensor(0)})
            self.norms.append(norm)

    def forward(self, x: Tensor, ks: list[int], widths: list[int], v: Tensor) -> Tensor:
        x = torch.cat([x, x.new_zeros(len(x), self.weight.shape[1] - x.shape[1], *x.shape[2:])], dim=1)  # (6)
        full = F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        C, out = max(widths[k] for k in ks), 0.0
        for k, weight in zip(ks, v):
            f = full[:, : widths[k]]
            if self.norms:
                f = self.norms[k](f)  # (7)
            wide = cwi(f, C) if self.mixing == "interpolate" else F.pad(f, (0, 0, 0, 0, 0, C - widths[k]))
            out = out + weight * wide  # (8)
        return out  # type: ignore[return-value]


def leaf_of(norm: str | None, mixing: str, stride: int) -> ElasticConv:
    """Five input channels, eight candidate widths up to 16; everything random."""
    space = CifarResNet(8, "tas", widths=(16, 4, 4))
    into, out = Segment(fixed(5), 5), Segment(space.conv_size(0, 0, 0), 16)
    leaf = ElasticConv(space, (into,), out, 3, stride, norm, mixing=mixing).double()
    generator = torch.Generator().manual_seed(4)
    leaf.reset(generator)
    with torch.no_grad():
        for tensor in (*leaf.parameters(), *leaf.buffers()):
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
    return leaf


PAIRS = [[0, 1], [2, 7], [6, 7], list(range(8))]


@pytest.mark.parametrize("ks", PAIRS, ids=lambda ks: "all" if len(ks) == 8 else f"{ks[0]}-{ks[1]}")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", ["separate", None])
@pytest.mark.parametrize("mixing", ["interpolate", "sum"])
def test_the_folded_convolution_is_the_pages(ks: list[int], training: bool, norm: str | None, mixing: str) -> None:
    for stride, c_in in ((1, 3), (2, 5)):  # three channels of five: the twin pads, the leaf slices
        leaf = leaf_of(norm, mixing, stride).train(training)
        twin = Twin(leaf).train(training)
        name = "stage0.block0.conv0.width"
        x, y = (doubles(4, c_in, 6, 6).requires_grad_() for _ in range(2))
        v, w = (torch.softmax(doubles(len(ks), seed=1), 0).requires_grad_() for _ in range(2))
        mixture = Mixture(tuple(leaf.widths[k] for k in ks), v)
        found, expected = leaf(x, {name: mixture}), twin(y, ks, list(leaf.widths), w)
        assert found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-12)
        factors = doubles(*found.shape, seed=2)
        (found * factors).sum().backward()
        (expected * factors).sum().backward()
        pairs: list[tuple[Any, Any]] = [(x.grad, y.grad), (v.grad, w.grad), (leaf.weight.grad, twin.weight.grad)]
        for k in range(8) if norm else ():
            assert isinstance(leaf.norm, Normalise)
            mine, theirs = (leaf.norm.weight[k], leaf.norm.bias[k]), (twin.norms[k].weight, twin.norms[k].bias)
            pairs += [(a.grad, b.grad) for a, b in zip(mine, theirs)]
            assert all((a.grad is None) == (k not in ks) for a in mine)
        for a, b in pairs:
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=0, atol=1e-11)


def test_a_fold_is_a_matrix_and_a_shift() -> None:
    """1 of 2 channels (weight 0.3, gamma 2, beta 5) and both (0.7, gamma 3 4, beta 6 7), by hand."""
    one, two = (torch.tensor(values, dtype=torch.float64) for values in ([0.3], [0.7]))
    scales = [torch.tensor([2.0]).double(), torch.tensor([3.0, 4.0]).double()]
    shifts = [torch.tensor([5.0]).double(), torch.tensor([6.0, 7.0]).double()]
    M, b = fold([1, 2], [one[0], two[0]], scales, shifts, "interpolate")
    assert M.flatten().tolist() == pytest.approx([0.6 + 2.1, 0.0, 0.6, 2.8])
    assert b.tolist() == pytest.approx([1.5 + 4.2, 1.5 + 4.9])
    M, b = fold([1, 2], [one[0], two[0]], scales, shifts, "sum")
    assert M.flatten().tolist() == pytest.approx([2.7, 0.0, 0.0, 2.8]) and b.tolist() == pytest.approx([5.7, 4.9])


# -- (9): the depths of a stage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [None, (0, 2), (1,)], ids=["all", "two", "one"])
def test_the_depth_merge_is_the_pages(active: tuple[int, ...] | None) -> None:
    space = CifarResNet(20, "tas", widths=(4, 6, 8))
    net = ResNet(space, classes=4).double()
    net.reset(torch.Generator().manual_seed(1))
    arch, x = space.sample(random.Random(5)), doubles(4, 3, 8, 8)
    arch |= {f"stage{s}.block{b}.conv1.width": 2 + b + s for s in range(3) for b in range(3)}  # taps of unequal widths
    q, r = ([torch.softmax(doubles(3, seed=s), 0).requires_grad_() for s in range(3)] for _ in range(2))
    found = net(x, {**arch, **{f"stage{s}.depth": Mixture((1, 2, 3), q[s], active) for s in range(3)}})
    y = F.relu(net.stem(x, arch))
    for s in range(3):
        taps = []
        for b in range(3):
            y = net.blocks(s)[b](y, arch)
            taps.append(y)
        js = range(3) if active is None else active
        C = max(taps[j].shape[1] for j in js)
        y = sum(r[s][j] * cwi(taps[j], C) for j in js)  # type: ignore[assignment]
    expected = net.classifier(y.mean((2, 3)), arch)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    factors = doubles(4, 4, seed=9)
    grads = torch.autograd.grad((found * factors).sum(), q), torch.autograd.grad((expected * factors).sum(), r)
    for mine, theirs in zip(*grads):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-11) and bool(mine.any())
