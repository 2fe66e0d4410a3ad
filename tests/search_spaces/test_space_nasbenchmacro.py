"""The space of NAS-Bench-Macro: its skeleton, the names of the table, which of them stand for one network, what is refused."""
from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from search_spaces.arch import ArchFile, space_of
from search_spaces.macro import ConvMacro
from search_spaces.nasbenchmacro import IDENTITY, OPTIONS, NASBenchMacro, Place

SPACE = NASBenchMacro()
NAMES = ["".join(digits) for digits in itertools.product("012", repeat=8)]


def test_the_published_form() -> None:
    """Page spaces-nb201-nats-macro, section 4."""
    assert SPACE.size == 3**8 == 6561 and SPACE.args == {}
    assert OPTIONS == ("identity", "mbconv3_3x3", "mbconv6_5x5")
    assert all(choice.options == OPTIONS and not choice.ordered for choice in SPACE.choices)
    assert (SPACE.stem, SPACE.features, [len(stage) for stage in SPACE.places]) == (32, 1280, [2, 3, 3])
    assert SPACE.places[0] == [Place("stage0.layer0", 32, 64, 2), Place("stage0.layer1", 64, 64, 1)]
    assert SPACE.places[2] == [Place("stage2.layer0", 128, 256, 2), Place("stage2.layer1", 256, 256, 1),
                               Place("stage2.layer2", 256, 256, 1)]  # fmt: skip
    assert SPACE.text(SPACE.largest()) == "22222222" and SPACE.text(SPACE.smallest()) == "00000000"


def test_every_name_of_the_table_is_written_and_read() -> None:
    archs = [SPACE.parse(name) for name in NAMES]
    assert [SPACE.text(arch) for arch in archs] == NAMES
    assert [list(arch) for arch in archs[:1]] == [[choice.name for choice in SPACE.choices]]
    assert SPACE.parse(" 02012100 ") == dict(zip(archs[0], (OPTIONS[k] for k in (0, 2, 0, 1, 2, 1, 0, 0))))
    for wrong in ("", "0201210", "020121000", "02012103", "0201210x", "2012100.0", "identity", "٠" * 8):
        with pytest.raises(ValueError, match=r"is not an architecture of nasbenchmacro.*8 digits, each 0 to 2 \(identity"):
            SPACE.parse(wrong)


def test_the_names_stand_for_3969_networks() -> None:
    """A stage of a first layer and n others has 3 (1 + 2 + .. + 2^n) networks: 3 * 3 of the first, 3 * 7 of the others."""
    archs = [SPACE.parse(name) for name in NAMES]
    assert len({SPACE.key(arch) for arch in archs}) == 9 * 21 * 21 == 3969
    normal = {SPACE.text(SPACE.normal(arch)) for arch in archs}
    assert len(normal) == 3969 and all(SPACE.text(SPACE.normal(SPACE.parse(name))) == name for name in normal)


@pytest.mark.parametrize(
    "name,normal",
    [("02012100", "02012100"), ("00000102", "00000120"), ("00102000", "00120000"), ("10001000", "10010000"),
     ("00000012", "00000012"), ("01210201", "01210210"), ("22222222", "22222222"), ("01002001", "01020010")],
)  # fmt: skip
def test_identities_behind_the_first_layer_of_a_stage_move_to_its_end(name: str, normal: str) -> None:
    """Nothing else moves: first layers stay, the order of the others stays, stages do not mix."""
    arch = SPACE.parse(name)
    assert SPACE.text(SPACE.normal(arch)) == normal
    assert SPACE.text(arch) == name  # a name stays a name


def test_restrictions_share_keys_and_a_space_of_places_has_them_all() -> None:
    arch = SPACE.parse("00001001")
    part = SPACE.restrict({"stage1.layer1": [IDENTITY]})
    part.check(arch)
    assert part.key(arch) == SPACE.key(arch) == SPACE.key(SPACE.parse("00010010"))
    assert SPACE.text(part.normal(arch)) == "00010010"
    places = NASBenchMacro(compact=False)
    assert places.normal(arch) == arch and len({places.key(places.parse(name)) for name in NAMES}) == 6561
    assert places.hash != SPACE.hash and places.args == {"compact": False}


def test_other_families_are_their_own_normal_form() -> None:
    space = ConvMacro()
    arch = space.sample(random.Random(1))
    assert space.normal(arch) == arch and space.key(arch) == tuple(arch.values())


def test_sampling_is_uniform_over_the_options_of_every_layer() -> None:
    """Over strings, not over networks. 3,000 draws: a count lies within 5 standard deviations (26 each) of a third."""
    rng = random.Random(5)
    drawn = [SPACE.text(SPACE.sample(rng)) for _ in range(3000)]
    codes = SPACE.random_codes(np.random.default_rng(5), 3000)
    for i in range(8):
        for counts in (Counter(name[i] for name in drawn), Counter(map(str, codes[:, i]))):
            assert set(counts) == set("012") and all(abs(n - 1000) < 130 for n in counts.values())
    pairs = Counter(name[3:5] for name in drawn)  # independent
    assert len(pairs) == 9 and all(abs(n - 3000 / 9) < 90 for n in pairs.values())


def test_architectures_are_written_and_read() -> None:
    space = NASBenchMacro(0.125, (2, 3), 8, compact=False)
    arch = space.sample(random.Random(3))
    assert len(space.text(arch)) == 5 and space.parse(space.text(arch)) == arch
    assert [(p.c_in, p.c_out) for stage in space.places for p in stage] == [(4, 8), (8, 8), (8, 16), (16, 16), (16, 16)]
    file = ArchFile.of(space, arch, input=(3, 8, 8), classes=("a", "b"), preprocess={}, costs={}, metrics={}, provenance={})
    again = space_of(file)
    assert again.hash == space.hash
    assert again.args == {"width": 0.125, "layers": [2, 3], "features": 8, "compact": False}


@pytest.mark.parametrize(
    "given,words",
    [({"width": 0}, r"width = 0: give a number, 1/32 or more"), ({"width": float("inf")}, "width = inf"),
     ({"width": "1"}, "width = 1: give a number"), ({"layers": ()}, r"layers = \(\): give the number of layers of each stage"),
     ({"layers": (2, 0)}, "layers = 0: give an integer"), ({"layers": 3}, "layers = 3: give the number"),
     ({"features": 0}, "features = 0: give an integer")],
)  # fmt: skip
def test_what_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        NASBenchMacro(**given)
    assert "\n" not in str(error.value)
