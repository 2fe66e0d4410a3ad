"""What a checkpoint holds of a strategy, and that its files survive damage."""
from __future__ import annotations

import copy
import logging
import os
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from nas import checkpoint
from nas.checkpoint import check, check_config, config_hash, load, restore, save, state_of
from nas.descent import Descent
from nas.losses import CrossEntropy
from nas.protocols import Setup


@dataclass
class Toy:
    """One of everything that is allowed."""

    rate: float = 0.1
    names: Any = field(default_factory=set)  # a hyper-parameter: not stored, so any type
    seen: int = field(default=0, init=False)

    def start(self, setup: Setup) -> None:
        self.setup, self.net, self.head = setup, setup.net, setup.net[0]
        self.teacher: Any = setup.teacher
        self.loss = setup.loss
        self.copies = [nn.Linear(2, 2), nn.Linear(2, 1)]
        self.alpha = nn.Parameter(torch.zeros(3))
        self.w = Descent(self.net.parameters(), partial(SGD, lr=self.rate, momentum=0.9), ema=0.9)
        self.parts: dict[str, Any] = {"a": Descent([self.alpha], partial(SGD, lr=1.0)), "n": (1, 2.5, None, True, "x")}
        self.front: list[Tensor] = []
        self.best: float | None = None

    def move(self) -> None:
        self.w.down(self.net(torch.ones(1, 2)).square().sum())
        self.parts["a"].down(self.alpha.sum())
        self.parts["n"] = (2, 0.5, None, False, "y")
        self.front.append(torch.tensor([1.0, 2.0]))
        self.best, self.seen, self.late = 0.75, self.seen + 1, torch.tensor([9])
        with torch.no_grad():
            self.copies[0].weight.add_(1.0)


def setup() -> Setup:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    return Setup(net, None, None, CrossEntropy(), nn.Linear(2, 1), 10, 5, 20)


def started() -> Toy:
    toy = Toy()
    toy.start(setup())
    return toy


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


def payload(step: int) -> dict[str, Any]:
    return {"step": step, "big": torch.arange(3000.0) + step}


def test_everything_but_hyper_parameters_makes_the_round_trip(tmp_path: Path) -> None:
    toy = started()
    check(toy)
    toy.move()
    save(tmp_path, {"step": 1, "strategy": state_of(toy)})
    state = load(tmp_path)[0]["strategy"]
    assert set(state) == {"seen", "setup", "copies", "alpha", "w", "parts", "front", "best", "late"}
    other = started()
    alpha = other.alpha
    restore(other, state)
    assert other.alpha is alpha and same(state_of(other), state_of(toy))
    toy.move()
    other.move()
    assert same(state_of(other), state_of(toy)) and other.seen == 2


def test_the_net_is_stored_once_and_the_teacher_beside(tmp_path: Path) -> None:
    toy = started()
    state = state_of(toy)
    assert set(state["setup"]) == {"net", "teacher"}
    assert not {"net", "teacher", "head", "loss"} & set(state)
    checkpoint.keep_teacher(tmp_path, toy)
    (path,) = tmp_path.iterdir()
    assert path.name == f"teacher-{state['setup']['teacher']}.pt"
    written = path.stat().st_mtime_ns
    checkpoint.keep_teacher(tmp_path, toy)
    assert path.stat().st_mtime_ns == written


def test_another_teacher_is_replaced_by_the_stored_one(tmp_path: Path) -> None:
    toy = started()
    checkpoint.keep_teacher(tmp_path, toy)
    state = copy.deepcopy(state_of(toy))
    other = started()
    with torch.no_grad():
        other.teacher.weight.add_(1.0)
    with pytest.raises(ValueError, match="is not there"):
        restore(other, state)
    restore(other, state, tmp_path)
    assert torch.equal(other.teacher.weight, toy.teacher.weight)
    (path,) = tmp_path.iterdir()
    torch.save(nn.Linear(2, 1).state_dict(), path)
    third = started()
    with torch.no_grad():
        third.teacher.weight.add_(2.0)
    with pytest.raises(ValueError, match="not what the name says"):
        restore(third, state, tmp_path)
    state["setup"]["teacher"] = None
    with pytest.raises(ValueError, match="has a teacher and the state none, or the reverse"):
        restore(started(), state, tmp_path)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (random.Random(0), "thing: a checkpoint cannot hold Random"),
        ([1, {"x": {1, 2}}], r"thing\[1\]\['x'\]: a checkpoint cannot hold set"),
        (lambda: 0, "thing: a checkpoint cannot hold function"),
        (torch.Generator(), "thing: a checkpoint cannot hold Generator"),
        (torch.Size([1]), "thing: a checkpoint cannot hold Size"),
    ],
)
def test_anything_else_is_a_type_error_with_its_name(value: Any, name: str) -> None:
    toy = started()
    toy.thing = value  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=rf"Toy\.{name}"):
        check(toy)


