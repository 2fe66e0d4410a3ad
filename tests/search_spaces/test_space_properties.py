"""What holds for every space: hypothesis draws small ones with needs, restrictions and ties."""
from __future__ import annotations

import itertools
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from search_spaces.darts import Cells
from search_spaces.space import Arch, Choice, SearchSpace

few = settings(max_examples=60, deadline=None)


@st.composite
def roots(draw: st.DrawFn) -> SearchSpace:
    """One to five choices of one to three options; each may need up to two earlier ones; order shuffled."""
    choices: list[Choice] = []
    for i in range(draw(st.integers(1, 5))):
        options = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
        ordered = draw(st.booleans())
        needs = [(up.name, tuple(draw(st.lists(st.sampled_from(up.options), min_size=1, unique=True))))
                 for up in draw(st.lists(st.sampled_from(choices), max_size=2, unique=True))] if choices else []
        choices.append(Choice(f"c{i}", tuple(sorted(options) if ordered else options), ordered, tuple(needs)))
    return SearchSpace(draw(st.permutations(choices)), {})


@st.composite
def restrictions(draw: st.DrawFn, space: SearchSpace) -> SearchSpace:
    """A restriction of some of the choices that follow none."""
    names = draw(st.lists(st.sampled_from([c.name for c in space.choices if c.name not in space.ties]), unique=True))
    return space.restrict({name: draw(st.lists(st.sampled_from(space[name].options), min_size=1, unique=True))
                           for name in names})


@st.composite
def cells(draw: st.DrawFn) -> SearchSpace:
    """The smallest cells (4 edges), with or without a sum among the options."""
    ops = ["none", "skip_connect", "sep_conv_3x3", *draw(st.sampled_from([[], ["skip_connect+sep_conv_3x3"]]))]
    return Cells(4, 1, nodes=1, ops=draw(st.permutations(ops)))


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """A root, restricted and tied (where a tie is allowed) in turn."""
    space = draw(restrictions(draw(st.one_of(roots(), cells()))))
    for _ in range(draw(st.integers(0, 2))):
        follower, leader = (draw(st.sampled_from(space.choices)) for _ in range(2))
        try:
            space = space.tie(follower.name, leader.name,
                              {option: draw(st.sampled_from(follower.options)) for option in leader.options})
        except ValueError as error:
            assert "cannot follow" in str(error)
    return draw(restrictions(space))


def enumerated(space: SearchSpace) -> dict[object, Arch]:
    """Every architecture of ``space`` that check allows, canonical: by brute force over the root."""
    found: dict[object, Arch] = {}
    for values in itertools.product(*(choice.options for choice in space.root.choices)):
        arch = dict(zip((choice.name for choice in space.choices), values))
        if legal(space, arch):
            found[space.key(arch)] = space.canonical(arch)
    return found


def legal(space: SearchSpace, arch: Arch) -> bool:
    try:
        space.check(arch)
    except ValueError:
        return False
    return True


@few
@given(spaces())
def test_size_is_the_number_of_legal_canonical_architectures(space: SearchSpace) -> None:
    assert space.size == len(enumerated(space)) > 0


@few
@given(spaces(), st.integers(0, 2**32))
def test_samples_extremes_and_codes_are_legal_and_canonical(space: SearchSpace, seed: int) -> None:
    drawn = [space.sample(random.Random(seed)), space.largest(), space.smallest()]
    drawn += space.decode(space.random_codes(np.random.default_rng(seed), 5))
    for arch in drawn:
        space.check(arch)
        space.root.check(arch)
        assert space.canonical(arch) == arch == space.root.canonical(arch)


@few
@given(spaces(), st.integers(0, 2**32))
def test_canonical_is_idempotent_and_keeps_the_key(space: SearchSpace, seed: int) -> None:
    raw = space.root.decode(np.random.default_rng(seed).integers(
        0, [[len(choice.options) for choice in space.root.choices]], size=(6, len(space.choices))))
    for arch in raw:
        once = space.canonical(arch)
        assert space.canonical(once) == once
        assert space.key(arch) == space.key(once) == space.root.key(arch)
        assert legal(space, arch) == legal(space, once)
        assert space.counting(arch) == space.counting(once)
    keys = {space.key(arch) for arch in raw}
    assert len(keys) == len({tuple(row) for row in space.canonical_codes(space.encode(raw)).tolist()})


@few
@given(spaces(), st.integers(0, 2**32))
def test_encode_and_decode_are_inverse_against_the_root(space: SearchSpace, seed: int) -> None:
    shape = (4, len(space.choices))
    codes = np.random.default_rng(seed).integers(0, [[len(c.options) for c in space.root.choices]], size=shape)
    archs = space.decode(codes)
    assert (space.encode(archs) == codes).all() and space.decode(space.encode(archs)) == archs
    assert (space.root.encode(archs) == codes).all()
    assert space.decode(space.canonical_codes(codes)) == [space.canonical(arch) for arch in archs]


@few
@given(spaces(), st.integers(0, 2**32))
def test_text_reads_back_as_the_canonical_architecture(space: SearchSpace, seed: int) -> None:
    shape = (4, len(space.choices))
    codes = np.random.default_rng(seed).integers(0, [[len(c.options) for c in space.root.choices]], size=shape)
    for arch in space.decode(codes):
        assert space.parse(space.text(arch)) == space.canonical(arch)
        assert space.text(arch) == space.text(space.canonical(arch))


@few
@given(st.data())
def test_restrict_never_grows(data: st.DataObject) -> None:
    space = data.draw(spaces())
    smaller = data.draw(restrictions(space))
    assert set(enumerated(smaller)) <= set(enumerated(space)) <= set(enumerated(space.root))
    assert smaller.size <= space.size
    assert smaller.root is space.root and smaller.hash == space.hash


@few
@given(spaces(), st.integers(0, 2**32))
def test_derive_picks_a_remaining_option_and_its_canonical_form_is_legal(space: SearchSpace, seed: int) -> None:
    rng = random.Random(seed)
    odds = {c.name: [rng.random() for _ in c.options] for c in space.root.choices}
    arch = space.derive(odds)
    space.check(space.canonical(arch))
    if isinstance(space, Cells):
        return  # section 5 of the page: test_space_darts.py
    for choice, root in zip(space.choices, space.root.choices):
        if choice.name not in space.ties:
            left = {option: p for option, p in zip(root.options, odds[choice.name]) if option in choice.options}
            assert left[arch[choice.name]] == max(left.values())  # KeyError if a forbidden option was picked
        else:
            leader, values = space.ties[choice.name]
            assert arch[choice.name] == values[arch[leader]]


@few
@given(spaces(), st.integers(0, 2**32))
def test_fixing_what_counts_leaves_one_architecture(space: SearchSpace, seed: int) -> None:
    arch = space.sample(random.Random(seed))
    fixed = space.restrict({name: [arch[name]] for name in space.counting(arch)})
    assert list(enumerated(fixed).values()) == [arch] == [fixed.sample(random.Random(seed))]
    assert fixed.size == 1
