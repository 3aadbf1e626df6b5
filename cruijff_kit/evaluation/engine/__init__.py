"""Completes many prompts at once by a model in memory. The part of evaluation that knows torch.

request     what the engine takes and returns: requests and completions
chat_model  a model in memory, and the prefix that it remembers
scheduler   which requests are computed together: they join as they come and leave as they finish
forward     what a scheduler requests of a model
single_model, multi_lora  engines: of one model; of several adapters on one base, in common passes
interfaces  what inspect-ai's side needs of a model, a scheduler and an engine
attention   keys and values: of the prefix that all share, and of each row's own tokens
onednn      weights prepared for a CPU's matrix products
sampling    the next token of each row, by the row's own settings
options     logits of a few tokens, projected in full precision
"""

from cruijff_kit.evaluation.engine.chat_model import ChatModel
from cruijff_kit.evaluation.engine.interfaces import AnsweringModel, Engine, RequestScheduler
from cruijff_kit.evaluation.engine.multi_lora import MultiLoraEngine, base_of
from cruijff_kit.evaluation.engine.request import Completion, CompletionRequest, Sampling, TokenLogprob
from cruijff_kit.evaluation.engine.scheduler import Scheduler
from cruijff_kit.evaluation.engine.single_model import SingleModelEngine

__all__ = [
    "AnsweringModel",
    "Engine",
    "RequestScheduler",
    "SingleModelEngine",
    "ChatModel",
    "Completion",
    "CompletionRequest",
    "MultiLoraEngine",
    "Sampling",
    "Scheduler",
    "TokenLogprob",
    "base_of",
]
