"""What every supernet promises of its costs and of the plain networks that are extracted, for each entry of SUPERNETS."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from supernet_entries import SUPERNETS, resnet
from supernet_entry import Entry, archs, same
from torch import fx

from nas.build import adopt
from nas.bundle import counted, prove, write_bundle
from nas.cost import CostTable, macs, params
from nas.recalibrate import install, recalibrate
from search_spaces.arch import ArchFile
from search_spaces.resnet import CifarResNet, ImageNetResNet
from search_spaces.space import Arch, Mixture
from supernets.elastic import ElasticConv
from supernets.extract import extract
from supernets.printer import check, source

FIVE = ("mobilenet-transform", "proxyless", "bignas", "attentive")
ONCE = (*FIVE, "mobilenet-crop", "mobilenet-7")


VARIANTS = ("cifar20-tied-shared", "cifar20-tied-sum", "cifar20-tas-shared-sum", "bottleneck-tas", "imagenet18-tied",
            "imagenet18-tas", "topology-entangled", "darts-entangled", "sizes-shared-sum", "conv-macro-outputs", "vit-full",
            "mobilenet-crop", "mobilenet-7", "resnet50d-sizes", "channel-resnet-shared-sum", "channel-mobilenet-sum",
            "nasbenchmacro-places", "pooling-once", "bignas", "proxyless", "bottleneck-tied", "channel-mobilenet")  # fmt: skip
"""Other settings, or other sizes of the same blocks, of an entry beside them: with the slow tests."""


@pytest.fixture(params=[pytest.param(entry, marks=[pytest.mark.slow] if entry.id in VARIANTS else []) for entry in SUPERNETS],
                ids=lambda entry: entry.id)
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


def check_costs(entry: Entry, net: Any, found: list[Arch]) -> None:
    x = entry.images(batch=2)
    tables = CostTable(net, (entry.size, entry.size), macs), CostTable(net, (entry.size, entry.size), params)
    for arch in found:
        graph = extract(net, arch, x, inherit=False)
        assert tuple(table.of(arch) for table in tables) == counted(graph, x)
        assert {graph.get_submodule(n.target).__module__.split(".")[0] for n in graph.graph.nodes if n.op == "call_module"} == {
            "torch"
        }


def check_inherited(entry: Entry, net: Any, found: list[Arch]) -> None:
    """Both in eval mode on recalibrated statistics, and in train mode on the batch's own."""
    x = entry.images()
    batches = [entry.images(seed) for seed in (1, 2)]
    for arch, statistics in zip(found, recalibrate(net, found, batches)):
        install(net, statistics)
        for training in (False, True):
            net.train(training)
            before = {name: value.clone() for name, value in net.state_dict().items()}
            graph = extract(net, arch, x)
            assert isinstance(graph, fx.GraphModule) and graph.training is training
            z = net(x, arch)
            assert same(graph(x), z)
            with torch.no_grad():
                for p in graph.parameters():
                    p.zero_()
            assert same(net(x, arch), z, 0.0)  # copies, not views
            assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    first, second = (recalibrate(net, found[:1], [batch])[0] for batch in batches)
    stem = next(iter(first), None)
    assert stem is not None if entry.norms(net, found[0]) else not first
    assert stem is None or not same(first[stem][0], second[stem][0], 1e-3)  # statistics that matter


def test_predicted_costs_are_counted_costs(entry: Entry) -> None:
    net = entry.net()
    check_costs(entry, net, [net.space.largest(), net.space.smallest(), *archs(net.space, 3)])


def test_the_extracted_network_is_the_supernet(entry: Entry) -> None:
    net = entry.net()
    n = {"all": 5 if entry.id in ("cifar20-tied", "topology", *FIVE) else 2, "largest": 0, "none": 0}[entry.inherits]
    if entry.inherits != "none":
        check_inherited(entry, net, [net.space.largest(), *archs(net.space, n)])
    if entry.inherits != "all":
        refused = [net.space.smallest()] if entry.inherits == "none" else []
        for arch in [*refused, *archs(net.space, 2)]:
            with pytest.raises(ValueError, match=r"cannot be inherited.*fresh weights") as error:
                extract(net, arch, entry.images())
            assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_printed_file_is_the_network(entry: Entry) -> None:
    """With weights inherited where that can be; ``check`` compares names and logits of what the text makes."""
    net, x = entry.net(), entry.images(batch=2)
    for arch in (net.space.largest(), net.space.smallest(), *archs(net.space, 2, seed=6)):
        graph = extract(net.eval(), arch, x, inherit=entry.inherits == "all")
        text = source(graph, tuple(x.shape))
        check(graph, text, x)
        assert "supernets" not in text and "search_spaces" not in text


