"""TangleNAS through ``update`` on whole supernets whose weights are superposed, two iterations in float64 by hand: networks
whose every weight is the literal sum of its candidates' zero-padded slices, autograd, steps of Adam and SGD written out.

Letters: t the weights of the options of each choice; a the logits; W the weights, by their names in the supernet.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.bilevel import Alphas, Weights
from nas.cost import CostTable
from nas.engine import moment
from nas.losses import CrossEntropy
from nas.protocols import Batch, Setup
from nas.simplex import dirichlet
from nas.strategies.tangle import Tangle
from search_spaces.macro import ConvMacro as MacroSpace
from search_spaces.vit import ViT as VisionSpace
from supernets.macro import ConvMacro
from supernets.vit import ViT

STEPS, SEED, CLIP = 2, 5, 0.3
RATES = (0.1, 0.06)  # half a cosine from 0.1 to 0.02 in two epochs of one step
WEIGHTS = Weights(lr=0.1, lr_min=0.02, momentum=0.9, weight_decay=0.05, clip=CLIP)
ALPHAS = Alphas(lr=0.1, betas=(0.5, 0.999), weight_decay=0.02)
Named = Mapping[str, Tensor]
Network = Callable[[Any, Named, Named, Tensor], Tensor]


def padded(p: Tensor, *sizes: int) -> Tensor:
    """The first ``sizes`` of ``p``, zero beyond."""
    at = tuple(map(slice, sizes))
    return F.pad(p[at], [n for whole, own in zip(p.shape[::-1], p[at].shape[::-1]) for n in (0, whole - own)])


def total(terms: Any) -> Tensor:
    return torch.stack(list(terms)).sum(0)


def options(space: Any, t: Named, name: str) -> list[tuple[Tensor, Any]]:
    return list(zip(t[name], space[name].options))


# -- conv-macro ---------------------------------------------------------------------------------------------------------


def macro(space: Any, W: Named, t: Named, x: Tensor) -> Tensor:
    """Logits of the chain, one candidate of each convolution after another: a_i b_j c_n pad0(W[:o_i, :i_j, window n])."""
    one, image = torch.ones(()).double(), [(torch.ones(()).double(), x.shape[1])]
    widths = [image, *(options(space, t, f"c{i}") for i in (1, 2, 3, 4)), [(one, space.features)]]
    for i, (into, out) in enumerate(itertools.pairwise(widths), 1):
        weight, bias = W[f"conv{i}.weight"], W[f"conv{i}.bias"]
        full = weight.shape[-1]
        kernels = options(space, t, f"k{i}") if i < 5 else [(one, 7)]
        terms = []
        for (a, o), (b, q), (c, k) in itertools.product(out, into, kernels):
            s = (full - k) // 2
            window = F.pad(weight[..., s : s + k, s : s + k], (s, s, s, s))
            terms.append(a * b * c * padded(window, o, q))
        shift = total(a * padded(bias, o) for a, o in out)
        x = F.conv2d(x, total(terms), shift, padding=full // 2 if i < 5 else 2)
        x = x if i == 5 else F.relu(x)
        x = F.max_pool2d(x, 2) if i in (2, 3) else x
    x = F.relu(F.linear(x.flatten(1), W["hidden.0.weight"], W["hidden.0.bias"]))
    return F.linear(x, W["classifier.weight"], W["classifier.bias"])


# -- vision transformers ------------------------------------------------------------------------------------------------


def vision(space: Any, W: Named, t: Named, x: Tensor) -> Tensor:
    """Logits, every sum over candidates a loop; the depths are the sum of what each of them ends with."""
    embed = options(space, t, "embed")
    tokens = F.conv2d(x, total(v * padded(W["patches.weight"], e) for v, e in embed),
                      total(v * padded(W["patches.bias"], e) for v, e in embed), stride=space.patch)  # fmt: skip
    token = total(v * padded(W["patches.token"], e) for v, e in embed).expand(len(x), 1, -1)
    place = total(v * padded(W["patches.position"], space.tokens, e) for v, e in embed)
    z = torch.cat([token, tokens.flatten(2).transpose(1, 2)], 1) + place
    after = {}
    for i in range(space.blocks):
        z = z + attention(space, W, t, i, normed(W, f"blocks.{i}.norm0", embed, z))
        z = z + mlp(space, W, t, i, normed(W, f"blocks.{i}.norm1", embed, z))
        after[i + 1] = z
    z = total(v * after[d] for v, d in options(space, t, "depth"))
    z = normed(W, "norm", embed, z)[:, 1:].mean(1)
    return F.linear(z, total(v * padded(W["classifier.weight"], len(W["classifier.bias"]), e) for v, e in embed),
                    W["classifier.bias"])  # fmt: skip


def normed(W: Named, name: str, embed: list[tuple[Tensor, Any]], z: Tensor) -> Tensor:
    """Every candidate normalises its own channels."""
    gamma, beta = W[f"{name}.weight"], W[f"{name}.bias"]
    return total(v * F.pad(F.layer_norm(z[..., :e], (e,), gamma[:e], beta[:e], 1e-5), (0, z.shape[-1] - e)) for v, e in embed)


def attention(space: Any, W: Named, t: Named, i: int, z: Tensor) -> Tensor:
    path, d = f"blocks.{i}.attention", space.head_dim
    embed, heads = options(space, t, "embed"), options(space, t, f"layer{i}.heads")
    pairs = [(v * w, e, n * d) for (v, e), (w, n) in itertools.product(embed, heads)]
    thirds = []
    for weight, bias in zip(W[f"{path}.qkv.weight"].chunk(3), W[f"{path}.qkv.bias"].chunk(3)):
        y = F.linear(z, total(p * padded(weight, n, e) for p, e, n in pairs), total(w * padded(bias, n * d) for w, n in heads))
        thirds.append(y.unflatten(2, (-1, d)).transpose(1, 2))
    q, k, v = thirds
    y = ((q @ k.transpose(2, 3) / d**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.linear(y, total(p * padded(W[f"{path}.proj.weight"], e, n) for p, e, n in pairs),
                    total(v * padded(W[f"{path}.proj.bias"], e) for v, e in embed))  # fmt: skip


def mlp(space: Any, W: Named, t: Named, i: int, z: Tensor) -> Tensor:
    path, embed = f"blocks.{i}.mlp", options(space, t, "embed")
    pairs = [(v * w, e, int(e * r)) for (v, e), (w, r) in itertools.product(embed, options(space, t, f"layer{i}.ratio"))]
    y = F.gelu(F.linear(z, total(p * padded(W[f"{path}.fc0.weight"], n, e) for p, e, n in pairs),
                        total(p * padded(W[f"{path}.fc0.bias"], n) for p, _, n in pairs)))  # fmt: skip
    return F.linear(y, total(p * padded(W[f"{path}.fc1.weight"], e, n) for p, e, n in pairs),
                    total(v * padded(W[f"{path}.fc1.bias"], e) for v, e in embed))  # fmt: skip


# -- the iterations -----------------------------------------------------------------------------------------------------


class Hand:
    """Alphas by Adam on a validation batch, then the weights by SGD on a training batch, at the new alphas."""

    def __init__(self, strategy: Tangle, network: Network) -> None:
        self.space, self.network, self.mixing = strategy.space, network, strategy.mixing
        self.W = {name: p.detach().clone() for name, p in strategy.net.named_parameters()}
        self.a = {K: p.detach().clone() for K, p in strategy.alpha.logits.items()}
        self.rows = {name: (str(K), i) for K, names in strategy.alpha.groups.items() for i, name in enumerate(names)}
        self.buffer = {name: torch.zeros_like(p) for name, p in self.W.items()}
        self.m, self.v = ({K: torch.zeros_like(a) for K, a in self.a.items()} for _ in range(2))

    def t(self, a: Named, noise: torch.Generator) -> dict[str, Tensor]:
        if self.mixing == "softmax":
            rows = {K: logits.exp() / logits.exp().sum(1, keepdim=True) for K, logits in a.items()}
        else:
            rows = {K: dirichlet(logits, noise) for K, logits in a.items()}
        return {name: rows[K][i] for name, (K, i) in self.rows.items()}

    def loss(self, W: Named, t: Named, batch: Batch) -> Tensor:
        z = self.network(self.space, W, t, batch.x)
        return -(z - z.logsumexp(1, keepdim=True))[torch.arange(len(z)), batch.y].mean()

    def step(self, n: int, train: Batch, valid: Batch, noise: torch.Generator) -> dict[str, float]:
        a = {K: logits.clone().requires_grad_() for K, logits in self.a.items()}
        held_out = self.loss(self.W, self.t(a, noise), valid)
        for K, G in zip(a, torch.autograd.grad(held_out, list(a.values()))):
            G = G + ALPHAS.weight_decay * self.a[K]
            b1, b2 = ALPHAS.betas
            self.m[K], self.v[K] = b1 * self.m[K] + (1 - b1) * G, b2 * self.v[K] + (1 - b2) * G**2
            root = (self.v[K] / (1 - b2 ** (n + 1))).sqrt() + 1e-8
            self.a[K] = self.a[K] - ALPHAS.lr * self.m[K] / (1 - b1 ** (n + 1)) / root
        W = {name: p.clone().requires_grad_() for name, p in self.W.items()}
        loss = self.loss(W, self.t(self.a, noise), train)
        Gs = torch.autograd.grad(loss, list(W.values()), allow_unused=True, materialize_grads=True)
        norm = float(sum(G.square().sum() for G in Gs)) ** 0.5
        assert norm > CLIP
        for name, G in zip(W, Gs):
            self.buffer[name] = 0.9 * self.buffer[name] + G * (CLIP / (norm + 1e-6)) + WEIGHTS.weight_decay * self.W[name]
            self.W[name] = self.W[name] - RATES[n] * self.buffer[name]
        return {"valid/loss": held_out.item(), "train/loss": loss.item(), "train/lr": RATES[n], "train/grad_norm": norm}


def images(net: Any, seed: int) -> Batch:
    generator, side = torch.Generator().manual_seed(seed), net.space.image
    return Batch(torch.randn(5, 2, side, side, generator=generator, dtype=torch.float64),
                 torch.randint(3, (5,), generator=generator), torch.arange(5))  # fmt: skip


def started(net: Any, mixing: str) -> Tangle:
    """Every number random: fresh biases, norms and logits are nearly alike."""
    generator = torch.Generator().manual_seed(1)
    strategy = Tangle(mixing, weights=WEIGHTS, alphas=ALPHAS)
    side = net.space.image
    strategy.start(Setup(net, net.space, CostTable(net, (side, side)), CrossEntropy(), None, STEPS, 1, 5))
    with torch.no_grad():
        for p in (*net.parameters(), *strategy.alpha.double().parameters()):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.6)
    return strategy


def check(net: Any, mixing: str, network: Network) -> None:
    """Two iterations: metrics, every weight and every logit."""
    strategy = started(net, mixing)
    hand = Hand(strategy, network)
    for n in range(STEPS):
        batches = {split: images(net, 2 * n + i) for i, split in enumerate(("train", "valid"))}
        found = strategy.update(lambda split, size=None, odds=None: batches[split], moment(n, STEPS, 1, SEED))  # noqa: B023
        expected = hand.step(n, batches["train"], batches["valid"], moment(n, STEPS, 1, SEED).noise)
        assert {tag: float(found[tag]) for tag in expected} == pytest.approx(expected, rel=1e-10)
    before = started(type(net)(net.space, 2, 3).double(), mixing)
    moved = 0.0
    for name, p in strategy.net.named_parameters():
        assert (p - hand.W[name]).abs().max() <= 1e-10, name
        moved = max(moved, float((p - before.net.get_parameter(name)).abs().max().detach()))
    for K, logits in strategy.alpha.logits.items():
        assert (logits - hand.a[K]).abs().max() <= 1e-10, K
        assert (logits - before.alpha.logits[K]).abs().min() > 1e-3  # every option learns
    assert moved > 1e-3


@pytest.mark.parametrize("mixing", ["softmax", "dirichlet"])
def test_two_iterations_on_conv_macro(mixing: str) -> None:
    space = MacroSpace(((2, 3), (2, 4), (2, 3, 5), (3, 4)), (3, 5, 7), features=3, hidden=(4,), image=12)
    check(ConvMacro(space, channels=2, classes=3).double(), mixing, macro)


@pytest.mark.parametrize("mixing", ["softmax", "dirichlet"])
def test_two_iterations_on_vision_transformers(mixing: str) -> None:
    space = VisionSpace((4, 6, 7), (1, 2), (1, 2), (1, 1.5, 2), head_dim=2, patch=4, image=8, relative_position=False)
    check(ViT(space, channels=2, classes=3).double(), mixing, vision)


def test_outputs_masked_alone_are_another_search() -> None:
    """The reference weighs both sides, so a supernet that weighs one fails."""
    space = VisionSpace((4, 6), (1, 2), (1, 2), (1, 2), head_dim=2, patch=4, image=8, relative_position=False)
    for net, network in ((ViT(space, channels=2, classes=3, both_sides=False), vision),
                         (ConvMacro(MacroSpace(((2, 3),) * 4, (3,), 3, (4,), 12), 2, 3, both_sides=False), macro)):
        with pytest.raises(AssertionError):
            check(net.double(), "softmax", network)
