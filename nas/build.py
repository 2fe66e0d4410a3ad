"""From a parsed recipe to objects: device, data, space, supernet, costs, strategy; and from arch.json to a plain network."""
from __future__ import annotations

import hashlib
import importlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torchvision
from jsonargparse import Namespace
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import fx, nn

from nas import ranks
from nas.bilevel import weights_of
from nas.budget import Budget
from nas.cost import PRICES, CostTable
from nas.data import Data
from nas.engine import seed_from
from nas.heads import Head
from nas.limits import Select
from nas.losses import CrossEntropy
from nas.precision import in_precision
from nas.protocols import Searcher, Served, Setup, Strategy, Supernet
from nas.recipe import UsageError, build
from nas.splits.split import Split
from search_spaces.arch import ArchFile, space_of
from search_spaces.patterns import restricted, tied
from search_spaces.space import Arch, SearchSpace
from supernets.elastic import Leaf
from supernets.extract import TrainingForm, extract, training_form


@dataclass
class Built:
    """Everything a search needs. ``net`` runs in the recipe's precision; ``costs`` are MACs of the derived view.

    ``space``: what is searched, the net's own space or a part. ``searcher`` picks, within the limits of ``select``; None: the
    strategy derives. ``split``: how the supernet becomes several, None: it stays one. Of a trained run: ``step``, how far it
    has come, ``finished``, and the ``tree`` of one with splits, which serves in the place of the strategy.
    """

    device: torch.device
    ranks: ranks.Ranks
    data: Data
    space: SearchSpace
    net: Any
    costs: CostTable
    strategy: Strategy
    loss: CrossEntropy
    setup: Setup
    searcher: Searcher | None = None
    select: Select = field(default_factory=Select)
    split: Split | None = None
    step: int = 0
    finished: bool = False
    tree: Served | None = None

    @property
    def trained(self) -> Served:
        """What is read of the training."""
        return self.strategy if self.tree is None else self.tree

    @property
    def budget(self) -> Budget | None:
        """The budget of the strategy, once it has started; None where it has none of this kind."""
        found = vars(self.strategy).get("budget")
        return found if isinstance(found, Budget) and "table" in vars(found) else None

    def prices(self, arch: Arch) -> dict[str, int | float]:
        """macs, params, activations; latency_ms where that is the price of the budget."""
        costs = {name: self.costs.priced(price).of(arch) for name, price in PRICES.items()}
        if self.budget is not None and self.budget.price not in PRICES:
            costs["latency_ms"] = self.budget.table.of(arch)
        return costs


def device_of(name: str) -> torch.device:
    """The device of ``--device``. UsageError where CUDA is asked and there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name} is not known. Allowed: auto, cpu, cuda, cuda:N.") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices. Use cpu or auto.")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name} is not supported. Allowed: auto, cpu, cuda, cuda:N.")
    return device


def data_of(config: Namespace, group: ranks.Ranks | None = None) -> Data:
    """The data of a recipe. Of several ranks the main one goes first: it may have to decode and cache them."""
    if group is not None and not group.main:
        ranks.wait()
    data = Data(**config.data.as_dict())
    if group is not None and group.main:
        ranks.wait()
    return data


def loss_of(config: Namespace) -> CrossEntropy:
    return CrossEntropy(**config.loss.as_dict())


def assemble(config: Namespace) -> Built:
    """Objects of a parsed search recipe. UsageError and ValueError in one line."""
    for key in ("space", "supernet", "strategy"):
        if not config.get(key):
            raise UsageError(f"{key} is missing: name a recipe (nas search RECIPE), or give --{key}.")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = device_of(config.device)
    group = ranks.start(device)
    if device.type == "cuda" and group.world > 1:
        device = torch.device("cuda", group.local_rank)
    data = data_of(config, group)
    space = tied(restricted(build(config.space), config.restrict), config.tie)
    net = supernet_of(config, space, data)
    net.reset(torch.Generator().manual_seed(seed_from(config.seed, "weights")))
    if config.init:
        adopt(net, space.root.largest(), load_weights(config.init), torch.zeros(2, *data.shape))
    Head(**config.head.as_dict()).attach(net)
    net = in_precision(net.to(device), config.precision, config.channels_last)
    return gather(data, net, build(config.strategy), loss_of(config), epochs=config.epochs, seed=config.seed, device=device,
                  group=group, searcher=build(config.searcher) if config.searcher else None,
                  select=Select(**config.select.as_dict()), part=config.part,
                  split=Split(**config.split.as_dict()))  # fmt: skip


def supernet_of(config: Namespace, space: SearchSpace, data: Data) -> Any:
    """The supernet that ``config`` names, for ``space``. UsageError where it is for another kind of space, or none at all."""
    words = (f"supernet {config.supernet['class_path']} is not for the space {space.name}. "
             f"The supernets of search_spaces.{space.name} are in supernets.{space.name.partition('.')[0]}.")
    try:
        net = build(config.supernet, space=space, channels=data.shape[0], classes=len(data.classes))
    except (AttributeError, KeyError, TypeError) as error:  # what a class says of a space that it does not know
        raise UsageError(f"{words} ({type(error).__name__}: {error})") from error
    if not isinstance(net, Supernet):
        raise UsageError(words)
    return net


def gather(
    data: Data, net: Any, strategy: Strategy, loss: CrossEntropy, *, epochs: int, seed: int, device: torch.device,
    group: ranks.Ranks, searcher: Searcher | None = None, select: Select | None = None, part: Mapping[str, Any] | None = None,
    split: Split | None = None,
) -> Built:  # fmt: skip
    """The parts of a search, with the cost table and the setup that follow from them. ``part``: patterns of what is searched,
    of the net's space. ValueError where data do not fit."""
    space = restricted(net.space, part) if part else net.space
    costs = CostTable(net, data.shape[1:])
    weights = weights_of(strategy)
    accumulate = 1 if weights is None else weights.accumulate  # an epoch is every image once, as of nas retrain
    epoch_steps = data.feed(seed, device, group.rank, group.world).epoch_steps() // accumulate or 1
    setup = Setup(net, space, costs, loss, None, epochs * epoch_steps, epoch_steps, data.count("train"))
    split = split if split is not None and split.levels else None
    return Built(device, group, data, space, net, costs, strategy, loss, setup, searcher, select or Select(), split)


