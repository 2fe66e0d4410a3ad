"""arch.json: one architecture, its space, its input and its figures, as a flat file that any program can read.

Reading one never runs what it names: the space is looked up inside search_spaces only, and only by ``space_of``.
``arch.schema.json`` beside this file says the same as ``validate``, for other programs.
"""
from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_spaces.space import Arch, SearchSpace, Value

FORMAT = "nas-arch"
VERSION = 1


@dataclass(frozen=True)
class ArchFile:
    """The content of arch.json, named as there.

    ``space``: {"name", "args", "hash"}. ``input``: (channels, height, width). ``classes``: their names, in the order of
    the logits. ``preprocess``: {"mean", "std", "channels"}, a number a channel. ``costs``: {"macs", "params", ...}.
    ``metrics``: name -> {"value", "split", "n", "weights", ...}. ``provenance``: strategy, seed, versions, ...
    Raises ValueError for a ``space`` of another form; the rest is validated when it is read and written.
    """

    space: dict[str, Any]
    input: tuple[int, ...]
    classes: tuple[str, ...]
    preprocess: dict[str, Any]
    arch: Arch
    costs: dict[str, int | float]
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _space(self.space)
        object.__setattr__(self, "input", tuple(self.input))
        object.__setattr__(self, "classes", tuple(self.classes))

    @classmethod
    def of(cls, space: SearchSpace, arch: Mapping[str, Value], **rest: Any) -> ArchFile:
        """The file for ``arch`` of ``space``; ``rest``: the other fields. Raises ValueError where check does."""
        return cls({"name": space.name, "args": space.args, "hash": space.hash}, arch=_stored(space, arch), **rest)


