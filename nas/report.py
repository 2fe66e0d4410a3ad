"""report.md of a search: what was asked, what was found, how healthy it was, what to do next. It holds no clock, so a killed
and resumed search writes the same report."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.budget import Budget, figure
from nas.build import Built
from nas.cost import PRICES
from nas.picks import Picks
from nas.protocols import Found
from search_spaces.space import Value

COLUMNS = {
    "health/entropy": "entropy", "health/share_skip": "skip", "health/share_none": "none",
    "health/share_narrowest": "narrowest", "mixture": "mixture top-1", "select/top1": "derived top-1", "health/gap": "gap",
    "norm": "alpha gradient norm", "subnet/smallest/top1": "smallest top-1", "subnet/middle/top1": "middle top-1",
    "subnet/largest/top1": "largest top-1",
}  # fmt: skip

ROWS, LONG = 10, 120
"""Of the table of a front: rows at most, and the longest text of an architecture that it shows."""


def write_whole(path: Path, text: str) -> None:
    """``text`` into ``path``, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def report(
    built: Built, picks: Picks, pick: Mapping[str, Any], config: Mapping[str, Any], folder: Path,
    random: Mapping[str, Any] | None = None, splits: str = "", ranking: str = "",
) -> str:  # fmt: skip
    """The report of a finished search in ``folder``. ``pick``: the one of ``picks`` that arch.json holds. ``random``: what
    ``nas.beside.compare`` found, where it was asked. ``splits``: what is to be said of several supernets; ``picks`` are then
    those of the one that serves ``pick``. ``ranking``: of known architectures, as the training went on."""
    parts = [
        f"# Search: {folder.name}",
        _asked(built, config),
        "## Result\n\n" + _found(built, picks, pick),
    ]
    if splits:
        parts.append("## Supernets\n\n" + splits + "\n\nWhat follows is of the picked one.")
    warned = warning_lines(picks.warned, picks.history[-1]["step"])
    if picks.derive:
        parts.append("## Health\n\n" + health_table(picks.history) + "\n\n" + warned)
    else:
        parts.append("## Subnets\n\n" + health_table(picks.history) + ("\n\n" + warned if picks.warned else ""))
    if ranking:
        parts.append("## Ranking\n\n" + ranking)
    if random is not None:
        parts.append("## Random search at equal cost\n\n" + comparison(random))
    return "\n\n".join([*parts, "## Go on\n\n" + _go_on(config, folder, random, _reached(built))]) + "\n"


def against_budget(budget: Budget, arch: Mapping[str, Value]) -> str:
    """What ``arch`` costs at the price of a (started) budget, beside its target, in one line."""
    unit = {"macs": "MACs", "params": "parameters"}.get(budget.price, budget.price if budget.price in PRICES else "ms")
    cost, by = budget.table.of(arch), "" if budget.price in PRICES else f" by {budget.price}"
    target = round(budget.R) if budget.price in PRICES else budget.R  # half a MAC is nothing
    share = f" ({budget.target} of the largest)" if str(budget.target).strip().endswith("%") else ""
    return f"Budget: {figure(cost)} {unit}{by}, {cost / budget.R:.1%} of the target of {figure(target)} {unit}{share}"


def settings(strategy: Any) -> str:
    """The class, and those of its arguments that are not the defaults."""
    if not dataclasses.is_dataclass(strategy):
        return type(strategy).__qualname__
    values = {field.name: getattr(strategy, field.name) for field in dataclasses.fields(strategy)
              if field.init and getattr(strategy, field.name) != _default(field)}  # fmt: skip
    said = [f"{name}={settings(value) if dataclasses.is_dataclass(value) else repr(value)}" for name, value in values.items()]
    return f"{type(strategy).__qualname__}({', '.join(said)})"


