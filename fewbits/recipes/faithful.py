"""Whether the packed and the exported model answer as the trained one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fewbits.deploy.verify import Agreement, open_session
from fewbits.errors import ExportError
from fewbits.recipes.schema import Recipe
from fewbits.recipes.task import Pair, Task


class Compared:
    """What is seen of the outputs of a trained model, of its packed form, and of that with folded norms."""

    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self.bit_equal, self.max_abs_diff, self.agreeing, self.count = True, 0.0, 0, 0

    def watch(self, trained: Iterator[Pair], packed: Iterator[Pair], folded: Iterator[Pair]) -> Iterator[Pair]:
        """Compare batch by batch, and pass on the outputs of the last."""
        for (want, _), (exact, _), (got, right) in zip(trained, packed, folded, strict=True):
            self.bit_equal &= torch.equal(want, exact)
            self.max_abs_diff = max(self.max_abs_diff, float((got - want).abs().max()))
            same = self.agreement(got, want)
            self.agreeing, self.count = self.agreeing + int(same.sum()), self.count + len(same)
            yield got, right


def onnx_metrics(path: Path, task: Task[Any], batch_size: int, threads: int) -> dict[str, Any]:
    """Return the metrics of an ONNX file in ONNX Runtime."""
    run = open_session(path, threads)
    return task.evaluate(lambda x: torch.from_numpy(run((x,))), task.test, batch_size)


def require_faithful(result: dict[str, Any], recipe: Recipe) -> None:
    """Raise ExportError where the packed or the exported model does not answer as the trained one."""
    packed, onnx = result["packed"], result["onnx"]
    if packed["code_mismatches"] or not packed["bit_equal_before_folding"]:
        raise ExportError(
            f"the packed model is not the trained one: {packed['code_mismatches']} codes differ, logits before norms "
            f"are folded are {'equal' if packed['bit_equal_before_folding'] else 'not equal'}; see result.json"
        )
    if recipe.export is not None and onnx["top1_agreement"] < recipe.export.min_agreement:
        raise ExportError(
            f"ONNX Runtime gives the packed model's answer for {onnx['top1_agreement']:.2f} % of the test examples, "
            f"export.min_agreement asks for {recipe.export.min_agreement:g} %; see result.json"
        )
