"""Where an output has its samples and its class scores."""

from __future__ import annotations

from collections.abc import Sequence

import onnxruntime as ort


def class_axis(shape: Sequence[int]) -> int:
    """The axis of the class scores of an output, if it holds any.

    Rows (N, C) and images (N, C, H, W) have them in axis 1, sequences (N, T, C) and images of channels last (N, H, W, C) in the
    last one. Images have fewer classes than rows or columns, by which the two are told apart; of one place, they are rows.

    Args:
        shape: of two or more axes.

    >>> class_axis((8, 1000)), class_axis((8, 21, 64, 64)), class_axis((8, 40, 6625)), class_axis((8, 64, 64, 21))
    (1, 1, 2, 3)
    >>> class_axis((8, 1000, 1, 1)), class_axis((8, 1, 1, 1000))
    (1, 3)
    """
    last = len(shape) - 1
    if all(extent == 1 for extent in shape[2:]):
        return 1
    if last == 2 or all(extent == 1 for extent in shape[1:last]):
        return last
    return last if shape[last] < shape[1] else 1


def sample_axes(session: ort.InferenceSession) -> dict[str, int]:
    """The axis of the samples of each output: that of the name that the leading axis of an input has, else the leading one.

    Recurrent networks may put time first.
    """
    names = {i.shape[0] for i in session.get_inputs() if i.shape and isinstance(i.shape[0], str)}
    return {
        output.name: next((axis for axis, extent in enumerate(output.shape) if extent in names), 0)
        for output in session.get_outputs()
    }
