"""Errors for want of memory: how to tell them, and how to free what they hold."""

import traceback

from cruijff_kit.records.failures import OUT_OF_GPU_MEMORY, OUT_OF_MEMORY, find_cause


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer rows at once might do."""
    return find_cause(error) in (OUT_OF_GPU_MEMORY, OUT_OF_MEMORY)


def free_exception_frames(error: BaseException) -> None:
    """Clear the frames of an out-of-memory error; their local variables hold tensors. Other errors are left alone."""
    if is_out_of_memory(error):
        traceback.clear_frames(error.__traceback__)
