"""What --help prints: jsonargparse expands %(default)s, but takes %% for two percent signs."""
from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import pytest
from cli import ok
from jsonargparse import ArgumentParser

import nas.commands
from nas.recipe import retrain_parser, search_parser


def parsers() -> Iterator[ArgumentParser]:
    """Of every command; nas evaluate has two."""
    for module in pkgutil.iter_modules(nas.commands.__path__):
        found = vars(importlib.import_module(f"nas.commands.{module.name}"))
        yield from (found[name]() for name in ("_parser", "_run_parser") if name in found)
    yield from (search_parser(), retrain_parser())


PARSERS = {parser.prog: parser for parser in parsers()}


@pytest.mark.parametrize("prog", PARSERS)
def test_percent_signs_are_single(prog: str) -> None:
    text = PARSERS[prog].format_help()
    assert prog in text and "%%" not in text and "%(" not in text


@pytest.mark.parametrize("verb, said", [
    ("select", "40% of the largest network"), ("spaces", "reachable? 55% or a number"), ("extract", "random:SEED@55%, or"),
])  # fmt: skip
def test_help_through_the_program(verb: str, said: str) -> None:
    assert said in " ".join(ok(verb, "--help").out.split())


def test_help_of_evaluate_on_a_run() -> None:
    assert "random:SEED@55%, or" in " ".join(PARSERS["nas evaluate RUN"].format_help().split())
    assert "%%" in _wrong().format_help()


def _wrong() -> ArgumentParser:
    """As argparse would want it."""
    parser = ArgumentParser(prog="wrong")
    parser.add_argument("--macs", help="40%% of it")
    return parser
