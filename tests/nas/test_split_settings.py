"""What a supernet runs while one choice is tried out, option by option (``nas.splits.gradients.fixed``): the choice counts, all
others stay as they are, followers follow."""
from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nas.protocols import Batch
from nas.splits.gradients import fixed, match, shared
from search_spaces.mobilenet import COMPOUND, OFAMobileNetV3
from search_spaces.space import Arch, Choice, Mixture, SearchSpace, Setting
from supernets import mobilenet

MOBILE = OFAMobileNetV3(width=0.35, small=True)
DEPTH, KERNEL, EXPAND = "stage0.depth", "stage0.block3.kernel", "stage0.block3.expand"


def plain(said: Mapping[str, Setting]) -> Arch:
    """``said``, which has no mixture."""
    found = {name: value for name, value in said.items() if not isinstance(value, Mixture)}
    assert len(found) == len(said)
    return found


def test_the_depth_that_a_kernel_needs_is_set() -> None:
    shallow = MOBILE.smallest()
    assert shallow[DEPTH] == 2 and KERNEL not in MOBILE.counting(shallow)
    for kernel in (3, 5, 7):
        said = fixed(MOBILE, shallow, KERNEL, kernel, random.Random(0))
        assert said[DEPTH] == 4 and said[KERNEL] == kernel and KERNEL in MOBILE.counting(plain(said))
        for name in shallow:  # what counted stays
            if name in MOBILE.counting(shallow) and name != DEPTH:
                assert said[name] == shallow[name]


def test_what_holds_is_kept_and_what_does_not_is_drawn_among_what_does() -> None:
    third = "stage0.block2.kernel"  # counts at depths 3 and 4
    for depth in (3, 4):
        assert fixed(MOBILE, MOBILE.smallest() | {DEPTH: depth}, third, 5, random.Random(depth))[DEPTH] == depth
    drawn = [fixed(MOBILE, MOBILE.smallest(), third, 5, random.Random(seed))[DEPTH] for seed in range(40)]
    assert set(drawn) == {3, 4} and 8 < drawn.count(3) < 32


def test_all_options_meet_the_same_others() -> None:
    """Whatever has to be drawn, one generator as it is gives one draw, and is not moved."""
    rng = random.Random(5)
    for name in (DEPTH, "stage0.block2.kernel", KERNEL):
        shallow = MOBILE.sample(random.Random(1)) | {DEPTH: 2}
        state = rng.getstate()
        said = [fixed(MOBILE, shallow, name, option, rng) for option in MOBILE[name].options]
        assert rng.getstate() == state
        assert all({**other, name: None} == {**said[0], name: None} for other in said)
        rng.random()


def test_settings_that_were_inert_are_drawn() -> None:
    """A canonical arch says the root's first option where nothing counts: no sample, and perhaps forbidden."""
    space = MOBILE.restrict({KERNEL: [5, 7], EXPAND: [4]})
    shallow = space.canonical(space.smallest())
    assert shallow[KERNEL] == 3 and shallow[DEPTH] == 2
    drawn = [fixed(space, shallow, DEPTH, 4, random.Random(seed)) for seed in range(30)]
    for said in drawn:
        space.check(plain(said))
        assert said[EXPAND] == 4
    assert {said[KERNEL] for said in drawn} == {5, 7} and {said["stage0.block2.kernel"] for said in drawn} == {3, 5, 7}
    assert {said["stage0.block1.kernel"] for said in drawn} == {shallow["stage0.block1.kernel"]}  # it counted


def test_followers_follow() -> None:
    """CompOFA's expand follows the depth, which the tested kernel moves; a tied kernel follows the tested one."""
    space = MOBILE
    for b in range(4):
        space = space.tie(f"stage0.block{b}.expand", DEPTH, COMPOUND)
    space = space.tie("stage1.block0.kernel", "stage0.block0.kernel", {3: 5, 5: 7, 7: 3})
    shallow = space.smallest()
    said = fixed(space, shallow, KERNEL, 7, random.Random(0))
    assert said[DEPTH] == 4 and [said[f"stage0.block{b}.expand"] for b in range(4)] == [6] * 4
    assert fixed(space, shallow, DEPTH, 3, random.Random(0))[EXPAND] == 4
    said = fixed(space, shallow, "stage0.block0.kernel", 7, random.Random(0))
    assert said["stage1.block0.kernel"] == 3 and said[DEPTH] == shallow[DEPTH]
    space.check(plain(said))
    with pytest.raises(ValueError, match=r"stage1.block0.kernel follows stage0.block0.kernel"):
        fixed(space, shallow, "stage1.block0.kernel", 7, random.Random(0))


DEEP = SearchSpace([
    Choice("top", (1, 2, 3)), Choice("middle", (1, 2, 3), needs=(("top", (2, 3)),)),
    Choice("low", (1, 2), needs=(("middle", (3,)),)), Choice("other", (1, 2), needs=(("top", (3,)), ("low", (2,)))),
], {})  # fmt: skip


def test_needs_hold_all_the_way_up() -> None:
    start = {"top": 1, "middle": 1, "low": 1, "other": 1}
    for seed in range(10):
        said = fixed(DEEP, start, "low", 2, random.Random(seed))
        assert said["middle"] == 3 and said["top"] in (2, 3) and said["low"] == 2
        said = fixed(DEEP, start, "other", 2, random.Random(seed))
        assert (said["top"], said["middle"], said["low"], said["other"]) == (3, 3, 2, 2)  # top: {2, 3} and {3}
    assert {fixed(DEEP, start, "low", 2, random.Random(seed))["top"] for seed in range(20)} == {2, 3}
    assert fixed(DEEP, {**start, "top": 2, "middle": 3}, "low", 1, random.Random(0))["top"] == 2
    assert fixed(DEEP, start, "top", 1, random.Random(0))["top"] == 1


