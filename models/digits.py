"""What the digit models share: the data split, the training loop and the export to ONNX.

`python models/digits.py` writes `digits_calib.npz` and `digits_test.npz`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

FOLDER = Path(__file__).parent
SEED = 20
TRAIN, CALIBRATION = 1000, 512  # samples; the calibration samples are the first of the training samples


def split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The disjoint parts `train` (1000 samples) and `test` (797).

    Each is images (n, 1, 8, 8) float32 in [0, 1] and labels (n,) int64.
    """
    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))
    images = (digits.images[order, None] / 16).astype(np.float32)  # pixels are counts from 0 to 16
    labels = digits.target[order].astype(np.int64)
    return {"train": (images[:TRAIN], labels[:TRAIN]), "test": (images[TRAIN:], labels[TRAIN:])}


def write_data() -> None:
    """Write the calibration and the test samples beside this file."""
    parts = split()
    images, labels = parts["train"]
    np.savez_compressed(FOLDER / "digits_calib.npz", image=images[:CALIBRATION], label=labels[:CALIBRATION])
    images, labels = parts["test"]
    np.savez_compressed(FOLDER / "digits_test.npz", image=images, label=labels)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Rotate by up to 12 degrees, scale by up to 10 %, shift by up to one pixel, add noise; (n, 1, 8, 8)."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * np.pi / 15
    zoom = 1 + (torch.rand(count) * 2 - 1) * 0.1
    shift = (torch.rand(count, 2, 1) * 2 - 1) / 4  # the grid is 2 wide, so 1/4 is one of the eight pixels
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    rotation = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    grid = functional.affine_grid(torch.cat([rotation, shift], 2), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    return (moved + 0.05 * torch.randn_like(moved)).clamp(0, 1)


def train(model: nn.Module, *, epochs: int, rate: float, decay: float) -> None:
    """Train in place on the training part with AdamW; `rate` is the peak of a one-cycle schedule.

    Leaves the model in eval mode.
    """
    images, labels = map(torch.from_numpy, split()["train"])
    batch = 50
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    steps = epochs * (len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(batch):
            loss = functional.cross_entropy(model(augment(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


class GraphBuilder:
    """Collects ONNX nodes. Each method adds a node and returns its output, which has the node's name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Any) -> str:
        """Add an initializer; torch tensors are detached."""
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op: str, name: str, inputs: list[str], attributes: dict[str, Any] | None = None) -> str:
        """Add a node of one output."""
        self.nodes.append(helper.make_node(op, inputs, [name], name, **(attributes or {})))
        return name

    def conv(self, name: str, x: str, layer: nn.Conv2d) -> str:
        """Add a Conv with square kernel and stride; the bias is optional."""
        parameters = [self.constant(f"{name}.weight", layer.weight)]
        if layer.bias is not None:
            parameters.append(self.constant(f"{name}.bias", layer.bias))
        attributes = {
            "kernel_shape": layer.kernel_size,
            "strides": layer.stride,
            "pads": layer.padding * 2,
            "group": layer.groups,
        }
        return self.node("Conv", name, [x, *parameters], attributes)

    def batch_norm(self, name: str, x: str, layer: nn.BatchNorm2d) -> str:
        """Add a BatchNormalization in inference mode."""
        parameters = {
            "scale": layer.weight,
            "bias": layer.bias,
            "mean": layer.running_mean,
            "variance": layer.running_var,
        }
        inputs = [self.constant(f"{name}.{key}", value) for key, value in parameters.items()]
        return self.node("BatchNormalization", name, [x, *inputs], {"epsilon": layer.eps})

    def layer_norm(self, name: str, x: str, layer: nn.LayerNorm) -> str:
        """Add a LayerNormalization over the last axis."""
        inputs = [self.constant(f"{name}.scale", layer.weight), self.constant(f"{name}.bias", layer.bias)]
        return self.node("LayerNormalization", name, [x, *inputs], {"axis": -1, "epsilon": layer.eps})

    def projection(self, name: str, x: str, layer: nn.Linear) -> str:
        """Add MatMul and Add: a linear layer on the last axis of any rank."""
        product = self.node("MatMul", name, [x, self.constant(f"{name}.weight", layer.weight.T)])
        return self.node("Add", f"{name}.add", [product, self.constant(f"{name}.bias", layer.bias)])

    def gemm(self, name: str, x: str, layer: nn.Linear) -> str:
        """Add a Gemm: a linear layer on a matrix, weights (out, in) as torch keeps them."""
        inputs = [self.constant(f"{name}.weight", layer.weight), self.constant(f"{name}.bias", layer.bias)]
        return self.node("Gemm", name, [x, *inputs], {"transB": 1})

    def model(self, name: str) -> onnx.ModelProto:
        """The checked model, opset 17: `image` (N, 1, 8, 8) to `logits` (N, 10), the last node's output."""
        self.nodes[-1].output[0] = "logits"
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])
        graph = helper.make_graph(self.nodes, name, [image], [logits], self.initializers)
        model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
        onnx.checker.check_model(model, full_check=True)
        return model


def save(model: nn.Module, graph: GraphBuilder, name: str) -> None:
    """Write `<name>.onnx` beside this file and print its test accuracy.

    Raises AssertionError unless onnxruntime's logits equal the torch model's to 1e-4.
    """
    proto = graph.model(name)
    images, labels = split()["test"]
    session = InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(torch.from_numpy(images)).numpy(), rtol=1e-4, atol=1e-4)
    onnx.save(proto, FOLDER / f"{name}.onnx")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}: {parameters} parameters, test accuracy {(logits.argmax(1) == labels).mean():.4f}")


if __name__ == "__main__":
    write_data()
