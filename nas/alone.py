"""One network trained alone, by the engine and the strategy ``plain``: what ``nas retrain`` and truth by training share.

    settings = parse(retrain_parser(), base_of(recipe), [])
    strategy, setup, feed = prepared(network_for(file, settings), settings, data, device)
    Run(out, ...).fit(strategy, setup, feed, seed=settings.seed)
"""
from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from nas import ranks
from nas.build import loss_of, rebuild, rebuild_for_training
from nas.data import Data
from nas.engine import seed_from
from nas.feed import Feed
from nas.heads import Head
from nas.precision import in_precision
from nas.protocols import Setup
from nas.recipe import UsageError
from nas.strategies.plain import Plain
from search_spaces.arch import ArchFile
from supernets.extract import TrainingForm

_ALONE = ranks.Ranks(rank=0, world=1, local_rank=0, main=True)


def base_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Retraining's settings from a search recipe: its ``retrain`` section over its data, loss and precision."""
    for name in ("retrain", "data", "loss"):
        if not isinstance(recipe.get(name) or {}, Mapping):
            raise UsageError(f"{name} = {recipe[name]} is not a section. Give keys and values.")
    own = dict(recipe.get("retrain") or {})
    unknown = sorted(set(own) - {"epochs", "plain", "data", "loss", "head"})
    if unknown:
        raise UsageError(f"retrain.{unknown[0]} is not a known key. Allowed: epochs, plain, data, loss, head.")
    base: dict[str, Any] = {name: {**(recipe.get(name) or {}), **(own.get(name) or {})} for name in ("data", "loss")}
    base.update({key: own[key] for key in ("epochs", "plain", "head") if key in own})
    base.update({key: recipe[key] for key in ("precision", "channels_last", "threads", "seed") if key in recipe})
    return base


def network_for(file: ArchFile, settings: Namespace, form: str = "fresh") -> nn.Module:
    """The network of ``file`` with fresh weights, with drop path and an auxiliary head where ``settings.plain`` wants them."""
    plain, seed = settings.plain, seed_from(settings.seed, "fresh")
    if not plain.auxiliary and not plain.drop_path:
        return rebuild(file, form, seed)
    return rebuild_for_training(file, form, seed, head=plain.auxiliary > 0, by_depth=plain.drop_path_version != 1)


def prepared(
    net: nn.Module, settings: Namespace, data: Data, device: torch.device, group: ranks.Ranks = _ALONE, teacher: Any = None
) -> tuple[Plain, Setup, Feed]:
    """What trains ``net``, which goes to ``device`` in the run's precision. ValueError for what does not fit: no folder is made
    yet."""
    Head(**settings.head.as_dict()).attach(net.network if isinstance(net, TrainingForm) else net)
    net = in_precision(net.train().to(device), settings.precision, settings.channels_last)
    feed = data.feed(settings.seed, device, group.rank, group.world)
    epoch_steps = feed.epoch_steps() // settings.plain.accumulate or 1
    setup = Setup(net, None, None, loss_of(settings), teacher, settings.epochs * epoch_steps, epoch_steps, data.count("train"))
    strategy = Plain(**settings.plain.as_dict())
    copy.copy(strategy).start(setup)
    return strategy, setup, feed
