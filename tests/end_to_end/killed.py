"""The program in a process of its own that is killed, terminated or interrupted at a chosen point.

The processes are forked from a server that has imported everything and run nothing: each costs little, and none
inherits threads.
"""
from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["nas.commands.search", "nas.commands.retrain", "nas.strategies.tas", "nas.strategies.darts",
                                "sklearn.datasets"])  # fmt: skip
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


class At(NamedTuple):
    """The signal ``number`` when ``place`` is reached for the ``nth`` time (from 1).

    Places: "update": a step begins. "written": a checkpoint is in its temporary file. "moved": the former one is
    previous.pt, and there is no last.pt. "line": half a line of metrics is written. "scored": subnets that a searcher asked for
    have been read, but not kept. Of a run with splits: "distance": the options of one choice are compared. "begotten": the
    first checkpoints of the children are written, and split.json is not. "derived": a leaf is trained, and its arch.json is
    not written.
    """

    number: int
    place: str
    nth: int


def run(argv: Sequence[str | Path], at: At, log: Path) -> int:
    """Runs ``nas ARGV`` in a process that ``at`` befalls; its stdout and stderr go to ``log``. Returns the exit code, -9
    where it was killed."""
    process = _SERVER.Process(target=_child, args=([str(word) for word in argv], at, str(log)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _child(argv: list[str], at: At, log: str) -> None:
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    _arm(at)
    from nas.__main__ import main

    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _arm(at: At) -> None:
    """Put the signal into the functions that reach the place."""
    import nas.log
    from nas import checkpoint
    from nas.scores import ScoreFile
    from nas.splits import grow, measure
    from nas.strategies.darts import DARTS
    from nas.strategies.ofa import OFA
    from nas.strategies.plain import Plain
    from nas.strategies.tas import TAS

    reached = 0

    def reach(place: str) -> bool:
        """Counts; says whether this is the time."""
        nonlocal reached
        reached += place == at.place
        return place == at.place and reached == at.nth

    def fire() -> None:
        os.kill(os.getpid(), at.number)

    for kind in (TAS, Plain, OFA, DARTS):
        @functools.wraps(kind.update)  # recipes are checked against the signature
        def update(self: Any, *given: Any, whole: Any = kind.update) -> Any:
            if reach("update"):
                fire()
            return whole(self, *given)

        kind.update = update  # type: ignore[method-assign, assignment]

    replace, write_line = os.replace, nas.log._write_line

    def moving(source: Any, target: Any) -> None:
        if str(target).endswith("last.pt") and reach("written"):
            fire()
        replace(source, target)
        if str(target).endswith("previous.pt") and reach("moved"):
            fire()

    def writing(file: Any, row: Any) -> None:
        if reach("line"):
            file.write('{"step": 7, "train/lo')
            file.flush()
            fire()
        write_line(file, row)

    add = ScoreFile.add

    def adding(self: Any, *given: Any) -> None:
        if reach("scored"):
            fire()
        add(self, *given)

    def before(module: Any, name: str, place: str, when: Callable[..., bool] = lambda *given: True) -> None:
        """The signal before ``module.name``, of the calls that ``when`` holds of."""
        call = getattr(module, name)

        def called(*given: Any) -> Any:
            if when(*given) and reach(place):
                fire()
            return call(*given)

        setattr(module, name, called)

    before(measure, "_distances", "distance")
    before(grow, "write_whole", "begotten", lambda path, text: path.name == grow.SPLIT)
    before(grow, "write_arch", "derived")
    ScoreFile.add = adding  # type: ignore[method-assign, assignment]
    checkpoint.os.replace = moving  # type: ignore[assignment]
    nas.log._write_line = writing
