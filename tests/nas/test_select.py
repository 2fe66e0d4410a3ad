"""Selection under limits, on scores that a formula gives: what is read, kept and picked, and going on after a kill."""
from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nas.evaluate
import nas.select
from nas import ranks
from nas.build import Built, gather
from nas.data import Data
from nas.evaluate import Scores
from nas.front import hypervolume, on_front
from nas.limits import Select
from nas.losses import CrossEntropy
from nas.picks import three
from nas.scores import Score, ScoreFile
from nas.searchers.evolution import Evolution
from nas.searchers.random import Random
from nas.select import Picked, draw, select, write
from nas.strategies.rsps import RSPS
from search_spaces import nats
from search_spaces.arch import read_arch
from search_spaces.resnet import CifarResNet
from supernets.resnet import ResNet

CONFIG = {"seed": 1}
STEP = 7


@pytest.fixture(scope="module")
def untrained() -> Built:
    space = CifarResNet(14, widths=[2, 3, 4])
    data = Data(name="digits", batch_size=16, limit=60, valid_fraction=0.5)
    built = gather(data, ResNet(space, 1, 10), RSPS(), CrossEntropy(), epochs=1, seed=1, device=torch.device("cpu"),
                   group=ranks.Ranks(0, 1, 0, True))  # fmt: skip
    built.strategy.start(built.setup)
    return built


class Reader:
    """In place of ``score_archs``: top-1 from the widths, so that what is wide is accurate, but not always."""

    def __init__(self) -> None:
        self.read: list[dict[str, Any]] = []
        self.calls: list[tuple[int, int, int | None]] = []

    def __call__(
        self, net: Any, archs: Sequence[Mapping[str, Any]], data: Data, split: str, device: Any, bn_images: int,
        limit: int | None,
    ) -> list[Scores]:  # fmt: skip
        self.read += [dict(arch) for arch in archs]
        self.calls.append((len(archs), bn_images, limit))
        return [Scores(top1(arch), 1.0, 30, (), ()) for arch in archs]


def top1(arch: Mapping[str, Any]) -> float:
    values = list(arch.values())
    return round(0.5 + 0.01 * sum(values) + 0.05 * math.sin(sum(k * v for k, v in enumerate(values, 1))), 6)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.setattr(nas.evaluate, "score_archs", found := Reader())
    return found


def evolution() -> Evolution:
    return Evolution(population=12, parents=4, mutations=6, crossovers=6, generations=3, seed=3)


def picked(built: Built, limits: Select, folder: Path, searcher: Any = None, **more: Any) -> Picked:
    found = select(built, searcher or evolution(), limits, folder, CONFIG, STEP, **more)
    assert isinstance(found, Picked)
    return found


def rows(folder: Path) -> list[str]:
    return [line for path in sorted((folder / "picks").glob("scores-*.jsonl")) for line in path.read_text().splitlines()[1:]]


# -- what is picked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [
    {"macs_at_most": "40%"}, {"macs_at_least": "50%", "macs_at_most": "60%"}, {"params_at_most": "30%", "macs_at_most": "70%"},
    {},
])  # fmt: skip
def test_the_best_of_what_was_read_within_the_limits(
    untrained: Built, reader: Reader, tmp_path: Path, given: dict[str, Any]
) -> None:
    found = picked(untrained, Select(**given), tmp_path)
    assert found.fresh == found.asked == len(reader.read) and 40 < found.asked <= 12 + 3 * 12
    prices = [untrained.prices(arch) for arch in reader.read]
    full = untrained.prices(untrained.space.largest())
    for name, amount in given.items():
        price, side = name.split("_", 1)
        bound = float(amount[:-1]) / 100 * full[price]
        assert all(cost[price] <= bound if side == "at_most" else cost[price] >= bound for cost in prices)
    best = max(reader.read, key=top1)
    assert found.best.score == found.score.top1 == top1(best) and top1(found.best.arch) == top1(best)
    scores, macs = np.array([top1(arch) for arch in reader.read]), np.array([cost["macs"] for cost in prices])
    assert [f.score for f in found.front] == sorted(scores[on_front(macs, scores)])
    assert {key: found.best.costs[key] for key in ("macs", "params")} == {
        key: untrained.prices(found.best.arch)[key] for key in ("macs", "params")}  # fmt: skip


