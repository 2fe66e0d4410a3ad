"""Distances of gradients in a run: what is run for them, what they are a mean of, that they change nothing; what is shown."""
from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from split_runs import DATA, EDGES, EPOCH_STEPS, SEED, built, gm, go, split_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from nas import checkpoint
from nas.build import Built
from nas.engine import moment, seed_from
from nas.splits import measure as measuring
from nas.splits.gradients import shared
from nas.splits.measure import Measured, cuts, decide, measure
from nas.splits.split import Split
from nas.splits.tree import read_split
from nas.strategies.darts import DARTS
from nas.strategies.snas import SNAS
from nas.strategies.spos import SPOS
from search_spaces import nats
from search_spaces.space import Mixture

OTHERS = [name for name in nats.NAMES if name not in EDGES]


def trained(split: Split, strategy: Any = None) -> Built:
    """The root after two steps, with gradients that lie about."""
    made = built(split, strategy)
    torch.manual_seed(seed_from(SEED, "start"))
    made.strategy.start(made.setup)
    feed = DATA.feed(SEED, "cpu")
    for step in range(EPOCH_STEPS):
        made.strategy.update(feed, moment(step, made.setup.steps, EPOCH_STEPS, SEED))
    for p in made.net.parameters():
        p.grad = torch.full_like(p, 0.5)
    return made


def distances(made: Built, split: Split, folder: Path, stop: Any = lambda: None) -> Measured:
    found = measure(made, split, 0, folder, SEED, EPOCH_STEPS, stop)
    assert isinstance(found, Measured)
    return found


def digest(made: Built, feed: Any) -> dict[str, str]:
    """Of everything that a split must not touch."""

    def of(value: Any) -> str:
        file = io.BytesIO()
        torch.save(value, file)
        return hashlib.sha256(file.getvalue()).hexdigest()

    net: nn.Module = made.net
    return {
        "parameters": of([p.detach() for p in net.parameters()]), "buffers": of(list(net.buffers())),
        "gradients": of([p.grad for p in net.parameters()]), "modes": of([module.training for module in net.modules()]),
        "strategy": of(checkpoint.state_of(made.strategy)), "feed": of(feed.state_dict()),
        "built": of([made.step, made.finished, made.setup.steps]), "wants": of([p.requires_grad for p in net.parameters()]),
    }  # fmt: skip


# -- law 7, and more ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: DARTS(order=1), SNAS, SPOS], ids=["darts", "snas", "spos"])
@pytest.mark.parametrize("others", ["strategy", "sample"])
def test_measuring_changes_nothing(make: Any, others: str, tmp_path: Path) -> None:
    split = gm([1], others=others, samples=2)
    made, feed = trained(split, make()), DATA.feed(SEED, "cpu")
    feed("train"), feed("valid")
    made.net.eval()  # as recalibration may have left a part of it
    next(made.net.children()).train()
    before = digest(made, feed)
    found = distances(made, split, tmp_path)
    decide(made, found, split, 0)
    assert digest(made, feed) == before and found.repeats == 2
    made.net.train()
    twin = trained(split, make())  # what the next step does follows from its number alone
    metrics = []
    for one in (made, twin):
        for p in one.net.parameters():
            p.grad = None
        now, draw = moment(EPOCH_STEPS, one.setup.steps, EPOCH_STEPS, SEED), DATA.feed(SEED, "cpu")
        metrics.append({name: float(value) for name, value in one.strategy.update(draw, now).items()})
    assert metrics[0] == metrics[1]
    assert all(torch.equal(p, q) for p, q in zip(made.net.parameters(), twin.net.parameters()))


# -- what is run --------------------------------------------------------------------------------------------------------


def watched(made: Built, split: Split, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Measured, list[Any]]:
    """The distances, and of every comparison (D, images, what the net ran for each option, parameters compared)."""
    calls, match = list[Any](), measuring.match

    def spy(net: Any, loss: Any, batch: Any, setting_of: Any, options: Any, params: Any) -> np.ndarray:
        ran = list[Mapping[str, Any]]()
        hook = net.register_forward_pre_hook(lambda _, given: ran.append(dict(given[1])))
        D = match(net, loss, batch, setting_of, options, params)
        hook.remove()
        assert net is made.net and loss is made.setup.loss and tuple(options) == nats.OPS
        calls.append((D, batch.index.tolist(), ran, params))
        return D

    monkeypatch.setattr(measuring, "match", spy)
    return distances(made, split, folder), calls