@pytest.mark.slow
def test_fifty_random_archs_of_the_smallest_member() -> None:
    entry = resnet("cifar8-tied", lambda: CifarResNet(8, "tied", widths=(4, 6, 8)), "all")
    net = entry.net()
    check_inherited(entry, net, archs(net.space, 50))
    check_costs(entry, net, archs(net.space, 50))
    free = entry._replace(make_space=lambda: CifarResNet(8, "tas", widths=(4, 6, 8)))
    check_costs(free, free.net(), archs(free.make_space(), 50))


@pytest.mark.slow
@pytest.mark.parametrize("id", ONCE)
def test_fifty_random_archs_of_inverted_blocks(id: str) -> None:
    (entry,) = (entry for entry in SUPERNETS if entry.id == id)
    net = entry.net()
    found = archs(net.space, 50, seed=5)
    check_inherited(entry, net, found)
    check_costs(entry, net, found)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize("kind", ["tied", "tas"])
def test_the_imagenet_members_at_full_width(depth: int, kind: str) -> None:
    entry = resnet("", lambda: ImageNetResNet(depth, kind), "all" if kind == "tied" else "largest", 48)
    net = entry.net()
    check_costs(entry, net, [net.space.largest(), *archs(net.space, 1)])
    check_inherited(entry, net, archs(net.space, 1) if kind == "tied" else [net.space.largest()])


def test_fresh_weights_depend_on_the_seed_alone(entry: Entry) -> None:
    net, arch = entry.net(), entry.make_space().smallest()
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    graphs = [extract(net, arch, entry.images(), inherit=False, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again, other = (graph.state_dict() for graph in graphs)
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = [key for key, value in first.items() if value.ndim > 1]
    assert drawn and all(not torch.equal(first[key], other[key]) for key in drawn)
    assert all(value.dtype == torch.float64 for value in first.values() if value.is_floating_point())


def test_extraction_refuses_what_is_not_an_architecture(entry: Entry) -> None:
    net, x = entry.net(), entry.images(batch=2)
    largest, first = net.space.largest(), net.space.choices[0]
    name, off, end = (first.name, first.options[-1] + 1, " Nearest") if first.ordered else (first.name, "dreamt", "")
    cases: list[tuple[Any, bool, str]] = [
        ({**largest, name: off}, True, f"{name} = {off} is not in this space. Allowed: .*{end}"),
        ({name: value for name, value in largest.items() if name != first.name}, False, f"does not set {name}"),
        ({**largest, "no.such": 1}, True, r"no\.such is not a choice"),
        *entry.refused(net.space),
    ]
    cases += [
        ({**largest, choice.name: Mixture(choice.options[:2], torch.ones(2))}, inherit, f"{choice.name} is a mixture")
        for choice in (first, net.space.choices[-1]) for inherit in (True, False)
    ]  # fmt: skip
    for arch, inherit, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            extract(net, arch, x, inherit)
        assert "\n" not in str(error.value)


def test_a_width_without_a_norm_is_refused(entry: Entry) -> None:
    net = entry.net()
    cases = []
    for leaf in net.modules():
        if isinstance(leaf, ElasticConv) and leaf.norm is not None and len(leaf.out[0].size.on) == 1:
            (name,), of = leaf.out[0].size.on, leaf.out[0].size.of
            options = net.space[name].options
            cases += [(leaf.name, name, off, of(off)) for off in range(options[0], options[-1]) if of(off) not in leaf.widths]
    if not cases:
        pytest.skip("no convolution of this supernet has an elastic width with a batch norm behind it")
    path, name, off, width = cases[0]
    with pytest.raises(ValueError, match=rf"^{path}: width {width} has no batch norm in this supernet\. Allowed: "):
        net(entry.images(), {**net.space.largest(), name: off})


def test_unknown_words_are_refused(entry: Entry) -> None:
    with pytest.raises(ValueError, match=r"view = 'dreamt' is not known\. Allowed: derived, searched, estimated"):
        entry.net().layers((8, 8), "dreamt")
    for key in entry.words:
        with pytest.raises(ValueError, match=f"{key} = 'dreamt' is not known"):
            entry._replace(settings={key: "dreamt"}).net()


def test_adopting_and_extracting_the_largest_is_the_identity(entry: Entry) -> None:
    net, x, largest = entry.net(), entry.images(batch=2), entry.make_space().largest()
    weights = extract(net, largest, x, inherit=False, seed=3).state_dict()
    generator = torch.Generator().manual_seed(6)
    for key, value in weights.items():
        if value.is_floating_point() and (entry.scales or not key.endswith("norm.weight")):
            value.uniform_(0.5, 1.5, generator=generator)
    if not entry.adopts:
        with pytest.raises(ValueError, match=r"cannot take over .*") as error:
            adopt(net, largest, weights, x)
        assert "\n" not in str(error.value)
        return
    adopt(net, largest, weights, x)
    if entry.inherits != "none":
        back = extract(net, largest, x).state_dict()
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[key], weights[key]) for key in back if not key.endswith("num_batches_tracked"))
    for path, leaf in net.named_modules():
        if isinstance(leaf, ElasticConv) and f"{path}.conv.weight" in weights:
            assert torch.equal(leaf.weight, weights[f"{path}.conv.weight"])
            if leaf.derived_norm and leaf.norm is not None:  # narrower sets start as the widest's first channels
                for gamma, beta in zip(leaf.norm.weight, leaf.norm.bias):
                    assert torch.equal(gamma, weights[f"{path}.norm.weight"][: len(gamma)])
                    assert torch.equal(beta, weights[f"{path}.norm.bias"][: len(beta)])
    features = weights["classifier.weight"].shape[1]  # of the dearest options, which need not give the widest output
    assert torch.equal(net.classifier.weight[:, :features], weights["classifier.weight"])
    del weights["classifier.bias"]
    with pytest.raises(ValueError, match=r"not of this space's largest network: classifier\.bias"):
        adopt(net, largest, weights, x)


