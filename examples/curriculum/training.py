"""GRPO on all levels at once, with the mixture of levels chosen anew every few steps."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch

import rlvr_fast as rf
from curriculum import task
from curriculum.policy import NextToken, exact_success, new_policy, sample, warm_up
from rlvr_fast.demo.model import Policy
from rlvr_fast.spectrum import DifficultySpectrum, difficulty_spectrum
from rlvr_fast.spectrum.sampler import SpectrumSampler

ARMS = ("uniform", "success", "own gap", "shared gap")


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run besides its seed and its arm."""

    learning_rate: float = 5e-4
    ramp_steps: int = 10
    n_steps: int = 80
    n_prompts: int = 32
    group_size: int = 8
    window: int = 5  # steps that a mixture is kept for
    memory: int = 10  # steps that it is measured on, the last ones
    floor: float = 0.1
    warm_up_success: float = 0.6
    sketch_size: int = 16


QUICK = Settings(n_steps=4, n_prompts=8, window=2, memory=3, warm_up_success=0.02)


@dataclass(frozen=True)
class Data:
    """Problems of all levels; a problem's id is its row in ``problems``."""

    problems: torch.Tensor
    level: torch.Tensor
    pools: tuple[torch.Tensor, ...]
    held_out: tuple[torch.Tensor, ...]

    @classmethod
    def make(cls, generator: torch.Generator) -> Data:
        pools, held_out = zip(*(task.problems_of(level, generator) for level in task.LEVELS), strict=True)
        level = torch.repeat_interleave(torch.tensor(task.LEVELS), torch.tensor([len(pool) for pool in pools]))
        return cls(torch.cat(pools), level, pools, held_out)

    @property
    def bins(self) -> dict[int, list[int]]:
        return {level: (self.level == level).nonzero().squeeze(1).tolist() for level in task.LEVELS}

    def success(self, policy: Policy) -> list[float]:
        """Exact success rate of each level's held-out problems."""
        return [exact_success(policy, problems) for problems in self.held_out]


def start(seed: int, settings: Settings) -> tuple[Data, Policy, int]:
    """The problems and the warm-started policy that all arms of a seed share."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data, policy = Data.make(generator), new_policy()
    return data, policy, warm_up(policy, data.pools, data.held_out, settings.warm_up_success, generator)


def next_mixture(arm: str, rates: dict[int, float], spectrum: DifficultySpectrum | None, floor: float
                 ) -> dict[int, float]:
    """Level -> weight, from what was sampled lately. Levels that were not keep the floor.

    Args:
        rates: level -> success rate. spectrum: for the arms that follow a gap.
    """
    base = dict.fromkeys(task.LEVELS, 1.0)
    if arm == "uniform":
        return base
    if arm == "success":
        usable = {level: rates.get(level, 0.0) * (1 - rates.get(level, 0.0)) for level in task.LEVELS}
        total = sum(usable.values()) or 1.0
        return {level: (1 - floor) * usable[level] / total + floor / len(base) for level in task.LEVELS}
    return spectrum.mixture(allocation=arm.removesuffix(" gap"), base=base, floor=floor).as_dict()


def train(data: Data, policy: Policy, arm: str, seed: int, settings: Settings,
          on_window: Callable[[dict], None] = lambda record: None) -> list[dict]:
    """One run from a copy of ``policy``: a record for the start and for every window, the held-out success after it."""
    model = NextToken(copy.deepcopy(policy))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    sampler = SpectrumSampler(data.bins, batch_size=settings.n_prompts, n_batches=settings.n_steps, seed=seed)
    batches = torch.utils.data.DataLoader(range(len(data.problems)), sampler=sampler, batch_size=settings.n_prompts)
    level_of = dict(enumerate(data.level.tolist()))
    records = [{"step": 0, "rollouts": 0, "tokens": 0, "success": data.success(model.policy)}]
    measured, n_tokens = deque(maxlen=settings.memory), 0
    for step, ids in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1, step / settings.ramp_steps)
        measured.append(update(model, optimizer, data, ids, settings, generator, measure=arm.endswith("gap")))
        n_tokens += measured[-1][0].n_tokens
        if step % settings.window == 0:
            rates = success_by_level([rollouts for rollouts, _ in measured], level_of)
            spectrum = None
            if arm.endswith("gap"):
                spectrum = difficulty_spectrum([gap for _, gap in measured], level_of, across_steps=True,
                                               n_permutations=199, seed=seed)
            used = sampler.mixture
            sampler.update(next_mixture(arm, rates, spectrum, settings.floor))
            records.append({"step": step, "rollouts": step * settings.n_prompts * settings.group_size,
                            "tokens": n_tokens, "success": data.success(model.policy),
                            "mixture": [used[level] for level in task.LEVELS],
                            "sampled_success": rates, "spectrum": spectrum and levels_of(spectrum)})
            on_window(records[-1])
    return records


def update(model: NextToken, optimizer: torch.optim.Optimizer, data: Data, ids: torch.Tensor, settings: Settings,
           generator: torch.Generator, *, measure: bool) -> tuple[rf.Rollouts, rf.ModelGapResult | None]:
    """One GRPO step on a group of responses to each of ``ids``, and the gaps it was made of, if wanted."""
    sequences, rollouts = sample(model.policy, data.problems[ids], ids, settings.group_size, generator)
    weights = rf.loss_weights(rollouts, rf.advantages(rollouts, "grpo"), "grpo")
    probe = rf.ModelGap(model, rollouts, "sketch", sketch_size=settings.sketch_size) if measure else None
    optimizer.zero_grad()
    with probe or nullcontext():
        logits = rollouts.pack(model(sequences)[:, task.PROMPT_LENGTH - 1:-1])
        logp = logits.log_softmax(-1).gather(1, rollouts.tokens[:, None]).squeeze(1)
        (-(weights * logp).sum()).backward()
    optimizer.step()
    return rollouts, probe and probe.gap()


def success_by_level(batches: Sequence[rf.Rollouts], level_of: dict[int, int]) -> dict[int, float]:
    """Level -> success rate of the responses in all batches, for the levels that occur."""
    outcomes: dict[int, list[bool]] = {}
    for rollouts in batches:
        for prompt, correct in zip(rollouts.prompt_index.tolist(), rollouts.correct.tolist(), strict=True):
            outcomes.setdefault(level_of[rollouts.prompt_ids[prompt]], []).append(correct)
    return {level: sum(own) / len(own) for level, own in sorted(outcomes.items())}


def levels_of(spectrum: DifficultySpectrum) -> dict[str, dict]:
    """What the spectrum says of each level, for the record."""
    bins = spectrum.bins
    names = ("n", "success_rate", "low", "high", "norm_sq", "stderr", "p_value", "shared_norm_sq", "shared_stderr",
             "shared_p_value", "signal", "signal_stderr", "shared_signal", "shared_signal_stderr", "batch_share")
    prompts = [[verdict for verdict, own in zip(spectrum.prompts.verdict, spectrum.prompts.bin.tolist(), strict=True)
                if own == which] for which in range(len(spectrum.labels))]
    return {str(label): {name: getattr(bins, name)[which].item() for name in names}
            | {"verdict": bins.verdict[which], "prompts": {word: prompts[which].count(word) for word in prompts[which]}}
            for which, label in enumerate(spectrum.labels)}


def run_record(seed: int, arm: str, settings: Settings, warm_up_steps: int, records: list[dict]) -> dict:
    return {"seed": seed, "arm": arm, "settings": asdict(settings), "warm_up_steps": warm_up_steps, "records": records}
