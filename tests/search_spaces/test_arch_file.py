"""arch.json: round trip, one-line errors, and agreement of validate with the shipped JSON Schema."""
from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import search_spaces
from search_spaces.arch import ArchFile, read_arch, space_of, validate, write_arch
from search_spaces.resnet import CifarResNet
from search_spaces.space import Choice, SearchSpace

SPACE = CifarResNet(8, "tied", widths=(4, 8, 16))
SCHEMA = json.loads(Path(search_spaces.__file__).with_name("arch.schema.json").read_text(encoding="utf-8"))
METRIC = {"value": 0.921, "split": "select", "n": 5000, "weights": "inherited", "bn": "recalibrated"}


def made(space: SearchSpace = SPACE, seed: int = 0, **other: Any) -> ArchFile:
    rest: dict[str, Any] = {
        "input": (3, 32, 32), "classes": ("airplane", "chat à poil"),
        "preprocess": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "channels": "RGB"},
        "costs": {"macs": 22444472, "params": 228130, "latency_ms": 1.5}, "metrics": {"top1": METRIC},
        "provenance": {"strategy": "tas", "recipe_sha256": "00", "seed": 1, "versions": {"torch": "2.6"}, "note": None}}
    return ArchFile.of(space, space.sample(random.Random(seed)), **(rest | other))


def content(tmp_path: Path, **other: Any) -> dict:
    write_arch(tmp_path / "arch.json", made(**other))
    return json.loads((tmp_path / "arch.json").read_text(encoding="utf-8"))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), metrics=st.booleans(), kind=st.sampled_from(["tas", "tied"]))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, seed: int, metrics: bool, kind: str) -> None:
    path = tmp_path_factory.mktemp("arch") / "arch.json"
    space = CifarResNet(14, kind)
    file = made(space, seed, **({} if metrics else {"metrics": {}, "provenance": {}}))
    write_arch(path, file)
    assert read_arch(path) == read_arch(path, expect=space) == file
    assert space_of(file).choices == space.choices
    first = path.read_bytes()
    write_arch(path, read_arch(path))
    assert path.read_bytes() == first
    jsonschema.validate(json.loads(first), SCHEMA)


def test_the_file_is_canonical_flat_and_in_fixed_order(tmp_path: Path) -> None:
    space = CifarResNet(14)
    raw = space.largest() | {"stage1.depth": 1}
    file = dataclasses.replace(made(space), arch=dict(reversed(raw.items())))
    write_arch(tmp_path / "arch.json", file)
    text = (tmp_path / "arch.json").read_text(encoding="utf-8")
    read = json.loads(text)
    assert text.endswith("}\n") and not text.endswith("\n\n")
    assert list(read) == SCHEMA["required"] and list(read["space"]) == ["name", "args", "hash"]
    assert list(read["arch"].items()) == list(space.canonical(raw).items())
    assert read["arch"]["stage1.block1.conv0.width"] == 9 and raw["stage1.block1.conv0.width"] == 32
    assert read["space"] == {"name": "resnet.CifarResNet", "args": {"depth": 14, "kind": "tied"}, "hash": space.hash}
    assert [path.name for path in tmp_path.iterdir()] == ["arch.json"]


def test_numbers_are_stored_as_the_options_are_written(tmp_path: Path) -> None:
    numpy_ints: dict[str, Any] = {name: np.int64(value) for name, value in SPACE.largest().items()}
    file = dataclasses.replace(made(), arch=numpy_ints)
    write_arch(tmp_path / "arch.json", file)
    assert read_arch(tmp_path / "arch.json").arch == SPACE.largest()
    floats = {name: float(value) for name, value in SPACE.largest().items()}
    stored = ArchFile.of(SPACE, floats, input=(), classes=(), preprocess={}, costs={}).arch
    assert stored == SPACE.largest() and {type(value) for value in stored.values()} == {int}


def test_what_is_refused_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "arch.json"
    write_arch(path, made())
    before = path.read_bytes()
    wrong = [
        (made(costs={"macs": 1}), "costs lacks params"),
        (made(costs={"macs": np.int64(1), "params": 1}), "not writable as JSON: Object of type int64"),
        (made(metrics={"top1": METRIC | {"value": float("nan")}}), "not writable as JSON: Out of range"),
        (made(input=(3, 32)), r"input = \[3, 32\] must be three positive integers"),
        (dataclasses.replace(made(), arch=SPACE.largest() | {"stage0.width": 5}),
         r"stage0.width = 5 is not in this space"),
        (dataclasses.replace(made(), arch={}), "does not set stage0.width and 8 more"),
    ]
    for file, line in wrong:
        with pytest.raises(ValueError, match=line):
            write_arch(path, file)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["arch.json"]


def test_a_restricted_space_writes_for_its_root(tmp_path: Path) -> None:
    small = SPACE.restrict({"stage0.width": [2, 3]})
    write_arch(tmp_path / "arch.json", made(small))
    assert read_arch(tmp_path / "arch.json", expect=small) == read_arch(tmp_path / "arch.json", expect=SPACE)
    assert space_of(read_arch(tmp_path / "arch.json"))["stage0.width"].options == (1, 2, 3, 4)


