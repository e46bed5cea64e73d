"""Datasets of whole feeds, each one batch; those that Python functions and iterables yield."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxq.data.checks import as_array, as_labels, check_feed, check_label_dtype, label_name
from onnxq.data.dataset import Batch, Dataset
from onnxq.data.inputs import InputSpec
from onnxq.errors import DataError, OnnxqError, UsageError


class FeedDataset(Dataset):
    """Batches that come ready made. The asked batch size does not apply.

    A pass ends with the feed that reaches the limit. A feed that goes beyond is cut when it can be; otherwise
    it is left out, unless it is the first.
    """

    whole = True
    cuts: ClassVar[bool]  # whether feeds may be cut

    @abstractmethod
    def _feeds(self, limit: int | None) -> Iterator[Batch]:
        """Checked feeds."""

    def _batches(self, batch: int, limit: int | None) -> Iterator[Batch]:
        taken = 0
        for feed in self._feeds(limit):
            left = feed.size if limit is None else limit - taken
            if feed.size > left:
                if self.cuts and _can_cut(feed, self.inputs):
                    yield _cut(feed, left)
                elif not taken:
                    yield feed
                return
            taken += feed.size
            yield feed
            if taken == limit:
                return


def _can_cut(feed: Batch, inputs: Sequence[InputSpec]) -> bool:
    dynamic = all(
        spec.shape is None or (spec.shape and not isinstance(spec.shape[0], int)) for spec in inputs
    )
    return dynamic and all(array.shape[:1] == (feed.size,) for array in feed.feeds.values())


def _cut(feed: Batch, size: int) -> Batch:
    feeds = {name: array[:size] for name, array in feed.feeds.items()}
    return Batch(feeds, None if feed.labels is None else feed.labels[:size], size)


class FunctionDataset(FeedDataset):
    """Feeds from Python: dicts name -> array, possibly with `label`, or tuples (dict, labels)."""

    cuts = True

    def __init__(
        self, source: str, where: str, inputs: Sequence[InputSpec], start: Callable[[], Any]
    ) -> None:
        """`start` gives an iterable of feeds, each time from the first."""
        super().__init__(source, where, inputs)
        self._start = start
        self._labelled: bool | None = None

    @property
    def has_labels(self) -> bool:
        """Whether the first feed has labels; reads it when nothing has been read yet."""
        if self._labelled is None:
            next(self._feeds(None), None)
        return bool(self._labelled)

    def _feeds(self, limit: int | None) -> Iterator[Batch]:
        size = 0
        for number, item in enumerate(self._items()):
            feed = _checked(f"{self.where}, feed {number}", item, self.inputs, size)
            labelled = feed.labels is not None
            if number and labelled != self._labelled:
                has = "has labels" if labelled else "has no labels"
                raise DataError(f"{self.where}, feed {number} {has}, unlike the feeds before it")
            self._labelled = labelled
            size += feed.size
            yield feed

    def _items(self) -> Iterator[Any]:
        """What the user's code yields; what it raises is told with the feed at which it stopped."""
        number = 0
        try:
            items = self._start()
            if isinstance(items, Mapping | str | bytes) or not isinstance(items, Iterable):
                kind = type(items).__name__
                raise DataError(f"{self.where} gave a {kind}; it must yield dicts of input name -> array")
            for item in items:
                yield item
                number += 1
        except OnnxqError:
            raise
        except Exception as error:  # the user's code may raise anything; it stays the cause
            raise DataError(
                f"{self.where} failed at feed {number} with {type(error).__name__}: {error}"
            ) from error


def function_dataset(
    source: str, where: str, inputs: Sequence[InputSpec], function: Callable[..., Any]
) -> FunctionDataset:
    """The feeds of a function.

    It is called once per pass: without arguments, or with the inputs' specs when it requires one parameter.

    Raises:
        UsageError: it requires more.
    """
    empty = inspect.Parameter.empty
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have no signature
        parameters = {}.values()
    required = [p for p in parameters if p.default is empty and p.kind not in variadic]
    if len(required) > 1 or any(p.kind is inspect.Parameter.KEYWORD_ONLY for p in required):
        names = ", ".join(p.name for p in required)
        raise UsageError(f"{where} requires arguments ({names}); it must take none, or one: the input specs")
    specs = tuple(inputs)
    return FunctionDataset(source, where, inputs, (lambda: function(specs)) if required else function)


def _checked(where: str, item: object, inputs: Sequence[InputSpec], start: int) -> Batch:
    """A yielded item as a batch; `start` is the number of its first sample."""
    labels: object = None
    if isinstance(item, tuple) and len(item) == 2:
        item, labels = item
    if not isinstance(item, Mapping):
        kind = type(item).__name__
        raise DataError(
            f"{where} is a {kind}; yield a dict of input name -> array, or a tuple (dict, labels)"
        )
    name = label_name(where, [str(key) for key in item], inputs)
    if name is not None and labels is not None:
        raise DataError(f"{where} has labels twice: in the tuple and in its array {name!r}")
    feed = {spec.name: as_array(where, spec.name, item[spec.name]) for spec in inputs}
    size = feed_size(where, feed, inputs)
    given = item[name] if name else labels
    return Batch(
        check_feed(where, feed, inputs, start),
        None if given is None else _labels(where, given, size, start),
        size,
    )


def feed_size(where: str, feed: Mapping[str, NDArray[Any]], inputs: Sequence[InputSpec]) -> int:
    """Samples in a feed: the leading size, of dynamic dimensions where there are any.

    Where inputs have different ones, as the nodes and edges of a graph, the feed is one sample.

    Raises:
        DataError: leading dimensions that share a symbol do not agree.
    """
    symbols: dict[str, tuple[str, int]] = {}
    dynamic: set[int] = set()
    fixed: set[int] = set()
    for spec in inputs:
        array = feed[spec.name]
        if not array.ndim or spec.shape == ():
            continue
        symbol, size = spec.shape[0] if spec.shape else None, array.shape[0]
        (fixed if isinstance(symbol, int) else dynamic).add(size)
        if not isinstance(symbol, str):
            continue
        name, known = symbols.setdefault(symbol, (spec.name, size))
        if size != known:
            raise DataError(
                f"{where}: arrays differ in samples: {name!r} has {known}, {spec.name!r} has {size}"
            )
    sizes = dynamic or fixed
    return sizes.pop() if len(sizes) == 1 else 1


def _labels(where: str, labels: object, size: int, start: int) -> NDArray[Any]:
    array = np.atleast_1d(as_array(where, "label", labels))
    check_label_dtype(where, array.dtype)
    if len(array) != size:
        raise DataError(f"{where} has {len(array)} labels for {size} samples")
    return as_labels(where, array, np.arange(start, start + size))
