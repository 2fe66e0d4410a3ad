"""model.py: loads where only torch is, has the graph's keys and classes that say what is shared, computes the same."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from supernets.printer import check, source, to_module


def conv_norm(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    chain = nn.Sequential()
    chain.add_module("conv", nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False))
    chain.add_module("norm", nn.BatchNorm2d(c_out))
    if act is not None:
        chain.add_module("act", act)
    return chain


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, middle: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv0 = conv_norm(c_in, middle, stride=stride, act=nn.ReLU())
        self.conv1 = conv_norm(middle, c_out)
        self.shortcut = conv_norm(c_in, c_out, 1, stride) if (c_in, stride) != (c_out, 1) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.conv0(x))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """``blocks``: (in, middle, out, stride) of every block of every stage."""

    def __init__(self, *stages: list[tuple[int, int, int, int]]) -> None:
        super().__init__()
        self.stem = conv_norm(3, stages[0][0][0])
        self.stages = nn.ModuleList([nn.ModuleList([BasicBlock(*block) for block in stage]) for stage in stages])
        self.head = nn.Linear(stages[-1][-1][2], 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for stage in self.stages:
            for block in stage.children():
                x = block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Concatenation(nn.Module):
    """A holder with several outputs, numbered names with a gap, a path that is no identifier, a slice, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Module()
        self.cell.add_module("1<-0", nn.Conv2d(3, 4, 3, padding=1))
        self.cell.add_module("2<-0", nn.Conv2d(3, 6, (1, 3), padding=(0, 1)))
        self.ops = nn.ModuleList([nn.Identity(), nn.AvgPool2d(2), nn.PReLU(10)])
        self.bias = nn.Parameter(torch.randn(10, 1, 1))
        self.register_buffer("shift", torch.randn(1))
        self.head = nn.Linear(10 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = getattr(self.cell, "1<-0")(x), getattr(self.cell, "2<-0")(x)
        a = a + b.mean()
        x = torch.cat([self.ops[1](a), self.ops[1](b)], 1)
        x = self.ops[2](x + self.bias) * self.shift
        x = F.pad(x, [0, 4, 0, 4])[:, :, ::2, ::2]
        return self.head(torch.flatten(x, start_dim=1))


class Residual(nn.Module):
    def __init__(self, channels: int, rate: float) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.Hardswish(), nn.Dropout(rate))
        self.project = nn.Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.pad(self.project(self.expand(x)), [0, 0, 0, 0, 0, 0], value=rate_of(self))


def rate_of(block: Residual) -> float:
    dropout = block.expand[2]
    assert isinstance(dropout, nn.Dropout)
    return dropout.p


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Residual(3, 0.1), Residual(3, 0.2))
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.BatchNorm1d(7), nn.GELU("tanh"),
                                  nn.Dropout(0.5), nn.Linear(7, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)))


RESNET = ([(4, 3, 4, 1), (4, 6, 4, 1)], [(4, 5, 7, 2), (7, 3, 7, 1)], [(7, 4, 8, 1), (8, 9, 8, 1)])
NETS = {"resnet": lambda: ResNet(*RESNET), "concatenation": Concatenation, "mobile": Mobile}