def test_no_more_is_read_than_allowed(untrained: Built, reader: Reader, tmp_path: Path) -> None:
    found = picked(untrained, Select(evaluations=21, images=8, bn_images=5), tmp_path)
    assert found.asked == len(reader.read) == 21
    assert [call[1:] for call in reader.calls] == [(5, 8)] * len(reader.calls) and max(call[0] for call in reader.calls) <= 16


def test_limits_that_nothing_meets_are_refused(untrained: Built, reader: Reader, tmp_path: Path) -> None:
    small, large = (untrained.prices(arch)["macs"] for arch in (untrained.space.smallest(), untrained.space.largest()))
    with pytest.raises(ValueError, match=f"macs at most 3 .smallest network {small:,}, which is .*; largest {large:,}, 100.0%"):
        select(untrained, evolution(), Select(macs_at_most=3), tmp_path, CONFIG, STEP)
    with pytest.raises(ValueError, match="low <= high"):
        select(untrained, evolution(), Select(macs_at_most="40%", macs_at_least="41%"), tmp_path, CONFIG, STEP)
    assert not reader.read and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "words"), [
    ({"macs_at_most": "much"}, "select.macs_at_most = 'much' is not a budget"), ({"params_at_least": -1}, "Allowed: 0 or more"),
    ({"macs_at_most": "nan"}, "Allowed: 0 or more"), ({"evaluations": 0}, "evaluations = 0 is too few"),
    ({"bn_images": 0}, "bn_images = 0 is too few"), ({"latency_at_most": 1}, "by which table"),
])  # fmt: skip
def test_bad_limits_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Select(**given)


def test_amounts_in_every_form(untrained: Built) -> None:
    tables = Select().tables(untrained.costs)
    full = untrained.prices(untrained.space.root.largest())
    given = Select(macs_at_most="12M", macs_at_least=7, params_at_most="0.5k", params_at_least="10%")
    least = math.ceil(0.1 * full["params"])
    assert given.limits(tables, untrained.space) == [("macs", 7.0, 12e6), ("params", least, 500.0)]
    assert Select(macs_at_least="3G").limits(tables, untrained.space) == [("macs", 3e9, math.inf)]
    assert Select().limits(tables, untrained.space) == []


def test_latency_is_a_price_too(untrained: Built, reader: Reader, tmp_path: Path) -> None:
    from nas.latency import Row, write_latency

    shapes = {(layer.op, shape) for layer in untrained.net.layers((8, 8)) for arch in [untrained.space.largest()]
              if (shape := layer.shape(*(arch[name] for name in layer.on))) is not None}  # fmt: skip
    write_latency(tmp_path / "t.csv", [Row(op, shape, 0.5) for op, shape in shapes])
    one = dataclasses.replace(untrained, space=untrained.space.restrict(
        {name: [value] for name, value in untrained.space.largest().items()}))  # fmt: skip
    with pytest.raises(ValueError, match=r"t\.csv has no row"):  # the table is of the largest network alone
        select(one, evolution(), Select(latency=str(tmp_path / "t.csv"), latency_at_most="100%"), tmp_path, CONFIG, STEP)


# -- what is kept --------------------------------------------------------------------------------------------------------


def test_no_subnet_is_read_twice(untrained: Built, reader: Reader, tmp_path: Path) -> None:
    first = picked(untrained, Select(macs_at_most="60%"), tmp_path)
    before = len(reader.read)
    again = picked(untrained, Select(macs_at_most="60%"), tmp_path)
    assert (again.fresh, again.asked) == (0, first.asked) and len(reader.read) == before
    assert again.best == first.best and again.score == first.score
    other = picked(untrained, Select(macs_at_most="40%"), tmp_path)
    assert 0 < other.fresh < other.asked == first.asked  # what meets both limits was known
    keys = [untrained.space.key(arch) for arch in reader.read]
    assert len(keys) == len(set(keys)) == before + other.fresh == len(rows(tmp_path)) == len(other.scores)
    wide = picked(untrained, Select(), tmp_path / "elsewhere")
    assert wide.fresh == wide.asked


