"""Many processes, one run: torch.distributed started from torchrun's environment, and the few collectives in use.

Without torchrun nothing is initialised and every function here acts as rank 0 of 1. Inside ``team`` "every rank" means those of
one team: several runs, side by side.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_PATIENCE = timedelta(days=7)
"""For the others: a rank may wait for as long as another trains or selects alone. Where one dies, torchrun ends them all."""

_team: dist.ProcessGroup | None = None  # of this rank; None: all ranks


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

        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    return Ranks(rank, world, local_rank, rank == 0)


def stop() -> None:
    """Leave the process group, if there is one."""
    if active():
        dist.destroy_process_group()


def active() -> bool:
    """Whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


class Team(NamedTuple):
    """``number`` of ``of`` teams, and what its own runs see of the ranks. ``main`` is its first rank."""

    number: int
    of: int
    ranks: Ranks

    def share(self, tasks: int) -> range:
        """Those of ``tasks`` tasks that are this team's."""
        return range(self.number, tasks, self.of)


def sizes(tasks: int, world: int) -> list[int]:
    """The ranks in each team for so many ``tasks``: as many teams as tasks, or one for each rank where there are fewer."""
    teams = min(tasks, world)
    return [(i + 1) * world // teams - i * world // teams for i in range(teams)]


@contextmanager
def team(tasks: int) -> Iterator[Team]:
    """Divides the ranks into teams for ``tasks`` tasks; within the context every function here is about the own team. All ranks
    must come here; each waits at the end until all have. Teams are not divided further."""
    global _team
    if not active():
        yield Team(0, 1, Ranks(0, 1, 0, True))
        return
    many, mine = sizes(tasks, dist.get_world_size()), dist.get_rank()
    starts = [sum(many[:i]) for i in range(len(many))]
    number = max(i for i, start in enumerate(starts) if start <= mine)
    for i, (start, n) in enumerate(zip(starts, many)):  # every rank makes every group
        group = dist.new_group(list(range(start, start + n)), timeout=_PATIENCE)
        if i == number:
            assert isinstance(group, dist.ProcessGroup)
            _team = own = group
    try:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        yield Team(number, len(many), Ranks(rank(), world(), local, rank() == 0))
    finally:
        _team = None
    dist.barrier()
    dist.destroy_process_group(own)


def rank() -> int:
    """This process's number: 0 without a process group."""
    return dist.get_rank(_team) if active() else 0


def world() -> int:
    """The number of processes: 1 without a process group."""
    return dist.get_world_size(_team) if active() else 1


def wait() -> None:
    """Until every rank has come here."""
    if active():
        dist.barrier(_team)


def _first() -> int:
    """The rank among all that is rank 0 here."""
    return 0 if _team is None else dist.get_global_rank(_team, 0)


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
        dist.all_reduce(flat, group=_team)
        _unflatten(flat.div_(world()), group)


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by rank 0's, in place: one flat broadcast for each dtype and device."""
    if not active():
        return
    for group in _alike(tensors):
        flat = _flatten(group)
        dist.broadcast(flat, _first(), group=_team)
        _unflatten(flat, group)


def gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape, side by side along the last dimension, in the order of the ranks."""
    if not active():
        return tensor
    found = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(found, tensor.contiguous(), group=_team)
    return torch.cat(found, dim=-1)


def anywhere(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Position by position: is the flag set on any rank? ``device`` is one that the process group can use."""
    if not active():
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_team)
    return [bool(flag) for flag in found.tolist()]


def share(text: str) -> str:
    """Rank 0's ``text``, on every rank."""
    box = [text]
    if active():
        dist.broadcast_object_list(box, _first(), group=_team)
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
