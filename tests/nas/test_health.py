"""Entropy, shares, the mixture and the warnings, on spaces of cells and of widths."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nas import health
from nas.alpha import Alpha
from nas.health import Health, collapsed, entropy, read, relaxed, warnings
from search_spaces.darts import DARTS_V1, DARTS_V2, Cells
from search_spaces.nats import Topology
from search_spaces.resnet import CifarResNet
from search_spaces.space import Arch, Mixture, SearchSpace
from supernets.nats import Topology as TopologyNet
from supernets.resnet import ResNet

CELL = "|skip_connect~0|+|skip_connect~0|nor_conv_3x3~1|+|none~0|skip_connect~1|nor_conv_1x1~2|"
SKIPS = "|skip_connect~0|+|skip_connect~0|skip_connect~1|+|skip_connect~0|skip_connect~1|skip_connect~2|"


def rows(space: SearchSpace, **odds: float) -> dict[str, list[float]]:
    """The same row for every choice: ``odds`` for these options, the rest shared equally by the others."""
    out = {}
    for choice in space.root.choices:
        given = [odds.get(str(option)) for option in choice.options]
        rest = (1 - sum(p for p in given if p is not None)) / max(given.count(None), 1)
        out[choice.name] = [rest if p is None else p for p in given]
    return out


def certain(space: SearchSpace, arch: Arch) -> dict[str, list[float]]:
    return {c.name: [float(option == arch[c.name]) for option in c.options] for c in space.root.choices}


def kinds(found: Health, **said: Any) -> set[str]:
    return set(warnings(found, **{"progress": 0.5, **said}))


# ---- entropy and shares --------------------------------------------------------------------------------------------


def test_entropy_is_1_undecided_0_decided_and_counts_only_what_remains() -> None:
    space = Topology(C=4, N=1)
    assert entropy(space, rows(space), space.free) == pytest.approx(1.0, abs=1e-12)
    assert entropy(space, certain(space, space.parse(CELL)), space.free) == 0.0
    left = space.restrict({name: ["skip_connect", "nor_conv_3x3"] for name in space.free})
    p = rows(space, skip_connect=0.15, nor_conv_3x3=0.05)  # of these two: 3/4 and 1/4
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert entropy(left, p, left.free) == pytest.approx(expected, abs=1e-12)
    alpha = Alpha(space, 1.0, torch.Generator().manual_seed(1))
    assert entropy(space, alpha.probabilities(), space.free) == pytest.approx(float(alpha.entropy().detach()), abs=1e-6)


def test_skips_are_counted_among_what_is_kept_and_none_among_all() -> None:
    space = Topology(C=4, N=1)
    found = read(space, space.parse(CELL), rows(space, skip_connect=0.4, none=0.3))
    shares = found.shares[""]
    assert {kind: tuple(share) for kind, share in shares.items()} == {
        "skip": pytest.approx((3, 5, 0.4, 0.2)), "none": pytest.approx((1, 6, 0.3, 0.2))}  # fmt: skip
    assert found.tags() == {
        "health/entropy": pytest.approx(found.entropy[""]), "health/share_skip": 0.6, "health/mean_skip": pytest.approx(0.4),
        "health/share_none": pytest.approx(1 / 6), "health/mean_none": pytest.approx(0.3),
    }  # fmt: skip


def test_the_narrowest_is_the_first_that_remains_of_choices_that_count() -> None:
    space = CifarResNet(14, "tied", [4, 6, 8])
    arch = space.smallest()
    inert = set(space.free) - space.counting(arch)
    assert inert  # blocks that the depth leaves out
    found = read(space, arch, rows(space)).shares[""]
    assert set(found) == {"narrowest"} and found["narrowest"].share == 1.0
    assert found["narrowest"].of == len(set(space.free) & space.counting(arch))
    wider = {**arch, "stage0.width": 3, "stage1.width": space["stage1.width"].options[-1]}
    left = space.restrict({"stage0.width": [3, 4]})
    assert read(left, wider, rows(space)).shares[""]["narrowest"].hits == found["narrowest"].of - 1


def test_cells_have_parts_and_a_strategy_without_beliefs_has_shares_alone() -> None:
    space = Cells(C=4, layers=3)
    normal = {name: "skip_connect" for name in space.free if space.part(name) == "normal"}
    arch = {**space.largest(), **normal}
    found = read(space, arch, {})
    assert found.entropy == {} and warnings(found, progress=1.0, gap=1.0) == {}
    assert found.tags() == {
        "health/share_skip": 0.5, "health/share_skip/normal": 1.0, "health/share_skip/reduce": 0.0,
        "health/share_none": 0.0, "health/share_none/normal": 0.0, "health/share_none/reduce": 0.0,
    }  # fmt: skip
    assert set(read(space, arch, rows(space)).entropy) == {"", "normal", "reduce"}


# ---- the mixture ---------------------------------------------------------------------------------------------------


def nets() -> list[Any]:
    wide = CifarResNet(8, "tied", [4, 6, 8])
    few = wide.restrict({"stage0.width": [2, 4]})
    tied = wide.tie("stage1.block0.conv0.width", "stage1.width", {k: k for k in range(1, 7)})
    made: list[Any] = [ResNet(space, mixing="sum", channels=1, classes=10) for space in (wide, few, tied)]
    made.append(TopologyNet(Topology(C=4, N=1), 1, 10))
    for net in made:
        net.reset(torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize("at", range(4), ids=["widths", "restricted", "tied", "cells"])
def test_a_mixture_of_certainties_is_the_architecture(at: int) -> None:
    """Widths padded with zeros; interpolated ones (TAS) are another network even where only one counts."""
    net = nets()[at].double()
    space, x = net.space, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    arch = space.derive(Alpha(space, 1.0, torch.Generator().manual_seed(3)).probabilities())
    mixed = relaxed(space, certain(space, arch))
    assert {name for name, setting in mixed.items() if isinstance(setting, Mixture)} == {*space.free, *space.ties}
    with torch.no_grad():
        torch.testing.assert_close(net(x, mixed), net(x, arch), atol=1e-9, rtol=0)
        even = net(x, relaxed(space, rows(space)))
    assert float((even - net(x, arch).detach()).abs().max()) > 1e-3


def test_the_mixture_is_the_one_that_alphas_believe_in() -> None:
    space = CifarResNet(8, "tied", [4, 6, 8]).restrict({"stage2.width": [4, 8]})
    alpha = Alpha(space, 1.0, torch.Generator().manual_seed(1))
    mine, theirs = relaxed(space, alpha.probabilities()), alpha.soft()
    assert mine.keys() == theirs.keys() == {choice.name for choice in space.choices}
    for name, setting in theirs.items():
        if isinstance(setting, Mixture):
            own = mine[name]
            assert isinstance(own, Mixture) and (own.options, own.active) == (setting.options, setting.active)
            torch.testing.assert_close(own.weights, setting.weights.detach())
        else:
            assert mine[name] == setting


# ---- warnings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: Topology(C=4, N=1), lambda: Cells(C=4, layers=3), lambda: CifarResNet(20)],
                         ids=["nats", "darts", "widths"])  # fmt: skip
@pytest.mark.parametrize("std", [1e-3, 1e-2])
def test_no_fresh_start_is_warned_about(make: Any, std: float) -> None:
    space = make()
    for seed in range(40):
        alpha = Alpha(space, std, torch.Generator().manual_seed(seed))
        found = read(space, space.canonical(alpha.architecture()), alpha.probabilities())
        assert warnings(found, progress=0.02, gap=0.6, norm=1e-2, peak=1e-2) == {}


def test_published_cells_are_healthy() -> None:
    space = Cells()
    for genotype in (DARTS_V1, DARTS_V2):
        assert kinds(read(space, space.arch_of(genotype), rows(space, skip_connect=0.3, none=0.3))) == set()


def test_all_skips_is_the_known_end() -> None:
    space = Topology(C=4, N=1)
    found = warnings(read(space, space.parse(SKIPS), rows(space, skip_connect=0.4)), progress=0.5)
    assert set(found) == {"skip"}
    for words in ("collapse to skips: all 6 operations", "mean probability 0.40, by chance 0.20", "NAS-Bench-201",
                  "alphas.warmup_epochs", "alphas.skip_limit", "stop earlier", "weight_decay"):  # fmt: skip
        assert words in found["skip"]
    assert "\n" not in found["skip"]
    most = warnings(read(space, space.parse(CELL), rows(space, skip_connect=0.4)), progress=0.5)["skip"]
    assert "3 of the 5 operations" in most and "known" not in most


def test_a_share_alone_is_no_collapse() -> None:
    """Where skips are no more probable than chance, or no more than half of what is kept."""
    space = Topology(C=4, N=1)
    assert kinds(read(space, space.parse(SKIPS), rows(space, skip_connect=0.203))) == set()
    half = space.parse("|skip_connect~0|+|skip_connect~0|nor_conv_3x3~1|+|none~0|none~1|nor_conv_1x1~2|")
    assert kinds(read(space, half, rows(space, skip_connect=0.4))) == set()


def test_each_cell_is_judged_by_itself() -> None:
    space = Cells(C=4, layers=3)
    arch = {**space.largest(), **{name: "skip_connect" for name in space.free if space.part(name) == "reduce"}}
    found = warnings(read(space, arch, rows(space, skip_connect=0.5)), progress=0.5)
    assert set(found) == {"skip/reduce"} and "the reduce cell" in found["skip/reduce"]


def test_empty_and_narrow_networks() -> None:
    space = Topology(C=4, N=1)
    empty = space.parse("|nor_conv_3x3~0|+|none~0|none~1|+|none~0|none~1|nor_conv_3x3~2|")
    found = warnings(read(space, empty, rows(space, none=0.5)), progress=0.5)
    assert set(found) == {"none"} and "4 of the 6 choices of the network are empty" in found["none"]
    widths = CifarResNet(20)
    p = {name: [0.5, *[0.5 / (len(row) - 1)] * (len(row) - 1)] if len(row) > 1 else row for name, row in rows(widths).items()}
    narrow = warnings(read(widths, widths.smallest(), p), progress=0.5)
    assert set(narrow) == {"narrowest"} and "Raise the budget's target" in narrow["narrowest"]
    assert kinds(read(widths, widths.largest(), p)) == set()


@pytest.mark.parametrize(("kind", "odds", "quiet", "loud"), [
    ("entropy", 0.999, {"progress": 0.26}, {"progress": 0.25}),
    ("entropy", 0.9, {"progress": 0.01}, None),
    ("gap", 0.4, {"progress": 0.74, "gap": 0.9}, {"progress": 0.75, "gap": 0.3}),
    ("gap", 0.4, {"progress": 1.0, "gap": 0.29}, {"progress": 1.0, "gap": 0.31}),
    ("gap", 0.4, {"progress": 1.0, "gap": -0.5}, None),
    ("gradient", 0.4, {"norm": 2e-3, "peak": 1.0}, {"norm": 1e-3, "peak": 1.0}),
    ("gradient", 0.4, {"norm": None, "peak": None}, {"norm": 0.0, "peak": 0.0}),
    ("gradient", 0.999, {"norm": 1e-9, "peak": 1.0}, None),
])  # fmt: skip
def test_thresholds(kind: str, odds: float, quiet: dict[str, Any], loud: dict[str, Any] | None) -> None:
    space = Topology(C=4, N=1)
    arch = {name: "nor_conv_3x3" for name in space.free}
    found = read(space, arch, rows(space, nor_conv_3x3=odds))
    assert kinds(found, **quiet) == set()
    if loud:
        assert kinds(found, **loud) == {kind}


def test_every_threshold_says_why() -> None:
    source = Path(health.__file__).read_text(encoding="utf-8")
    for name in ("SKIPS", "NONES", "NARROWEST", "LEAN", "DECIDED", "EARLY", "LATE", "GAP", "GONE"):
        (line,) = [line for line in source.splitlines() if line.startswith(f"{name} = ")]
        assert len(line.partition("  # ")[2]) > 20


def test_a_supernet_that_falls_back_to_chance_is_told_of() -> None:
    def row(smallest: float, largest: float) -> dict[str, float]:
        return {"step": 9, "subnet/smallest/top1": smallest, "subnet/largest/top1": largest}

    assert collapsed([], row(0.1, 0.1), 10) == {}  # never learnt
    assert collapsed([row(0.1, 0.19)], row(0.1, 0.1), 10) == {}
    assert collapsed([row(0.5, 0.6)], row(0.13, 0.3), 10) == {}
    said = collapsed([row(0.1, 0.1), row(0.1, 0.6)], row(0.1, 0.12), 10)
    assert set(said) == {"collapse"} and "largest fell to chance (10%)" in said["collapse"]
    assert "smallest" not in said["collapse"]
