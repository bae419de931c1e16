"""The row pass on small inputs, for a memory checker and for machines without pytest.

    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/row_pass_memory.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python bench/row_pass_memory.py --backends cuda

Each kernel that can run here, for every dtype, on aligned rows and others, in place and not, resident in a cluster and
past any. Exit status 1 if a result differs from the torch backend's by more than rounding. Allocations are not cached,
so that the checker sees an access behind a tensor's end.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from rlvr_fast.backends import row_pass

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = ((FP32, None), (FP32, FP32), (FP32, BF16), (BF16, None), (BF16, BF16), (BF16, FP32), (FP16, FP16))
VOCABULARIES = {"cuda": (33, 4096, 70001, 500000), "cpu": (33, 96)}
ROUNDING = {FP32: 1e-4, BF16: 2e-2, FP16: 4e-3}


def worst(name: str, dtype: torch.dtype, block_dtype: torch.dtype | None, vocabulary: int,
          device: torch.device) -> float:
    """The largest deviation from the torch backend, in units of what rounding allows; above 1 is wrong."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(2, vocabulary, generator=generator)).to(device, dtype)
    tokens = torch.tensor([0, vocabulary - 1], device=device)
    expected_block = None if block_dtype is None else torch.zeros_like(logits, dtype=FP32)
    expected = row_pass.logits_pass(logits, tokens, 0.7, 30.0, expected_block, backend="torch")
    block = None
    if block_dtype is not None:
        block = logits if block_dtype == dtype else torch.zeros_like(logits, dtype=block_dtype)
    actual = row_pass.logits_pass(logits, tokens, 0.7, 30.0, block, backend=name)
    differences = [(a - e).abs() / (e.abs() + 1e-2) for a, e in zip(actual, expected, strict=True)]
    deviation = torch.stack(differences).max().item() / 1e-4
    if block is not None:
        difference = (block.float() - expected_block).abs() / (expected_block.abs() + 1e-5)
        deviation = max(deviation, difference.max().item() / ROUNDING[block_dtype])
    return deviation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: Triton interpreted, if it is")
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"], choices=("triton", "cuda"))
    options = parser.parse_args()
    device, failed = torch.device(options.device), 0
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    for name in options.backends:
        reason = row_pass.unavailable(name, device)
        if reason is not None:
            print(f"{name}: not run ({reason})")
            continue
        deviations = [worst(name, *pair, vocabulary, device) for pair in PAIRS for vocabulary in
                      VOCABULARIES[device.type]]
        wrong = sum(not deviation <= 1 for deviation in deviations)
        failed += wrong
        print(f"{name}: {len(deviations)} cases, {wrong} wrong, worst {max(deviations):.2g} of what rounding allows")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
