"""Recognise out-of-memory errors, and free the memory that they hold."""

import traceback

from cruijff_kit.records.failures import OUT_OF_GPU_MEMORY, OUT_OF_MEMORY, find_cause


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is an out-of-memory error, which fewer rows per pass may avoid."""
    return find_cause(error) in (OUT_OF_GPU_MEMORY, OUT_OF_MEMORY)


def free_exception_frames(error: BaseException) -> None:
    """Free the frames of an out-of-memory error, whose locals hold tensors. Other errors are not changed."""
    if is_out_of_memory(error):
        traceback.clear_frames(error.__traceback__)
