"""Vision transformers from a shipped recipe through the command line: a search by superposition, the derived network with the
supernet's weights, the bundle loaded where only torch is, and trained on with drop path."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli import DATA, ok

from search_spaces.arch import read_arch
from search_spaces.vit import ViT

SMALL = ("--space.embed", "[4,6,8]", "--space.depth", "[1,2]", "--space.heads", "[1,2]", "--space.head_dim", "4")
ONE = ("--epochs", "1", "--strategy.weights.warmup_epochs", "0", "--threads", "1", *DATA)
ALONE = """
import importlib.util, json, pathlib, sys, torch
folder = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("model", folder / "model.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
net = module.model(folder / "model.safetensors")
z = net(torch.zeros(2, 1, 8, 8))
ours = [name for name in sys.modules if name.split(".")[0] in ("nas", "supernets", "search_spaces", "safetensors")]
print(json.dumps({"shape": list(z.shape), "finite": bool(z.isfinite().all()), "alike": torch.equal(z[0], z[1]),
                  "n": sum(p.numel() for p in net.parameters()), "ours": ours}))
"""


@pytest.mark.slow
def test_a_vision_transformer_is_searched_extracted_loaded_alone_and_retrained(tmp_path: Path) -> None:
    ok("search", "tangle-vit-digits", *ONE, *SMALL, "--out", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("alpha/entropy" in line and "cost/expected" in line for line in lines)
    found = ok("extract", tmp_path / "run", "--out", tmp_path / "found")
    assert "weights: inherited" in found.err and "counted and predicted alike" in found.err
    space = ViT([4, 6, 8], [1, 2], [1, 2], [1, 2], head_dim=4, patch=2, image=8)
    file = read_arch(tmp_path / "found" / "arch.json", expect=space)
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path / "found")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {"shape": [2, 10], "finite": True, "alike": True, "n": file.costs["params"], "ours": []}
    words = ("--epochs", "1", "--plain.warmup_epochs", "0", "--plain.drop_path", "0.2", "--plain.drop_path_version", "1",
             "--plain.drop_path_steps", "2", "--threads", "1", *DATA)  # fmt: skip
    trained = Path(ok("retrain", tmp_path / "found", *words, "--out", tmp_path / "trained").last)
    steps = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["train/drop_path"] for line in steps if "train/drop_path" in line) == pytest.approx(0.2)
    assert dict(read_arch(trained / "arch.json", expect=space).arch) == dict(file.arch)
    assert "DropPath" not in (trained / "model.py").read_text()
    scores = json.loads(ok("evaluate", trained, "--json").last)
    assert 0.0 <= scores["top1"] <= 1.0
