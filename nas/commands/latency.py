"""nas latency RECIPE: the time of every layer shape of the recipe's supernet on this machine, as a table for budgets."""
from __future__ import annotations

import json
import logging
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from nas.build import Built, assemble
from nas.commands.extract import divided
from nas.cost import CostTable
from nas.latency import ROUNDS, measure, milliseconds, read_latency, write_latency
from nas.recipe import Parser, UsageError, find, parse, read, search_parser
from supernets.extract import extract
from supernets.layers import Shape

_log = logging.getLogger("nas")
FAR = 0.3  # of the time of the whole network, that its rows may lie from it without a word


def _parser() -> Parser:
    parser = Parser(
        prog="nas latency",
        description="measures every layer shape of a supernet; a search reads the table: --strategy.budget.price TABLE.csv",
    )  # fmt: skip
    parser.add_argument("recipe", help="name or .yaml file; dotted overrides (--space.depth 20) follow")
    parser.add_argument("--out", type=str | None, default=None, help="the table; default runs/RECIPE-latency.csv")
    parser.add_argument("--batch", type=int, default=1, help="images in one pass")
    parser.add_argument("--repeats", type=int, default=20, help=f"passes of each layer in each of {ROUNDS} rounds")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    return parser


def run(argv: Sequence[str]) -> int:
    own, overrides = divided(argv)
    config = parse(_parser(), {}, own)
    if config.batch < 1 or config.repeats < 1:
        raise UsageError(f"--batch {config.batch}, --repeats {config.repeats}: too few. Allowed: 1 or more of each.")
    recipe = find(config.recipe)
    out = Path(config.out or f"runs/{recipe.stem}-latency.csv")
    if out.suffix != ".csv":
        raise UsageError(f"--out {out}: a latency table ends in .csv, so that a budget knows it.")
    if out.exists():
        raise UsageError(f"--out {out} is there already: choose another name, or delete it.")
    threads = [f"--threads={config.threads}"] if config.threads is not None else []
    built = assemble(parse(search_parser(), read(recipe), [*overrides, f"--device={config.device}", *threads]))
    shapes = shapes_of(built)
    rows = measure(shapes, built.device, config.repeats, config.batch)
    place = _place(built.device)
    note = (f"nas latency {recipe.stem}: milliseconds of one pass of a batch, float32, "
            f"the least of {ROUNDS} medians of the faster half of {config.repeats}\n"
            f"{place}, batch {config.batch}, torch {torch.__version__}")  # fmt: skip
    write_latency(out, rows, note)
    added, whole = compared(built, out, config.repeats, config.batch)
    _log.info("%d shapes on %s, batch %d; the largest network: %.4g ms by the table, %.4g ms measured as a whole",
              len(rows), place, config.batch, added, whole)  # fmt: skip
    if doubt(added, whole):
        _log.warning("%s", doubt(added, whole))
    figures = {"table": str(out), "shapes": len(rows), "sum_ms": added, "whole_ms": whole}
    print(json.dumps(figures) if config.json else out)
    return 0


def doubt(added: float, whole: float) -> str:
    """What to say where the rows of the largest network (``added`` ms) are far from its own time (``whole`` ms); else ""."""
    if abs(added - whole) <= FAR * whole:
        return ""
    more, why = ("more", "they overlap, or a whole network hides the start of each") if added > whole else (
        "less", "pools, activations and additions have no row, and a layer alone has the caches for itself")
    return (f"the table says {abs(added / whole - 1):.0%} {more} than the largest network takes as a whole. Its layers do not "
            f"simply add up ({why}), or the machine was busy. In a budget, such milliseconds order networks at best: measure "
            "again on a machine left in peace, or with a larger --batch, and quote measured times only.")  # fmt: skip


def shapes_of(built: Built) -> list[tuple[str, Shape]]:
    """Every (op, shape) that a cost table of this supernet asks a price of: all options of the root space."""
    asked: dict[tuple[str, Shape], None] = {}

    def ask(op: str, shape: Shape) -> int:
        asked[op, shape] = None
        return 0

    CostTable(built.net, built.data.shape[1:], ask)
    return list(asked)


def compared(built: Built, table: Path, repeats: int, batch: int) -> tuple[float, float]:
    """Milliseconds of the largest architecture: the sum of its rows, and its plain network as a whole, in rounds as they."""
    arch = built.space.largest()
    x = torch.ones(batch, *built.data.shape, device=built.device)
    plain = extract(built.net, arch, x, inherit=False)
    added = built.costs.priced(read_latency(table)).of(arch)
    return float(added), min(milliseconds(plain, x, repeats) for _ in range(ROUNDS))


def _place(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
