"""Batch-norm recalibration: running statistics of subnets, measured anew and written nowhere by training (law 7).

    statistics = recalibrate(net, archs, batches)      # one pass over the batches for all of them
    install(net, statistics[0])                        # now net.eval() normalises for archs[0]

Reset and cumulative: the plain mean over batches of each batch's mean and unbiased variance, which is what
torch.nn.BatchNorm2d keeps with ``momentum=None``.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from search_spaces.space import Setting
from supernets.elastic import Normalise

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Path of a normalising module -> running mean (c,), running variance (c,)."""


class _Sums:
    """Running sums of one subnet: path -> (sum of means, sum of variances), and how many batches."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.var: dict[str, Tensor] = {}
        self.batches = 0

    def note(self, path: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        z = given[0].float() if given[0].dtype in (torch.bfloat16, torch.float16) else given[0]
        var, mean = torch.var_mean(z, dim=(0, 2, 3))
        self.mean[path] = self.mean[path] + mean if path in self.mean else mean
        self.var[path] = self.var[path] + var if path in self.var else var


def recalibrate(
    net: nn.Module, archs: Sequence[Mapping[str, Setting]], batches: Iterable[Tensor]
) -> list[Statistics]:
    """Statistics of every architecture over the same ``batches`` (each (B, C, H, W)), read once.

    The net runs with batch statistics and without gradient; its mode and buffers are left as they were. Raises
    ValueError without batches. A net without batch norms has no statistics, and no batch is read for it.
    """
    norms = [(path, module) for path, module in net.named_modules() if isinstance(module, Normalise)]
    if not norms:
        return [{} for _ in archs]
    sums = [_Sums() for _ in archs]
    was = net.training
    net.train()
    try:
        for x in batches:
            for arch, own in zip(archs, sums):
                hooks = [module.register_forward_pre_hook(partial(own.note, path)) for path, module in norms]
                try:
                    with torch.no_grad():
                        net(x, arch)
                finally:
                    for hook in hooks:
                        hook.remove()
                own.batches += 1
    finally:
        net.train(was)
    if any(own.batches == 0 for own in sums):
        raise ValueError("recalibration was given no batches: name a split with images, or fewer images a batch.")
    return [
        {path: (own.mean[path] / own.batches, own.var[path] / own.batches) for path in own.mean} for own in sums
    ]


@torch.no_grad()
def install(net: nn.Module, statistics: Statistics) -> None:
    """Writes ``statistics`` into the buffers that ``net`` reads in eval mode; the other channels keep theirs."""
    for path, (mean, var) in statistics.items():
        module = net.get_submodule(path)
        assert isinstance(module, Normalise)
        module.running_mean[: len(mean)].copy_(mean)
        module.running_var[: len(var)].copy_(var)
