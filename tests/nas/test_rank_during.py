"""Ranking known architectures as a supernet is trained: what is read, that nothing else changes, and what is refused."""
from __future__ import annotations

import csv
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from split_runs import DATA, EPOCH_STEPS, SEED, Enough, breaking, gm, net, same

from nas import ranks
from nas.build import Built, gather
from nas.engine import Outcome
from nas.evaluate import score_archs
from nas.heads import Head
from nas.losses import CrossEntropy
from nas.ranking.during import CURVE, RankJudge, known_truth, untouched
from nas.ranking.section import UNRANKED, Rank
from nas.run import Run
from nas.search import Found, search, train
from nas.strategies.darts import DARTS
from search_spaces import nats

EPOCHS = 5
SPACE = nats.Topology(2, 1)
CPU = torch.device("cpu")


def some(n: int) -> list[Any]:
    """Different architectures."""
    rng, found = random.Random(7), dict[Any, Any]()
    while len(found) < n:
        arch = SPACE.sample(rng)
        found[SPACE.key(arch)] = arch
    return list(found.values())


ARCHS = some(20)
VALUES = [float(value) for value in random.Random(3).sample(range(50, 95), 20)]


def table(path: Path, values: Sequence[Any] = VALUES, **more: Sequence[Any]) -> str:
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["arch", "acc", *more])
        rows.writerows(zip([SPACE.text(arch) for arch in ARCHS], values, *more.values()))
    return str(path)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> str:
    return table(tmp_path_factory.mktemp("truth") / "truth.csv")


def asked(truth: str, **more: Any) -> Rank:
    return Rank(truth, **{"every": 2, "images": 16, "bn_images": 16, "archs": 18, **more})


def go(out: Path, rank: Rank = UNRANKED, **more: Any) -> Found:
    """Five epochs of two steps of 16 images; it derives after every third epoch."""
    return search(DATA, net(), DARTS(order=1), epochs=EPOCHS, out=out, seed=SEED, device="cpu", gap=False, every=3, rank=rank,
                  **more)  # fmt: skip