def test_a_state_without_an_attribute_is_refused() -> None:
    toy = started()
    state = state_of(toy)
    del state["alpha"]
    with pytest.raises(ValueError, match="no state for alpha"):
        restore(started(), state)


def test_not_finite_names_the_descent() -> None:
    toy = started()
    assert checkpoint.not_finite(toy) is None
    with torch.no_grad():
        toy.alpha[1] = float("-inf")
    assert checkpoint.not_finite(toy) == ("parts (a parameter)", float("-inf"))


def test_save_rotates_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        assert save(tmp_path, payload(step)) == tmp_path / "last.pt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    found, path = load(tmp_path)
    assert (found["step"], path.name) == (3, "last.pt") and torch.equal(found["big"], payload(3)["big"])
    assert torch.load(tmp_path / "previous.pt", weights_only=True)["step"] == 2


def test_a_failed_write_leaves_the_good_files(tmp_path: Path) -> None:
    save(tmp_path, payload(1))
    with pytest.raises(AttributeError):
        save(tmp_path, {"step": 2, "bad": lambda: 0})  # cannot be pickled
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"] and load(tmp_path)[0]["step"] == 1


def test_a_damaged_last_falls_back_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        save(tmp_path, payload(step))
    last = tmp_path / "last.pt"
    whole = last.read_bytes()
    middle = len(whole) // 2
    damages = [whole[:100], whole[:-1], whole[: len(whole) - 300], b"", b"\x80\x02garbage"]
    damages.append(whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :])  # one flipped byte in a tensor
    for damaged in damages:
        last.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "nas"):
            found, path = load(tmp_path)
        assert (found["step"], path.name) == (1, "previous.pt"), damaged[:20]
        (record,) = caplog.records
        assert "last.pt cannot be read" in record.getMessage() and "\n" not in record.getMessage()
    (tmp_path / "previous.pt").write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"last\.pt .*previous\.pt .*No readable checkpoint is left"):
        load(tmp_path)


def test_a_kill_between_the_two_renames(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, payload(1))
    os.replace(tmp_path / "last.pt", tmp_path / "previous.pt")
    assert load(tmp_path)[0]["step"] == 1 and "is missing" in caplog.text


def test_no_checkpoint_and_no_code_from_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Start the run anew"):
        load(tmp_path)
    torch.save(nn.Linear(1, 1), tmp_path / "last.pt")  # a pickled class: not loaded
    with pytest.raises(ValueError, match="UnpicklingError"):
        load(tmp_path)
    torch.save({"step": 1}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="not a nas-checkpoint of version 1"):
        load(tmp_path)


def test_config_may_differ_in_time_and_place_only() -> None:
    config = {"seed": 1, "out": "a", "max_time": 5, "strategy": {"init_args": {"lr": 0.1, "clip": None}}}
    moved = {**config, "out": "b", "max_time": None, "resume": "auto"}
    assert config_hash(config) == config_hash(moved)
    check_config(config, moved, Path("last.pt"))
    other = {**moved, "strategy": {"init_args": {"lr": 0.2}}, "new": 1}
    assert config_hash(config) != config_hash(other)
    with pytest.raises(ValueError) as error:
        check_config(config, other, Path("last.pt"))
    assert "strategy.init_args.lr (was 0.1, now 0.2)" in str(error.value)
    assert "strategy.init_args.clip" in str(error.value) and "new" in str(error.value) and "out" not in str(error.value)
