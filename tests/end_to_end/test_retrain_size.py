"""A network searched on resized images is retrained and evaluated at that size."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import DATA, RETRAIN, SPACE, nas, ok

from search_spaces.arch import read_arch


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a network for digits of 16x16 pixels, which are 8x8 in their source."""
    place = tmp_path_factory.mktemp("size")
    words = ("extract", "tas-digits", *DATA, *SPACE, "--data.size", "16", "--arch", "smallest")
    return Path(ok(*words, "--out", place / "bundle").last)


@pytest.mark.parametrize("more", [(), ("--recipe", "tas-digits")])
def test_retraining_keeps_the_size_of_the_search(sixteen: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    trained = Path(ok("retrain", sixteen, *RETRAIN, *more, "--out", tmp_path / "run").last)
    assert read_arch(trained / "arch.json").input == (1, 16, 16)
    stated = read_arch(trained / "arch.json").metrics["top1"]["value"]
    assert json.loads(ok("evaluate", trained, "--json").last)["top1"] == pytest.approx(stated)


def test_another_size_is_refused_with_the_one_that_fits(sixteen: Path) -> None:
    for words in (("retrain", sixteen, *RETRAIN, "--data.size", "8"), ("evaluate", sixteen, "--data.size", "8")):
        refused = nas(*words)
        assert refused.code == 2 and len(refused.errors) == 1
        assert "expects images (1, 16, 16) of 10 classes; the data have (1, 8, 8) and 10. Give --data.size 16" in refused.err


def test_a_bundle_that_knows_no_size_says_which_to_give(sixteen: Path, tmp_path: Path) -> None:
    """As of a search from Python, whose data only its script has."""
    report = sixteen / "report.json"
    text = report.read_text()
    try:
        report.write_text(json.dumps({**json.loads(text), "recipe": {}}))
        refused = nas("retrain", sixteen, *RETRAIN, "--out", tmp_path / "run")
        assert refused.code == 2 and "Give --data.size 16" in refused.err and not (tmp_path / "run").exists()
        ok("retrain", sixteen, *RETRAIN, "--data.size", "16", "--out", tmp_path / "run")
    finally:
        report.write_text(text)
