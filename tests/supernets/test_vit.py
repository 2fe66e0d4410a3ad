"""Vision transformers: superposed leaves against loops over their candidates, relative positions against their definition."""
from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.recalibrate import recalibrate
from search_spaces.space import Arch, Mixture, Setting
from search_spaces.vit import ViT as Space
from supernets.attention import ROWS, attend, distances, positions
from supernets.extract import DropPath, extract, training_form
from supernets.tokens import TokenLinear, prefix_norms
from supernets.vit import ViT

EMBED, HEADS, RATIO = (6, 8, 12), (1, 2, 3), (1.0, 1.5, 2.0)


def space(relative: bool = True, pool: str = "mean") -> Space:
    return Space(EMBED, (1, 2, 3), HEADS, RATIO, 4, 2, 8, relative, pool)


def supernet(relative: bool = True, **settings: Any) -> Any:
    """Float64, every number random: fresh norms are alike and biases zero."""
    net = ViT(space(relative), 3, 5, **settings).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.empty_like(p).normal_(0.0, 0.5, generator=generator))
    return net


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


def gradients(make: Callable[[], Tensor], *inputs: Tensor) -> list[Tensor]:
    """Value, and the gradients of a sum in which every number counts."""
    y = make()
    found = torch.autograd.grad((y * normal(*y.shape, seed=9)).sum(), inputs, allow_unused=True, materialize_grads=True)
    return [y.detach(), *found]


# -- layer norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(6, 8, 12), (12,), (1, 12), (11, 12)])
def test_prefix_norms_are_the_norms_of_the_candidates(widths: tuple[int, ...]) -> None:
    e, K = widths[-1], len(widths)
    x = (normal(2, 5, e) * 3 + torch.linspace(-40, 40, e, dtype=torch.float64)).requires_grad_()  # segments far apart
    gamma, beta = normal(e, seed=1).requires_grad_(), normal(e, seed=2).requires_grad_()
    w = weights(*[0.2, 0.5, 0.3][:K])

    def loop() -> Tensor:
        return sum(
            (F.pad(v * F.layer_norm(x[..., :c], (c,), gamma[:c], beta[:c], 1e-5), (0, e - c)) for c, v in zip(widths, w)),
            start=torch.zeros((), dtype=torch.float64),
        )  # fmt: skip

    for mine, theirs in zip(gradients(lambda: prefix_norms(x, widths, w, gamma, beta, 1e-5), x, gamma, beta, w),
                            gradients(loop, x, gamma, beta, w)):  # fmt: skip
        close(mine, theirs)


def test_prefix_norms_keep_digits_where_the_mean_is_large() -> None:
    """Moments of squares would lose them: mean 1e4, deviation 1, in float32."""
    x = (normal(4, 12) + 1e4).float()
    one, zero = torch.ones(12), torch.zeros(12)
    found = prefix_norms(x, (6, 12), torch.tensor([0.0, 1.0]), one, zero, 1e-5)
    assert (found - F.layer_norm(x, (12,))).abs().max() < 2e-3


def test_the_norm_of_a_mixture_reads_active_options_in_any_order() -> None:
    leaf = supernet().norm
    x = normal(2, 5, 8)
    mixture = Mixture(EMBED, weights(0.3, 0.2, 0.5), (1, 0))
    found = leaf(x, {"embed": mixture})
    expected = prefix_norms(x, (6, 8), weights(0.3, 0.2), leaf.weight[:8], leaf.bias[:8], 1e-5)
    assert torch.equal(found, expected)


def test_the_full_norm_is_one_norm_over_the_widest() -> None:
    leaf = supernet(norm="full").norm
    x, w = normal(2, 5, 12), (0.2, 0.5, 0.3)
    found = leaf(x, {"embed": Mixture(EMBED, weights(*w))})
    m = torch.tensor([1.0] * 6 + [0.8] * 2 + [0.3] * 4, dtype=torch.float64)
    z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    close(found, m * (leaf.weight * z + leaf.bias))


# -- linear layers ----------------------------------------------------------------------------------------------------


def embed_ratio(net: Any, v: Tensor, w: Tensor) -> tuple[TokenLinear, TokenLinear, dict[str, Setting]]:
    mlp = net.blocks[1].mlp
    return mlp.fc0, mlp.fc1, {"embed": Mixture(EMBED, v), "layer1.ratio": Mixture(RATIO, w)}


