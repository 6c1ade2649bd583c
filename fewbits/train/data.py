"""Batches as a pure function of (seed, epoch, index), so that a resumed run needs no state of the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fewbits.errors import DataError
from fewbits.train.rng import Stream, mix


class Examples(Protocol):
    """Any data set that can hand out several examples at once."""

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor, generator: torch.Generator | None) -> Any:
        """Return the batch of examples ``indices`` int64 [B]. Generator None: no augmentation."""


class BatchSource(Protocol):
    """What the loop reads: batch ``index`` of ``epoch``, the same one whenever it is asked for."""

    def __len__(self) -> int: ...

    def batch(self, epoch: int, index: int) -> Any: ...

    def for_rank(self, rank: int, world: int) -> BatchSource:
        """Return the share of one of ``world`` processes."""

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the run that it continues."""


class Batches:
    """Shuffled, augmented batches of ``examples``; where these have ``batch_strata`` (int64 [N]), each batch has each
    stratum at its share, to within one example.

    batch_size: examples a batch over all processes; each of the ``world`` processes takes an equal share, so that
    a run means the same on one process and on several. drop_last: leave out the last, smaller batch of an epoch;
    where it is kept, several processes fill it up to equal shares from the start of the epoch's order.
    Raises DataError where there is not one batch, or where the shares are not equal.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise DataError(
                f"batch_size {batch_size} must be a positive multiple of the {world} processes; it counts the "
                "examples of a step's batch over all of them"
            )
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} is outside 0..{world - 1}")
        if len(examples) < (batch_size if drop_last else 1):
            raise DataError(
                f"{len(examples)} examples do not fill one batch of {batch_size}; choose a smaller batch_size, or "
                "drop_last=False"
            )
        self.examples, self.batch_size, self.seed, self.drop_last = examples, batch_size, seed, drop_last
        self.rank, self.world = rank, world
        self._order: tuple[int, Tensor] | None = None  # of the last epoch asked for; nothing but a cache

    def __len__(self) -> int:
        count = len(self.examples)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def batch(self, epoch: int, index: int) -> Any:
        """Return this process's share of batch ``index`` of ``epoch``; it depends on these and the seed only."""
        if not 0 <= index < len(self):
            raise DataError(f"batch {index} is outside 0..{len(self) - 1}")
        generator = torch.Generator().manual_seed(mix(self.seed, 1, epoch, index, self.rank))
        return self.examples.gather(self._indices(epoch, index), generator)

    def _indices(self, epoch: int, index: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, 0, epoch))
            strata = getattr(self.examples, "batch_strata", None)
            order = torch.randperm(len(self.examples), generator=generator)
            self._order = epoch, order if strata is None else spread_strata(order, strata, generator)
        order = self._order[1]
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        lacking = -len(chosen) % self.world
        if lacking:
            chosen = torch.cat([chosen, order.repeat(self.world)[:lacking]])
        return chosen.chunk(self.world)[self.rank]

    def for_rank(self, rank: int, world: int) -> Batches:
        """Return the share of one of ``world`` processes. Raises DataError where another share was chosen already."""
        if (rank, world) == (self.rank, self.world):
            return self
        if self.world != 1:
            raise DataError(
                f"these batches are for process {self.rank} of {self.world}, but this is process {rank} of {world}; "
                "leave out rank and world: fit fills them in"
            )
        return Batches(self.examples, self.batch_size, seed=self.seed, drop_last=self.drop_last, rank=rank, world=world)

    def identity(self) -> dict[str, Any]:
        """See ``BatchSource.identity``."""
        return {
            "examples": len(self.examples),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }


def spread_strata(order: Tensor, strata: Tensor, generator: torch.Generator) -> Tensor:
    """Return a shuffled order in which the members of each stratum are spread evenly."""
    places = torch.empty(len(order), dtype=torch.float64)
    for stratum in strata.unique().tolist():  # type: ignore[no-untyped-call]
        members = (strata[order] == stratum).nonzero().flatten()
        start = torch.rand((), generator=generator, dtype=torch.float64)
        places[members] = (torch.arange(len(members), dtype=torch.float64) + start) / len(members)
    return order[places.argsort(stable=True)]


class LoaderBatches:
    """The batches of a torch DataLoader, made repeatable.

    All randomness of the loader (shuffling, augmentation, seeds of the workers) comes from a stream of random numbers
    that starts anew each epoch. Going forward is as quick as the loader; going back reads the epoch from its start.
    Raises DataError for a loader without a length, or whose workers outlive an epoch with their random state.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int = 0) -> None:
        try:
            length = len(loader)
        except TypeError as error:
            raise DataError(f"a loader of {type(loader.dataset).__name__} has no length; give one that has") from error
        if length == 0:
            raise DataError("the loader has no batches; give it more examples, a smaller batch or drop_last=False")
        if loader.persistent_workers:
            raise DataError(
                "persistent workers keep random state that a resumed run cannot restore; "
                "build the loader with persistent_workers=False"
            )
        self.loader, self.seed = loader, seed
        self._next: tuple[int, int] | None = None  # the (epoch, index) that the iterator yields next

    def __len__(self) -> int:
        return len(self.loader)

    def batch(self, epoch: int, index: int) -> Any:
        """Return batch ``index`` of ``epoch``."""
        if not 0 <= index < len(self):
            raise DataError(f"batch {index} is outside 0..{len(self) - 1}")
        if self._next is None or self._next[0] != epoch or self._next[1] > index:
            self._restart(epoch)
        while True:
            found, batch = self._read()
            if found == index:
                return batch

    def _restart(self, epoch: int) -> None:
        batch_sampler: Any = self.loader.batch_sampler
        for owner in (self.loader, self.loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if generator is not None:
                generator.manual_seed(mix(self.seed, 2, epoch))
            set_epoch = getattr(owner, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        self._stream = Stream(self.seed, 3, epoch)
        with self._stream.active():
            self._iterator: Iterator[Any] = iter(self.loader)
        self._next = epoch, 0

    def _read(self) -> tuple[int, Any]:
        epoch, index = cast("tuple[int, int]", self._next)
        with self._stream.active():
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise DataError(f"the loader has {len(self)} batches by its length, but ended after {index}") from None
        self._next = epoch, index + 1
        return index, batch

    def for_rank(self, rank: int, world: int) -> LoaderBatches:
        """Check that the loader reads the share of one of ``world`` processes. Raises DataError if not."""
        sampler = self.loader.sampler
        share = getattr(sampler, "rank", 0), getattr(sampler, "num_replicas", 1)
        if share != (rank, world):
            raise DataError(
                f"the loader reads share {share[0]} of {share[1]}, but this is process {rank} of {world}; build it "
                "with torch.utils.data.DistributedSampler, or use fewbits.train.Batches"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """See ``BatchSource.identity``."""
        return {"batches": len(self), "seed": self.seed}


def as_batches(batches: BatchSource | DataLoader[Any], seed: int) -> BatchSource:
    """Return what the loop can read; a torch DataLoader gets its adapter, with this seed."""
    return LoaderBatches(batches, seed=seed) if isinstance(batches, DataLoader) else batches
