"""The two steps of TAS, (1) and (2), and the distillation (14), through the strategies' own ``update``, against the same
computed by hand in float64; and mutants of them, each of which must fail that comparison.

The net is scalar. Letters: a_j weights of the three widths, b_d of the two blocks, v and q the mixing weights,
o = x (sum_j v_j a_j) (q_1 b_1 + q_2 b_1 b_2), logits (o, 0), cross-entropy with y in {0, 1}.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy, Loss
from nas.protocols import Batch, Moment, Setup, Supernet
from nas.strategies import plain
from nas.strategies.plain import Plain
from nas.strategies.tas import TAS
from search_spaces.space import Choice, Mixture, SearchSpace, Setting
from supernets.layers import Layer, Shape

WIDTHS, DEPTHS = (1, 2, 4), (1, 2)
EPOCHS, EPOCH_STEPS, SEED = 3, 2, 11
STEPS = EPOCHS * EPOCH_STEPS
WRONG = "not what was computed by hand"
Mutation = Callable[[Any, Any], Any]


class Scalars(nn.Module):
    """The supernet of the top of this file. Cost: 2c + c^2 for each block that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.space = SearchSpace([Choice("conv.width", WIDTHS), Choice("stage.depth", DEPTHS)], {})
        self.a = nn.ParameterList([torch.tensor(value, dtype=torch.float64) for value in (0.7, -0.4, 1.1)])
        self.b = nn.ParameterList([torch.tensor(value, dtype=torch.float64) for value in (0.9, -1.3)])

    def forward(self, x: Tensor, arch: Mapping[str, Setting], drop: float = 0.0) -> Tensor:  # (B, 1) -> (B, 2)
        width, depth = arch["conv.width"], arch["stage.depth"]
        assert isinstance(width, Mixture) and isinstance(depth, Mixture)
        f = sum(v * self.a[WIDTHS.index(c)] for c, v in zip(width.options, width.weights))  # type: ignore[arg-type]
        taps = {1: self.b[0], 2: self.b[0] * self.b[1]}
        o = x[:, 0] * f * sum(q * taps[d] for d, q in zip(depth.options, depth.weights))  # type: ignore[index]
        return torch.stack([o, torch.zeros_like(o)], dim=1)

    def layers(self, input_size: tuple[int, int], view: str = "derived") -> list[Layer]:
        return [
            Layer("conv", "conv", ("conv.width",), lambda c: Shape(2, c)),
            Layer("block0", "conv", ("conv.width",), lambda c: Shape(c, c)),
            Layer("block1", "conv", ("conv.width", "stage.depth"), lambda c, d: Shape(c, c) if d > 1 else None),
        ]

    def owned(self, choice: str, option: Any = None) -> list[nn.Parameter]:
        return []

    def sort_channels(self, trained: SearchSpace | None = None) -> list[Any]:
        return []

    def reset(self, generator: torch.Generator) -> None:
        """The published numbers of this file are the weights."""


def batches(split: str) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1 if split == "train" else 2)
    while True:
        x = torch.randn(4, 1, generator=generator, dtype=torch.float64)
        yield Batch(x, torch.randint(2, (4,), generator=generator), torch.arange(4))


class Draws:
    def __init__(self) -> None:
        self.streams = {split: batches(split) for split in ("train", "valid")}

    def __call__(self, split: str, size: int | None = None, odds: Any = None) -> Batch:
        return next(self.streams[split])


STARTS = {  # alpha, beta, target: the arg-max net costs 24, 12, 24
    "too big": ([0.1, -0.2, 0.3], [0.2, 0.1], 20),
    "too small": ([0.1, 0.4, 0.3], [-0.2, 0.1], 20),
    "inside": ([0.1, -0.2, 0.3], [0.2, 0.1], 24.5),
}


# -- by hand ------------------------------------------------------------------------------------------------------------


