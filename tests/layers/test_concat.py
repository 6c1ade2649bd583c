from __future__ import annotations

import pytest
import torch

from fewbits.errors import PlanError, QuantizationError
from fewbits.layers.concat import Concat


def test_branches_are_put_beside_each_other_in_their_order() -> None:
    up, skip = torch.randn(2, 3, 4, 5), torch.randn(2, 1, 4, 5)
    out = Concat(("up", "skip"))(up, skip)
    assert torch.equal(out[:, :3], up) and torch.equal(out[:, 3:], skip)
    assert repr(Concat(("up", "skip"))) == "Concat(up, skip)"


def test_what_cannot_be_concatenated_is_named() -> None:
    node = Concat(("up", "skip"))
    with pytest.raises(QuantizationError, match=r"'up': \[1, 2, 4, 4\], 'skip': \[1, 2, 5, 4\].*resize"):
        node(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 5, 4))
    with pytest.raises(QuantizationError, match="got 1 tensors"):
        node(torch.zeros(1, 2, 4, 4))
    for names in (("up",), ("up", "up")):
        with pytest.raises(PlanError, match="two branches"):
            Concat(names)