def test_a_need_that_follows_moves_its_leader() -> None:
    space = DEEP.tie("middle", "top", {1: 1, 2: 2, 3: 3})
    said = fixed(space, {"top": 2, "middle": 2, "low": 1, "other": 1}, "low", 2, random.Random(0))
    assert (said["top"], said["middle"], said["low"]) == (3, 3, 2)


def test_two_needs_that_follow_one_leader_hold_together() -> None:
    """left = 1, 1, 2, 2 and right = 1, 2, 1, 2 follow lead = 1, 2, 3, 4: both are 2 at 4 alone, left at 3 too."""
    space = SearchSpace([Choice("lead", (1, 2, 3, 4)), Choice("left", (1, 2)), Choice("right", (1, 2)),
                         Choice("last", (1, 2), needs=(("left", (2,)), ("right", (2,))))], {})  # fmt: skip
    space = space.tie("left", "lead", {1: 1, 2: 1, 3: 2, 4: 2}).tie("right", "lead", {1: 1, 2: 2, 3: 1, 4: 2})
    for seed in range(8):
        said = fixed(space, {"lead": 1, "left": 1, "right": 1, "last": 1}, "last", 2, random.Random(seed))
        assert said == {"lead": 4, "left": 2, "right": 2, "last": 2}
    with pytest.raises(ValueError, match="last cannot count in this space: lead = 1, 2, 3"):
        fixed(space.restrict({"lead": [1, 2, 3]}), {"lead": 1, "left": 1, "right": 1, "last": 1}, "last", 2, random.Random(0))


@pytest.mark.parametrize(("space", "name", "option", "line"), [
    (DEEP, "lower", 1, "lower is not a choice"), (DEEP, "low", 3, "low = 3 is not in this space"),
    (DEEP.restrict({"middle": [1, 2]}), "low", 1, "low cannot count in this space: middle = 1, 2"),
    (DEEP.restrict({"top": [1, 2]}), "other", 1, "other cannot count in this space: top = 1, 2"),
])  # fmt: skip
def test_what_cannot_be_fixed_is_refused(space: SearchSpace, name: str, option: int, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        fixed(space, {"top": 1, "middle": 1, "low": 1, "other": 1}, name, option, random.Random(0))


def test_a_setting_names_every_choice() -> None:
    with pytest.raises(ValueError, match="says nothing of middle"):
        fixed(DEEP, {"top": 1, "low": 1, "other": 1}, "top", 1, random.Random(0))


def test_mixtures_stay_but_for_their_graph() -> None:
    """Elsewhere as they are, detached; where one computes an option that makes the choice count, it is kept."""
    weights = {name: torch.tensor(w, dtype=torch.float64, requires_grad=True) for name, w in
               (("top", [0.2, 0.3, 0.5]), ("middle", [0.0, 1.0, 0.0]), ("other", [0.4, 0.6]))}
    start: dict[str, Setting] = {
        "top": Mixture((1, 2, 3), weights["top"]), "middle": Mixture((1, 2, 3), weights["middle"], (1,), "ones"),
        "low": 1, "other": Mixture((1, 2), weights["other"], (0,), "gate"),
    }  # fmt: skip
    said = fixed(DEEP, start, "low", 2, random.Random(0))
    for name in ("top", "other"):
        kept, was = said[name], start[name]
        assert isinstance(kept, Mixture) and isinstance(was, Mixture)
        assert kept[0] == was[0] and kept[2:] == was[2:]
        assert torch.equal(kept.weights, was.weights) and not kept.weights.requires_grad and was.weights.requires_grad
    assert said["middle"] == 3 and said["low"] == 2  # only its 2 is computed, and low needs 3


def test_kept_weights_and_their_followers() -> None:
    space = DEEP.tie("middle", "top", {1: 1, 2: 3, 3: 2})
    mixture = Mixture((1, 2, 3), torch.tensor([0.2, 0.3, 0.5]), (1, 2))
    start: dict[str, Setting] = {"top": mixture, "middle": mixture._replace(options=(1, 3, 2)), "low": 1, "other": 1}
    said = fixed(space, start, "top", 2, random.Random(0), keep_weight=True)
    top, middle = said["top"], said["middle"]
    assert isinstance(top, Mixture) and isinstance(middle, Mixture) and (top.options, middle.options) == ((2,), (3,))
    assert top.weights.tolist() == middle.weights.tolist() == pytest.approx([0.3])
    with pytest.raises(ValueError, match="top = 1 has no weight in a mixture that computes 2, 3"):
        fixed(space, start, "top", 1, random.Random(0), keep_weight=True)
    assert fixed(space, start, "low", 2, random.Random(0), keep_weight=True)["low"] == 2  # a plain value has no weight but 1


@pytest.mark.slow
def test_kernels_of_a_block_that_was_cut_off_differ_once_it_counts() -> None:
    net = mobilenet.OFAMobileNetV3(MOBILE, channels=3, classes=4).double()
    net.reset(torch.Generator().manual_seed(1))
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    batch, shallow = Batch(x, torch.arange(4), torch.arange(4)), MOBILE.smallest()
    params = shared(net, KERNEL, ["stages.{0}.{1}.*"])
    inert = match(net, F.cross_entropy, batch, lambda kernel: shallow | {KERNEL: kernel}, (3, 5, 7), params)
    assert np.abs(inert).max() < 1e-4  # three times the same network
    rng = random.Random(0)
    D = match(net, F.cross_entropy, batch, lambda kernel: fixed(MOBILE, shallow, KERNEL, kernel, rng), (3, 5, 7), params)
    assert D[np.triu_indices(3, 1)].min() > 1e-3