def load_weights(path: str) -> dict[str, torch.Tensor]:
    """A safetensors file. UsageError where it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read as weights: {error}. Give model.safetensors of a bundle.") from None


def adopt(net: nn.Module, arch: Arch, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> None:
    """Puts the weights of a plain network of ``arch`` into the supernet's slices; the inverse of extraction.

    Raises ValueError, naming the first keys, where the weights are of another network.
    """
    plain = extract(net, arch, x, inherit=False)
    own = plain.state_dict()
    wrong = sorted(key for key in {*own, *weights} if key not in own or key not in weights)
    wrong += [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if wrong:
        raise ValueError(
            f"these weights are not of this space's largest network: {wrong[0]} and {len(wrong) - 1} other keys differ. "
            "Train it by nas extract RECIPE --arch largest, then nas retrain."
        )
    plain.load_state_dict(dict(weights))
    modules = dict(plain.named_modules())
    for path, leaf in net.named_modules():
        if isinstance(leaf, Leaf):
            inner = {name[len(path) + 1 :]: module for name, module in modules.items() if f"{name}.".startswith(f"{path}.")}
            if inner:
                leaf.adopt(inner)


def rebuild(file: ArchFile, form: str = "fresh", seed: int = 0) -> fx.GraphModule:
    """The plain network of an arch.json, with fresh weights drawn from ``seed``.

    ``form``: "fresh" (the published network) or "inherited" (that of a supernet's weights, where it differs: in eval mode it
    computes what the supernet does). Convention instead of a registry: the supernets of search_spaces.NAME are built by
    ``supernets.NAME.build``. ValueError where its space has no supernet here.
    """
    net, x = _supernet(file)
    return extract(net, file.arch, x, inherit=form == "inherited", seed=seed)


def rebuild_for_training(
    file: ArchFile, form: str = "fresh", seed: int = 0, head: bool = True, by_depth: bool = True
) -> TrainingForm:
    """As ``rebuild``, the same weights for the same seed, with drop path and, ``head``, an auxiliary head. ``by_depth``:
    whether drop path is scaled by depth, where the network does so.

    ValueError where networks of this space have neither.
    """
    net, x = _supernet(file)
    return training_form(net, file.arch, x, inherit=form == "inherited", seed=seed, head=head, by_depth=by_depth)


def _supernet(file: ArchFile) -> tuple[nn.Module, torch.Tensor]:
    """The supernet of an arch.json, restricted to it (that may need much less memory), and an example of its images."""
    space = space_of(file)
    space = space.restrict({name: [value] for name, value in file.arch.items() if value in space[name].options})
    module = importlib.import_module("supernets." + space.name.partition(".")[0])
    return module.build(space, file.input[0], len(file.classes)), torch.zeros(2, *file.input)


def arch_file(built: Built, arch: Arch, metrics: dict[str, Any], config: Mapping[str, Any]) -> ArchFile:
    """arch.json for ``arch`` of this run, its provenance included."""
    text = json.dumps(config, sort_keys=True)
    return ArchFile.of(
        built.space.root,
        built.space.canonical(arch),
        input=built.data.shape,
        classes=tuple(built.data.classes),
        preprocess=built.data.preprocess,
        costs=built.prices(arch),
        metrics=metrics,
        provenance={
            "strategy": type(built.strategy).__name__.lower(),
            "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "seed": int(config["seed"]),
            "versions": versions(),
        },
    )


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }  # fmt: skip


