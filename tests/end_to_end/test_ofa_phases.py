"""Progressive shrinking as one run: killed in the middle of each of its six phases and resumed, it ends in the same bits."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli import differences, ok
from killed import KILL, At, run

from nas import checkpoint
from nas.recipe import find, read
from nas.strategies.ofa import PHASES
from search_spaces.arch import read_arch

EPOCH, PHASE = 3, 6  # steps: a checkpoint after each epoch, so in the middle of each phase


def recipe(folder: Path, **more: Any) -> Path:
    """ofa-digits made tiny: six phases of two epochs (one of them warming up, where it is published), three steps an epoch."""
    content = read(find("ofa-digits"))
    content["space"]["init_args"]["width"] = 0.1
    content["strategy"]["init_args"]["phases"] = [
        {"name": phase.name, "opens": phase.opens, "epochs": 1 if phase.warmup else 2, "warmup": int(phase.warmup > 0),
         "lr": phase.lr, "nets": phase.nets, "sort": phase.sort} for phase in PHASES
    ]  # fmt: skip
    content |= {"epochs": 2 * len(PHASES), "threads": 1, "evaluate": {"every": 4, "bn_images": 32},
                "data": content["data"] | {"limit": 80, "batch_size": 16, "valid_fraction": 0.4},
                "select": {"macs_at_most": "60%", "evaluations": 4, "bn_images": 32}, **more}  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def outcome(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = {path.name: torch.load(path, weights_only=True) for path in (folder / "checkpoints").iterdir()}
    return {**state, "metrics": (folder / "metrics.jsonl").read_text(), "arch": json.loads((folder / "arch.json").read_text())}


@pytest.mark.slow
def test_killed_in_the_middle_of_each_phase_it_ends_like_an_unbroken_run(tmp_path: Path) -> None:
    words = ("search", recipe(tmp_path), "--log_every", "1")
    ok(*words, "--out", tmp_path / "unbroken")
    broken = (*words, "--out", tmp_path / "broken", "--resume", "auto")
    begins = 0
    for k in range(len(PHASES)):
        at = k * PHASE + EPOCH + 1  # a step after the checkpoint in the middle of phase k
        assert run(broken, At(KILL, "update", at - begins + 1), tmp_path / "log") == -KILL, (tmp_path / "log").read_text()
        begins = k * PHASE + EPOCH
        assert checkpoint.load(tmp_path / "broken" / "checkpoints")[0]["step"] == begins
        last = json.loads((tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["shrink/phase"] == k
    result = ok(*broken)
    assert f"resuming at step {begins}" in result.err
    assert differences(outcome(tmp_path / "broken"), outcome(tmp_path / "unbroken")) == []
    rows = [json.loads(line) for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    phases = [row["shrink/phase"] for row in rows if "shrink/phase" in row]
    assert phases == [k for k in range(len(PHASES)) for _ in range(PHASE)]


def test_a_tie_holds_wherever_the_space_is_built_again(tmp_path: Path) -> None:
    """In ``nas spaces``, and in what ``nas extract`` draws; keys of values are numbers in YAML and text in JSON."""
    tie = {"stage*.block*.expand": {"leader": "stage*.depth", "values": {1: 3, 2: 6}}}
    args = json.dumps({"width": 0.1, "small": True, "kernels": [3], "depths": [1, 2]})
    said = ok("spaces", "mobilenet.OFAMobileNetV3", "--args", args, "--tie", json.dumps(tie), "--json")
    assert json.loads(said.last)["size"] == 2**5
    words = ("extract", recipe(tmp_path, tie=tie), "--from", "scratch")
    for seed in range(3):
        folder = Path(ok(*words, "--arch", f"random:{seed}", "--out", tmp_path / str(seed)).last)
        arch = read_arch(folder / "arch.json").arch
        for s in range(5):
            depth = arch[f"stage{s}.depth"]
            assert {arch[f"stage{s}.block{b}.expand"] for b in range(int(depth))} == {3 * int(depth)}