# ---- reading ----------------------------------------

def test_no_file_and_no_json(tmp_path: Path) -> None:
    path = tmp_path / "arch.json"
    with pytest.raises(FileNotFoundError, match=r"arch.json: there is no such file"):
        read_arch(path)
    for text in (b"{", b"\xff\xfe", b"[" * 200_000, b'{"a": NaN}', b'{"a": 1e999}', b""):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"arch.json is not JSON: ") as error:
            read_arch(path)
        assert "\n" not in str(error.value)


def changed(base: dict, *keys: str, to: Any) -> dict:
    """``base`` with one value at ``keys`` replaced, or dropped where ``to`` is ``...``."""
    result = copy.deepcopy(base)
    at = result
    for key in keys[:-1]:
        at = at[key]
    if to is ...:
        del at[keys[-1]]
    else:
        at[keys[-1]] = to
    return result


WRONG: list[tuple[tuple[str, ...], Any, str]] = [
    (("format",), "onnx", r"""format is 'onnx', not "nas-arch": this is not an arch.json"""),
    (("format",), ..., "format is None"),
    (("version",), 2, r"version 2 is newer than this program reads \(1\); update supernas"),
    (("version",), True, "version is True. Allowed: 1"), (("version",), 0, "version is 0. Allowed: 1"),
    (("version",), "1", "version is '1'. Allowed: 1"),
    (("classes",), ..., "arch.json lacks classes. Needed: format, version, space"),
    (("extra",), 1, "arch.json has the unknown key extra. Allowed: format"),
    (("space",), [], r"space = \[\] must be an object"), (("space", "hash"), ..., "space lacks hash"),
    (("space", "hash"), "sha256:xyz", "space.hash = \"sha256:xyz\" must be sha256: and 64"),
    (("space", "path"), "/", "space has the unknown key path"),
    (("space", "name"), "", "space.name = \"\" must be"),
    (("space", "args"), None, "space.args = null must be an object"),
    (("input",), [3, 32], "input = .* must be three positive integers"), (("input",), [3, 32, 0], "input = "),
    (("input",), [3, 32, True], "input = "), (("input",), [3, 32, 1.5], "input = "), (("input",), 3, "input = 3 must"),
    (("classes",), [], r"classes = \[\] must be a list of names"), (("classes",), [""], "classes = "),
    (("classes",), "cat", "classes = "), (("preprocess", "mean"), ..., "preprocess lacks mean"),
    (("preprocess", "mean"), [], "preprocess.mean = "), (("preprocess", "std"), [0.0], "preprocess.std = .* positive"),
    (("preprocess", "channels"), 3, "preprocess.channels = 3 must be"), (("arch",), {}, "arch is empty"),
    (("arch",), None, "arch = null must be an object"),
    (("arch", "stage0.width"), None, "arch.stage0.width = null must"),
    (("arch", "stage0.width"), True, "arch.stage0.width = true must be a number or a string"),
    (("arch", "stage0.width"), [4], "arch.stage0.width = "), (("costs", "macs"), ..., "costs lacks macs"),
    (("costs", "macs"), 1.5, "costs.macs = 1.5 must be an integer"), (("costs", "params"), -1, "costs.params = -1"),
    (("costs", "latency_ms"), "1", "costs.latency_ms = \"1\" must be a number"), (("costs",), [], "costs = "),
    (("metrics",), [], "metrics = "), (("metrics", "top1"), 0.9, "metrics.top1 = 0.9 must be an object"),
    (("metrics", "top1", "split"), ..., "metrics.top1 lacks split"),
    (("metrics", "top1", "n"), 0, "metrics.top1.n = 0"),
    (("metrics", "top1", "value"), "1", "metrics.top1.value = "),
    (("metrics", "top1", "weights"), "", "top1.weights = "),
    (("provenance",), "me", "provenance = \"me\" must be an object"),
    (("provenance", "seed"), 1.5, "provenance.seed = "),
    (("provenance", "strategy"), None, "provenance.strategy = null"), (("provenance", "versions"), [], "versions = "),
    (("provenance", "versions"), {"torch": 2}, "provenance.versions.torch = 2 must be a string"),
]
RIGHT: list[tuple[tuple[str, ...], Any]] = [
    (("version",), 1.0), (("input",), [1, 28.0, 28]), (("costs", "macs"), 0), (("arch", "op"), "skip"),
    (("arch", "stage0.width"), 0.5), (("preprocess", "size"), 224), (("metrics",), {}), (("provenance",), {}),
    (("provenance", "seed"), 2.0), (("costs", "energy"), 0.1), (("metrics", "top1", "seeds"), [1, 2]),
]


def agrees(value: Any) -> bool:
    """Whether ``value`` is valid, by the schema; validate must say the same."""
    valid = jsonschema.Draft202012Validator(SCHEMA).is_valid(value)
    try:
        validate(value)
    except ValueError as error:
        assert not valid, error
        assert "\n" not in str(error)
    else:
        assert valid, value
    return valid