def traced(net: nn.Module) -> fx.GraphModule:
    """``net`` with weights and statistics that are not the defaults, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) * 0.4 + 0.1)
    return fx.symbolic_trace(net).eval()


def example(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def classes(text: str) -> list[str]:
    return re.findall(r"^class (\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("name", NETS)
def test_prints_what_computes_the_same(name: str) -> None:
    graph = traced(NETS[name]())
    text = source(graph, (1, 3, 8, 8))
    check(graph, text, example())
    assert set(to_module(text).model().state_dict()) == set(graph.state_dict())
    assert max(map(len, text.splitlines())) <= 120
    assert text == source(traced(NETS[name]()), (1, 3, 8, 8))
    assert "Input: (1, 3, 8, 8)" in text and "supernas" in text


@pytest.mark.parametrize("name", NETS)
def test_loads_where_only_torch_is(name: str, tmp_path: Path) -> None:
    graph = traced(NETS[name]())
    (tmp_path / "model.py").write_text(source(graph))
    save_file({key: value.clone() for key, value in graph.state_dict().items()}, tmp_path / "model.safetensors")
    program = (
        "import sys, json, torch; sys.path.insert(0, '.')\n"
        "from model import model\n"
        "x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))\n"
        "net = model('model.safetensors')\n"
        "banned = [m for m in sys.modules if m.split('.')[0] in ('nas', 'supernets', 'search_spaces', 'safetensors')]\n"
        "print(json.dumps([net(x).tolist(), banned, net.training]))\n"
    )
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    logits, banned, training = json.loads(done.stdout)
    # Another process may place weights elsewhere in memory, and a product's last bits depend on that.
    assert torch.allclose(torch.tensor(logits), graph(example()), rtol=1e-5, atol=1e-5)
    assert (banned, training) == ([], False)


def test_one_class_per_distinct_block() -> None:
    text = source(traced(ResNet(*RESNET)))
    assert classes(text) == ["BasicBlock", "BasicBlock2", "Network"]
    assert "def __init__(self, channels, conv0_channels):" in text
    assert "BasicBlock(channels=7, conv0_channels=3)," in text
    assert "BasicBlock2(in_channels=4, conv0_channels=5, conv1_channels=7, stride=2)," in text
    assert text.count("nn.Conv2d(") == 1 + 2 + 3  # stem, identity block, projected block: none an instance


def test_a_deep_net_has_one_line_per_block() -> None:
    stages = [[(c, 3 + i, c, 1) for i in range(9)] for c in (4,)]
    text = source(traced(ResNet(*stages)))
    assert classes(text) == ["BasicBlock", "Network"]
    assert len(re.findall(r"^ +BasicBlock\(.*\),$", text, re.MULTILINE)) == 9


def test_numbers_of_functions_become_parameters() -> None:
    text = source(traced(Mobile()))
    assert classes(text) == ["Residual", "Network"]
    assert "Residual(expand_p=0.1, pad_value=0.1)," in text
    assert "value=self.pad_value" in text


def test_only_arguments_that_are_not_defaults() -> None:
    text = source(traced(Mobile()))
    assert 'nn.GELU(approximate="tanh")' in text and "nn.Dropout()" in text and "nn.Hardswish()" in text
    assert "nn.LayerNorm(8, eps=1e-06)" in text and "nn.Linear(7, 4, bias=False)" in text
    text = source(traced(Concatenation()))
    assert "nn.Conv2d(3, 4, 3, padding=1)" in text and "nn.Conv2d(3, 6, (1, 3), padding=(0, 1))" in text
    assert "nn.AvgPool2d(2, stride=2)" in text and "[:, :, ::2, ::2]" in text


def test_repeated_long_chains_share_a_class() -> None:
    def stretch(c_in: int, c_out: int) -> nn.Sequential:
        chain = conv_norm(c_in, c_out, act=nn.SiLU())
        chain.add_module("pool", nn.MaxPool2d(3, 1, 1))
        return chain

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = stretch(3, 4), stretch(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    graph = traced(Net())
    text = source(graph)
    check(graph, text, example())
    assert "class First(nn.Sequential):" in text and "self.second = First(in_channels=4, conv_channels=6)" in text


def test_a_scope_that_is_missing_or_prefixed_changes_nothing() -> None:
    graph = traced(ResNet(*RESNET))
    text = source(graph)
    for node in graph.graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        node.meta["nn_module_stack"] = {f"net.{key}": entry for key, entry in {"": ("", "Bound"), **stack}.items()}
    assert classes(source(graph)) == classes(text)
    for node in graph.graph.nodes:
        node.meta.clear()
    check(graph, source(graph), example())


def test_wrong_weights_are_detected() -> None:
    graph = traced(ResNet(*RESNET))
    text = source(graph)
    with pytest.raises(RuntimeError, match="largest difference"):
        check(graph, text.replace("F.relu(x)", "F.silu(x)"), example())
    with pytest.raises(RuntimeError, match=r"not have the same weights: head\.bias"):
        check(graph, text.replace("nn.Linear(8, 5)", "nn.Linear(8, 5, bias=False)"), example())


def test_what_cannot_be_printed_is_named() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    graph = fx.GraphModule({"stem": Own()}, one_call("stem"))
    with pytest.raises(ValueError, match=r"stem is a .*Own\. model\.py holds torch\.nn modules only"):
        source(graph)
    changed = nn.Conv2d(3, 4, 3)
    changed.padding = (1, 1)  # the constructor derives more from it than this attribute
    changed._reversed_padding_repeated_twice = [9, 9, 9, 9]
    with pytest.raises(ValueError, match=r"stem: nn\.Conv2d cannot be printed"):
        source(fx.GraphModule({"stem": changed}, one_call("stem")))
    with pytest.raises(ValueError, match=r"extra\.weight is in the state dict but no node uses it"):
        graph = fx.GraphModule({"stem": nn.Conv2d(3, 4, 3)}, one_call("stem"))
        graph.add_submodule("extra", nn.Linear(2, 2))
        source(graph)
    with pytest.raises(ValueError, match="Allowed: functions of torch"):
        foreign = fx.Graph()
        foreign.output(foreign.call_function(json.dumps, (foreign.placeholder("x"),)))
        source(fx.GraphModule({}, foreign))


def one_call(target: str) -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.call_module(target, (graph.placeholder("x"),)))
    return graph


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_survive_the_reader(dtype: torch.dtype, tmp_path: Path) -> None:
    graph = traced(ResNet(*RESNET)).to(dtype)
    save_file({key: value.clone() for key, value in graph.state_dict().items()}, tmp_path / "model.safetensors")
    network = to_module(source(graph)).model(tmp_path / "model.safetensors")
    for key, value in graph.state_dict().items():
        assert torch.equal(network.state_dict()[key], value) and network.state_dict()[key].dtype == value.dtype
