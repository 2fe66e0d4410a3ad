"""NASNet-A by its name, from a recipe to a trained bundle; and sampling search on NASNet cells, extracted in a larger form."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import nas, ok

from nas.commands.extract import written
from nas.recipe import UsageError
from search_spaces.arch import read_arch
from search_spaces.darts import DARTS_V2, Cells
from search_spaces.nasnet import NASNet

RECIPE = """
space: {class_path: search_spaces.nasnet.NASNet, init_args: {N: 1, F: 4}}
supernet: {class_path: supernets.nasnet.NASNet}
strategy: {class_path: nas.strategies.rsps.RSPS, init_args: {archs: 2}}
data: {name: digits, batch_size: 16, augment: [crop], valid_fraction: 0.5, limit: 96}
epochs: 1
channels_last: true
threads: 1
retrain:
  epochs: 2
  plain: {lr: 0.025, schedule: cosine, nesterov: false, clip: 5.0, auxiliary: 0.4, drop_path: 0.4, drop_path_steps: 8}
  data: {valid_fraction: 0.0}
"""
ALONE = """
restrict: {"*.op": [identity, avg_pool_3x3, max_pool_3x3, sep_conv_3x3, sep_conv_5x5, sep_conv_7x7], "*.combine": [add]}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("nasnet")
    (place / "recipe.yaml").write_text(RECIPE)
    (place / "alone.yaml").write_text(RECIPE + ALONE)
    return place


def test_an_architecture_may_be_given_as_text_or_by_its_name() -> None:
    space, cells = NASNet(1, 4), Cells()
    assert written("NASNET_A", space) == space.parse("NASNET_A") == written(space.text(space.parse("NASNET_A")), space)
    assert written(cells.text(cells.arch_of(DARTS_V2)), cells) == cells.arch_of(DARTS_V2)
    for text, words in (("arch.jsn", "there is no such file"), ("normal: dreamt", "--arch: .* is not a pair of cells")):
        with pytest.raises(UsageError, match=words) as error:
            written(text, space)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is not in this space"):
        written("NASNET_A", space.restrict({"normal.block1.left.op": ["identity"]}))


@pytest.mark.slow
def test_nasnet_a_is_trained_by_its_name(recipe: Path) -> None:
    bundle = ok("extract", recipe / "alone.yaml", "--arch", "NASNET_A", "--from", "scratch", "--out", recipe / "a")
    assert "counted and predicted alike" in bundle.err
    file = read_arch(recipe / "a" / "arch.json", expect=NASNet(1, 4))
    assert dict(file.arch) == NASNet(1, 4).parse("NASNET_A")
    done = Path(ok("retrain", recipe / "a", "--out", recipe / "trained").last)
    said = json.loads((done / "report.json").read_text())["retrain"]
    assert (said["drop_path"], said["drop_path_steps"], said["drop_path_version"], said["auxiliary"]) == (0.4, 8, 3, 0.4)
    seen = [json.loads(line) for line in (recipe / "trained" / "metrics.jsonl").read_text().splitlines()]
    drops = [line["train/drop_path"] for line in seen if "train/drop_path" in line]
    assert drops == sorted(drops)
    assert max(drops) == pytest.approx(0.4)  # from step 8 on
    assert "DropPath" not in (done / "model.py").read_text()
    assert ok("evaluate", done, "--json").last


@pytest.mark.slow
def test_sampling_search_then_a_larger_network(recipe: Path) -> None:
    ok("search", recipe / "recipe.yaml", "--out", recipe / "run")
    kept = ok("extract", recipe / "run", "--out", recipe / "kept")
    assert "weights: inherited" in kept.err
    size = ("--space.init_args.N", "2", "--space.init_args.F", "8")
    ok("extract", recipe / "run", "--from", "scratch", *size, "--out", recipe / "larger")
    first, larger = (read_arch(recipe / name / "arch.json") for name in ("kept", "larger"))
    assert dict(first.arch) == dict(larger.arch) and larger.costs["params"] > 2 * first.costs["params"]
    refused = nas("search", recipe / "recipe.yaml", "--strategy", "nas.strategies.gdas.GDAS", "--out", recipe / "gdas")
    assert refused.code == 2 and "NASNet cells mix operations alone" in refused.err
