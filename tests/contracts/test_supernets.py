"""What every supernet promises, checked for each entry of SUPERNETS: a new entry inherits every test.

Nets are tiny and float64. Every batch norm has random scales and shifts, or its sets could not be told apart.
"""
from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nas.build import adopt
from nas.bundle import counted, prove, write_bundle
from nas.cost import CostTable, macs, params
from nas.protocols import Supernet
from nas.recalibrate import install, recalibrate
from search_spaces.arch import ArchFile
from search_spaces.resnet import CifarResNet, ImageNetResNet
from search_spaces.space import Arch, Mixture, SearchSpace, Setting
from supernets.elastic import ElasticConv, Leaf, Normalise
from supernets.extract import extract
from supernets.resnet import ResNet


class Bottleneck(CifarResNet):
    """ResNet-164 with two blocks a stage instead of eighteen."""

    BLOCKS = {164: 2}  # noqa: RUF012  a constant table


class Entry(NamedTuple):
    """``inherits``: which architectures can take the supernet's weights over: "all", "largest" or "none"."""

    id: str
    make_space: Callable[[], SearchSpace]
    settings: Mapping[str, str]
    inherits: str
    size: int = 8

    def net(self) -> Any:
        net = ResNet(self.make_space(), channels=3, classes=5, **self.settings).double()  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        net.reset(generator)
        with torch.no_grad():
            for name, p in net.named_parameters():
                if ".norm." in name:
                    p.copy_(torch.empty_like(p).uniform_(0.5, 1.5, generator=generator))
        return net

    def images(self, seed: int = 0, batch: int = 6) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, self.size, self.size, generator=generator, dtype=torch.float64)


TIED = lambda: CifarResNet(20, "tied", widths=(8, 12, 16))  # noqa: E731
SUPERNETS = [
    Entry("cifar20-tied", TIED, {}, "all"),
    Entry("cifar20-tied-shared", TIED, {"norm": "shared"}, "all"),
    Entry("cifar20-tied-sum", TIED, {"mixing": "sum"}, "all"),
    Entry("cifar20-tas", lambda: CifarResNet(20, "tas", widths=(8, 12, 16)), {}, "none"),
    Entry("cifar20-tas-shared-sum", lambda: CifarResNet(20, "tas", widths=(8, 12, 16)),
          {"norm": "shared", "mixing": "sum"}, "none"),
    Entry("bottleneck-tied", lambda: Bottleneck(164, "tied", widths=(4, 6, 8)), {}, "all"),
    Entry("bottleneck-tas", lambda: Bottleneck(164, "tas", widths=(4, 6, 8)), {}, "none"),
    Entry("imagenet18-tied", lambda: ImageNetResNet(18, "tied", widths=(4, 6, 8, 12)), {}, "all", 32),
    Entry("imagenet18-tas", lambda: ImageNetResNet(18, "tas", widths=(4, 6, 8, 12)), {}, "largest", 32),
]  # fmt: skip


@pytest.fixture(params=SUPERNETS, ids=lambda entry: entry.id)
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


def archs(space: SearchSpace, n: int, seed: int = 0) -> list[Arch]:
    rng = random.Random(seed)
    return [space.sample(rng) for _ in range(n)]


def one_candidate(arch: Arch) -> dict[str, Setting]:
    return {name: Mixture((value,), torch.ones(1, dtype=torch.float64, requires_grad=True)) for name, value in arch.items()}


def one_active(space: SearchSpace, arch: Arch) -> dict[str, Setting]:
    """Every option is named, one has weight and is computed."""
    found: dict[str, Setting] = {}
    for name, value in arch.items():
        options = space[name].options
        weights = torch.tensor([float(option == value) for option in options], dtype=torch.float64)
        found[name] = Mixture(options, weights, (options.index(value),))
    return found


