"""One head for each task, found by the name of the task.

A task has the name of the user's column: `type`, `tumor.grade`, `a/b`. Such a name cannot be the name of a module, so
the heads are numbered in the order of the tasks.
"""

from collections.abc import Iterable, Iterator, Mapping

from torch import nn


class Heads(nn.Module):
    """A mapping from the names of tasks, any text, to modules.

    Args:
        heads: task -> module. The order of the tasks is the order of the weights in the state.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.by_task = nn.ModuleList(heads.values())
        self._number = {task: number for number, task in enumerate(heads)}

    def __getitem__(self, task: str) -> nn.Module:
        return self.by_task[self._number[task]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._number)

    def __len__(self) -> int:
        return len(self._number)

    def items(self) -> Iterable[tuple[str, nn.Module]]:
        return zip(self._number, self.by_task, strict=True)

    def prefix(self, task: str) -> str:
        """Return the text that the names of a task's weights start with in the state of this module."""
        return f"by_task.{self._number[task]}."
