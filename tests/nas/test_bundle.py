"""Bundles: written whole or not at all, proven by figures, loaded without running what they hold."""
from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from nas.bundle import counted, load_bundle, prove, write_bundle
from search_spaces.arch import ArchFile
from search_spaces.resnet import CifarResNet


class Net(nn.Module):
    """8x8 images: conv 3 -> c (3x3, 8x8 out), grouped conv c -> c (stride 2, 4x4 out), linear c -> 5 with bias."""

    def __init__(self, c: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, c, 3, padding=1, bias=True)
        self.norm = nn.BatchNorm2d(c)
        self.depthwise = nn.Conv2d(c, c, 3, stride=2, padding=1, groups=c, bias=False)
        self.head = nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.conv(x)))
        x = self.depthwise(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Normed(Net):
    """The inherited form of a network that is published without this norm."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = nn.BatchNorm2d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.hardswish(self.norm(self.conv(x))))
        return self.head(F.adaptive_avg_pool2d(self.pooled(x), 1).flatten(1))


MACS = 8 * 8 * 4 * 3 * 9 + 4 * 4 * 4 * 9 + 4 * 5
PARAMS = (4 * 3 * 9 + 4) + 2 * 4 + 4 * 9 + (4 * 5 + 5)


def graph(c: int = 4) -> fx.GraphModule:
    torch.manual_seed(3)
    plain = fx.symbolic_trace(Net(c)).eval()
    with torch.no_grad():
        plain.get_buffer("norm.running_mean").uniform_(-0.5, 0.5)
        plain.get_buffer("norm.running_var").uniform_(0.5, 1.5)
    return plain


def rebuild(_: ArchFile, form: str = "fresh") -> nn.Module:
    return fx.symbolic_trace(Net() if form == "fresh" else Normed())


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def arch_file() -> ArchFile:
    space = CifarResNet(depth=20, kind="tied")
    return ArchFile.of(space, space.smallest(), input=(3, 8, 8), classes=tuple("abcde"),
                       preprocess={"mean": [0.5] * 3, "std": [0.2] * 3, "channels": "RGB"},
                       costs={"macs": MACS, "params": PARAMS})


def write(out: Path, plain: fx.GraphModule | None = None, report: Any = None, **forms: Any) -> Path:
    return write_bundle(out, plain or graph(), arch_file(), {"weights": "fresh"} if report is None else report,
                        images(), **forms)


def test_counts_are_those_of_one_image_by_hand() -> None:
    assert counted(graph(), images(3)) == (MACS, PARAMS)
    frozen = graph()
    frozen.get_parameter("head.bias").requires_grad_(False)
    assert counted(frozen, images()) == (MACS, PARAMS - 5)


def test_counting_leaves_the_network_as_it_was() -> None:
    plain = graph().train()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    counted(plain, images())
    assert plain.training and all(torch.equal(before[key], value) for key, value in plain.state_dict().items())


def test_proof_says_what_was_found() -> None:
    plain = graph()
    report = prove(plain, images(), {"macs": MACS, "params": PARAMS}, plain(images()) + 2e-6)
    assert report["macs"] == {"predicted": MACS, "counted": MACS}
    assert report["params"] == {"predicted": PARAMS, "counted": PARAMS}
    assert report["weights"] == "inherited" and report["logits_max_difference"] == pytest.approx(2e-6, rel=0.1)
    fresh = prove(plain, images(), {"macs": MACS, "params": PARAMS}, None)
    assert (fresh["weights"], fresh["logits_max_difference"]) == ("fresh", None)
    assert (report["form"], fresh["form"]) == ("inherited", "fresh")


@pytest.mark.parametrize("macs, params, shift, words", [
    (MACS + 1, PARAMS, 0.0, f"has {MACS} macs, predicted were {MACS + 1}"),
    (MACS, PARAMS - 1, 0.0, f"has {PARAMS} params, predicted were {PARAMS - 1}"),
    (MACS, PARAMS, 1e-3, "differ from the supernet's by 0.001"),
    (MACS, PARAMS, float("nan"), "differ from the supernet's by nan"),
])
def test_proof_fails_where_a_figure_does(macs: int, params: int, shift: float, words: str) -> None:
    plain = graph()
    with pytest.raises(RuntimeError, match=words):
        prove(plain, images(), {"macs": macs, "params": params}, plain(images()) + shift)


def test_proof_refuses_other_shapes_and_missing_figures() -> None:
    with pytest.raises(RuntimeError, match=r"logits are \(2, 5\), not \(1, 5\)"):
        prove(graph(), images(), {"macs": MACS, "params": PARAMS}, torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"predicted lacks params"):
        prove(graph(), images(), {"macs": MACS}, None)


def test_round_trip(tmp_path: Path) -> None:
    out = write(tmp_path / "runs" / "bundle", report={"weights": "fresh", "macs": {"counted": MACS}})
    assert sorted(p.name for p in out.iterdir()) == ["arch.json", "model.py", "model.safetensors", "report.json"]
    assert [p.name for p in out.parent.iterdir()] == ["bundle"]
    bundle = load_bundle(out, rebuild)
    assert torch.equal(bundle.module(images()), graph()(images())) and not bundle.module.training
    assert bundle.report == {"weights": "fresh", "macs": {"counted": MACS}}
    assert bundle.arch == arch_file() and bundle.path == out


@pytest.mark.parametrize("report", [
    {"weights": "inherited", "form": "inherited"}, {"weights": "fine-tuned", "form": "inherited"},
    {"weights": "inherited"},  # as version 0.1 wrote it
])  # fmt: skip
def test_the_inherited_form_is_loaded_as_such(report: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(4)
    plain = fx.symbolic_trace(Normed()).eval()
    plain.get_buffer("pooled.running_mean").uniform_(-0.5, 0.5)
    bundle = load_bundle(write(tmp_path / "bundle", plain, report), rebuild)
    assert bundle.form == "inherited" and torch.equal(bundle.module(images()), plain(images()))


@pytest.mark.parametrize("report", [
    {"weights": "scratch", "form": "fresh"}, {"weights": "fine-tuned", "form": "fresh"},
    {"weights": "scratch"}, {"weights": "fine-tuned"}, {},
])  # fmt: skip
def test_the_fresh_form_is_loaded_as_such(report: dict[str, str], tmp_path: Path) -> None:
    bundle = load_bundle(write(tmp_path / "bundle", report=report), rebuild)
    assert bundle.form == "fresh" and torch.equal(bundle.module(images()), graph()(images()))


def test_a_form_that_is_not_known_or_not_the_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report\.json: form is 'dreamt'\. Allowed: fresh, inherited"):
        load_bundle(write(tmp_path / "a", report={"form": "dreamt"}), rebuild)
    with pytest.raises(ValueError, match=r"lacks pooled\.running_mean, .*its weights are not those of arch\.json"):
        load_bundle(write(tmp_path / "b", report={"form": "inherited"}), rebuild)


def test_loading_does_not_run_model_py(tmp_path: Path) -> None:
    out = write(tmp_path / "bundle")
    (out / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('ran')\n")
    load_bundle(out, rebuild)
    assert not (tmp_path / "ran").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: choose another --out or empty it"):
        write(tmp_path)
    with pytest.raises(ValueError, match=r"notes\.txt is not empty"):
        write(tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert (write(tmp_path / "empty") / "model.py").is_file()


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"report\.json: not writable as JSON"):
        write(tmp_path / "bundle", report={"loss": float("nan")})
    monkeypatch.setattr("nas.bundle.source", lambda *_: SOURCE_OF_ANOTHER)
    with pytest.raises(RuntimeError, match=r"model\.py does not compute what the network computes"):
        write(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


SOURCE_OF_ANOTHER = """
from torch import nn
import torch.nn.functional as F
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, eps=0.5)
        self.depthwise = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False)
        self.head = nn.Linear(4, 5)
    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.depthwise(F.hardswish(self.norm(self.conv(x)))), 1).flatten(1))
