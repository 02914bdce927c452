"""What steers the search: every network is trained a little, and judged on held-out images.

Each score is a record in a file of its own, written as soon as it is known. A search that was
killed is simply run again and finds its scores there; so do searches that draw the same network.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from harness import Conditions, Record, ReplivitError, make_record
from harness.data import ImageDataset, hold_out, load_split
from harness.evaluation import evaluate
from harness.measurement.macs import count_macs
from harness.record import RecordStore, new_run_id
from harness.training import train
from reproductions.uninet.model import UniNet
from reproductions.uninet.search import Score, reward
from reproductions.uninet.space import Genes, SearchSpace, in_words

NAME = "uninet_candidate"


@dataclass(frozen=True)
class Proxy:
    """How a candidate is trained and judged; a plain, picklable description.

    Attributes:
        images: training images of every candidate; the others of the training split are held out.
        judged_on: how many of the held-out images, spread evenly.
        recipe: changes of the track's recipe, without the epochs.
        target, alpha: of the reward.
        seed: of every candidate's training.
    """

    space: SearchSpace
    track: str = "fashion_mini"
    image_size: int = 32
    images: int = 1000
    judged_on: int = 1000
    epochs: int = 2
    recipe: Mapping[str, Any] | None = None
    target: float = 4e6
    alpha: float = -0.07
    seed: int = 0
    device: str = "cpu"
    root: str | None = None

    def build(self, genes: Genes, num_classes: int) -> UniNet:
        """The untrained network of `genes`, from the proxy's seed."""
        torch.manual_seed(self.seed)
        return UniNet(self.space.architecture(genes), num_classes, self.image_size, init_values=0.1)

    def score(self, genes: Genes, accuracy: float, macs: int, params: int) -> Score:
        """With the reward."""
        value = reward(accuracy, macs, self.target, self.alpha)
        return Score(genes, accuracy, macs, params, value)

    def conditions(self, genes: Genes) -> Conditions:
        """What makes two scores the same one; the target is left out, rewards are computed."""
        held, _ = _images(self.track, self.root, self.images)
        return Conditions(
            device=self.device, image_size=self.image_size, track=self.track, seed=self.seed,
            data_fingerprint=held.fingerprint,
            options={
                "network": in_words(self.space.architecture(genes)),
                "strides": list(self.space.strides), "stem_dim": self.space.stem_dim,
                "final_head_dim": self.space.final_head_dim, "head_dim": self.space.head_dim,
                "images": self.images, "judged_on": self.judged_on, "epochs": self.epochs,
                "recipe": dict(self.recipe or {}),
            },
        )  # fmt: skip

    def run(self, genes: Genes) -> Record:
        """Train and judge one network; seconds on a CPU."""
        held, hidden = _images(self.track, self.root, self.images)
        model = self.build(genes, len(held.classes))
        macs = count_macs(model, self.image_size).total
        params = sum(one.numel() for one in model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            trained = train(
                model, self.track, dict(self.recipe or {}), self.seed, out=folder,
                hold_out=hidden, epochs=self.epochs, device=self.device, root=self.root,
                image_size=self.image_size, name=NAME, evaluate=False, quiet=True,
            )  # fmt: skip
            top1 = evaluate(
                trained.model, held, limit=self.judged_on, batch_size=250, device=self.device,
                image_size=self.image_size, name=NAME,
            )[0]  # fmt: skip
            seconds = trained.value("train_time")
        return make_record(
            NAME, "top1", top1.value, self.conditions(genes), run_id=new_run_id(), paper="uninet",
            interval=top1.interval, n=top1.n, started=top1.started, duration_s=seconds,
            method="after a short training, on held-out training images",
            detail={"macs": macs, "params": params},
        )  # fmt: skip


@lru_cache(maxsize=2)
def _images(track: str, root: str | None, count: int) -> tuple[ImageDataset, int]:
    """The held-out images, and how many they are, when `count` stay for training.

    Raises:
        ReplivitError: no image would be held out.
    """
    whole = load_split(track, "train", root)
    hidden = len(whole) - count
    if hidden < 1:
        raise ReplivitError(
            f"{track} has {len(whole):,} training images: of {count:,} that train a candidate, "
            "none is left to judge it"
        )
    return hold_out(whole, hidden)[1], hidden


class ProxyScores:
    """Scores networks: `scores(list of genes) -> list of Score`; remembers what it scored.

    Use it as a context manager where it has workers.

    Args:
        store: where the records lie; a folder of the search's own.
        workers: processes of one thread each; 0 trains in this one. Only on a CPU.
    """

    def __init__(self, proxy: Proxy, store: RecordStore, workers: int = 0) -> None:
        self.proxy, self.store, self.workers = proxy, store, workers
        self.known = {one.conditions.key(): one for one in _readable(store)}
        self._pool = None

    def __call__(self, networks: Sequence[Genes]) -> list[Score]:
        wanted = {genes: self.proxy.conditions(genes).key() for genes in networks}
        missing = [genes for genes, key in wanted.items() if key not in self.known]
        run = self._pool.imap if self._pool else map
        for record in run(self.proxy.run, missing):
            self.store.append([record])
            self.known[record.conditions.key()] = record
        return [self._score(genes, self.known[wanted[genes]]) for genes in networks]

    def _score(self, genes: Genes, record: Record) -> Score:
        detail = record.detail
        return self.proxy.score(genes, record.value, detail["macs"], detail["params"])

    def seconds(self, networks: Iterable[Genes]) -> float:
        """Seconds of training behind the scores of `networks`."""
        keys = {self.proxy.conditions(genes).key() for genes in networks}
        return sum(self.known[key].duration_s for key in keys)

    def __enter__(self) -> ProxyScores:
        if self.workers > 0:
            context = multiprocessing.get_context("spawn")
            self._pool = context.Pool(self.workers, torch.set_num_threads, (1,))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
            self._pool = None


def _readable(store: RecordStore) -> Iterator[Record]:
    """The store's scores; a line torn by a kill is one score to be made again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*skipped$")
        yield from store