def padded(p: Tensor, *sizes: int) -> Tensor:
    """The first ``sizes`` of ``p``, zero beyond."""
    out = torch.zeros_like(p)
    at = tuple(slice(n) for n in sizes)
    out[at] = p[at]
    return out


@pytest.mark.parametrize("both", [True, False])
def test_embed_and_ratio_are_one_joint_mask(both: bool) -> None:
    """Both sides of an MLP's weights follow embed: the padded slices of all nine pairs (page, 2.3 and 5)."""
    v, w = weights(0.2, 0.5, 0.3), weights(0.6, 0.1, 0.3)
    fc0, fc1, arch = embed_ratio(supernet(both_sides=both), v, w)
    x, h = normal(2, 5, 12).requires_grad_(), normal(2, 5, 24, seed=3).requires_grad_()

    def pairs() -> list[tuple[Tensor, int, int]]:
        return [(a * b, e, int(e * r)) for (a, e), (b, r) in itertools.product(zip(v, EMBED), zip(w, RATIO))]

    def loops() -> tuple[Tensor, Tensor]:
        first = torch.stack([F.linear(x, p * padded(fc0.weight, n, e if both else 12), p * padded(fc0.bias, n))
                             for p, e, n in pairs()]).sum(0)  # fmt: skip
        columns = pairs() if both else [(a, e, 24) for a, e in zip(v, EMBED)]
        weight = sum(p * padded(fc1.weight, e, n) for p, e, n in columns)
        second = F.linear(h, weight, sum(a * padded(fc1.bias, e) for a, e in zip(v, EMBED)))  # type: ignore[arg-type]
        return first, second

    for k, (leaf, given) in enumerate(((fc0, x), (fc1, h))):
        inputs = (given, leaf.weight, leaf.bias, v, w)
        mine = gradients(lambda leaf=leaf, given=given: leaf(given, arch), *inputs)  # type: ignore[misc]
        for a, b in zip(mine, gradients(lambda k=k: loops()[k], *inputs)):  # type: ignore[misc]
            close(a, b)
    if both:  # the product of both reaches is another mask, so the test can tell
        reach = torch.stack([p * padded(torch.ones(24, 12).double(), n, e) for p, e, n in pairs()]).sum(0)
        assert (reach - reach[:, :1] * reach[:1]).abs().max() > 0.05


def test_q_k_and_v_each_keep_their_first_heads() -> None:
    leaf = supernet().blocks[0].attention.qkv
    x, v, w = normal(2, 5, 12), weights(0.2, 0.5, 0.3), weights(0.1, 0.2, 0.7)
    found = leaf(x, {"embed": Mixture(EMBED, v), "layer0.heads": Mixture(HEADS, w)})
    for part, y in enumerate(found.split(12, -1)):
        rows = slice(12 * part, 12 * part + 12)
        weight = sum(a * b * padded(leaf.weight[rows], 4 * h, e) for a, e in zip(v, EMBED) for b, h in zip(w, HEADS))
        bias = sum(b * padded(leaf.bias[rows], 4 * h) for b, h in zip(w, HEADS))
        close(y, F.linear(x, weight, bias))  # type: ignore[arg-type]
    hard = leaf(x[..., :8], {"embed": 8, "layer0.heads": 2})
    linear = leaf.plain({"embed": 8, "layer0.heads": 2})
    assert hard.shape == (2, 5, 24) and torch.equal(linear(x[..., :8]), hard)


def test_patches_are_the_sum_of_the_padded_slices() -> None:
    leaf = supernet().patches
    x, v = normal(2, 3, 8, 8), weights(0.2, 0.5, 0.3)
    found = leaf(x, {"embed": Mixture(EMBED, v)})
    assert found.shape == (2, 17, 12)
    close(found, torch.stack([w * F.pad(leaf(x, {"embed": e}), (0, 12 - e)) for w, e in zip(v, EMBED)]).sum(0))
    close(found[:, 0, 8:], (0.3 * (leaf.token + leaf.position[0]))[8:].expand(2, -1))


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [1, 2, 4, 15, 17])
def test_relative_positions_are_looked_up_by_clamped_distance(g: int) -> None:
    tables = normal(2 * ROWS, 3)
    found = positions(tables, g)
    where = [divmod(patch, g) for patch in range(g * g)]
    rows = [[15 + max(-14, min(14, c[0] - a[0])) for c in where] for a in where]
    columns = [[45 + max(-14, min(14, c[1] - a[1])) for c in where] for a in where]
    expected = (tables[0] + tables[30]).expand(g * g + 1, g * g + 1, 3).clone()
    expected[1:, 1:] = tables[torch.tensor(rows)] + tables[torch.tensor(columns)]
    assert torch.equal(found, expected)
    assert torch.equal(distances(tables[:ROWS], g)[0, 0], tables[15])


