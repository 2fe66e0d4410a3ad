"""What is shown of a split: the numbers in the pictures, the tables, the tree as text, and what TensorBoard gets."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from nas.splits.show import BLUE, MOST, RED, cuts, sentence, shown, similarity, table, tree_text, write_board

A: dict[str, Any] = {"options": ["none", "skip", "conv"], "distances": [[0.0, 0.9, 0.25], [0.9, 0.0, 1.5], [0.25, 1.5, 0.0]],
                     "groups": [["none", "conv"], ["skip"]], "within": 0.25, "cut": 2.4}  # fmt: skip
B: dict[str, Any] = {"options": [3, 5], "distances": [[0.0, 0.125], [0.125, 0.0]], "groups": [[3], [5]], "within": 0.0,
                     "cut": 0.125}  # fmt: skip
SPLIT: dict[str, Any] = {
    "format": "nas-split", "version": 1, "by": "gradients", "level": 0, "epoch": 15, "step": 1170, "choice": "edge",
    "groups": [["none", "conv"], ["skip"]], "children": ["0", "1"], "inherit": "all", "rule": "cut", "repeats": 100,
    "samples": 1, "passes": 3000, "seconds": 12.34, "images": 192000, "measured": {"kernel": B, "edge": A},
}  # fmt: skip
EXHAUSTIVE = {**SPLIT, "by": "exhaustive", "rule": None, "measured": {}, "repeats": 0, "passes": 0, "images": 0,
              "seconds": 0.0}  # fmt: skip


def test_the_heat_map_is_one_minus_the_distances_group_by_group() -> None:
    figure = similarity(SPLIT["measured"], "edge")
    first, second = figure.axes[0], figure.axes[1]
    S = np.asarray(first.images[0].get_array())
    assert S.tolist() == [[1.0, 0.75, 1 - 0.9], [0.75, 1.0, -0.5], [1 - 0.9, -0.5, 1.0]]  # none, conv, skip
    assert [label.get_text() for label in first.get_xticklabels()] == ["none", "conv", "skip"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["none", "conv", "skip"]
    assert " ".join(text.get_text() for text in first.texts) == "1.00 0.75 0.10 0.75 1.00 -0.50 0.10 -0.50 1.00"
    assert np.asarray(second.images[0].get_array()).tolist() == [[1.0, 0.875], [0.875, 1.0]]
    assert [label.get_text() for label in second.get_xticklabels()] == ["3", "5"]
    assert {axes.images[0].get_clim() for axes in (first, second)} == {(-0.5, 1.0)}  # one scale for all
    assert {axes.images[0].get_cmap().name for axes in (first, second)} == {"cividis"}  # the same to all eyes


def test_the_groups_of_the_split_choice_are_outlined_and_no_others() -> None:
    figure = similarity(SPLIT["measured"], "edge")
    first, second = figure.axes[0], figure.axes[1]
    boxes = [patch for patch in first.patches if isinstance(patch, Rectangle)]
    assert [box.get_bbox().bounds for box in boxes] == [(-0.5, -0.5, 2, 2), (1.5, 1.5, 1, 1)]
    assert {to_hex(box.get_edgecolor()).upper() for box in boxes} == {RED} and not second.patches
    assert first.get_title() == "edge\ncut 2.4: split" and second.get_title() == "kernel\ncut 0.125"


def test_letters_are_dark_on_bright_cells_and_bright_on_dark_ones() -> None:
    axes = similarity(SPLIT["measured"], "edge").axes[0]
    assert {text.get_text(): text.get_color() for text in axes.texts} == {
        "1.00": "black", "0.75": "black", "0.10": "white", "-0.50": "white"}  # fmt: skip


def test_the_largest_cuts_are_shown_and_the_split_one_among_them() -> None:
    many = {f"c{i}": {**B, "cut": float(i)} for i in range(MOST + 3)}
    assert shown(many) == [f"c{i}" for i in range(MOST + 2, 2, -1)]
    assert shown(many, "c20") == shown(many)
    assert shown(many, "c1") == [*(f"c{i}" for i in range(MOST + 2, 3, -1)), "c1"]
    few = {name: many[name] for name in ("c1", "c2")}
    assert similarity(few).get_suptitle() == ""
    assert similarity(many, "c1").get_suptitle() == f"{MOST} of {MOST + 3} choices: the largest cuts"


def test_gradients_that_all_agree_can_be_drawn() -> None:
    same = {"a": {**B, "distances": [[0.0, 0.0], [0.0, 0.0]], "cut": 0.0}}
    assert similarity(same, "a").axes[0].images[0].get_clim() == (0.99, 1.0)


def test_nothing_measured_cannot_be_drawn() -> None:
    for draw in (similarity, cuts, shown):
        with pytest.raises(ValueError, match="No distances were measured"):
            draw({})


def test_bars_are_the_cut_and_what_is_left_within() -> None:
    axes = cuts(SPLIT["measured"], "edge").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["edge", "kernel"]
    assert [label.get_fontweight() for label in axes.get_yticklabels()] == ["bold", "normal"]
    widths = [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]
    starts = [bar.get_x() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert widths == [2.4, 0.125, 0.25, 0.0] and starts == [0, 0, 2.4, 0.125]
    assert [to_hex(bar.get_facecolor()).upper() for bar in axes.patches][:2] == [RED, BLUE]
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first bar is on top


def test_the_table_is_sorted_by_the_rule() -> None:
    assert table(SPLIT).splitlines() == [
        "| choice | cut | within | groups |", "|---|---:|---:|---|", "| **edge** | 2.4000 | 0.2500 | none, conv / skip |",
        "| kernel | 0.1250 | 0.0000 | 3 / 5 |"]  # fmt: skip
    within = table({**SPLIT, "rule": "within", "choice": "kernel"}).splitlines()
    assert [line.split(" |")[0] for line in within[2:]] == ["| **kernel**", "| edge"]
    assert table(EXHAUSTIVE).splitlines()[2:] == ["| **edge** |  |  | none, conv / skip |"]


def test_a_split_in_words() -> None:
    assert sentence(SPLIT) == (
        "After epoch 15 (step 1,170): edge was split into none, conv / skip, children 0, 1, which inherit all. By the largest "
        "cut of 2 choices, over 100 batches of 1 draw: 3,000 passes, 192,000 image-passes, 12.3 s.")  # fmt: skip
    assert "By the smallest distance within groups of 2 choices, over 100 batches of 2 draws" in sentence(
        {**SPLIT, "rule": "within", "samples": 2})  # fmt: skip
    assert sentence(EXHAUSTIVE).endswith("which inherit all. One child for each option: nothing was measured.")


def test_the_tree_is_a_nested_list() -> None:
    root = {"path": "", "epochs": [0, 15], "choice": "node1.from0", "cut": 3.4123, "options": {}, "size": 15625, "top1": None,
            "picked": False}  # fmt: skip
    child = {"path": "0", "epochs": [15, 16], "choice": "k", "cut": None, "options": {"node1.from0": ["none", "skip"]},
             "size": 6250, "top1": None, "picked": False}  # fmt: skip
    leaf = {"path": "0.1", "epochs": [16, 60], "choice": None, "cut": None, "options": {"k": [3, 5]}, "size": 20,
            "top1": 0.81239, "picked": True}  # fmt: skip
    other = {**leaf, "path": "0.10", "picked": False, "top1": None}
    ninth = {**leaf, "path": "0.9", "picked": False, "top1": None}
    text = tree_text([other, leaf, ninth, child, root])
    assert text.splitlines() == [
        "- root: 15 epochs, 15,625 architectures, split node1.from0 (cut 3.41)",
        "  - 0: node1.from0 = none, skip, 1 epoch from 15, 6,250 architectures, split k",
        "    - **0.1**: k = 3, 5, 44 epochs from 16, 20 architectures, top-1 0.8124, **picked**",
        "    - 0.9: k = 3, 5, 44 epochs from 16, 20 architectures",
        "    - 0.10: k = 3, 5, 44 epochs from 16, 20 architectures",
    ]
    assert tree_text([]) == ""


def written(folder: Path, split: dict[str, Any], **more: Any) -> EventAccumulator:
    with SummaryWriter(str(folder)) as writer:
        write_board(writer, split, 1169, **more)
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_gets_pictures_numbers_and_text(tmp_path: Path) -> None:
    before = copy.deepcopy(SPLIT)
    node = {"path": "", "epochs": [0, 15], "choice": "edge", "cut": 2.4, "options": {}, "size": 9, "top1": None,
            "picked": False}  # fmt: skip
    events = written(tmp_path, SPLIT, nodes=[node])
    assert SPLIT == before
    tags = events.Tags()
    assert sorted(tags["images"]) == ["split/cut", "split/similarity"]
    assert sorted(tags["scalars"]) == ["split/cut/edge", "split/cut/kernel", "split/within/edge", "split/within/kernel"]
    assert [(event.step, event.value) for event in events.Scalars("split/cut/kernel")] == [(1169, 0.125)]
    assert [(event.step, event.value) for event in events.Scalars("split/within/edge")] == [(1169, 0.25)]
    assert events.Images("split/similarity")[0].height > 200

    def text(tag: str) -> str:
        return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()

    assert text("split/tree") == "- root: 15 epochs, 9 architectures, split edge (cut 2.4)"
    assert text("split/table") == f"{sentence(SPLIT)}\n\n{table(SPLIT)}"


def test_an_exhaustive_split_has_text_only(tmp_path: Path) -> None:
    tags = written(tmp_path, EXHAUSTIVE).Tags()
    assert tags["images"] == [] and tags["scalars"] == [] and tags["tensors"] == ["split/table/text_summary"]
