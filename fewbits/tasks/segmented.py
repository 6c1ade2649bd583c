"""Images with masks: the data set, and its augmentation through torchvision's transforms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewbits.errors import DataError
from fewbits.tasks.augment import seeded
from fewbits.tasks.data import Batch, Indices, is_number, normalize

Read = Callable[[], tuple[Tensor, Tensor]]
Size = tuple[int, int]
STRETCH = (4 / 5, 5 / 4)  # of the width of a window that training cuts, against the height


@dataclass(frozen=True, eq=False, kw_only=True)
class SegmentedImages:
    """Images of which every pixel has one of ``classes``, or none (IGNORE).

    reads: one an example, each returns image uint8 [3, H, W] and mask uint8 [H, W]. names: of the images, as tables
    of groups call them; empty: they have none. ground: the class that is no
    object, which Dice leaves out; None: all count. size: height and width that images are scaled to where they have
    others (masks: nearest pixel). mean, std: one value a channel, of pixels in 0..1.
    Training cuts a window of ``min_area`` to 1 of the area, of about the form of ``crop`` (height and width, None: as
    size), and scales it to that; it mirrors half of the images left to right (``flip`` none, horizontal, or both: and
    half of them top to bottom), and changes brightness, contrast and saturation by factors within 1 +- ``colour``.
    Raises DataError for values out of range.
    """

    reads: Sequence[Read]
    classes: tuple[str, ...]
    size: Size
    names: tuple[str, ...] = ()
    mean: Sequence[float] = (0.485, 0.456, 0.406)  # ImageNet's, as torchvision's weights have them
    std: Sequence[float] = (0.229, 0.224, 0.225)
    ground: int | None = None
    crop: Size | None = None
    min_area: float = 0.25
    flip: Literal["none", "horizontal", "both"] = "horizontal"
    colour: float = 0.0

    def __post_init__(self) -> None:
        if not self.reads:
            raise DataError("the data set is empty; expected at least one image with its mask")
        if self.names and len(self.names) != len(self.reads):
            raise DataError(f"need a name of each of the {len(self.reads)} images, or none, got {len(self.names)}")
        for name in ("size", "crop"):
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, (tuple, list)) and len(value) == 2 and all(type(v) is int and v >= 8 for v in value)
            ):
                raise DataError(f"{name} is height and width in pixels, both at least 8, got {value}")
        if (
            not is_number(self.min_area)
            or not is_number(self.colour)
            or not (0 < self.min_area <= 1 and 0 <= self.colour < 1)
        ):
            raise DataError(f"need 0 < min_area <= 1 and 0 <= colour < 1, got {self.min_area!r} and {self.colour!r}")
        if self.flip not in ("none", "horizontal", "both"):
            raise DataError(f"flip must be none, horizontal or both, got {self.flip!r}")
        if not len(self.mean) == len(self.std) == 3 or min(self.std) <= 0:
            raise DataError(f"give three means and three std above 0, got mean={self.mean} and std={self.std}")
        if self.ground is not None and not (type(self.ground) is int and 0 <= self.ground < len(self.classes)):
            raise DataError(
                f"ground is the number of a class, 0..{len(self.classes) - 1}, or null, got {self.ground!r}"
            )

    def __len__(self) -> int:
        return len(self.reads)

    def gather(self, indices: Indices, generator: torch.Generator | None = None) -> Batch:
        """Return float32 normalised images [B, 3, H, W] and masks int64 [B, H, W] with classes and IGNORE.

        Without a generator nothing is augmented; with one, augmentation depends on it alone. Raises DataError, naming
        the file, for one that cannot be used.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64).tolist()
        seeds = None if generator is None else torch.randint(2**62, (len(rows),), generator=generator).tolist()
        transform = self._fitted() if seeds is None else self._augmented()
        images, masks = [], []
        for row, seed in zip(rows, seeds or [0] * len(rows)):
            with seeded(seed):  # the transforms draw from torch's own generator
                image, mask = transform(*_tv(self.reads[row]()))
            images.append(image.as_subclass(Tensor))
            masks.append(mask.as_subclass(Tensor))
        return normalize(torch.stack(images), self.mean, self.std), torch.stack(masks).long()

    def picture(self, index: int) -> Batch:
        """Return example ``index`` as it is shown: uint8 [3, H, W] of ``size``, and its mask int64 [H, W]."""
        image, mask = self._fitted()(*_tv(self.reads[index]()))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()

    def select(self, indices: Indices) -> SegmentedImages:
        """Return a data set of these examples only, in this order."""
        rows = torch.as_tensor(indices, dtype=torch.int64).tolist()
        names = tuple(self.names[row] for row in rows) if self.names else ()
        return dataclasses.replace(self, reads=[self.reads[row] for row in rows], names=names)

    def subset(self, n: int, seed: int = 0) -> SegmentedImages:
        """Return n examples, chosen at random. Raises DataError unless 1 <= n <= len(self)."""
        if not 1 <= n <= len(self):
            raise DataError(f"cannot take {n} of {len(self)} examples; ask for 1 to {len(self)}")
        return self.select(self._shuffled(seed)[:n].sort().values)

    def split(self, fraction: float, seed: int = 0) -> tuple[SegmentedImages, SegmentedImages]:
        """Return two disjoint sets, chosen at random: ``fraction`` of the examples, and the others."""
        n = round(fraction * len(self))
        if not 1 <= n < len(self):
            raise DataError(f"fraction {fraction} of {len(self)} examples leaves one side empty; choose within 0..1")
        order = self._shuffled(seed)
        return self.select(order[:n].sort().values), self.select(order[n:].sort().values)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Iterate once over all examples in order, not augmented; the last batch may be smaller."""
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        return (self.gather(chunk) for chunk in torch.split(torch.arange(len(self)), batch_size))

    def _shuffled(self, seed: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def _fitted(self) -> Any:
        from torchvision.transforms import v2

        return v2.Resize(list(self.size), antialias=True)

    def _augmented(self) -> Any:
        from torchvision.transforms import v2

        height, width = self.crop or self.size
        ratio = [width / height * stretch for stretch in STRETCH]
        steps: list[Any] = [v2.RandomResizedCrop([height, width], (self.min_area, 1.0), ratio, antialias=True)]
        steps += [v2.RandomHorizontalFlip()] * (self.flip != "none") + [v2.RandomVerticalFlip()] * (self.flip == "both")
        steps += [v2.ColorJitter(self.colour, self.colour, self.colour)] * (self.colour > 0)
        return v2.Compose(steps)


def _tv(pair: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    """Tell the transforms which is the image and which the mask; a mask is scaled by taking the nearest pixel."""
    from torchvision import tv_tensors

    return tv_tensors.Image(pair[0]), tv_tensors.Mask(pair[1])