def test_attention_is_its_definition() -> None:
    """One number at a time."""
    B, h, g, d = 2, 2, 2, 3
    N = g * g + 1
    q, k, v = (normal(B, h, N, d, seed=s) for s in (1, 2, 3))
    keys, values = normal(2 * ROWS, d, seed=4), normal(2 * ROWS, d, seed=5)
    r, s = positions(keys, g), positions(values, g)
    found = attend(q, k, v, keys, values, d, g)
    for b, i, n in itertools.product(range(B), range(h), range(N)):
        scores = [float(q[b, i, n] @ (k[b, i, m] + r[n, m])) / math.sqrt(d) for m in range(N)]
        total = sum(map(math.exp, scores))
        row = sum(math.exp(scores[m]) / total * (v[b, i, m] + s[n, m]) for m in range(N))
        close(found[b, i, n], row)  # type: ignore[arg-type]
    without = attend(q, k, v, torch.zeros_like(keys), torch.zeros_like(values), d, g)
    close(without, F.scaled_dot_product_attention(q, k, v))


def test_attention_without_relative_positions_is_torchs_own() -> None:
    net = supernet(relative=False)
    leaf, x = net.blocks[0].attention, normal(3, 17, 8)
    assert leaf.keys is None
    arch = {"embed": 8, "layer0.heads": 3}
    own = nn.MultiheadAttention(12, 3, batch_first=True, kdim=12, vdim=12).double()
    qkv, proj = leaf.qkv.plain(arch), leaf.proj.plain(arch)
    q, k, v = qkv(x).split(12, -1)
    with torch.no_grad():
        own.in_proj_weight.copy_(torch.eye(12).repeat(3, 1))
        own.in_proj_bias.zero_()
        own.out_proj.weight.copy_(torch.eye(12))
        own.out_proj.bias.zero_()
    close(leaf(x, arch), proj(own(q, k, v)[0]))


# -- the whole net ----------------------------------------------------------------------------------------------------


def one_hot(net: Any, arch: Arch) -> dict[str, Setting]:
    """Everything is computed, one option has all the weight."""
    return {c.name: Mixture(c.options, weights(*(float(o == arch[c.name]) for o in c.options))) for c in net.space.choices}


@pytest.mark.parametrize("relative", [True, False])
def test_one_hot_weights_are_the_slice(relative: bool) -> None:
    net, x = supernet(relative), normal(3, 3, 8, 8)
    rng = random.Random(0)
    for arch in (net.space.smallest(), net.space.largest(), *(net.space.sample(rng) for _ in range(4))):
        close(net(x, one_hot(net, arch)), net(x, arch), 1e-11)


def test_one_hot_weights_are_the_slice_with_outputs_masked_alone() -> None:
    """Nothing of a head without weight, or of a channel without weight, comes through though inputs are not masked."""
    net, x = supernet(both_sides=False), normal(3, 3, 8, 8)
    for arch in (net.space.smallest(), net.space.sample(random.Random(3))):
        close(net(x, one_hot(net, arch)), net(x, arch), 1e-11)


def test_a_norm_over_the_full_width_is_no_network() -> None:
    net, x = supernet(norm="full"), normal(3, 3, 8, 8)
    arch = net.space.smallest()
    assert (net(x, one_hot(net, arch)) - net(x, arch)).abs().max() > 1e-3
    close(net(x, one_hot(net, net.space.largest())), net(x, net.space.largest()), 1e-11)


def test_a_mixture_of_depths_is_the_sum_of_its_taps() -> None:
    net, x = supernet(), normal(3, 3, 8, 8)
    largest = net.space.largest()
    w = weights(0.2, 0.5, 0.3)
    features = [net.tapped(x, {**largest, "depth": d}, None)[1] for d in (1, 2, 3)]
    mixed = net.tapped(x, {**largest, "depth": Mixture((1, 2, 3), w)}, None)[1]
    close(mixed, 0.2 * features[0] + 0.5 * features[1] + 0.3 * features[2])
    with pytest.raises(ValueError, match="idle='gate' runs candidates again"):
        net(x, {**largest, "depth": Mixture((1, 2, 3), w, (0,), "gate")})
    with pytest.raises(ValueError, match="patches: idle='gate' needs separate candidates"):
        net(x, {**largest, "embed": Mixture(EMBED, w, (0,), "gate")})


