"""Distances of gradients (fewshot-gm.md, sections 2b and 5) on gradients written by hand, on a linear model whose gradients are
worked out by hand, and on a tiny NAS-Bench-201 supernet against a literal loop. All in float64."""
from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.alpha import Alpha
from nas.protocols import Batch
from nas.splits.gradients import CHUNK, EPS, distances, fixed, gradients, match, shared
from search_spaces.darts import Cells as DartsSpace
from search_spaces.mobilenet import OFAMobileNetV3
from search_spaces.nats import NAMES, OPS, Topology
from search_spaces.space import Mixture, SearchSpace, Setting, Value
from supernets import darts, mobilenet, nats

LEAVE_OUT = ("stem.*", "norm.*", "classifier.*")  # of supernets.nats.Topology, as published
EDGE = "node2.from1"


def vectors(*rows: list[float]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def batch_of(x: Tensor, y: Tensor) -> Batch:
    return Batch(x, y, torch.arange(len(x)))


# ---- D on gradients by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("g", "h", "expected"), [
    ([3.0, 4.0], [3.0, 4.0], 1e-6 / (25 + 1e-6)),  # equal: 0 but for the term
    ([3.0, 4.0], [-3.0, -4.0], 1 + 25 / (25 + 1e-6)),  # opposite: 2
    ([3.0, 4.0], [-4.0, 3.0], 1.0),  # orthogonal
    ([1.0, 0.0], [-3.0, 4.0], 1 + 3 / (5 + 1e-6)),  # a cosine of -0.6
    ([1.0, 0.0], [3.0, 4.0], 1 - 3 / (5 + 1e-6)),
    ([0.0, 0.0], [3.0, 4.0], 1.0), ([0.0, 0.0], [0.0, 0.0], 1.0),  # zero gradients: exactly, by the formula
    ([1e-3, 0.0], [1e-3, 0.0], 0.5),  # where the term is as large as the product of norms
])  # fmt: skip
def test_the_formula(g: list[float], h: list[float], expected: float) -> None:
    D = distances(vectors(g, h))
    assert D.dtype == np.float64 and D.shape == (2, 2)
    assert D[0, 1] == D[1, 0] == pytest.approx(expected, abs=1e-15)


def test_one_cosine_over_the_whole_vector() -> None:
    """(3, 4) and (4, 3): 24/25. Number by number, two cosines of 1 would have the mean 1, and their sum would be 2."""
    assert distances(vectors([3.0, 4.0], [4.0, 3.0]))[0, 1] == pytest.approx(1 - 24 / (25 + 1e-6), abs=1e-15)


def test_the_diagonal_is_the_formula_too() -> None:
    D = distances(vectors([3.0, 4.0], [0.0, 0.0], [0.5, 0.0]))
    assert np.diag(D) == pytest.approx([1e-6 / (25 + 1e-6), 1.0, 1e-6 / (0.25 + 1e-6)], abs=1e-15)


def test_d_is_symmetric_and_blind_to_positive_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(5)]
    D = distances(rows)
    assert (D == D.T).all() and ((D > 0) & (D < 2)).all()
    scaled = distances([rows[0], 1e3 * rows[1], *rows[2:]])
    assert np.abs(scaled - D).max() < 1e-6 and not (scaled == D).all()
    turned = distances([rows[0], -rows[1], *rows[2:]])
    assert turned[0, 1] == pytest.approx(2 - D[0, 1], abs=1e-14)


def test_sums_are_in_float64_whatever_comes_in() -> None:
    """In float32 the small numbers of g would be lost beside the large one: <g, h> = 0."""
    g, h = torch.full((1001,), 2.0**-13), torch.full((1001,), 2.0**-13)
    g[0], h[0] = 2.0**12, 2.0**-1
    dot, gg, hh = 2.0**11 + 1000 * 2.0**-26, 2.0**24 + 1000 * 2.0**-26, 0.25 + 1000 * 2.0**-26
    assert distances([g, h])[0, 1] == pytest.approx(1 - dot / (math.sqrt(gg * hh) + EPS), abs=1e-15)
    assert distances([g.bfloat16(), h.bfloat16()])[0, 1] == distances([g, h])[0, 1]


def test_long_vectors_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [torch.arange(11.0, dtype=torch.float64) - k for k in range(3)]
    whole = distances(rows)
    monkeypatch.setattr("nas.splits.gradients.CHUNK", 4)
    assert CHUNK > 11 and np.abs(distances(rows) - whole).max() < 1e-15


