"""nas monitor [RUNS]: TensorBoard on the run folders."""
from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tensorboard import program

from nas.recipe import Parser, UsageError, parse


def _parser() -> Parser:
    parser = Parser(prog="nas monitor", description="TensorBoard on the run folders")
    parser.add_argument("runs", nargs="?", default="runs", help="a run folder, or the folder of many")
    parser.add_argument("--port", type=int, default=6006, help="0: any free one")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--debug", action="store_true")
    return parser


def run(argv: Sequence[str]) -> int:
    config = parse(_parser(), {}, argv)
    folder = Path(config.runs)
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder. nas search writes run folders under runs/.")
    logging.getLogger().setLevel(logging.WARNING)  # TensorBoard logs every request at the level that it finds
    board = program.TensorBoard()
    board.configure(argv=["tensorboard", f"--logdir={folder}", f"--port={config.port}", f"--host={config.host}"])
    try:
        url = board.launch()
    except program.TensorBoardServerException as error:
        raise UsageError(f"TensorBoard cannot start on {config.host}:{config.port}: {error}. Choose another --port.") from None
    print(url, flush=True)
    print("nas monitor: Ctrl-C stops", file=sys.stderr, flush=True)
    while True:  # until Ctrl-C
        time.sleep(3600)
