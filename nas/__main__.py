"""The command line: ``nas VERB ...`` or ``python -m nas VERB ...``."""
from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from nas import __version__

VERBS = {
    "spaces": "what can be searched: choices, size, costs; is a budget reachable?",
    "search": "train a supernet by a recipe's strategy and pick an architecture: arch.json",
    "select": "pick for another budget from the same run, without training",
    "extract": "turn an architecture into a plain network: a bundle",
    "retrain": "train a bundle's network, alone or with a teacher",
    "evaluate": "accuracy of a bundle, overall and per class; of subnets of a run",
    "rank": "how well a run's accuracies rank architectures of known accuracy",
    "latency": "the time of every layer shape of a supernet, as a table for budgets",
    "predict": "class names for images",
    "monitor": "TensorBoard on the run folders",
}
STOPS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def usage() -> str:
    lines = [f"  nas {verb:9} {what}" for verb, what in VERBS.items()]
    return "\n".join([f"nas {__version__}: neural architecture search with weight-shared supernets", "", *lines, "",
                      "nas VERB --help says more."])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0 ok, 2 bad usage or bad input, 130 and 143 after Ctrl-C and SIGTERM."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(__version__)
        return 0
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.0)[0]
        print(f"nas: {verb!r} is not a command. Allowed: {', '.join(VERBS)}. Nearest: {near}.", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="nas: %(message)s", stream=sys.stderr)
    with stoppable(verb) as loaded:
        command = importlib.import_module(f"nas.commands.{verb}")
        from nas import ranks

        loaded()
        try:
            return command.run(rest)
        except KeyboardInterrupt:
            print(f"nas {verb}: {STOPS[signal.SIGINT]}", file=sys.stderr)
            return 128 + signal.SIGINT
        except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, ImportError) as error:
            if "--debug" in rest:
                raise
            print(f"nas {verb}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        finally:
            ranks.stop()


@contextlib.contextmanager
def stoppable(verb: str) -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM end the program with one line and 130 or 143, wherever no run has handlers of its own.

    At once until ``loaded`` is called: an import that is broken off may raise anything, and nothing is there to be saved.
    Then SIGINT is what it was, and SIGTERM raises SystemExit. What is ignored stays so (nohup, a shell's background jobs).
    """
    before: dict[signal.Signals, Any] = {}
    loading = True

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, f"nas {verb}: {STOPS[signal.Signals(number)]}\n".encode())
        if loading:
            os._exit(128 + number)
        raise SystemExit(128 + number)

    def loaded() -> None:
        nonlocal loading
        loading = False
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in STOPS}
        before = {number: was for number, was in found.items() if was not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, leave)
    try:
        yield loaded
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


if __name__ == "__main__":
    sys.exit(main())