def health_table(history: Sequence[Mapping[str, float]]) -> str:
    """The first, middle and last of the readings."""
    picked = sorted({0, len(history) // 2, len(history) - 1})
    rows = [dict(history[i]) for i in picked]
    for row in rows:
        if "health/gap" in row:
            row["mixture"] = row["select/top1"] + row["health/gap"]
    shown = {tag: name for tag, name in COLUMNS.items() if any(tag in row for row in rows)}
    lines = [["after step", *shown.values()], ["---:"] * (len(shown) + 1)]
    lines += [[f"{int(row['step']) + 1:,}", *(_number(tag, row.get(tag)) for tag in shown)] for row in rows]
    words = "Entropy: 1 undecided, 0 decided. " if "health/entropy" in shown else ""
    shares = [name for name in ("skip", "none", "narrowest") if name in shown.values()]
    if shares:
        words += f"Shares of derived choices: {', '.join(shares)}. "
    return _table(lines) + f"\n\n{words}{len(history):,} readings in all: see nas monitor."


def comparison(random: Mapping[str, Any]) -> str:
    """Found against random networks, each trained alone and just as long."""
    judged, others = random["judged"], random["of"] - 1
    spread = "" if random["std"] is None else f" +- {random['std']:.4f}"
    lines = [["network", "top-1", "MACs", "params"], ["---", "---:", "---:", "---:"]]
    for name, row in (("found", random["found"]), (f"best of {others} random", random["best"])):
        lines.append([name, f"{row['top1']:.4f}", f"{row['macs']:,}", f"{row['params']:,}"])
    lines.append([f"random, mean{' +- std' if spread else ''}", f"{random['mean']:.4f}{spread}", "", ""])
    words = (f"The found network is number {random['rank']} of {random['of']}. Each network was trained alone from scratch for "
             f"{random['steps']:,} steps and read on the same {judged['n']:,} {judged['split']} images, batch norm "
             f"{judged['bn']}. Image-passes: search {random['search_image_passes']:,}, the random ones together "
             f"{random['image_passes']:,}. The best random one: `{random['best']['text']}`")  # fmt: skip
    if random["outside_budget"]:
        words += (f"\n\n{random['outside_budget']} of the random networks do not meet the strategy's budget, as none was "
                  "drawn that does: compare the MACs as well.")  # fmt: skip
    return _table(lines) + "\n\n" + words


def _asked(built: Built, config: Mapping[str, Any]) -> str:
    setup, space = built.setup, built.space
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    passes = built.strategy.passes()
    images = f"{round(setup.steps * passes) * built.data.batch_size:,} image-passes"
    if built.split is not None:
        images = f"of every path from the root supernet to a leaf: {settings(built.split)}"
    lines = [["asked", ""], ["---", "---"]]
    lines += [
        ["strategy", settings(built.strategy)],
        ["recipe", f"config.yaml, sha256 {digest[:12]}"],
        ["seed", str(config["seed"])],
        ["data", built.data.describe()],
        ["space", f"{space!r}: {len(space.free)} open choices, {float(space.size):.3g} architectures"],
        ["length", f"{setup.steps:,} steps, {setup.steps / setup.epoch_steps:g} epochs, {passes:g} passes of "
                   f"{built.data.batch_size} images a step: {images}"],
    ]  # fmt: skip
    head = config.get("head") or {}
    if head.get("dropout"):
        lines.insert(5, ["head", f"dropout {head['dropout']:g}, {head['samples']} samples"])
    return _table(lines)


def _found(built: Built, picks: Picks, pick: Mapping[str, Any]) -> str:
    costs, full = built.prices(pick["arch"]), built.prices(built.space.root.largest())
    lines = [["", "found", "of the largest"], ["---", "---:", "---:"]]
    names = {"macs": "MACs", "params": "parameters", "latency_ms": "ms by the budget's table"}
    lines += [[name, figure(costs[price]), f"{100 * costs[price] / full[price]:.1f}%"]
              for price, name in names.items() if price in costs]  # fmt: skip
    top1 = pick["metric"]
    words = (f"{top1['split']} top-1 {top1['value']:.4f} on {top1['n']:,} images, weights: {top1['weights']}, batch norm: "
             f"{top1['bn']}.")  # fmt: skip
    if picks.last is not None and picks.last["step"] != pick["step"]:
        words += (f" It was derived after step {pick['step'] + 1:,}: the best that meets the strategy's budget. The last one "
                  "misses it and is in arch-last.json.")  # fmt: skip
    if "searcher" in pick:
        words += "\n\n" + selected(pick) + "\n\n" + front_table(built, pick)
    elif not pick["fits"]:
        words += " It misses the strategy's budget, as every architecture that was derived did."
    if built.budget is not None:
        words += f"\n\n{against_budget(built.budget, pick['arch'])}."
    return f"    {built.space.text(pick['arch'])}\n\n" + _table(lines) + "\n\n" + words


def selected(pick: Mapping[str, Any]) -> str:
    """By which searcher ``pick`` was found, under which limits, among how many subnets."""
    limits = ", ".join(f"{name} = {amount}" for name, amount in pick["limits"].items()) or "none"
    return (f"Picked by {pick['searcher']}: the best of {pick['scored']:,} subnets that were scored. Limits: {limits}. "
            f"{len(pick['front']):,} of them are on the front of accuracy over MACs: pareto.csv, pareto.png.")  # fmt: skip


def front_table(built: Built, pick: Mapping[str, Any]) -> str:
    """The front that ``pick`` was taken from, from the cheapest to the dearest, and the pick, marked. Of more than ``ROWS``
    the ends, the pick, and others evenly between them."""
    text = built.space.text
    picked = Found(pick["arch"], pick["metric"]["value"], built.prices(pick["arch"]))
    others = [found for found in pick["front"] if text(found.arch) != text(picked.arch)]
    found = sorted([*others, picked], key=lambda one: (one.costs["macs"], one.score))
    at, last = found.index(picked), len(found) - 1
    shown = {round(i * last / (ROWS - 1)) for i in range(ROWS)} if last >= ROWS else set(range(last + 1))
    if at not in shown:
        shown ^= {at, min(shown - {0, last}, key=lambda i: abs(i - at))}
    lines = [["", "MACs", "parameters", "top-1", "architecture"], ["---", "---:", "---:", "---:", "---"]]
    for i in sorted(shown):
        name, mark = text(found[i].arch), "**picked**" if i == at else ""
        where = f"`{name}`" if len(name) <= LONG else "arch.json" if i == at else "see pareto.csv"
        macs, params = (f"{found[i].costs[price]:,}" for price in ("macs", "params"))
        lines.append([mark, macs, params, f"{found[i].score:.4f}", where])
    return _table(lines) + ("" if len(shown) > last else f"\n\n{len(shown)} of {last + 1:,}, evenly between the ends.")


def warning_lines(warned: Mapping[str, Mapping[str, Any]], end: float) -> str:
    """``warned``: as ``Picks`` keeps it; ``end``: the step of the last reading."""
    if not warned:
        return "No warnings."
    lines = []
    for kind, said in warned.items():
        until = "still so at the end" if said["last"] == end else f"last seen after step {said['last'] + 1:,}"
        lines.append(f"- **{kind}**, after step {said['step'] + 1:,}, {until}: {said['words']}")
    return "\n".join(lines)


def _reached(built: Built) -> str:
    """The smallest share of the largest network's MACs, in tens, that the space reaches: "40%"."""
    space = built.space
    return f"{10 * math.ceil(10 * built.costs.of(space.smallest()) / built.costs.of(space.root.largest()))}%"


def _go_on(config: Mapping[str, Any], folder: Path, random: Mapping[str, Any] | None, share: str) -> str:
    """``share``: a budget that the space reaches."""
    if "python" in config:
        return "    found.bundle('my-bundle')    # in the script that searched: the plain network\n    nas retrain my-bundle"
    run, bundle = (shlex.quote(str(path)) for path in (folder, folder / "bundle"))
    lines = [f"nas extract {run}", f"nas retrain {bundle}", f"nas rank {run} --truth TABLE.csv --value COLUMN"]
    if config.get("searcher") or (config.get("split") or {}).get("at"):
        lines.append(f"nas select {run} --macs-at-most {share}")
    if random is not None:
        best = shlex.quote(str(folder / "random-bundle"))
        lines += [f"nas extract {run} --arch {shlex.quote(random['arch'])} --from scratch --out {best}", f"nas retrain {best}"]
    return "\n".join(f"    {line}" for line in lines)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _number(tag: str, value: float | None) -> str:
    digits = ".2g" if tag == "norm" else ".4f" if tag in ("select/top1", "mixture") else ".3f"
    digits = ".4f" if tag.startswith("subnet/") else digits
    return "" if value is None else f"{value:{digits}}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
