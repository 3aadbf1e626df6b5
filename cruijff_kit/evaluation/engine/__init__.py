"""Answers many prompts at once by the model in memory. The part of evaluation that knows torch.

request     what is asked and what is answered
chat_model  the model as evaluation sees it, and the prefix that it remembers
session     which requests are computed together: they join as they come and leave as they finish
shared      sessions of several adapters on one base, in common passes
attention   keys and values: of the prefix that all share, and of each row's own tokens
products    a CPU's matrix products, on copies of the weights in a layout of their own
choosing    the next token of each row, by the row's own settings
options     logits of a few tokens, projected in full precision
"""

from cruijff_kit.evaluation.engine.chat_model import ChatModel
from cruijff_kit.evaluation.engine.multi_lora import SharedPasses, base_of
from cruijff_kit.evaluation.engine.request import Answer, Request, Sampling, TokenLogprob
from cruijff_kit.evaluation.engine.scheduler import Session

__all__ = ["Answer", "ChatModel", "Request", "Sampling", "Session", "SharedPasses", "TokenLogprob", "base_of"]
