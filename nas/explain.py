"""jsonargparse's messages in one line: what, where, what is expected, the nearest known name."""
from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from jsonargparse import SUPPRESS, ArgumentParser

from nas import protocols

CLASS = "Give the import path of a class (module.Class), or class_path and init_args."
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list, such as [a, b]",
         "dict": "keys and values, such as {key: value}", "NoneType": "null"}  # fmt: skip


def explain(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message as one line: key, given value, what is expected, and the nearest known name."""
    text = " ".join(message.split())
    where = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text)))
    paths = re.findall(r"Problem with given class_path '([^']+)'", text)
    path = paths[-1] if paths else ""  # the innermost: of a section of a class
    given = re.search(r"Got value: (.*?)(?: - Expected|$)", text) or re.search(r"Given value: (.*)$", text)
    value = given.group(1) if given else ""
    for pattern, answer in (
        (r"Option '([^']+)' is not accepted", lambda m: _unknown(m.group(1), parser, where, path)),
        (r"Group '([^']+)' does not accept option '([^']+)'",
         lambda m: _unknown(f"{m.group(1)}.{m.group(2)}", parser, where, path)),
        (r"unrecognized arguments: --([^\s=]+)", lambda m: _unknown(m.group(1), parser, where, path)),
        (r"unrecognized arguments: (\S+)", lambda m: f"{m.group(1)!r} is one word too many. Options are --key value."),
        (r"Unable to load config '([^']*)'", lambda m: f"{where} = {m.group(1)} is not a section. {_section(where, parser)}"),
        (r"argument (--\S+): expected one argument", lambda m: f"{m.group(1)} needs a value."),
        (r"module '([^']+)' has no attribute '([^']+)'", lambda m: f"{where}: {_no_class(m.group(1), m.group(2))}"),
        (r"No module named '([^']+)'", lambda m: f"{where} = {path}: there is no module {m.group(1)}. {CLASS}"),
        (r"Expected a dot import path string: (\S+)", lambda m: f"{where} = {m.group(1)} is not a class. {CLASS}"),
        (r"Import path (\S+) does not correspond to a subclass of (\w+)",
         lambda m: f"{where} = {_not_a(m.group(2), m.group(1))}"),
        (r"[Dd]oes not implement protocol (\w+).*(?:'class_path': '|Given value: )(\w+(?:\.\w+)+)",
         lambda m: f"{where} = {_not_a(m.group(1), m.group(2))}"),
        (r"[Dd]oes not implement protocol (\w+)", lambda m: f"{where} = {value} is not a {m.group(1)}. {CLASS}"),
        (r"the following arguments are required: (.+?)(?: - Expected|$)",
         lambda m: f"{where or parser.prog}: {path + ' needs ' if path else 'missing: '}{m.group(1)}. Give it"
                   f"{' in init_args, or as --' + where + '.KEY VALUE' if path else ''}."),
    ):  # fmt: skip
        match = re.search(pattern, text)
        if match:
            return answer(match)
    wanted = re.search(r"Subtypes: \[<class '(?:[\w.]*\.)?(\w+)'>, <class 'NoneType'>\]", text)
    kinds = [_kind(kind) for kind in re.findall(r"Expected an? (<class '[^']+'>|tuple with \d+ elements)", text)]
    if path and len(kinds) > 1:
        kinds.remove(KINDS["NoneType"])  # that would be instead of the class, not instead of its argument
    if kinds == [KINDS["NoneType"]] and wanted:
        return f"{where} = {value} is not a {wanted.group(1)}. {CLASS}"
    if kinds and value:
        return f"{where} = {value} is not valid. Expected: {' or '.join(dict.fromkeys(kinds))}."
    return text if not where or text.startswith(where) else f"{where}: {text}"


def _kind(expected: str) -> str:
    name = re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", expected)
    return KINDS.get(name, name if name.startswith("tuple") else f"a {name}").replace("tuple with", "a list of")


def _section(where: str, parser: ArgumentParser) -> str:
    """How the section ``where`` of ``parser`` is given."""
    keys = [key.removeprefix(f"{where}.") for key in keys_of(parser) if key.startswith(f"{where}.")]
    return (f"Give its keys, as --{where}.{keys[0]} VALUE, or a .yaml file of them. Allowed: {', '.join(keys)}." if keys
            else "Give keys and values, or a .yaml file of them.")  # fmt: skip


def _unknown(name: str, parser: ArgumentParser, where: str = "", path: str = "") -> str:
    """What to say of a key that nobody knows: of the class at ``path``, which ``where`` names, or of the ``parser``."""
    before = f"{where}." if path and where else ""
    keys = [before + key for key in (_class_keys(path) if path else keys_of(parser))]
    near = _nearest(f"{before}{name}".replace("-", "_"), keys)
    return f"{before}{name} is not a known key{f' of {path}' if path else ''}." + (f" Nearest: {near}." if near else "")


def _nearest(name: str, keys: Sequence[str]) -> str | None:
    """The key most like ``name``, its dots followed from the left: one that begins so, else one of the same section where that
    is known, else one of the section most like it, else whatever looks most like the whole."""
    parts, found = name.split("."), list(keys)
    for level, part in enumerate(parts):
        last = level + 1 == len(parts)
        here = {key.split(".")[level] for key in found if (key.count(".") >= level if last else key.count(".") > level)}
        known = level > 0 and last and all(key.split(".")[:level] == parts[:level] for key in found)
        begun = [key for key in sorted(here) if part and key.startswith(part)]
        near = difflib.get_close_matches(part, begun or sorted(here), n=1, cutoff=0.0 if known or begun else 0.6)
        if not near:
            found = difflib.get_close_matches(name, keys, n=1, cutoff=0.0)
            break
        found = [key for key in found if key.split(".")[level : level + 1] == near]
    return min(found, key=lambda key: key.count("."), default=None)


def _no_class(module: str, name: str) -> str:
    """What to say of a class that is not in ``module`` (a package or module that can be imported)."""
    own = [key for key, kind in vars(importlib.import_module(module)).items()
           if isinstance(kind, type) and kind.__module__ == module]  # fmt: skip
    near = difflib.get_close_matches(name, own, n=1, cutoff=0.0)
    return f"{module} has no class {name}." + (f" Nearest: {module}.{near[0]}." if near else f" {CLASS}")


def _not_a(name: str, path: str) -> str:
    """Why the class at ``path`` is no ``name``: of a protocol, the methods that it lacks or declares otherwise."""
    module, _, own = path.rpartition(".")
    kind, wanted = getattr(importlib.import_module(module), own), vars(protocols).get(name)
    if wanted is None:
        return f"{path} is not a {name}. {CLASS}"
    methods = {key: inspect.signature(method) for base in wanted.__mro__ for key, method in vars(base).items()
               if inspect.isfunction(method) and not key.startswith("_")}  # fmt: skip
    lacks = [key for key in methods if not hasattr(kind, key)]
    if lacks:
        return f"{path} is not a {name}: it lacks {', '.join(lacks)}. See nas/protocols.py."
    other = [key for key, signature in methods.items() if inspect.signature(getattr(kind, key)) != signature]
    declared = ", ".join(f"{key}{methods[key]}" for key in other).replace("'", "")
    return f"{path} is not a {name}: as in nas/protocols.py, annotations included, it must declare {declared}."


def keys_of(parser: ArgumentParser) -> list[str]:
    """The dotted keys that ``parser`` knows, without those inside classes."""
    return [action.dest for action in parser._actions if action.dest not in ("help", SUPPRESS)]


def _class_keys(path: str) -> list[str]:
    """The arguments of the class at ``path``, and dotted those of the dataclasses that they are."""
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    hints = get_type_hints(kind.__init__)
    keys: list[str] = []
    for key in inspect.signature(kind).parameters:
        section = section_of(hints.get(key))
        keys += [key, *(f"{key}.{field.name}" for field in (dataclasses.fields(section) if section else ()))]
    return keys


def section_of(hint: Any) -> type | None:
    """The dataclass that an argument is declared to be, alone or as one of several; None where it is none."""
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return kinds[0] if kinds else None
