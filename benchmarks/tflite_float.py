"""Float TFLite files as PyTorch modules: the operators of the MLPerf Tiny reference models, and no others.

pip install -r benchmarks/requirements.txt     # for tflite, the file format's schema
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {0: lambda x: x, 1: F.relu, 3: F.relu6}
SAME = 0  # padding


class TfliteNet(nn.Module):
    """A float graph of one input and one output; layers are named by their place and kind, such as ``03_conv_2d``.

    Takes and returns what the file does, but that images come as [N, C, H, W]. logits: leave a softmax at the end out.
    Raises ValueError, naming the operator, for one that is not known here.
    """

    def __init__(self, path: Path | str, *, logits: bool = False) -> None:
        super().__init__()
        import tflite

        model = tflite.Model.GetRootAsModel(Path(path).read_bytes(), 0)
        graph = model.Subgraphs(0)
        names = {value: name for name, value in vars(tflite.BuiltinOperator).items() if isinstance(value, int)}
        self.layers, self.steps = nn.ModuleDict(), list[tuple[Callable[..., Tensor], list[int], int]]()
        self.input, self.output = int(graph.Inputs(0)), int(graph.Outputs(0))
        for index in range(graph.OperatorsLength()):
            operator = graph.Operators(index)
            code = model.OperatorCodes(operator.OpcodeIndex())
            kind = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            if kind not in MAKERS:
                raise ValueError(f"{path}: operator {index} is {kind}; known are {sorted(MAKERS)}")
            given = [int(operator.Inputs(i)) for i in range(operator.InputsLength())]
            constants = [None if i < 0 else _constant(model, graph.Tensors(i)) for i in given]
            options = getattr(tflite, OPTIONS[kind], None)
            read = None
            if options is not None and operator.BuiltinOptions() is not None:
                read = options()
                read.Init(operator.BuiltinOptions().Bytes, operator.BuiltinOptions().Pos)
            layer, call = MAKERS[kind](read, constants)
            if layer is not None:
                self.layers[f"{index:02d}_{kind.lower()}"] = layer
            inputs = [i for i, constant in zip(given, constants) if constant is None and i >= 0]
            self.steps.append((call, inputs, int(operator.Outputs(0))))
        if logits and kind == "SOFTMAX":
            self.output = self.steps.pop()[1][0]

    def forward(self, x: Tensor) -> Tensor:
        """Run the operators in the order of the file."""
        values = {self.input: x}
        layers = iter(self.layers.values())
        for call, inputs, output in self.steps:
            arguments = [values[i] for i in inputs]
            values[output] = call(next(layers), *arguments) if getattr(call, "layered", False) else call(*arguments)
        return values[self.output]


def _constant(model: Any, tensor: Any) -> Tensor | None:
    """Return a stored tensor in float (weights of "dynamic range" files are int8 with scales), None for others."""
    data = model.Buffers(tensor.Buffer()).DataAsNumpy()
    if isinstance(data, int):  # no data: computed at run time
        return None
    types = {0: np.float32, 2: np.int32, 9: np.int8}
    if tensor.Type() not in types:
        raise ValueError(f"tensor {tensor.Name()!r} is of type {tensor.Type()}; known are {types}")
    values = torch.from_numpy(np.frombuffer(data.tobytes(), dtype=types[tensor.Type()]).copy())
    values = values.reshape([int(n) for n in tensor.ShapeAsNumpy()])
    given = tensor.Quantization()
    if tensor.Type() == 0 or given is None or not given.ScaleLength():
        return values
    shape = [1] * values.ndim
    if given.ScaleLength() > 1:
        shape[given.QuantizedDimension()] = -1
    scale, zero = (
        torch.from_numpy(np.array(v, dtype=np.float32)) for v in (given.ScaleAsNumpy(), given.ZeroPointAsNumpy())
    )
    return (values - zero.reshape(shape)) * scale.reshape(shape)


def _layered(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    call.layered = True  # type: ignore[attr-defined]
    return call


def _convolution(options: Any, constants: list[Tensor | None], *, depthwise: bool) -> tuple[nn.Module, Any]:
    weight, bias = constants[1], constants[2]
    assert weight is not None
    weight = weight.permute(3, 0, 1, 2) if depthwise else weight.permute(0, 3, 1, 2)  # to [out, in / groups, H, W]
    stride = (options.StrideH(), options.StrideW())
    out, inside, *kernel = weight.shape
    groups = out if depthwise else 1
    layer = nn.Conv2d(inside * groups, out, kernel, stride, groups=groups, bias=bias is not None)
    layer.weight.data = weight.contiguous()
    if bias is not None:
        layer.bias.data = bias
    activation, same = ACTIVATIONS[options.FusedActivationFunction()], options.Padding() == SAME
    return layer, _layered(lambda layer, x: activation(layer(_padded(x, kernel, stride) if same else x)))


def _padded(x: Tensor, kernel: list[int], stride: tuple[int, int]) -> Tensor:
    """Pad as TensorFlow's SAME does: what is odd goes behind."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride)):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def _linear(options: Any, constants: list[Tensor | None]) -> tuple[nn.Module, Any]:
    weight, bias = constants[1], constants[2] if len(constants) > 2 else None
    assert weight is not None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    activation = ACTIVATIONS[options.FusedActivationFunction()]
    return layer, _layered(lambda layer, x: activation(layer(x)))


def _pool(options: Any, constants: list[Tensor | None]) -> tuple[None, Any]:
    kernel, stride = [options.FilterHeight(), options.FilterWidth()], (options.StrideH(), options.StrideW())

    def call(x: Tensor) -> Tensor:
        if options.Padding() == SAME and _padded(x, kernel, stride).shape != x.shape:
            raise ValueError("an average over padding is not known here")
        return F.avg_pool2d(x, kernel, stride)

    return None, call


def _reshape(options: Any, constants: list[Tensor | None]) -> tuple[None, Any]:
    def call(x: Tensor) -> Tensor:
        return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).flatten(1)  # the file's order is channels last

    return None, call


def _add(options: Any, constants: list[Tensor | None]) -> tuple[None, Any]:
    activation = ACTIVATIONS[options.FusedActivationFunction()]
    return None, lambda x, y: activation(x + y)


MAKERS: dict[str, Callable[[Any, list[Tensor | None]], tuple[nn.Module | None, Any]]] = {
    "CONV_2D": lambda options, constants: _convolution(options, constants, depthwise=False),
    "DEPTHWISE_CONV_2D": lambda options, constants: _convolution(options, constants, depthwise=True),
    "FULLY_CONNECTED": _linear,
    "AVERAGE_POOL_2D": _pool,
    "RESHAPE": _reshape,
    "ADD": _add,
    "SOFTMAX": lambda options, constants: (None, lambda x: x.softmax(-1)),
}
OPTIONS = {
    "CONV_2D": "Conv2DOptions", "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions", "AVERAGE_POOL_2D": "Pool2DOptions", "RESHAPE": "ReshapeOptions",
    "ADD": "AddOptions", "SOFTMAX": "SoftmaxOptions",
}  # fmt: skip
