"""The supernet of NAS-Bench-Macro: the table's costs, and one network for all strings that stand for it."""
from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from split_runs import DATA, SEED
from torch import Tensor, nn

from nas import ranks
from nas.build import gather, rebuild
from nas.bundle import counted
from nas.cost import CostTable, macs, params
from nas.losses import CrossEntropy
from nas.ranking.matching import match
from nas.ranking.tables import read_table
from nas.recalibrate import recalibrate
from nas.splits.split import Split
from nas.splits.tree import Tree
from nas.strategies.spos import SPOS
from search_spaces.arch import ArchFile
from search_spaces.nasbenchmacro import OPTIONS, NASBenchMacro
from search_spaces.space import Arch, Mixture, Setting
from supernets.extract import extract
from supernets.nasbenchmacro import NASBenchMacro as Net
from supernets.nasbenchmacro import build

TABLE = Path(__file__).resolve().parents[3] / "shared" / "tables" / "nas-bench-macro_cifar10.json"
given = pytest.mark.skipif(not TABLE.is_file(), reason=f"{TABLE} is not here: the published table is no part of the project")
SPACE = NASBenchMacro(0.125, (2, 3, 3), 8)
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EQUAL = [("00001000", "00010000"), ("01102202", "01120220"), ("12201110", "12210110"), ("00000102", "00000120"),
         ("02001001", "02010010")]  # fmt: skip
"""Two names of one network; the second is its normal form."""


def make(space: NASBenchMacro = SPACE) -> Net:
    net = build(space, 3, 5).double()
    generator = torch.Generator().manual_seed(1)
    net.reset(generator)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if ".norm." in name:
                p.uniform_(0.5, 1.5, generator=generator)
    return net


@pytest.fixture
def net() -> Net:
    return make()


@lru_cache
def published() -> tuple[CostTable, CostTable]:
    net = build(NASBenchMacro(), 3, 10)
    return CostTable(net, (32, 32), macs), CostTable(net, (32, 32), params)


# -- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,parameters,products", [("00000000", 387882, 7713280), ("22222222", 2932586, 105660928)])
def test_the_check_values_of_the_page(name: str, parameters: int, products: int) -> None:
    """Section 4: params with norms and the classifier's bias, multiply-adds without it."""
    arch = NASBenchMacro().parse(name)
    assert [table.of(arch) for table in published()] == [products, parameters]


def test_costs_are_those_counted_on_the_extracted_network() -> None:
    net = build(NASBenchMacro(), 3, 10)
    rng, x = random.Random(4), torch.zeros(1, 3, 32, 32)
    for arch in [net.space.sample(rng) for _ in range(4)] + [net.space.parse("00102001")]:
        graph = extract(net, arch, x, inherit=False)
        assert tuple(table.of(arch) for table in published()) == counted(graph, x)
        assert sum(p.numel() for p in graph.parameters()) == published()[1].of(arch)


@given
def test_all_rows_of_the_table_have_its_costs() -> None:
    rows, space = json.loads(TABLE.read_text()), NASBenchMacro()
    archs = [space.parse(name) for name in rows]
    codes = space.encode(archs)
    assert len(codes) == 6561 and [space.text(arch) for arch in archs] == list(rows)
    for table, column in zip(published(), ("flops", "params")):
        assert np.array_equal(table.batch(codes), np.array([row[column] for row in rows.values()]))
    groups: dict[Any, set[str]] = {}
    for arch, row in zip(archs, rows.values()):
        groups.setdefault(space.key(arch), set()).add(json.dumps(row))
    assert len(groups) == 3969 and {len(group) for group in groups.values()} == {1}  # one record for one network
    assert len(set.union(*groups.values())) == 3969


