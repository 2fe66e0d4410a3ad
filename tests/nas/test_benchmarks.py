"""The benchmarks run, and their figures have the stated structure. Nothing here judges a time."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nas.benchmarks import loader, steps
from search_spaces.resnet import CifarResNet

TINY = ["--pairs", "2", "--batch", "2", "--size", "8", "--depth", "8", "--widths", "4", "4", "8",
        "--archs", "50", "--cost-depth", "8"]  # fmt: skip


def check_ratio(figures: dict) -> None:
    low, high = figures["interval90"]
    assert 0 < low <= figures["ratio"] <= high and math.isfinite(high)


def test_steps_report_every_measure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "steps.json"
    figures = steps.main([*TINY, "--layouts", "channels_last", "--out", str(out)])
    rows = {(row["measure"], row["case"]): row for row in figures["rows"]}
    assert list(rows) == [("elastic", "largest"), ("elastic", "middle"), ("elastic", "smallest"), ("tas", "tas"),
                          ("tas", "tied"), ("costs", "ResNet-8 tied"), ("costs", "ResNet-8 tas")]  # fmt: skip
    for (measure, _), row in rows.items():
        if measure == "costs":
            assert row["archs_per_s"] > 0 and row["expected_ms"] > 0
            continue
        check_ratio(row)
        assert row["layout"] == "channels_last" and (row["goal"], row["bound"]) == steps.GOALS[measure]
        calls = row["aten_calls"]
        assert calls["difference"] == calls["ours"] - calls["static"] and min(calls["ours"], calls["static"]) > 0
    assert rows["elastic", "largest"]["aten_calls"]["difference"] <= 0  # full slices cost no operator call
    assert json.loads(out.read_text()) == json.loads(json.dumps(figures))
    printed = capsys.readouterr().out
    assert printed.count("\n| elastic ") == 3 and printed.count("\n| tas ") == 2 and printed.count("\n| ResNet-8 ") == 2
    assert torch.get_num_threads() == threads


def test_steps_can_be_limited_and_cast(capsys: pytest.CaptureFixture) -> None:
    figures = steps.main([*TINY, "--only", "tas", "--layouts", "nchw", "--precision", "bfloat16", "--fused"])
    assert [(row["measure"], row["case"]) for row in figures["rows"]] == [("tas", "tas"), ("tas", "tied")]
    for row in figures["rows"]:
        check_ratio(row)
    assert "bfloat16, elastic with fused SGD" in capsys.readouterr().out


def test_ratio_alternates_and_counts_pairs() -> None:
    order: list[str] = []
    found = steps.ratio(lambda: order.append("ours"), lambda: order.append("static"), pairs=3, warm=1)
    assert order == ["ours", "static", "ours", "static", "static", "ours", "ours", "static"]
    check_ratio(found)


def test_aten_calls_counts_forward_and_backward() -> None:
    weight = nn.Parameter(torch.ones(3))
    assert steps.aten_calls(lambda: weight * 2.0) == 1
    assert steps.aten_calls(lambda: (weight * 2.0).sum().backward()) > 2


@pytest.mark.parametrize(("low", "verdict"), [(1.0, "goal met"), (1.04, "bound met"), (1.06, "missed")])
def test_verdict_follows_the_lower_end(low: float, verdict: str) -> None:
    row = steps.row("elastic", "largest", "nchw", {"ratio": 1.1, "interval90": [low, 1.2]}, (5, 3))
    assert row["verdict"] == verdict and row["aten_calls"]["difference"] == 2


def test_middle_takes_the_middle_option() -> None:
    arch = steps.middle(CifarResNet(20, "tied"))
    assert (arch["stage0.width"], arch["stage0.depth"]) == (11, 2)


@pytest.mark.parametrize("wrong", [{"pairs": 1}, {"batch": 0}, {"size": 3}, {"archs": 0}, {"precision": "float16"}])
def test_conditions_refuse(wrong: dict) -> None:
    with pytest.raises(ValueError, match="Allowed"):
        steps.Conditions(**wrong)


def test_loader_reports_a_ratio(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    figures = loader.measure(str(tmp_path), batch_size=4, rounds=2, steps=1)
    check_ratio(figures)
    assert figures["images"] == 16 and figures["shape"] == [3, 8, 8] and figures["rounds"] == 2
    assert figures["batched_images_per_s"] > 0 and figures["pil_images_per_s"] > 0
    with pytest.raises(ValueError, match="rounds"):
        loader.measure(str(tmp_path), rounds=1)
