"""``nas monitor``: TensorBoard on a run, asked for the contract's tags as a browser would."""
from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from search_spaces.resnet import CifarResNet

ROOT = Path(__file__).parents[2]


def ask(url: str, plugin: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}data/plugin/{plugin}/tags", timeout=60) as reply:
        return json.load(reply)


def heed() -> None:
    """Ctrl-C counts, even where the tests themselves run in the background of a shell, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_tensorboard_serves_a_run_and_stops_on_ctrl_c(tied: Path) -> None:
    words = [sys.executable, "-m", "nas", "monitor", str(tied.parent), "--port", "0"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed)  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://localhost:") and url.endswith("/")
        scalars: dict[str, Any] = {}
        for _ in range(120):  # TensorBoard reads the events in the background
            scalars = ask(url, "scalars").get("tied", {})
            if "system/data_wait" in scalars and "select/top1" in scalars:
                break
            time.sleep(0.5)
        assert {"train/loss", "train/top1", "train/lr", "train/grad_norm", "valid/loss", "valid/top1", "alpha/entropy",
                "cost/expected", "cost/current", "cost/target", "system/images_per_s"} <= set(scalars)  # fmt: skip
        assert "alpha/heatmap" in ask(url, "images")["tied"]
        widths = {f"alpha/{name}" for name in CifarResNet(14, widths=[4, 6, 8]).free}
        assert widths <= set(ask(url, "histograms")["tied"]) and widths <= set(ask(url, "distributions")["tied"])
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in errors
    finally:
        process.kill()
