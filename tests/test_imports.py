"""Who may import whom (DESIGN.md, section 3), read from the source: nothing is imported here."""
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("search_spaces", "supernets", "nas")
OURS = (*PACKAGES, "tests")
STRATEGY_MAY = ("nas.alpha", "nas.balance", "nas.bilevel", "nas.bins", "nas.budget", "nas.cost", "nas.descent",
                "nas.divergence", "nas.importance", "nas.losses", "nas.optimizers", "nas.protocols", "nas.scales",
                "nas.schedules", "search_spaces", "torch")  # fmt: skip
SHARED = ("nas.balance", "nas.bilevel", "nas.divergence", "nas.schedules")
IMPORTANCE_MAY = ("numpy", "nas.losses", "nas.protocols", "nas.ranks", "search_spaces", "torch")
BINS_MAY = ("numpy", "nas.budget", "nas.cost", "nas.searchers.genes", "search_spaces", "torch")
SEARCHER_MAY = ("nas.cost", "nas.protocols", "nas.searchers", "search_spaces", "numpy", "torch")


def imported(module: str, source: str, package: bool = False) -> Iterator[str]:
    """The dotted names that ``source`` of ``module`` imports, "from a import b" as a.b; type-checking imports too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                above = module.split(".")[: None if package and node.level == 1 else -(node.level - package)]
                start = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def within(name: str, *parents: str) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def allowed(module: str, name: str) -> bool:
    """Whether ``module`` may import ``name``."""
    standard = name.split(".")[0] in sys.stdlib_module_names
    if within(module, "search_spaces"):
        return standard or within(name, "search_spaces", "numpy")
    if within(module, "supernets"):
        return not within(name, *OURS) or within(name, "search_spaces", "supernets")
    if within(module, "nas.strategies", *SHARED):  # what strategies share may do no more than they
        return standard or within(name, *STRATEGY_MAY)
    if module == "nas.bins":  # it draws architectures of a cost
        return standard or within(name, *BINS_MAY)
    if module == "nas.importance":  # it gathers what ranks have seen
        return standard or within(name, *IMPORTANCE_MAY)
    if within(module, "nas.searchers"):  # codes in, codes out
        return standard or within(name, *SEARCHER_MAY)
    if module in ("nas.select", "nas.limits", "nas.scores", "nas.front"):  # serve every strategy and searcher, none by name
        return not within(name, "nas.strategies", "nas.searchers", "supernets", "nas.commands", "tests")
    if module == "nas.engine":
        return not within(name, "nas.strategies", "nas.searchers", "supernets", "tests")
    return not within(name, "tests")


def breaches(module: str, source: str, package: bool = False) -> list[str]:
    return [f"{module} imports {name}" for name in imported(module, source, package) if not allowed(module, name)]


SOURCES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_keeps_the_rule(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts[-1] == "__init__"
    assert breaches(".".join(parts[:-1] if package else parts), path.read_text(encoding="utf-8"), package) == []


def test_all_three_packages_are_read() -> None:
    found = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {"search_spaces/space.py", "supernets/layers.py", "nas/protocols.py"} <= found


@pytest.mark.parametrize(("module", "source"), [
    ("search_spaces.resnet", "import torch"),
    ("search_spaces.resnet", "from torch import Tensor"),
    ("search_spaces.resnet", "def late():\n    import scipy"),
    ("search_spaces.resnet", "from supernets import resnet"),
    ("search_spaces.resnet", "from ..nas import engine"),
    ("supernets.resnet", "import nas.engine"),
    ("supernets.resnet", "from nas import cost"),
    ("supernets.resnet", "if TYPE_CHECKING:\n    from nas.cost import CostTable"),
    ("nas.strategies.tas", "from nas.strategies.darts import DARTS"),
    ("nas.strategies.tas", "from .darts import DARTS"),
    ("nas.strategies.tas", "from . import darts"),
    ("nas.strategies.tas", "from nas import engine"),
    ("nas.strategies.tas", "from nas.engine import run"),
    ("nas.strategies.tas", "from supernets.resnet import ResNet"),
    ("nas.strategies.tas", "import nas"),
    ("nas.strategies.tas", "import torchvision"),
    ("nas.strategies.tas", "import numpy"),
    ("nas.bilevel", "from nas.strategies.darts import DARTS"),
    ("nas.bilevel", "from nas.engine import moment"),
    ("nas.bins", "from nas.searchers.evolution import Evolution"),
    ("nas.divergence", "from nas.evaluate import score"),
    ("nas.searchers.evolution", "from nas.evaluate import score_archs"),
    ("nas.searchers.evolution", "from supernets.mobilenet import OFAMobileNetV3"),
    ("nas.searchers.evolution", "from nas.strategies import ofa"),
    ("nas.select", "from nas.searchers.evolution import Evolution"),
    ("nas.select", "from nas.strategies.bignas import BigNAS"),
    ("nas.select", "from supernets.mobilenet import OFAMobileNetV3"),
    ("search_spaces.patterns", "import torch"),
    ("search_spaces.patterns", "from nas.recipe import UsageError"),
    ("nas.engine", "from nas.strategies import tas"),
    ("nas.engine", "import nas.searchers.random"),
    ("nas.engine", "from supernets.resnet import ResNet"),
])
def test_the_rule_can_fail(module: str, source: str) -> None:
    assert len(breaches(module, source)) == 1


@pytest.mark.parametrize(("module", "source"), [
    ("search_spaces.resnet", "from __future__ import annotations\nimport math\nimport numpy as np"),
    ("search_spaces.resnet", "from .sizes import Size\nfrom search_spaces.space import Choice"),
    ("supernets.resnet", "import torch\nfrom search_spaces import resnet\nfrom supernets.elastic import ElasticConv"),
    ("nas.strategies.tas", "import random\nfrom torch import nn\nimport torch.nn.functional as F"),
    ("nas.strategies.tas", "from nas import alpha, losses\nfrom nas.protocols import Draw\n"
     "from search_spaces.space import Arch"),
    ("nas.strategies.darts", "from nas.bilevel import Alphas, Weights"),
    ("nas.strategies.attentive", "from nas.bins import Bins\nfrom nas.divergence import alpha_divergence"),
    ("nas.searchers.evolution", "import numpy as np\nfrom nas.cost import CostTable\nfrom nas.searchers.rounds import Rounds"),
    ("nas.select", "import torch\nfrom nas.evaluate import score_archs\nfrom nas.protocols import Searcher"),
    ("search_spaces.patterns", "from fnmatch import fnmatchcase\nfrom search_spaces.space import SearchSpace"),
    ("nas.engine", "import torch\nfrom nas.protocols import Strategy"),
    ("nas.commands.search", "from nas.strategies import tas\nfrom supernets import resnet\nimport nas.engine"),
])
def test_the_rule_allows(module: str, source: str) -> None:
    assert breaches(module, source) == []