def plainly(said: Any) -> Any:
    return (said.options, tuple(said.weights.tolist()), said.active) if isinstance(said, Mixture) else said


def test_the_others_are_what_the_strategy_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of DARTS: softmax of alpha, without gradient, the tested edge at one operation with weight 1."""
    split = gm([1], leave_out=["stem.*", "classifier.*"])
    made = trained(split)
    found, calls = watched(made, split, tmp_path, monkeypatch)
    soft = {name: plainly(said) for name, said in made.strategy.arch(moment(2, 6, 2, SEED)).items()}
    assert len(calls) == 4 and len({tuple(images) for _, images, *_ in calls}) == 2  # two batches, two edges each
    for k, (_, images, ran, params) in enumerate(calls):
        name = EDGES[k % 2]
        assert images == calls[k - k % 2][1]
        assert [said[name] for said in ran] == list(nats.OPS)
        for said in ran:
            assert {other: plainly(said[other]) for other in said if other != name} == {
                other: soft[other] for other in soft if other != name}  # fmt: skip
            assert not any(s.weights.requires_grad for s in said.values() if isinstance(s, Mixture))
        names = {id(p): n for n, p in made.net.named_parameters()}
        assert not any(names[id(p)].startswith(("stem", "classifier")) for p in params)
        assert [id(p) for p in params] == [id(p) for p in shared(made.net, name, split.leave_out)]
    for i, name in enumerate(EDGES):
        expected = (calls[i][0] + calls[i + 2][0]) / 2
        assert np.allclose(found.means()[name], expected, rtol=0, atol=1e-15) and not np.allclose(calls[i][0], calls[i + 2][0])
    assert found.passes == 10 and list(found.options) == EDGES


def test_a_kept_weight_is_that_of_the_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = gm([1], keep_weight=True, repeats=1)
    made = trained(split)
    _, calls = watched(made, split, tmp_path, monkeypatch)
    soft: Any = made.strategy.arch(moment(2, 6, 2, SEED))
    for (_, _, ran, _), name in zip(calls, EDGES):
        assert [said[name].options for said in ran] == [(op,) for op in nats.OPS]
        assert [said[name].weights.item() for said in ran] == soft[name].weights.tolist()


@pytest.mark.parametrize("make, others", [(SNAS, "strategy"), (SPOS, "strategy"), (lambda: DARTS(order=1), "sample")],
                         ids=["snas", "spos", "sample"])  # fmt: skip
def test_every_sample_is_another_draw_of_the_others(
    make: Any, others: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held while the options of one edge are compared, on one batch; their mean counts as one repeat."""
    split = gm([1], others=others, samples=3, choices=EDGES[:1])
    found, calls = watched(made := trained(split, make()), split, tmp_path, monkeypatch)
    assert len(calls) == 6 and len({tuple(images) for _, images, *_ in calls}) == 2
    drawn = []
    for _, _, ran, _ in calls:
        (rest,) = {tuple((name, plainly(said[name])) for name in OTHERS) for said in ran}
        drawn.append(rest)
    assert len(set(drawn)) == 6
    if others == "sample":
        assert all(said in nats.OPS for rest in drawn for _, said in rest)
    expected = np.mean([D for D, *_ in calls], axis=0)
    assert np.allclose(found.means()[EDGES[0]], expected, rtol=0, atol=1e-14)
    again, _ = watched(made, split, tmp_path / "other", monkeypatch)
    assert torch.equal(again.sums[EDGES[0]], found.sums[EDGES[0]])


