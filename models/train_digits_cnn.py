"""Train a CNN of residual and depthwise blocks on the digits and write `digits_cnn.onnx`.

The BatchNormalization nodes are kept. A high learning rate without weight decay leaves the channels of a
depthwise layer with very different ranges once they are folded, as in MobileNet: hard to quantize per tensor.
"""

import torch
from digits import SEED, GraphBuilder, save, train
from torch import nn


class Unit(nn.Sequential):
    """Convolution and batch normalization, named `conv` and `norm`."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)


class Residual(nn.Module):
    """relu(unit2(relu(unit1(x))) + shortcut(x)), as in ResNet; a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.unit1 = Unit(inputs, outputs, stride=stride)
        self.unit2 = Unit(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else Unit(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.unit2(self.unit1(x).relu())
        return (y + (x if self.shortcut is None else self.shortcut(x))).relu()


class InvertedResidual(nn.Module):
    """x + project(relu6(depthwise(relu6(expand(x))))), as in MobileNetV2."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = Unit(channels, hidden, kernel=1)
        self.depthwise = Unit(hidden, hidden, groups=hidden)
        self.project = Unit(hidden, channels, kernel=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu6(self.expand(x))
        return x + self.project(nn.functional.relu6(self.depthwise(y)))


class DigitsCnn(nn.Module):
    """Images (N, 1, 8, 8) to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(1, 32)
        self.stage1 = Residual(32, 32, stride=1)
        self.stage2 = Residual(32, 64, stride=2)
        self.stage3 = nn.Sequential(*(InvertedResidual(64, 192) for _ in range(3)))
        self.pool = nn.MaxPool2d(2)
        self.head = Unit(64, 128, kernel=1)
        self.classifier = nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(image).relu())))
        return self.classifier(self.head(self.pool(x)).relu().mean((2, 3)))


def export(model: DigitsCnn) -> GraphBuilder:
    """The same network as ONNX nodes."""
    graph = GraphBuilder()

    def unit(name: str, x: str, layer: Unit) -> str:
        return graph.batch_norm(f"{name}.norm", graph.conv(f"{name}.conv", x, layer.conv), layer.norm)

    def residual(name: str, x: str, block: Residual) -> str:
        y = graph.node("Relu", f"{name}.relu1", [unit(f"{name}.unit1", x, block.unit1)])
        y = unit(f"{name}.unit2", y, block.unit2)
        shortcut = x if block.shortcut is None else unit(f"{name}.shortcut", x, block.shortcut)
        return graph.node("Relu", f"{name}.relu2", [graph.node("Add", f"{name}.add", [y, shortcut])])

    def inverted_residual(name: str, x: str, block: InvertedResidual) -> str:
        y = graph.node("Clip", f"{name}.relu6_1", [unit(f"{name}.expand", x, block.expand), zero, six])
        y = graph.node("Clip", f"{name}.relu6_2", [unit(f"{name}.depthwise", y, block.depthwise), zero, six])
        return graph.node("Add", f"{name}.add", [x, unit(f"{name}.project", y, block.project)])

    zero, six = graph.constant("zero", torch.tensor(0.0)), graph.constant("six", torch.tensor(6.0))
    x = graph.node("Relu", "stem.relu", [unit("stem", "image", model.stem)])
    x = residual("stage2", residual("stage1", x, model.stage1), model.stage2)
    for index, block in enumerate(model.stage3):
        x = inverted_residual(f"stage3.{index}", x, block)
    x = graph.node("MaxPool", "pool", [x], {"kernel_shape": [2, 2], "strides": [2, 2]})
    x = graph.node("Relu", "head.relu", [unit("head", x, model.head)])
    x = graph.node("Flatten", "flatten", [graph.node("GlobalAveragePool", "average", [x])])
    graph.gemm("classifier", x, model.classifier)
    return graph


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = DigitsCnn()
    train(model, epochs=40, rate=1e-2, decay=0)
    save(model, export(model), "digits_cnn")
