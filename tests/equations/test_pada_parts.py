"""The parts of PA&DA on hand-computed numbers (pada.md, section 5): scores of images and options, what is drawn by them.
"""
from __future__ import annotations

import math
import random
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pada_toy import NAMES, OPTIONS, N, Ops, setup_of, space_of
from scipy.stats import chi2

from nas.importance import (
    ImageImportance,
    Importance,
    PathImportance,
    floored,
    image_scores,
    one_by_one,
    running,
    tempered,
)
from nas.losses import CrossEntropy
from nas.strategies.pada import PADA
from search_spaces.nasbenchmacro import IDENTITY, MBCONVS, NASBenchMacro
from search_spaces.nats import Topology
from search_spaces.space import Choice, SearchSpace
from supernets.nasbenchmacro import NASBenchMacro as Macro
from supernets.nats import Topology as Net

CPU = torch.device("cpu")


def test_tempered_is_the_page_s_rule() -> None:
    G = torch.tensor([0.0, 0.0, 1.0, 3.0, 0.0])
    assert torch.allclose(tempered(G, 0.5), torch.tensor([0.1, 0.1, 0.225, 0.475, 0.1]).double())
    assert tempered(G, 0.0).tolist() == [0.2] * 5
    assert tempered(G, 0.996)[0].item() == pytest.approx(0.0008, abs=1e-12)
    assert tempered(torch.zeros(5), 0.9).tolist() == pytest.approx([0.2] * 5, abs=1e-15)  # no convolution was met: uniform
    p = tempered(torch.rand(7), 0.3)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12) and float(p.min()) >= 0.7 / 7
    low = floored(tempered(G, 0.996), 0.05)
    assert float(low.sum()) == pytest.approx(1.0, abs=1e-12) and low[0].item() == pytest.approx(0.05 + 0.75 * 0.0008, abs=1e-12)


def test_image_scores_are_norms_of_gradients() -> None:
    assert image_scores(torch.zeros(1, 10), torch.tensor([3])).item() == pytest.approx(math.sqrt(0.9), abs=1e-6)
    sure = torch.full((2, 10), -50.0).double()
    sure[:, 4] = 50.0
    assert image_scores(sure, torch.tensor([4, 5])).tolist() == pytest.approx([0.0, math.sqrt(2.0)], abs=1e-12)
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 4, 2, 2, 3])
    (g,) = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), z)
    assert torch.allclose(image_scores(z, y), g.norm(dim=1), rtol=0, atol=1e-12)
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    (g_soft,) = torch.autograd.grad(F.cross_entropy(z, soft, reduction="sum"), z)
    assert torch.allclose(image_scores(z, soft), g_soft.norm(dim=1), rtol=0, atol=1e-12)
    twice = torch.cat([z, 2 * z]).detach()
    assert torch.allclose(image_scores(twice, y), (image_scores(z, y) + image_scores(2 * z, y)) / 2, rtol=0, atol=1e-12)


def test_losses_one_by_one_have_the_loss_as_mean() -> None:
    z, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 4, 2, 2, 3])
    loss = CrossEntropy(0.1, [1.0, 2.0, 0.5, 1.0, 3.0])
    assert torch.allclose(one_by_one(loss, z, y).mean(), loss(z, y), rtol=0, atol=1e-12)
    both = one_by_one(loss, torch.cat([z, 2 * z]), y)  # of two passes over the head, one after the other
    assert torch.equal(both, torch.cat([one_by_one(loss, z, y), one_by_one(loss, 2 * z, y)]))
    assert one_by_one(CrossEntropy(), z, y).tolist() == pytest.approx(F.cross_entropy(z, y, reduction="none").tolist())


def test_weights_of_images_make_the_loss_unbiased() -> None:
    own = ImageImportance(4, Importance(reweight=True), CPU)
    z, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    assert own.loss(CrossEntropy(), z, y, torch.arange(4)) == CrossEntropy()(z, y)  # first epoch: every image once
    own.odds = own.q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    each = [own.loss(CrossEntropy(), z[i : i + 1], y[i : i + 1], torch.tensor([i])) for i in range(4)]
    assert sum(q * v for q, v in zip(own.odds, each)) == pytest.approx(float(CrossEntropy()(z, y)), abs=1e-12)


def test_running_scores_halve() -> None:
    index, values = torch.tensor([1, 1, 0, 1, 2]), torch.tensor([8.0, 4.0, 1.0, 2.0, 5.0])
    assert running(index, values, torch.zeros(4)).tolist() == [1.0, 4.0, 5.0, 0.0]  # ((8 + 4) / 2 + 2) / 2
    assert running(index, values, torch.full((4,), 9.0)).tolist() == [1.0, 4.0, 5.0, 9.0]