@pytest.mark.parametrize(("rows", "line"), [
    (vectors([1.0, 2.0], [1.0]), "one length"), ([torch.ones(2, 2)] * 2, "one length"), ([], "one length"),
    (vectors([1.0, 2.0], [math.nan, 1.0], [math.inf, 0.0]), "options 1, 2 .* not finite"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(rows: list[Tensor], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        distances(rows)


# ---- a linear model ---------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """z = x . (w * own_o) + k_o v, own_o = (1, 2), (2, -1), (-1, -2) and k_o = 3, 4, 0 for o = a, b, c; for d: z = x_0 u."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.u = (nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in ([0.5, -1.0], [2.0], [3.0]))
        self.own = nn.ParameterDict({
            "a": nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)),
            "b": nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64)),
            "c": nn.Parameter(torch.tensor([-1.0, -2.0], dtype=torch.float64)),
        })  # fmt: skip

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        op = str(arch["op"])
        if op == "d":
            return x[:, 0] * self.u
        return x @ (self.w * self.own[op]) + {"a": 3.0, "b": 4.0, "c": 0.0}[op] * self.v

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        return [p for name, p in self.own.items() if option in (None, name)]


def product(z: Tensor, y: Tensor) -> Tensor:
    return (z * y).mean()


LINEAR = batch_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64))


def test_gradients_of_the_linear_model_by_hand() -> None:
    """L = mean(z y), m = mean(y x) = ([1,2] - [3,4]) / 2 = (-1, -1): dL/dw = own * m; dL/dv = 0, as mean(y) = 0.

    g_a = (-1, -2), g_b = (-2, 1), g_c = (1, 2): D_ab = 1, D_ac = 2, D_bc = 1."""
    net = Linear()
    rows = gradients(net, product, LINEAR, lambda option: {"op": option}, ("a", "b", "c"), [net.w])
    assert [row.tolist() for row in rows] == [[-1.0, -2.0], [-2.0, 1.0], [1.0, 2.0]]
    D = match(net, product, LINEAR, lambda option: {"op": option}, ("a", "b", "c"), [net.w])
    assert D[0, 1] == D[1, 2] == 1.0
    assert D[0, 2] == pytest.approx(1 + 5 / (5 + 1e-6), abs=1e-15)


def test_parameters_are_one_vector() -> None:
    """With y = (1, 1): m = (2, 3), mean(y) = 1. g_a = (2, 6 | 3), g_b = (4, -3 | 4): <> = 8 - 18 + 12 = 2, norms 7 and sqrt 41.

    Two cosines, one a parameter, would be -10 / (sqrt 40 * 5) and 1; neither their sum nor their mean is this."""
    net = Linear()
    batch = batch_of(LINEAR.x, torch.ones(2, dtype=torch.float64))
    D = match(net, product, batch, lambda option: {"op": option}, "ab", [net.w, net.v])
    assert D[0, 1] == pytest.approx(1 - 2 / (7 * math.sqrt(41) + 1e-6), abs=1e-15)


def test_only_what_every_option_reaches_is_compared() -> None:
    """u is d's alone and w is not d's: v and w are left of a and b, nothing of a and d."""
    net = Linear()
    everything = [net.u, net.w, net.v]
    run = partial(match, net, product, LINEAR, lambda option: {"op": option})
    assert (run("ab", everything) == run("ab", [net.w, net.v])).all()
    with pytest.raises(ValueError, match="None of 3 shared parameters gets a gradient from all of a, d"):
        run("ad", everything)
    with pytest.raises(ValueError, match="None of 0 shared parameters"):
        run("ab", [])


def test_parameters_that_the_choice_owns_are_not_shared() -> None:
    net = Linear()
    assert [id(p) for p in shared(net, "op")] == [id(p) for p in (net.w, net.v, net.u)]
    assert [id(p) for p in shared(net, "op", ["[uv]"])] == [id(net.w)]
    net.u.requires_grad_(False)
    assert [id(p) for p in shared(net, "op")] == [id(p) for p in (net.w, net.v)]


