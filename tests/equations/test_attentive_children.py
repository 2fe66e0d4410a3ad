"""What AttentiveNAS and AlphaNet run in a step, in which order, what is scored and picked, and what that leaves as it was."""
from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_attentive import BINS, EPOCH_STEPS, LOSS, NETS, STEPS, B, at, batch, made, resnet, started
from torch import Tensor, nn

from nas import checkpoint
from nas.cost import CostTable
from nas.protocols import Setup
from nas.strategies import attentive
from nas.strategies.alphanet import AlphaNet
from nas.strategies.attentive import Attentive
from search_spaces.resnet import CifarResNet
from search_spaces.space import Arch, SearchSpace, Setting


class Watched(nn.Module):
    """Notes what runs: architecture, drop, whether with a graph, whether dropout modules would drop."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.space, self.dropout = net, net.space, nn.Dropout(0.5)
        self.ran: list[tuple[Arch, float, bool, bool]] = []

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        self.ran.append((dict(arch), drop, torch.is_grad_enabled(), self.dropout.training))  # type: ignore[arg-type]
        return self.net(x, arch, drop)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> Any:
        return self.net.layers(input_size, view)


def test_the_largest_is_first_and_the_smallest_last() -> None:
    net = Watched(made("mobile"))
    strategy = started(Attentive, net=net)
    space = net.space
    strategy.update(lambda split: batch(0), at(0))
    largest, *scored, smallest = net.ran
    assert largest == (space.largest(), 0.2, True, True) and smallest == (space.smallest(), 0.0, True, False)
    assert [graph for _, _, graph, _ in scored] == [False, False, False, True] * 2
    assert all(drop == 0 and not dropping for _, drop, _, dropping in scored) and net.dropout.training
    rng = at(0).rng
    for n in (0, 4):
        candidates = strategy.bins.draw(rng, 3)
        assert [arch for arch, *_ in scored[n : n + 3]] == candidates and scored[n + 3][0] in candidates
    assert strategy.passes() == 4 == sum(graph for _, _, graph, _ in net.ran)


def test_one_candidate_is_bin_sampling_without_scores() -> None:
    net = Watched(made("mobile"))
    strategy = started(Attentive, net=net, candidates=1)
    strategy.update(lambda split: batch(0), at(0))
    rng = at(0).rng
    assert [arch for arch, *_ in net.ran[1:3]] == [strategy.bins.draw(rng)[0] for _ in range(2)] and len(net.ran) == 4


def test_alphanets_children_are_uniform() -> None:
    net = Watched(made("mobile"))
    strategy = started(AlphaNet, net=net)
    strategy.update(lambda split: batch(0), at(0))
    rng = at(0).rng
    expected = [net.space.largest(), *(net.space.sample(rng) for _ in range(2)), net.space.smallest()]
    assert net.ran == [(arch, 0.2 * (i == 0), True, i == 0) for i, arch in enumerate(expected)]


class Told(nn.Module):
    """Logits whose loss is what ``says`` tells of each candidate, in order."""

    def __init__(self, space: SearchSpace, says: list[float]) -> None:
        super().__init__()
        self.space, self.says = space, list(says)
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor, arch: Any, drop: float = 0.0) -> Tensor:
        return self.w + self.says.pop(0)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> Any:
        return resnet().layers(input_size, view)  # type: ignore[operator]


@pytest.mark.parametrize("pick, says, expected", [
    ("best", [3.0, 1.0, 2.0], 1), ("worst", [1.0, 3.0, 2.0], 1), ("best", [2.0, 1.0, 1.0], 1), ("worst", [3.0, 3.0, 1.0], 0),
])  # fmt: skip
def test_best_up_takes_the_least_loss_and_worst_up_the_most(pick: str, says: list[float], expected: int) -> None:
    """Of equal ones, the first."""
    net = Told(CifarResNet(14, "tied", widths=(4, 6, 8)), says)
    strategy = Attentive(pick=pick, **BINS)
    strategy.start(Setup(net, net.space, CostTable(net, (8, 8)), lambda z, y: z.sum(), None, STEPS, EPOCH_STEPS, B))
    rng, twin = random.Random(4), random.Random(4)
    candidates = strategy.bins.draw(twin, 3)
    assert len({tuple(arch.values()) for arch in candidates}) == 3
    assert strategy.attended([batch(0)], rng) == candidates[expected] and net.says == []


def test_scores_are_averaged_over_ranks_before_they_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the other rank found the opposite, and more so."""
    strategy = started(Attentive)
    x, y, _ = batch(0)
    candidates = strategy.bins.draw(random.Random(4), 3)
    losses = [LOSS(strategy.net(x, arch), y).item() for arch in candidates]
    assert strategy.attended([batch(0)], random.Random(4)) == candidates[losses.index(min(losses))]
    monkeypatch.setattr(attentive, "average", lambda mine: (mine - 3 * mine) / 2)
    assert strategy.attended([batch(0)], random.Random(4)) == candidates[losses.index(max(losses))]


