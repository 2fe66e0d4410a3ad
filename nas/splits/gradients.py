"""How well the options of a choice agree about the weights that they share (page fewshot-gm, section 2b).

    for each option i:   g_i = dL/d(shared weights), the choice fixed at i; batch and all other choices stay as they are
    D_ij = 1 - <g_i, g_j> / (||g_i|| ||g_j|| + 1e-6)          one cosine over all weights as one vector

    shared: which weights        fixed: what the net runs        gradients: g_i        distances: D        match: both

``leave_out`` of the released code, beside what the choice owns:

    supernets.nats.Topology          stem.*  norm.*  classifier.*                   what stays: other edges, residual blocks
    supernets.darts.Cells            stem.*  *.pre0.*  *.pre1.*  classifier.*       candidates: normal.* alone
    supernets.mobilenet, kernels     stages.{0}.{1}.*                               the tested block
"""
from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas import ranks
from nas.protocols import Batch
from search_spaces.choice import listed
from search_spaces.space import Mixture, SearchSpace, Setting, Value, require
from supernets.mixing import active

EPS = 1e-6
CHUNK = 1 << 22  # numbers of each gradient that are in float64 at a time


def distances(gradients: Sequence[Tensor]) -> np.ndarray:
    """n gradients (P,) -> D (n, n) float64, symmetric. Products and norms are summed in float64, whatever came in.

    Equal gradients: EPS / (||g||^2 + EPS), 0 but for that term (the diagonal too); a zero gradient: 1 to all, itself too.
    ValueError where they are not of one length, and for numbers that are not finite.
    """
    shapes = {tuple(g.shape) for g in gradients}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"Gradients to compare are vectors of one length; given: {listed(sorted(shapes))}.")
    n = len(gradients)
    pairs = list(combinations_with_replacement(range(n), 2))
    dots = torch.zeros(len(pairs), dtype=torch.float64, device=gradients[0].device)
    for start in range(0, len(gradients[0]), CHUNK):
        rows = [g[start : start + CHUNK].double() for g in gradients]
        dots += torch.stack([torch.dot(rows[i], rows[j]) for i, j in pairs])
    gram = np.empty((n, n))
    for (i, j), dot in zip(pairs, dots.tolist()):
        gram[i, j] = gram[j, i] = dot
    if not np.isfinite(gram).all():
        bad = [i for i in range(n) if not np.isfinite(gram[i, i])]
        raise ValueError(f"The gradients of options {listed(bad)} (counted from 0) are not finite: the supernet has diverged. "
                         "Train it with a smaller learning rate.")  # fmt: skip
    norms = np.sqrt(np.diag(gram))
    return 1 - gram / (np.outer(norms, norms) + EPS)


def shared(net: Any, choice: str, leave_out: Sequence[str] = ()) -> list[nn.Parameter]:
    """The trainable parameters of ``net`` that ``choice`` does not own and whose names match no pattern, in the net's order.

    ``leave_out``: patterns (``*``, ``?``, ``[abc]``) of whole names, see the module; {0}, {1}, .. stand for the numbers in the
    choice's name: "stages.{0}.{1}.*" of stage3.block1.kernel is stages.3.1.*. A parameter under several names is left out
    where one of them matches. ValueError for a pattern that matches no parameter, or asks for a number that is not there.
    """
    numbers = re.findall(r"\d+", choice)
    names: dict[int, list[str]] = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    out = {id(p) for p in net.owned(choice)}
    for said in leave_out:
        try:
            pattern = said.format(*numbers)
        except (IndexError, KeyError, ValueError):
            raise ValueError(f"split.leave_out: {said!r} asks for numbers that {choice} does not have: it has "
                             f"{listed(numbers) or 'none'}. Write {{0}} for the first.") from None  # fmt: skip
        matched = {at for at, known in names.items() if any(fnmatchcase(name, pattern) for name in known)}
        if not matched:
            first = listed([known[0] for known in names.values()][:3])
            raise ValueError(f"split.leave_out: {pattern!r} matches no parameter. Parameters: {first}, ...")
        out |= matched
    return [p for p in net.parameters() if p.requires_grad and id(p) not in out]


# ---- what the net runs --------------------------------------------------------------------------------------------------


