"""Descent: one optimizer with its schedule, clipping, rank averaging and moving average.

    w = Descent(net.parameters(), partial(SGD, lr=0.1, momentum=0.9), cosine(steps))
    w.down(loss(net(x, arch), y))                       # backward into w alone, then step

    with w.ahead(train_loss):                           # unrolled step: w' = what the optimizer would make of w
        g = w.grad(valid_loss(), alpha)                 # dL/dw' returned, dL/dalpha accumulated in alpha: one backward
    with w.shifted(g, by=eps): ...                      # w + eps * g
    with w.frozen(): a.add(loss(net(x, alpha.soft()), y))   # a pass for alpha alone

    w.pull(y.params, by=beta)                           # + beta/2 ||w - y||^2, then w.down(...)
"""
from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nas import ranks
from nas.schedules import Schedule, constant


class Descent:
    """See the module. ``params``: trainable parameters. ``optimizer``: a list of parameters -> an Optimizer of all of them, in
    one group or several, whose rates keep their ratio to the first's.

    ``schedule``: steps taken so far -> factor of the optimizer's rates. ``clip``: the largest norm of all gradients
    together; ``clip_value`` instead of it: the largest size of any one entry. ``idle``: a parameter without a gradient is
    left alone ("skip"), or gets a zero gradient, so that its momentum and weight decay go on ("zeros"). ``accumulate``:
    only every so-manieth ``step`` acts, each ``add`` counts for its share. ``ema``: decay of the moving average of the
    parameters, 0 to 1, which starts at their initial values.
    ``norm``: gradient norm of the last step before clipping, () tensor; None unless clipping is set or a step asks.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        optimizer: Callable[[list[Parameter]], Optimizer],
        schedule: Schedule | None = None,
        clip: float | None = None,
        idle: str = "skip",
        accumulate: int = 1,
        ema: float | None = None,
        clip_value: float | None = None,
    ) -> None:
        self.params = list(params)
        _check(self.params, clip, clip_value, idle, accumulate, ema)
        self.schedule = schedule or constant()
        self.clip, self.clip_value, self.idle, self.accumulate, self.ema = clip, clip_value, idle, accumulate, ema
        self.optimizer = optimizer(self.params)
        _check_groups(self.params, self.optimizer)
        self.bases = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.count = 0  # steps taken
        self.calls = 0  # of step()
        self.norm: Tensor | None = None
        self.average = [p.detach().clone() for p in self.params] if ema is not None else []
        _fill_momentum(self.optimizer)

    @property
    def rate(self) -> float:
        """The learning rate that the next step will use (of the first parameter group)."""
        return self.bases[0] * self.schedule(self.count)

    @property
    def grad_norm(self) -> Tensor:
        """``norm``, where the last step took one. RuntimeError where it did not."""
        if self.norm is None:
            raise RuntimeError("Descent.grad_norm: no step kept a norm. Set clip, or step with norm=True.")
        return self.norm

    def add(self, loss: Tensor, *also: Descent) -> None:
        """One backward of a scalar ``loss`` into the parameters of self and ``also``, and nowhere else; accumulates."""
        if any(descent.accumulate != self.accumulate for descent in also):
            raise ValueError("Descent.add: descents that share a backward must have the same accumulate.")
        share = loss / self.accumulate if self.accumulate > 1 else loss
        torch.autograd.backward(share, inputs=_all_params(self, *also))

    @torch.no_grad()
    def pull(self, toward: Sequence[Tensor], by: float) -> None:
        """Adds ``by`` * (p - q) to every pending gradient, q of ``toward`` (one tensor a parameter, a constant here): the
        gradient of by/2 ||p - q||^2, before averaging, clipping and momentum, and for parameters without a gradient too.

        Once before every ``step``, on every rank: each call counts for its share, as ``add`` does, so with accumulate > 1
        the calls of one acting step make up one whole ``by`` (p - q).
        """
        self._matching("pull", toward)
        share = by / self.accumulate
        for p, q in zip(self.params, toward):
            if p.grad is None:
                p.grad = (p - q).mul_(share)
            else:
                p.grad.add_(p - q, alpha=share)

    def step(self, norm: bool = False, look: Callable[[], None] | None = None, unclipped: bool = False) -> None:
        """Average over ranks, clip, step, clear the gradients. ``norm``: keep the norm without clipping too. ``look``: called
        in a step that acts, while every ``.grad`` is what the optimizer is given; ``unclipped``: before clipping."""
        self.calls += 1
        if self.calls % self.accumulate:
            return
        self._use(self._averaged([p.grad for p in self.params]))
        if look is not None and unclipped:
            look()
        if self.clip is not None:
            self.norm = clip_grad_norm_(self.params, self.clip)
        elif norm or self.clip_value is not None:
            self.norm = get_total_norm([p.grad for p in self.params if p.grad is not None])
        if self.clip_value is not None:
            clip_grad_value_(self.params, self.clip_value)
        if look is not None and not unclipped:
            look()
        self._move(self.rate)
        self.optimizer.zero_grad(set_to_none=True)
        self.count += 1
        if self.ema is not None:
            get_ema_multi_avg_fn(self.ema)(self.average, self.params, self.count)

    def down(self, loss: Tensor, *also: Descent, norm: bool = False) -> None:
        """``add``, then ``step`` for self and each of ``also``."""
        self.add(loss, *also)
        for descent in (self, *also):
            descent.step(norm)

    def grad(self, loss: Tensor, *also: Descent) -> list[Tensor]:
        """Gradients of ``loss``, one a parameter (zeros where there is none), averaged over ranks; nothing accumulates
        in self. The same backward accumulates in ``also``, as ``add`` does, but undivided."""
        found = self._gradients(loss, *also)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found)]

    @contextmanager
    def ahead(self, loss: Tensor, rate: float | None = None) -> Iterator[None]:
        """Parameters as after this optimizer's step on ``loss`` (momentum, decay; no clipping), then as before.

        ``rate``: instead of the next step's. The optimizer's state, pending gradients and the average are untouched.
        Raises ValueError with accumulate > 1, where one loss is not a step.
        """
        if self.accumulate > 1:
            raise ValueError(f"Descent.ahead: accumulate = {self.accumulate}. Allowed with a look-ahead: 1.")
        found = self._gradients(loss)
        with self._restored():
            self._try(found, self.rate if rate is None else rate)
            del found  # not needed inside, where memory may be scarce
            yield

    @contextmanager
    def shifted(self, direction: Sequence[Tensor], by: float | Tensor) -> Iterator[None]:
        """Parameters + ``by`` * ``direction`` (one tensor a parameter), then as before."""
        self._matching("shifted", direction)
        with self._restored():
            with torch.no_grad():
                for p, d in zip(self.params, direction):
                    p.add_(by * d)
            yield

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Parameters without gradients, then as before: around a forward and backward that are for others (alphas) alone,
        which is spared the gradients of the weights."""
        for p in self.params:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in self.params:
                p.requires_grad_(True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in place of the parameters, then as before. Raises ValueError where ``ema`` is None."""
        if self.ema is None:
            raise ValueError("Descent.averaged: ema = None keeps no average. Construct with ema, for instance 0.999.")
        with self._restored():
            with torch.no_grad():
                for p, average in zip(self.params, self.average):
                    p.copy_(average)
            yield

    @torch.no_grad()
    def permute(self, moved: Iterable[tuple[Parameter, int, Tensor]]) -> None:
        """Let optimizer state, pending gradients and average follow parameters that were permuted.

        ``moved``: (parameter, dim, order), where the new parameter is the old one's ``index_select(dim, order)``.
        Parameters of other descents are passed over.
        """
        position = {p: i for i, p in enumerate(self.params)}
        for p, dim, order in moved:
            if p not in position:
                continue
            state = self.optimizer.state.get(p, {}).values()
            followers = [t for t in state if isinstance(t, Tensor) and t.shape == p.shape]
            followers += [p.grad] if p.grad is not None else []
            followers += [self.average[position[p]]] if self.average else []
            for tensor in followers:
                tensor.copy_(tensor.index_select(dim, order))

    def forget(self) -> None:
        """The optimizer's state (momentum, moments) as new; the schedule, pending gradients and the average go on."""
        self.optimizer.state = defaultdict(dict)
        _fill_momentum(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters: optimizer, counts, average, and gradients that wait for a step."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "count": self.count,
            "calls": self.calls,
            "average": list(self.average),
            "pending": {i: p.grad for i, p in enumerate(self.params) if p.grad is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``. Raises ValueError where the average is of other parameters."""
        if len(state["average"]) != len(self.average):
            raise ValueError(
                f"Descent: the state averages {len(state['average'])} parameters, here {len(self.average)}. "
                "Resume with the ema that the run began with."
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.count, self.calls = state["count"], state["calls"]
        for mine, loaded in zip(self.average, state["average"]):
            mine.copy_(loaded)
        for i, p in enumerate(self.params):
            p.grad = state["pending"][i].to(p) if i in state["pending"] else None

    def _gradients(self, loss: Tensor, *also: Descent) -> list[Tensor | None]:
        """Gradients by a backward into emptied ``.grad`` (autograd.grad may return one tensor for two parameters, which
        an optimizer that works in place would spoil), averaged over ranks; self's pending ones are put back."""
        pending = [p.grad for p in self.params]
        try:
            for p in self.params:
                p.grad = None
            torch.autograd.backward(loss, inputs=_all_params(self, *also))
            found = [p.grad for p in self.params]
        finally:
            for p, g in zip(self.params, pending):
                p.grad = g
        return self._averaged(found)

    def _averaged(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """Mean over ranks; a rank without a gradient that another rank has counts as zero. In place."""
        if not ranks.active():
            return gradients
        present = ranks.anywhere([g is not None for g in gradients], self.params[0].device)
        full = [
            torch.zeros_like(p) if here and g is None else g for p, g, here in zip(self.params, gradients, present)
        ]
        ranks.average_([g for g in full if g is not None])
        return full

    def _use(self, gradients: list[Tensor | None]) -> None:
        for p, g in zip(self.params, gradients):
            p.grad = torch.zeros_like(p) if g is None and self.idle == "zeros" else g

    def _try(self, gradients: list[Tensor | None], rate: float) -> None:
        """Moves the parameters as a step on ``gradients`` would; the optimizer's state and pending gradients stay.

        The optimizer works in place, so it is lent copies of its state: of those parameters alone that will move.
        """
        state, pending = self.optimizer.state, [p.grad for p in self.params]
        try:
            self._use(gradients)
            lent: dict[Tensor, Any] = {p: _copied(state[p]) for p in self.params if p.grad is not None and p in state}
            self.optimizer.state = defaultdict(dict, lent)
            self._move(rate)
        finally:
            self.optimizer.state = state
            for p, g in zip(self.params, pending):
                p.grad = g

    def _move(self, rate: float) -> None:
        """The optimizer's step at ``rate``; further parameter groups keep their ratio to the first."""
        for group, base in zip(self.optimizer.param_groups, self.bases, strict=True):
            group["lr"] = rate if base == self.bases[0] else rate * base / self.bases[0]
        self.optimizer.step()

    def _matching(self, name: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != len(self.params):
            raise ValueError(f"Descent.{name}: {len(tensors)} tensors for {len(self.params)} parameters.")

    @contextmanager
    def _restored(self) -> Iterator[None]:
        kept = [p.detach().clone() for p in self.params]
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.params, kept):
                    p.copy_(value)


def average(x: Tensor) -> Tensor:
    """The mean of ``x`` over ranks, the same on all of them and without a graph; ``x`` itself where there is one process.

    Every rank must call it. Gradients that a Descent or ``Descent.grad`` returns are averaged already.
    """
    if not ranks.active():
        return x
    mean = x.detach().clone()
    ranks.average_([mean])
    return mean


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """One parameter's optimizer state. Tensors are cloned, several times faster than copy.deepcopy does it."""
    return {key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in state.items()}


def _all_params(*descents: Descent) -> list[Parameter]:
    return [p for descent in descents for p in descent.params]


def _check(
    params: list[Parameter], clip: float | None, clip_value: float | None, idle: str, accumulate: int, ema: float | None
) -> None:
    if not params:
        raise ValueError("Descent: no parameters. Give at least one.")
    for i, p in enumerate(params):
        if not p.requires_grad:
            raise ValueError(f"Descent: parameter {i} of shape {tuple(p.shape)} is frozen. Give only trainable ones.")
    if clip is not None and not clip > 0:
        raise ValueError(f"Descent: clip = {clip}. Allowed: a norm above 0, or None.")
    if clip_value is not None and (clip is not None or not clip_value > 0):
        raise ValueError(f"Descent: clip = {clip}, clip_value = {clip_value}. Allowed: a value above 0 without clip, or None.")
    if idle not in ("skip", "zeros"):
        raise ValueError(f"Descent: idle = {idle!r}. Allowed: 'skip', 'zeros'.")
    if accumulate < 1:
        raise ValueError(f"Descent: accumulate = {accumulate}. Allowed: 1 or more.")
    if ema is not None and not 0.0 <= ema <= 1.0:
        raise ValueError(f"Descent: ema = {ema}. Allowed: 0 to 1, or None.")


def _check_groups(params: list[Parameter], optimizer: Optimizer) -> None:
    groups = optimizer.param_groups
    if sum(len(group["params"]) for group in groups) != len(params) or {id(p) for p in params} != {
        id(p) for group in groups for p in group["params"]
    }:
        raise ValueError("Descent: the optimizer's groups do not hold each parameter once. Build them of the list it is given.")
    rates = [float(group["lr"]) for group in groups]
    if rates[0] == 0 and any(rates):
        raise ValueError(f"Descent: rates {rates} of the groups keep no ratio to the first. Allowed: a first rate above 0.")


def _fill_momentum(optimizer: Optimizer) -> None:
    """Zero momentum buffers for fused SGD, which raises TypeError where a first gradient comes later than others'.

    The first step is bit for bit what it is without them (0 * momentum + gradient), but for dampening: refused. (Fused
    and plain SGD agree to the last bit in whole vectors only: their kernels round a tensor's tail differently.)
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if group["fused"] and group["momentum"] != 0:
            if group["dampening"] != 0:
                raise ValueError(f"Descent: fused SGD, dampening = {group['dampening']}. Allowed: 0, or fused=False.")
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