def test_statistics_are_those_of_running_norms_only(entry: Entry) -> None:
    """Recalibration names exactly the norms that an architecture runs, at the width that it runs them."""
    net = entry.net()
    arch = archs(net.space, 1, seed=8)[0]
    (statistics,) = recalibrate(net, [arch], [entry.images()])
    assert {path: len(mean) for path, (mean, _) in statistics.items()} == entry.norms(net, arch)


ALONE = """
import importlib.util, json, pathlib, sys, torch
folder = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("model", folder / "model.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
net = module.model(folder / "model.safetensors")
z = net(torch.load(folder.parent / "x.pt", weights_only=True))
torch.save(z.detach(), folder.parent / "z.pt")
ours = [name for name in sys.modules if name.split(".")[0] in ("nas", "supernets", "search_spaces", "safetensors")]
print(json.dumps({"isolated": sys.flags.isolated, "ours": ours}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("id", ["cifar20-tied", "cifar20-tas", "preresnet20", "topology", "sizes", "nasnet", "conv-macro",
                                "vit", "mobilenet-transform", "attentive"])  # fmt: skip
def test_a_bundle_loads_where_only_torch_is_installed(id: str, tmp_path: Path) -> None:
    (entry,) = (entry for entry in SUPERNETS if entry.id == id)
    net, inherit = entry.net().float(), entry.inherits == "all"
    space, x = net.space, entry.images(seed=1, batch=4).float()
    (arch,) = archs(space, 1, seed=1)
    if inherit:
        install(net, recalibrate(net, [arch], [x])[0])
    graph = extract(net.eval(), arch, x, inherit=inherit)
    side = (entry.size, entry.size)
    costs = {"macs": CostTable(net, side, macs).of(arch), "params": CostTable(net, side, params).of(arch)}
    report = prove(graph, x, {name: int(cost) for name, cost in costs.items()}, net(x, arch).detach() if inherit else None)
    file = ArchFile.of(space, arch, input=(3, *side), classes=tuple("abcde"), costs=costs,
                       preprocess={"mean": [0.5] * 3, "std": [0.2] * 3, "channels": "RGB"})
    out = write_bundle(tmp_path / "bundle", graph, file, report, x, space=space)
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-I", "-c", ALONE, str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"isolated": 1, "ours": []}
    assert torch.allclose(torch.load(tmp_path / "z.pt", weights_only=True), graph(x), atol=1e-6)
