"""What TensorBoard gets of a strategy that draws by importance: a row of p for each distribution, and N q of the images."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nas.importance import ImageImportance, Importance, PathImportance, importances
from nas.picks import Picks
from nas.ranks import Ranks
from search_spaces.nats import NAMES, OPS, Topology
from supernets.nats import Topology as Net

CPU = torch.device("cpu")


class Shown:
    """A log that keeps what it is shown."""

    def __init__(self) -> None:
        self.histograms: dict[str, Any] = {}
        self.figures: dict[str, Any] = {}

    def histogram(self, tag: str, values: torch.Tensor, step: int) -> None:
        self.histograms[tag] = values.tolist()

    def figure(self, tag: str, fig: Any, step: int) -> None:
        self.figures[tag] = fig


def shown(strategy: Any) -> Shown:
    log = Shown()
    space = Topology(C=4, N=1)
    picks = Picks(space, None, CPU, log, Ranks(0, 1, 0, True))  # type: ignore[arg-type]
    picks._draw_importances(7, strategy)
    return log


@pytest.mark.parametrize("shared", [True, False])
def test_distributions_of_paths_and_images(shared: bool) -> None:
    space = Topology(C=4, N=1)
    paths = PathImportance(space, Net(space, channels=1, classes=3), shared, 0.0, CPU)
    for k, G in enumerate(paths.G):
        G[:] = torch.tensor([0.0, 0.0, 1.0, 3.0 if k == 0 else 0.0, 0.0])
    paths.turn(0.5)
    images = ImageImportance(4, Importance(), CPU)
    images.odds = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    strategy = SimpleNamespace(paths=paths, images=images)
    assert importances(strategy) == (paths, images)
    log = shown(strategy)
    axes = log.figures["importance/path"].axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ([f"{NAMES[0]} and 5 more"] if shared else [NAMES[0], f"{NAMES[1]} and 4 more"])
    cells = axes.images[0].get_array().tolist()
    assert cells[0] == pytest.approx([0.1, 0.1, 0.225, 0.475, 0.1])
    assert [text.get_text() for text in axes.texts][:5] == list(OPS)
    assert shared or cells[1] == pytest.approx([0.1, 0.1, 0.6, 0.1, 0.1])
    assert log.histograms["importance/data"] == pytest.approx([0.4, 0.8, 1.2, 1.6])


def test_nothing_is_shown_of_what_is_uniform() -> None:
    log = shown(SimpleNamespace(images=ImageImportance(4, Importance(), CPU), weights=3))
    assert not log.figures and not log.histograms
