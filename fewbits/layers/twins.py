"""Twins of the convolutions, Linear and Embedding."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import QuantizationError
from fewbits.layers.base import QuantizedLayer, quantizes
from fewbits.plan import LayerPlan


@quantizes(nn.Linear)
class LinearTwin(QuantizedLayer):
    """y = q(x) q(W)^T + b; x [..., in], W [out, in]."""

    input_axis = -1
    is_linear = True

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out]."""
        return self.run(x, lambda x, w: F.linear(x, w, self.bias))  # type: ignore[arg-type]


class SpatialTwin(QuantizedLayer):
    """What convolutions have in common."""

    kernel_size: tuple[int, ...]

    def input_channel_axis(self) -> int:
        """Count from the end, so that a sample without a batch axis fits, too."""
        return -1 - len(self.kernel_size)


@quantizes(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvTwin(SpatialTwin):
    """Convolution of q(x) [N, in, ...] with q(W) [out, in / groups, ...]; padding comes after the input quantizer."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, out, ...]."""
        return self.run(x, lambda x, w: self._conv_forward(x, w, self.bias))  # type: ignore[operator]


@quantizes(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeTwin(SpatialTwin):
    """Transposed convolution; W [in, out / groups, ...], so channels are axis 1 (shared over groups)."""

    channel_axis = 1
    contraction_axis = 0

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return [N, out, ...]."""
        return self.run(x, lambda x, w: self.transpose(x, w, output_size))

    def transpose(self, x: Tensor, weight: Tensor, output_size: list[int] | None) -> Tensor:
        """Run the float operation on a given weight."""
        layer: Any = self
        dims = len(layer.kernel_size)
        op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        extra = layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
        )
        return op(x, weight, layer.bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation)


@quantizes(nn.Embedding)
class EmbeddingTwin(QuantizedLayer):
    """Rows of q(W) [entries, dim]; the scale of a channel is that of an entry."""

    quantizes_input = False

    def check(self, plan: LayerPlan) -> None:
        """Refuse what changes the table during lookup."""
        super().check(plan)
        if self.max_norm is not None or self.sparse:
            raise QuantizationError("an Embedding with max_norm or sparse gradients cannot be quantized: turn them off")

    def forward(self, index: Tensor) -> Tensor:
        """Return [..., dim]."""
        layer: Any = self
        return self.run(
            index,
            lambda i, w: F.embedding(i, w, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq),
        )


@quantizes(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormTwin(QuantizedLayer):
    """A batch norm whose result is quantized; when it is folded into the layer before, the quantizer stays."""

    quantizes_input = False
    only_output = True

    def check(self, plan: LayerPlan) -> None:
        """Refuse anything but an output."""
        super().check(plan)
        if plan.weight is not None:
            raise QuantizationError("a batch norm has no weight to quantize: its plan may have an 'output' only")

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised, same shape."""
        y: Tensor = super().forward(x)
        return self.finish(y)


@quantizes("transformers.pytorch_utils.Conv1D")
class Conv1DTwin(QuantizedLayer):
    """GPT-2's linear layer, which stores W as [in, out]; the worked example of docs/extending.md."""

    channel_axis = 1
    contraction_axis = 0
    input_axis = -1
    is_linear = True

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out]."""
        return self.run(x, lambda x, w: F.linear(x, w.T, self.bias))  # type: ignore[arg-type]