class Hand:
    """Every line is an equation; no autograd, no optimizer, none of the code under test."""

    lr, mu, wd, lr_A, wd_A, b1, b2, lambda_cost, t = 0.1, 0.9, 5e-4, 1e-3, 1e-3, 0.5, 0.999, 2.0, 0.05

    def __init__(self, alpha: list[float], beta: list[float], R: float) -> None:
        double = torch.float64
        self.w = torch.tensor([0.7, -0.4, 1.1, 0.9, -1.3], dtype=double)  # a_1 a_2 a_3 b_1 b_2
        self.A, self.R = torch.tensor([*alpha, *beta], dtype=double), R
        self.buffer: Tensor | None = None
        self.m, self.s = torch.zeros(5, dtype=double), torch.zeros(5, dtype=double)

    def sample(self, tau: float, noise: torch.Generator) -> tuple[list[int], Tensor, Tensor]:
        """(3)-(5): the two positions, v and q."""
        alpha, beta = self.A[:3], self.A[3:]
        g = -torch.empty(1, 3, dtype=torch.float64).exponential_(generator=noise)[0].log()
        u = (alpha - alpha.exp().sum().log() + g) / tau
        p = u.exp() / u.exp().sum()
        at = sorted(torch.multinomial(p[None] + 1e-7, 2, generator=noise)[0].tolist())
        v = p[at] / p[at].sum()
        g = -torch.empty(1, 2, dtype=torch.float64).exponential_(generator=noise)[0].log()
        r = (beta - beta.exp().sum().log() + g) / tau
        return at, v, r.exp() / r.exp().sum()

    def forward(self, batch: Batch, at: list[int], v: Tensor, q: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        """Loss; dL/d(a, b); dL/dv; dL/dq."""
        a, (b1, b2), x = self.w[:3], self.w[3:], batch.x[:, 0]
        f, D = (v * a[at]).sum(), q[0] * b1 + q[1] * b1 * b2
        sigma = 1 / (1 + (-x * f * D).exp())
        hit = (batch.y == 0).double()
        L = -(hit * sigma.log() + (1 - hit) * (1 - sigma).log()).mean()
        G = ((sigma - hit) * x).mean()  # dL/do x, o = x f D
        dw = torch.zeros(5, dtype=torch.float64)
        dw[at] = G * D * v
        dw[3], dw[4] = G * f * (q[0] + q[1] * b2), G * f * q[1] * b1
        return L.item(), dw, G * D * a[at], G * f * torch.stack([b1, b1 * b2])

    def cost(self) -> tuple[float, Tensor, float]:
        """(10)-(13): E, d log E / dA; and F of the arg-max net."""
        p, q = self.A[:3].exp() / self.A[:3].exp().sum(), self.A[3:].exp() / self.A[3:].exp().sum()
        c = torch.tensor(WIDTHS, dtype=torch.float64)
        dp, dq = 2 * c + c**2 * (1 + q[1]), torch.stack([torch.zeros(()).double(), (p * c**2).sum()])
        E = (p * (2 * c + c**2 * (1 + q[1]))).sum()
        dA = torch.cat([p * (dp - (p * dp).sum()), q * (dq - (q * dq).sum())])
        k, d = WIDTHS[int(self.A[:3].argmax())], DEPTHS[int(self.A[3:].argmax())]
        return E.item(), dA / E, 2 * k + k**2 * d

    def step(self, step: int, train: Batch, valid: Batch) -> dict[str, float]:
        epoch = step // EPOCH_STEPS
        tau = 10.0 + (0.1 - 10.0) * epoch / (EPOCHS - 1)
        rate = self.lr * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        noise = moment(step, STEPS, EPOCH_STEPS, SEED).noise
        L_train, dw, _, _ = self.forward(train, *self.sample(tau, noise))
        d = dw + self.wd * self.w
        self.buffer = d if self.buffer is None else self.mu * self.buffer + d
        self.w = self.w - rate * (d + self.mu * self.buffer)  # (1), Nesterov

        at, v, q = self.sample(tau, noise)
        L_valid, _, dv, dq = self.forward(valid, at, v, q)
        E, dlogE, F = self.cost()
        dA = torch.zeros(5, dtype=torch.float64)
        dA[at] = v * (dv - (v * dv).sum()) / tau  # log softmax adds the same to every u: it drops out of v
        dA[3:] = q * (dq - (q * dq).sum()) / tau
        too_big, too_small = (1 + self.t) * self.R < F, (1 - self.t) * self.R > F
        g = dA + self.lambda_cost * (too_big - too_small) * dlogE + self.wd_A * self.A
        n = step + 1
        self.m, self.s = self.b1 * self.m + (1 - self.b1) * g, self.b2 * self.s + (1 - self.b2) * g**2
        root = (self.s / (1 - self.b2**n)).sqrt() + 1e-8
        self.A = self.A - self.lr_A * self.m / (1 - self.b1**n) / root  # (2), Adam
        return {"train/loss": L_train, "valid/loss": L_valid, "cost/expected": E, "cost/current": F,
                "alpha/temperature": tau, "train/lr": rate, "cost/target": self.R}  # fmt: skip


def check(mutate: Mutation = lambda strategy, draw: draw) -> None:
    """Six steps in three epochs from each start. AssertionError, saying WRONG, where anything differs."""
    for alpha, beta, R in STARTS.values():
        net, hand = Scalars(), Hand(alpha, beta, R)
        strategy = TAS(target=R)
        strategy.start(Setup(net, net.space, CostTable(net, (1, 1)), CrossEntropy(), None, STEPS, EPOCH_STEPS, 8))
        strategy.alpha.double()
        with torch.no_grad():
            strategy.alpha.logits["3"].copy_(torch.tensor([alpha]))
            strategy.alpha.logits["2"].copy_(torch.tensor([beta]))
            hand.A = torch.cat([strategy.alpha.logits["3"][0], strategy.alpha.logits["2"][0]]).clone()
        draw, twin = mutate(strategy, Draws()), Draws()
        for step in range(STEPS):
            metrics = strategy.update(draw, moment(step, STEPS, EPOCH_STEPS, SEED))
            expected = hand.step(step, twin("train"), twin("valid"))
            found = {tag: float(metrics[tag]) for tag in expected}
            assert found == pytest.approx(expected, rel=1e-10, abs=1e-12), WRONG
            w = torch.stack([*net.a, *net.b]).detach()
            A = torch.cat([strategy.alpha.logits["3"][0], strategy.alpha.logits["2"][0]]).detach()
            assert w.tolist() == pytest.approx(hand.w.tolist(), rel=1e-10, abs=1e-12), WRONG
            assert A.tolist() == pytest.approx(hand.A.tolist(), rel=1e-10, abs=1e-12), WRONG


def test_the_scalar_net_is_a_supernet() -> None:
    assert isinstance(Scalars(), Supernet)


def test_six_steps_by_hand() -> None:
    check()


# -- mutants of TAS -----------------------------------------------------------------------------------------------------


def flipped_cost(strategy: Any, draw: Any) -> Any:
    of = strategy.cost_loss
    strategy.cost_loss = lambda: (-of()[0], *of()[1:])
    return draw


def no_cost(strategy: Any, draw: Any) -> Any:
    strategy.cost_weight = 0.0
    return draw


def weight_step_reaches_alphas(strategy: Any, draw: Any) -> Any:
    """S1 keeps its graph and the backward names no inputs, so dL_train/dA is added to the alphas' gradient."""
    sample = strategy.sample

    def with_graph(tau: float, now: Moment) -> Any:
        with torch.enable_grad():
            return sample(tau, now)

    strategy.sample = with_graph
    strategy.w.add = lambda loss, *also: loss.backward()
    return draw


def alpha_step_reaches_weights(strategy: Any, draw: Any) -> Any:
    strategy.w.frozen = nullcontext
    strategy.a.add = lambda loss, *also: loss.backward()
    return draw


def swapped_splits(strategy: Any, draw: Any) -> Any:
    return lambda split, size=None, odds=None: draw({"train": "valid", "valid": "train"}[split])


def one_sample_for_both(strategy: Any, draw: Any) -> Any:
    sample, kept = strategy.sample, {}

    def once(tau: float, now: Moment) -> Any:
        if now.step not in kept:
            with torch.enable_grad():
                kept[now.step] = sample(tau, now)
        return kept[now.step]

    strategy.sample = once
    return draw


def detached_mixing(strategy: Any, draw: Any) -> Any:
    sample = strategy.sample
    strategy.sample = lambda tau, now: {k: s._replace(weights=s.weights.detach()) for k, s in sample(tau, now).items()}
    return draw


def unnormalised_pair(strategy: Any, draw: Any) -> Any:
    sample = strategy.sample
    strategy.sample = lambda tau, now: {k: s._replace(weights=0.9 * s.weights) for k, s in sample(tau, now).items()}
    return draw


def frozen_temperature(strategy: Any, draw: Any) -> Any:
    strategy.tau = lambda now: 10.0
    return draw


def plain_momentum(strategy: Any, draw: Any) -> Any:
    strategy.w.optimizer.param_groups[0]["nesterov"] = False
    return draw


def unsampled_widths_rest(strategy: Any, draw: Any) -> Any:
    strategy.w.idle = "skip"
    return draw


def no_decay_of_alphas(strategy: Any, draw: Any) -> Any:
    strategy.a.optimizer.param_groups[0]["weight_decay"] = 0.0
    return draw


def constant_rate(strategy: Any, draw: Any) -> Any:
    strategy.w.schedule = lambda step: 1.0
    return draw


MUTANTS: list[Mutation] = [
    flipped_cost, no_cost, weight_step_reaches_alphas, alpha_step_reaches_weights, swapped_splits, one_sample_for_both,
    detached_mixing, unnormalised_pair, frozen_temperature, plain_momentum, unsampled_widths_rest, no_decay_of_alphas,
    constant_rate,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_mutant_fails(mutant: Mutation) -> None:
    with pytest.raises(AssertionError, match=WRONG):
        check(mutant)


# -- distillation -------------------------------------------------------------------------------------------------------


def check_taught(lam: float = 0.9, T: float = 4.0) -> None:
    """(14): three steps of a linear net, z = W x, taught by another, with dL/dz by hand."""
    generator = torch.Generator().manual_seed(3)
    net, teacher = (nn.Linear(2, 3, bias=False).double() for _ in range(2))
    W, V = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64).unbind(0)
    with torch.no_grad():
        net.weight.copy_(W)
        teacher.weight.copy_(V)
    strategy = Plain(lam=lam, T=T)
    strategy.start(Setup(net, None, None, CrossEntropy(), teacher.eval(), 3, 1, 5))
    buffer = torch.zeros_like(W)
    for step in range(3):
        x = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (5,), generator=generator)
        metrics = strategy.update(lambda *_, x=x, y=y, **__: Batch(x, y, y), moment(step, 3, 1, SEED))
        z, z_teacher = x @ W.T, x @ V.T
        p, s, t = (torch.softmax(logits, 1) for logits in (z, z / T, z_teacher / T))
        onehot = torch.eye(3, dtype=torch.float64)[y]
        L = (1 - lam) * -(onehot * p.log()).sum() / 5 + lam * T**2 * (t * (t.log() - s.log())).sum() / 5
        dz = (1 - lam) * (p - onehot) / 5 + lam * T * (s - t) / 5  # d/dz of T^2 KL is T (s - t)
        d = dz.T @ x + 5e-4 * W
        buffer = d if step == 0 else 0.9 * buffer + d
        W = W - 0.1 * (1 + math.cos(math.pi * step / 3)) / 2 * (d + 0.9 * buffer)
        assert float(metrics["train/loss"]) == pytest.approx(L.item(), rel=1e-12), WRONG
        assert net.weight.flatten().tolist() == pytest.approx(W.flatten().tolist(), rel=1e-12), WRONG
    assert torch.equal(teacher.weight, V) and teacher.weight.grad is None


