"""What the answers are in float64, on a sample that is cheap to compute: rows spread over all tokens, one prompt."""

from __future__ import annotations

import torch

from rlvr_fast import reference
from rlvr_fast.bench.truth import prompt_truth
from rlvr_fast.bench.workload import Workload

from .inputs import GivenLogits, Steps
from .suite import Truth

SAMPLE_ROWS = 128
SAMPLE_ENTRIES = 64  # rows of the weight gradient, [V, D]
CHUNK_ROWS = 512  # float64 logits held at a time


def sample(total: int, count: int, device: torch.device) -> torch.Tensor:
    """At most ``count`` indices spread over 0..total-1, both ends among them."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64, device=device).round().long()


def _token_truth(z: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> dict[str, Truth]:
    slope = torch.ones((), dtype=torch.float64, device=z.device)
    values = {"logp": reference.log_prob(z, tokens), "entropy": reference.entropy(z),
              "sum_p_sq": reference.sum_p_sq(z), "score_sq": reference.score_sq(z, tokens, slope)}
    return {name: Truth(rows, value) for name, value in values.items()}


def token_statistics(inputs: Workload) -> dict[str, Truth]:
    rows = sample(inputs.shape.n_tokens, SAMPLE_ROWS, inputs.hidden.device)
    return _token_truth(reference.logits(inputs.hidden[rows], inputs.weight), inputs.tokens[rows], rows)


def row_statistics(inputs: GivenLogits) -> dict[str, Truth]:
    rows = sample(len(inputs.tokens), SAMPLE_ROWS, inputs.tokens.device)
    return _token_truth(inputs.logits[rows].double(), inputs.tokens[rows], rows)


def hidden_gradient(inputs: Workload) -> dict[str, Truth]:
    """∂ logp/∂ hidden of sampled tokens, then the statistics."""
    rows = sample(inputs.shape.n_tokens, SAMPLE_ROWS, inputs.hidden.device)
    z, tokens = reference.logits(inputs.hidden[rows], inputs.weight), inputs.tokens[rows]
    score = reference.score(z, tokens, torch.ones((), dtype=torch.float64, device=z.device))
    gradient = Truth(rows, reference.hidden_gradient(score, inputs.weight))
    return {"hidden_grad": gradient} | _token_truth(z, tokens, rows)


def logprob_gradients(inputs: Workload) -> dict[str, Truth]:
    """Gradients of Σ c logp by hidden (sampled tokens) and by weight (sampled vocabulary entries), and the forward."""
    truth = hidden_gradient(inputs)
    of_tokens = truth.pop("hidden_grad")
    coefficients = inputs.coefficients.double()
    scaled = Truth(of_tokens.rows, coefficients[of_tokens.rows, None] * of_tokens.value)
    return {"hidden_grad": scaled, "weight_grad": _weight_gradient(inputs, coefficients)} | truth


def _weight_gradient(inputs: Workload, coefficients: torch.Tensor) -> Truth:
    """Σ_t c_t (1[v = y_t] - p_tv) h_t; half of the entries v are sampled tokens."""
    half, device = SAMPLE_ENTRIES // 2, inputs.hidden.device
    some_tokens = inputs.tokens[sample(inputs.shape.n_tokens, half, device)]
    entries = torch.cat([sample(inputs.shape.vocabulary, half, device), some_tokens]).unique()
    gradient = torch.zeros(len(entries), inputs.shape.width, dtype=torch.float64, device=device)
    weight = inputs.weight.double()
    parts = (x.split(CHUNK_ROWS) for x in (inputs.hidden, inputs.tokens, coefficients))
    for hidden, tokens, c in zip(*parts, strict=True):
        z = reference.logits(hidden, weight)
        score = -torch.exp(z[:, entries] - z.logsumexp(1, keepdim=True))
        score += (tokens[:, None] == entries).double()
        gradient += (c[:, None] * score).T @ hidden.double()
    return Truth(entries, gradient)


def gap(inputs: Workload, level: str) -> dict[str, Truth]:
    """The last prompt's response gradients, or their Gram matrix at level "head", and its unbiased squared gap."""
    members = inputs.rollouts.members[-1]
    device = inputs.hidden.device
    truth = prompt_truth(inputs, members)
    correct = inputs.rollouts.correct[list(members)]
    prompt = torch.tensor([inputs.rollouts.n_prompts - 1], device=device)
    if level == "head":
        return {"gram": Truth(prompt, truth.gram[None]), "norm_sq": Truth(prompt, _gap_of_gram(truth.gram, correct))}
    gradients = getattr(truth, level)
    norm_sq = reference.gap_norm_sq(gradients[correct], gradients[~correct])[None]
    return {"gradients": Truth(torch.tensor(members, device=device), gradients), "norm_sq": Truth(prompt, norm_sq)}


def _gap_of_gram(gram: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """[1]: the unbiased squared gap from inner products; the diagonal is no pair."""
    pairs = gram - gram.diag().diag()
    within = [pairs[mask][:, mask].sum() / (mask.sum() * (mask.sum() - 1)) for mask in (correct, ~correct)]
    return (within[0] + within[1] - 2 * gram[correct][:, ~correct].mean())[None]


def weights(inputs: Steps) -> dict[str, Truth]:
    """GRPO weights of sampled tokens; all responses have one length."""
    rollouts = inputs.rollouts
    n_tokens, length = rollouts.n_tokens, rollouts.bounds[1]
    rewards, index, lengths = (x.cpu() for x in (rollouts.rewards, rollouts.prompt_index, rollouts.lengths))
    advantages = reference.grpo_advantages(rewards, index, lengths).to(rollouts.device)
    rows = sample(n_tokens, SAMPLE_ROWS, rollouts.device)
    return {"weights": Truth(rows, advantages[rows // length].double() / (length * rollouts.n_responses))}


def step(inputs: Steps) -> dict[str, Truth]:
    """Gain, alignment and curvature of the first and the last prompt."""
    rollouts = inputs.rollouts
    rows = torch.tensor([0, rollouts.n_prompts - 1], device=rollouts.device)
    columns = zip(*(_step_of(inputs, rollouts.members[row]) for row in rows.tolist()), strict=True)
    names = "log_odds_gain", "alignment", "curvature"
    return {name: Truth(rows, torch.stack(column)) for name, column in zip(names, columns, strict=True)}


def _step_of(inputs: Steps, members: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    length, start = inputs.rollouts.bounds[1], inputs.rollouts.bounds[members[0]]
    rows = slice(start, start + len(members) * length)
    ends = torch.arange(0, len(members) * length + 1, length)
    before, after, reverse = (x[rows] for x in (inputs.logp_before, inputs.logp_after, inputs.logp_reverse))
    forward, backward = reference.log_ratios(before, after, ends), reference.log_ratios(before, reverse, ends)
    correct = inputs.rollouts.correct[list(members)]
    s, h = (forward - backward) / 2, forward + backward
    return (reference.log_odds_gain(forward, correct), reference.step_alignment(s, correct),
            reference.step_curvature(s, h, correct))
