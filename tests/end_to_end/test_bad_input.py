"""Bad usage and bad input: exit code 2, one line that says what, where and what is allowed, and nothing lost or left."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cli import RETRAIN, SEARCH, content, draw_images, nas, ok
from PIL import Image

from nas import checkpoint
from nas.ranks import Ranks
from nas.run import Run, explicit


class Given(NamedTuple):
    """What a case may name: shared runs (never written to) and a folder of its own, which is the current one."""

    tied: Path
    bundle: Path
    scratch: Path
    here: Path


Words = Callable[[Given], list[str | Path]]
TAS = "nas.strategies.tas.TAS"
RARTS = "nas.strategies.rarts.RARTS"
SPACE = "search_spaces.resnet.CifarResNet"
MINE = ("--data.name", "folder", "--data.root", "mine", "--data.limit", "null", "--data.batch_size", "5")
BOTH = ("checkpoints/last.pt", "checkpoints/previous.pt")
AGAIN = (*SEARCH, "--out", "copy", "--resume", "auto")
DEPTH8 = ("spaces", "resnet.CifarResNet", "--args", "{depth: 8}")


def search(*words: str) -> Words:
    return lambda given: [*SEARCH, *words]


def verb(*words: str) -> Words:
    """Words in which TIED, BUNDLE and SCRATCH stand for paths."""
    return lambda given: [getattr(given, word.lower()) if word in ("TIED", "BUNDLE", "SCRATCH") else word for word in words]


def strategy(text: str) -> Words:
    """A recipe whose strategy is TAS with this as its init_args."""
    return recipe(f"strategy: {{class_path: {TAS}, init_args: {text}}}\n")


def recipe(text: str) -> Words:
    def write(given: Given) -> list[str | Path]:
        (given.here / "mine.yaml").write_text(text)
        return ["search", "mine.yaml", "--threads", "1"]

    return write


def images(change: Callable[[Path], object], *words: str) -> Words:
    """A search on a folder of images after ``change`` of it."""

    def make(given: Given) -> list[str | Path]:
        draw_images(given.here / "mine", "L")
        change(given.here / "mine")
        return [*SEARCH, *MINE, *words]

    return make


def other_arch(**changes: object) -> Words:
    """Extraction of the arch.json of TIED with top-level keys changed; ``depth`` changes the space."""

    def make(given: Given) -> list[str | Path]:
        arch = json.loads((given.tied / "arch.json").read_text())
        if "depth" in changes:
            arch["space"]["args"]["depth"] = changes["depth"]
        arch.update({key: value for key, value in changes.items() if key != "depth"})
        (given.here / "arch.json").write_text(json.dumps(arch))
        return ["extract", given.tied, "--arch", "arch.json", "--out", "out"]

    return make


def copied(name: str, change: Callable[[Path], object], *words: str) -> Words:
    """A verb on a changed copy of TIED, BUNDLE or SCRATCH."""

    def make(given: Given) -> list[str | Path]:
        shutil.copytree(getattr(given, name), given.here / "copy")
        change(given.here / "copy")
        return list(words)

    return make


def cut(*names: str) -> Callable[[Path], object]:
    """Keep the first half of these files."""
    return lambda folder: [(folder / name).write_bytes((folder / name).read_bytes()[: (folder / name).stat().st_size // 2])
                           for name in names]  # fmt: skip


def photo(mode: str) -> Words:
    def make(given: Given) -> list[str | Path]:
        if mode == "text":
            (given.here / "photo.png").write_text("no image")
        elif mode == "torn":
            Image.fromarray(np.zeros((64, 64), np.uint8)).save(given.here / "photo.png")
            cut("photo.png")(given.here)
        else:
            Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(given.here / "photo.png")
        return ["predict", given.scratch / "bundle", "photo.png"]

    return make


CASES: dict[str, tuple[Words, list[str]]] = {
    # recipes and keys
    "recipe unknown": (verb("search", "tas-digit"), ["'tas-digit' is not known. Nearest: tas-digits. Allowed: alphanet-"]),
    "recipe missing": (verb("search", "nope.yaml"), ["nope.yaml", "no such file"]),
    "recipe unnamed": (verb("search", "--epochs", "3"), ["which recipe", "tas-digits"]),
    "recipe a list": (recipe("- a\n- b\n"), ["mine.yaml", "keys and values"]),
    "recipe no yaml": (recipe("a: [1\n"), ["mine.yaml", "YAML", "line"]),
    "recipe empty": (recipe("seed: 3\n"), ["space is missing"]),
    "recipe key": (recipe("epochz: 3\n"), ["epochz is not a known key", "Nearest: epochs"]),
    "recipe nested key": (recipe("data: {nme: digits}\n"), ["data.nme is not a known key", "Nearest: data.name"]),
    "recipe section": (recipe("data: 3\n"), ["data = 3 is not a section", "batch_size"]),
    "recipe null section": (recipe("evaluate:\n"), ["evaluate = None is not a section", "every"]),
    "recipe null": (recipe("epochs: null\n"), ["epochs is empty", "1 is the default"]),
    "recipe type": (recipe("epochs: many\n"), ["epochs = many is not valid", "a whole number"]),
    "recipe init_args": (strategy("3"), ["strategy.init_args = 3 is not a section"]),
    "recipe class key": (strategy("{targt: 5%}"), [f"strategy.targt is not a known key of {TAS}", "Nearest: strategy.target."]),
    "recipe class type": (strategy("{lr: abc}"), ["strategy.lr = abc is not valid", "a number"]),
    "recipe class needs": (recipe(f"space: {{class_path: {SPACE}}}\n"), ["space", f"{SPACE} needs depth", "--space.KEY"]),
    "key unknown": (search("--data.limt", "3"), ["data.limt is not a known key", "Nearest: data.limit"]),
    "key of a class": (search("--strategy.targt", "50%"),
                       [f"strategy.targt is not a known key of {TAS}", "Nearest: strategy.target."]),
    "key of a section": (verb("search", "rarts-digits", "--strategy.alpha.lr", "1"),
                         [f"strategy.alpha.lr is not a known key of {RARTS}", "Nearest: strategy.alphas.lr."]),
    "key in a section": (verb("search", "rarts-digits", "--strategy.init_args.alphas.lrr", "1"),
                        ["Nearest: strategy.alphas.lr."]),
    "key of a budget": (verb("search", "rarts-digits", "--strategy.budget.targt", "1"),
                        ["Nearest: strategy.budget.target."]),
    "recipe key of a section": (recipe(f"strategy: {{class_path: {RARTS}, init_args: {{weight: {{lr: 1}}}}}}\n"),
                                ["strategy.weight", "Nearest: strategy.weights"]),
    "share without %": (search("--strategy.target", "0.4"), ["target = 0.4", "did you mean 40%?"]),
    "word too many": (search("stray"), ["'stray'", "--key value"]),
    "value missing": (verb("search", "tas-digits", "--epochs"), ["--epochs needs a value"]),
    "whole number": (search("--epochs", "1.5"), ["epochs = 1.5 is not valid", "Expected: a whole number"]),
    "number": (search("--strategy.lr", "abc"), ["strategy.lr = abc is not valid", "Expected: a number."]),
    "pair": (search("--strategy.temperature", "[1]"), ["strategy.temperature = [1] is not valid", "a list of 2 elements"]),
    "truth": (search("--channels_last", "maybe"), ["channels_last = maybe is not valid", "true or false"]),
    "list": (search("--data.augment", "crop"), ["data.augment = crop is not valid", "a list"]),
    "mapping": (search("--restrict", "3"), ["restrict = 3 is not valid", "keys and values"]),
    "no epochs": (search("--epochs", "0"), ["epochs = 0", "1 or more"]),
    "no time": (search("--max-time", "0"), ["max_time = 0", "above 0"]),
    "rule": (search("--strategy.rule", "none"), ["rule = 'none'", "Allowed: paper, released"]),
    # classes
    "space unknown": (search("--space", "search_spaces.resnet.CifarResnet"), ["no class CifarResnet", f"Nearest: {SPACE}"]),
    "space of another kind": (search("--space", "nas.data.Data"), ["space = nas.data.Data is not a SearchSpace"]),
    "strategy module": (search("--strategy", "foo.Bar"), ["strategy = foo.Bar", "no module foo"]),
    "strategy no path": (search("--strategy", "TAS"), ["strategy = TAS is not a class", "module.Class"]),
    "strategy none": (recipe("strategy: 3\n"), ["strategy = 3 is not a Strategy"]),
    "supernet alien": (search("--supernet", "torch.nn.Linear"), ["torch.nn.Linear needs in_features"]),
    "supernet of another space": (
        search("--supernet", "supernets.nats.Topology"),
        ["supernets.nats.Topology is not for the space resnet.CifarResNet", "are in supernets.resnet"],
    ),
    "supernet that is none": (search("--supernet", "torch.nn.Identity"), ["torch.nn.Identity is not for the space"]),
    "alphas that never learn": (
        verb("search", "gdas-nb201-digits", "--epochs", "3", "--strategy.alphas.warmup_epochs", "3", "--out", "x"),
        ["warmup_epochs = 3 are the whole run of 3 epochs", "Allowed: less"],
    ),
    # spaces and budgets
    "depth": (search("--space.depth", "21"), ["depth = 21", "Allowed: 8, 14, 20", "Nearest: 20"]),
    "option": (search("--restrict", '{"stage1.width": [40]}'), ["stage1.width = 40", "Allowed: 1, 2, 3", "Nearest: 6"]),
    "pattern": (search("--restrict", '{"stage9.*": largest}'), ["'stage9.*' matches no choice", "stage0.width"]),
    "budget": (search("--strategy.target", "1%"), ["target = 1%", "Smallest cost: ", "largest: ", "(100.0%)"]),
    "budget word": (search("--strategy.target", "half"), ["target = 'half' is not a budget", "55%"]),
    "spaces name": (verb("spaces", "resnet.Cifar"), ["'resnet.Cifar' is not known", "Nearest: resnet.CifarResNet"]),
    "spaces arg": (verb("spaces", "resnet.CifarResNet", "--args", "{dpth: 20}"), ["dpth", "Nearest: depth"]),
    "spaces budget": (verb(*DEPTH8, "--macs", "1"), ["--macs = 1", "Smallest cost"]),
    "spaces image": (verb(*DEPTH8, "--input", "[3]"), ["--input [3]", "height"]),
    # data and devices
    "data name": (search("--data.name", "cifar"), ["data.name = 'cifar'", "Allowed: digits"]),
    "data absent": (search("--data.name", "folder", "--data.root", "nowhere"), ["nowhere does not exist", "train/<class>/"]),
    "data unfetched": (search("--data.name", "cifar10", "--data.root", "nowhere"), ["cifar10 is not in nowhere", "--data.root",
                                                                                  "--data.download true"]),
    "class empty": (images(lambda mine: (mine / "train" / "grey").mkdir()), ["mine/train/grey holds no image"]),
    "image corrupt": (images(lambda mine: (mine / "train/dark/3.png").write_text("no")), ["mine/train/dark/3.png", "corrupt"]),
    "batch": (search("--data.batch_size", "300"), ["batch_size = 300", "100 images of train", "Give 100 or less"]),
    "batch of valid": (search("--data.valid_fraction", "0.05", "--out", "run"), ["batch_size = 16", "10 images of valid"]),
    "no valid": (search("--data.valid_fraction", "0"), ["'select' holds no image", "--data.valid_fraction"]),
    "augment": (search("--data.augment", "[crup]"), ["'crup'", "Allowed: crop, flip"]),
    "device": (search("--device", "gpu"), ["--device gpu", "Allowed: auto, cpu, cuda"]),
    "precision": (search("--precision", "float16"), ["'float16'", "Allowed: float32, bfloat16"]),
    "resume": (search("--resume", "maybe"), ["resume = 'maybe'", "Allowed: 'auto', 'never'"]),
    "weights": (search("--init", "nope.safetensors"), ["nope.safetensors cannot be read", "model.safetensors of a bundle"]),
    # extraction
    "run absent": (verb("extract", "runs/nope"), ["runs/nope", "no such folder"]),
    "run no run": (lambda given: ["extract", given.here], ["not a run folder", "config.yaml"]),
    "run retrained": (verb("extract", "SCRATCH"), ["is not a search", "/bundle"]),
    "arch absent": (verb("extract", "TIED", "--arch", "nope.json", "--out", "out"), ["--arch nope.json", "derived, largest"]),
    "arch seed": (verb("extract", "TIED", "--arch", "random:x", "--out", "out"), ["random:x", "whole number"]),
    "arch budget": (verb("extract", "TIED", "--arch", "random:1@1%", "--out", "out"), ["random:1@1%", "Smallest cost"]),
    "arch space": (other_arch(depth=20), ["arch.json is for space resnet.CifarResNet(depth=20", "here it is", "depth=14"]),
    "arch version": (other_arch(version=2), ["version 2 is newer", "update supernas"]),
    "arch format": (other_arch(format="other"), ["arch.json: format is 'other'"]),
    "weights from": (verb("extract", "TIED", "--from", "air", "--out", "out"), ["--from air", "auto, inherited, scratch"]),
    "out missing": (verb("extract", "tas-digits", "--arch", "largest"), ["--out is missing"]),
    "out in use": (verb("extract", "TIED", "--out", "BUNDLE"), ["is not empty", "--out"]),
    "checkpoints torn": (copied("tied", cut(*BOTH), "extract", "copy"),
                         ["copy/checkpoints/last.pt cannot be read", "No readable checkpoint"]),
    "checkpoints torn, resumed": (copied("tied", cut(*BOTH), *AGAIN), ["copy/checkpoints/last.pt cannot be read"]),
    "resumed otherwise": (copied("tied", lambda copy: None, *AGAIN, "--strategy.lr", "0.2"),
                          ["strategy.init_args.lr (was 0.1, now 0.2)", "start a new run"]),
    # bundles
    "bundle absent": (verb("retrain", "nope"), ["nope", "no such folder", "nas extract"]),
    "bundle unnamed": (verb("evaluate", "--split", "test"), ["which bundle"]),
    "bundle no bundle": (verb("retrain", "TIED"), ["is not a bundle", "model.safetensors"]),
    "bundle torn": (copied("bundle", cut("model.safetensors"), "evaluate", "copy"), ["copy/model.safetensors is damaged"]),
    "bundle report": (copied("bundle", lambda copy: (copy / "report.json").write_text('{"recipe": []}'), "evaluate", "copy"),
                      ["copy/report.json", "recipe holds no keys"]),
    "retrain from": (verb("retrain", "BUNDLE", "--from", "air"), ["--from air", "scratch, inherited"]),
    "retrain recipe": (verb("retrain", "BUNDLE", "--recipe", "nope"), ["'nope' is not known", "Nearest: "]),
    "warmup": (verb("retrain", "BUNDLE", *RETRAIN, "--plain.warmup_epochs", "5"), ["warmup_epochs = 5", "Allowed: "]),
    "split": (verb("evaluate", "BUNDLE", "--split", "all"), ["'all'", "train, valid, select, test"]),
    "other data": (verb("evaluate", "BUNDLE", "--data.size", "9"), ["expects images (1, 8, 8)", "(1, 9, 9)", "--data.root"]),
    "photo absent": (verb("predict", "BUNDLE", "nope.png"), ["nope.png", "no such file"]),
    "photo none": (photo("text"), ["photo.png cannot be read as an image"]),
    "photo torn": (photo("torn"), ["photo.png cannot be read as an image"]),
    "photo deep": (photo("deep"), ["photo.png", "more than 8 bits"]),
    "top": (verb("predict", "BUNDLE", "x.png", "--top", "11"), ["--top 11", "1 to 10"]),
    "monitor": (verb("monitor", "nope"), ["nope", "no such folder"]),
}  # fmt: skip


@pytest.fixture
def given(tied: Path, bundle: Path, retrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    monkeypatch.chdir(tmp_path)
    return Given(tied, bundle, retrained, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_changes_nothing(name: str, given: Given, place: Path) -> None:
    words, fragments = CASES[name][0](given), CASES[name][1]
    before = content(place), content(given.here)
    result = nas(*words)
    assert result.code == 2, result.out + result.err
    assert len(result.errors) == 1, result.err
    assert result.errors[0].startswith(f"nas {words[0]}: ")
    assert [text for text in fragments if text not in result.errors[0]] == [], result.errors[0]
    assert result.out == ""
    after = content(given.here)
    after.pop("mine.cache", None)  # where decoded images would be
    assert (content(place), after) == before


def test_unknown_verbs_name_the_nearest() -> None:
    result = nas("serch", "tas-digits")
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
    assert "'serch' is not a command" in result.err and "Nearest: search." in result.err
    assert nas().code == 2 and nas("--help").code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(given: Given) -> None:
    for words in (SEARCH, ("retrain", given.bundle), ("evaluate", given.bundle), ("extract", given.tied, "--out", "out")):
        result = nas(*words, "--device", "cuda")
        assert result.code == 2 and "--device cuda: this machine has 0 CUDA devices. Use cpu or auto." in result.errors[0]
    assert list(given.here.iterdir()) == []


def test_a_teacher_of_other_data(given: Given) -> None:
    draw_images(given.here / "mine", "L")
    ok("extract", "tas-digits", "--arch", "smallest", "--out", "other", "--space.depth", "8", *MINE)
    before = content(given.here)
    result = nas("retrain", given.bundle, *RETRAIN, "--teacher", "other", "--out", "run")
    assert result.code == 2 and len(result.errors) == 1
    assert "other expects images (1, 8, 8) of 2 classes; the data have (1, 8, 8) and 10" in result.errors[0]
    assert content(given.here) == before


def test_the_same_number_of_other_classes(given: Given) -> None:
    shutil.copytree(given.bundle, "copy")
    arch = json.loads(Path("copy/arch.json").read_text())
    arch["classes"][3] = "three"
    Path("copy/arch.json").write_text(json.dumps(arch))
    result = nas("evaluate", "copy")
    assert result.code == 2 and "copy has the class 'three' where the data have '3'" in result.errors[0]


def test_a_folder_in_use_is_left_alone(given: Given) -> None:
    """Named by the user it is refused; the default name counts on to -2."""
    for name in ("run", "runs/tas-digits"):
        Path(name).mkdir(parents=True)
        Path(name, "thesis.txt").write_text("mine")
    refused = nas(*SEARCH, "--epochs", "1", "--out", "run")
    assert refused.code == 2 and "run is not empty: choose another --out, empty it, or go on in it" in refused.errors[0]
    assert explicit("run", "never", Ranks(1, 2, 1, main=False)) == Path("run")  # the main rank may have made it just now
    assert ok(*SEARCH, "--epochs", "1").last == "runs/tas-digits-2/arch.json"
    for name in ("run", "runs/tas-digits"):
        assert [item.name for item in Path(name).iterdir()] == ["thesis.txt"]


def test_debug_shows_the_traceback(given: Given) -> None:
    with pytest.raises(ValueError, match="cannot be reached"):
        nas(*SEARCH, "--strategy.target", "1%", "--debug")


def test_a_run_that_fails_later_keeps_what_it_has(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Run.save

    def fail(self: Run, step: int, name: str = "last") -> None:
        save(self, step, name)
        raise OSError("No space left on device")

    monkeypatch.setattr(Run, "save", fail)
    result = nas(*SEARCH, "--out", "run")
    assert result.code == 2 and result.errors == ["nas search: No space left on device"]
    assert checkpoint.load(Path("run/checkpoints"))[0]["step"] == 6


OWN = """
from nas.strategies.tas import TAS
class Lacks:
    def start(self, setup): ...
    def update(self, draw, now): ...
    def arch(self, now): ...
class Bare(TAS):
    def update(self, draw, now): ...
"""


@pytest.mark.parametrize(("name", "fragments"), [
    ("Lacks", ["own_strategies.Lacks is not a Strategy: it lacks passes, probabilities, architecture, fits, network."]),
    ("Bare", ["own_strategies.Bare is not a Strategy: ", "it must declare update(self, draw: Draw, now: Moment) -> Metrics."]),
])  # fmt: skip
def test_a_strategy_of_your_own_that_is_none(name: str, fragments: list[str], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "own_strategies.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    result = nas(*SEARCH, "--strategy", f"own_strategies.{name}", "--out", tmp_path / "run")
    assert result.code == 2 and len(result.errors) == 1
    assert [text for text in fragments if text not in result.errors[0]] == [], result.errors[0]