def fixed(
    space: SearchSpace, setting: Mapping[str, Setting], choice: str, option: Value, rng: random.Random,
    keep_weight: bool = False,
) -> dict[str, Setting]:  # fmt: skip
    """``setting`` (all choices) with ``choice`` at ``option``, so that it counts; weights of mixtures detached.

    ``keep_weight``: the option keeps its weight in the setting's mixture (released code on DARTS cells), instead of 1. Choices
    that ``choice`` needs, directly or further up, keep their setting where it holds (of a mixture: where an active option
    does), else one that holds is drawn. A plain setting that was inert says nothing (``canonical`` writes the first option),
    and may count now: it is drawn too. Followers follow whatever was set.

    Draws are uniform over the options of ``space``, and read ``rng`` without moving it: with ``rng`` as it is, all options of
    a choice meet the same others. Move it between two draws of the others.
    ValueError for a follower, an option that is not there or has no weight to keep, a choice that cannot count in ``space``,
    and settings that miss a choice.
    """
    if choice in space.ties:
        raise ValueError(f"{choice} follows {space.ties[choice].leader}. Split its leader.")
    require(choice, option, space[choice].options)
    missing = [c.name for c in space.choices if c.name not in setting]
    if missing:
        raise ValueError(f"The setting to split says nothing of {missing[0]}. It sets every choice of the space.")
    draws = copy.copy(rng)
    out = {name: _detached(said) for name, said in setting.items()}
    drawn: dict[str, Setting] = {
        c.name: draws.choice(c.options) for c in space.choices
        if c.name not in space.ties and not isinstance(out[c.name], Mixture) and not _counts(space, out, c.name)
    }  # fmt: skip
    for name, values in _needed(space, choice).items():
        if not values:
            raise ValueError(f"{choice} cannot count in this space: {name} = {listed(space[name].options)} allows it nowhere. "
                             "Leave it out of split.choices.")  # fmt: skip
        if not _holds(drawn.get(name, out[name]), values):
            drawn[name] = draws.choice(values)
    drawn[choice] = _weighed(choice, out[choice], option) if keep_weight else option
    for name, (leader, follows) in space.ties.items():
        lead = drawn.get(leader)
        if isinstance(lead, Mixture):
            out[name] = lead._replace(options=tuple(follows[value] for value in lead.options))
        elif lead is not None:
            out[name] = follows[lead]
    return out | drawn


def _detached(said: Setting) -> Setting:
    return said._replace(weights=said.weights.detach()) if isinstance(said, Mixture) else said


def _weighed(choice: str, said: Setting, option: Value) -> Setting:
    """``option`` with its weight in ``said``; the option itself where that is no mixture."""
    if not isinstance(said, Mixture):
        return option
    computed = {said.options[j]: j for j in active(said)}
    if option not in computed:
        raise ValueError(f"{choice} = {option} has no weight in a mixture that computes {listed(computed)}. Leave out "
                         "split.keep_weight.")  # fmt: skip
    return Mixture((option,), said.weights[computed[option]].reshape(1))


def _holds(said: Setting, values: Collection[Value]) -> bool:
    """Whether ``said`` is one of ``values``; of a mixture, whether an active option is."""
    return any(value in values for value in ([said.options[j] for j in active(said)] if isinstance(said, Mixture) else [said]))


def _counts(space: SearchSpace, setting: Mapping[str, Setting], name: str) -> bool:
    return all(_holds(setting[up], values) for up, values in space.conditions(name).items())


def _needed(space: SearchSpace, name: str) -> dict[str, tuple[Value, ...]]:
    """What must hold for ``name`` to count: choice that follows none -> its options that do."""
    found: dict[str, tuple[Value, ...]] = {}
    for up, values in space.conditions(name).items():
        leads, follows = space.ties[up] if up in space.ties else (up, {value: value for value in values})
        left = found.get(leads, space[leads].options)
        found[leads] = tuple(value for value in left if follows.get(value) in values)
    return found


# ---- gradients ----------------------------------------------------------------------------------------------------------


def gradients(
    net: Any, loss: Callable[[Tensor, Tensor], Tensor], batch: Batch, setting_of: Callable[[Value], Mapping[str, Setting]],
    options: Sequence[Value], params: Sequence[nn.Parameter],
) -> list[Tensor]:  # fmt: skip
    """g (P,) of each of ``options``: a forward and a backward pass each, in training mode, of one ``batch``.

    ``setting_of(option)``: what the net runs, see ``fixed``. ``params``: see ``shared``; those that got a gradient from every
    option are compared, masked and unreached ones are not. The passes of all options start from the same state of torch's
    global generators, so they see the same dropout; that state, modes, parameters, their ``.grad`` and all buffers are left as
    they were: seed the generators anew for another draw of dropout. ValueError where no parameter got a gradient from all.
    """
    found: list[tuple[Tensor | None, ...]] = []
    devices = [batch.x.device] if batch.x.device.type == "cuda" else []
    with _training(net):
        for option in options if params else ():
            with torch.random.fork_rng(devices):
                value = loss(net(batch.x, setting_of(option)), batch.y)
                found.append(torch.autograd.grad(value, params, allow_unused=True))
    reached = [k for k in range(len(params)) if all(found_by[k] is not None for found_by in found)]
    if not reached:
        raise ValueError(f"None of {len(params)} shared parameters gets a gradient from all of {listed(options)}: there is "
                         "nothing to compare. Leave fewer out (split.leave_out), or leave this choice out.")  # fmt: skip
    return [torch.cat([g.flatten() for k in reached if (g := found_by[k]) is not None]) for found_by in found]


def match(
    net: Any, loss: Callable[[Tensor, Tensor], Tensor], batch: Batch, setting_of: Callable[[Value], Mapping[str, Setting]],
    options: Sequence[Value], params: Sequence[nn.Parameter],
) -> np.ndarray:  # fmt: skip
    """D (n, n) of the ``gradients`` of n options; under torchrun of their means over ranks."""
    found = gradients(net, loss, batch, setting_of, options, params)
    ranks.average_(found)
    return distances(found)


@contextmanager
def _training(net: nn.Module) -> Iterator[None]:
    """``net`` in training mode, then every module in its own again."""
    modes = [(module, module.training) for module in net.modules()]
    net.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
