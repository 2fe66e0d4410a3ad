"""Architecture parameters: one row of logits for every choice of the root space, read as mixtures.

Letters: ``n`` choices with equally many options, ``K`` options, ``I`` sampled candidates. All rows of one ``K`` are one
Parameter, so a whole step's samples are drawn in one call and cross to the host once.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from search_spaces.space import Arch, Mixture, SearchSpace, Setting


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
        out: dict[str, Setting] = {}
        for rows, logits, _ in self._rows(names):
            for name, weights in zip(rows, torch.softmax(logits / tau, dim=1).unbind(0)):
                out[name] = self._mixture(name, weights)
        return self._complete(out)

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
        return self._complete(out)

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
        return self._complete(out)

    # -- readings as numbers ----------------------------------------------------------------------------------------

    def probabilities(self) -> dict[str, list[float]]:
        """softmax(alpha) of every choice over its root options, on the host."""
        out: dict[str, list[float]] = {}
        for K, names in self.groups.items():
            rows = torch.softmax(self._masked(K), dim=1).detach().double().cpu().tolist()
            out.update(zip(names, rows))
        return out

    def architecture(self) -> Arch:
        """The most probable option of every choice (``SearchSpace.derive``)."""
        return self.space.derive(self.probabilities())

    def entropy(self) -> Tensor:
        """Mean over open choices of H(softmax(alpha)) / log(allowed options): 1 undecided, 0 decided."""
        parts = []
        for _, logits, allowed in self._rows(None):
            log_p = torch.log_softmax(logits, dim=1).masked_fill(~allowed, 0.0)  # 0 log 0 is 0, in the gradient too
            H = -(torch.softmax(logits, dim=1) * log_p).sum(1)
            parts.append(H / allowed.sum(1).to(H).log())
        return torch.cat(parts).mean() if parts else torch.zeros(())

    # -- inside -----------------------------------------------------------------------------------------------------

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

    def _complete(self, out: dict[str, Setting]) -> dict[str, Setting]:
        """Adds choices with one option left, and followers with the weights of their leader."""
        for choice in self.space.choices:
            if choice.name not in self.space.ties and len(choice.options) == 1:
                out[choice.name] = choice.options[0]
        for name, tie in self.space.ties.items():
            if tie.leader in out:
                leader = out[tie.leader]
                if isinstance(leader, Mixture):
                    allowed = tuple(tie.values.get(value, self.space[name].options[0]) for value in leader.options)
                    out[name] = leader._replace(options=allowed)
                else:
                    out[name] = tie.values[leader]
        return out
