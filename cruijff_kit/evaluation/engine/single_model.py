"""One model answers by itself."""

from cruijff_kit.evaluation.engine.chat_model import ChatModel
from cruijff_kit.evaluation.engine.interfaces import Engine
from cruijff_kit.evaluation.engine.scheduler import Scheduler


class SingleModelEngine(Engine):
    """Computes the requests of one model."""

    def open_scheduler(self, chat_model: ChatModel, max_rows: int | None = None) -> Scheduler:
        """Open a scheduler with ChatModel.open_scheduler."""
        return chat_model.open_scheduler(max_rows)

    def step(self, schedulers: list[Scheduler]) -> dict[Scheduler, Exception]:
        """Do one step of each scheduler, as Engine.step."""
        failures: dict[Scheduler, Exception] = {}
        for scheduler in schedulers:
            try:
                scheduler.step()
            except Exception as error:
                failures[scheduler] = error
        return failures