def test_the_pool_is_the_spaces() -> None:
    x = normal(3, 3, 8, 8)
    for pool in ("mean", "token"):
        net: Any = ViT(space(pool=pool), 3, 5).double()
        arch = net.space.largest()
        y = net.norm(net.tapped(x, arch, None)[1], arch)
        read = y[:, 1:].mean(1) if pool == "mean" else y[:, 0]
        close(net(x, arch), F.linear(read, net.classifier.weight, net.classifier.bias))


def test_drop_path_grows_with_depth_and_spares_the_first_layer() -> None:
    net, x = supernet(), normal(8, 3, 8, 8)
    largest = net.space.largest()
    assert [block.drop_path.share for block in net.blocks] == [0.0, 0.5, 1.0]  # of the deepest network, not of each
    torch.manual_seed(0)
    first = net(x, {**largest, "depth": 1}, drop=0.9)
    assert torch.equal(first, net(x, {**largest, "depth": 1}))
    # With certainty that all is dropped in the last layer, and nothing else: the features of the layers before it.
    net.blocks[1].drop_path.share = 0.0
    tokens = net.tapped(x, largest, 1 - 1e-12)[1]
    close(tokens, net.tapped(x, {**largest, "depth": 2}, None)[1])


def test_the_training_form_drops_paths_and_has_no_head() -> None:
    net, x = supernet(), normal(6, 3, 8, 8)
    arch = net.space.largest()
    form = training_form(net.train(), arch, x, inherit=True, head=False)
    close(form(x, 0.0), net(x, arch))
    torch.manual_seed(0)
    assert (form(x, 0.5) - net(x, arch)).abs().max() > 1e-3
    plain = extract(net, arch, x)
    assert form.network.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="no auxiliary head"):
        training_form(net, arch, x, inherit=True)


def test_drop_path_by_time_alone_is_equal_in_all_layers() -> None:
    """``by_depth`` False, version 1 of the schedule: the first layer drops as the last one does."""
    net, x = supernet().train(), normal(64, 3, 8, 8)
    for by_depth, shares in ((True, [0.0, 0.5]), (False, [1.0, 1.0])):
        form = training_form(net, {**net.space.largest(), "depth": 2}, x, head=False, by_depth=by_depth)
        drops = [module for module in form.network.modules() if isinstance(module, DropPath)]
        assert [module.share for module in drops] == shares
        seen: list[Tensor] = []
        for module in drops:
            module.register_forward_hook(lambda module, given, y, seen=seen: seen.append(y))  # type: ignore[misc]
        torch.manual_seed(0)
        form(x, 1 - 1e-12)
        kept = [float((y != 0).flatten(1).any(1).double().mean()) for y in seen]  # of each layer the attention and the MLP
        assert kept[:2] == ([1.0, 1.0] if by_depth else [0.0, 0.0])
        assert all(0.25 < share < 0.75 for share in kept[2:]) if by_depth else kept[2:] == [0.0, 0.0]


def test_images_of_another_size_are_refused() -> None:
    net = supernet()
    with pytest.raises(ValueError, match=r"^patches: an image of 12 x 8 pixels, but positions for 8 x 8\.$"):
        net(normal(1, 3, 12, 8), net.space.largest())
    with pytest.raises(ValueError, match=r"positions for images of 8 x 8 pixels, given: 32 x 32\. Set the space's image"):
        net.layers((32, 32))


def test_there_is_nothing_to_recalibrate_and_no_batch_is_read() -> None:
    net = supernet()
    batches = iter([normal(1, 3, 8, 8)])
    found = recalibrate(net, [net.space.largest(), net.space.smallest()], batches)
    assert found == [{}, {}] and len(list(batches)) == 1 and list(net.buffers()) == []


def test_autocast_changes_no_more_than_digits() -> None:
    net = supernet().float()
    x, w = normal(3, 3, 8, 8).float(), torch.tensor([0.2, 0.5, 0.3])
    arch = {c.name: Mixture(c.options, w) for c in net.space.choices}
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, arch)
    assert (half.float() - net(x, arch)).abs().max() < 0.05 * net(x, arch).abs().max()
