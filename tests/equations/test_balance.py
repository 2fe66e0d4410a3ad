"""nas.balance: the assignment of configurations to models and its balance (pooling-mixture.md, sections 2 and 5), and what the
configurations of a space are."""
from __future__ import annotations

import math

import pytest
import torch
from balancing import literal, uneven
from torch import Tensor

from nas.balance import TOLERANCE, Configurations, assignment, balance, divergence
from search_spaces.darts import Cells
from search_spaces.nats import Topology
from search_spaces.space import Choice, SearchSpace

DEPENDENT = [Choice("depth", (1, 2)), Choice("width", (4, 8, 16), needs=(("depth", (2,)),))]


def even(K: int) -> Tensor:
    return torch.full((K,), 1 / K, dtype=torch.float64)


def table(K: int, M: int, seed: int = 0) -> Tensor:
    return torch.rand(K, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("M", [1, 2, 4, 8])
def test_a_constant_table_shares_equally_and_keeps_no_division(M: int) -> None:
    """Page, checks 3 and 5: also at the temperature of the last epoch."""
    for T in (0.0, 1.0, 100.0):
        W = torch.ones(36, M, dtype=torch.float64)
        assert assignment(W, T).sub(1 / M).abs().max() < 1e-15
        assert balance(W, T, even(36)).divisions == [] and abs(balance(W, T, even(36)).kl) < 1e-12


@pytest.mark.parametrize(("K", "M", "T"), [(36, 4, 1.0), (36, 4, 100.0), (36, 8, 30.0), (5, 2, 300.0), (1, 3, 50.0)])
def test_balancing_a_random_table(K: int, M: int, T: float) -> None:
    """Page, check 4: rows sum to 1, all models are equally used at the end, the list of pi gives the same P again."""
    W = table(K, M)
    found = balance(W, T, even(K))
    P = assignment(W, T, found.divisions)
    assert torch.allclose(P.sum(1), torch.ones(K, dtype=torch.float64), atol=1e-12)
    assert 0 <= divergence(P.mean(0).log()) <= TOLERANCE == 1e-4 and found.divisions
    wanted, stored = literal(W.tolist(), T)
    assert len(stored) == len(found.divisions)
    assert torch.allclose(torch.tensor(found.divisions, dtype=torch.float64), torch.tensor(stored, dtype=torch.float64).log(),
                          atol=1e-9)  # fmt: skip
    assert torch.allclose(P, torch.tensor(wanted, dtype=torch.float64), atol=1e-9)
    assert found.kl == pytest.approx(uneven(assignment(W, T).mean(0).tolist()), abs=1e-12)
    for row, p in zip(W, P):
        assert torch.allclose(assignment(row, T, found.divisions), p, atol=1e-12)


def test_two_configurations_and_two_models_by_hand() -> None:
    """T = log 3, W = [[1, 0], [0, 0]]: P = [3/4 1/4; 1/2 1/2], pi = (5/8, 3/8), KL = 0.032; then P = [9/14 5/14; 3/8 5/8],
    pi = (57/112, 55/112), KL = 1.6e-4; then P = [33/52 19/52; 11/30 19/30], KL = 8e-7."""
    W, T = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64), math.log(3)
    found = balance(W, T, even(2))
    pi = [[5 / 8, 3 / 8], [57 / 112, 55 / 112]]
    assert [[math.exp(p) for p in row] for row in found.divisions] == [pytest.approx(row, abs=1e-14) for row in pi]
    assert found.kl == pytest.approx(5 / 8 * math.log(5 / 4) + 3 / 8 * math.log(3 / 4), abs=1e-14)
    P = assignment(W, T, found.divisions)
    assert P.tolist() == [pytest.approx([33 / 52, 19 / 52], abs=1e-14), pytest.approx([11 / 30, 19 / 30], abs=1e-14)]
    later = assignment(torch.tensor([0.93, 0.0], dtype=torch.float64), T, found.divisions)  # W moved on, the divisions stay
    odds = 3**0.93 * (3 / 8 * 55 / 112) / (5 / 8 * 57 / 112)
    assert later.tolist() == pytest.approx([odds / (1 + odds), 1 / (1 + odds)], abs=1e-14)


def test_what_is_drawn_more_often_weighs_more() -> None:
    W, odds = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    found = balance(W, math.log(3), odds)
    assert math.exp(found.divisions[0][0]) == pytest.approx(0.2 * 3 / 4 + 0.8 / 2, abs=1e-14)
    assert divergence((odds @ assignment(W, math.log(3), found.divisions)).log()) <= TOLERANCE


def test_a_table_that_is_no_number_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.balance.ROUNDS", 50)
    with pytest.raises(ValueError, match=r"after 50 divisions the models are not equally used .* Lower the temperature"):
        balance(torch.full((2, 2), math.nan, dtype=torch.float64), 1.0, even(2))


# -- configurations ------------------------------------------------------------------------------------------------------


def test_configurations_are_canonical_and_as_often_as_they_are_drawn() -> None:
    found = Configurations(SearchSpace(DEPENDENT, {}), ["*"])
    assert found.odds == {"depth=1,width=4": 0.5, **{f"depth=2,width={w}": 1 / 6 for w in (4, 8, 16)}}
    assert found.of({"depth": 1, "width": 16}) == "depth=1,width=4"
    assert Configurations(SearchSpace(DEPENDENT, {}), ["depth"]).odds == {"depth=1": 0.5, "depth=2": 0.5}
    deep = SearchSpace(DEPENDENT, {}).restrict({"depth": (2,)})
    assert Configurations(deep, ["width"]).odds.keys() == {"width=4", "width=8", "width=16"}
    tied = SearchSpace([Choice("a", (1, 2)), Choice("b", (3, 4))], {}).tie("b", "a", {1: 3, 2: 4})
    assert Configurations(tied, ["*"]).names == ("a",)


def test_only_what_can_be_drawn_is_a_configuration() -> None:
    """Node 1 of a NAS-Bench-201 cell has one input, node 2 two: never none on all. DARTS's node 2 has two, neither none."""
    cells = Configurations(Topology(4, 1), ["node[12].*"])
    assert len(cells.odds) == 4 * 24 and not any("node1.from0=none" in key for key in cells.odds)
    darts = Configurations(Cells(4, 3, nodes=2), ["normal.node2.*"])
    assert len(darts.odds) == 7 * 7
    part = Topology(4, 1).restrict({"node2.from0": ("none",)})
    assert Configurations(part, ["node2.*"]).odds.keys() < Configurations(Topology(4, 1), ["node2.*"]).odds.keys()


@pytest.mark.parametrize(("space", "patterns", "words"), [
    (Topology(), ["*"], r"15,625 configurations of 6 choices.*up to 4,096\. Name fewer choices, such as \[node1\.from0\]"),
    (Topology(), ["*", "edge*"], r"choices: 'edge\*' matches no choice of nats\.Topology"),
    (SearchSpace(DEPENDENT, {}), ["width"], "depth decides whether width counts. Name depth too, or leave width out"),
    (SearchSpace([Choice("a", (1, 2)), Choice("b", (3, 4))], {}).tie("b", "a", {1: 3, 2: 4}), ["b"], "Name the others"),
], ids=["many", "unknown", "dependent", "follower"])  # fmt: skip
def test_choices_that_are_refused(space: SearchSpace, patterns: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        Configurations(space, patterns)
    assert "\n" not in str(error.value)
