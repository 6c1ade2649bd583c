from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from fewbits.errors import DataError
from fewbits.train import Batches, LoaderBatches
from fewbits.train.data import as_batches


class Numbers:
    """Examples that are their own index, with noise below one half as augmentation."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor]:
        noise = 0 if generator is None else 0.4 * torch.rand(len(indices), generator=generator)
        return (indices + noise,)


def epoch_of(batches: Batches, epoch: int) -> list[int]:
    return torch.cat([batches.batch(epoch, k)[0] for k in range(len(batches))]).int().tolist()


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_holds_every_example_once(count: int, size: int, seed: int, epoch: int) -> None:
    batches = Batches(Numbers(count), size, seed=seed, drop_last=False)
    assert sorted(epoch_of(batches, epoch)) == list(range(count))
    if count >= size:
        whole = Batches(Numbers(count), size, seed=seed)
        assert len(whole) == count // size
        assert epoch_of(whole, epoch) == epoch_of(batches, epoch)[: len(whole) * size]


def test_a_batch_depends_on_seed_epoch_and_index_only() -> None:
    batches = Batches(Numbers(30), 4, seed=3)
    wanted = batches.batch(2, 5)[0]
    batches.batch(0, 1)
    torch.rand(3)
    assert torch.equal(batches.batch(2, 5)[0], wanted)
    assert torch.equal(Batches(Numbers(30), 4, seed=3).batch(2, 5)[0], wanted)
    assert epoch_of(batches, 0) != epoch_of(batches, 1)
    assert epoch_of(batches, 0) != epoch_of(Batches(Numbers(30), 4, seed=4), 0)
    fractions = torch.stack([batches.batch(e, k)[0] % 1 for e in range(3) for k in range(7)])
    assert len(fractions.unique()) == fractions.numel()  # augmentation never repeats


@given(st.integers(4, 40), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_processes_share_a_batch_equally(count: int, share: int, world: int, drop_last: bool) -> None:
    size = share * world
    if drop_last and count < size:
        return
    one = Batches(Numbers(count), size, drop_last=drop_last)
    ranks = [one.for_rank(rank, world) for rank in range(world)]
    for k in range(len(one)):
        parts = [batches.batch(1, k)[0] for batches in ranks]
        assert len({len(part) for part in parts}) == 1 and len(parts[0]) > 0
        together = torch.cat(parts).int().tolist()
        whole = one.batch(1, k)[0].int().tolist()
        assert together[: len(whole)] == whole and len(together) - len(whole) < world


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(DataError, match="3 examples do not fill one batch of 4"):
        Batches(Numbers(3), 4)
    with pytest.raises(DataError, match="multiple of the 2 processes"):
        Batches(Numbers(9), 3, world=2)
    with pytest.raises(DataError, match="0 examples"):
        Batches(Numbers(0), 4, drop_last=False)
    with pytest.raises(DataError, match=r"rank 2 is outside 0\.\.1"):
        Batches(Numbers(9), 2, rank=2, world=2)
    with pytest.raises(DataError, match="leave out rank and world"):
        Batches(Numbers(9), 2, rank=1, world=2).for_rank(0, 1)
    with pytest.raises(DataError, match=r"batch 2 is outside 0\.\.1"):
        Batches(Numbers(9), 4).batch(0, 2)


class Noisy(Dataset[Tensor]):
    """Augments with every global generator, as data sets in the wild do."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), float(torch.rand(()))])


def loaders() -> list[DataLoader[Any]]:
    return [
        DataLoader(Noisy(), 3, shuffle=True),
        DataLoader(Noisy(), 3, shuffle=True, generator=torch.Generator()),
        DataLoader(Noisy(), 3, sampler=DistributedSampler(Noisy(), 1, 0)),
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_loader_repeats_whatever_was_read_before(number: int) -> None:
    forward = LoaderBatches(loaders()[number], seed=1)
    wanted = {(e, k): forward.batch(e, k) for e in range(2) for k in range(4)}
    jumping = LoaderBatches(loaders()[number], seed=1)
    for place in [(1, 2), (0, 3), (0, 1), (1, 3), (1, 0)]:
        torch.rand(2)
        assert torch.equal(jumping.batch(*place), wanted[place])
    orders = [torch.cat([wanted[e, k] for k in range(4)])[:, 0].tolist() for e in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == list(range(10))


def test_a_loader_with_workers_repeats() -> None:
    loader = DataLoader(Noisy(), 5, shuffle=True, num_workers=1)
    wanted = LoaderBatches(loader, seed=1).batch(0, 1)
    assert torch.equal(LoaderBatches(loader, seed=1).batch(0, 1), wanted)


def test_a_loader_leaves_the_global_generators_alone() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    LoaderBatches(loaders()[0]).batch(0, 1)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


class Short(Endless):
    def __len__(self) -> int:
        return 8


def test_loaders_that_cannot_be_repeated_are_refused() -> None:
    with pytest.raises(DataError, match="Endless has no length"):
        LoaderBatches(DataLoader(Endless()))
    with pytest.raises(DataError, match="persistent_workers=False"):
        LoaderBatches(DataLoader(Noisy(), num_workers=1, persistent_workers=True))
    with pytest.raises(DataError, match="no batches"):
        LoaderBatches(DataLoader(Noisy(), 11, drop_last=True))
    with pytest.raises(DataError, match="share 0 of 1, but this is process 1 of 2"):
        LoaderBatches(DataLoader(Noisy())).for_rank(1, 2)
    with pytest.raises(DataError, match="8 batches by its length, but ended after 3"):
        LoaderBatches(DataLoader(Short(), batch_size=None)).batch(0, 5)


def test_as_batches_adapts_loaders_only() -> None:
    batches = Batches(Numbers(8), 2)
    assert as_batches(batches, 4) is batches
    assert as_batches(loaders()[0], 4).identity() == {"batches": 4, "seed": 4}
