"""What every supernet promises of its forward pass and its gradients, for each entry of SUPERNETS."""
from __future__ import annotations

import copy
import random
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from supernet_entries import SUPERNETS
from supernet_entry import Entry, archs, same
from torch import Tensor, nn

from nas.protocols import Supernet
from search_spaces.space import Arch, Mixture, SearchSpace, Setting
from supernets.elastic import Leaf, Normalise

NOISE = 1e-10  # what rounding leaves of a gradient that is zero: that of a shift before a batch norm


@pytest.fixture(params=SUPERNETS, ids=lambda entry: entry.id)
def entry(request: pytest.FixtureRequest) -> Entry:
    return request.param


def one_candidate(arch: Arch) -> dict[str, Setting]:
    return {name: Mixture((value,), torch.ones(1, dtype=torch.float64, requires_grad=True)) for name, value in arch.items()}


def one_active(space: SearchSpace, arch: Arch) -> dict[str, Setting]:
    """Every option is named, one has weight and is computed."""
    found: dict[str, Setting] = {}
    for name, value in arch.items():
        options = space[name].options
        weights = torch.tensor([float(option == value) for option in options], dtype=torch.float64)
        found[name] = Mixture(options, weights, (options.index(value),))
    return found


def soft(space: SearchSpace, active: int | None = None, seed: int = 2) -> dict[str, Setting]:
    """Every choice as a mixture: of all options, or of ``active`` random ones (the others are named, not computed)."""
    generator, rng, found = torch.Generator().manual_seed(seed), random.Random(seed), {}
    for choice in space.choices:
        K = len(choice.options)
        w = torch.rand(K, generator=generator, dtype=torch.float64).add_(0.1)
        at = None if active is None else tuple(sorted(rng.sample(range(K), min(active, K))))
        found[choice.name] = Mixture(choice.options, (w / w.sum()).requires_grad_(), at)
    return found  # type: ignore[return-value]


def mixed(entry: Entry, space: SearchSpace, active: int | None = None, arch: Arch | None = None) -> dict[str, Setting]:
    """``soft``, but what refuses mixtures as in ``arch`` (None: the largest)."""
    of = space.largest() if arch is None else arch
    return soft(space, active) | {name: of[name] for name in entry.hard(space)}


def gradients(net: nn.Module, x: Tensor, arch: Mapping[str, Setting]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every parameter (zeros where there is none) of a sum in which every logit counts."""
    net.zero_grad(set_to_none=True)
    z = net(x, arch)
    factors = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)
    (z * factors).sum().backward()
    return z.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}


# -- forward ----------------------------------------------------------------------------------------------------------


def test_it_is_a_supernet(entry: Entry) -> None:
    net = entry.net()
    is_supernet = isinstance(net, Supernet)
    assert is_supernet
    assert net(entry.images(), net.space.largest()).shape == (6, 5)
    names = [module.name for module in net.modules() if isinstance(module, Leaf)]
    assert names == [path for path, module in net.named_modules() if isinstance(module, Leaf)]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_mixture_with_one_candidate_is_the_hard_arch(entry: Entry, training: bool) -> None:
    net, x = entry.net().train(training), entry.images()
    for arch in archs(net.space, 2):
        z, expected = gradients(net, x, arch)
        hard = {name: arch[name] for name in entry.hard(net.space)}
        for mixture in (one_candidate(arch) | hard, one_active(net.space, arch) | hard):
            out, found = gradients(net, x, mixture)
            assert same(out, z)
            assert all(same(found[name], expected[name]) for name in expected)


def test_two_archs_in_one_step_do_not_touch_each_other(entry: Entry) -> None:
    net, x = entry.net(), entry.images()
    a, b = archs(net.space, 2, seed=3)
    alone = [net(x, a), net(x, b)]
    first, _, second = net(x, a), net(x, mixed(entry, net.space)), net(x, b)
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1])
    assert not same(first, second, 1e-3)


@pytest.mark.parametrize("kind", ["hard", "pair", "soft"])
def test_training_writes_no_buffer(entry: Entry, kind: str) -> None:
    net = entry.net().train()
    before = {name: value.clone() for name, value in net.named_buffers()}
    setting = {"hard": net.space.largest(), "pair": mixed(entry, net.space, 2), "soft": mixed(entry, net.space)}[kind]
    gradients(net, entry.images(), setting)
    assert bool(before) == bool(entry.norms(net, net.space.largest()))
    assert all(torch.equal(before[name], value) for name, value in net.named_buffers())


def test_dropout_is_an_argument_and_only_of_training(entry: Entry) -> None:
    net, x, arch = entry.net(), entry.images(), entry.make_space().largest()
    torch.manual_seed(0)
    assert not same(net(x, arch, drop=0.5), net(x, arch), 1e-3)
    net.eval()
    assert torch.equal(net(x, arch, drop=0.5), net(x, arch))


def test_reset_draws_from_its_generator(entry: Entry) -> None:
    net = entry.net()
    states = []
    for seed in (1, 1, 2):
        net.reset(torch.Generator().manual_seed(seed))
        states.append({name: p.detach().clone() for name, p in net.named_parameters()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    drawn = [name for name, value in states[0].items() if value.ndim > 1]
    assert drawn and all(
        torch.equal(states[0][name], states[2][name]) is any(part in name for part in entry.constants) for name in drawn
    )
    norms = [module for module in net.modules() if isinstance(module, Normalise)]
    assert bool(norms) == bool(entry.norms(net, net.space.largest()))
    assert all(bool((gamma == 1).all()) for module in norms for gamma in module.weight)
    assert all(bool((beta == 0).all()) for module in norms for beta in module.bias)


def test_a_deep_copy_is_a_net_of_its_own(entry: Entry) -> None:
    net, x, arch = entry.net(), entry.images(), entry.make_space().smallest()
    twin = copy.deepcopy(net)
    z = net(x, arch)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0).add_(0.1)
    assert torch.equal(twin(x, arch), z) and not same(net(x, arch), z, 1e-3)


def test_sorted_channels_leave_the_largest_network_what_it_is(entry: Entry) -> None:
    net, x, largest = entry.net().eval(), entry.images(), entry.make_space().largest()
    z, before = net(x, largest), {name: value.clone() for name, value in net.state_dict().items()}
    if any(isinstance(module, Normalise) and len(module.weight) > 1 for module in net.modules()):
        with pytest.raises(ValueError, match=r"a scale per width, which cannot follow a sort\. Use norm 'shared'"):
            net.sort_channels()
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        return
    moved = net.sort_channels()
    names = {id(p): name for name, p in net.named_parameters()}
    for p, dim, order in moved:
        before[names[id(p)]] = before[names[id(p)]].index_select(dim, order)
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())
    assert same(net(x, largest), z)


@pytest.mark.parametrize("kind", ["hard", "pair", "soft"])
def test_channels_last_changes_nothing(entry: Entry, kind: str) -> None:
    """Values and every gradient; kernels differ by layout, and one of them reads a scale that is a view wrongly."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net, x = entry.net().to(memory_format=layout), entry.images().contiguous(memory_format=layout)
        setting: dict[str, Setting] = dict(archs(net.space, 1)[0])
        if kind != "hard":
            setting = mixed(entry, net.space, 2 if kind == "pair" else None)
        z, grads = gradients(net, x, setting)
        mixtures = {name: s.weights for name, s in setting.items() if isinstance(s, Mixture)}
        weights = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in mixtures.items()}
        found.append({"logits": z, **grads, **weights})
    assert all(same(found[1][name], found[0][name]) for name in found[0])


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.fixture
def smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """No unit is dead by chance: who gets a gradient is then a matter of structure alone."""
    for name, smooth in (("relu", F.softplus), ("hardtanh", F.softplus), ("hardswish", F.silu), ("hardsigmoid", torch.sigmoid)):
        monkeypatch.setattr(F, name, lambda x, *_, smooth=smooth, **__: smooth(x))