@pytest.mark.parametrize("kind", NETS)
def test_scoring_changes_nothing(kind: str) -> None:
    """No buffer, no gradient, no weight, no global random number; with gradients of the largest waiting."""
    strategy, now = started(Attentive, kind), at(0)
    x, y, _ = batch(0)
    strategy.w.add(LOSS(strategy.net(x, strategy.space.largest()), y))

    def all_there_is() -> list[Tensor]:
        gradients = [p.grad for p in strategy.w.params if p.grad is not None]
        assert gradients
        return [value.clone() for value in (*strategy.net.state_dict().values(), *gradients)]

    before, noise = all_there_is(), torch.random.get_rng_state()
    with watched_graphs() as graphs:
        strategy.attended([batch(0)], now.rng)
    after = all_there_is()
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
    assert torch.equal(torch.random.get_rng_state(), noise) and graphs == []


@contextmanager
def watched_graphs() -> Iterator[list[Any]]:
    """Tensors that autograd saves."""
    saved: list[Any] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def test_drop_connect_reaches_the_largest_alone() -> None:
    """In the identity blocks of the last two stages."""
    net = made("mobile")
    x, space = batch(0).x, net.space
    dropped: list[str] = []
    for s in range(7):
        for b, block in enumerate(net.blocks(s)):
            block.drop_path.register_forward_hook(lambda module, given, out, name=f"{s}.{b}": dropped.append(name))
    net(x, space.largest(), 0.2)
    assert dropped == ["5.1", "5.2", "6.0", "6.1"]
    dropped.clear()
    started(Attentive, net=net).update(lambda split: batch(0), at(0))
    assert dropped == ["5.1", "5.2", "6.0", "6.1"]


# -- a run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Attentive, AlphaNet])
def test_a_run_goes_on_where_it_was(make: Any) -> None:
    one = started(make)
    for step in range(2):
        one.update(lambda split, step=step: batch(step), at(step))
    state = copy.deepcopy(checkpoint.state_of(one))
    own: dict[str, Any] = {"seed": 9} if make is Attentive else {}  # bins of its own, to be overwritten
    other = started(make, **own)
    checkpoint.restore(other, state)
    for strategy in (one, other):
        torch.manual_seed(strategy is one)
        strategy.update(lambda split: batch(2), at(2))
    assert all(torch.equal(p, q) for p, q in zip(one.net.parameters(), other.net.parameters()))


def test_the_rate_warms_up_and_falls_along_the_whole_run() -> None:
    """0.001 at first, and no cosine that begins after the warm-up."""
    strategy = started(AlphaNet)
    rates = [float(strategy.update(lambda split, step=step: batch(step), at(step))["train/lr"]) for step in range(STEPS)]
    cosine = [0.05 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
    warm = [0.001 + 0.999 * step / EPOCH_STEPS for step in range(EPOCH_STEPS)] + [1.0] * (STEPS - EPOCH_STEPS)
    assert rates == pytest.approx([a * b for a, b in zip(cosine, warm)], rel=1e-12) and rates[0] == pytest.approx(1e-4)


@pytest.mark.parametrize("wrong, words", [
    (lambda: Attentive(children=-1), "Allowed: from 0, from 1"), (lambda: Attentive(candidates=0), "candidates = 0"),
    (lambda: Attentive(pick="first"), "Allowed: best, worst; sum, mean"), (lambda: Attentive(combine="max"), "combine = 'max'"),
    (lambda: Attentive(drop=1.0), "drop = 1.0 is no dropout rate"), (lambda: AlphaNet(alphas=(1.0,) * 3), "Give two, alpha-"),  # type: ignore[arg-type]
   
    (lambda: AlphaNet(alphas=(-1.0, float("nan"))), "no order of a divergence"), (lambda: AlphaNet(clip=0.0), "clip = 0.0"),
    (lambda: AlphaNet(children=-1), "children = -1"), (lambda: AlphaNet(drop=-0.1), "drop = -0.1"),
    (lambda: AlphaNet(combine="max"), "Allowed: sum, mean"),
    (lambda: started(Attentive, bin_width=25e6), "puts all architectures"),
])  # fmt: skip
def test_other_values_are_refused(wrong: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()


def test_no_children_leave_the_two_ends() -> None:
    net = Watched(made("resnet"))
    metrics = started(Attentive, net=net, children=0).update(lambda split: batch(0), at(0))
    assert [arch for arch, *_ in net.ran] == [net.space.largest(), net.space.smallest()]
    assert "train/loss_children" not in metrics