class Dropped(nn.Module):
    """Both options are the same vector under dropout of a half; "scaled" is it ten times. Draws numbers in ``forward`` only."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, 32, dtype=torch.float64))
        self.block = nn.Dropout(0.5)

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:
        return F.dropout(self.block(x) * self.w, 0.5, self.training).sum(1) * {"same": 1.0, "scaled": 10.0}[str(arch["op"])]


def test_all_options_see_the_same_dropout_and_the_generator_is_left_alone() -> None:
    net = Dropped().eval()
    x = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch = batch_of(x, torch.ones(4, dtype=torch.float64))
    rows = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        options = ("same", "same", "scaled")
        first, second, scaled = gradients(net, product, batch, lambda option: {"op": option}, options, [net.w])
        assert torch.equal(before, torch.random.get_rng_state())
        assert torch.equal(first, second) and torch.allclose(scaled, 10 * first, rtol=1e-14, atol=0)
        rows[seed] = first
    assert not torch.equal(rows[0], rows[1])  # another state, another draw
    assert (rows[0] == 0).any() and not net.training and not net.block.training  # it was in training mode, and is not now
    assert not torch.allclose(rows[0], x.mean(0))  # which is dL/dw without dropout


# ---- a tiny supernet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cells() -> tuple[Topology, Any, Alpha, Batch]:
    space = Topology(4, 1)
    net = nats.Topology(space, channels=3, classes=4).double()
    generator = torch.Generator().manual_seed(3)
    net.reset(generator)
    alpha = Alpha(space, std=1.0, generator=generator).double()
    x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return space, net, alpha, batch_of(x, torch.tensor([0, 1, 2, 3, 0, 1]))


def settings(
    space: SearchSpace, setting: Mapping[str, Setting], choice: str, keep_weight: bool = False
) -> Callable[[Value], Mapping[str, Setting]]:
    return lambda option: fixed(space, setting, choice, option, random.Random(0), keep_weight)


def literal(net: Any, batch: Batch, soft: Mapping[str, Setting], edge: str, names: list[str]) -> np.ndarray:
    """Section 2b as it stands, on a copy of the mixture's numbers: backward, join, compare."""
    known, rows = dict(net.named_parameters()), []
    for op in OPS:
        arch: dict[str, Setting] = {edge: op}
        for name in set(soft) - {edge}:
            s = soft[name]
            arch[name] = Mixture(s.options, s.weights.detach().clone()) if isinstance(s, Mixture) else s
        net.zero_grad()
        net.train()
        F.cross_entropy(net(batch.x, arch), batch.y).backward()
        rows.append({name: known[name].grad.clone() for name in names if known[name].grad is not None})
    both = [name for name in names if all(name in row for row in rows)]
    D = np.zeros((len(OPS), len(OPS)))
    for i, g in enumerate(rows):
        for j, h in enumerate(rows):
            dot, gg, hh = (sum(float((a[name] * b[name]).sum()) for name in both) for a, b in ((g, h), (g, g), (h, h)))
            D[i, j] = 1 - dot / (math.sqrt(gg) * math.sqrt(hh) + 1e-6)
    net.zero_grad()
    return D


def test_shared_weights_of_nb201(cells: tuple[Topology, Any, Alpha, Batch]) -> None:
    """As released: other edges of all cells and the residual blocks; not edge e, the stem, the last norm, the classifier."""
    _, net, _, _ = cells
    names = {id(p): name for name, p in net.named_parameters()}
    found = [names[id(p)] for p in shared(net, EDGE, LEAVE_OUT)]
    expected = [name for name in names.values() if name.startswith(("stages.", "reductions.")) and EDGE not in name]
    assert found == expected and len(found) == 3 * 5 * 2 + 2 * 7
    assert len(shared(net, EDGE)) == len(names) - 3 * 2


@pytest.mark.parametrize("leave_out", [(), LEAVE_OUT])
@pytest.mark.parametrize("edge", [EDGE, "node1.from0"])
def test_a_supernet_under_a_mixture_is_the_literal_loop(
    cells: tuple[Topology, Any, Alpha, Batch], edge: str, leave_out: tuple[str, ...]
) -> None:
    space, net, alpha, batch = cells
    params, soft = shared(net, edge, leave_out), alpha.soft()
    D = match(net, F.cross_entropy, batch, settings(space, soft, edge), OPS, params)
    kept = {id(p) for p in params}
    expected = literal(net, batch, soft, edge, [name for name, p in net.named_parameters() if id(p) in kept])
    assert np.abs(D - expected).max() < 1e-12
    assert 0.01 < D[np.triu_indices(5, 1)].min() < D[np.triu_indices(5, 1)].max() < 2  # they differ at all