def soft(space: SearchSpace, active: int | None = None, seed: int = 2) -> dict[str, Setting]:
    """Every choice as a mixture: of all options, or of ``active`` random ones (the others are named, not computed)."""
    generator, rng, found = torch.Generator().manual_seed(seed), random.Random(seed), {}
    for choice in space.choices:
        K = len(choice.options)
        w = torch.rand(K, generator=generator, dtype=torch.float64).add_(0.1)
        at = None if active is None else tuple(sorted(rng.sample(range(K), min(active, K))))
        found[choice.name] = Mixture(choice.options, (w / w.sum()).requires_grad_(), at)
    return found  # type: ignore[return-value]


def gradients(net: nn.Module, x: Tensor, arch: Mapping[str, Setting]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every parameter (zeros where there is none) of a sum in which every logit counts."""
    net.zero_grad(set_to_none=True)
    z = net(x, arch)
    factors = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)
    (z * factors).sum().backward()
    return z.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}


def same(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0))


# -- forward ----------------------------------------------------------------------------------------------------------


def test_it_is_a_supernet(entry: Entry) -> None:
    net = entry.net()
    assert isinstance(net, Supernet)
    assert net(entry.images(), net.space.largest()).shape == (6, 5)
    names = [module.name for module in net.modules() if isinstance(module, Leaf)]
    assert names == [path for path, module in net.named_modules() if isinstance(module, Leaf)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_mixture_with_one_candidate_is_the_hard_arch(entry: Entry, training: bool) -> None:
    net, x = entry.net().train(training), entry.images()
    for arch in archs(net.space, 2):
        z, expected = gradients(net, x, arch)
        for mixture in (one_candidate(arch), one_active(net.space, arch)):
            mixed, found = gradients(net, x, mixture)
            assert same(mixed, z)
            assert all(same(found[name], expected[name]) for name in expected)


def test_two_archs_in_one_step_do_not_touch_each_other(entry: Entry) -> None:
    net, x = entry.net(), entry.images()
    a, b = archs(net.space, 2, seed=3)
    alone = [net(x, a), net(x, b)]
    first, _, second = net(x, a), net(x, soft(net.space)), net(x, b)
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1])
    assert not same(first, second, 1e-3)


@pytest.mark.parametrize("kind", ["hard", "pair", "soft"])
def test_training_writes_no_buffer(entry: Entry, kind: str) -> None:
    net = entry.net().train()
    before = {name: value.clone() for name, value in net.named_buffers()}
    setting = {"hard": net.space.largest(), "pair": soft(net.space, 2), "soft": soft(net.space)}[kind]
    gradients(net, entry.images(), setting)
    assert before and all(torch.equal(before[name], value) for name, value in net.named_buffers())


def test_dropout_is_an_argument_and_only_of_training(entry: Entry) -> None:
    net, x, arch = entry.net(), entry.images(), entry.make_space().largest()
    torch.manual_seed(0)
    assert not same(net(x, arch, drop=0.5), net(x, arch), 1e-3)
    net.eval()
    assert torch.equal(net(x, arch, drop=0.5), net(x, arch))


def test_reset_draws_from_its_generator(entry: Entry) -> None:
    net = entry.net()
    states = []
    for seed in (1, 1, 2):
        net.reset(torch.Generator().manual_seed(seed))
        states.append({name: p.detach().clone() for name, p in net.named_parameters()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    leaves = [path for path, leaf in net.named_modules() if isinstance(leaf, ElasticConv)]
    assert all(not torch.equal(states[0][f"{path}.weight"], states[2][f"{path}.weight"]) for path in leaves)
    assert all(bool((value == 1).all()) for name, value in states[0].items() if ".norm.weight" in name)


def test_a_deep_copy_is_a_net_of_its_own(entry: Entry) -> None:
    net, x, arch = entry.net(), entry.images(), entry.make_space().smallest()
    twin = copy.deepcopy(net)
    z = net(x, arch)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0).add_(0.1)
    assert torch.equal(twin(x, arch), z) and not same(net(x, arch), z, 1e-3)


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.fixture
def smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """No unit is dead by chance: who gets a gradient is then a matter of structure alone."""
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))


def used(net: Any, arch: Arch) -> Iterator[tuple[str, int, int]]:
    """(path, out channels, in channels) of every convolution that runs, and of the classifier. A sum of unequal widths
    keeps the wider one's channels."""
    space = net.space
    x = space.stem_size().at(arch)
    yield "stem", x, 3
    for s in range(len(net.stages)):
        for b in range(int(arch[space.depth_name(s)])):
            path, block, i = f"stages.{s}.{b}", net.stages[s][b], x
            for c in range(space.convs):
                o = space.conv_size(s, b, c).at(arch)
                yield f"{path}.conv{c}", o, i
                i = o
            if block.shortcut is not None:
                yield f"{path}.shortcut", i, x
                x = i
            x = max(x, i)
    yield "classifier", 5, x


@pytest.mark.usefixtures("smooth")
def test_gradients_reach_exactly_the_weights_in_use(entry: Entry) -> None:
    net, x = entry.net().train(), entry.images()
    for arch in archs(net.space, 3, seed=4):
        _, found = gradients(net, x, arch)
        expected = {name: torch.zeros(value.shape[:2], dtype=torch.bool) for name, value in found.items()}
        for path, o, i in used(net, arch):
            expected[f"{path}.weight"][:o, :i] = True
            leaf = net.get_submodule(path)
            if path == "classifier":
                expected["classifier.bias"][:] = True
            elif leaf.norm is not None:
                k = leaf.widths.index(o) if len(leaf.norm.weight) > 1 else 0
                expected[f"{path}.norm.weight.{k}"][:o] = True
                expected[f"{path}.norm.bias.{k}"][:o] = True
        for name, value in found.items():  # of a convolution: does any tap of (out, in) get a gradient?
            reached = (value != 0).flatten(2).any(2) if value.ndim == 4 else value != 0
            assert torch.equal(reached, expected[name]), name


@pytest.mark.usefixtures("smooth")
def test_a_mixture_reaches_its_active_options_only(entry: Entry) -> None:
    net, x = entry.net().train(), entry.images()
    settings = soft(net.space, 2) | {net.space.depth_name(s): net.space.largest()[net.space.depth_name(s)]
                                     for s in range(len(net.stages))}
    gradients(net, x, settings)
    for path, leaf in net.named_modules():
        if isinstance(leaf, ElasticConv) and leaf.norm is not None and len(leaf.norm.weight) > 1:
            mixture = settings[leaf.out[0].size.on[0]]
            active = {mixture.options[j] for j in mixture.active}
            got = {c for c, p in zip(leaf.widths, leaf.norm.weight) if p.grad is not None and bool(p.grad.any())}
            assert got == active, path


@pytest.mark.usefixtures("smooth")
def test_gradients_reach_every_weight_of_a_mixture(entry: Entry) -> None:
    net, x = entry.net().train(), entry.images()
    settings = soft(net.space)
    gradients(net, x, settings)
    for name, mixture in settings.items():
        assert mixture.weights.grad is not None, name
        assert bool((mixture.weights.grad != 0).all()), name


@pytest.mark.usefixtures("smooth")
def test_owned_parameters_get_a_gradient_iff_their_option_is_used(entry: Entry) -> None:
    """All other choices are mixed over all their options, so that nothing else decides."""
    net, x = entry.net().train(), entry.images()
    depths = {net.space.depth_name(s) for s in range(len(net.stages))}
    owners = set()
    for arch in (net.space.largest(), net.space.smallest(), *archs(net.space, 1, seed=9)):
        for fixed in (depths, net.space.largest().keys() - depths):
            gradients(net, x, soft(net.space) | {name: arch[name] for name in fixed})
            for name in fixed:
                options = net.space[name].options
                for option in options:
                    mine = net.owned(name, option)
                    got = [p.grad is not None and bool(p.grad.any()) for p in mine]
                    assert all(got) if arch[name] == option else not any(got), (name, option, arch[name])
                    owners.update([name] if mine else [])
                of_any = {id(p) for p in net.owned(name)}
                assert {id(p) for option in options for p in net.owned(name, option)} <= of_any
    assert owners == (depths if entry.settings.get("norm") == "shared" else set(net.space.largest()))


# -- cost and extraction ----------------------------------------------------------------------------------------------


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
    assert not same(first["stem.norm"][0], second["stem.norm"][0], 1e-3)  # statistics that matter


def test_predicted_costs_are_counted_costs(entry: Entry) -> None:
    net = entry.net()
    check_costs(entry, net, [net.space.largest(), net.space.smallest(), *archs(net.space, 3)])


def test_the_extracted_network_is_the_supernet(entry: Entry) -> None:
    net = entry.net()
    n = {"all": 5 if entry.id == "cifar20-tied" else 2, "largest": 0, "none": 0}[entry.inherits]
    if entry.inherits != "none":
        check_inherited(entry, net, [net.space.largest(), *archs(net.space, n)])
    if entry.inherits != "all":
        refused = [net.space.smallest()] if entry.inherits == "none" else []
        for arch in [*refused, *archs(net.space, 2)]:
            with pytest.raises(ValueError, match=r"cannot be inherited.*fresh weights") as error:
                extract(net, arch, entry.images())
            assert "\n" not in str(error.value)


@pytest.mark.slow
def test_fifty_random_archs_of_the_smallest_member() -> None:
    entry = Entry("cifar8-tied", lambda: CifarResNet(8, "tied", widths=(4, 6, 8)), {}, "all")
    net = entry.net()
    check_inherited(entry, net, archs(net.space, 50))
    check_costs(entry, net, archs(net.space, 50))
    free = entry._replace(make_space=lambda: CifarResNet(8, "tas", widths=(4, 6, 8)))
    check_costs(free, free.net(), archs(free.make_space(), 50))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize("kind", ["tied", "tas"])
def test_the_imagenet_members_at_full_width(depth: int, kind: str) -> None:
    entry = Entry("", lambda: ImageNetResNet(depth, kind), {}, "all" if kind == "tied" else "largest", 48)
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
    assert not torch.equal(first["stem.conv.weight"], other["stem.conv.weight"])
    assert all(value.dtype == torch.float64 for value in first.values() if value.is_floating_point())


def test_extraction_refuses_what_is_not_an_architecture(entry: Entry) -> None:
    net, x = entry.net(), entry.images(batch=2)
    largest, (width, depth) = net.space.largest(), (net.space.stem_size().on[0], net.space.depth_name(0))
    off = net.space[width].options[-1] + 1
    cases: list[tuple[Any, bool, str]] = [
        ({**largest, width: off}, True, f"{width} = {off} is not in this space. Allowed: .* Nearest"),
        ({**largest, depth: 9}, True, f"{depth} = 9 is not in this space"),
        ({**largest, depth: 9}, False, r"a stage cannot keep 9 blocks\. Allowed: 1 to [23]"),
        ({**largest, depth: 0}, False, r"a stage cannot keep 0 blocks"),
        ({name: value for name, value in largest.items() if name != width}, False, f"does not set {width}"),
        ({**largest, "no.such": 1}, True, r"no\.such is not a choice"),
        ({**largest, width: Mixture((off - 1,), torch.ones(1))}, True, f"{width} is a mixture"),
        ({**largest, depth: Mixture((1, 2), torch.ones(2))}, False, f"{depth} is a mixture"),
    ]
    for arch, inherit, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            extract(net, arch, x, inherit)
        assert "\n" not in str(error.value)


def test_a_width_without_a_norm_is_refused(entry: Entry) -> None:
    net = entry.net()
    leaf = net.stages[-1][0].conv0
    (name,) = leaf.out[0].size.on
    off = next(c for c in range(1, leaf.widths[-1]) if c not in leaf.widths)
    with pytest.raises(ValueError, match=rf"conv0: width {off} has no batch norm in this supernet\. Allowed: "):
        net(entry.images(), {**net.space.largest(), name: off})


def test_unknown_words_are_refused(entry: Entry) -> None:
    with pytest.raises(ValueError, match="view = 'dreamt' is not known. Allowed: derived, searched, estimated"):
        entry.net().layers((8, 8), "dreamt")
    for key in ("mixing", "norm"):
        with pytest.raises(ValueError, match=f"{key} = 'dreamt' is not known"):
            entry._replace(settings={key: "dreamt"}).net()


def test_adopting_and_extracting_the_largest_is_the_identity(entry: Entry) -> None:
    net, x, largest = entry.net(), entry.images(batch=2), entry.make_space().largest()
    weights = extract(net, largest, x, inherit=False, seed=3).state_dict()
    generator = torch.Generator().manual_seed(6)
    for value in weights.values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)
    adopt(net, largest, weights, x)
    if entry.inherits != "none":
        back = extract(net, largest, x).state_dict()
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[key], weights[key]) for key in back if not key.endswith("num_batches_tracked"))
    for path, leaf in net.named_modules():
        if isinstance(leaf, ElasticConv):
            assert torch.equal(leaf.weight, weights[f"{path}.conv.weight"])
            if leaf.derived_norm:  # narrower sets start as the widest's first channels
                for gamma, beta in zip(leaf.norm.weight, leaf.norm.bias):
                    assert torch.equal(gamma, weights[f"{path}.norm.weight"][: len(gamma)])
                    assert torch.equal(beta, weights[f"{path}.norm.bias"][: len(beta)])
    assert torch.equal(net.classifier.weight, weights["classifier.weight"])
    del weights["classifier.bias"]
    with pytest.raises(ValueError, match=r"not of this space's largest network: classifier\.bias"):
        adopt(net, largest, weights, x)


