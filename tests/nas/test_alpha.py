"""Architecture parameters: rows of the root's shape, read as mixtures; forbidden options, ties, determinism, gradients.

The distributions of Gumbel noise and of drawn pairs are tested beside TAS's equations.
"""
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nas.alpha import Alpha
from search_spaces.space import Choice, Mixture, SearchSpace

CHOICES = [
    Choice("a.width", (4, 6, 8)), Choice("b.depth", (1, 2)), Choice("c.width", (4, 6, 8)),
    Choice("d.op", ("x", "y", "z"), ordered=False),
]  # fmt: skip


def space() -> SearchSpace:
    return SearchSpace(CHOICES, {})


def alphas(of: SearchSpace, std: float = 1.0) -> Alpha:
    return Alpha(of, std, torch.Generator().manual_seed(1)).double()


def noise(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def row(alpha: Alpha, name: str) -> Tensor:
    K = len(alpha.space.root[name].options)
    return alpha.logits[str(K)][alpha.groups[K].index(name)]


def mixture(setting: Any) -> Mixture:
    assert isinstance(setting, Mixture)
    return setting


def test_rows_have_the_roots_shape_and_their_own_start() -> None:
    alpha = alphas(space(), std=0.01)
    assert {K: tuple(p.shape) for K, p in alpha.logits.items()} == {"3": (3, 3), "2": (1, 2)}
    assert alpha.groups == {3: ["a.width", "c.width", "d.op"], 2: ["b.depth"]}
    rows = torch.cat([p.detach().flatten() for p in alpha.parameters()])
    assert 0.002 < rows.std().item() < 0.03 and rows.unique().numel() == 11
    child = Alpha(space().restrict({"a.width": [4]}))
    child.double().load_state_dict(alpha.state_dict())  # children of a split take their parent's logits over
    assert torch.equal(child.logits["3"], alpha.logits["3"])


def test_soft_is_a_softmax_by_row() -> None:
    alpha = alphas(space())
    for tau in (1.0, 0.5):
        found = alpha.soft(tau)
        assert list(found) != [] and found.keys() == {choice.name for choice in CHOICES}
        for choice in CHOICES:
            powers = [math.exp(value / tau) for value in row(alpha, choice.name).tolist()]
            m = mixture(found[choice.name])
            assert m.options == choice.options and m.active is None and m.idle == "absent"
            assert m.weights.tolist() == pytest.approx([power / sum(powers) for power in powers], rel=1e-12)
    assert alpha.soft(names=["b.depth"]).keys() == {"b.depth"}


def test_forbidden_options_have_no_weight_and_are_not_computed() -> None:
    alpha = alphas(space().restrict({"a.width": [4, 8], "d.op": ["y"]}))
    with torch.no_grad():
        row(alpha, "a.width")[1] = 50.0  # the forbidden one would win
        row(alpha, "d.op")[0] = 50.0
    for found in (alpha.soft(), alpha.gumbel(1.0, noise())):
        m = mixture(found["a.width"])
        assert m.options == (4, 6, 8) and m.active == (0, 2)
        assert m.weights[1].item() == 0.0 and m.weights.sum().item() == pytest.approx(1.0)
        assert found["d.op"] == "y"
    for seed in range(20):
        pair = mixture(alpha.gumbel(1.0, noise(seed), count=2)["a.width"])
        assert pair.options == (4, 6, 8) and pair.active == (0, 2)  # two are left: nothing to draw
        single = mixture(alpha.gumbel(1.0, noise(seed), count=1)["a.width"])
        assert single.options in ((4,), (8,)) and single.weights.tolist() == [1.0]
        assert mixture(alpha.straight_through(1.0, noise(seed))["a.width"]).active in ((0,), (2,))
    assert alpha.architecture()["a.width"] in (4, 8) and alpha.architecture()["d.op"] == "y"
    p = alpha.probabilities()
    assert p["a.width"][1] == 0.0 and p["d.op"] == [0.0, 1.0, 0.0]


def test_no_gradient_reaches_what_is_forbidden() -> None:
    alpha = alphas(space().restrict({"a.width": [4, 8], "d.op": ["y"]}))
    total = sum((mixture(s).weights.nan_to_num() ** 2).sum() for s in alpha.soft().values() if isinstance(s, Mixture))
    total.backward()  # type: ignore[union-attr]
    grad = alpha.logits["3"].grad
    assert grad is not None and bool(grad.isfinite().all())
    assert (grad != 0).tolist() == [[True, False, True], [True, True, True], [False, False, False]]


def test_probabilities_and_the_architecture() -> None:
    alpha = alphas(space())
    p = alpha.probabilities()
    for choice in CHOICES:
        assert p[choice.name] == pytest.approx(torch.softmax(row(alpha, choice.name), 0).tolist(), rel=1e-12)
        assert alpha.architecture()[choice.name] == choice.options[int(row(alpha, choice.name).argmax())]
    assert list(alpha.architecture()) == [choice.name for choice in CHOICES]


def test_a_follower_copies_its_leader() -> None:
    widths: dict[Any, int] = {4: 8, 6: 6, 8: 4}
    depths: dict[Any, int] = {"x": 1, "y": 1, "z": 2}
    tied = space().tie("c.width", "a.width", widths).tie("b.depth", "d.op", depths)
    alpha = alphas(tied)
    for found in (alpha.soft(), alpha.gumbel(0.5, noise()), alpha.gumbel(0.5, noise(), count=2)):
        leader, follower = mixture(found["a.width"]), mixture(found["c.width"])
        assert follower.options == tuple(widths[option] for option in leader.options)
        assert follower.weights is leader.weights
        op, depth = mixture(found["d.op"]), mixture(found["b.depth"])
        assert depth.options == tuple(depths[option] for option in op.options)
    assert alpha.architecture()["c.width"] == widths[alpha.architecture()["a.width"]]
    hard = alphas(tied.restrict({"a.width": [6]}))
    assert hard.soft()["a.width"] == 6 and hard.soft()["c.width"] == 6


def test_a_sample_depends_on_its_generator_alone() -> None:
    alpha = alphas(space())
    torch.manual_seed(0)
    first = alpha.gumbel(0.7, noise(), count=2)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    again, other = alpha.gumbel(0.7, noise(), count=2), alpha.gumbel(0.7, noise(4), count=2)
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is not touched
    assert all(torch.equal(mixture(first[n]).weights, mixture(again[n]).weights) for n in first)
    assert any(not torch.equal(mixture(first[n]).weights, mixture(other[n]).weights) for n in first)


def test_gumbel_over_all_options() -> None:
    alpha = alphas(space())
    found = mixture(alpha.gumbel(0.5, noise(), names=["b.depth"])["b.depth"])
    g = -torch.empty(1, 2, dtype=torch.float64).exponential_(generator=noise()).log()
    u = (torch.log_softmax(row(alpha, "b.depth"), 0) + g[0]) / 0.5
    assert found.weights.tolist() == pytest.approx(torch.softmax(u, 0).tolist(), rel=1e-12)
    plain = mixture(alpha.gumbel(0.0, noise(), names=["b.depth"])["b.depth"])
    assert plain.weights.tolist() == mixture(alpha.soft()["b.depth"]).weights.tolist()


class Spoiled:
    """A generator's first Gumbel numbers are not finite."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        draw, self.calls = torch.Tensor.exponential_, 0

        def exponential_(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            found = draw(tensor, *args, **kwargs)
            return found.index_fill_(1, torch.tensor([0]), 0.0) if self.calls < 3 else found

        monkeypatch.setattr(torch.Tensor, "exponential_", exponential_)


def test_everything_is_redrawn_on_an_infinite_number(monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = alphas(space())
    spoiled = Spoiled(monkeypatch)
    found = mixture(alpha.gumbel(1.0, noise(), names=["a.width"])["a.width"])
    assert spoiled.calls == 3 and bool(found.weights.isfinite().all())


def test_a_starved_option_can_still_be_drawn() -> None:
    """p + 1e-7: without it, a row with one certain option could not give two."""
    alpha = alphas(SearchSpace([Choice("a.width", (4, 6, 8))], {}))
    with torch.no_grad():
        alpha.logits["3"].copy_(torch.tensor([[3000.0, 0.0, 0.0]]))
    pairs = {mixture(alpha.gumbel(0.1, noise(seed), count=2)["a.width"]).options for seed in range(30)}
    assert pairs == {(4, 6), (4, 8)}


def test_straight_through_is_one_hot_with_the_soft_gradient() -> None:
    alpha = alphas(space())
    found = alpha.straight_through(0.7, noise())
    soft = alpha.gumbel(0.7, noise())
    for name in found:
        m, p = mixture(found[name]), mixture(soft[name]).weights
        assert m.idle == "ones" and m.active == (int(p.argmax()),)
        assert m.weights.tolist() == pytest.approx([float(j in m.active) for j in range(len(m.options))], abs=1e-15)
        factors = torch.arange(1.0, len(p) + 1, dtype=torch.float64)
        (mine,) = torch.autograd.grad((m.weights * factors).sum(), alpha.logits[str(len(p))], retain_graph=True)
        (theirs,) = torch.autograd.grad((p * factors).sum(), alpha.logits[str(len(p))], retain_graph=True)
        assert torch.equal(mine, theirs) and bool(mine.any())


def test_entropy_runs_from_undecided_to_decided() -> None:
    alpha = alphas(space().restrict({"a.width": [4, 8], "d.op": ["y"]}), std=0.0)
    assert alpha.entropy().item() == pytest.approx(1.0)
    with torch.no_grad():
        row(alpha, "b.depth").copy_(torch.tensor([0.0, math.log(3.0)], dtype=torch.float64))
    H = (0.25 * math.log(4) + 0.75 * math.log(4 / 3)) / math.log(2)
    assert alpha.entropy().item() == pytest.approx((2 + H) / 3, rel=1e-12)
    with torch.no_grad():
        for p in alpha.parameters():
            p.copy_(100.0 * torch.arange(p.shape[1]))
    assert alpha.entropy().item() == pytest.approx(0.0, abs=1e-12)
    assert alphas(SearchSpace([Choice("a", (1,))], {})).entropy().item() == 0.0


def test_what_is_forbidden_is_never_drawn_over_many_draws() -> None:
    alpha = alphas(SearchSpace([Choice("a.width", (4, 6, 8, 10)), Choice("c.width", (4, 6, 8, 10))], {}).restrict(
        {"a.width": [6, 8, 10], "c.width": [4, 6, 10]}), std=0.1)  # fmt: skip
    with torch.no_grad():
        row(alpha, "a.width")[0] = row(alpha, "c.width")[2] = 50.0
    met: set[tuple[str, Any]] = set()
    for seed in range(200):
        for tau in (2.0, 0.0):  # with noise, and the plain softmax
            for name, setting in alpha.gumbel(tau, noise(seed), count=2).items():
                pair = mixture(setting)
                assert len(pair.options) == 2 and pair.options[0] < pair.options[1]  # type: ignore[operator]
                met |= {(name, option) for option in pair.options}
        path = mixture(alpha.straight_through(2.0, noise(seed))["a.width"])
        assert path.active is not None and path.active[0] != 0
    assert met == {("a.width", 6), ("a.width", 8), ("a.width", 10), ("c.width", 4), ("c.width", 6), ("c.width", 10)}


def test_a_starved_row_gives_no_forbidden_option_either() -> None:
    """Where the second candidate is drawn by the 1e-7 alone, what is forbidden has not even that."""
    alpha = alphas(SearchSpace([Choice("a.width", (4, 6, 8, 10))], {}).restrict({"a.width": [4, 8, 10]}))
    with torch.no_grad():
        alpha.logits["4"].copy_(torch.tensor([[3000.0, 0.0, 0.0, 0.0]]))
    pairs = {mixture(alpha.gumbel(0.1, noise(seed), count=2)["a.width"]).options for seed in range(30)}
    assert pairs == {(4, 8), (4, 10)}


def test_fewer_allowed_than_candidates_are_all_taken() -> None:
    found = alphas(space().restrict({"a.width": [4, 8]})).gumbel(0.7, noise(), count=3)
    two, three = mixture(found["a.width"]), mixture(found["c.width"])
    assert two.options == (4, 6, 8) and two.active == (0, 2) and two.weights[1].item() == 0.0
    assert two.weights.sum().item() == pytest.approx(1.0) and three.active is None and three.options == (4, 6, 8)


def test_of_equal_options_the_first_that_is_allowed_is_derived() -> None:
    for restriction, expected in (({}, 4), ({"a.width": [6, 8]}, 6)):
        alpha = alphas(space().restrict(restriction), std=0.0)
        with torch.no_grad():
            row(alpha, "c.width").copy_(torch.tensor([0.1, 0.3, 0.3]))
        assert alpha.architecture() == {"a.width": expected, "b.depth": 1, "c.width": 6, "d.op": "x"}


def test_followers_of_paths_and_of_restricted_leaders() -> None:
    """Leader options that are forbidden may have no value; what stands in their place is not computed."""
    alpha = alphas(space().restrict({"a.width": [4, 8]}).tie("b.depth", "a.width", {4: 2, 8: 1}))
    for found in (alpha.soft(), alpha.gumbel(0.5, noise()), alpha.straight_through(0.5, noise())):
        leader, follower = mixture(found["a.width"]), mixture(found["b.depth"])
        assert follower.weights is leader.weights and follower[2:] == leader[2:] and leader.active is not None
        assert {(leader.options[j], follower.options[j]) for j in leader.active} <= {(4, 2), (8, 1)}
        assert len(follower.options) == len(leader.options)
    assert alpha.architecture()["b.depth"] == {4: 2, 8: 1}[alpha.architecture()["a.width"]]  # type: ignore[index]


def test_the_gradient_of_the_entropy_is_finite_in_a_restricted_space() -> None:
    """dH/da_k = -p_k (log p_k + H); nothing reaches what is forbidden."""
    alpha = alphas(space().restrict({"a.width": [4, 8], "b.depth": [1], "c.width": [6], "d.op": ["y"]}))
    (found,) = torch.autograd.grad(alpha.entropy(), alpha.logits["3"])
    p = torch.softmax(row(alpha, "a.width").detach()[[0, 2]], 0)
    H = -(p * p.log()).sum()
    first, last = (-p * (p.log() + H) / math.log(2)).tolist()
    assert found[0].tolist() == pytest.approx([first, 0.0, last], abs=1e-14) and not found[1:].any() and first != 0.0


# -- the limit of skips -------------------------------------------------------------------------------------------------


class Cell(SearchSpace):
    """Edges of two cells."""

    skips = ("skip",)

    def __init__(self) -> None:
        names = [f"{part}.edge{i}" for part in ("normal", "reduce") for i in range(3)]
        super().__init__([Choice(name, ("conv", "skip", "pool"), ordered=False) for name in names], {})

    def part(self, name: str) -> str:
        return name.partition(".")[0]


SURE = {"normal.edge0": 2.0, "normal.edge1": 1.0, "normal.edge2": 3.0, "reduce.edge0": 5.0, "reduce.edge1": -1.0,
        "reduce.edge2": 4.0}  # fmt: skip


def skipping(of: SearchSpace) -> Alpha:
    """The logit of skip is as in SURE, between those of conv (0) and pool (0.5, which is also where reduce.edge1 ends)."""
    alpha = alphas(of, std=0.0)
    with torch.no_grad():
        for name, logit in SURE.items():
            row(alpha, name).copy_(torch.tensor([0.0, logit, 0.5]))
    return alpha


def derived(found: Any) -> dict[str, str]:
    """"s", "p" and "c" for the edges of each cell."""
    words = "".join(option[0] for option in found.values())
    return {"normal": words[:3], "reduce": words[3:]}


@pytest.mark.parametrize(("limit", "normal", "reduce"), [
    (None, "sss", "sps"), (3, "sss", "sps"), (2, "sps", "sps"), (1, "pps", "spp"), (0, "ppp", "ppp"),
])
def test_skips_beyond_the_limit_go_where_they_are_least_sure(limit: int | None, normal: str, reduce: str) -> None:
    alpha = skipping(Cell())
    before = alpha.probabilities()
    assert derived(alpha.architecture(limit)) == {"normal": normal, "reduce": reduce}
    assert alpha.probabilities() == before and alpha.architecture(skip_limit=limit) == alpha.architecture(limit)


def test_a_space_without_parts_has_one_limit() -> None:
    class Whole(Cell):
        def part(self, name: str) -> str:
            return ""

    assert derived(skipping(Whole()).architecture(2)) == {"normal": "ppp", "reduce": "sps"}


def test_what_allows_only_skips_keeps_them() -> None:
    of = Cell().restrict({"normal.edge0": ["skip"], "normal.edge1": ["skip"], "reduce.edge0": ["conv", "skip"]})
    alpha = skipping(of)
    assert derived(alpha.architecture(2)) == {"normal": "ssp", "reduce": "sps"}  # the fixed two count, and stay
    assert derived(alpha.architecture(0)) == {"normal": "ssp", "reduce": "cpp"}
    of.check(alpha.architecture(0))


def test_a_followers_skip_counts_and_goes_with_its_leader() -> None:
    same: dict[Any, str] = {option: option for option in ("conv", "skip", "pool")}
    alpha = skipping(Cell().tie("normal.edge0", "normal.edge2", same))
    assert derived(alpha.architecture(2)) == {"normal": "sps", "reduce": "sps"}
    assert derived(alpha.architecture(1)) == {"normal": "ppp", "reduce": "spp"}


def test_a_derivation_that_insists_comes_to_an_end() -> None:
    class Stubborn(Cell):
        def derive(self, probabilities: Any) -> Any:
            return {choice.name: "skip" for choice in self.choices}

    assert derived(skipping(Stubborn()).architecture(1)) == {"normal": "sss", "reduce": "sss"}


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"skip_limit = -1\. Allowed: 0 or more skips a part, or None") as error:
        skipping(Cell()).architecture(-1)
    assert "\n" not in str(error.value)
    assert alphas(space()).architecture(0) == alphas(space()).architecture()  # no skips here