def test_on_a_path_only_what_it_runs_is_compared(cells: tuple[Topology, Any, Alpha, Batch]) -> None:
    space, net, _, batch = cells
    path = space.parse("|nor_conv_3x3~0|+|nor_conv_1x1~0|none~1|+|skip_connect~0|nor_conv_3x3~1|avg_pool_3x3~2|")
    params = shared(net, EDGE, LEAVE_OUT)
    D = match(net, F.cross_entropy, batch, settings(space, path, EDGE), OPS, params)
    kept = {id(p) for p in params}
    assert np.abs(D - literal(net, batch, path, EDGE, [n for n, p in net.named_parameters() if id(p) in kept])).max() < 1e-12
    runs = [p for n, p in net.named_parameters() if n.startswith("reductions.")
            or any(word in n for word in ("node1.from0.nor_conv_3x3", "node2.from0.nor_conv_1x1", "node3.from1.nor_conv_3x3"))]
    assert (D == match(net, F.cross_entropy, batch, settings(space, path, EDGE), OPS, runs)).all()


def test_nothing_is_changed(cells: tuple[Topology, Any, Alpha, Batch]) -> None:
    space, net, alpha, batch = cells
    net.train()
    net.reductions[0].eval()
    net.stem.weight.grad = torch.full_like(net.stem.weight, 7.0)
    net.classifier.bias.requires_grad_(False)
    grads = {name: p.grad for name, p in net.named_parameters()}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    needs = [p.requires_grad for p in net.parameters()]
    random_state, soft, rng = torch.random.get_rng_state(), alpha.soft(), random.Random(4)
    python_state = rng.getstate()
    match(net, F.cross_entropy, batch, lambda option: fixed(space, soft, EDGE, option, rng), OPS, shared(net, EDGE))
    after = net.state_dict()
    assert set(state) == set(after) and all(torch.equal(value, state[name]) for name, value in after.items())
    assert all(p.grad is grads[name] for name, p in net.named_parameters())
    assert torch.equal(net.stem.weight.grad, torch.full_like(net.stem.weight, 7.0))
    assert [module.training for module in net.modules()] == modes and len(set(modes)) == 2
    assert [p.requires_grad for p in net.parameters()] == needs and not all(needs)
    assert torch.equal(random_state, torch.random.get_rng_state()) and rng.getstate() == python_state
    assert all(p.grad is None for p in alpha.parameters())
    torch.stack([s.weights.sum() for s in soft.values() if isinstance(s, Mixture)]).sum().backward()  # its graph is still there


def test_modes_come_back_after_an_error(cells: tuple[Topology, Any, Alpha, Batch]) -> None:
    space, net, alpha, batch = cells
    net.eval()
    state = torch.random.get_rng_state()

    def fails(z: Tensor, y: Tensor) -> Tensor:
        torch.rand(3)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        match(net, fails, batch, settings(space, alpha.soft(), EDGE), OPS, shared(net, EDGE))
    assert not any(module.training for module in net.modules()) and torch.equal(state, torch.random.get_rng_state())


def test_masked_operations_have_no_weight_and_no_gradient(cells: tuple[Topology, Any, Alpha, Batch]) -> None:
    """A leaf of a split: probability 0 to what it forbids, which is neither computed nor compared, and whose logits rest."""
    space, net, alpha, batch = cells
    leaf = space.restrict({"node3.from0": ["skip_connect", "nor_conv_1x1"]})
    sub = Alpha(leaf).double()
    sub.load_state_dict(alpha.state_dict())
    soft = sub.soft()
    mixture = soft["node3.from0"]
    assert isinstance(mixture, Mixture) and mixture.active == (1, 2)
    a = alpha.logits["5"][NAMES.index("node3.from0"), 1:3].detach()
    assert mixture.weights.tolist() == pytest.approx([0.0, *torch.softmax(a, 0).tolist(), 0.0, 0.0], abs=1e-15)
    kept = [p for p in shared(net, EDGE, LEAVE_OUT) if all(p is not q for q in net.owned("node3.from0", "nor_conv_3x3"))]
    assert len(kept) == len(shared(net, EDGE, LEAVE_OUT)) - 3
    run = partial(match, net, F.cross_entropy, batch, settings(leaf, soft, EDGE), OPS)
    assert (run(shared(net, EDGE, LEAVE_OUT)) == run(kept)).all()
    with pytest.raises(ValueError, match="nothing to compare"):
        run(net.owned("node3.from0", "nor_conv_3x3"))
    F.cross_entropy(net(batch.x, soft), batch.y).backward()
    assert all(p.grad is None for p in net.owned("node3.from0", "nor_conv_3x3"))
    grad = sub.logits["5"].grad
    assert grad is not None and [g != 0 for g in grad[NAMES.index("node3.from0")].tolist()] == [False, True, True, False, False]
    with pytest.raises(ValueError, match=r"node3.from0 = none is not in this space"):
        fixed(leaf, soft, "node3.from0", "none", random.Random(0))
    two = match(net, F.cross_entropy, batch, settings(leaf, soft, "node3.from0"), leaf["node3.from0"].options, kept)
    assert two.shape == (2, 2)


