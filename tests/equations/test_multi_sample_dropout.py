"""Multi-sample dropout by hand, in float64: the masks, the mean of M losses, and what else is paired with M samples."""
from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch import Tensor, nn

from nas.bilevel import undropped
from nas.divergence import adaptive_divergence
from nas.engine import moment
from nas.heads import Head, MultiSampleDropout
from nas.losses import CrossEntropy, distillation, repeated, soft_cross_entropy, top1
from nas.protocols import Batch, Setup
from nas.strategies.plain import Plain
from search_spaces import darts
from search_spaces.resnet import CifarResNet
from supernets.darts import Cells
from supernets.extract import extract, training_form
from supernets.resnet import ResNet

M, B, N = 3, 4, 5
Y = torch.tensor([0, 4, 2, 2])
SOFT = torch.rand(B, N, generator=torch.Generator().manual_seed(9), dtype=torch.float64).softmax(1)
LOSSES = [CrossEntropy(), CrossEntropy(0.1), CrossEntropy(0.1, [0.5, 2.0, 1.0, 1.0, 3.0])]


def logits(seed: int, rows: int = B) -> Tensor:
    return torch.randn(rows, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(seed: int = 0) -> Tensor:
    return torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(head: Head | None = None) -> Any:
    made = ResNet(CifarResNet(8, widths=[4, 6, 8]), channels=3, classes=N).double()
    made.reset(torch.Generator().manual_seed(1))
    (head or Head()).attach(made)
    return made


# -- the module -----------------------------------------------------------------------------------------------------------


def test_masks_differ_and_samples_come_one_after_the_other() -> None:
    """Of features 1..8: each is 0 or doubled, row b of each sample is image b."""
    x = torch.arange(1.0, 9, dtype=torch.float64).reshape(2, 4)
    torch.manual_seed(0)
    out = MultiSampleDropout(0.5, 50)(x)
    assert out.shape == (100, 4)
    for m in range(50):
        part = out[2 * m : 2 * m + 2]
        assert bool(((part == 0) | (part == 2 * x)).all())
    assert len(out.reshape(50, 8).unique(dim=0)) > 40
    assert torch.allclose(out.reshape(50, 2, 4).mean(0), x, rtol=0.6)  # the mean of the masked features: 1 +- 0.14 of each


def test_one_sample_is_plain_dropout_bit_for_bit() -> None:
    """Same masks for the same state of the generator, in a net too; the gradients as well."""
    x = torch.randn(6, 7, dtype=torch.float64)
    found = []
    for module in (MultiSampleDropout(0.3, 1), nn.Dropout(0.3)):
        torch.manual_seed(5)
        found.append(module(x))
    assert torch.equal(*found) and not torch.equal(found[0], x)
    arch, both = net().space.largest(), []
    for drop, made in ((0.3, net()), (0.0, net(Head(0.3)))):
        torch.manual_seed(5)
        loss = CrossEntropy()(made(images(), arch, drop=drop), Y)
        loss.backward()
        both.append([loss, *(p.grad for p in made.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_without_training_or_rate_features_are_as_they_are() -> None:
    x = torch.randn(2, 3)
    assert MultiSampleDropout(0.5, 4).eval()(x) is x and MultiSampleDropout(0.0, 4)(x) is x
    plain, other = net(), net(Head(0.0, 8))
    assert [name for name, _ in other.named_modules()] == [name for name, _ in plain.named_modules()]
    state = torch.get_rng_state()
    assert torch.equal(other(images(), other.space.largest()), plain(images(), plain.space.largest()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("dropout", "samples"), [(1.0, 1), (-0.1, 1), (0.3, 0), (float("nan"), 1)])
def test_bad_values(dropout: float, samples: int) -> None:
    with pytest.raises(ValueError, match=r"head: dropout = .*Allowed: a rate from 0, below 1, and 1 sample or more"):
        Head(dropout, samples)


# -- losses ---------------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    """One image of class 0, two samples: p of class 0 is 1/4 and 4/5."""
    z = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]], dtype=torch.float64)
    y = torch.tensor([0])
    assert CrossEntropy()(z, y).item() == approx((math.log(4) + math.log(5 / 4)) / 2, abs=1e-14)
    assert top1(z, y).item() == 0.5
    soft = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    first = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    second = 0.25 * math.log(5 / 4) + 0.75 * math.log(5)
    assert CrossEntropy()(z, soft).item() == approx((first + second) / 2, abs=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("y", [Y, SOFT])
def test_the_loss_is_the_mean_of_the_losses(loss: CrossEntropy, y: Tensor) -> None:
    z = logits(0, M * B)
    parts = [z[m * B : (m + 1) * B] for m in range(M)]
    assert loss(z, y).item() == approx(sum(loss(part, y).item() for part in parts) / M, abs=1e-14)
    assert top1(z, y).item() == approx(sum(top1(part, y).item() for part in parts) / M, abs=1e-7)


def distances(student: Tensor, teacher: Tensor) -> list[float]:
    return [
        distillation(student, teacher, Y, 0.7, 3.0, LOSSES[2]).item(), soft_cross_entropy(student, teacher, 2.0).item(),
        adaptive_divergence(student, teacher).item(),
    ]  # fmt: skip


@pytest.mark.parametrize("many", ["student", "teacher", "both"])
def test_a_distance_is_the_mean_of_the_distances(many: str) -> None:
    """Sample m of the one meets sample m of the other, or the only one there is."""
    student, teacher = logits(1, M * B if many != "teacher" else B), logits(2, M * B if many != "student" else B)
    pairs = [(student[m * B :][:B] if many != "teacher" else student, teacher[m * B :][:B] if many != "student" else teacher)
             for m in range(M)]  # fmt: skip
    single = [distances(*pair) for pair in pairs]
    assert distances(student, teacher) == approx([sum(part) / M for part in zip(*single)], abs=1e-13)


def test_only_whole_batches_are_repeated() -> None:
    assert repeated(Y, logits(0)) is Y and repeated(Y, logits(0, 6)) is Y and repeated(Y, logits(0, 2)) is Y
    assert repeated(Y, logits(0, 8)).tolist() == [*Y.tolist(), *Y.tolist()]
    with pytest.raises(ValueError, match="batch_size"):
        CrossEntropy()(logits(0, 6), Y)
    with pytest.raises(ValueError, match="one shape"):
        adaptive_divergence(logits(0, 6), logits(1))


# -- in a network ---------------------------------------------------------------------------------------------------------


def test_features_are_computed_once() -> None:
    """B rows up to the classifier, M B rows there; and M losses of those features, masked by hand."""
    made = net(Head(0.4, M))
    rows: dict[str, list[int]] = {}
    for name, module in made.named_modules():
        if name and not any(True for _ in module.children()):
            module.register_forward_hook(lambda m, given, out, name=name: rows.setdefault(name, []).append(len(given[0])))
    seen: list[Tensor] = []
    made.classifier.head_dropout.register_forward_hook(lambda m, given, out: seen.extend((given[0], out)))
    made.classifier.register_forward_hook(lambda m, given, out: rows.setdefault("classifier", []).append(len(given[0])))
    z = made(images(), made.space.largest())
    assert z.shape == (M * B, N)
    assert rows.pop("classifier") == [M * B] and rows.pop("classifier.head_dropout") == [B]
    assert len(rows) > 5 and {n for seen in rows.values() for n in seen} == {B}
    features, masked = seen
    masks = (masked != 0).double() / 0.6
    assert torch.equal(masked, features.repeat(M, 1) * (masked != 0) / 0.6)
    W, b = made.classifier.weight, made.classifier.bias
    single = [F.cross_entropy((features * masks[m * B :][:B]) @ W.T + b, Y) for m in range(M)]
    loss, by_hand = CrossEntropy()(z, Y), torch.stack(single).mean()
    assert loss.item() == approx(by_hand.item(), abs=1e-13)
    params = [p for p in made.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(by_hand, params, allow_unused=True)
    assert sum(g is not None for g in ours) > 5
    assert all((a is b is None) or torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_evaluation_and_undropped_passes_know_nothing_of_it() -> None:
    made, plain, arch = net(Head(0.4, M)), net(), net().space.largest()
    with undropped(made):
        assert torch.equal(made(images(), arch), plain(images(), arch))
    assert made(images(), arch).shape == (M * B, N)
    made.eval(), plain.eval()
    assert torch.equal(made(images(), arch), plain(images(), arch))
    assert list(made.state_dict()) == list(plain.state_dict())
    made.load_state_dict(plain.state_dict())


def test_a_copy_has_its_own_dropout() -> None:
    made = net(Head(0.4, M))
    twin = copy.deepcopy(made)
    assert twin.classifier.head_dropout is not made.classifier.head_dropout
    arch = made.space.largest()
    twin.classifier.head_dropout.samples = 2
    made.classifier.head_dropout.eval()
    assert made(images(), arch).shape == (B, N) and twin(images(), arch).shape == (2 * B, N)


def test_the_extracted_network_has_none() -> None:
    made, arch = net(Head(0.4, M)), net().space.smallest()
    graph = extract(made, arch, images())
    assert graph.training and not any(isinstance(module, nn.Dropout) for module in graph.modules())
    assert graph.classifier._forward_pre_hooks == {} and graph(images()).shape == (B, N)  # type: ignore[union-attr]
    with undropped(made):
        assert torch.allclose(graph(images()), made(images(), arch), atol=1e-10)


def test_a_plain_network_gets_it_and_so_do_its_copies() -> None:
    graph = extract(net(), net().space.smallest(), images())
    before = list(graph.state_dict())
    Head(0.4, M).attach(graph)
    twin = copy.deepcopy(graph)
    assert list(graph.state_dict()) == list(twin.state_dict()) == before
    twin.classifier.head_dropout.samples = 2  # type: ignore[union-attr]
    assert graph(images()).shape == (M * B, N) and twin(images()).shape == (2 * B, N)
    assert twin.eval()(images()).shape == (B, N)


def test_an_auxiliary_head_is_repeated_beside_it() -> None:
    """Its own loss stays what it was: it has no dropout of its own."""
    made: Any = Cells(darts.Cells(C=4, layers=3, nodes=2), classes=N).double()
    arch, x = made.space.largest(), images()
    form = training_form(made, arch, x, seed=5)
    bare = form(x)
    Head(0.4, M).attach(form.network)
    z, beside = form(x)
    assert z.shape == beside.shape == (M * B, N)
    assert torch.equal(beside, bare[1].repeat(M, 1)) and not torch.allclose(z[:B], bare[0])
    assert CrossEntropy()(beside, Y).item() == approx(CrossEntropy()(bare[1], Y).item(), abs=1e-14)


class Unnamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)


class Chained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Sequential(nn.Linear(2, 3)), nn.ReLU(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)


def test_a_network_without_a_classifier_says_so() -> None:
    with pytest.raises(ValueError, match=r"head.dropout = 0.4: Unnamed has no module `classifier`") as error:
        Head(0.4).attach(Unnamed())
    assert "\n" not in str(error.value)
    Head(0.0, 8).attach(Unnamed())


def test_a_chain_is_entered_through_its_first_layer() -> None:
    chain = Chained()
    Head(0.4, M).attach(chain)
    assert len(chain.classifier) == 3 and chain(torch.ones(2, 2)).shape == (M * 2, 2)
    assert chain.eval()(torch.ones(2, 2)).shape == (2, 2)


def test_a_step_of_plain_taught_by_another() -> None:
    """The loss that is reported: mean over the masks of (1 - lam) CE + lam T^2 KL, the teacher answering once."""
    student, teacher = (extract(net(), net().space.smallest(), images()) for _ in range(2))
    with torch.no_grad():
        teacher.classifier.weight.mul_(30.0)  # type: ignore[operator, union-attr]
    Head(0.4, M).attach(student)
    twin = copy.deepcopy(student)
    strategy = Plain(lr=0.1)
    strategy.start(Setup(student, None, None, CrossEntropy(), teacher.eval(), 4, 4, B))
    now = moment(0, 4, 4, 1)
    torch.manual_seed(3)
    metrics = dict(strategy.update(lambda *_, **__: Batch(images(), Y, torch.arange(B)), now))
    torch.manual_seed(3)
    z, p = twin(images()), teacher(images())
    single = [distillation(z[m * B :][:B], p, Y, 0.9, 4.0, CrossEntropy()).item() for m in range(M)]
    assert float(metrics["train/loss"]) == approx(sum(single) / M, abs=1e-12) and len({*single}) == M
