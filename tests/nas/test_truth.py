"""Truth by training: which architectures, how each is trained and read, what a broken one goes on with, what is refused."""
from __future__ import annotations

import csv
import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from split_runs import Enough, breaking

from nas.alone import network_for, prepared
from nas.build import Built, arch_file, assemble, data_of
from nas.evaluate import Scores, score_plain
from nas.ranking import truth
from nas.ranking.truth import COLUMNS, drawn, settings_of, trained_truth
from nas.ranks import Ranks
from nas.recipe import parse, plain_config, search_parser
from nas.run import Run
from nas.strategies.plain import Plain
from search_spaces.resnet import CifarResNet
from search_spaces.space import SearchSpace

RECIPE: dict[str, Any] = {
    "space": {"class_path": "search_spaces.resnet.CifarResNet", "init_args": {"depth": 8, "kind": "tied", "widths": [4, 6, 8]}},
    "supernet": {"class_path": "supernets.resnet.ResNet", "init_args": {"mixing": "interpolate"}},
    "strategy": {"class_path": "nas.strategies.spos.SPOS"},
    "data": {"name": "digits", "limit": 96, "batch_size": 16, "valid_fraction": 0.25, "select_fraction": 0.25},
    "retrain": {"epochs": 50, "plain": {"lr": 0.05, "ema": 0.5}, "loss": {"label_smoothing": 0.1},
                "data": {"batch_size": 24, "augment": ["crop"], "valid_fraction": 0.0, "select_fraction": 0.0}},
}  # fmt: skip
CPU = torch.device("cpu")
RUN = Path("the-run")


def parts(**changes: Any) -> tuple[Built, dict[str, Any]]:
    parser = search_parser()
    config = parse(parser, {**RECIPE, **changes}, [])
    return assemble(config), plain_config(parser, config)


@pytest.fixture(scope="module")
def made() -> tuple[Built, dict[str, Any]]:
    return parts()


def go(made: tuple[Built, dict[str, Any]], out: Path, **more: Any) -> Path:
    return trained_truth(RUN, *made, **{"networks": 3, "epochs": 2, "seed": 4, "out": out, **more})


READ: list[Scores] = []
"""What was read of the networks of ``whole``."""


