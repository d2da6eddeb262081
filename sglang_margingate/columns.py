"""How the scheduler hands rows to the trace: columns of few values, and columns that are not made yet. Needs no pyarrow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, overload


class Shared(Sequence[Any]):
    """A column in which many rows have the same value.

    Parameters
    ----------
    values
        The values, each once.
    at
        Which of them each row has, as C ints.
    """

    __slots__ = ("at", "values")

    def __init__(self, values: Sequence[Any], at: array[int]) -> None:
        self.values, self.at = values, at

    @classmethod
    def of(cls, objects: Sequence[Hashable]) -> Shared:
        """Return a column of objects, most of them met several times."""
        number = {each: n for n, each in enumerate(dict.fromkeys(objects))}
        return cls(tuple(number), array("i", map(number.__getitem__, objects)))

    @classmethod
    def all(cls, value: Any, rows: int) -> Shared:
        """Return a column of one value."""
        return cls((value,), array("i", bytes(array("i").itemsize * rows)))

    def with_values(self, values: Iterable[Any]) -> Shared:
        """Return the column that has ``values`` in place of these ones, one for one."""
        return Shared(tuple(values), self.at)

    def __len__(self) -> int:
        return len(self.at)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> Shared: ...
    def __getitem__(self, at: int | slice) -> Any:
        return Shared(self.values, self.at[at]) if isinstance(at, slice) else self.values[self.at[at]]


class LateColumns(ABC):
    """Rows whose columns are made by whoever asks for them: the writer, on its own thread."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, at: slice) -> LateColumns: ...

    @classmethod
    @abstractmethod
    def joined(cls, parts: Sequence[Any]) -> LateColumns:
        """Return the rows of all parts, of this class too, in their order."""

    @abstractmethod
    def columns(self) -> Mapping[str, Sequence[Any]]:
        """Return equally long columns by name; an absent one is null."""
