"""verl's own TrainingWorker with its FSDP2 engine on CPU ranks, and what they answer. Spawned processes import it.

verl has no platform for processors, but a registry for platforms and one for engines: one is given here, the other is
told by VERL_ENGINE_DEVICE which engine is meant.
"""

from __future__ import annotations

import importlib
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gloo_ranks
import torch
import torch.distributed as dist

WORLDS = (2, 1)
RESPONSES, MICRO_BATCH = 8, 2


def use_processors() -> None:
    """Have verl take the CPU for its accelerator."""
    os.environ["VERL_ENGINE_DEVICE"] = "cuda"
    import verl  # noqa: F401
    from verl.plugin.platform import set_platform
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    def nothing(*args) -> int:
        return 0

    class Processors(PlatformCUDA):
        device_name = "cpu"
        device_module = SimpleNamespace(get_device_name=lambda *args: "CPU", is_available=lambda: False,
                                        max_memory_allocated=nothing, max_memory_reserved=nothing,
                                        memory_allocated=nothing, memory_reserved=nothing,
                                        mem_get_info=lambda: (0, 0))

        def is_available(self) -> bool:
            return True

        def current_device(self) -> str:
            return "cpu"

        synchronize = empty_cache = set_device = nothing

        def communication_backend_name(self) -> str:
            return "gloo"

    set_platform(Processors())


def save_model(folder: Path) -> str:
    """A tiny random Qwen2; its path. Tied: verl's own fused forward cannot read an untied head under FSDP2."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl_steps import VOCABULARY

    path = folder / "model"
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"])).save_pretrained(path)
    return str(path)


def worker(path: str, loss_mode: str, *, fused: bool = False, packed: bool = False):
    """A TrainingWorker as verl's actor is one, with ``ppo_loss`` and the loss mode."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss
    from verl_steps import actor

    model = HFModelConfig(path=path, load_tokenizer=False, use_remove_padding=packed, use_fused_kernels=fused,
                          fused_kernel_options={"impl_backend": "torch"}, enable_gradient_checkpointing=False,
                          override_config={"attn_implementation": "eager"})
    engine = FSDPEngineConfig(strategy="fsdp2", dtype="float32", use_torch_compile=False,
                              use_dynamic_bsz=False, micro_batch_size_per_gpu=MICRO_BATCH,
                              mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"})
    optimizer = FSDPOptimizerConfig(lr=1e-2, total_training_steps=10, lr_warmup_steps_ratio=0.0)
    found = TrainingWorker(TrainingWorkerConfig(
        model_type="language_model", model_config=model, engine_config=engine, optimizer_config=optimizer,
        checkpoint_config=CheckpointConfig()))
    found.reset()
    found.set_loss_fn(partial(ppo_loss, config=actor(loss_mode)))
    return found


def share(**non_tensors):
    """This rank's part of the batch, as verl's engine takes it."""
    from verl.utils import tensordict_utils
    from verl.workers.utils.padding import left_right_2_no_padding
    from verl_steps import LossInputs

    count = RESPONSES // dist.get_world_size()
    own = slice(dist.get_rank() * count, (dist.get_rank() + 1) * count)
    data = left_right_2_no_padding(LossInputs.sample(5, RESPONSES).padded()[own])
    tensordict_utils.assign_non_tensor(data, temperature=0.7, **non_tensors)
    return data


def step(path: str, loss_mode: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """(what the driver logs, the weights after it) of one mini-batch, two epochs; each rank takes its share of it."""
    from verl.utils import tensordict_utils
    from verl.utils.metric import reduce_metrics
    from verl.utils.py_functional import rename_dict

    trained = worker(path, loss_mode)
    data = share(calculate_entropy=False, global_batch_size=RESPONSES, mini_batch_size=RESPONSES, epochs=2, seed=0,
                 dataloader_kwargs={"shuffle": False}, compute_loss=True)
    metrics = tensordict_utils.get(trained.train_mini_batch(data), "metrics")
    weights = {name: value.full_tensor() for name, value in trained.engine.module.state_dict().items()}
    return reduce_metrics(rename_dict(metrics, "actor/")), weights


def log_probs(path: str, *, fused: bool, own_engine: bool, packed: bool = False, sum_p_sq: bool = True
              ) -> dict[str, torch.Tensor] | str:
    """What the driver asks for before an update, as the tokens' values in a row; or verl's refusal."""
    from transformers import Qwen2ForCausalLM
    from verl.utils import tensordict_utils

    stock = Qwen2ForCausalLM.forward  # verl's fused kernels replace it for all models of the class
    os.environ["VERL_ENGINE_VENDOR"] = "rlvr_fast" if own_engine else "nvidia"
    try:
        data = share(calculate_entropy=True, calculate_sum_pi_squared=sum_p_sq, compute_loss=False,
                     micro_batch_size_per_gpu=MICRO_BATCH)
        output = worker(path, "vanilla", fused=fused, packed=packed).infer_batch(data)
        keys = ("log_probs", "entropy", "sum_pi_squared") if sum_p_sq else ("log_probs", "entropy")
        return {key: tensordict_utils.get(output, key).values() for key in keys}
    except NotImplementedError as refusal:
        return str(refusal)
    finally:
        Qwen2ForCausalLM.forward = stock


def work(rank: int, folder: str) -> None:
    use_processors()
    for module in ("verl_plugin", "verl_engine"):  # the first loads itself where the package is installed
        importlib.import_module(f"rlvr_fast.integrations.{module}")
    path = str(Path(folder) / "model")

    def scenarios(ranks: int) -> dict:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": "29500"}
        return {mode: partial(step, path, mode) for mode in ("vanilla", "rlvr:vanilla", "rlvr:gspo")} | {
            "logits": partial(log_probs, path, fused=False, own_engine=False),
            "refused": partial(log_probs, path, fused=True, own_engine=False),
            "verl's fused": partial(log_probs, path, fused=True, own_engine=False, sum_p_sq=False),
            "fused": partial(log_probs, path, fused=True, own_engine=True),
            "packed": partial(log_probs, path, fused=True, own_engine=True, packed=True),
            "own engine, logits": partial(log_probs, path, fused=False, own_engine=True)}

    gloo_ranks.answer(rank, folder, WORLDS, scenarios)
