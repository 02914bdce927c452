"""The scores of a search: kept in memory, and in a file that outlives a kill."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ReplivitError
from reproductions.autoformer.space import Genes


@dataclass(frozen=True)
class Score:
    """One candidate's fitness.

    Attributes:
        phase: random, or the generation it came from.
    """

    genes: Genes
    fitness: float
    params: int
    phase: str


class Scores:
    """Fitness by candidate, in the order of evaluation.

    The file's first line says which search it belongs to; every further line is one score, flushed
    to the disk before the next candidate is taken up. A torn last line is dropped.

    Args:
        path: the file; None keeps the scores in memory only.
        identity: plain values that must agree for a file to be taken up again.

    Raises:
        ReplivitError: the file cannot be read or written, or belongs to another search.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self._by_genes: dict[Genes, Score] = {}
        if path is None:
            return
        try:
            if path.exists() and path.stat().st_size:
                self._read(path)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._append({"identity": self.identity})
        except OSError as error:
            raise ReplivitError(f"cannot open {path}: {error.strerror}") from error

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed while it wrote
            os.truncate(path, len(whole))
        try:
            first, *rest = [json.loads(line) for line in whole.splitlines()] or [{}]
            before = first.get("identity", {})
            scores = [Score(tuple(one["genes"]), one["fitness"], one["params"], one["phase"])
                      for one in rest]  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReplivitError(f"{path} is no file of scores; remove it") from error
        if not whole:
            self._append({"identity": self.identity})
            return
        for key in [*before, *self.identity]:
            if before.get(key) != self.identity.get(key):
                raise ReplivitError(
                    f"{path} holds a search with {key} = {before.get(key)}, asked for is "
                    f"{self.identity.get(key)}; choose another file or remove this one"
                )
        self._by_genes = {one.genes: one for one in scores}

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with open(self.path, "ab") as stream:
                stream.write(json.dumps(line).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise ReplivitError(f"cannot write {self.path}: {error.strerror}") from error

    def add(self, genes: Genes, fitness: float, params: int, phase: str) -> None:
        """Note a new score."""
        self._by_genes[genes] = Score(genes, fitness, params, phase)
        self._append({"genes": list(genes), "fitness": fitness, "params": params, "phase": phase})

    @property
    def entries(self) -> list[Score]:
        return list(self._by_genes.values())

    def __contains__(self, genes: Genes) -> bool:
        return genes in self._by_genes

    def __getitem__(self, genes: Genes) -> float:
        return self._by_genes[genes].fitness

    def __len__(self) -> int:
        return len(self._by_genes)