def parts(steps: int = EPOCHS) -> Built:
    made = gather(DATA, net(), DARTS(order=1), CrossEntropy(), epochs=steps, seed=SEED, device=CPU,
                  group=ranks.Ranks(0, 1, 0, True))  # fmt: skip
    made.strategy.start(made.setup)
    return made


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def payload(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def ranked(truth: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("ranked") / "run", asked(truth)).folder


# ---- what is read -----------------------------------------------------------------------------------------------------


def test_tau_is_that_of_the_accuracies_with_shared_weights(ranked: Path, truth: str) -> None:
    readings = [line for line in lines(ranked) if "rank/kendall_tau" in line]
    assert [line["step"] for line in readings] == [3, 7, 9]  # after epochs 2 and 4, and at the end
    built = parts()
    built.net.load_state_dict(payload(ranked)["strategy"]["setup"]["net"])
    known = known_truth(asked(truth), built)
    p = [score_archs(built.net, [arch], DATA, "select", CPU, 16, 16)[0].top1 for arch in known.archs]
    t = [VALUES[ARCHS.index(arch)] for arch in known.archs]
    assert len(p) == 18 and len(set(p)) > 1
    assert readings[-1] == {"step": 9, "rank/kendall_tau": pytest.approx(float(stats.kendalltau(p, t).statistic)),
                            "rank/spearman": pytest.approx(float(stats.spearmanr(p, t).statistic))}  # fmt: skip
    assert known.macs.tolist() == [built.costs.of(arch) for arch in known.archs]


def test_the_report_has_a_table_and_a_curve(ranked: Path, truth: str) -> None:
    report = (ranked / "report.md").read_text()
    section = report.split("## Ranking\n\n")[1].split("\n\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()[2:6]]
    assert [row[:2] for row in rows] == [["4", "2"], ["8", "4"], ["10", "5"], ["MACs alone", ""]]
    taus = [line["rank/kendall_tau"] for line in lines(ranked) if "rank/kendall_tau" in line]
    assert [row[2].split()[0] for row in rows[:3]] == [f"{tau:.3f}" for tau in taus]
    kept = payload(ranked)["keep"]["rank"]["rows"][-1]["kendall_tau"]
    assert rows[2][2] == f"{kept[0]:.3f} [{kept[1]:.3f}, {kept[2]:.3f}]" and kept[1] <= kept[0] <= kept[2]
    known = known_truth(asked(truth), parts())
    assert rows[3][2].split()[0] == f"{float(stats.kendalltau(known.macs, known.t).statistic):.3f}"
    for words in (f"18 architectures of {truth}, column acc", "on 16 valid images", "recalibrated on 16 images", "3 readings"):
        assert words in section
    with Image.open(ranked / CURVE) as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_a_long_history_is_shown_in_ten_rows(truth: str, tmp_path: Path) -> None:
    class Quiet:
        def now(self, step: int, tags: Any) -> None: ...

    judge = RankJudge(asked(truth), parts(), Quiet())  # type: ignore[arg-type]
    judge.rows = [{"step": 10 * i + 9, "images": 16, "kendall_tau": [i / 100, None, None], "spearman": None}
                  for i in range(31)]  # fmt: skip
    section = judge.conclude(tmp_path).splitlines()
    rows = [line for line in section if line[2:3].isdigit()]
    assert len(rows) == 10 and rows[0] == "| 10 | 5 | 0.000 | none |" and rows[-1] == "| 310 | 155 | 0.300 | none |"
    assert "31 readings" in section[-1]


def test_equal_accuracies_have_no_tau(truth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def equal(network: Any, archs: Any, *given: Any) -> list[Any]:
        return [score_archs(net(), ARCHS[:1], DATA, "select", CPU, 16, 16)[0]] * len(archs)

    monkeypatch.setattr("nas.ranking.during.score_served", equal)
    run = go(tmp_path / "run", asked(truth, every=5)).folder
    (line,) = [line for line in lines(run) if "rank/kendall_tau" in line]
    assert line == {"step": 9, "rank/kendall_tau": None, "rank/spearman": None}
    assert "| 10 | 5 | none | none |" in (run / "report.md").read_text()


# ---- nothing else changes ---------------------------------------------------------------------------------------------


def test_the_training_is_the_same_with_and_without(ranked: Path, tmp_path: Path) -> None:
    plain = go(tmp_path / "plain").folder
    for name in ("last", "previous"):
        mine, theirs = payload(ranked, name), payload(plain, name)
        assert mine["keep"].pop("rank")["rows"]
        assert same({key: mine[key] for key in ("strategy", "draw", "log", "keep")},
                    {key: theirs[key] for key in ("strategy", "draw", "log", "keep")}) == []  # fmt: skip
    assert any("running_mean" in key for key in payload(plain)["strategy"]["setup"]["net"])
    assert [line for line in lines(ranked) if "rank/kendall_tau" not in line] == lines(plain)
    assert not (plain / CURVE).exists() and "## Ranking" not in (plain / "report.md").read_text()


def test_a_reading_leaves_buffers_modes_and_random_numbers(truth: str) -> None:
    built = parts()
    Head(0.5, 2).attach(built.net)  # a network whose training view draws random numbers
    before = {name: tensor.clone() for name, tensor in built.net.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    judge = RankJudge(asked(truth), built, None)  # type: ignore[arg-type]
    first = [score.top1 for score in judge.read(built.strategy)]
    assert torch.equal(torch.get_rng_state(), state) and built.net.training
    after = built.net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [score.top1 for score in judge.read(built.strategy)] == first


def test_every_net_gets_its_buffers_back_even_after_an_error() -> None:
    nets = [torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(3)]
    means = [dict(own.named_buffers())["running_mean"] for own in nets]
    with pytest.raises(Enough), untouched(lambda arch: nets[arch]) as network:
        for i in (0, 1, 0):
            network(i).running_mean.add_(1.0)
        assert [mean.tolist() for mean in means] == [[2, 2], [1, 1, 1]]
        raise Enough
    assert [mean.tolist() for mean in means] == [[0, 0], [0, 0, 0]]


@pytest.mark.parametrize("step", [5, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 9))])
def test_a_broken_run_ends_in_the_same_bits(step: int, ranked: Path, truth: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough):
        patch.setattr(DARTS, "update", breaking(DARTS.update, lambda own, draw, now: now.step == step))
        go(out, asked(truth))
    assert go(out, asked(truth)).folder == out
    assert same(payload(out), payload(ranked)) == []
    assert (out / "metrics.jsonl").read_bytes() == (ranked / "metrics.jsonl").read_bytes()
    section = [(run / "report.md").read_text().split("## Ranking")[1].split("## Go on")[0] for run in (out, ranked)]
    assert section[0] == section[1] and (out / CURVE).read_bytes() == (ranked / CURVE).read_bytes()


def test_another_truth_cannot_take_its_place(tmp_path: Path) -> None:
    path = table(tmp_path / "truth.csv")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough):
        patch.setattr(DARTS, "update", breaking(DARTS.update, lambda own, draw, now: now.step == 5))
        go(tmp_path / "run", asked(path))
    table(tmp_path / "truth.csv", [*VALUES[1:], 49.0])
    with pytest.raises(ValueError, match=r"truth\.csv: its architectures or values changed since the run began\. Resume"):
        go(tmp_path / "run", asked(path))


def test_only_the_main_rank_reads(truth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second, made = ranks.Ranks(1, 2, 1, False), list[Any]()

    def fit(own: Run, *given: Any, every: Any, keep: Any, **named: Any) -> Outcome:
        made.extend([every, keep])
        return Outcome("time", 0)

    monkeypatch.setattr(Run, "fit", fit)
    for group in (ranks.Ranks(0, 2, 0, True), second):
        built = dataclasses.replace(parts(), ranks=group)
        run = Run(tmp_path / f"{group.rank}", {"seed": SEED})
        train(built, run, {"seed": SEED}, seed=SEED, rank=asked(truth))
        run.close()
    main, keep, other, less = made
    assert [period for period, _ in main] == [2, 4, 10] and set(keep) == {"picks", "rank"}
    assert [period for period, _ in other] == [2] and set(less) == {"picks"}


# ---- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "words"), [
    ({"truth": None}, r"rank\.truth is missing, so rank\.archs says nothing"),
    ({"split": "train"}, r"rank\.split = 'train' is not known\. Allowed: select, valid, test"),
    ({"bn": "running"}, r"rank\.bn = 'running' is not known\. Allowed: recalibrated, batch"),
    ({"every": 0}, r"rank\.every = 0 is too few"),
    ({"images": 0}, r"rank\.images = 0 is too few"),
    ({"archs": 2}, r"rank\.archs = 2\. Allowed: 3 or more, or all"),
    ({"archs": "some"}, r"rank\.archs = 'some'\. Allowed: 3 or more, or all"),
])  # fmt: skip
def test_settings_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        asked(**{"truth": "truth.csv", **changes})