def graded(net: Ops, path: Mapping[str, str], size: float) -> None:
    """Every kernel of ``path`` gets a gradient of norm ``size``, every bias one of 0."""
    for p in net.parameters():
        p.grad = None
    for name, option in path.items():
        if option != "none":
            net.W[f"{name}:{option}"].grad = torch.tensor([size, 0.0, 0.0], dtype=torch.float64)
            net.b[f"{name}:{option}"].grad = torch.zeros(N, dtype=torch.float64)


def test_path_scores_halve_from_zero_and_skip_zeros() -> None:
    net = Ops(space_of())
    own = PathImportance(net.space, net, True, 0.0, CPU)
    path = {"e0": "conv", "e1": "none", "e2": "none"}
    for size, want in ((8.0, 4.0), (4.0, 4.0), (0.0, 4.0)):
        graded(net, path, size)
        own.look(path)
        assert own.G[0].tolist() == [0.0, want, 0.0]


def test_two_choices_of_one_option_count_as_their_mean() -> None:
    net = Ops(space_of())
    own = PathImportance(net.space, net, True, 0.0, CPU)
    graded(net, {"e0": "conv", "e1": "conv"}, 3.0)
    net.W["e1:conv"].grad = torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64)
    net.b["e1:conv"].grad = torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    own.look({"e0": "conv", "e1": "conv", "e2": "none"})
    assert own.G[0].tolist() == [0.0, (3.0 + 5.0 + 2.0) / 2 / 2, 0.0]
    apart = PathImportance(net.space, net, False, 0.0, CPU)
    apart.look({"e0": "conv", "e1": "conv", "e2": "none"})
    assert [G.tolist() for G in apart.G] == [[0.0, 1.5, 0.0], [0.0, 3.5, 0.0], [0.0, 0.0, 0.0]]


def test_paths_follow_p() -> None:
    net = Ops(space_of())
    own = PathImportance(net.space, net, True, 0.0, CPU)
    own.p = {name: [0.1, 0.3, 0.6] for name in NAMES}
    rng, n = random.Random(3), 4000
    drawn = [own.draw(rng) for _ in range(n)]
    counts = np.array([[sum(path[a] == o and path[b] == r for path in drawn) for o in OPTIONS for r in OPTIONS]
                       for a, b in (("e0", "e1"), ("e1", "e2"))])  # fmt: skip
    want = n * np.outer([0.1, 0.3, 0.6], [0.1, 0.3, 0.6]).ravel()
    assert (((counts - want) ** 2 / want).sum(axis=1) < chi2.ppf(0.9999, 8)).all()


def test_dead_cells_are_drawn_anew_and_parts_keep_their_share() -> None:
    space = Topology(C=4, N=1)
    net = Net(space, channels=1, classes=3)
    own = PathImportance(space, net, True, 0.0, CPU)
    assert [group.options for group in own.groups] == [space.choices[0].options] and len(own.groups[0].choices) == 6
    own.p = {name: [0.6, 0.1, 0.1, 0.1, 0.1] for name in own.p}
    rng = random.Random(1)
    assert space.lawful(space.encode([own.draw(rng) for _ in range(300)])).all()
    part = space.restrict({"node3.from2": ["none", "nor_conv_3x3"], "node1.from0": ["skip_connect"]})
    own = PathImportance(part, net, True, 0.0, CPU)
    assert own.p["node3.from2"] == [0.5, 0.0, 0.0, 0.5, 0.0] and own.p["node1.from0"] == [0.0, 1.0, 0.0, 0.0, 0.0]
    own.G[0][:] = torch.tensor([0.0, 0.0, 1.0, 3.0, 0.0])
    own.turn(0.5)
    assert own.p["node3.from2"] == pytest.approx([0.25, 0, 0, 0.75, 0]) and own.G[0].tolist() == [0.0] * 5
    assert own.p["node2.from0"] == pytest.approx([0.1, 0.1, 0.225, 0.475, 0.1])


