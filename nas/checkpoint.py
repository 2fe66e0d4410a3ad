"""Checkpoints: everything of a strategy that is not a hyper-parameter, written so that a kill loses nothing.

A strategy's state is ``vars(strategy)`` without the arguments of its dataclass. Allowed: modules, Descents and all else
with ``state_dict`` / ``load_state_dict``; tensors; bool, int, float, str, None; lists, tuples and dicts of these; and
``nas.protocols.Setup``, whose net is stored with the state, whose teacher once in a file of its own, and whose other
members never change.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import pickle
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nas.descent import Descent
from nas.protocols import Setup

FORMAT, VERSION = "nas-checkpoint", 1
FREE_KEYS = ("max_time", "out", "resume")  # of a config: may differ between a run and its resumption
_PLAIN = (bool, int, float, str, type(None))
_UNREADABLE = (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError)
_logger = logging.getLogger("nas")
_digests: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@runtime_checkable
class Stateful(Protocol):
    """Anything that saves and restores itself."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


def check(strategy: Any) -> None:
    """Raise TypeError, naming the attribute, where ``strategy`` holds what a checkpoint cannot."""
    for name, value in _attributes(strategy):
        _encode(value, f"{type(strategy).__name__}.{name}")


def state_of(strategy: Any) -> dict[str, Any]:
    """Attribute -> state that ``torch.load(weights_only=True)`` can read; tensors are not copied. TypeError: check."""
    return {name: _encode(value, f"{type(strategy).__name__}.{name}") for name, value in _attributes(strategy)}


def restore(strategy: Any, state: Mapping[str, Any], folder: Path | None = None) -> None:
    """Put ``state`` back into a started ``strategy``: modules, Descents and tensors in place, the rest by assignment.

    ``folder``: of the checkpoints, for the teacher's file; None where the teacher must be the stored one already.
    Raises ValueError where the attributes differ from the state's, or the teacher's file is not the one that was used.
    """
    mine = dict(_attributes(strategy))
    if set(mine) - set(state):
        raise ValueError(
            f"checkpoint of {type(strategy).__name__}: no state for {', '.join(sorted(set(mine) - set(state)))}. "
            "Resume with the strategy and the version that wrote it."
        )
    for name, stored in state.items():
        setattr(strategy, name, _decode(mine.get(name), stored, folder))


def keep_teacher(folder: Path, strategy: Any) -> None:
    """Write the teacher of the strategy's Setup to ``folder``/teacher-<sha256>.pt, unless it is there."""
    setup = _setup_of(strategy)
    if setup is not None and setup.teacher is not None:
        path = folder / f"teacher-{digest(setup.teacher)}.pt"
        if not path.exists():
            write(path, setup.teacher.state_dict())


def not_finite(strategy: Any) -> tuple[str, float] | None:
    """The first Descent of ``strategy`` with a parameter that is not finite: its name and that value; or None."""
    for name, value in _attributes(strategy):
        for descent in _descents(value):
            for p in descent.params:
                wrong = ~torch.isfinite(p.detach())
                if wrong.any():
                    return f"{name} (a parameter)", float(p.detach()[wrong][0])
    return None


def digest(module: nn.Module) -> str:
    """The sha256 of a module's state: names, types, shapes and bytes. Computed once a module, which must not change."""
    if module not in _digests:
        found = hashlib.sha256()
        for name, tensor in module.state_dict().items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        _digests[module] = found.hexdigest()
    return _digests[module]


def write(path: Path, payload: Any) -> None:
    """torch.save to a temporary file beside ``path``, made durable, then renamed. OSError leaves ``path`` as it was."""
    fresh = _write_beside(path, payload)
    os.replace(fresh, path)
    _sync_folder(path.parent)


def save(folder: Path, payload: Mapping[str, Any]) -> Path:
    """Write ``folder``/last.pt; what was last becomes previous.pt. At no instant is there neither."""
    last = folder / "last.pt"
    fresh = _write_beside(last, {"format": FORMAT, "version": VERSION, **payload})
    if last.exists():
        os.replace(last, folder / "previous.pt")
    os.replace(fresh, last)
    _sync_folder(folder)
    return last


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], Path]:
    """The payload of last.pt, or of previous.pt where last.pt is torn (one warning), and its path.

    GPU tensors arrive on ``device``. Raises FileNotFoundError where there is no checkpoint, ValueError where no
    checkpoint can be read.
    """
    paths = [folder / "last.pt", folder / "previous.pt"]
    found = [path for path in paths if path.exists()]
    if not found:
        raise FileNotFoundError(f"{folder}: neither last.pt nor previous.pt. Start the run anew.")
    failures: list[str] = []
    for path in found:
        try:
            payload = _read(path, device)
        except ValueError as error:
            failures.append(str(error))
            continue
        if path != paths[0]:
            why = failures[0] if failures else f"{paths[0]} is missing"
            _logger.warning("%s; continuing from %s (step %s)", why, path, payload["step"])
        return payload, path
    raise ValueError("; ".join(failures) + f". No readable checkpoint is left: delete {folder}, and resume, which "
                     "trains again what was in it.")


