"""Architecture parameters: logits of every choice, read as mixtures. (Scales of channels: nas/scales.py.)

Letters: ``n`` choices with equally many options, ``K`` options, ``I`` sampled candidates. All rows of one ``K`` are one
Parameter, so a whole step's samples are drawn in one call and cross to the host once.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nas import simplex
from search_spaces.space import Arch, Mixture, SearchSpace, Setting, Value


class Alpha(nn.Module):
    """Logits for ``space``, started as N(0, std).

    Rows have the ROOT space's shape; options that ``space`` forbids are at -inf before the softmax, so children of a split
    load their parent's logits unchanged. Choices with one option left are plain values, tied followers copy the weights
    of their leader: neither is ever a mixture of its own.
    """

    def __init__(self, space: SearchSpace, std: float = 0.01, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.space = space
        self.groups: dict[int, list[str]] = {}
        for choice in space.root.choices:
            self.groups.setdefault(len(choice.options), []).append(choice.name)
        self.logits = nn.ParameterDict()
        for K, names in self.groups.items():
            self.logits[str(K)] = nn.Parameter(std * torch.randn(len(names), K, generator=generator))
            allowed = [[option in space[name].options for option in space.root[name].options] for name in names]
            self.register_buffer(f"allowed_{K}", torch.tensor(allowed), persistent=False)

    # -- readings as settings ---------------------------------------------------------------------------------------

    def soft(self, tau: float = 1.0, names: Iterable[str] | None = None) -> dict[str, Setting]:
        """softmax(alpha / tau), without noise."""
        return self._read(lambda logits: simplex.softmax(logits / tau), names)

    def sparsemax(self, tau: float = 1.0, names: Iterable[str] | None = None) -> dict[str, Setting]:
        """sparsemax(alpha / tau) (``nas.simplex``), without noise. Options of weight 0 are computed all the same."""
        return self._read(lambda logits: simplex.sparsemax(logits / tau), names)

    def dirichlet(self, noise: torch.Generator | None, names: Iterable[str] | None = None) -> dict[str, Setting]:
        """A sample of Dirichlet(elu(alpha) + 1) over the allowed options, with its gradient; its mean if ``noise`` is None."""
        return self._read(simplex.dirichlet_mean if noise is None else partial(simplex.dirichlet, noise=noise), names)

    def gumbel(
        self, tau: float, noise: torch.Generator, names: Iterable[str] | None = None, count: int | None = None
    ) -> dict[str, Setting]:
        """A Gumbel-softmax sample over all options, or over ``count`` of them (TAS (3)-(5)).

        u = (log softmax(alpha) + g) / tau and p = softmax(u); with ``count``, that many candidates are drawn without
        replacement in proportion to p + 1e-7 (no gradient through the draw) and softmax over their u is their weight.
        ``tau <= 0``: u = alpha, the plain softmax. Candidates keep the order of the space's options.
        """
        out: dict[str, Setting] = {}
        for rows, logits, allowed in self._rows(names):
            u = self._noisy(logits, tau, noise)
            for name, weights in zip(rows, torch.softmax(u, dim=1).unbind(0)):
                out[name] = self._mixture(name, weights)
            drawn = [i for i, name in enumerate(rows) if count is not None and len(self.space[name].options) > count]
            if count is None or not drawn:
                continue
            u, allowed = u[drawn], allowed[drawn]
            at = self._draw(torch.softmax(u, dim=1), allowed, count, noise)  # (n, I)
            v = torch.softmax(u.gather(1, at.to(u.device)), dim=1)
            for i, positions, weights in zip(drawn, at.tolist(), v.unbind(0)):
                options = self.space.root[rows[i]].options
                out[rows[i]] = Mixture(tuple(options[j] for j in positions), weights)
        return complete(self.space, out)

    def straight_through(
        self, tau: float, noise: torch.Generator, names: Iterable[str] | None = None
    ) -> dict[str, Setting]:
        """One option by Gumbel-max with weights onehot - stopgrad(p) + p over all options; only that one is computed, the
        others add their weight, whose value is 0 (``idle="ones"``, GDAS)."""
        out: dict[str, Setting] = {}
        for rows, logits, _ in self._rows(names):
            p = torch.softmax(self._noisy(logits, tau, noise), dim=1)
            at = p.argmax(dim=1)
            hard = torch.zeros_like(p).scatter_(1, at[:, None], 1.0)
            for name, j, h in zip(rows, at.tolist(), (hard - p.detach() + p).unbind(0)):
                out[name] = Mixture(self.space.root[name].options, h, (j,), "ones")
        return complete(self.space, out)

    def gates(self, soft: Mapping[str, Setting], noise: torch.Generator) -> dict[str, Setting]:
        """Binary gates (ProxylessNAS): of every mixture of ``soft`` one active option, drawn from its weights p.

        The weights are onehot + p - stopgrad(p), exactly onehot, over the options that ``soft`` computes; the others get no
        gate. Only the drawn one runs; dL/dg_j = <f_j(x), dL/dout> of all is found in the backward pass (``idle="gate"``).
        """
        mixtures = {name: s for name, s in soft.items() if isinstance(s, Mixture) and name not in self.space.ties}
        out: dict[str, Setting] = {}
        if mixtures:
            p = pad_sequence([s.weights for s in mixtures.values()], batch_first=True)  # (n, K), 0 behind the last option
            at = torch.multinomial(p.detach().double().cpu(), 1, generator=noise)  # (n, 1)
            g = torch.zeros_like(p).scatter_(1, at.to(p.device), 1.0) + (p - p.detach())
            for (name, s), row, j in zip(mixtures.items(), g.unbind(0), at[:, 0].tolist()):
                computed = list(range(len(s.options))) if s.active is None else list(s.active)
                weights = row if len(computed) == len(row) else row[computed]
                out[name] = Mixture(tuple(s.options[k] for k in computed), weights, (computed.index(j),), "gate")
        return complete(self.space, out)

    # -- readings as numbers ----------------------------------------------------------------------------------------

    def probabilities(self, by: str = "softmax") -> dict[str, list[float]]:
        """What alpha believes of every choice over its root options, on the host: softmax(alpha), sparsemax(alpha) or the
        mean of Dirichlet(elu(alpha) + 1) (``simplex.READINGS``). A millionth of every sparsemax is softmax, so that options
        without weight keep the order of their logits: what is second best is asked of edges and by budgets."""
        out: dict[str, list[float]] = {}
        for K, names in self.groups.items():
            logits = self._masked(K).detach()
            rows = simplex.READINGS[by](logits).double()
            if by == "sparsemax":
                rows = rows.lerp(simplex.softmax(logits.double()), 1e-6)
            out.update(zip(names, rows.cpu().tolist()))
        return out

    def architecture(
        self, skip_limit: int | None = None, probabilities: Mapping[str, Sequence[float]] | None = None
    ) -> Arch:
        """The most probable option of every choice (``SearchSpace.derive``); of ``probabilities``, if given, instead of these.

        ``skip_limit``: how many choices of one part of the space (a cell) may take one of ``space.skips`` (P-DARTS). While
        more do, skips lose their probability at the choice of that part that is least sure of them. Choices that allow
        nothing else, and tied followers, keep theirs. Raises ValueError where it is negative.
        """
        p = {name: list(row) for name, row in (probabilities or self.probabilities()).items()}
        arch = self.space.derive(p)
        if skip_limit is None:
            return arch
        if skip_limit < 0:
            raise ValueError(f"skip_limit = {skip_limit}. Allowed: 0 or more skips a part, or None for no limit.")
        while (name := self._surplus_skip(arch, p, skip_limit)) is not None:
            options = self.space.root[name].options
            p[name] = [0.0 if option in self.space.skips else q for option, q in zip(options, p[name])]
            arch = self.space.derive(p)
        return arch

    def _surplus_skip(self, arch: Mapping[str, Value], p: Mapping[str, list[float]], limit: int) -> str | None:
        """Of the choices that can do without a skip, the least sure one in the first part that has more than ``limit``."""
        space, parts = self.space, dict[str, list[str]]()
        for name, option in arch.items():
            if option in space.skips:
                parts.setdefault(space.part(name), []).append(name)
        free = set(space.free)
        for names in parts.values():
            sure = {name: p[name][space.root[name].options.index(arch[name])] for name in names
                    if name in free and not set(space[name].options) <= set(space.skips)}  # fmt: skip
            loose = [name for name in sure if sure[name] > 0]  # 0: has been asked to do without
            if len(names) > limit and loose:
                return min(loose, key=lambda name: sure[name])
        return None

    def entropy(self) -> Tensor:
        """Mean over open choices of H(softmax(alpha)) / log(allowed options): 1 undecided, 0 decided."""
        parts = []
        for _, logits, allowed in self._rows(None):
            log_p = torch.log_softmax(logits, dim=1).masked_fill(~allowed, 0.0)  # 0 log 0 is 0, in the gradient too
            H = -(torch.softmax(logits, dim=1) * log_p).sum(1)
            parts.append(H / allowed.sum(1).to(H).log())
        return torch.cat(parts).mean() if parts else torch.zeros(())

    def divergence(self, anchor: float = 1.0) -> Tensor:
        """Sum over open choices of KL(Dirichlet(elu(alpha) + 1) || Dirichlet(anchor)) over the allowed options; () tensor."""
        rows = [simplex.dirichlet_kl(logits, anchor).sum() for _, logits, _ in self._rows(None)]
        return torch.stack(rows).sum() if rows else torch.zeros(())

    # -- inside -----------------------------------------------------------------------------------------------------

    def _read(self, by: Callable[[Tensor], Tensor], names: Iterable[str] | None) -> dict[str, Setting]:
        """``by``: masked logits (n, K) -> weights (n, K)."""
        out: dict[str, Setting] = {}
        for rows, logits, _ in self._rows(names):
            out.update((name, self._mixture(name, weights)) for name, weights in zip(rows, by(logits).unbind(0)))
        return complete(self.space, out)

    def _masked(self, K: int) -> Tensor:
        return self.logits[str(K)].masked_fill(~getattr(self, f"allowed_{K}"), float("-inf"))

    def _rows(self, names: Iterable[str] | None) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """For each K: open choices among ``names``, their masked logits (n, K), what is allowed (n, K)."""
        wanted = set(self.space.free) if names is None else set(names) & set(self.space.free)
        for K, group in self.groups.items():
            at = [i for i, name in enumerate(group) if name in wanted]
            if not at:
                continue
            logits, allowed = self._masked(K), getattr(self, f"allowed_{K}")
            if len(at) < len(group):
                logits, allowed = logits[at], allowed[at]
            yield [group[i] for i in at], logits, allowed

    @staticmethod
    def _noisy(logits: Tensor, tau: float, noise: torch.Generator) -> Tensor:
        """(3): u, (n, K); everything is redrawn on a non-finite Gumbel number."""
        if tau <= 0:
            return logits
        while True:
            g = -torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=noise).log()
            if bool(g.isfinite().all()):
                return (torch.log_softmax(logits, dim=1) + g.to(logits)) / tau

    @staticmethod
    def _draw(p: Tensor, allowed: Tensor, count: int, noise: torch.Generator) -> Tensor:
        """(4): ``count`` positions a row, without replacement, ascending, on the host; (n, I)."""
        odds = ((p.detach().double() + 1e-7) * allowed).cpu()
        return torch.multinomial(odds, count, replacement=False, generator=noise).sort(dim=1).values

    def _mixture(self, name: str, weights: Tensor) -> Mixture:
        """All root options; only the allowed ones are computed."""
        options, allowed = self.space.root[name].options, self.space[name].options
        if len(options) == len(allowed):
            return Mixture(options, weights)
        return Mixture(options, weights, tuple(j for j, option in enumerate(options) if option in allowed))


def complete(space: SearchSpace, out: dict[str, Setting]) -> dict[str, Setting]:
    """Adds choices with one option left, and followers with the weights of their leader."""
    for choice in space.choices:
        if choice.name not in space.ties and len(choice.options) == 1:
            out[choice.name] = choice.options[0]
    for name, tie in space.ties.items():
        if tie.leader in out:
            leader = out[tie.leader]
            if isinstance(leader, Mixture):
                allowed = tuple(tie.values.get(value, space[name].options[0]) for value in leader.options)
                out[name] = leader._replace(options=allowed)
            else:
                out[name] = tie.values[leader]
    return out
