"""Health, report.md and random search at equal cost in whole runs, killed and resumed too."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import SEARCH, Result, content, differences, nas, ok
from killed import KILL, At, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nas.data import Data
from nas.search import search
from nas.strategies.darts import DARTS
from search_spaces.arch import read_arch
from search_spaces.nats import Topology
from search_spaces.resnet import CifarResNet
from supernets.nats import Topology as TopologyNet

CELLS = """
space: {class_path: search_spaces.nats.Topology, init_args: {C: 4, N: 1}}
supernet: {class_path: supernets.nats.Topology}
strategy: {class_path: nas.strategies.darts.DARTS, init_args: {order: 1}}
data: {name: digits, batch_size: 16, valid_fraction: 0.5, limit: 128}
epochs: 3
threads: 1
log_every: 3
"""  # 12 steps of 16 images
FALLING = """
from __future__ import annotations
import torch
from nas.protocols import Setup
from nas.strategies.darts import DARTS
class Falling(DARTS):
    '''Skips are ahead from the start.'''
    def start(self, setup: Setup) -> None:
        super().start(setup)
        with torch.no_grad():
            self.alpha.logits["5"][:, 1] += 1.0
"""
BESIDE = ("--beside.random", "2")


def rows(folder: Path, tag: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[tag] for line in lines if tag in line}


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must be the same, in the run and in its random search; paths of the run are replaced."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            found[name] = torch.load(path, weights_only=True)
        elif path.is_file() and not re.search("events|system|env|config", name):
            found[name] = path.read_text().replace(str(folder), "RUN").replace(f"# Search: {folder.name}", "# Search")
    return found


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe of DARTS on cells, and of a strategy of one's own."""
    folder = tmp_path_factory.mktemp("cells")
    (folder / "cells.yaml").write_text(CELLS)
    (folder / "own_falling.py").write_text(FALLING)
    return folder


@pytest.fixture(scope="module")
def falling(cells: Path) -> tuple[Path, Result]:
    """A search that collapses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(cells)
        result = ok("search", cells / "cells.yaml", "--strategy", "own_falling.Falling", "--strategy.order", "1", "--out",
                    cells / "falling")  # fmt: skip
    return cells / "falling", result


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A search with random search beside it."""
    folder = tmp_path_factory.mktemp("beside") / "whole"
    return folder, ok(*SEARCH, *BESIDE, "--out", folder, "--json")


# ---- health ----------------------------------------------------------------------------------------------------------


def test_a_healthy_search_reports_health_and_no_warning(cells: Path) -> None:
    out = cells / "healthy"
    result = ok("search", cells / "cells.yaml", "--strategy.weights.lr", "0.001", "--out", out)
    tags = {"health/entropy", "health/share_skip", "health/share_none", "health/mean_skip", "health/mean_none", "health/gap"}
    scalars = EventAccumulator(str(out)).Reload().Tags()["scalars"]
    assert {tag for tag in scalars if tag.startswith("health/")} == tags
    for tag in tags:
        assert list(rows(out, tag)) == [3, 7, 11]
    assert all(0.9 < value <= 1 for value in rows(out, "health/entropy").values())
    assert "health after" not in result.err and "No warnings." in (out / "report.md").read_text()


def test_the_gap_is_an_extra_reading_that_changes_nothing_else(cells: Path) -> None:
    ok("search", cells / "cells.yaml", "--out", cells / "with")
    ok("search", cells / "cells.yaml", "--evaluate.gap", "false", "--out", cells / "without")
    assert rows(cells / "without", "health/gap") == {} and len(rows(cells / "with", "health/gap")) == 3
    for tag in ("train/loss", "valid/loss", "select/top1", "select/loss", "health/entropy"):
        assert rows(cells / "without", tag) == rows(cells / "with", tag) != {}
    assert "mixture top-1" not in (cells / "without" / "report.md").read_text()


def test_a_collapse_is_said_once_everywhere(falling: tuple[Path, Result]) -> None:
    folder, result = falling
    said = [line for line in result.err.splitlines() if "collapse to skips" in line]
    assert len(said) == 1 and said[0].startswith("nas: health after step 4: collapse to skips: all 6 operations")
    assert "alphas.warmup_epochs" in said[0] and "alphas.skip_limit" in said[0]
    assert rows(folder, "health/share_skip") == {3: 1.0, 7: 1.0, 11: 1.0}
    events = EventAccumulator(str(folder), {"tensors": 0}).Reload()
    shown = events.Tensors("health/warning/skip/text_summary")
    assert [event.step for event in shown] == [3]
    assert shown[0].tensor_proto.string_val[0].decode() == said[0].partition("step 4: ")[2]
    report = (folder / "report.md").read_text()
    assert "- **skip**, after step 4, still so at the end: collapse to skips: all 6" in report and "No warnings" not in report
    assert "|skip_connect~0|+|skip_connect~0|skip_connect~1|" in report


