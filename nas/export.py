"""Other forms of a plain network: ONNX and torch.export, each loaded again and compared before it counts."""
from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # of the largest logit (1 where that is smaller): another runtime sums in another order


def require_onnx() -> None:
    """ValueError, with the command that helps, where a package that ONNX needs is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install 'supernas[export]'.")


def write_onnx(path: Path, net: nn.Module, example: Tensor) -> float:
    """Write ``net`` as one ONNX file whose batch size is free; returns the largest difference of onnxruntime's logits.

    ``example``: (B, C, H, W). Raises ValueError without the packages, RuntimeError where the logits differ.
    """
    require_onnx()
    import onnxruntime

    net, pair = _ready(net, example)
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(net, (pair,), str(path), input_names=["x"], output_names=["logits"], dynamo=True,
                      dynamic_shapes=batch, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return _compare("model.onnx", net, pair, lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]))


def write_pt2(path: Path, net: nn.Module, example: Tensor) -> float:
    """Write ``net`` by torch.export with a free batch size; returns the largest difference of its logits.

    ``example``: (B, C, H, W). Raises RuntimeError where the logits differ.
    """
    net, pair = _ready(net, example)
    program = torch.export.export(net, (pair,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return _compare("model.pt2", net, pair, torch.export.load(path).module())


def _ready(net: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy in eval mode on the CPU, and an example of two images or more (a batch of one would be taken as fixed)."""
    example = example.detach().cpu()
    return copy.deepcopy(net).cpu().eval(), example if len(example) > 1 else torch.cat([example, example])


@torch.no_grad()
def _compare(name: str, net: nn.Module, x: Tensor, other: Callable[[Tensor], Tensor]) -> float:
    """The largest difference over the example and over another batch size; RuntimeError above the tolerance."""
    largest = 0.0
    for batch in (x, torch.cat([x, x[:1]])):
        logits = net(batch)
        difference = (logits - other(batch)).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, logits.abs().max().item()):  # a nan must fail too
            raise RuntimeError(f"{name} computes something else than the network: largest difference {difference:.3g}.")
        largest = max(largest, difference)
    return largest