def model():
    return Network().eval()
"""


@pytest.mark.parametrize("name", ["model.safetensors", "arch.json", "report.json"])
def test_missing_and_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "bundle") / name
    whole = file.read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"\xff" * 40):
        file.write_bytes(part)
        with pytest.raises(ValueError, match=name) as error:
            load_bundle(tmp_path / "bundle", rebuild)
        assert "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(ValueError, match=f"is not a bundle: it lacks {name}"):
        load_bundle(tmp_path / "bundle", rebuild)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_bundle(tmp_path / "other", rebuild)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "bundle")
    stated = {"format": "nas-bundle", "version": "1"}
    weights = load_file(out / "model.safetensors")
    cases = [
        ({k: v for k, v in weights.items() if k != "head.bias"}, stated, r"lacks head\.bias: its weights"),
        ({**weights, "extra": torch.zeros(1)}, stated, "has the unknown extra: its weights"),
        ({**weights, "head.bias": torch.zeros(6)}, stated, r"head\.bias is \(6,\), arch\.json describes \(5,\)"),
        (weights, {"format": "other"}, "its format is 'other', not 'nas-bundle'"),
        (weights, {**stated, "version": "2"}, "has version '2'. Allowed: 1"),
    ]
    for changed, metadata, words in cases:
        save_file(changed, out / "model.safetensors", metadata)
        with pytest.raises(ValueError, match=words):
            load_bundle(out, rebuild)


def test_weights_that_are_views_or_shared_are_stored(tmp_path: Path) -> None:
    plain = graph()
    weight = plain.get_parameter("conv.weight")
    weight.data = weight.data.to(memory_format=torch.channels_last)
    plain.get_buffer("norm.running_mean").set_(plain.get_parameter("norm.bias").data)  # type: ignore[call-overload]
    out = write(tmp_path / "bundle", plain)
    assert torch.allclose(load_bundle(out, rebuild).module(images()), plain(images()), atol=1e-6)


def test_missing_packages_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(ValueError, match=r"ONNX needs onnxruntime: pip install 'supernas\[export\]'"):
        write(tmp_path / "bundle", onnx=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_pt2_computes_the_same_for_any_batch(tmp_path: Path) -> None:
    out = write(tmp_path / "bundle", pt2=True)
    program = torch.export.load(out / "model.pt2").module()
    assert torch.allclose(program(images(5)), graph()(images(5)), atol=1e-5)
    assert json.loads((out / "report.json").read_text())["pt2"]["logits_max_difference"] < 1e-4


@pytest.mark.slow
def test_onnx_computes_the_same_for_any_batch(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    pytest.importorskip("onnxscript", reason="needs the extra [export]")
    out = write(tmp_path / "bundle", onnx=True)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"x": images(5).numpy()})[0]
    assert torch.allclose(torch.from_numpy(logits), graph()(images(5)), atol=1e-5)
    assert json.loads((out / "report.json").read_text())["onnx"]["logits_max_difference"] < 1e-4
    names = ["arch.json", "model.onnx", "model.py", "model.safetensors", "report.json"]
    assert sorted(p.name for p in out.iterdir()) == names  # one file: no weights beside it