def test_what_refuses_mixtures_says_so(entry: Entry) -> None:
    net, arch = entry.net(), entry.make_space().largest()
    for name in entry.hard(net.space):
        with pytest.raises(ValueError, match=f"{name} is a mixture") as error:
            net(entry.images(), arch | {name: soft(net.space)[name]})
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("smooth")
def test_gradients_reach_exactly_the_weights_in_use(entry: Entry) -> None:
    net, x = entry.net().train(), entry.images()
    for arch in archs(net.space, 3, seed=4):
        _, found = gradients(net, x, arch)
        expected = {name: torch.zeros(value.shape[:2], dtype=torch.bool) for name, value in found.items()}
        for name, part in entry.used(net, arch):
            expected[name][part] = True
        for name, value in found.items():  # of a convolution: does any tap of (out, in) get a gradient?
            there = value.abs() > NOISE
            reached = there.flatten(2).any(2) if value.ndim == 4 else there
            assert torch.equal(reached, expected[name]), name


@pytest.mark.usefixtures("smooth")
def test_a_mixture_reaches_its_active_options_only(entry: Entry) -> None:
    net, x = entry.net().train(), entry.images()
    largest = net.space.largest()
    settings = mixed(entry, net.space, 2) | {name: largest[name] for name in entry.structure(net.space)}
    gradients(net, x, settings)
    checked = 0
    for name, mixture in settings.items():
        for j, option in enumerate(mixture.options if isinstance(mixture, Mixture) else ()):
            got = [p.grad is not None and bool(p.grad.any()) for p in net.owned(name, option)]
            assert all(got) if j in mixture.active else not any(got), (name, option)
            checked += len(got)
    assert bool(checked) == bool(entry.owners(net.space) - entry.structure(net.space))


@pytest.mark.usefixtures("smooth")
def test_gradients_reach_every_weight_of_a_mixture(entry: Entry) -> None:
    net, x = entry.net().train(), entry.images()
    settings = mixed(entry, net.space)
    gradients(net, x, settings)
    for name, mixture in settings.items():
        if name in entry.hard(net.space):
            continue
        assert isinstance(mixture, Mixture) and mixture.weights.grad is not None, name
        for option, grad in zip(mixture.options, mixture.weights.grad.tolist()):
            assert (grad == 0) is (option in net.space.nones), (name, option)


@pytest.mark.usefixtures("smooth")
def test_owned_parameters_get_a_gradient_iff_their_option_is_used(entry: Entry) -> None:
    """All other choices are mixed over all their options, so that nothing else decides."""
    net, x = entry.net().train(), entry.images()
    owners = set()
    for arch in (net.space.largest(), net.space.smallest(), *archs(net.space, 1, seed=9)):
        for fixed in entry.groups(net.space):
            gradients(net, x, mixed(entry, net.space, arch=arch) | {name: arch[name] for name in fixed})
            for name in fixed & net.space.counting(arch):  # what is inert is used by no option
                options = net.space[name].options
                for option in options:
                    mine = net.owned(name, option)
                    got = [p.grad is not None and bool(p.grad.any()) for p in mine]
                    assert all(got) if arch[name] == option else not any(got), (name, option, arch[name])
                    owners.update([name] if mine else [])
                of_any = {id(p) for p in net.owned(name)}
                assert {id(p) for option in options for p in net.owned(name, option)} <= of_any
    assert owners == entry.owners(net.space)