@pytest.mark.parametrize("change", [{"bn_images": 99}, {"images": 9}, {"step": STEP + 1}])
def test_what_a_score_depends_on_is_part_of_its_key(
    untrained: Built, reader: Reader, tmp_path: Path, change: dict[str, Any]
) -> None:
    picked(untrained, Select(evaluations=10), tmp_path)
    limits = Select(evaluations=10, **{key: value for key, value in change.items() if key != "step"})
    found = select(untrained, evolution(), limits, tmp_path, CONFIG, change.get("step", STEP))
    assert isinstance(found, Picked) and found.fresh == 10 and len(list((tmp_path / "picks").glob("scores-*"))) == 2


def test_other_data_or_augmentation_are_read_anew_and_workers_are_not(
    untrained: Built, reader: Reader, tmp_path: Path
) -> None:
    def fresh(**data: Any) -> int:
        config = {**CONFIG, "data": {"name": "digits", "augment": [], "workers": 0, **data}}
        found = select(untrained, evolution(), Select(evaluations=10), tmp_path, config, STEP)
        assert isinstance(found, Picked)
        return found.fresh

    assert [fresh(), fresh(workers=4), fresh(augment=["crop"]), fresh(root="elsewhere")] == [10, 0, 10, 10]


def test_more_images_than_there_are_is_all_of_them(untrained: Built, reader: Reader, tmp_path: Path) -> None:
    picked(untrained, Select(evaluations=5), tmp_path)
    assert picked(untrained, Select(evaluations=5, images=10_000), tmp_path).fresh == 0


def test_the_file_of_scores(tmp_path: Path) -> None:
    space = CifarResNet(14)
    archs = [space.largest(), space.smallest()]
    codes = space.encode(archs)
    file = ScoreFile(tmp_path, space, {"step": 1})
    file.add(codes[:1], [Score(0.25, math.inf, 30)])
    file.add(codes, [Score(0.5, 1.0, 30), Score(0.75, 1.5, 30)])
    assert file.of(codes) == [Score(0.25, None, 30), Score(0.75, 1.5, 30)]
    with open(file.path, "a") as torn:
        torn.write('{"code": [1, 2')
    again = ScoreFile(tmp_path, space, {"step": 1})
    assert again.of(codes) == file.of(codes) and np.array_equal(again.all()[0], codes) and len(again) == 2
    assert file.path.read_text().endswith("}\n")
    assert ScoreFile(tmp_path, space, {"step": 2}).of(codes) == [None, None]
    text = file.path.read_text().splitlines()
    file.path.write_text("\n".join([text[0], '{"code": [999]}', text[1]]) + "\n")
    with pytest.raises(ValueError, match=r"line 2: .*Delete the file"):
        ScoreFile(tmp_path, space, {"step": 1})


def test_isomorphic_cells_have_scores_of_their_own(tmp_path: Path) -> None:
    space = nats.Topology(C=4, N=1)
    file = ScoreFile(tmp_path, space, {})
    pairs = [space.sample(random.Random(i)) for i in range(400)]
    same = next((a, b) for a in pairs for b in pairs if a != b and space.key(a) == space.key(b))
    codes = space.encode(same)
    file.add(codes[:1], [Score(0.5, 1.0, 3)])
    assert file.of(codes) == [Score(0.5, 1.0, 3), None]  # in shared weights they run different edges


# -- going on ------------------------------------------------------------------------------------------------------------