def test_statistics_are_those_of_running_norms_only(entry: Entry) -> None:
    """Recalibration names exactly the norms that an architecture runs, at the width that it runs them."""
    net = entry.net()
    arch = archs(net.space, 1, seed=8)[0]
    (statistics,) = recalibrate(net, [arch], [entry.images()])
    leaves = {path: o for path, o, _ in used(net, arch) if isinstance(net.get_submodule(path), ElasticConv)}
    expected = {f"{path}.norm": o for path, o in leaves.items() if isinstance(net.get_submodule(path).norm, Normalise)}
    assert {path: len(mean) for path, (mean, _) in statistics.items()} == expected


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
@pytest.mark.parametrize("kind", ["tied", "tas"])
def test_a_bundle_loads_where_only_torch_is_installed(kind: str, tmp_path: Path) -> None:
    space = CifarResNet(14, kind, widths=(4, 6, 8))
    net = ResNet(space, classes=5)
    x, inherit = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), kind == "tied"
    (arch,) = archs(space, 1, seed=1)
    if inherit:
        install(net, recalibrate(net, [arch], [x])[0])
    graph = extract(net.eval(), arch, x, inherit=inherit)
    costs = {"macs": CostTable(net, (8, 8), macs).of(arch), "params": CostTable(net, (8, 8), params).of(arch)}
    report = prove(graph, x, {name: int(cost) for name, cost in costs.items()}, net(x, arch).detach() if inherit else None)
    file = ArchFile.of(space, arch, input=(3, 8, 8), classes=tuple("abcde"), costs=costs,
                       preprocess={"mean": [0.5] * 3, "std": [0.2] * 3, "channels": "RGB"})
    out = write_bundle(tmp_path / "bundle", graph, file, report, x)
    torch.save(x, tmp_path / "x.pt")
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, str(out)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"isolated": 1, "ours": []}
    assert torch.allclose(torch.load(tmp_path / "z.pt", weights_only=True), graph(x), atol=1e-6)