def test_rare_lawful_paths_come_from_a_pool() -> None:
    """A space that accepts one path in 3^6: the pool is uniform over two lawful ones, p says which of them."""
    space, net = space_of(), Ops(space_of())
    rare = SimpleNamespace(root=space, choices=space.choices, ties={}, encode=space.encode, decode=space.decode,
                           canonical=space.canonical, lawful=lambda codes: np.zeros(len(codes), dtype=bool),
                           random_codes=lambda rng, n: np.tile([[1, 1, 1], [2, 2, 2]], (n // 2, 1)))  # fmt: skip
    own = PathImportance(space, net, True, 0.0, CPU)
    own.space = rare  # type: ignore[assignment]
    own.p = {name: [0.5, 0.2, 0.3] for name in NAMES}
    rng = random.Random(2)
    share = sum(own.draw(rng)["e0"] == "wide" for _ in range(400)) / 400
    assert share == pytest.approx(27 / 35, abs=0.08)  # 0.3^3 against 0.2^3


@pytest.mark.parametrize(("options", "words"), [
    ({"norm_point": "later"}, "norm_point = 'later'"), ({"path": False, "data": False}, "both false"),
    ({"data": False, "carry": True}, "data is false"), ({"path": False, "floor": 0.1}, "path is false"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PADA(**options)


def test_a_space_without_owned_weights_and_a_floor_too_high_are_refused() -> None:
    net = Ops(space_of())
    with pytest.raises(ValueError, match=r"Allowed: 0 to 0\.3333"):
        PADA(floor=0.4).start(setup_of(net, net.space))
    net.owned = lambda choice, option=None: []  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="path: false"):
        PADA().start(setup_of(net, net.space))


def test_a_choice_without_a_gradient_counts_and_an_inert_one_does_not() -> None:
    names = ("e0", "e1", "e2")
    choices = [Choice("e0", OPTIONS, False), Choice("e1", OPTIONS, False), Choice("e2", OPTIONS, False, (("e0", ("wide",)),))]
    space = SearchSpace(choices, {}, dear=dict.fromkeys(names, "wide"), cheap=dict.fromkeys(names, "none"))
    net = Ops(space)
    for zeros in (False, True):  # an idle weight has no gradient, or zeros
        own = PathImportance(space, net, True, 0.0, CPU)
        graded(net, {"e0": "conv"}, 6.0)
        if zeros:
            for p in net.owned("e1", "conv"):
                p.grad = torch.zeros_like(p)
        own.look({"e0": "conv", "e1": "conv", "e2": "none"})
        assert own.G[0].tolist() == [0.0, 6.0 / 2 / 2, 0.0]
    two = ("conv", "wide")
    choices = [Choice("e0", OPTIONS, False), Choice("e1", two, False), Choice("e2", two, False, (("e0", ("wide",)),))]
    space = SearchSpace(choices, {}, dear=dict.fromkeys(names, "wide"), cheap={"e0": "none", "e1": "conv", "e2": "conv"})
    net = Ops(space)
    own = PathImportance(space, net, True, 0.0, CPU)
    graded(net, {"e0": "conv", "e1": "conv"}, 6.0)
    own.look({"e0": "conv", "e1": "conv", "e2": "wide"})  # e2 does not count where e0 is not wide
    assert [G.tolist() for G in own.G] == [[0.0, 3.0, 0.0], [3.0, 0.0]]


def test_weights_that_serve_another_place_are_read_where_they_are() -> None:
    first, second = MBCONVS
    space = NASBenchMacro(0.125, (3,), 8)
    net = Macro(space, channels=1, classes=3)
    drawn = dict(zip((c.name for c in space.choices), (first, IDENTITY, second)))
    form = space.normal(drawn)
    assert list(form.values()) == [first, second, IDENTITY]
    net(torch.randn(2, 1, 8, 8), drawn).sum().backward()
    own = PathImportance(space, net, True, 0.0, CPU)
    own.look(drawn)
    want = [sum(p.grad.norm().item() for p in net.owned(name, option)) / 2 if net.owned(name, option) else 0.0
            for name, option in form.items()]  # fmt: skip
    got = dict(zip(own.groups[0].options, own.G[0].tolist()))
    assert got == pytest.approx({first: want[0], second: want[1], IDENTITY: 0.0}, rel=1e-6)
    with pytest.raises(ValueError, match="compact: false"):
        PathImportance(space, net, False, 0.0, CPU)
    apart = NASBenchMacro(0.125, (3,), 8, compact=False)
    assert len(PathImportance(apart, Macro(apart, channels=1, classes=3), False, 0.0, CPU).groups) == 3



def test_a_part_that_draws_otherwise_than_the_whole_takes_nothing_over() -> None:
    noted, nothing = ImageImportance(4, Importance(), CPU), ImageImportance(4, None, CPU)
    noted.odds = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    nothing.load_state_dict(noted.state_dict())
    assert nothing.odds is None and len(nothing.scores) == 0
    state, noted = nothing.state_dict(), ImageImportance(4, Importance(), CPU)
    noted.load_state_dict(state)
    assert noted.odds is None and len(noted.scores) == 4
