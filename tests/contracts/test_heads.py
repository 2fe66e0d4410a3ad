"""Multi-sample dropout in every supernet and under every strategy: M samples of a batch are one batch, M times."""
from __future__ import annotations

import copy
from typing import Any

import pytest
import strategy_entries
import supernet_entries
import torch
from strategy_entries import STRATEGIES, Draws, param, run, started, values
from strategy_entry import STEPS, Entry, made
from supernet_entry import Entry as Net
from supernet_entry import archs, same
from torch import Tensor, nn

from nas.heads import Head, MultiSampleDropout
from supernets.extract import extract

M = 3


@pytest.mark.parametrize("entry", supernet_entries.SUPERNETS, ids=lambda entry: entry.id)
def test_every_supernet_and_its_plain_networks_take_it(entry: Net) -> None:
    net, plain, x = entry.net().train(), entry.net().train(), entry.images()
    Head(0.4, M).attach(net)
    (arch,) = archs(net.space, 1)
    z = net(x, arch)
    assert z.shape == (M * 6, 5) and not torch.equal(z[:6], z[6:12])
    net.eval(), plain.eval()
    assert torch.equal(net(x, arch), plain(x, arch)) and list(net.state_dict()) == list(plain.state_dict())
    graph = extract(net, arch, x, inherit=False)
    assert not any(isinstance(module, MultiSampleDropout) for module in graph.modules())
    before = graph(x)
    Head(0.4, M).attach(graph)
    assert torch.equal(graph(x), before) and graph.train()(x).shape == (M * 6, 5)


class Copies(MultiSampleDropout):
    """Masks that keep everything, and how often they were asked."""

    asked = 0

    def forward(self, x: Tensor) -> Tensor:
        Copies.asked += self.training
        return x.repeat(M, 1) if self.training else x


def one_of_each() -> list[Entry]:
    """The quickest entries: of each class and kind of supervision the first, one that is not slow where there is one."""
    found: dict[Any, Entry] = {}
    for entry in sorted(STRATEGIES, key=lambda entry: (entry.slow, entry.kind in ("darts", "sizes", "nasnet"))):
        found.setdefault((type(entry.make()), entry.taught), entry)
    return list(found.values())


LONG = ("mobile", "mobile-sized", "attentive")


@pytest.mark.parametrize("entry", [param(entry._replace(slow=entry.slow or entry.kind in LONG)) for entry in one_of_each()])
def test_a_strategy_pairs_samples_with_labels_and_teachers(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """With masks that drop nothing, training is the same as without: whatever logits are paired with has met all M."""
    without = started(entry)
    expected = run(without, Draws())
    monkeypatch.setattr("nas.heads.MultiSampleDropout", Copies)

    def with_head(net: nn.Module) -> nn.Module:
        Head(0.4, M).attach(net)
        return net

    def headed(kind: str) -> Any:
        space, net, costs = made(kind)
        return space, with_head(copy.deepcopy(net)), costs

    plain_net = strategy_entries.plain_net
    monkeypatch.setattr(strategy_entries, "made", headed)
    monkeypatch.setattr(strategy_entries, "plain_net", lambda seed: with_head(plain_net(seed)))
    strategy, before = started(entry), Copies.asked
    found = run(strategy, Draws())
    assert Copies.asked >= before + STEPS
    for metrics, wanted in zip(found, expected, strict=True):
        assert metrics.keys() == wanted.keys()
        for tag, value in wanted.items():
            assert float(metrics[tag]) == pytest.approx(float(value), rel=1e-6, abs=1e-9), tag
    for name in entry.moves:
        pairs = zip(values(getattr(strategy, name)), values(getattr(without, name)), strict=True)
        assert all(same(p, q, 1e-7) for p, q in pairs), name