@pytest.mark.parametrize("lam, T", [(0.9, 4.0), (0.3, 1.0), (0.0, 2.0), (1.0, 2.0)])
def test_distillation_by_hand(lam: float, T: float) -> None:
    check_taught(lam, T)


def swapped_kl(student: Tensor, teacher: Tensor, y: Tensor, lam: float, T: float, loss: Loss) -> Tensor:
    """As the paper prints it; its author confirmed a typo."""
    one, other = log_softmax(teacher.detach() / T, 1), log_softmax(student / T, 1)
    return (1 - lam) * loss(student, y) + lam * T**2 * kl_div(one, other, reduction="batchmean", log_target=True)


def test_swapped_kl_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "distillation", swapped_kl)
    with pytest.raises(AssertionError, match=WRONG):
        check_taught()


@pytest.mark.parametrize("given", ["lam", "T", "square"])
def test_wrong_shares_fail(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = plain.distillation

    def wrong(student: Tensor, teacher: Tensor, y: Tensor, lam: float, T: float, loss: Loss) -> Tensor:
        if given == "square":  # T instead of T^2
            return (1 - lam) * loss(student, y) + (right(student, teacher, y, lam, T, loss) - (1 - lam) * loss(student, y)) / T
        return right(student, teacher, y, 1 - lam if given == "lam" else lam, 1 / T if given == "T" else T, loss)

    monkeypatch.setattr(plain, "distillation", wrong)
    with pytest.raises(AssertionError, match=WRONG):
        check_taught()
