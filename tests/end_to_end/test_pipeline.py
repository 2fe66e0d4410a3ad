"""From a recipe to a network that predicts: search, extract, retrain, evaluate, predict, on the embedded digits."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import RETRAIN, SEARCH, SPACE, TINY, Result, draw_images, nas, ok
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nas.build import assemble, rebuild
from nas.bundle import load_bundle
from nas.commands.extract import load_source
from nas.data import Data
from nas.evaluate import statistics_of
from nas.losses import CrossEntropy, distillation
from nas.recalibrate import install
from nas.recipe import find, parse, read, search_parser
from search_spaces.arch import read_arch
from search_spaces.resnet import CifarResNet

ONE = ("--epochs", "1", "--plain.warmup_epochs", "0")
SCALARS = {
    "train/loss", "train/top1", "train/lr", "train/grad_norm", "valid/loss", "valid/top1", "alpha/entropy", "cost/expected",
    "cost/current", "cost/target", "system/images_per_s", "system/memory", "system/data_wait",
}  # fmt: skip


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digits() -> Data:
    return Data("digits", batch_size=16, augment=["crop"], valid_fraction=0.5, limit=200)


# ---- search --------------------------------------------------------------------------------------------------------


def test_search_ends_in_a_valid_arch_file_and_says_where(searched: Result, tied: Path) -> None:
    said = json.loads(searched.last)
    file = read_arch(said.pop("arch"))
    assert said == file.costs and searched.out.count("\n") == 1
    space = CifarResNet(14, "tied", [4, 6, 8])
    space.check(file.arch)
    assert file == read_arch(tied / "arch.json", expect=space)
    assert (file.input, file.classes) == ((1, 8, 8), tuple("0123456789"))
    assert file.provenance["strategy"] == "tas" and file.provenance["seed"] == 1
    top1 = file.metrics["top1"]
    assert (top1["split"], top1["n"], top1["weights"], top1["bn"]) == ("valid", 100, "supernet", "recalibrated")
    assert searched.errors == []


def test_a_run_folder_holds_what_the_contract_says(tied: Path) -> None:
    names = {path.name for path in tied.iterdir() if not path.name.startswith("events")}
    assert {"config.yaml", "env.json", "metrics.jsonl", "system.jsonl", "checkpoints", "arch.json"} <= names
    assert {path.name for path in (tied / "checkpoints").iterdir()} == {"last.pt", "previous.pt"}
    windows = [row for row in rows(tied / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in windows] == [9, 11]
    assert {tag for tag in windows[0] if "/" in tag} >= {tag for tag in SCALARS if not tag.startswith("system/")}
    assert [row["step"] for row in rows(tied / "metrics.jsonl") if "select/top1" in row] == [5, 11]
    assert not re.search("time|second|clock|system/", (tied / "metrics.jsonl").read_text())
    for row in rows(tied / "system.jsonl"):
        assert set(row) == {"step", "system/images_per_s", "system/memory", "system/data_wait"}
        assert row["system/images_per_s"] > 0 and row["system/memory"] > 10 and 0 <= row["system/data_wait"] <= 1


def test_tensorboard_shows_the_contracts_tags(tied: Path) -> None:
    events = EventAccumulator(str(tied), {"histograms": 0, "images": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= SCALARS
    assert {f"alpha/{name}" for name in CifarResNet(14, "tied", [4, 6, 8]).free} == set(tags["histograms"])
    assert "alpha/heatmap" in tags["images"]
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    written = {row["step"]: row["train/loss"] for row in rows(tied / "metrics.jsonl") if "train/loss" in row}
    assert shown == pytest.approx(written)
    assert len(events.Images("alpha/heatmap")) == 2 and len(events.Histograms("alpha/stage1.depth")) == 2


def test_widths_alone_or_depths_alone_are_searched_by_restrict(tmp_path: Path) -> None:
    space = CifarResNet(14, "tied", [4, 6, 8])
    for fixed, other in (("depth", "width"), ("width", "depth")):
        out = tmp_path / fixed
        restrict = ("--restrict", f'{{"*.{fixed}": largest}}', "--strategy.target", "85%")
        arch = read_arch(ok(*SEARCH, "--epochs", "1", *restrict, "--out", out).last).arch
        counting = space.counting(arch)
        assert {name: arch[name] for name in counting if name.endswith(fixed)} == {
            name: space[name].options[-1] for name in counting if name.endswith(fixed)}  # fmt: skip
        searched = EventAccumulator(str(out)).Reload().Tags()["histograms"]
        assert searched and all(tag.endswith(f".{other}") for tag in searched)


def test_dry_run_measures_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    figures = json.loads(ok(*SEARCH, "--dry-run").last)
    assert figures["steps"] == 12 and figures["seconds_per_step"] > 0 and figures["memory_mib"] > 10
    assert list(tmp_path.iterdir()) == []


def test_print_config_says_the_whole_recipe_and_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = ok(*SEARCH, "--strategy.target", "70%", "--print_config").out
    Path("mine.yaml").write_text(printed)
    assert ok("search", "mine.yaml", "--print_config").out == printed
    assert "target: 70%" in printed and "depth: 14" in printed and "alpha_std: 0.01" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


# ---- extract -------------------------------------------------------------------------------------------------------


def test_a_bundle_computes_what_the_supernet_computes(tied: Path, bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    assert report["weights"] == "inherited" and 0 <= report["logits_max_difference"] <= 1e-5
    assert report["macs"]["counted"] == report["macs"]["predicted"] == read_arch(bundle / "arch.json").costs["macs"]
    _, built, _ = load_source(str(tied), [])
    arch = read_arch(tied / "arch.json").arch
    net = built.strategy.network(arch)
    install(net, statistics_of(net, [arch], built.data, torch.device("cpu"), 2000)[0])
    x = next(built.data.batches("test", "cpu", batch_size=32)).x
    plain = load_bundle(bundle, rebuild)
    with torch.no_grad():
        torch.testing.assert_close(plain.module(x), net.eval()(x, arch), atol=1e-5, rtol=0)
        assert float(plain.module(x).std()) > 1e-3
    assert plain.arch.arch == arch


def test_a_bundle_runs_where_only_torch_is(bundle: Path, tmp_path: Path) -> None:
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.save((x, load_bundle(bundle, rebuild).module(x)), tmp_path / "case.pt")
    code = (f"import sys, torch; sys.path.insert(0, {str(bundle)!r}); from model import model\n"
            f"x, wanted = torch.load({str(tmp_path / 'case.pt')!r})\n"
            f"net = model({str(bundle / 'model.safetensors')!r}).eval()\n"
            "with torch.no_grad(): print(float((net(x) - wanted).abs().max()))\n"
            "print(sorted({'nas', 'supernets', 'search_spaces', 'safetensors'} & set(sys.modules)))")  # fmt: skip
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 0, found.stderr
    difference, ours = found.stdout.splitlines()
    assert float(difference) <= 1e-6 and ours == "[]"


@pytest.mark.parametrize("arch", ["largest", "smallest", "random:3", "random:3@55%", "FILE"])
def test_extract_takes_architectures_by_name_and_by_file(arch: str, tied: Path, tmp_path: Path) -> None:
    given = str(tied / "arch.json") if arch == "FILE" else arch
    said = json.loads(ok("extract", tied, "--arch", given, "--out", tmp_path / "b", "--json").last)
    assert said["bundle"] == str(tmp_path / "b") and said["weights"] == "inherited" and said["logits_max_difference"] <= 1e-5
    found, space = read_arch(tmp_path / "b" / "arch.json"), CifarResNet(14, "tied", [4, 6, 8])
    full = json.loads(ok("spaces", "resnet.CifarResNet", "--args", "{depth: 14, widths: [4, 6, 8]}", "--input", "[1, 8, 8]",
                         "--json").last)["costs"]["largest"]["macs"]  # fmt: skip
    if arch in ("largest", "smallest"):
        assert found.arch == getattr(space, arch)()
    elif arch == "FILE":
        assert found.arch == read_arch(tied / "arch.json").arch
    elif "@" in arch:
        assert abs(found.costs["macs"] - 0.55 * full) <= 0.05 * 0.55 * full
    else:
        again = ok("extract", "tas-digits", *SPACE, "--arch", arch, "--out", tmp_path / "again").last
        assert read_arch(Path(again) / "arch.json").arch == found.arch  # of the seed alone, not of the weights


def test_the_papers_kind_falls_to_fresh_weights_and_says_so(tas: Path, tmp_path: Path) -> None:
    result = ok("extract", tas, "--out", tmp_path / "b", "--json")
    said = json.loads(result.last)
    assert said["weights"] == "fresh" and said["logits_max_difference"] is None
    assert "the bundle gets fresh weights, for nas retrain: " in result.err
    assert read_arch(tmp_path / "b" / "arch.json").metrics == {}
    refused = nas("extract", tas, "--from", "inherited", "--out", tmp_path / "c")
    assert refused.code == 2 and "cannot be inherited" in refused.err and "--from scratch" in refused.err
    assert not (tmp_path / "c").exists()


# ---- retrain, evaluate, predict ------------------------------------------------------------------------------------


def test_a_retrained_bundle_evaluates_to_what_it_states(retrained: Path) -> None:
    stated = read_arch(retrained / "bundle" / "arch.json").metrics["top1"]
    found = json.loads(ok("evaluate", retrained / "bundle", "--json").last)
    assert (stated["split"], stated["n"], stated["weights"]) == ("test", 359, "scratch")
    assert found["top1"] == stated["value"] and found["n"] == 359
    assert sum(right for right, _ in found["per_class"].values()) / 359 == pytest.approx(found["top1"])
    text = ok("evaluate", retrained / "bundle", "--split", "train").out
    assert text.splitlines()[-1].startswith("top-1 0.") and text.count("\n") == 11


def test_scratch_and_inherited_start_from_what_they_say(bundle: Path, tmp_path: Path) -> None:
    still = ("--plain.lr", "0", "--plain.weight_decay", "0", *RETRAIN, *ONE)
    old = {key: value for key, value in load_file(bundle / "model.safetensors").items() if value.ndim > 1}
    for origin, same in (("inherited", True), ("scratch", False)):
        path = Path(ok("retrain", bundle, "--from", origin, *still, "--out", tmp_path / origin).last)
        new = load_file(path / "model.safetensors")
        assert {torch.equal(new[key], value) for key, value in old.items()} == {same}
        stated = read_arch(path / "arch.json").metrics["top1"]["weights"]
        assert stated == ("fine-tuned" if same else "scratch")


def test_a_teachers_loss_is_the_published_one(bundle: Path, retrained: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    ok("retrain", bundle, "--from", "inherited", "--teacher", retrained / "bundle", "--plain.lam", "0.7", "--plain.T", "3",
       "--log-every", "1", *RETRAIN, *ONE, "--out", out)  # fmt: skip
    data = Data("digits", batch_size=16, augment=["crop"], limit=200)
    x, y, _ = data.feed(1, "cpu")("train")
    with torch.no_grad():
        z = load_bundle(bundle, rebuild).module.train()(x)
        z_teacher = load_bundle(retrained / "bundle", rebuild).module(x)
        wanted = distillation(z, z_teacher, y, 0.7, 3.0, CrossEntropy())
        assert float(wanted) != pytest.approx(float(CrossEntropy()(z, y)), abs=1e-3)
    assert rows(out / "metrics.jsonl")[0]["train/loss"] == pytest.approx(float(wanted), rel=1e-5)
    report = json.loads((out / "bundle" / "report.json").read_text())
    assert report["retrain"]["teacher"] == str(retrained / "bundle")


def test_predict_names_a_class_with_its_probability(retrained: Path, tmp_path: Path) -> None:
    data = digits()
    row = int(data.splits["test"].rows[5])
    pixels = data.splits["test"].images.pixels
    assert pixels is not None
    Image.fromarray(pixels[row, 0].numpy()).save(tmp_path / "digit.png")
    said = json.loads(ok("predict", retrained / "bundle", tmp_path / "digit.png", "--top", "10", "--json").last)
    file = read_arch(retrained / "bundle" / "arch.json")
    x = (pixels[row].float() / 255 - file.preprocess["mean"][0]) / file.preprocess["std"][0]
    with torch.no_grad():
        p = load_bundle(retrained / "bundle", rebuild).module(x[None]).softmax(1)[0]
    assert dict(said["classes"]) == pytest.approx(dict(zip("0123456789", p.tolist())), abs=2e-6)
    text = ok("predict", retrained / "bundle", tmp_path / "digit.png").last
    assert text == f"{tmp_path / 'digit.png'}: {int(p.argmax())} {float(p.max()):.4f}"


def test_a_trained_largest_network_starts_a_search(place: Path, tmp_path: Path) -> None:
    full = ok("extract", "tas-digits", *SPACE, "--data.limit", "200", "--data.batch_size", "16", "--arch", "largest", "--out",
              tmp_path / "full").last  # fmt: skip
    trained = Path(ok("retrain", full, *RETRAIN, *ONE, "--out", tmp_path / "teacher").last)
    weights = str(trained / "model.safetensors")
    built = assemble(parse(search_parser(), read(find("tas-digits")), [*TINY, "--init", weights]))
    x = next(built.data.batches("test", "cpu", batch_size=32)).x
    with torch.no_grad():
        wanted = load_bundle(trained, rebuild).module(x)
        found = built.net.eval()(x, built.space.largest())
    assert torch.equal(found, wanted) or float((found - wanted).abs().max()) <= 1e-6
    assert float(wanted.std()) > 1e-3
    assert json.loads(ok(*SEARCH, "--init", weights, "--dry-run").last)["steps"] == 12
    wrong = nas(*SEARCH, "--space.widths", "[4,6,9]", "--init", weights, "--out", tmp_path / "wrong")
    assert wrong.code == 2 and "not of this space's largest network" in wrong.err and not (tmp_path / "wrong").exists()


# ---- spaces, your own images ---------------------------------------------------------------------------------------


def test_spaces_lists_and_describes() -> None:
    assert {"resnet.CifarResNet", "resnet.ImageNetResNet"} <= set(json.loads(ok("spaces", "--json").last))
    assert "resnet.CifarResNet" in ok("spaces").out
    words = ("spaces", "resnet.CifarResNet", "--args", "{depth: 20, kind: tas}", "--macs", "55%")
    said, space = json.loads(ok(*words, "--json").last), CifarResNet(20, "tas")
    assert said["size"] == space.size and said["choices"] == {c.name: list(c.options) for c in space.choices}
    assert said["costs"]["largest"]["macs"] == 40_813_184  # ResNet-20 with pooled projection shortcuts, 32x32 images
    assert said["budget_macs"] == pytest.approx(0.55 * 40_813_184)
    text = ok(*words).out
    assert "40,813,184" in text and "reachable: 22,447,251 MACs" in text
    few = json.loads(ok(*words, "--restrict", '{"*.depth": largest}', "--json").last)
    assert few["choices"]["stage0.depth"] == [3] and few["size"] < said["size"]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_search_on_a_folder_of_your_own_images_and_on_its_archive(mode: str, tmp_path: Path) -> None:
    draw_images(tmp_path / "mine", mode)
    words = (*SEARCH, "--epochs", "1", "--data.name", "folder", "--data.limit", "null", "--data.batch_size", "5")
    path = ok(*words, "--data.root", tmp_path / "mine", "--out", tmp_path / "run").last
    file = read_arch(path)
    assert file.classes == ("bright", "dark") and file.input == (3 if mode == "RGB" else 1, 8, 8)
    assert file.preprocess["channels"] == mode
    if mode == "L":
        return
    subprocess.run(["tar", "-czf", tmp_path / "mine.tar.gz", "-C", tmp_path / "mine", "."], check=True)
    ok(*words, "--data.root", tmp_path / "mine.tar.gz", "--out", tmp_path / "tar")
    assert (tmp_path / "tar" / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()
    ok("extract", tmp_path / "run")
    said = ok("predict", tmp_path / "run" / "bundle", tmp_path / "mine" / "test" / "dark" / "0.png").last
    assert re.fullmatch(r".*/dark/0\.png: (dark|bright) [01]\.\d{4}", said)
