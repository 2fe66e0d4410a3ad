"""What mobile networks need beyond residual ones, printed, loaded where only torch is, and exported: squeeze and excite,
resizing, bounded activations, averages over padded and partial windows."""
from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from nas.export import write_onnx, write_pt2
from search_spaces.bignas import AttentiveNAS
from search_spaces.resnet50d import OFAResNet50D
from search_spaces.sizes import Segment, Size, fixed
from search_spaces.space import Choice, SearchSpace
from supernets import bignas, resnet50d
from supernets.elastic import ElasticConv
from supernets.extract import extract
from supernets.printer import check, source, to_module
from supernets.squeeze import PlainSqueeze


class Function(nn.Module):
    """``of`` as a module, without a class of its own in the print: its forward is one call."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x)


class Net(nn.Module):
    """13 x 13 images: ``first``, a convolution to 7 x 7, ``middle``, squeeze and excite, dropout (in eval mode), classifier."""

    def __init__(self, first: nn.Module, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle = first, middle
        self.stem, self.squeeze, self.head = nn.Conv2d(3, 8, 3, 2, 1), PlainSqueeze(8, 4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(self.middle(self.stem(self.first(x))))
        return self.head(F.dropout(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), 0.2, self.training))


FIRST = {
    "bicubic": nn.Upsample(size=(11, 11), mode="bicubic", align_corners=False),
    "corners": nn.Upsample(size=17, mode="bicubic", align_corners=True),
    "scale": nn.Upsample(scale_factor=2.0, mode="bilinear"),
    "function": Function(partial(F.interpolate, size=(11, 11), mode="bicubic", align_corners=False)),
}
MIDDLE = {
    "hardsigmoid": nn.Hardsigmoid(), "hardswish": nn.Hardswish(), "silu": nn.SiLU(), "relu6": nn.ReLU6(),
    "in-place": nn.Sequential(nn.Hardswish(inplace=True), nn.SiLU(inplace=True), nn.ReLU6(inplace=True)),
    "ceil": nn.AvgPool2d(2, 2, ceil_mode=True), "padded": nn.AvgPool2d(2, padding=1),
    "one-side": nn.AvgPool2d(2, padding=(1, 0)),
    "real": nn.AvgPool2d(2, 2, 1, ceil_mode=True, count_include_pad=False), "divisor": nn.AvgPool2d(3, divisor_override=5),
    "adaptive": nn.AdaptiveAvgPool2d((3, None)),
    "ceil-function": Function(partial(F.avg_pool2d, kernel_size=2, stride=2, ceil_mode=True)),
    "padded-function": Function(partial(F.avg_pool2d, kernel_size=2, padding=(1, 1), count_include_pad=False)),
    "adaptive-function": Function(partial(F.adaptive_avg_pool2d, output_size=(3, 2))),
    "functions": Function(lambda x: F.hardswish(F.silu(F.relu6(F.hardsigmoid(x) * 4 + 3, inplace=True)))),
}  # fmt: skip
IDENTITY = nn.Identity()
NETS = {**{name: (first, nn.ReLU()) for name, first in FIRST.items()}, **{name: (IDENTITY, m) for name, m in MIDDLE.items()}}


def traced(name: str) -> fx.GraphModule:
    net, generator = Net(*NETS[name]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return fx.symbolic_trace(net.eval())


def images(batch: int = 2, side: int = 13) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETS)
def test_what_is_printed_computes_the_same(name: str) -> None:
    graph = traced(name)
    text = source(graph, (1, 3, 13, 13))
    check(graph, text, images())
    assert max(map(len, text.splitlines())) <= 120
    network = to_module(text).model()
    network.load_state_dict(graph.state_dict())
    assert torch.equal(network(images()), graph(images()))


def test_arguments_that_matter_are_written() -> None:
    texts = {name: source(traced(name)) for name in NETS}
    assert 'nn.Upsample(size=(11, 11), mode="bicubic", align_corners=False)' in texts["bicubic"]
    assert 'nn.Upsample(size=17, mode="bicubic", align_corners=True)' in texts["corners"]
    assert "nn.Hardsigmoid()" in texts["hardsigmoid"] and "nn.SiLU(inplace=True)" in texts["in-place"]
    assert "nn.AvgPool2d(2, stride=2, ceil_mode=True)" in texts["ceil"]
    assert "nn.AvgPool2d(2, stride=2, padding=(1, 0))" in texts["one-side"]
    assert "nn.AvgPool2d(2, stride=2, padding=1, ceil_mode=True, count_include_pad=False)" in texts["real"]
    assert "F.avg_pool2d(x, kernel_size=2, stride=2, ceil_mode=True)" in texts["ceil-function"]
    assert all("F.dropout(x, p=0.2, training=False)" in text for text in texts.values())


def test_a_forgotten_argument_is_detected() -> None:
    for name, written, instead in (("ceil", ", ceil_mode=True", ""), ("bicubic", "bicubic", "bilinear"),
                                   ("padded", "padding=1)", "padding=0)"), ("relu6", "ReLU6", "ReLU")):  # fmt: skip
        graph = traced(name)
        if name == "relu6":
            graph.stem.weight.data.mul_(20.0)  # type: ignore[union-attr, operator]
        text = source(graph)
        assert written in text
        with pytest.raises(RuntimeError, match=r"model\.py does not compute what the network computes"):
            check(graph, text.replace(written, instead), images())


# -- networks of the supernets ------------------------------------------------------------------------------------------------


def attentive() -> fx.GraphModule:
    """Squeeze and excite, SiLU, hard sigmoid, an image that is resized to an odd side, averages over padded windows."""
    space = AttentiveNAS(True, 0.25, [[1, 2]] * 7, [24, 45])
    net = bignas.build(space, 3, 5)
    net.reset(torch.Generator().manual_seed(0))
    return extract(net.eval(), {**space.smallest(), "resolution": 45}, images(2, 48))


def residual() -> fx.GraphModule:
    """Averages over partial windows, a resized image."""
    space = OFAResNet50D(0.125, (1, 1, 1, 1), (24, 45))
    net = resnet50d.build(space, 3, 5)
    net.reset(torch.Generator().manual_seed(0))
    return extract(net.eval(), {**space.smallest(), "resolution": 45}, images(2, 48))


MADE = {"attentive": attentive, "residual": residual}


@pytest.mark.parametrize("name", MADE)
def test_it_loads_where_only_torch_is(name: str, tmp_path: Path) -> None:
    graph = MADE[name]()
    text = source(graph)
    assert 'nn.Upsample(size=(45, 45), mode="bicubic", align_corners=False)' in text
    assert "nn.AvgPool2d(" in text and ("nn.Hardsigmoid()" in text) == (name == "attentive")
    (tmp_path / "model.py").write_text(text)
    save_file({key: value.clone() for key, value in graph.state_dict().items()}, tmp_path / "model.safetensors")
    program = (
        "import sys, json, torch; sys.path.insert(0, '.')\n"
        "from model import model\n"
        "x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))\n"
        "banned = [m for m in sys.modules if m.split('.')[0] in ('nas', 'supernets', 'search_spaces', 'safetensors')]\n"
        "print(json.dumps([model('model.safetensors')(x).tolist(), banned]))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    logits, banned = json.loads(done.stdout)
    assert torch.allclose(torch.tensor(logits), graph(images(2, 48)), rtol=1e-5, atol=1e-5) and banned == []


@pytest.mark.parametrize("name", MADE)
def test_it_exports_to_pt2(name: str, tmp_path: Path) -> None:
    assert write_pt2(tmp_path / "model.pt2", MADE[name](), images(2, 48)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_it_exports_to_onnx(name: str, tmp_path: Path) -> None:
    if any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxscript", "onnxruntime")):
        pytest.skip("the packages of supernas[export] are not installed")
    assert write_onnx(tmp_path / "model.onnx", MADE[name](), images(2, 48)) < 1e-4


# -- batch norms --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inherit", [True, False])
def test_plain_norms_have_the_supernets_eps_and_momentum(inherit: bool) -> None:
    space = SearchSpace([Choice("c", (2, 4))], {})
    leaf = ElasticConv(space, (Segment(fixed(3), 3),), Segment(Size(("c",), int), 4), norm="shared").eval()
    assert leaf.norm is not None
    leaf.norm.eps, leaf.norm.momentum = 0.5, 0.01
    plain = leaf.plain({"c": 2}, 3, inherit=inherit).eval()
    norm = plain.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d) and (norm.eps, norm.momentum) == (0.5, 0.01)
    if inherit:
        before = leaf(images(), {"c": 2})
        assert torch.equal(plain(images()), before)
        leaf.norm.eps = 1e-5
        assert not torch.allclose(plain(images()), leaf(images(), {"c": 2}), rtol=1e-2)