def test_a_kept_weight_is_another_distance(cells: tuple[Topology, Any, Alpha, Batch]) -> None:
    """The released DARTS form: the tested option keeps its softmax weight, here 1/5, instead of 1."""
    space, net, alpha, batch = cells
    with torch.no_grad():
        alpha.logits["5"].zero_()
    soft, params = alpha.soft(), shared(net, EDGE, LEAVE_OUT)
    said = fixed(space, soft, EDGE, "skip_connect", random.Random(0), keep_weight=True)[EDGE]
    assert isinstance(said, Mixture) and said.options == ("skip_connect",) and said.weights.tolist() == pytest.approx([0.2])
    assert not said.weights.requires_grad
    whole, kept = (match(net, F.cross_entropy, batch, settings(space, soft, EDGE, keep), OPS, params) for keep in (False, True))
    assert np.abs(whole - kept).max() > 0.01
    by_hand = {op: {**soft, EDGE: Mixture((op,), torch.tensor([0.2], dtype=torch.float64))} for op in OPS}
    expected = match(net, F.cross_entropy, batch, lambda option: by_hand[str(option)], OPS, params)
    assert np.abs(kept - expected).max() < 1e-12


# ---- patterns of what is left out -------------------------------------------------------------------------------------------


def test_numbers_of_the_choice_stand_in_patterns() -> None:
    """The released OFA split: everything but the block of the tested kernel."""
    space = OFAMobileNetV3(width=0.35, small=True)
    net = mobilenet.OFAMobileNetV3(space, channels=3, classes=4)
    names = {id(p): name for name, p in net.named_parameters()}
    found = [names[id(p)] for p in shared(net, "stage1.block2.kernel", ["stages.{0}.{1}.*"])]
    assert found == [name for name in names.values() if not name.startswith("stages.1.2.")] and len(found) < len(names) - 5
    with pytest.raises(ValueError, match=r"numbers that stage1.depth does not have: it has 1"):
        shared(net, "stage1.depth", ["stages.{0}.{1}.*"])


def test_of_a_darts_supernet() -> None:
    space = DartsSpace(4, 4, nodes=2)
    net = darts.Cells(space, channels=3, classes=4)
    names = {id(p): name for name, p in net.named_parameters()}
    found = [names[id(p)] for p in shared(net, "normal.node3.from1", ["stem.*", "*.pre0.*", "*.pre1.*", "classifier.*"])]
    assert found and all(".node" in name for name in found)
    edge = [name for name in names.values() if "node3.from1" in name]  # of four cells, two are reductions: they stay
    assert {name.split(".")[1] for name in edge if name in found} == {str(k) for k in net.reductions()}
    assert {name.split(".")[1] for name in edge if name not in found} == {"0", "3"}


def test_a_parameter_of_two_names_is_left_out_by_either() -> None:
    net = Linear()
    net.second = net.w
    assert [id(p) for p in shared(net, "op", ["second"])] == [id(p) for p in (net.v, net.u)]


@pytest.mark.parametrize(("pattern", "line"), [("stemm.*", "matches no parameter. Parameters: w, v, u, ..."),
                                               ("{0}.*", "it has none"), ("{w}", "it has none")])  # fmt: skip
def test_patterns_that_leave_nothing_out_are_refused(pattern: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        shared(Linear(), "op", [pattern])
