"""What training asks of the model: passes. A recipe is a story that asks for them; whoever holds the model computes them.

A recipe's story is a generator: it yields a Pass and is sent what came of it. One recipe computes its own (`told`); a pack
tells many stories side by side and computes together what they ask for (recipes/lora_multi.py).
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from cruijff_kit.training.out_of_memory import free_exception_frames

if TYPE_CHECKING:
    import torch

    from cruijff_kit.data.examples import Example
    from cruijff_kit.data.packing import Pack


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model together.

    learn: with dropout, and their gradients are added to the adapter's. by: the recipe that asks.
    """

    examples: "list[Example | Pack]"
    learn: bool
    by: Any = None


Passed = tuple["torch.Tensor", int, int]
"""What came of a pass: summed loss of the labelled tokens (a scalar without a graph), their number, all tokens."""

T = TypeVar("T")
Story = Generator[Any, Any, T]
"""Asks for passes and is sent what came of them; the story of a whole run asks for evaluations, too (evaluate.Cell)."""


def told(story: Story[T], compute: Callable[[Any], Any]) -> T:
    """Tell a story from its beginning to its end; what fails in `compute` is raised where the story asked for it."""
    try:
        asked = next(story)
        while True:
            found = failed = None
            try:
                found = compute(asked)
            except BaseException as error:
                failed = error
                free_exception_frames(error)
            asked = story.send(found) if failed is None else story.throw(failed)
    except StopIteration as ended:
        return ended.value