def test_a_truth_that_does_not_fit_is_refused_before_a_folder_is_made(truth: str, tmp_path: Path) -> None:
    two = table(tmp_path / "two.csv", ["1.5", "2.5", *["nan"] * 18])
    several = table(tmp_path / "several.csv", VALUES, other=VALUES)
    (tmp_path / "odd.csv").write_text("arch,acc\nnothing,1\nof ours,2\nat all,3\n")
    (tmp_path / "flat.csv").write_text("arch,acc\n" + "".join(f"{SPACE.text(ARCHS[i])},5\n" for i in range(3)))
    for rank, kind, words in (
        (asked(str(tmp_path / "none.csv")), FileNotFoundError, r"none\.csv: there is no such file"),
        (asked(truth, value="acc2"), ValueError, r"rank\.value acc2: .*truth\.csv has no such column\. Allowed: arch, acc"),
        (asked(truth, key="net"), ValueError, r"rank\.key net: .*truth\.csv has no such column"),
        (asked(several), ValueError, r"rank\.value is missing: which column of .*several\.csv\? .*: acc, other\."),
        (asked(two), ValueError, r"2 architectures of this space with a number in column acc; a ranking needs 3"),
        (asked(str(tmp_path / "odd.csv")), ValueError, r"odd\.csv holds no architectures of nats\.Topology"),
        (asked(truth, split="test", bn="batch"), None, ""),
    ):
        if kind is None:
            known_truth(rank, parts())
            continue
        with pytest.raises(kind, match=words):
            go(tmp_path / "run", rank)
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"a run with splits is ranked when it has all its supernets, by nas rank RUN --truth"):
        go(tmp_path / "run", asked(truth), split=gm([2]))
    assert not (tmp_path / "run").exists()
    assert EPOCH_STEPS == 2
