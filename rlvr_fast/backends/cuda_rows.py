"""The CUDA row pass of csrc/cuda: loaded when first asked for, since most machines have no use for it."""

from __future__ import annotations

import functools
import importlib

import torch

from rlvr_fast.backends.base import TokenPass

N_RESULTS = 6
LARGEST_VOCABULARY = 2**30 - 1
CLUSTERS = (1, 2, 4, 8)
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _why_missing() -> str | None:
    """Why the extension cannot be imported; None if it can."""
    try:
        importlib.import_module("rlvr_fast._cuda_rows")
    except ImportError as error:
        return str(error)
    return None


def unavailable(device: torch.device) -> str | None:
    """Why the CUDA row pass cannot serve tensors on ``device``; None if it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the CUDA row pass needs an NVIDIA GPU, the tensors are on {device}"
    if _why_missing() is not None:
        return f"the CUDA extension is not built ({_why_missing()}); install with nvcc on PATH or under CUDA_HOME"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"the CUDA row pass needs compute capability 8.0, {torch.cuda.get_device_name(device)} is older"
    return None


def logits_pass(logits: torch.Tensor, tokens: torch.Tensor, temperature: float, softcap: float | None = None,
                block: torch.Tensor | None = None, *, smallest_cluster: int = 1) -> TokenPass:
    """``row_pass.logits_pass`` for logits with adjacent elements in each row, on the caller's stream.

    ``smallest_cluster``: thread blocks that share a row when ``block`` is written, at least (1, 2, 4 or 8). The default
    takes as few as can hold it; more leave room for a second row on each multiprocessor.

    Raises:
        ValueError: a vocabulary of 2^30 or more, or a cluster of another size.
        RuntimeError: a CUDA call failed; the message says which, and with what error.
    """
    from rlvr_fast import _cuda_rows

    n_rows, vocabulary = logits.shape
    if vocabulary > LARGEST_VOCABULARY:
        raise ValueError(f"logits must have V <= {LARGEST_VOCABULARY}, got {vocabulary}")
    if smallest_cluster not in CLUSTERS:
        raise ValueError(f"smallest_cluster must be one of {CLUSTERS}, got {smallest_cluster!r}")
    results = torch.empty(N_RESULTS, n_rows, dtype=torch.float32, device=logits.device)
    if n_rows:
        _cuda_rows.row_pass(
            logits_dtype=_DTYPE_CODES[logits.dtype], logits=logits.data_ptr(), logits_stride=logits.stride(0),
            tokens=tokens.data_ptr(), block_dtype=_DTYPE_CODES[logits.dtype if block is None else block.dtype],
            block=0 if block is None else block.data_ptr(), block_stride=0 if block is None else block.stride(0),
            rows=n_rows, vocabulary=vocabulary, inverse_temperature=1.0 / temperature, softcap=softcap or 0.0,
            results=results.data_ptr(), device=results.get_device(),
            stream=torch.cuda.current_stream(logits.device).cuda_stream, smallest_cluster=smallest_cluster)
    return TokenPass(*results)


def row_layout(dtype: torch.dtype, vocabulary: int, with_block: bool, device: torch.device, *,
               smallest_cluster: int = 1) -> tuple[int, int, int]:
    """(thread blocks per row, threads per block, bytes of shared memory per block) that ``logits_pass`` takes."""
    from rlvr_fast import _cuda_rows

    return _cuda_rows.row_layout(_DTYPE_CODES[dtype], vocabulary, with_block, device.index or 0, smallest_cluster)
