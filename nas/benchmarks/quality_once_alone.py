"""The stand-alone check of nas/benchmarks/quality_once.py: networks of a supernet against the same networks trained alone.

Through ``nas extract``, ``nas evaluate`` and ``nas retrain``, each in a process of its own, skipped where its result is there.
Equal images: training alone lasts as many epochs of the same images as the supernet was trained for, however many networks of
the supernet each batch went through. Alone a network learns from the labels (SGD, one cosine, the loss, rate and decay of the
supernet's weights); fine-tuning starts from the inherited weights, whose images are extra.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nas.benchmarks.quality import execute, in_parallel
from search_spaces.arch import read_arch


def alone(
    run: Path, curve: Mapping[str, Any], names: Sequence[str], *, tune_epochs: int, tune_rate: float, bn_images: int, jobs: int,
    threads: int,
) -> dict[str, Any]:  # fmt: skip
    """``names`` of the supernet in the folder ``run``: {"rows": [{"net", "macs", "inherited", "tuned", "scratch"}], ...}.

    ``tune_rate``: the rate of fine-tuning, as a share of the supernet's. SystemExit where a command fails.
    """
    weights = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["strategy"]["init_args"]["weights"]
    rate, decay = float(weights["lr"]), float(weights["weight_decay"])
    common = [f"--seed={curve['seed']}", "--plain.schedule=cosine", f"--plain.weight_decay={decay}", "--resume=auto"]

    def make(name: str) -> dict[str, Any]:
        place = run / "alone" / name.replace(" ", "-")
        if not place.with_suffix(".json").is_file():
            plain, log = place / "inherited", place.with_suffix(".log")
            if not plain.is_dir():
                execute(["nas", "extract", str(run), f"--arch={curve['text'][name]}", "--from=inherited",
                         f"--bn-images={bn_images}", f"--out={plain}"], log, threads)  # fmt: skip
            found: dict[str, Any] = {"net": name, "macs": curve["macs"][name], "inherited": _evaluated(plain, log, threads)}
            for kind, words in (
                ("tuned", ["--from=inherited", f"--epochs={tune_epochs}", f"--plain.lr={rate * tune_rate}"]),
                ("scratch", ["--from=scratch", f"--epochs={curve['epochs']}", f"--plain.lr={rate}"]),
            ):
                if not (place / kind / "bundle").is_dir():
                    execute(["nas", "retrain", str(plain), *common, *words, f"--out={place / kind}"], log, threads)
                found[kind] = read_arch(place / kind / "bundle" / "arch.json").metrics["top1"]["value"]
            place.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))

    largest_first = sorted(names, key=lambda name: -curve["macs"][name])
    rows = in_parallel([lambda name=name: make(name) for name in largest_first], jobs)
    return {"supernet": curve["name"], "seed": curve["seed"], "epochs": curve["epochs"], "tune_epochs": tune_epochs,
            "rate": rate, "tune_rate": rate * tune_rate, "images": curve["rows"][-1]["images"],
            "rows": sorted(rows, key=lambda row: row["macs"])}  # fmt: skip


def _evaluated(bundle: Path, log: Path, threads: int) -> float:
    """Test accuracy of a bundle, by ``nas evaluate --json``."""
    said = bundle.with_name("inherited.txt")
    execute(["nas", "evaluate", str(bundle), "--split=test", "--json"], said, threads)
    return float(json.loads(said.read_text(encoding="utf-8").splitlines()[-1])["top1"])
