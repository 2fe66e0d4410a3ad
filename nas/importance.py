"""What is drawn more often because it moves the weights more: options of a path, and images (PA&DA, CVPR 2023, arXiv
2302.14772; shared page pada.md, section 2, whose numbers stand in the code).

Letters: ``n`` options of a choice, ``N`` images, ``B`` batch, ``tau`` how far a distribution has left the uniform one, 0 to 1.
"""
from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nas import ranks
from nas.losses import Loss
from nas.protocols import Supernet
from search_spaces.space import Arch, SearchSpace, Value

TRIES = 64  # draws of a path before one is chosen among lawful ones
POOL = 256  # of these


def tempered(scores: Tensor, tau: float) -> Tensor:
    """(9), (11): tau scores / sum(scores) + (1 - tau) / n, (n,) float64; uniform where the scores are all 0."""
    scores = scores.to(torch.float64)
    total, n = scores.sum(), len(scores)
    share = torch.where(total > 0, scores / total.where(total > 0, torch.ones_like(total)), torch.full_like(scores, 1 / n))
    return tau * share + (1 - tau) / n


def floored(p: Tensor, floor: float) -> Tensor:
    """floor + (1 - n floor) p: a distribution no entry of which is below ``floor``."""
    return floor + (1 - len(p) * floor) * p