@pytest.mark.parametrize(("keys", "to", "line"), WRONG)
def test_wrong_content_in_one_line_and_by_the_schema(tmp_path: Path, keys: tuple, to: Any, line: str) -> None:
    wrong = changed(content(tmp_path), *keys, to=to)
    (tmp_path / "arch.json").write_text(json.dumps(wrong), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"arch.json: .*{line}"):
        read_arch(tmp_path / "arch.json")
    assert not agrees(wrong)


@pytest.mark.parametrize(("keys", "to"), RIGHT)
def test_right_content_by_both(tmp_path: Path, keys: tuple, to: Any) -> None:
    assert agrees(changed(content(tmp_path), *keys, to=to))


@pytest.mark.parametrize("value", [None, [], 3, "x", True, {}])
def test_not_even_an_object(value: Any) -> None:
    assert not agrees(value)


junk = st.recursive(st.none() | st.booleans() | st.integers(-2, 3) | st.floats(-1, 2) | st.sampled_from(["", "x"]),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["n", "x"]), inner))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_validate_agrees_with_the_schema_on_any_change(tmp_path_factory: pytest.TempPathFactory,
                                                       data: st.DataObject) -> None:
    value = content(tmp_path_factory.mktemp("arch"))
    for _ in range(data.draw(st.integers(1, 2))):
        keys: list[str] = []
        at: Any = value
        while isinstance(at, dict) and at and (not keys or data.draw(st.booleans())):
            keys.append(data.draw(st.sampled_from(sorted(at))))
            at = at[keys[-1]]
        value = changed(value, *keys, to=data.draw(junk | st.just(...)))
    agrees(value)


# ---- spaces ----------------------------------------

def test_another_space_than_expected(tmp_path: Path) -> None:
    write_arch(tmp_path / "arch.json", made())
    with pytest.raises(ValueError) as error:
        read_arch(tmp_path / "arch.json", expect=CifarResNet(20))
    assert str(error.value) == (
        f"{tmp_path / 'arch.json'}: arch.json is for space resnet.CifarResNet(depth=8, kind='tied', "
        "widths=[4, 8, 16]), here it is resnet.CifarResNet(depth=20, kind='tied').")


def test_expected_space_checks_and_canonicalises(tmp_path: Path) -> None:
    path, space = tmp_path / "arch.json", CifarResNet(14)
    wrong = content(tmp_path, space=space)
    path.write_text(json.dumps(changed(wrong, "arch", "stage0.width", to=5)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"arch.json: stage0.width = 5 is not .* Allowed: 4, 6, .* Nearest: 4"):
        read_arch(path, expect=space)
    raw = space.smallest() | {"stage0.block1.conv0.width": 16}
    path.write_text(json.dumps(changed(wrong, "arch", to=raw)), encoding="utf-8")
    assert read_arch(path, expect=space).arch == space.smallest()


@pytest.mark.parametrize("name", [
    "os.system", "json.JSONDecoder", "nas.strategies.TAS", "resnet", "resnet.", ".CifarResNet", "..os.path",
    "resnet.SearchSpace", "resnet.Stage", "resnet.Residual", "resnet.width_options", "resnet.Nothing",
    "nothing.CifarResNet", "__init__.X", "space.Choice", "arch.ArchFile", "resnet.CifarResNet.x",
    "resnet.CifarResNet\n",
])
def test_only_spaces_of_this_package_are_looked_up(name: str) -> None:
    file = dataclasses.replace(made(), space=made().space | {"name": name})
    with pytest.raises(ValueError, match="is not a space of search_spaces"):
        space_of(file)


@pytest.mark.parametrize(("change", "line"), [
    ({"hash": "sha256:" + "0" * 64}, r"sha256:00000000.., the space that those args make has sha256:.*: args and hash"),
    ({"args": {"depth": 21}}, r"resnet.CifarResNet cannot be built from {'depth': 21}: depth = 21 is not"),
    ({"args": {"breadth": 21}}, r"cannot be built from {'breadth': 21}: .* unexpected keyword"),
    ({"args": {"depth": 8, "widths": 3}}, r"cannot be built from"),
    ({"args": {"depth": 8}}, r"arch.json is for space resnet.CifarResNet\(depth=8\), here it is .*kind='tied'"),
    ({"name": "space.SearchSpace", "args": {}}, r"space.SearchSpace cannot be built from {}"),
])
def test_space_of_refuses(change: dict, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        space_of(dataclasses.replace(made(), space=made().space | change))


class Own(SearchSpace):
    """A user's space, outside the package."""

    def __init__(self) -> None:
        super().__init__([Choice("op", ("skip", "conv"), ordered=False)], {})


def test_a_users_own_space_is_passed_never_imported(tmp_path: Path) -> None:
    file = made(Own())
    with pytest.raises(ValueError, match=r"Own is not a space of search_spaces"):
        write_arch(tmp_path / "arch.json", file)
    write_arch(tmp_path / "arch.json", file, space=Own())
    assert read_arch(tmp_path / "arch.json", expect=Own()).arch == file.arch
