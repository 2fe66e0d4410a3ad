"""Weights from logits: sparsemax against its definition, elu + 1, and how Alpha reads them."""
from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nas.alpha import Alpha
from nas.simplex import concentration, dirichlet_mean, sparsemax
from search_spaces.space import Choice, Mixture, SearchSpace

INF = math.inf


def projected(z: Tensor) -> Tensor:
    """argmin over the simplex of ||p - z||^2, by the KKT conditions of every support: p = z - t on S, p > 0 there, and
    z <= t elsewhere."""
    found = []
    for size in range(1, len(z) + 1):
        for S in itertools.combinations(range(len(z)), size):
            t = (sum(float(z[i]) for i in S) - 1) / size
            if all(z[i] > t for i in S) and all(z[i] <= t for i in range(len(z)) if i not in S):
                found.append(torch.tensor([float(z[i]) - t if i in S else 0.0 for i in range(len(z))], dtype=torch.float64))
    assert len(found) == 1  # a projection on a convex set is one point
    return found[0]


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 5.0])
def test_sparsemax_is_the_projection_on_the_simplex(scale: float) -> None:
    z = scale * torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    p = sparsemax(z)
    assert torch.allclose(p, torch.stack([projected(row) for row in z]), rtol=0, atol=1e-14)
    assert torch.allclose(p.sum(1), torch.ones(40).double(), rtol=0, atol=1e-14) and bool((p >= 0).all())
    sizes = (p > 0).sum(1)
    assert scale > 0.1 or bool((sizes == 5).all())
    assert scale < 0.3 or sizes.unique().numel() > 1  # supports of several sizes were met
    others = torch.distributions.Dirichlet(torch.ones(5).double()).sample((400,))
    assert bool((((others[None] - z[:, None]) ** 2).sum(2) >= ((p - z) ** 2).sum(1, keepdim=True) - 1e-12).all())


def test_sparsemax_by_hand_and_at_its_edges() -> None:
    for row, p in [
        ((0.1, 0.2, 0.3), (0.7 / 3, 1 / 3, 1.3 / 3)), ((2.0, 1.0, 0.0), (1.0, 0.0, 0.0)), ((2.0, 1.5, 0.0), (0.75, 0.25, 0.0)),
        ((7.0, 7.0, 7.0), (1 / 3, 1 / 3, 1 / 3)), ((1e9, -1e9, 0.0), (1.0, 0.0, 0.0)),
        ((0.5, -INF, 0.1), (0.7, 0.0, 0.3)), ((-INF, -3.0, -INF), (0.0, 1.0, 0.0)),
    ]:  # fmt: skip
        found = sparsemax(torch.tensor(row, dtype=torch.float64))
        assert found.tolist() == pytest.approx(p, abs=1e-15)
    z = torch.randn(3, 4, 2, dtype=torch.float64)
    assert torch.equal(sparsemax(z, dim=1), sparsemax(z.transpose(1, 2)).transpose(1, 2))
    assert torch.allclose(sparsemax(z + 3.0), sparsemax(z), rtol=0, atol=1e-13)  # a shift changes nothing


def test_the_gradient_of_sparsemax() -> None:
    """diag(s) - s s^T / |S|, s the support; exact by differences, as sparsemax is linear between its kinks."""
    z = torch.tensor([[0.3, 0.1, -0.9], [0.2, 0.25, 0.15], [3.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparsemax, z) and torch.autograd.gradgradcheck(sparsemax, z)
    for row in z.detach():
        s = (sparsemax(row) > 0).double()
        J = torch.autograd.functional.jacobian(sparsemax, row)
        assert torch.allclose(J, s.diag() - s[:, None] * s / s.sum(), rtol=0, atol=1e-14)
    hidden = torch.tensor([0.3, -INF, 0.1], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(sparsemax(hidden)[0], hidden)
    assert g.tolist() == [0.5, 0.0, -0.5]


def test_concentration_is_elu_plus_one() -> None:
    a = torch.tensor([-3.0, -0.2, 0.0, 0.4, 2.0], dtype=torch.float64, requires_grad=True)
    c, expected = concentration(a), torch.nn.functional.elu(a) + 1
    assert torch.allclose(c, expected, rtol=1e-15, atol=0)
    slope, other = (torch.autograd.grad(y.sum(), a)[0] for y in (c, expected))
    assert torch.allclose(slope, other, rtol=1e-14, atol=0) and slope[2].item() == 1.0
    assert concentration(torch.tensor(-60.0)).item() == pytest.approx(math.exp(-60), rel=1e-5)  # elu + 1 has rounded to 0
    assert concentration(torch.tensor(-INF)).item() == 0.0
    assert torch.allclose(dirichlet_mean(-a.exp()), torch.softmax(-a.exp(), 0), rtol=1e-14, atol=0)
    assert dirichlet_mean(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([2 / 6, 4 / 6])


def alphas(rows: list[list[float]], **restriction: list[str]) -> Alpha:
    names = "abc"[: len(rows)]
    space = SearchSpace([Choice(name, ("x", "y", "z"), ordered=False) for name in names], {})
    alpha = Alpha(space.restrict(restriction) if restriction else space).double()
    with torch.no_grad():
        alpha.logits["3"].copy_(torch.tensor(rows))
    return alpha


def weights(alpha: Alpha, name: str, how: str, **given: float) -> list[float]:
    setting = getattr(alpha, how)(**given)[name]
    assert isinstance(setting, Mixture)
    return setting.weights.tolist()


def test_alpha_reads_sparsemax() -> None:
    alpha = alphas([[0.3, -0.2, 0.1], [-0.4, 2.0, 0.0], [9.0, 0.5, 0.1]], c=["y", "z"])
    assert weights(alpha, "a", "sparsemax") == pytest.approx([1.7 / 3, 0.2 / 3, 1.1 / 3])
    assert weights(alpha, "a", "sparsemax", tau=0.5) == pytest.approx([0.7, 0.0, 0.3])
    assert weights(alpha, "b", "sparsemax") == [0.0, 1.0, 0.0]
    assert weights(alpha, "c", "sparsemax") == pytest.approx([0.0, 0.7, 0.3])  # x is forbidden, however large
    mixture = alpha.sparsemax()["c"]
    assert isinstance(mixture, Mixture) and mixture.active == (1, 2)
    assert alpha.sparsemax(names=["b"]).keys() == {"b"}


def test_probabilities_by_each_reading_keep_the_order_of_alpha() -> None:
    alpha = alphas([[0.3, -0.2, 0.1], [-0.4, 5.0, 0.0], [9.0, 0.5, 3.1]], c=["y", "z"])
    for by, how in (("softmax", "soft"), ("sparsemax", "sparsemax"), ("dirichlet", "dirichlet")):
        p = alpha.probabilities(by)
        for name, row in p.items():
            given = {"noise": None} if how == "dirichlet" else {}
            assert row == pytest.approx(weights(alpha, name, how, **given), abs=1e-6)  # type: ignore[arg-type]
            assert sum(row) == pytest.approx(1.0, abs=1e-12)
        assert p["b"][1] > p["b"][2] > p["b"][0] > 0 and p["c"][2] > p["c"][1] > p["c"][0] == 0.0
        assert alpha.architecture(probabilities=p) == {"a": "x", "b": "y", "c": "z"}
    assert alpha.probabilities() == alpha.probabilities("softmax")
