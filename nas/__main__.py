"""The command line: ``nas VERB ...`` or ``python -m nas VERB ...``."""
from __future__ import annotations

import difflib
import importlib
import logging
import sys
from collections.abc import Sequence

from nas import __version__

VERBS = {
    "spaces": "what can be searched: choices, size, costs; is a budget reachable?",
    "search": "train a supernet by a recipe's strategy and pick an architecture: arch.json",
    "extract": "turn an architecture into a plain network: a bundle",
    "retrain": "train a bundle's network, alone or with a teacher",
    "evaluate": "accuracy of a bundle, overall and per class",
    "rank": "how well a run's accuracies rank architectures of known accuracy",
    "latency": "the time of every layer shape of a supernet, as a table for budgets",
    "predict": "class names for images",
    "monitor": "TensorBoard on the run folders",
}


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
    command = importlib.import_module(f"nas.commands.{verb}")
    try:
        return command.run(rest)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, ImportError) as error:
        if "--debug" in rest:
            raise
        print(f"nas {verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        from nas import ranks

        ranks.stop()


if __name__ == "__main__":
    sys.exit(main())