@pytest.mark.slow
def test_health_survives_a_stop_after_every_step(falling: tuple[Path, Result], cells: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(cells)
    out = cells / "stopped"
    words = ("search", cells / "cells.yaml", "--strategy", "own_falling.Falling", "--strategy.order", "1", "--out", out,
             "--resume", "auto", "--max-time", "1e-6")  # fmt: skip
    said = [ok(*words).err for _ in range(12)]
    assert (out / "arch.json").exists() and sum("collapse to skips" in err for err in said) == 1
    mine, theirs = outcome(out), outcome(falling[0])
    mine.pop("checkpoints/previous.pt"), theirs.pop("checkpoints/previous.pt")  # of other steps
    assert differences(mine, theirs) == []


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_asked_found_and_is_next(tied: Path) -> None:
    report, file = (tied / "report.md").read_text(), read_arch(tied / "arch.json")
    space = CifarResNet(14, "tied", [4, 6, 8])
    for words in ("| strategy | TAS(", "| seed | 1 |", "train 100, valid 100 (50% of train, stratified, seed 111)",
                  "12 steps, 2 epochs, 2 passes of 16 images a step: 384 image-passes", space.text(file.arch),
                  f"| MACs | {file.costs['macs']:,} |", f"| parameters | {file.costs['params']:,} |",
                  f"valid top-1 {file.metrics['top1']['value']:.4f} on 100 images, weights: supernet, batch norm: recalibrated",
                  "| after step | entropy | narrowest | mixture top-1 | derived top-1 | gap |",
                  f"    nas extract {tied}\n    nas retrain {tied}/bundle\n    nas rank {tied} --truth"):  # fmt: skip
        assert words in report, words
    assert "Random search" not in report and not (tied / "random.json").exists()
    assert "time" not in report.lower() and ("seconds" not in report)


# ---- random search beside ----------------------------------------------------------------------------------------------


def test_random_search_beside_a_search(whole: tuple[Path, Result], tied: Path) -> None:
    folder, result = whole
    assert (folder / "arch.json").read_bytes() == (tied / "arch.json").read_bytes()  # the search is none the wiser
    assert (folder / "metrics.jsonl").read_bytes() == (tied / "metrics.jsonl").read_bytes()
    said = json.loads((folder / "random.json").read_text())
    # 12 steps of 2 passes, shared by two networks; what was found gets as many
    assert (said["steps"], said["image_passes"], said["search_image_passes"], said["of"]) == (12, 24 * 16, 24 * 16, 3)
    assert said["judged"] == {"split": "valid", "n": 100, "weights": "scratch", "bn": "recalibrated"}
    readings = rows(folder / "random", "select/top1")
    assert list(readings) == [11, 23, 35]
    assert [said["found"]["top1"], *(network["top1"] for network in said["networks"])] == list(readings.values())
    top = [network["top1"] for network in said["networks"]]
    assert said["mean"] == pytest.approx(sum(top) / 2) and said["std"] == pytest.approx(abs(top[0] - top[1]) / 2**0.5)
    assert said["rank"] == 1 + sum(value > said["found"]["top1"] for value in top) and said["best"]["top1"] == max(top)
    found, best = read_arch(folder / "arch.json"), read_arch(folder / "random" / "arch.json")
    assert said["found"]["macs"] == found.costs["macs"] and said["best"]["macs"] == best.costs["macs"]
    assert best.provenance["strategy"] == "random" and best.metrics["top1"]["value"] == max(top)
    assert said["best"]["text"] == CifarResNet(14, "tied", [4, 6, 8]).text(best.arch)
    shown = json.loads(result.last)
    assert shown["random"] == {key: value for key, value in said.items() if key != "networks"}
    assert shown["arch"] == str(folder / "arch.json")
    assert f"the found one is number {said['rank']} of 3" in result.err
    report = (folder / "report.md").read_text()
    assert f"| best of 2 random | {max(top):.4f} |" in report and f"number {said['rank']} of 3" in report


def test_random_networks_meet_the_budget_of_the_search(whole: tuple[Path, Result]) -> None:
    said = json.loads((whole[0] / "random.json").read_text())
    full = float(re.search(r"of the largest.*?([\d.]+)%", (whole[0] / "report.md").read_text(), re.DOTALL).group(1))  # type: ignore[union-attr]
    largest = said["found"]["macs"] / (full / 100)
    assert said["outside_budget"] == 0
    for network in said["networks"]:
        assert abs(network["macs"] / largest - 0.55) <= 0.05 * 0.55 + 0.001


def test_the_best_random_one_can_be_extracted(whole: tuple[Path, Result], tmp_path: Path) -> None:
    line = next(line for line in (whole[0] / "report.md").read_text().splitlines() if "random/arch.json" in line)
    words = line.split()[1:]
    words[words.index("--out") + 1] = str(tmp_path / "bundle")
    assert read_arch(Path(ok(*words).last) / "arch.json").arch == read_arch(whole[0] / "random" / "arch.json").arch


@pytest.mark.slow
@pytest.mark.parametrize("at", [
    At(KILL, "update", 8), At(KILL, "line", 12), pytest.param(At(KILL, "written", 4), marks=pytest.mark.slow),
    pytest.param(At(KILL, "moved", 3), marks=pytest.mark.slow)], ids=lambda at: at.place)  # fmt: skip
def test_a_kill_in_either_part_changes_nothing(at: At, whole: tuple[Path, Result], tmp_path: Path) -> None:
    words = (*SEARCH, *BESIDE, "--out", tmp_path / "whole", "--resume", "auto")
    assert run(words, at, tmp_path / "log") == -KILL
    assert (tmp_path / "whole" / "random").exists() == (at.place != "update")
    assert not (tmp_path / "whole" / "random.json").exists()
    ok(*words)
    assert differences(outcome(tmp_path / "whole"), outcome(whole[0])) == []
    assert not (tmp_path / "whole" / "random-2").exists()


@pytest.mark.slow
def test_it_can_be_asked_of_a_finished_search_and_not_be_changed(whole: tuple[Path, Result], tmp_path: Path) -> None:
    words = (*SEARCH, "--out", tmp_path / "whole", "--resume", "auto")
    ok(*words)
    stopped = ok(*words, *BESIDE, "--max-time", "1e-6")
    assert stopped.last == str(tmp_path / "whole")
    assert "after step 1 of random search; continue with --resume auto --out" in stopped.err
    ok(*words, *BESIDE)
    mine, theirs = outcome(tmp_path / "whole"), outcome(whole[0])
    assert differences(mine, theirs) == []
    refused = nas(*words, "--beside.random", "3")
    assert refused.code == 2 and len(refused.errors) == 1
    assert "is of another config: " in refused.errors[0] and "random.networks (was 2, now 3)" in refused.errors[0]


@pytest.mark.parametrize(("words", "fragments"), [
    (["--beside.random", "-1"], ["beside.random = -1 networks", "Allowed: 0 (none) to 24"]),
    (["--beside.random", "25"], ["beside.random = 25 networks", "Allowed: 0 (none) to 24", "12 steps of 2"]),
    (["--beside.random", "many"], ["beside.random = many is not valid", "a whole number"]),
    (["--beside.rndom", "3"], ["beside.rndom is not a known key", "Nearest: beside.random"]),
    (["--beside.weights.lr", "fast"], ["beside.weights", "fast"]),
    (["--beside.random", "2", "--beside.weights.lr", "-1"], ["weights: lr = -1.0", "Allowed: 0 <= lr_min <= lr"]),
    (["--evaluate.gap", "maybe"], ["evaluate.gap = maybe is not valid", "true or false"]),
], ids=lambda value: " ".join(value) if str(value[0]).startswith("--") else "")  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(words: list[str], fragments: list[str], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = nas(*SEARCH, *words, "--out", "run")
    assert result.code == 2 and len(result.errors) == 1 and result.out == "", result.err
    assert [text for text in fragments if text not in result.errors[0]] == [], result.errors[0]
    assert content(tmp_path) == {}


def test_from_python(tmp_path: Path) -> None:
    data = Data("digits", batch_size=16, valid_fraction=0.5, limit=128)
    torch.manual_seed(0)
    net = TopologyNet(Topology(C=4, N=1), data.shape[0], len(data.classes))
    found = search(data, net, DARTS(order=2), epochs=2, out=tmp_path / "run", beside=3)
    assert found.random is not None
    assert json.loads((tmp_path / "run" / "random.json").read_text()) == found.random
    assert (found.random["of"], found.random["steps"]) == (4, 8 * 5 // 3)
    assert "found.bundle('my-bundle')" in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(ValueError, match=r"beside\.random = 99 networks"):
        search(data, net, DARTS(order=1), epochs=2, out=tmp_path / "none", beside=99)
    assert not (tmp_path / "none").exists()