def image_scores(z: Tensor, y: Tensor) -> Tensor:
    """(3): s_i = || softmax(z_i) - onehot(y_i) ||_2, (B,): the norm of the gradient of an image's cross-entropy in its logits.

    ``z`` (B, classes), or (M B, classes) of M passes over the head, whose mean it is; ``y`` (B,), or (B, classes) soft.
    """
    target = y if y.ndim == 2 else F.one_hot(y, z.shape[1]).to(z.dtype)
    distance = F.softmax(z.detach(), 1) - target.repeat(len(z) // len(y), 1)
    return torch.linalg.vector_norm(distance, dim=1).view(-1, len(y)).mean(0)


def one_by_one(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    """``loss`` of every image alone, (B,); of M passes over the head, (M B,)."""
    y = y.repeat(len(z) // len(y), *(1,) * (y.ndim - 1))
    return torch.vmap(lambda a, b: loss(a.unsqueeze(0), b.unsqueeze(0)))(z, y)


def running(index: Tensor, values: Tensor, scores: Tensor) -> Tensor:
    """(10): ``scores`` (N,) after an epoch that met the images ``index`` (E,) with ``values`` (E,), in this order. The first
    time s_i is the value, each further time s_i <- (s_i + value) / 2. Images that were not met keep their scores."""
    scores = scores.clone()
    order = index.argsort(stable=True)
    index, values = index[order], values[order].to(scores.dtype)
    at = torch.arange(len(index), device=index.device)
    first = torch.cat([torch.ones_like(index[:1], dtype=torch.bool), index[1:] != index[:-1]])
    times = at - torch.cummax(torch.where(first, at, torch.zeros_like(at)), 0).values  # how often it was met before
    order = times.argsort(stable=True)
    start = 0
    for k, count in enumerate(torch.bincount(times).tolist()):  # each image once a round
        mine = order[start : start + count]
        i, value = index[mine], values[mine]
        scores[i] = value if k == 0 else (scores[i] + value) / 2
        start += count
    return scores


@dataclass
class Importance:
    """Images in proportion to their gradients, for strategies beside PA&DA. ``reweight``: losses times 1 / (N q_i), which makes
    the estimate of the gradient unbiased; the released code has no such factor. ``carry``: an image that an epoch did not meet
    keeps its last score (published: 0)."""

    reweight: bool = False
    carry: bool = False


class ImageImportance:
    """q, the distribution over the train split's N images that the next epoch is drawn from. ``options`` None: nothing is
    noted, and every epoch has each image once.

    ``odds``: what ``Draw`` takes: None in the first epoch, in which every image comes once; then q (N,), float64 on the host.
    """

    def __init__(self, images: int, options: Importance | None, device: torch.device) -> None:
        self.images, self.options = images, options
        self.scores = torch.zeros(images if options else 0, dtype=torch.float64, device=device)  # s
        self.met: list[Tensor] = []  # of this epoch, a step an entry: (2, B), positions and values
        self.odds: Tensor | None = None
        self.q = self.scores  # the odds where the scores are

    def loss(self, loss: Loss, z: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """``loss(z, y)``, its images weighted by 1 / (N q_i) where that is asked."""
        if self.options is None or not self.options.reweight or self.odds is None:
            return loss(z, y)
        weights = 1 / (self.images * self.q[index])
        return (one_by_one(loss, z, y) * weights.repeat(len(z) // len(y)).to(z)).mean()

    def see(self, index: Tensor, z: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Notes the scores (3) of this rank's batch, of the images at ``index`` (B,). To report: their mean."""
        if self.options is None:
            return {}
        scores = image_scores(z, y)
        self.met.append(ranks.gather(torch.stack([index.to(torch.float64), scores.to(torch.float64)])))
        return {"importance/image": scores.mean()}

    def turn(self, tau: float) -> None:
        """The end of an epoch: (10), (11), and for (12) the odds of the next one."""
        if self.options is None:
            return
        met = torch.cat(self.met, dim=1)
        before = self.scores if self.options.carry else torch.zeros_like(self.scores)
        index = met[0].long()
        self.scores = running(index, met[1], before)
        if self.options.carry and self.odds is None:  # the first epoch leaves out what fills no batch
            unmet = torch.ones_like(self.scores, dtype=torch.bool)
            unmet[index] = False
            self.scores[unmet] = met[1].mean()
        self.q = tempered(self.scores, tau)
        self.odds, self.met = self.q.cpu(), []

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "met": list(self.met), "odds": self.odds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is taken over by what notes nothing, nor of what noted nothing (a part of a split may do otherwise than the
        whole)."""
        if self.options is None or state["scores"].shape != self.scores.shape:
            return
        device = self.scores.device
        self.scores = state["scores"].to(device)
        self.met = [met.to(device) for met in state["met"]]
        self.odds = None if state["odds"] is None else state["odds"].cpu()
        self.q = self.scores if self.odds is None else self.odds.to(device)


class Group(NamedTuple):
    """Choices that share one distribution over their ``options``, those of the root."""

    choices: tuple[str, ...]
    options: tuple[Value, ...]


class PathImportance:
    """p, from which each choice of a path is drawn, and G, the importance of its options in this epoch.

    ``space``: what is searched; ``net``: its supernet, which says what an option owns. ``shared``: choices with the same
    options have one p (published: all edges of a cell). ``floor``: the least probability of an option. Choices whose options
    own no parameters (widths, which are slices of one kernel) are drawn uniformly. ValueError where no option owns any, and
    for a floor that does not fit.
    """

    def __init__(self, space: SearchSpace, net: Supernet, shared: bool, floor: float, device: torch.device) -> None:
        self.space, self.floor = space, floor
        self.owned = {(c.name, option): list(net.owned(c.name, option)) for c in space.root.choices for option in c.options}
        own = [c for c in space.root.choices if any(self.owned[c.name, option] for option in c.options)]
        if not own:
            raise ValueError(f"path: no option of {space!r} has weights of its own, so none has a gradient of its own to be "
                             "drawn by. Allowed here: path: false, which draws images alone.")  # fmt: skip
        rng = random.Random(0)
        drawn = [] if shared else [space.root.sample(rng) for _ in range(TRIES)]
        if any(space.root.normal(arch) != arch for arch in drawn):
            raise ValueError(f"shared = false, but {space!r} runs an architecture with the weights of another that stands for "
                             "the same network, at other places than were drawn. Allowed: true, or the space's compact: false.")
        names: dict[tuple[Value, ...] | str, list[str]] = {}
        for choice in own:
            names.setdefault(choice.options if shared else choice.name, []).append(choice.name)
        self.groups = [Group(tuple(mine), space.root[mine[0]].options) for mine in names.values()]
        most = max(len(group.options) for group in self.groups)
        if not 0 <= floor <= 1 / most:
            raise ValueError(f"floor = {floor}: a choice has {most} options. Allowed: 0 to {1 / most:.4f}.")
        self.of = {name: k for k, group in enumerate(self.groups) for name in group.choices}
        self.G = [torch.zeros(len(group.options), dtype=torch.float64, device=device) for group in self.groups]
        self.p = {name: self._over(name, self.G[k].cpu(), 0.0) for name, k in self.of.items()}

    def _over(self, name: str, scores: Tensor, tau: float) -> list[float]:
        """(9) over the options that are left of a choice; 0 for the others."""
        left = [k for k, option in enumerate(self.space.root[name].options) if option in self.space[name].options]
        p = torch.zeros(len(scores), dtype=torch.float64)
        p[left] = floored(tempered(scores.cpu()[left], tau), self.floor)
        return p.tolist()

    def draw(self, rng: random.Random) -> Arch:
        """(1): every choice by itself, and anew where the space would not sample what came out (a dead cell). Where that is
        rare, one of ``POOL`` paths that it would, in proportion to the product of p."""
        for _ in range(TRIES):
            arch = self._free(rng)
            if self.space.lawful(self.space.encode([arch]))[0]:
                return arch
        pool = self.space.decode(self.space.random_codes(np.random.default_rng(rng.getrandbits(64)), POOL))
        logs = np.array([sum(np.log(max(self._chance(name, arch[name]), 1e-300)) for name in self.of) for arch in pool])
        return rng.choices(pool, np.exp(logs - logs.max()).tolist())[0]

    def _free(self, rng: random.Random) -> Arch:
        arch: Arch = {}
        for choice in self.space.choices:
            odds = [self._chance(choice.name, option) for option in choice.options] if choice.name in self.of else None
            arch[choice.name] = rng.choices(choice.options, odds)[0] if len(choice.options) > 1 else choice.options[0]
        for name, (leader, values) in self.space.ties.items():
            arch[name] = values[arch[leader]]
        return self.space.canonical(arch)

    def _chance(self, name: str, option: Value) -> float:
        return self.p[name][self.space.root[name].options.index(option)]

    @torch.no_grad()
    def look(self, path: Mapping[str, Value]) -> None:
        """(7), (8), while the gradients of a step on ``path`` are there. An option's S: of each choice that carries it and owns
        weights for it, the norms of the gradients of all these (kernels and biases, by themselves), added; the mean over these
        choices."""
        path = self.space.root.normal(path)
        counts = self.space.counting(path)
        carried: dict[tuple[int, int], list[list[Tensor]]] = {}
        for name, k in self.of.items():
            owned = self.owned[name, path[name]]
            if name in counts and owned:
                mine = [p.grad for p in owned if p.grad is not None]
                carried.setdefault((k, self.groups[k].options.index(path[name])), []).append(mine)
        for (k, o), found in carried.items():
            gradients = [g for mine in found for g in mine]
            if gradients:
                S = torch.stack(_norms(gradients)).sum(dtype=torch.float64) / len(found)
                G = self.G[k][o]
                self.G[k][o] = torch.where(S != 0, (G + S) / 2, G)  # (8)

    def turn(self, tau: float) -> None:
        """The end of an epoch: (9); G begins anew."""
        self.p = {name: self._over(name, self.G[k].cpu(), tau) for name, k in self.of.items()}
        for G in self.G:
            G.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"G": list(self.G), "p": {name: list(row) for name, row in self.p.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for mine, loaded in zip(self.G, state["G"], strict=True):
            mine.copy_(loaded)
        self.p = {name: list(row) for name, row in state["p"].items()}


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each: one kernel for many of them."""
    return list(torch._foreach_norm(list(tensors)))


def importances(strategy: Any) -> tuple[PathImportance | None, ImageImportance | None]:
    """What a started strategy draws by, for pictures: of options and of images."""
    found = vars(strategy).values()
    return (next((x for x in found if isinstance(x, PathImportance)), None),
            next((x for x in found if isinstance(x, ImageImportance)), None))  # fmt: skip

