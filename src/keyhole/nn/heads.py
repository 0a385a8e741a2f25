"""One head per task, found by the task's name; the names of their weights are numbers.

A task is called what the user called a column: `type`, `tumor.grade`, `a/b`. Such a name cannot be the name of a
module, so the heads are numbered in the order of the tasks.
"""

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView

from torch import nn


class Heads(nn.Module):
    """A mapping of task names, any text, to modules.

    Args:
        heads: task -> module. The order of the tasks is the order of the weights in the state.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.by_task = nn.ModuleList(heads.values())
        self._place = {task: place for place, task in enumerate(heads)}

    def __getitem__(self, task: str) -> nn.Module:
        return self.by_task[self._place[task]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, task: object) -> bool:
        return task in self._place

    def keys(self) -> KeysView[str]:
        return self._named().keys()

    def values(self) -> ValuesView[nn.Module]:
        return self._named().values()

    def items(self) -> ItemsView[str, nn.Module]:
        return self._named().items()

    def _named(self) -> dict[str, nn.Module]:
        return dict(zip(self._place, self.by_task, strict=True))

    def prefix(self, task: str) -> str:
        """What the names of the weights of a task's head start with in the state of this module."""
        return f"by_task.{self._place[task]}."