class After:
    """A reason to stop after so many chunks."""

    def __init__(self, chunks: int) -> None:
        self.left = chunks

    def __call__(self) -> str | None:
        self.left -= 1
        return "terminated" if self.left <= 0 else None


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("lost", ["nothing", "state", "line"])
def test_a_stopped_selection_ends_like_an_unbroken_one(
    untrained: Built, reader: Reader, tmp_path: Path, chunks: int, lost: str
) -> None:
    limits = Select(macs_at_most="60%", evaluations=40)
    whole = picked(untrained, limits, tmp_path / "whole")
    assert select(untrained, evolution(), limits, tmp_path / "broken", CONFIG, STEP, After(chunks)) == "terminated"
    done = len(rows(tmp_path / "broken"))
    assert 0 < done < whole.asked
    if lost != "nothing":
        (tmp_path / "broken" / "picks" / f"{limits.named()}.pt").unlink()
    if lost == "line":
        path = next((tmp_path / "broken" / "picks").glob("scores-*.jsonl"))
        path.write_text(path.read_text()[:-10])
    resumed = picked(untrained, limits, tmp_path / "broken")
    assert resumed.best == whole.best and resumed.front == whole.front and resumed.asked == whole.asked
    assert resumed.fresh == whole.asked - done + (lost == "line")
    if lost != "line":
        assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_scores_that_were_deleted_are_not_missed(untrained: Built, reader: Reader, tmp_path: Path) -> None:
    first = picked(untrained, Select(evaluations=20), tmp_path)
    first.scores.path.unlink()
    found = picked(untrained, Select(evaluations=20), tmp_path)
    assert (found.best, found.score, found.asked) == (first.best, first.score, 20) and found.fresh == 1


def test_more_evaluations_go_on_and_fewer_begin_anew(untrained: Built, reader: Reader, tmp_path: Path) -> None:
    few = picked(untrained, Select(evaluations=15), tmp_path)
    more = picked(untrained, Select(evaluations=30), tmp_path)
    assert (more.asked, more.fresh) == (30, 15) and more.best.score >= few.best.score
    assert picked(untrained, Select(evaluations=30), tmp_path / "new").best == more.best
    less = picked(untrained, Select(evaluations=15), tmp_path)
    assert (less.fresh, less.asked) == (0, 15) and less.best == more.best  # what is known counts, whoever asked for it


