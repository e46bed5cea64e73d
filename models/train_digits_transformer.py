"""Train a small vision transformer on the digits and write `digits_transformer.onnx`."""

import torch
from digits import SEED, GraphBuilder, save, train
from torch import nn

WIDTH, HEADS, TOKENS = 96, 4, 16  # a token is a patch of 2x2 pixels


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of an image, (N, TOKENS, WIDTH) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5
        return self.output((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """A pre-norm encoder layer: attention and a GELU network of two layers, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.expand, self.project = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.project(nn.functional.gelu(self.expand(self.norm2(x))))


class DigitsTransformer(nn.Module):
    """Images (N, 1, 8, 8) to logits (N, 10): patches, two encoder layers, the mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(1, TOKENS, WIDTH))
        self.encoder = nn.Sequential(Encoder(), Encoder())
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.position
        return self.classifier(self.norm(self.encoder(x)).mean(1))


def export(model: DigitsTransformer) -> GraphBuilder:
    """The same network as ONNX nodes; GELU in its Erf form."""
    graph = GraphBuilder()
    split_shape = graph.constant("heads.shape", [0, TOKENS, HEADS, WIDTH // HEADS])
    merge_shape = graph.constant("tokens.shape", [0, TOKENS, WIDTH])
    channel_shape = graph.constant("patches.shape", [0, WIDTH, TOKENS])
    root = graph.constant("heads.root", torch.tensor((WIDTH // HEADS) ** 0.5))
    half, one, root2 = (
        graph.constant(f"gelu.{name}", torch.tensor(value))
        for name, value in (("half", 0.5), ("one", 1.0), ("root2", 2**0.5))
    )

    def heads(name: str, x: str, layer: nn.Linear, order: list[int]) -> str:
        y = graph.node("Reshape", f"{name}.reshape", [graph.projection(name, x, layer), split_shape])
        return graph.node("Transpose", f"{name}.transpose", [y], {"perm": order})

    def attention(name: str, x: str, layer: Attention) -> str:
        query = heads(f"{name}.query", x, layer.query, [0, 2, 1, 3])
        key = heads(f"{name}.key", x, layer.key, [0, 2, 3, 1])
        value = heads(f"{name}.value", x, layer.value, [0, 2, 1, 3])
        scores = graph.node("MatMul", f"{name}.scores", [query, key])
        scores = graph.node("Div", f"{name}.scale", [scores, root])
        weights = graph.node("Softmax", f"{name}.softmax", [scores], {"axis": -1})
        mixed = graph.node("MatMul", f"{name}.context", [weights, value])
        mixed = graph.node("Transpose", f"{name}.context.transpose", [mixed], {"perm": [0, 2, 1, 3]})
        mixed = graph.node("Reshape", f"{name}.context.reshape", [mixed, merge_shape])
        return graph.projection(f"{name}.output", mixed, layer.output)

    def gelu(name: str, x: str) -> str:
        y = graph.node("Erf", f"{name}.erf", [graph.node("Div", f"{name}.div", [x, root2])])
        y = graph.node("Mul", f"{name}.mul", [x, graph.node("Add", f"{name}.add", [y, one])])
        return graph.node("Mul", f"{name}.half", [y, half])

    def encoder(name: str, x: str, layer: Encoder) -> str:
        y = graph.layer_norm(f"{name}.norm1", x, layer.norm1)
        x = graph.node("Add", f"{name}.add1", [x, attention(f"{name}.attention", y, layer.attention)])
        y = graph.layer_norm(f"{name}.norm2", x, layer.norm2)
        y = graph.projection(f"{name}.expand", y, layer.expand)
        y = graph.projection(f"{name}.project", gelu(f"{name}.gelu", y), layer.project)
        return graph.node("Add", f"{name}.add2", [x, y])

    x = graph.conv("patches", "image", model.patches)
    x = graph.node("Reshape", "patches.reshape", [x, channel_shape])
    x = graph.node("Transpose", "patches.transpose", [x], {"perm": [0, 2, 1]})
    x = graph.node("Add", "position.add", [x, graph.constant("position", model.position)])
    for index, layer in enumerate(model.encoder):
        x = encoder(f"encoder.{index}", x, layer)
    x = graph.layer_norm("norm", x, model.norm)
    x = graph.node("ReduceMean", "mean", [x], {"axes": [1], "keepdims": 0})
    graph.gemm("classifier", x, model.classifier)
    return graph


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = DigitsTransformer()
    train(model, epochs=200, rate=1e-3, decay=0.05)
    save(model, export(model), "digits_transformer")