def write_arch(path: str | Path, file: ArchFile, space: SearchSpace | None = None) -> None:
    """Write ``file`` whole or not at all, its arch canonical, keys in fixed order.

    ``space``: where its class is not of search_spaces. Raises ValueError for what ``validate`` or the space refuses.
    """
    path = Path(path)
    space = space_of(file) if space is None else space
    _same_space(file, space)
    file = dataclasses.replace(file, arch=_stored(space, file.arch))
    content = {key: getattr(file, key) for key in KEYS[2:]}
    content["space"] = {key: file.space[key] for key in SPACE_KEYS}
    try:
        text = json.dumps({"format": FORMAT, "version": VERSION} | content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not writable as JSON: {error}.") from None
    validate(json.loads(text))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as stream:
            stream.write(text + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_arch(path: str | Path, expect: SearchSpace | None = None) -> ArchFile:
    """The content of the arch.json at ``path``.

    ``expect``: the space that it must be for (or a restriction of it); the arch is then checked and canonical.
    Raises FileNotFoundError, or ValueError: not JSON, another format, a newer version, missing keys, another space.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file. `nas search` writes arch.json.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    try:
        validate(content)
        file = ArchFile(**{key: content[key] for key in KEYS[2:]})
        if expect is not None:
            _same_space(file, expect)
            file = dataclasses.replace(file, arch=_stored(expect, file.arch))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return file


def space_of(file: ArchFile) -> SearchSpace:
    """The (unrestricted) space that ``file`` names, built from its args.

    Only classes of search_spaces are looked up, and no other module is ever imported. Raises ValueError for other
    names, for args that the class refuses, and where the space is not the one that the file was written for.
    """
    name, args = file.space["name"], file.space["args"]
    parts = name.split(".")
    if len(parts) != 2 or not all(re.fullmatch("[A-Za-z][A-Za-z0-9_]*", part) for part in parts):
        raise ValueError(f"{name} is not a space of search_spaces. Allowed: module.Class, such as resnet.CifarResNet.")
    module_name = f"search_spaces.{parts[0]}"
    found = importlib.util.find_spec(module_name)
    kind = vars(importlib.import_module(module_name)).get(parts[1]) if found else None
    if not (isinstance(kind, type) and issubclass(kind, SearchSpace) and kind.__module__ == module_name):
        raise ValueError(f"{name} is not a space of search_spaces. A class of your own is passed as a space.")
    try:
        space = kind(**args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be built from {args}: {error}") from None
    _same_space(file, space)
    return space


def _same_space(file: ArchFile, space: SearchSpace) -> None:
    """ValueError where ``file`` was written for another space."""
    wanted = file.space
    if (wanted["name"], wanted["args"]) != (space.name, space.args):
        raise ValueError(f"arch.json is for space {_called(wanted['name'], wanted['args'])}, "
                         f"here it is {_called(space.name, space.args)}.")
    if wanted["hash"] != space.hash:
        raise ValueError(f"arch.json is for space {_called(wanted['name'], wanted['args'])} with hash "
                         f"{wanted['hash'][:15]}.., the space that those args make has {space.hash[:15]}..: "
                         "args and hash do not belong together (edited by hand, or another version's choices).")


def _called(name: str, args: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})"


def _stored(space: SearchSpace, arch: Mapping[str, Value]) -> Arch:
    """``arch`` checked against the root and canonical, each value as the option is written (12, not 12.0)."""
    space.root.check(arch)
    return space.root.decode(space.root.encode([space.root.canonical(arch)]))[0]


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a finite number")
    return value


# ---- what a file must hold: the schema in one-line errors -----------------------------------------------------------

Test = Callable[[Any], bool]
KEYS = ("format", "version", "space", "input", "classes", "preprocess", "arch", "costs", "metrics", "provenance")
SPACE_KEYS = ("name", "args", "hash")


def validate(content: Any) -> None:
    """ValueError, in one line, where ``content`` is not an arch.json of this version."""
    if not isinstance(content, dict):
        raise ValueError(f"arch.json holds one object, not {_type(content)}.")
    if content.get("format") != FORMAT:
        raise ValueError(f'format is {content.get("format")!r}, not "{FORMAT}": this is not an arch.json.')
    version: Any = content.get("version")
    if _integer(version) and version > VERSION:
        raise ValueError(f"version {version} is newer than this program reads ({VERSION}); update supernas.")
    if not _integer(version) or version != VERSION:
        raise ValueError(f"version is {version!r}. Allowed: {VERSION}.")
    _keys("arch.json", content, KEYS, closed=True)
    _space(content["space"])
    _all("input", content["input"], "three positive integers: channels, height, width",
         lambda n: _integer(n) and n >= 1, length=3)
    _all("classes", content["classes"], "a list of names, at least one", _text)
    _preprocess(content["preprocess"])
    _each("arch", content["arch"], "a number or a string", lambda value: _number(value) or isinstance(value, str))
    if not content["arch"]:
        raise ValueError("arch is empty. It sets every choice of its space.")
    _keys("costs", content["costs"], ("macs", "params"))
    for key in ("macs", "params"):
        _must(f"costs.{key}", content["costs"][key], "an integer, 0 or more", lambda n: _integer(n) and n >= 0)
    _each("costs", content["costs"], "a number, 0 or more", lambda n: _number(n) and n >= 0)
    _each("metrics", content["metrics"], "an object", lambda value: isinstance(value, dict))
    for name, metric in content["metrics"].items():
        _metric(f"metrics.{name}", metric)
    _provenance(content["provenance"])


def _space(space: Any) -> None:
    _keys("space", space, SPACE_KEYS, closed=True)
    _must("space.name", space["name"], "a name such as resnet.CifarResNet", _text)
    _must("space.args", space["args"], "an object", lambda value: isinstance(value, dict))
    _must("space.hash", space["hash"], "sha256: and 64 hexadecimal digits",
          lambda text: isinstance(text, str) and re.search("^sha256:[0-9a-f]{64}$", text) is not None)


def _preprocess(preprocess: Any) -> None:
    _keys("preprocess", preprocess, ("mean", "std", "channels"))
    _all("preprocess.mean", preprocess["mean"], "a list of numbers, one a channel", _number)
    _all("preprocess.std", preprocess["std"], "a list of positive numbers, one a channel",
         lambda n: _number(n) and n > 0)
    _must("preprocess.channels", preprocess["channels"], 'their order, such as "RGB"', _text)


def _metric(where: str, metric: dict) -> None:
    _keys(where, metric, ("value", "split", "n", "weights"))
    _must(f"{where}.value", metric["value"], "a number", _number)
    _must(f"{where}.n", metric["n"], "the number of images, 1 or more", lambda n: _integer(n) and n >= 1)
    for key in ("split", "weights"):
        _must(f"{where}.{key}", metric[key], "a name", _text)


def _provenance(provenance: Any) -> None:
    _keys("provenance", provenance, ())
    for key in ("strategy", "recipe_sha256"):
        if key in provenance:
            _must(f"provenance.{key}", provenance[key], "a string", lambda value: isinstance(value, str))
    if "seed" in provenance:
        _must("provenance.seed", provenance["seed"], "an integer", _integer)
    if "versions" in provenance:
        _each("provenance.versions", provenance["versions"], "a string", lambda value: isinstance(value, str))


def _keys(where: str, value: Any, needed: tuple[str, ...], closed: bool = False) -> None:
    """``value`` is an object with the ``needed`` keys and, where ``closed``, no other."""
    _must(where, value, "an object", lambda value: isinstance(value, dict))
    missing = [key for key in needed if key not in value]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}. Needed: {', '.join(needed)}.")
    unknown = [key for key in value if key not in needed]
    if closed and unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]}. Allowed: {', '.join(needed)}.")


def _each(where: str, value: Any, wanted: str, test: Test) -> None:
    _must(where, value, "an object", lambda value: isinstance(value, dict))
    for key, item in value.items():
        _must(f"{where}.{key}", item, wanted, test)


def _all(where: str, value: Any, wanted: str, test: Test, length: int | None = None) -> None:
    _must(where, value, wanted, lambda items: isinstance(items, list) and len(items) > 0
          and (length is None or len(items) == length) and all(test(item) for item in items))


def _must(where: str, value: Any, wanted: str, test: Test) -> None:
    if not test(value):
        shown = json.dumps(value, default=str)
        raise ValueError(f"{where} = {shown if len(shown) <= 60 else shown[:57] + '...'} must be {wanted}.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integer(value: Any) -> bool:
    return _number(value) and value == value // 1  # as JSON Schema has it: 1.0 is an integer


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _type(value: Any) -> str:
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
    return names.get(type(value), "null")
