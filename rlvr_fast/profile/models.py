"""Shapes of public models: what decides the cost of gradient analysis at the lm_head, and of a training step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """D, V and the soft cap on the final logits from the model's config.json, parameters with a tied lm_head counted
    once; ``source`` is its model card on huggingface.co."""

    hidden_size: int
    vocabulary_size: int
    parameters: int | None
    source: str
    softcap: float | None = None


MODELS = {
    "smollm2-135m": ModelShape(576, 49152, 134_515_008, "HuggingFaceTB/SmolLM2-135M"),
    "smollm2-1.7b": ModelShape(2048, 49152, 1_711_376_384, "HuggingFaceTB/SmolLM2-1.7B"),
    "qwen2.5-0.5b": ModelShape(896, 151936, 494_032_768, "Qwen/Qwen2.5-0.5B"),
    "qwen2.5-1.5b": ModelShape(1536, 151936, 1_543_714_304, "Qwen/Qwen2.5-1.5B"),
    "qwen2.5-3b": ModelShape(2048, 151936, 3_085_938_688, "Qwen/Qwen2.5-3B"),
    "qwen2.5-7b": ModelShape(3584, 152064, 7_615_616_512, "Qwen/Qwen2.5-7B"),
    "qwen2.5-14b": ModelShape(5120, 152064, 14_770_033_664, "Qwen/Qwen2.5-14B"),
    "qwen2.5-32b": ModelShape(5120, 152064, 32_763_876_352, "Qwen/Qwen2.5-32B"),
    "qwen2.5-72b": ModelShape(8192, 152064, 72_706_203_648, "Qwen/Qwen2.5-72B"),
    "qwen3-8b": ModelShape(4096, 151936, 8_190_735_360, "Qwen/Qwen3-8B"),
    "llama-3.2-1b": ModelShape(2048, 128256, 1_235_814_400, "meta-llama/Llama-3.2-1B"),
    "llama-3-8b": ModelShape(4096, 128256, 8_030_261_248, "meta-llama/Meta-Llama-3-8B"),
    "llama-3-70b": ModelShape(8192, 128256, 70_553_706_496, "meta-llama/Meta-Llama-3-70B"),
    "gemma-2-2b": ModelShape(2304, 256000, 2_614_341_888, "google/gemma-2-2b", 30.0),
    "gemma-2-9b": ModelShape(3584, 256000, 9_241_705_984, "google/gemma-2-9b", 30.0),
}
