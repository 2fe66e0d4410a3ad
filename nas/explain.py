"""jsonargparse's messages in one line: what, where, what is expected, the nearest known name."""
from __future__ import annotations

import difflib
import importlib
import inspect
import re

from jsonargparse import SUPPRESS, ArgumentParser

from nas import protocols

CLASS = "Give the import path of a class (module.Class), or class_path and init_args."
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list, such as [a, b]",
         "dict": "keys and values, such as {key: value}", "NoneType": "null"}  # fmt: skip


def explain(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message as one line: key, given value, what is expected, and the nearest known name."""
    text = " ".join(message.split())
    where = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', text)))
    found = re.search(r"Problem with given class_path '([^']+)'", text)
    path = found.group(1) if found else ""
    given = re.search(r"Got value: (.*?)(?: - Expected|$)", text) or re.search(r"Given value: (.*)$", text)
    value = given.group(1) if given else ""
    for pattern, answer in (
        (r"Option '([^']+)' is not accepted", lambda m: _unknown(m.group(1), parser, path)),
        (r"Group '([^']+)' does not accept option '([^']+)'", lambda m: _unknown(f"{m.group(1)}.{m.group(2)}", parser)),
        (r"unrecognized arguments: --([^\s=]+)", lambda m: _unknown(m.group(1), parser)),
        (r"unrecognized arguments: (\S+)", lambda m: f"{m.group(1)!r} is one word too many. Options are --key value."),
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


def _unknown(name: str, parser: ArgumentParser, path: str = "") -> str:
    keys = _class_keys(path) if path else keys_of(parser)
    near = difflib.get_close_matches(name.replace("-", "_"), keys, n=1, cutoff=0.0)
    return f"{name} is not a known key{f' of {path}' if path else ''}." + (f" Nearest: {near[0]}." if near else "")


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
    methods = {key: inspect.signature(method) for key, method in vars(wanted).items()
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
    module, _, name = path.rpartition(".")
    return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