def test_of_equal_accuracies_the_lower_loss_is_picked_then_the_cheaper(
    untrained: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(net: Any, archs: Sequence[Any], *more: Any) -> list[Scores]:
        return [Scores(0.5, 1.0, 30, (), ()) for _ in archs]

    monkeypatch.setattr(nas.evaluate, "score_archs", read)
    found = picked(untrained, Select(evaluations=20), tmp_path)
    codes, _ = found.scores.all()
    macs = untrained.costs.batch(codes)
    assert found.best.costs["macs"] == macs.min() < macs.max()
    dearest = codes[[int(macs.argmax())]]
    found.scores.path.write_text(found.scores.path.read_text().replace(
        f'"code": {dearest[0].tolist()}, "top1": 0.5, "loss": 1.0', f'"code": {dearest[0].tolist()}, "top1": 0.5, "loss": 0.9'))
    assert picked(untrained, Select(evaluations=20), tmp_path).best.costs["macs"] == macs.max()


def test_another_searcher_begins_anew_with_the_scores_that_are_known(untrained: Built, reader: Reader, tmp_path: Path) -> None:
    first = picked(untrained, Select(), tmp_path, Random(trials=20, seed=3))
    found = picked(untrained, Select(), tmp_path, Random(trials=25, seed=3))
    assert found.asked == 25 and found.fresh == 5 and found.best.score >= first.best.score


# -- what is written -----------------------------------------------------------------------------------------------------


def test_what_is_written(untrained: Built, reader: Reader, tmp_path: Path) -> None:
    limits = Select(macs_at_most="60%", bn_images=77)
    found = picked(untrained, limits, tmp_path)
    write(untrained, found, limits, CONFIG, tmp_path / "deep" / "mine.json")
    file = read_arch(tmp_path / "deep" / "mine.json", expect=untrained.space)
    assert file.arch == untrained.space.canonical(found.best.arch)
    assert file.metrics["top1"] == {"value": found.score.top1, "split": "valid", "n": 30, "weights": "supernet",
                                    "bn": "recalibrated", "bn_images": 77}  # fmt: skip
    said = file.provenance
    assert (said["limits"], said["scored"], said["step"]) == ({"macs_at_most": "60%"}, 48, STEP) and said["strategy"] == "rsps"
    assert said["searcher"].startswith("Evolution(population=12, parents=4")
    other = picked(untrained, Select(macs_at_most="40%", bn_images=77), tmp_path)
    draw(untrained, other, tmp_path)
    with open(tmp_path / "pareto.csv", newline="") as lines:
        table = list(csv.DictReader(lines))
    assert len(table) == len(reader.read) == found.fresh + other.fresh
    for row in table:
        arch = untrained.space.parse(row["arch"])
        cost = untrained.prices(arch)
        assert (int(row["macs"]), int(row["params"]), float(row["top1"])) == (cost["macs"], cost["params"], top1(arch))
        beaten = any(int(o["macs"]) <= int(row["macs"]) and float(o["top1"]) > float(row["top1"]) for o in table)
        assert (row["front"] == "0") >= beaten
    assert sum(row["front"] == "1" for row in table) >= 2
    assert (tmp_path / "pareto.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and not list(tmp_path.glob(".*part"))


def test_tensorboard_tags(untrained: Built, reader: Reader, tmp_path: Path) -> None:
    limits = Select(macs_at_most="60%")
    found = picked(untrained, limits, tmp_path)
    log = EventAccumulator(str(tmp_path / "picks" / "events" / limits.named()))
    log.Reload()
    last = {tag: log.Scalars(tag)[-1] for tag in ("search/best", "search/front_size", "search/hypervolume")}
    assert last["search/best"].value == pytest.approx(found.best.score) and last["search/best"].step == found.asked
    assert last["search/front_size"].value == len(found.front)
    full = untrained.prices(untrained.space.largest())["macs"]
    area = hypervolume([f.costs["macs"] for f in found.front], [f.score for f in found.front], full)
    assert last["search/hypervolume"].value == pytest.approx(area, rel=1e-6) and 0 < area < 1
    values = [event.value for event in log.Scalars("search/hypervolume")]
    assert values == sorted(values) and len(values) > 2


def test_the_front_and_its_area_by_hand() -> None:
    cost, score = np.array([4.0, 2.0, 1.0, 2.0, 3.0, 1.0]), np.array([0.8, 0.6, 0.5, 0.4, 0.6, 0.5])
    assert on_front(cost, score).tolist() == [True, True, True, False, False, False]
    assert hypervolume([1, 2, 4], [0.5, 0.6, 0.8], 5) == pytest.approx((1 * 0.5 + 2 * 0.6 + 1 * 0.8) / 5)
    assert hypervolume([4, 1, 2], [0.8, 0.5, 0.6], 3) == pytest.approx((0.5 + 0.6) / 3)  # beyond the full cost: nothing
    assert hypervolume([], [], 3) == 0 and len(on_front(np.array([]), np.array([]))) == 0


def test_three_subnets() -> None:
    space = CifarResNet(14, widths=[2, 3, 4])
    found = three(space)
    assert found["smallest"] == space.smallest() and found["largest"] == space.largest()
    for name in space.free:
        options = space[name].options
        if name in space.counting(found["middle"]):
            assert found["middle"][name] == options[(len(options) - 1) // 2]
    space.check(found["middle"])


def test_a_state_that_a_program_may_read(untrained: Built, reader: Reader, tmp_path: Path) -> None:
    limits = Select(evaluations=20)
    found = picked(untrained, limits, tmp_path)
    state = torch.load(tmp_path / "picks" / "best.pt", weights_only=True)
    assert state["asked"] == 20 and state["about"] == found.scores.about == json.loads(json.dumps(found.scores.about))
    searcher = copy.copy(evolution())
    nas.select.prepare(untrained, searcher, limits)
    searcher.load(state["searcher"])
    assert searcher.best() == found.best
