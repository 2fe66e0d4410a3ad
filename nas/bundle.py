"""A bundle: one plain network as a folder that other programs can use without this project.

    model.safetensors  model.py  arch.json  report.json  [model.onnx  model.pt2]

Writing proves what it writes (DESIGN.md law 6); loading runs nothing that the folder holds.
"""
from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from nas.export import require_onnx, write_onnx, write_pt2
from search_spaces.arch import ArchFile, read_arch, write_arch
from search_spaces.space import SearchSpace
from supernets.printer import check, source

FORMAT = "nas-bundle"
VERSION = 1
FORMS = ("fresh", "inherited")
NEEDED = ("model.safetensors", "arch.json", "report.json")


@dataclass(frozen=True)
class Bundle:
    """What ``load_bundle`` returns; ``module`` is in eval mode on the CPU.

    ``form``: "fresh", the published network, or "inherited", that of a supernet's weights (they differ where the supernet
    normalises what the published network does not, as after the pools of DARTS).
    """

    module: nn.Module
    arch: ArchFile
    report: dict[str, Any]
    path: Path
    form: str = "fresh"


def counted(graph: nn.Module, example: Tensor) -> tuple[int, int]:
    """MACs of conv and linear layers for one image (bias, norms, pooling, attention products: 0), trainable parameters.

    Counted by torch's own flop counter while the network runs once in eval mode. ``example``: (B, C, H, W).
    """
    products = {"convolution", "_convolution", "addmm", "mm"}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(graph).eval()(example[:1])
    flops = sum(n for op, n in counter.get_flop_counts().get("Global", {}).items() if op.__name__ in products)
    return int(flops) // 2, sum(p.numel() for p in graph.parameters() if p.requires_grad)


def prove(
    graph: nn.Module, example: Tensor, predicted: Mapping[str, int], reference: Tensor | None, tolerance: float = 1e-5
) -> dict[str, Any]:
    """The proof that law 6 asks for, as entries of report.json.

    ``predicted``: "macs" and "params" of one image. ``reference``: the supernet's logits (B, N) for ``example``, None
    where weights are fresh. ``tolerance``: of the largest difference, times the largest logit where that is above 1.
    Raises RuntimeError (one line) where a count or the logits differ; ValueError where ``predicted`` lacks a figure.
    """
    missing = [name for name in ("macs", "params") if name not in predicted]
    if missing:
        raise ValueError(f"predicted lacks {', '.join(missing)}. Needed: macs, params.")
    found = dict(zip(("macs", "params"), counted(graph, example)))
    costs = {name: {"predicted": int(predicted[name]), "counted": n} for name, n in found.items()}
    for name, cost in costs.items():
        if cost["predicted"] != cost["counted"]:
            raise RuntimeError(f"The plain network has {cost['counted']} {name}, predicted were {cost['predicted']}.")
    difference = None
    if reference is not None:
        with torch.no_grad():
            logits = copy.deepcopy(graph).eval()(example)
        if logits.shape != reference.shape:
            raise RuntimeError(f"The plain network's logits are {tuple(logits.shape)}, not {tuple(reference.shape)}.")
        difference = (logits - reference).abs().max().item()
        if not difference <= tolerance * max(1.0, reference.abs().max().item()):  # a nan must fail too
            raise RuntimeError(f"The plain network's logits differ from the supernet's by {difference:.3g}, "
                               f"allowed {tolerance:.3g}.")
    origin = "fresh" if reference is None else "inherited"
    return {"logits_max_difference": difference, **costs, "weights": origin, "form": origin}


def write_bundle(
    out: Path,
    graph: fx.GraphModule,
    arch: ArchFile,
    report: Mapping[str, Any],
    example: Tensor,
    onnx: bool = False,
    pt2: bool = False,
    space: SearchSpace | None = None,
) -> Path:
    """Write the bundle of ``graph`` into the folder ``out``, whole or not at all; returns ``out``.

    ``example``: (B, C, H, W), what every written form is compared on. ``report``: law 6's figures (``prove``); those of
    the exports are added. ``space``: where its class is not of search_spaces. Raises ValueError where ``out`` is
    in use, the report is not JSON or a package is missing, RuntimeError where a form computes something else.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: choose another --out or empty it.")
    if onnx:
        require_onnx()
    text = source(graph, tuple(example.shape))
    check(graph, text, example)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        (part / "model.py").write_text(text, encoding="utf-8")
        weights = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                   for key, value in graph.state_dict().items()}
        save_file(weights, part / "model.safetensors", {"format": FORMAT, "version": str(VERSION)})
        (part / "model.safetensors").chmod((part / "model.py").stat().st_mode)  # the library writes it for its owner alone
        figures = dict(report)
        if onnx:
            figures["onnx"] = {"logits_max_difference": write_onnx(part / "model.onnx", graph, example)}
        if pt2:
            figures["pt2"] = {"logits_max_difference": write_pt2(part / "model.pt2", graph, example)}
        write_arch(part / "arch.json", arch, space)
        (part / "report.json").write_text(_json(figures) + "\n", encoding="utf-8")
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def load_bundle(path: Path, rebuild: Callable[[ArchFile, str], nn.Module]) -> Bundle:
    """The network of the bundle at ``path``, in eval mode, with its weights, arch.json and report.json.

    ``rebuild``: arch, form -> the plain network with fresh weights, made by our own code: model.py is not run, nor read.
    Raises FileNotFoundError for a missing folder, ValueError for missing, damaged or mismatching files, naming them.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder. `nas extract` writes bundles.")
    missing = [name for name in NEEDED if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} is not a bundle: it lacks {', '.join(missing)}. `nas extract` writes bundles.")
    weights = _weights(path / "model.safetensors")
    report = _report(path / "report.json")
    arch = read_arch(path / "arch.json")
    form = _form(path / "report.json", report)
    module = rebuild(arch, form)
    _fit(path, module.state_dict(), weights)
    module.load_state_dict(weights, strict=True)
    return Bundle(module.cpu().eval(), arch, report, path, form)


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            stated = file.metadata() or {}
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}). Write the bundle again.") from None
    if stated.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a bundle: its format is {stated.get('format')!r}, not {FORMAT!r}.")
    if stated.get("version") != str(VERSION):
        raise ValueError(f"{path} has version {stated.get('version')!r}. Allowed: {VERSION}. Update supernas.")
    return weights


def _report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(report, dict):
        raise ValueError(f"{path} holds one object, not {type(report).__name__}.")
    return report


def _form(path: Path, report: Mapping[str, Any]) -> str:
    """Of the network; reports of version 0.1 do not say it, and there only inherited weights that nobody trained tell."""
    form = report.get("form", "inherited" if report.get("weights") == "inherited" else "fresh")
    if form not in FORMS:
        raise ValueError(f"{path}: form is {form!r}. Allowed: {', '.join(FORMS)}.")
    return form


def _fit(path: Path, wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """ValueError where the weights are not those of the network that arch.json describes."""
    for problem, keys in (("lacks", [k for k in wanted if k not in weights]),
                          ("has the unknown", [k for k in weights if k not in wanted])):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{path / 'model.safetensors'} {problem} {', '.join(keys[:3])}{more}: "
                             "its weights are not those of arch.json.")
    for key, value in wanted.items():
        if value.shape != weights[key].shape:
            raise ValueError(f"{path / 'model.safetensors'}: {key} is {tuple(weights[key].shape)}, "
                             f"arch.json describes {tuple(value.shape)}.")


def _json(report: Mapping[str, Any]) -> str:
    try:
        return json.dumps(report, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"report.json: not writable as JSON: {error}.") from None