def config_hash(config: Mapping[str, Any]) -> str:
    """The sha256 of a plain config, but for ``FREE_KEYS``."""
    fixed = {key: value for key, value in config.items() if key not in FREE_KEYS}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def check_config(stored: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError, naming the dotted keys that differ, where ``given`` is not the config of ``path``."""
    if config_hash(stored) != config_hash(given):
        before, after = dict(_flat(stored)), dict(_flat(given))
        missing = object()
        keys = sorted(key for key in {*before, *after} if before.get(key, missing) != after.get(key, missing))
        shown = ", ".join(f"{key} (was {before.get(key)!r}, now {after.get(key)!r})" for key in keys)
        raise ValueError(f"{path} is of another config: {shown}. Resume with the same config, or start a new run.")


def _attributes(strategy: Any) -> Iterator[tuple[str, Any]]:
    """State attributes. A dataclass field with ``init=False`` is state; one that the constructor takes is not."""
    fields = dataclasses.fields(strategy) if dataclasses.is_dataclass(strategy) else ()
    given = {field.name for field in fields if field.init}
    setup = _setup_of(strategy)
    shared = _parts(setup) if setup is not None else set()
    for name, value in vars(strategy).items():
        if name not in given and id(value) not in shared:
            yield name, value


def _setup_of(strategy: Any) -> Setup | None:
    return next((value for value in vars(strategy).values() if isinstance(value, Setup)), None)


def _parts(setup: Setup) -> set[int]:
    """Objects that are stored with the Setup already: the net, its modules and parameters, the teacher, constants."""
    parts = {id(module) for module in setup.net.modules()} | {id(p) for p in setup.net.parameters()}
    constants = (setup.teacher, setup.loss, setup.costs, setup.space)
    return parts | {id(constant) for constant in constants if constant is not None}


def _descents(value: Any) -> Iterator[Descent]:
    if isinstance(value, Descent):
        yield value
    elif type(value) in (list, tuple):
        for item in value:
            yield from _descents(item)
    elif type(value) is dict:
        for item in value.values():
            yield from _descents(item)


def _encode(value: Any, name: str) -> Any:
    if isinstance(value, Setup):
        teacher = None if value.teacher is None else digest(value.teacher)
        return {"net": value.net.state_dict(), "teacher": teacher}
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Stateful):
        return value.state_dict()
    if type(value) in _PLAIN:
        return value
    if type(value) in (list, tuple):
        return type(value)(_encode(item, f"{name}[{i}]") for i, item in enumerate(value))
    if type(value) is dict and all(type(key) in _PLAIN for key in value):
        return {key: _encode(item, f"{name}[{key!r}]") for key, item in value.items()}
    raise TypeError(
        f"{name}: a checkpoint cannot hold {type(value).__name__}. Allowed: modules, Descents, tensors, numbers, "
        "strings, None, and plain lists, tuples and dicts of these. Make it a hyper-parameter, or derive it anew."
    )


def _decode(mine: Any, stored: Any, folder: Path | None) -> Any:
    """The restored value: ``mine`` where it can be filled in place, else ``stored``."""
    if isinstance(mine, Setup):
        mine.net.load_state_dict(stored["net"])
        _restore_teacher(mine, stored["teacher"], folder)
        return mine
    if isinstance(mine, Tensor):
        if not isinstance(stored, Tensor) or stored.shape != mine.shape or stored.dtype != mine.dtype:
            return stored
        with torch.no_grad():
            return mine.copy_(stored)
    if isinstance(mine, Stateful):
        mine.load_state_dict(stored)
        return mine
    if type(mine) in (list, tuple) and type(stored) is type(mine) and len(stored) == len(mine):
        return type(mine)(_decode(a, b, folder) for a, b in zip(mine, stored))
    if type(mine) is dict and type(stored) is dict:
        return {key: _decode(mine.get(key), value, folder) for key, value in stored.items()}
    return stored


def _restore_teacher(setup: Setup, wanted: str | None, folder: Path | None) -> None:
    if setup.teacher is None or wanted is None:
        if setup.teacher is not None or wanted is not None:
            raise ValueError("checkpoint: the run has a teacher and the state none, or the reverse. Give the same.")
        return
    if digest(setup.teacher) == wanted:
        return
    path = None if folder is None else folder / f"teacher-{wanted}.pt"
    if path is None or not path.exists():
        raise ValueError(f"checkpoint: its teacher is {wanted[:12]}, this one is another, and {path} is not there.")
    setup.teacher.load_state_dict(read(path))
    del _digests[setup.teacher]
    if digest(setup.teacher) != wanted:
        raise ValueError(f"{path}: the content is not what the name says. Restore the file, or start a new run.")


def _read(path: Path, device: torch.device | str) -> dict[str, Any]:
    payload = read(path, device)
    if not isinstance(payload, dict) or payload.get("format") != FORMAT or payload.get("version") != VERSION:
        raise ValueError(f"{path} is not a {FORMAT} of version {VERSION}")
    return payload


def read(path: Path, device: torch.device | str = "cpu") -> Any:
    """What ``write`` wrote, by ``torch.load(weights_only=True)``; every GPU's tensors to ``device``. ValueError, which names
    the file, where it is damaged."""
    places = {f"cuda:{i}": str(device) for i in range(64)}
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums that torch.save writes
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"checksum of {damaged}")
        return torch.load(path, map_location=places, weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__})") from error


def _write_beside(path: Path, payload: Any) -> Path:
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(fresh, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return fresh


def _sync_folder(folder: Path) -> None:
    """Make renames durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if not prefix and key in FREE_KEYS:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
