"""Many processes, one run: torch.distributed started from torchrun's environment, and the few collectives in use.

Without torchrun nothing is initialised and every function here acts as rank 0 of 1.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Ranks(NamedTuple):
    """``rank`` of ``world`` processes; ``local_rank`` on this machine; ``main``: the one that writes files."""

    rank: int
    world: int
    local_rank: int
    main: bool


def start(device: torch.device | str) -> Ranks:
    """Join torchrun's process group: gloo for a CPU ``device``, nccl for CUDA (this process takes GPU ``local_rank``).

    Raises ValueError where only a part of torchrun's environment is set.
    """
    found = [name for name in _TORCHRUN if name in os.environ]
    if not found:
        return Ranks(0, 1, 0, True)
    if len(found) < len(_TORCHRUN):
        missing = ", ".join(name for name in _TORCHRUN if name not in found)
        raise ValueError(f"environment: {', '.join(found)} set but not {missing}. Start by torchrun, or unset all.")
    rank, world, local_rank = (int(os.environ[name]) for name in _TORCHRUN)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if not active():
        # This module keeps the group of its import time in default arguments, and torch's first optimizer imports it.
        # Imported after the group began, it outlives stop(): gloo's threads go on, and can abort a process that exits.
        from torch.distributed.nn import functional  # noqa: F401

        dist.init_process_group("nccl" if on_gpu else "gloo")
    return Ranks(rank, world, local_rank, rank == 0)


def stop() -> None:
    """Leave the process group, if there is one."""
    if active():
        dist.destroy_process_group()


def active() -> bool:
    """Whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number: 0 without a process group."""
    return dist.get_rank() if active() else 0


def world() -> int:
    """The number of processes: 1 without a process group."""
    return dist.get_world_size() if active() else 1


def wait() -> None:
    """Until every rank has come here."""
    if active():
        dist.barrier()


def device() -> torch.device:
    """A device that the process group's backend can use."""
    if active() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in place: one flat all_reduce for each dtype and device."""
    if not active():
        return
    for group in _alike(tensors):
        flat = _flatten(group)
        dist.all_reduce(flat)
        _unflatten(flat.div_(world()), group)


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by rank 0's, in place: one flat broadcast for each dtype and device."""
    if not active():
        return
    for group in _alike(tensors):
        flat = _flatten(group)
        dist.broadcast(flat, 0)
        _unflatten(flat, group)


def anywhere(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Position by position: is the flag set on any rank? ``device`` is one that the process group can use."""
    if not active():
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def share(text: str) -> str:
    """Rank 0's ``text``, on every rank."""
    box = [text]
    if active():
        dist.broadcast_object_list(box, 0)
    return box[0]


def _alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors grouped by dtype and device, in the order of their first appearance (the same on every rank)."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    return list(groups.values())


def _flatten(group: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in group])


def _unflatten(flat: Tensor, group: list[Tensor]) -> None:
    for tensor, piece in zip(group, flat.split([tensor.numel() for tensor in group])):
        tensor.copy_(piece.view(tensor.shape))