@pytest.fixture(scope="module")
def whole(made: tuple[Built, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    def reading(*given: Any) -> Scores:
        READ.append(score_plain(*given))
        return READ[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truth, "score_plain", reading)
        return go(made, tmp_path_factory.mktemp("whole") / "truth")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- which networks ---------------------------------------------------------------------------------------------------


def test_architectures_are_distinct_and_more_of_them_begin_with_the_fewer() -> None:
    space = CifarResNet(8, "tied", [4, 6, 8])
    many = drawn(space, 20, seed=1)
    assert len({space.key(arch) for arch in many}) == 20
    assert drawn(space, 5, seed=1) == many[:5] != drawn(space, 5, seed=2)


def test_equal_networks_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    space = CifarResNet(8, "tied", [4, 6, 8])
    monkeypatch.setattr(SearchSpace, "key", lambda own, arch: next(iter(arch.values())))
    found = drawn(space, 4, seed=1)
    assert sorted(next(iter(arch.values())) for arch in found) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"5 different networks: .*CifarResNet\(.* holds 4, as far as random ones show"):
        drawn(space, 5, seed=1)


# ---- how each is trained ------------------------------------------------------------------------------------------------


def test_networks_are_trained_as_retraining_says_on_the_images_of_the_search(made: tuple[Built, dict[str, Any]]) -> None:
    settings = settings_of(made[1], epochs=7, seed=9)
    assert (settings.epochs, settings.seed, settings.weights) == (7, 9, "scratch")
    assert (settings.plain.lr, settings.plain.ema, settings.loss.label_smoothing) == (0.05, 0.5, 0.1)
    assert (settings.data.batch_size, settings.data.augment) == (24, ["crop"])
    mine, searched = data_of(settings), made[0].data
    assert mine.count("train") == 48 and searched.count("select") == 24
    for name in ("train", "valid", "select", "test"):
        assert torch.equal(mine.splits[name].rows, searched.splits[name].rows)


def test_each_row_is_a_training_of_its_own(made: tuple[Built, dict[str, Any]], whole: Path, tmp_path: Path) -> None:
    """The figures of the second network, by the parts that retraining is made of."""
    built, config = made
    found = rows(whole)
    archs = drawn(built.space, 3, seed=4)
    assert whole.name == "truth.csv" and tuple(found[0]) == COLUMNS == ("arch", "top1", "n", "macs", "seed", "epochs")
    assert [row["arch"] for row in found] == [built.space.text(arch) for arch in archs]
    assert [int(row["macs"]) for row in found] == [built.costs.of(arch) for arch in archs]
    assert {(row["n"], row["seed"], row["epochs"]) for row in found} == {("24", "4", "2")}
    settings = settings_of(config, epochs=2, seed=4)
    data = data_of(settings)
    strategy, setup, feed = prepared(network_for(arch_file(built, archs[1], {}, config), settings), settings, data, CPU)
    assert setup.steps == 4  # two epochs of 48 images
    run = Run(tmp_path / "run", {})
    run.fit(strategy, setup, feed, seed=4)
    run.close()
    assert READ[1] == score_plain(strategy.network({}), data, "select", CPU)  # the moving average, as retraining keeps it
    assert [float(row["top1"]) for row in found] == [scores.top1 for scores in READ]
    assert len({row["top1"] for row in found}) > 1
    lines = (whole.parent / "networks" / "001" / "metrics.jsonl").read_bytes()
    assert lines == (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert not list(whole.parent.glob("networks/*/checkpoints"))


def test_another_split_only_where_it_is_asked_for(made: tuple[Built, dict[str, Any]], whole: Path, tmp_path: Path) -> None:
    found = rows(go(made, tmp_path / "truth", split="test"))
    assert {row["n"] for row in found} == {str(made[0].data.count("test"))} != {"24"}
    assert [row["arch"] for row in found] == [row["arch"] for row in rows(whole)]


# ---- resumption -------------------------------------------------------------------------------------------------------


def test_a_broken_one_trains_only_the_rest(
    made: tuple[Built, dict[str, Any]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second network, at its last epoch: the first is not trained again, the second goes on where it was."""
    out, steps, update = tmp_path / "truth", list[int](), Plain.update

    def counted(own: Plain, draw: Any, now: Any) -> Any:
        steps.append(now.step)
        return update(own, draw, now)

    with monkeypatch.context() as patch, pytest.raises(Enough):
        patch.setattr(Plain, "update", breaking(counted, lambda *given: len(steps) == 7))
        go(made, out)
    assert steps == [0, 1, 2, 3, 0, 1, 2] and rows(out / "truth.csv") == rows(whole)[:1]
    steps.clear()
    monkeypatch.setattr(Plain, "update", counted)
    assert go(made, out) == out / "truth.csv"
    assert steps == [2, 3, 0, 1, 2, 3]
    assert (out / "truth.csv").read_bytes() == whole.read_bytes()
    steps.clear()
    go(made, out)
    assert steps == []


def test_a_network_that_was_trained_but_not_written_is_only_read(
    made: tuple[Built, dict[str, Any]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "truth"
    with monkeypatch.context() as patch, pytest.raises(Enough):
        patch.setattr(truth, "score_plain", breaking(truth.score_plain, lambda *given: True))
        go(made, out)
    assert not (out / "truth.csv").exists()
    steps, update = list[int](), Plain.update

    def counted(own: Plain, draw: Any, now: Any) -> Any:
        steps.append(now.step)
        return update(own, draw, now)

    monkeypatch.setattr(Plain, "update", counted)
    go(made, out)
    assert steps == [0, 1, 2, 3] * 2 and (out / "truth.csv").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_first(
    number: int, code: int, made: tuple[Built, dict[str, Any]], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out, calls, update = tmp_path / "truth", list[int](), Plain.update

    def signalled(own: Plain, draw: Any, now: Any) -> Any:
        calls.append(now.step)
        if len(calls) == 6:
            os.kill(os.getpid(), number)
        return update(own, draw, now)

    monkeypatch.setattr(Plain, "update", signalled)
    with caplog.at_level("INFO", "nas"), pytest.raises(SystemExit) as stop:
        go(made, out)
    assert stop.value.code == code and len(calls) == 6 and len(rows(out / "truth.csv")) == 1
    assert "at network 2 of 3; the same command goes on there" in caplog.text
    assert go(made, out).read_bytes() == whole.read_bytes() and calls[6:] == [2, 3, 0, 1, 2, 3]


def test_progress_says_how_long_it_takes(
    made: tuple[Built, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "nas"):
        found = rows(go(made, tmp_path / "truth", epochs=1))
    said = [line for line in caplog.messages if "left" in line]
    assert len(said) == 3 and said[-1].endswith("about 00:00 left")
    assert said[0].startswith(f"network 1 of 3: top-1 {float(found[0]['top1']):.4f} on 24 select images; about 0")


def test_more_networks_join_those_that_are_there(
    made: tuple[Built, dict[str, Any]], whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole.parent, tmp_path / "truth")
    assert rows(go(made, tmp_path / "truth", networks=4))[:3] == rows(whole)
    assert len(rows(tmp_path / "truth" / "truth.csv")) == 4


# ---- what is refused --------------------------------------------------------------------------------------------------


def test_other_truth_in_the_folder_is_left_alone(made: tuple[Built, dict[str, Any]], whole: Path, tmp_path: Path) -> None:
    before = whole.read_bytes()
    for changes, words in (({"epochs": 3}, r"epochs \(was 2, now 3\)"), ({"seed": 5}, r"seed \(was 4, now 5\)"),
                           ({"split": "test"}, r"split \(was 'select', now 'test'\)")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"truth\.json is of another config: {words}"):
            go(made, whole.parent, **changes)
    other = parts(restrict={"stage0*": "largest"})
    with pytest.raises(ValueError, match=r"truth\.json is of another config: space\.part"):
        go(other, whole.parent)
    assert whole.read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty, and holds no truth by training"):
        go(made, tmp_path)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "truth.json").write_text("{")
    with pytest.raises(ValueError, match=r"torn/truth\.json cannot be read"):
        go(made, tmp_path / "torn")


def test_what_does_not_fit_is_refused_before_a_folder_is_made(made: tuple[Built, dict[str, Any]], tmp_path: Path) -> None:
    built, config = made
    grey = {**config, "retrain": {"plain": {"schedule": "linear"}}}
    for one, changes, words in (
        (made, {"networks": 2}, r"2 networks are too few to train for a truth: a ranking needs 3 or more"),
        (parts(restrict={"*": "largest"}), {}, r"3 different networks: .* holds 1, as far as random ones show"),
        (made, {"epochs": 0}, r"epochs = 0 is too few"),
        (made, {"split": "train"}, r"split = 'train': networks are trained on the others"),
        ((built, {"python": {}}), {}, r"the-run was searched from Python"),
        ((built, grey), {}, r"schedule = 'linear' is not known"),
        ((dataclasses.replace(built, ranks=Ranks(0, 2, 0, True)), config), {}, r"by one process, and 2 were started"),
        (parts(data={"name": "digits", "limit": 96, "batch_size": 16, "select_fraction": 0.0, "valid_fraction": 0.5},
               retrain={"plain": {"auxiliary": 0.4}}), {}, r"auxiliary"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            go(one, tmp_path / "truth", **changes)
        assert not (tmp_path / "truth").exists()