@given
def test_rank_finds_the_names_of_the_table() -> None:
    space, table = NASBenchMacro(), read_table(str(TABLE))
    archs, known = match({"truth": table}, space, None, {"truth": "mean_acc"})
    assert len(archs) == 6561 and archs["02012100"] == space.parse("02012100")
    assert known["truth"].said["key"] == "column key, as nasbenchmacro.NASBenchMacro writes architectures"
    assert known["truth"].said["unread"] == known["truth"].said["repeated"] == known["truth"].said["without_value"] == 0
    assert round(known["truth"].values["00000000"], 3) == 45.363 and round(known["truth"].values["22222222"], 3) == 92.953


# -- compaction -------------------------------------------------------------------------------------------------------


def gradients(net: nn.Module, settings: Mapping[str, Setting]) -> dict[str, Tensor | None]:
    net.zero_grad(set_to_none=True)
    net(X, settings).square().sum().backward()
    return {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("name,normal", EQUAL)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_strings_of_one_network_give_the_same_bits(net: Net, name: str, normal: str, training: bool) -> None:
    arch, form = SPACE.parse(name), SPACE.parse(normal)
    assert SPACE.normal(arch) == form != arch
    net.train(training)
    assert torch.equal(net(X, arch), net(X, form))
    grads, others = gradients(net, arch), gradients(net, form)
    for key, grad in grads.items():
        other = others[key]
        assert grad is other is None or (grad is not None and other is not None and torch.equal(grad, other)), key
    statistics, those = recalibrate(net, [arch, form], [X])
    assert statistics.keys() == those.keys() and all(torch.equal(statistics[key][0], those[key][0]) for key in those)


@pytest.mark.parametrize("name,normal", EQUAL)
@pytest.mark.parametrize("inherit", [True, False])
def test_strings_of_one_network_are_extracted_as_one(net: Net, name: str, normal: str, inherit: bool) -> None:
    graphs = [extract(net.eval(), SPACE.parse(text), X, inherit) for text in (name, normal)]
    states = [graph.state_dict() for graph in graphs]
    assert list(states[0]) == list(states[1]) and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert graphs[0].code == graphs[1].code
    with torch.no_grad():  # where the supernet calls the same depthwise convolution as the plain network
        assert torch.equal(graphs[0](X), graphs[1](X))
        assert torch.equal(graphs[0](X), net(X, SPACE.parse(name))) is inherit


@pytest.mark.parametrize("compact", [True, False])
def test_a_network_is_rebuilt_under_its_own_names(compact: bool) -> None:
    """The names of weights say at which place an operation ran: arch.json knows by its space."""
    space = NASBenchMacro(0.125, (2, 3, 3), 8, compact)
    arch = space.parse("01102202")
    graph = extract(make(space), arch, X)
    file = ArchFile.of(space, arch, input=(3, 8, 8), classes=tuple("abcde"), preprocess={}, costs={}, metrics={}, provenance={})
    paths = [name for name in graph.state_dict() if name.startswith("stages.2")]
    assert list(rebuild(file, "inherited").state_dict()) == list(graph.state_dict())
    assert any(path.startswith("stages.2.2.") for path in paths) is not compact  # 202: its last layer comes before


def test_what_is_no_identity_stays_in_its_order(net: Net) -> None:
    """The last layer of a stage runs the middle place where that holds an identity: shown by who gets gradients."""
    grads = gradients(net, SPACE.parse("00002102"))  # 00 | 002 | 102
    operations = {(int(s), int(i), option) for key, g in grads.items() if key.startswith("stages") and g is not None
                  for _, s, i, _, option, *_ in [key.split(".")]}  # fmt: skip
    assert operations == {(0, 0, "identity"), (1, 0, "identity"), (1, 1, "mbconv6_5x5"), (2, 0, "mbconv3_3x3"),
                          (2, 1, "mbconv6_5x5")}  # fmt: skip


def test_without_compaction_every_layer_has_its_place() -> None:
    net = make(NASBenchMacro(0.125, (2, 3, 3), 8, compact=False))
    for name, normal in EQUAL:
        assert not torch.allclose(net(X, SPACE.parse(name)), net(X, SPACE.parse(normal)), atol=1e-3)
        form = SPACE.parse(normal)
        assert torch.equal(net(X, form), make()(X, form))  # the same weights, and a normal form runs where it stands


# -- mixtures ---------------------------------------------------------------------------------------------------------


def one(arch: Arch, idle: str) -> dict[str, Setting]:
    """Every option named, one computed: as GDAS ("ones") and ProxylessNAS ("gate") draw."""
    found: dict[str, Setting] = {}
    for name, value in arch.items():
        w = torch.tensor([float(option == value) for option in OPTIONS], dtype=torch.float64, requires_grad=True)
        found[name] = Mixture(OPTIONS, w, (OPTIONS.index(str(value)),), idle)
    return found


def weight_gradients(net: Net, settings: Mapping[str, Setting]) -> dict[str, Tensor]:
    gradients(net, settings)
    found = {name: s.weights.grad for name, s in settings.items() if isinstance(s, Mixture)}
    assert all(grad is not None for grad in found.values())
    return found


@pytest.mark.parametrize("idle", ["absent", "ones", "gate"])
@pytest.mark.parametrize("name,normal", EQUAL)
def test_a_mixture_that_computes_one_option_moves_with_its_weight(net: Net, name: str, normal: str, idle: str) -> None:
    """Bits of the hard architecture; the weight of every computed option gets its gradient, that of an identity included, and
    the mixture of a layer gets what that of its new place gets in the normal form."""
    arch, form = SPACE.parse(name), SPACE.parse(normal)
    settings = one(arch, idle)
    assert torch.equal(net(X, settings), net(X, form))
    mine, theirs = weight_gradients(net, settings), weight_gradients(net, one(form, idle))
    for s, stage in enumerate(SPACE.places):
        for place, moved in zip(stage, SPACE.running(s, arch)):
            assert torch.equal(mine[moved], theirs[place.name])
    for key, value in arch.items():
        others = [float(g) for option, g in zip(OPTIONS, mine[key]) if option != value]
        assert mine[key][OPTIONS.index(str(value))] != 0
        assert all((g == 0) is (idle == "absent") for g in others), (key, others)


def test_gates_get_the_gradients_of_all_operations(net: Net) -> None:
    """dL/dg_j = <o_j(x), dL/dout> of every option, computed or not; in a normal form each is that of its own place."""
    arch = SPACE.parse("01211200")
    for name in ("stage0.layer0", "stage1.layer1", "stage2.layer2"):
        found = []
        for active, idle in (((OPTIONS.index(str(arch[name])),), "gate"), (None, "absent")):
            w = torch.tensor([float(option == arch[name]) for option in OPTIONS], dtype=torch.float64, requires_grad=True)
            found.append(weight_gradients(net, arch | {name: Mixture(OPTIONS, w, active, idle)})[name])
        assert torch.allclose(found[0], found[1], rtol=1e-9, atol=1e-12) and bool((found[0] != 0).all())


def test_a_layer_is_the_weighted_sum_of_its_operations(net: Net) -> None:
    place = net.places(1)[1]
    x, w = torch.randn(2, 16, 4, 4, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mixed = place(x, "stage1.layer1", Mixture(OPTIONS, w))
    alone = [place(x, "stage1.layer1", option) for option in OPTIONS]
    assert torch.equal(alone[0], x)
    assert torch.allclose(mixed, sum(v * y for v, y in zip(w, alone)), atol=1e-12)
    assert torch.allclose(alone[1] - x, place.get_submodule("operations.mbconv3_3x3.project")(  # its shortcut is the identity
        _inside(place.get_submodule("operations.mbconv3_3x3"), x), {}), atol=1e-12)  # fmt: skip


def _inside(block: Any, x: Tensor) -> Tensor:
    return torch.relu(block.depthwise(torch.relu(block.expand(x, {})), {}))


def test_a_true_mixture_keeps_the_layers_of_its_stage_where_they_are() -> None:
    """Of the layers that may move: a mixture in the first layer of the stage, or in another stage, holds nothing."""
    net, places = make(), make(NASBenchMacro(0.125, (2, 3, 3), 8, compact=False))
    arch, form = SPACE.parse("01102202"), SPACE.parse("01120220")
    soft = Mixture(OPTIONS, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))
    here = arch | {"stage1.layer2": soft, "stage2.layer1": soft}
    assert torch.equal(net(X, here), places(X, here))
    stage1 = arch | {"stage1.layer2": soft}
    assert torch.equal(net(X, stage1), places(X, form | {"stage1.layer1": arch["stage1.layer1"], "stage1.layer2": soft}))
    first = dict.fromkeys(("stage0.layer1", "stage1.layer0", "stage2.layer0"), soft)
    assert torch.equal(net(X, arch | first), places(X, form | first))


def test_unknown_options_are_named_by_their_choice(net: Net) -> None:
    arch = SPACE.parse("00000000")
    soft = Mixture(("identity", "dreamt"), torch.tensor([0.5, 0.5]))
    for setting in ("dreamt", soft):  # it would run at the place before
        with pytest.raises(ValueError, match=r"^stage2\.layer2 = dreamt is not in this space\. Allowed: identity, mbconv3_3x3"):
            net(X, arch | {"stage2.layer2": setting})


def test_what_a_choice_owns(net: Net) -> None:
    path = "stages.1.2.operations.mbconv6_5x5"
    assert {id(p) for p in net.owned("stage1.layer2", "mbconv6_5x5")} == {id(p) for p in net.get_submodule(path).parameters()}
    assert net.owned("stage1.layer2", "identity") == [] and net.owned("stage9.layer0") == []
    assert len(net.owned("stage1.layer0", "identity")) == 3 and len(net.owned("stage1.layer0")) == 3 + 2 * 9


# -- splits -----------------------------------------------------------------------------------------------------------


def tree(folder: Path, part: dict[str, list[str]] | None = None) -> Tree:
    """Of a run that was split by the middle layer of its second stage: identity | mbconvs."""
    net = build(NASBenchMacro(0.0625, (1, 3), 4), 1, 10)
    split = Split(by="exhaustive", choices=["stage1.layer1"], parts=[[["identity"], list(OPTIONS[1:])]], at=[1])
    made = gather(DATA, net, SPOS(), CrossEntropy(), epochs=2, seed=SEED, device=torch.device("cpu"),
                  group=ranks.Ranks(0, 1, 0, True), split=split, part=part)  # fmt: skip
    said = {"format": "nas-split", "version": 1, "choice": "stage1.layer1", "groups": split.parts[0], "measured": {},
            "children": [], "inherit": "all", "epoch": 1, "step": 2, "repeats": 0, "samples": 0, "passes": 0, "images": 0,
            "seconds": 0}  # fmt: skip
    folder.joinpath("split.json").write_text(json.dumps(said))
    return Tree(made, split, folder, 2, SEED)


def test_strings_of_one_network_have_one_leaf(tmp_path: Path) -> None:
    grown = tree(tmp_path)
    space = grown.built.space
    served = {space.text(arch): grown.leaf(arch).name for arch in space.decode(space.encode([
        space.parse(name) for name in ("0000", "0001", "0010", "0012", "0002", "1100")]))}  # fmt: skip
    assert served == {"0000": "0", "0001": "1", "0010": "1", "0012": "1", "0002": "1", "1100": "0"}


def test_a_form_outside_the_root_s_space_is_not_looked_for(tmp_path: Path) -> None:
    """Layer 2 is never an identity here, so 0001 is there and its normal form 0010 is not."""
    grown = tree(tmp_path, {"stage1.layer2": list(OPTIONS[1:])})
    space = grown.built.space
    assert grown.leaf(space.parse("0001")).name == "0" and grown.leaf(space.parse("0011")).name == "1"
