"""ScheduledDropPath (page nasnet, section 2.4 and the table of section 5), driven through ``plain``.

    keep = 1 - min(1, t / T) * ((l + 1) / L) * (1 - k),   out = op_out * floor(keep + u) / keep for each example and edge
"""
from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from pytest import approx
from torch import Tensor

from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.strategies.plain import Plain
from search_spaces.nasnet import NASNET_A
from search_spaces.nasnet import NASNet as Space
from supernets.extract import DropPath, TrainingForm, training_form
from supernets.nasnet import Cell, NASNet

T, K = 937_500, 0.6
TABLE = [(0, 0, 1.0), (0, 19, 1.0), (T // 2, 9, 0.9), (T, 0, 0.98), (T, 19, 0.6), (2 * T, 19, 0.6)]
"""Step, cell, keep."""


def now(step: int, steps: int = 2 * T + 1, seed: int = 1) -> Any:
    return moment(step, steps, 100, seed)


def alone(space: Space) -> Space:
    """``space`` with nothing but NASNet-A."""
    return space.restrict({name: [value] for name, value in space.arch_of(NASNET_A).items()})


def shaped(space: Space) -> list[Cell]:
    """The cells of NASNet-A, without numbers."""
    with torch.device("meta"):
        return NASNet(alone(space)).every_cell()


@cache
def made(N: int) -> tuple[NASNet, dict[str, Any]]:
    """NASNet-A alone, float64."""
    space = Space(N, 4)
    arch = space.arch_of(NASNET_A)
    net = NASNet(alone(space), 3, 5).double()
    net.reset(torch.Generator().manual_seed(0))
    return net, arch


def form(head: bool = False, **more: Any) -> TrainingForm:
    net, arch = made(1)
    return training_form(net.train(), arch, torch.zeros(2, 3, 8, 8).double(), head=head, **more)


def batch(n: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(n) % 5


def started(net: Any, **settings: Any) -> Plain:
    strategy = Plain(lr=0.01, momentum=0.0, nesterov=False, schedule="cosine", **settings)
    strategy.start(Setup(net, None, None, CrossEntropy(), None, 2 * T + 1, 100, 16))
    return strategy


class Seen:
    """Every call of DropPath: its share, the strength that it was given, what came in and what went out."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[float, float, Tensor, Tensor]] = []
        forward = DropPath.forward

        def watched(module: DropPath, y: Tensor, drop: float) -> Tensor:
            out = forward(module, y, drop)
            self.calls.append((module.share, drop, y.detach(), out.detach()))
            return out

        patch.setattr(DropPath, "forward", watched)


def updated(strategy: Plain, step: int, seed: int = 1) -> dict[str, Any]:
    x, y = batch()
    return dict(strategy.update(lambda *_: Batch(x, y, y), now(step, seed=seed)))  # type: ignore[arg-type]


# -- the schedule -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t, l, keep", TABLE)
def test_the_table_of_the_page(t: int, l: int, keep: float) -> None:  # noqa: E741
    """CIFAR: L = 20, T = 937,500, k = 0.6."""
    cells = shaped(Space(6, 32))
    assert len(cells) == 20
    drop = Plain(drop_path=1 - K, drop_path_steps=T).drop(now(t))
    assert 1 - drop * cells[l].drop_path.share == approx(keep, abs=1e-15)


def test_shares_count_stem_and_reduction_cells() -> None:
    """L = 3 N + 2 on CIFAR, 3 N + 4 on ImageNet; l in order, from 0."""
    for space, L in ((Space(2, 4), 8), (Space(1, 4, "imagenet"), 7)):
        assert [cell.drop_path.share for cell in shaped(space)] == approx([(l + 1) / L for l in range(L)], abs=1e-15)  # noqa: E741
    kinds = [cell.kind for cell in shaped(Space(1, 4, "imagenet"))]
    assert kinds == ["reduce", "reduce", "normal", "reduce", "normal", "reduce", "normal"]


def test_versions_scale_by_time_depth_or_both() -> None:
    strength = {version: [Plain(drop_path=0.4, drop_path_steps=10, drop_path_version=version).drop(now(t)) for t in (0, 5, 20)]
                for version in (1, 2, 3)}  # fmt: skip
    assert strength == {1: [0.0, 0.2, 0.4], 2: [0.4] * 3, 3: [0.0, 0.2, 0.4]}
    for by_depth, shares in ((True, {l / 5 for l in range(1, 6)}), (False, {1.0})):  # noqa: E741
        assert {m.share for m in form(by_depth=by_depth).modules() if isinstance(m, DropPath)} == shares


def test_steps_and_epochs_are_two_schedules() -> None:
    """DARTS grows by the epoch, whatever the step; NASNet by the step, whatever the run's length."""
    assert [Plain(drop_path=0.2).drop(moment(s, 12, 3, 1)) for s in (0, 2, 3, 11)] == approx([0, 0, 0.05, 0.15])
    by_step = Plain(drop_path=0.2, drop_path_steps=4)
    assert [by_step.drop(moment(s, 12, 3, 1)) for s in (0, 1, 4, 11)] == approx([0, 0.05, 0.2, 0.2])


@pytest.mark.parametrize("settings", [{"drop_path_steps": 0}, {"drop_path_version": 4}])
def test_settings_off_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Allowed: 1 step or more.*version 1") as error:
        Plain(drop_path=0.4, **settings)
    assert "\n" not in str(error.value)


# -- the mask ---------------------------------------------------------------------------------------------------------------


def test_an_update_drops_whole_examples_of_every_edge_but_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    """NASNet-A: of ten operations 8 are dropped in a normal cell (pools too), 9 in a reduction. The identity of state 1 in the
    first cell, which is a 1x1 convolution from 3F there, is not."""
    network = form()
    strategy, seen = started(network, drop_path=1 - K, drop_path_steps=T), Seen(monkeypatch)
    said = updated(strategy, T // 2)
    assert said["train/drop_path"] == approx(0.2)
    shares = [share for share, *_ in seen.calls]
    assert [shares.count(l / 5) for l in range(1, 6)] == [8, 9, 8, 9, 8]  # noqa: E741
    masks = []
    for share, drop, y, out in seen.calls:
        keep = 1 - 0.2 * share
        assert drop == approx(0.2)
        kept = (out != 0).flatten(1).any(1)
        wanted = torch.where(kept[:, None, None, None], y / keep, torch.zeros_like(y))
        assert (out - wanted).abs().max() < 1e-12
        masks.append(tuple(kept.tolist()))
    assert all(any(mask) for mask in masks) and len(set(masks)) > 20  # each edge its own, each example its own
    assert any(not all(mask) for mask in masks)
    pools = [leaf for leaf in network.network.modules() if isinstance(leaf, torch.nn.AvgPool2d | torch.nn.MaxPool2d)]
    assert len(pools) == 3 * 3 + 4 * 2  # of the 42 edges above, 17 are pools


def test_a_dropped_edge_gives_nothing_and_passes_no_gradient() -> None:
    drop, y = DropPath(0.5).train(), torch.randn(64, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    out = drop(y, 0.8)  # keep 0.6
    out.sum().backward()
    assert y.grad is not None
    kept = (out != 0).flatten(1).any(1)
    assert 0 < kept.sum() < 64
    assert not out[~kept].any() and not y.grad[~kept].any()
    assert (out[kept] - y[kept] / 0.6).abs().max() < 1e-12 and (y.grad[kept] - 1 / 0.6).abs().max() < 1e-12


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_the_expectation_is_what_came_in(share: float) -> None:
    """P(kept) = keep, and what is kept is divided by keep: 40,000 examples, five standard errors."""
    drop, n, keep = DropPath(share).train(), 40_000, 1 - 0.4 * share
    torch.manual_seed(1)
    out = drop(torch.full((n, 1, 1, 1), 2.0, dtype=torch.float64), 0.4)
    assert set(out.flatten().tolist()) == {0.0, 2.0 / keep}
    assert float((out != 0).double().mean()) == approx(keep, abs=5 * (keep * (1 - keep) / n) ** 0.5)
    assert float(out.mean()) == approx(2.0, abs=5 * 2.0 * ((1 - keep) / keep / n) ** 0.5)


def test_k_of_1_is_the_identity_bit_for_bit() -> None:
    x, _ = batch()
    network = form()
    z = network(x)
    for t in (0, T // 2, 2 * T):
        assert torch.equal(network(x, Plain(drop_path=1 - 1.0, drop_path_steps=T).drop(now(t))), z)
    y = torch.randn(4, 2, 3, 3)
    assert DropPath(0.3).train()(y, 0.0) is y
    assert torch.equal(network(x, Plain(drop_path=0.4, drop_path_steps=T).drop(now(0))), z)  # nothing at the first step
    assert not torch.equal(network(x, 0.4), z)


def test_evaluation_ignores_the_schedule() -> None:
    x, _ = batch()
    network = form().eval()
    assert all(torch.equal(network(x, drop), network(x)) for drop in (0.1, 0.4))
    net, arch = made(1)
    net.eval()
    assert torch.equal(net(x, arch, 0.4), net(x, arch))
    assert not torch.equal(net.train()(x, arch, 0.4), net(x, arch))


def test_masks_are_the_steps_own() -> None:
    """``moment`` seeds torch's generators from (seed, step): a resumed run drops what an unbroken one does."""
    losses = [float(updated(started(form(), drop_path=0.4, drop_path_steps=10), step, seed)["train/loss"])
              for seed, step in ((1, 7), (1, 7), (1, 8), (2, 7))]  # fmt: skip
    assert losses[0] == losses[1] and len(set(losses)) == 3
