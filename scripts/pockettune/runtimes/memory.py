"""Memory that runs out, told in one line."""

import contextlib
from collections.abc import Iterator

import torch

from pockettune.common.errors import UserError

# Of a model that is scored or measured.
ELSEWHERE = "run it where nothing else takes the memory, or on the CPU: CUDA_VISIBLE_DEVICES=-1"


@contextlib.contextmanager
def memory_hint(remedy: str) -> Iterator[None]:
    """Turn running out of memory while the block runs into a line that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error).splitlines() or ["no details"])[0]
        raise UserError(f"out of memory ({first_line[:200]}): {remedy}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception is an allocator's, of a GPU or of the CPU.

    A GPU says it in several ways: through PyTorch's allocator, or as an error of CUDA itself.
    """
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    told = str(error)
    return known or "DefaultCPUAllocator" in told or "CUDA error: out of memory" in told
