"""Your own Dataset and your own DataLoader from Python, as the README shows it."""
from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from cli import draw_images, nas, ok
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nas.build import rebuild
from nas.bundle import load_bundle
from nas.data import Data, from_dataset, from_loaders
from nas.search import Found, search
from nas.strategies.tas import TAS
from search_spaces.arch import read_arch
from search_spaces.resnet import CifarResNet
from search_spaces.space import SearchSpace
from supernets.resnet import ResNet

README = Path(__file__).parents[2] / "README.md"


class MyImages(Dataset):
    """Noise, dark or bright."""

    def __len__(self) -> int:
        return 128

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        noise = torch.Generator().manual_seed(i)
        return torch.rand(1, 8, 8, generator=noise) / 2 + i % 2 / 2, i % 2


def tiny(data: Data, out: Path, epochs: int = 3, space: SearchSpace | None = None, strategy: TAS | None = None) -> Found:
    torch.manual_seed(0)
    net = ResNet(space or CifarResNet(8, widths=[4, 6, 8]), channels=data.shape[0], classes=len(data.classes))  # type: ignore[arg-type]
    return search(data, net, strategy or TAS(target="60%"), epochs=epochs, out=out)


def test_the_readmes_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (script,) = [block for block in blocks if "MyImages()" in block]
    assert len([line for line in script.splitlines() if line]) <= 12
    smaller = {"depth=20": "depth=8, widths=[4, 6, 8]", "epochs=30": "epochs=2", "batch_size=64": "batch_size=16"}
    for said, small in smaller.items():
        assert script.count(said) == 1
        script = script.replace(said, small)
    names: dict[str, object] = {"MyImages": MyImages}
    exec(script, names)
    found = names["found"]
    assert isinstance(found, Found) and found.folder == Path("runs/mine")
    assert found.arch == read_arch("runs/mine/arch.json", expect=CifarResNet(8, widths=[4, 6, 8]))
    assert found.arch.classes == ("cat", "dog") and found.arch.provenance["strategy"] == "tas"
    plain = load_bundle(Path("runs/mine/bundle"), rebuild)
    assert plain.arch.arch == found.arch.arch and plain.report["logits_max_difference"] <= 1e-5


def test_it_learns_and_a_second_call_finds_it_done(tmp_path: Path) -> None:
    data = from_dataset(MyImages(), batch_size=16, valid_fraction=0.5)
    found = tiny(data, tmp_path / "run", epochs=6, strategy=TAS(target="60%", tolerance=0.9, lr=0.05))
    assert found.arch.metrics["top1"]["value"] >= 0.9  # dark and bright: any network that learns tells them apart
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = tiny(data, tmp_path / "run", epochs=6, strategy=TAS(target="60%", tolerance=0.9, lr=0.05))
    assert again.arch == found.arch and again.folder == found.folder
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_your_own_loaders(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(1)
    x, y = torch.rand(64, 3, 8, 8, generator=noise), torch.arange(64) % 4
    train, valid = (DataLoader(TensorDataset(x[at], y[at]), batch_size=8, shuffle=True, drop_last=True)
                    for at in (slice(32), slice(32, 64)))  # fmt: skip
    found = tiny(from_loaders(train, valid=valid, classes=list("abcd")), tmp_path / "run", epochs=1)  # type: ignore[arg-type]
    assert found.arch.input == (3, 8, 8) and found.arch.classes == ("a", "b", "c", "d")
    path = found.bundle(tmp_path / "bundle")
    assert load_bundle(path, rebuild).module(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


class MySpace(CifarResNet):
    """A space whose class is not in search_spaces."""


def test_a_space_of_your_own(tmp_path: Path) -> None:
    data = from_dataset(MyImages(), batch_size=16, valid_fraction=0.5)
    space = MySpace(8, widths=[4, 6, 8])
    found = tiny(data, tmp_path / "run", epochs=1, space=space)
    assert found.arch == read_arch(tmp_path / "run" / "arch.json", expect=space)
    assert found.bundle(tmp_path / "bundle").is_dir()


def test_what_does_not_fit_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    data = from_dataset(MyImages(), batch_size=16)
    with pytest.raises(ValueError, match=r"'select' holds no image. Set some aside by --data.valid_fraction"):
        tiny(data, tmp_path / "run")
    data = from_dataset(MyImages(), batch_size=16, valid_fraction=0.5)
    with pytest.raises(ValueError, match=r"target = 1% .* cannot be reached"):
        tiny(data, tmp_path / "run", strategy=TAS(target="1%"))
    with pytest.raises(ValueError, match=r"epochs = 0, every = 1\. Allowed: 1 or more"):
        tiny(data, tmp_path / "run", epochs=0)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_saves_and_the_next_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = from_dataset(MyImages(), batch_size=16, valid_fraction=0.5)
    whole = tiny(data, tmp_path / "whole", epochs=2)
    update, calls = TAS.update, []

    def interrupted(self: TAS, draw: object, now: object) -> object:
        calls.append(now)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, draw, now)  # type: ignore[arg-type]

    monkeypatch.setattr(TAS, "update", interrupted)
    with pytest.raises(SystemExit) as stop:
        tiny(data, tmp_path / "run", epochs=2)
    assert stop.value.code == 130 and len(calls) == 3
    found = tiny(data, tmp_path / "run", epochs=2)
    assert found.arch == whole.arch
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_nas_extract_says_that_the_data_are_the_scripts(tmp_path: Path) -> None:
    found = tiny(from_dataset(MyImages(), batch_size=16, valid_fraction=0.5), tmp_path / "run", epochs=1)
    result = nas("extract", found.folder)
    assert result.code == 2 and "searched from Python" in result.errors[0] and "found.bundle(out)" in result.errors[0]
    found.bundle(tmp_path / "bundle")
    draw_images(tmp_path / "mine", "L")
    said = ok("predict", tmp_path / "bundle", tmp_path / "mine" / "test" / "dark" / "0.png").last
    assert said.rsplit(": ", 1)[1].split()[0] in ("0", "1")