@pytest.fixture(autouse=True)
def places(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()


# -- what follows -------------------------------------------------------------------------------------------------------


def planted(made: Built, split: Split, near: Mapping[str, tuple[int, ...]]) -> Measured:
    """Two repeats that say: the options ``near`` of an edge agree, and so do the others of it."""
    found = Measured(made, split, 0)
    for name, group in near.items():
        inside = np.array([i in group for i in range(5)])
        found.sums[name] = torch.from_numpy(np.where(inside[:, None] == inside[None], 0.1, 1.0) * 2)
    found.repeats = 2
    return found


def test_the_best_groups_of_the_best_choice_are_split(tmp_path: Path) -> None:
    split = gm([1], repeats=2)
    made = built(split)
    found = planted(made, split, {EDGES[0]: (0, 2, 4), EDGES[1]: (1, 2)})
    found.sums[EDGES[1]] *= 1.5
    said = decide(made, found, split, 0)
    assert said["choice"] == EDGES[1]
    assert said["groups"] == [["none", "nor_conv_3x3", "avg_pool_3x3"], ["skip_connect", "nor_conv_1x1"]]
    assert (said["passes"], said["images"], said["repeats"], said["samples"]) == (20, 320, 2, 1)
    one = said["measured"][EDGES[0]]
    assert one["groups"] == [["none", "nor_conv_1x1", "avg_pool_3x3"], ["skip_connect", "nor_conv_3x3"]]
    assert one["within"] == pytest.approx(0.4) and one["cut"] == pytest.approx(6.0)
    split.rule = "within"
    assert decide(made, found, split, 0)["choice"] == EDGES[0]


def test_no_group_is_without_an_architecture(tmp_path: Path) -> None:
    """NB201: none alone on the first edge leaves node 1 without input. Where gradients say so, the next best is taken."""
    split = gm([1], repeats=2)
    made = built(split)
    found = planted(made, split, {EDGES[0]: (0,), EDGES[1]: (0,)})
    best = cuts(found, split, 0)
    assert best[EDGES[1]].groups == ((0,), (1, 2, 3, 4))
    assert all(len(group) > 1 or 0 not in group for group in best[EDGES[0]].groups)
    narrow = built(split, part={EDGES[0]: ["none", "skip_connect"], EDGES[1]: ["none", "skip_connect"]})
    assert list(Measured(narrow, split, 0).options) == EDGES[1:]


def test_there_is_nothing_left_to_split() -> None:
    split = gm([1], groups=3)
    narrow = built(split, part={name: list(nats.OPS[1:3]) for name in EDGES})
    with pytest.raises(ValueError, match="none has options left for 3 groups of 1 or more"):
        Measured(narrow, split, 0)
    assert list(Measured(built(split), split, 0).options) == EDGES


# -- what is shown ------------------------------------------------------------------------------------------------------


def tags(folder: Path, kind: str) -> set[str]:
    return set(EventAccumulator(str(folder), {"images": 0, "scalars": 0, "tensors": 0}).Reload().Tags()[kind])


def test_what_a_run_shows_of_its_splits(tmp_path: Path) -> None:
    """TensorBoard: pictures, cuts, tree; report.md: the tree, the tables, what measuring cost. A finished run says the same."""
    split = gm([1])
    found = go(tmp_path / "run", split, pictures=True)
    said, report = read_split(found.folder / "split.json"), (found.folder / "report.md").read_text()
    board = found.folder / "split"
    assert tags(board, "images") == {"split/similarity", "split/cut"}
    assert tags(board, "scalars") == {f"split/{what}/{edge}" for what in ("cut", "within") for edge in EDGES}
    assert tags(board, "tensors") == {"split/table/text_summary"}
    assert tags(found.folder / "tree", "tensors") == {"split/tree/text_summary"}
    scalars = EventAccumulator(str(board)).Reload().Scalars(f"split/cut/{said['choice']}")
    assert [(event.step, round(event.value, 3)) for event in scalars] == [
        (EPOCH_STEPS, round(said["measured"][said["choice"]]["cut"], 3))]  # fmt: skip
    # 3 epochs on each path: 1 + 2 x 2 epochs of 2 steps of 2 passes of 16 images; 2 x 10 passes to measure
    assert "Image-passes: training 320, splitting 320 (100.0% more)." in report and said["images"] == 320
    assert f"split {said['choice']} (cut {said['measured'][said['choice']]['cut']:.3g})" in report
    assert "The root supernet, at its end:" in report and f"**{said['choice']}**" in report
    go(tmp_path / "run", split)
    assert (found.folder / "report.md").read_text() == report
    assert tags(board, "images") == {"split/similarity", "split/cut"}


def test_the_tree_is_shown_while_it_grows(tmp_path: Path) -> None:
    made = split_only(tmp_path / "run", gm([1]))
    events = EventAccumulator(str(tmp_path / "run" / "tree"), {"tensors": 0}).Reload()
    (event,) = events.Tensors("split/tree/text_summary")
    (text,) = event.tensor_proto.string_val
    assert text.decode().count("architectures") == 3 and "picked" not in text.decode() and "top-1" not in text.decode()
    assert made.level(1)

