"""Scores of subnets that outlive a program: a file of JSON lines, so that no subnet of a run is read twice.

    scores = ScoreFile(folder / "picks", space, {"step": 1200, "images": 5000, ...})
    scores.add(codes, read)                    # on disk when this returns
    scores.of(codes)                           # Score or None, for each

The first line says what the scores depend on (``about``), and so does the name of the file: another checkpoint, other images or
another recalibration never meet an old score. A line torn by a kill is dropped.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from search_spaces.space import SearchSpace

FORMAT, VERSION = "nas-scores", 1


class Score(NamedTuple):
    """Accuracy and mean cross-entropy (None: not finite) of one subnet on ``n`` images."""

    top1: float
    loss: float | None
    n: int


class ScoreFile:
    """The scores of ``space``'s architectures under ``about`` (plain data), in ``folder``/scores-<digest>.jsonl.

    A score is that of a canonical code, not of ``space.key``: isomorphic cells are one network when trained alone, but
    in shared weights they read different edges. Raises ValueError where the file there is damaged before its last line.
    """

    def __init__(self, folder: Path, space: SearchSpace, about: Mapping[str, Any]) -> None:
        self.space = space.root
        self.about = json.loads(json.dumps({**about, "space": space.hash}))
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"scores-{digest[:12]}.jsonl"
        self._found: dict[tuple[int, ...], Score] = {}  # canonical code -> score
        if self.path.exists():
            self._read()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._append([{"format": FORMAT, "version": VERSION, "about": self.about}])

    def __len__(self) -> int:
        return len(self._found)

    def of(self, codes: np.ndarray) -> list[Score | None]:
        """The scores of ``codes`` (N, M), None where there is none yet."""
        return [self._found.get(tuple(code)) for code in self.space.canonical_codes(codes).tolist()]

    def add(self, codes: np.ndarray, scores: Sequence[Score]) -> None:
        """Keeps the ``scores`` of ``codes`` (N, M); those that are known stay as they are."""
        rows = []
        for code, score in zip(self.space.canonical_codes(codes).tolist(), scores):
            loss = score.loss if score.loss is not None and math.isfinite(score.loss) else None
            if self._keep(code, Score(score.top1, loss, score.n)):
                rows.append({"code": code, "top1": score.top1, "loss": loss, "n": score.n})
        self._append(rows)

    def all(self) -> tuple[np.ndarray, list[Score]]:
        """Every architecture with a score: codes (N, M), in the order they were added, and the scores."""
        codes = np.array(list(self._found), dtype=np.int16).reshape(-1, len(self.space.choices))
        return codes, list(self._found.values())

    def _keep(self, code: Sequence[int], score: Score) -> bool:
        new = tuple(code) not in self._found
        self._found.setdefault(tuple(code), score)
        return new

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.truncate(self.path, whole)
        lines = text[:whole].decode("utf-8", errors="replace").splitlines()
        if not lines:  # killed within the first line
            self._append([{"format": FORMAT, "version": VERSION, "about": self.about}])
            return
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    if (row["format"], row["version"], row["about"]) != (FORMAT, VERSION, self.about):
                        raise ValueError("another format, or scores of something else")
                    continue
                code = np.array([row["code"]], dtype=np.int64)
                score = Score(float(row["top1"]), row["loss"], int(row["n"]))
                self._keep(self.space.canonical_codes(code)[0].tolist(), score)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}: {error}. Delete the file: its subnets are read again.") from None
