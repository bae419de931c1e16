"""From a window's rows to additive sums: all that metrics and running means are made of.

Every sum adds over prompts and over windows, and every metric is a function of sums. So a running mean keeps numerators
and denominators apart, and a metric of several windows weighs each by what it has seen. Sums whose name starts with
``var_`` are variances of other sums; a decay γ multiplies them by γ².
"""

from __future__ import annotations

import torch

from rlvr_fast.estimates import class_noise, estimate_gap
from rlvr_fast.kappa import PROPORTIONAL
from rlvr_fast.moments import GRAM_COLUMNS, ResponseGradients, Responses
from rlvr_fast.monitor.gaps import PROMPT_COLUMNS, GradientRows, PromptRows
from rlvr_fast.monitor.increments import STEP_COLUMNS, Increment
from rlvr_fast.monitor.inputs import COLUMNS, LOG_RATIO_CAP, UNKNOWN, ResponseRows, Settings

ARGUMENTS = {"correct": "correct (or rewards)", "log_ratio": "old_logp", "divergence": "old_logp",
             "score_sq": "sum_p_sq", "energy": "sum_p_sq", "collision": "sum_p_sq", "sharpening": "entropy",
             "advantage": "advantages"}


def window_sums(rows: Increment, settings: Settings) -> dict[str, float]:
    """The sums of a whole window, in float64. Reads the rows, hence synchronises.

    Raises:
        ValueError: for values that a device tensor hid from ``update``, or prompt ids that are not global.
    """
    sums = _Responses(rows.responses, settings).sums() if len(rows.responses.keys) else {}
    if rows.gradients is not None:
        sums |= _gradient_sums(rows.gradients)
    if len(rows.prompts.keys):
        sums |= _prompt_sums(rows.prompts)
    return sums | _step_sums(rows.steps)


class _Responses:
    """The response table with what each response's prompt adds: weights, success rate, whether it is mixed.

    Attributes:
        group_weight: [R] 1 / (responses of its prompt), so that a prompt's responses weigh 1 together. Without prompt
            ids 1 / group_size (or 1): each stands for its share of a group.
        class_weight: [R] 1 / (responses of its prompt and class) where the prompt has both, else 0. Without prompt ids
            1 / (p · group_size) from the group's success rate p.
    """

    def __init__(self, rows: ResponseRows, settings: Settings) -> None:
        group_size, self.proportional = settings.group_size, settings.estimator in PROPORTIONAL
        # Any order of updates and ranks gives the same sums to the last digits.
        order = torch.argsort(rows.keys, stable=True)
        keys, cells = rows.keys[order], rows.cells[order]
        bits = cells[:, 0].long()
        self.given = {name: (bits >> i & 1).bool() for i, name in enumerate(COLUMNS)}
        self.column = dict(zip(COLUMNS, cells[:, 1:].unbind(1), strict=True))
        self._check_values()
        verdict = self.column["correct"]
        self.correct, self.incorrect = verdict == 1, verdict == 0
        identified = self.given["identified"]
        if identified.any() and not identified.all():
            raise ValueError("prompt_ids must be given in every update of a window or in none")
        self.identified = bool(identified.all())
        if self.identified:
            _, self.prompt, counts = torch.unique(keys, return_inverse=True, return_counts=True)
            self.n_prompts = len(counts)
            if group_size is not None and int(counts.max()) > group_size:
                raise ValueError(f"prompt_ids must be global: one prompt has {int(counts.max())} responses in this "
                                 f"window, more than group_size = {group_size} (ids that count from 0 in every "
                                 "micro-batch or on every rank make different prompts one)")
            self._from_groups(counts.double())
        else:
            self._from_rates(1.0 if group_size is None else float(group_size))

    def _check_values(self) -> None:
        for name, values in self.column.items():
            if not (values.isfinite() | ~self.given[name]).all():
                raise ValueError(f"{ARGUMENTS.get(name, name)} must be finite, got NaN or infinity on the device")
        verdict = self.column["correct"]
        if not ((verdict == 0) | (verdict == 1) | (verdict == UNKNOWN)).all():
            raise ValueError("correct (or rewards) must be 0 or 1; for other rewards give the monitor a threshold")

    def _from_groups(self, counts: torch.Tensor) -> None:
        n_correct, n_incorrect = self._per_prompt(self.correct), self._per_prompt(self.incorrect)
        known = n_correct + n_incorrect > 0
        both = ((n_correct > 0) & (n_incorrect > 0))[self.prompt]
        self.group_weight = 1 / counts[self.prompt]
        own = torch.where(self.correct, n_correct[self.prompt], n_incorrect[self.prompt])
        self.class_weight = torch.where(both & (self.correct | self.incorrect), 1 / own.clamp(min=1), 0.0)
        observed = torch.where(known, n_correct / (n_correct + n_incorrect).clamp(min=1), UNKNOWN)[self.prompt]
        self.rate = torch.where(self.given["success_rate"], self.column["success_rate"], observed)
        seen = torch.where(known[self.prompt], both.double(), UNKNOWN)
        self.mixed = torch.where(self.given["mixed"], self.column["mixed"], seen)

    def _from_rates(self, size: float) -> None:
        unknown = torch.full_like(self.column["correct"], UNKNOWN)
        self.group_weight = torch.full_like(unknown, 1 / size)
        self.rate = torch.where(self.given["success_rate"], self.column["success_rate"], unknown)
        self.mixed = torch.where(self.given["mixed"], self.column["mixed"], unknown)
        usable = (self.mixed == 1) & (self.rate > 0) & (self.rate < 1) & (self.correct | self.incorrect)
        share = torch.where(self.correct, self.rate, 1 - self.rate)
        self.class_weight = torch.where(usable, 1 / (size * torch.where(usable, share, 1.0)), 0.0)

    def _per_prompt(self, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.n_prompts, dtype=torch.float64).index_add_(0, self.prompt, values.double())

    # -- sums ---------------------------------------------------------------------------------------------------------

    def sums(self) -> dict[str, float]:
        scored, weight, rate = self.given["scored"], self.group_weight, self.rate
        judged, mixed = self.correct | self.incorrect, self.mixed == 1
        settled = self.mixed != UNKNOWN
        has_rate = rate != UNKNOWN
        # A group of one class is its responses' verdict, whoever says that it is one.
        placed = scored & (has_rate | mixed | (settled & judged))
        solved = placed & torch.where(has_rate, rate == 1, settled & ~mixed & self.correct)
        failed = placed & torch.where(has_rate, rate == 0, settled & ~mixed & self.incorrect)
        rated = scored & (has_rate | judged)
        revealed = mixed & has_rate

        def total(which: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
            return weight @ (which.double() if values is None else torch.where(which, values, 0.0))

        found: dict[str, torch.Tensor | int] = {
            "responses": len(weight), "scored": scored.sum(), "unscored": (scored & ~judged).sum(),
            "settled": total(settled), "mixed": total(mixed),
            "placed": total(placed), "solved": total(solved), "failed": total(failed),
            "rated": total(rated), "rate": total(rated, torch.where(has_rate, rate, self.column["correct"])),
            "revealed": total(revealed), "mixed_rate": total(revealed, rate),
        }
        if self.proportional and (there := self.given["advantage"]).any():
            found |= {"weighted": total(there), "kappa": total(there, self.column["advantage"].abs() / 2)}
        found |= self._lengths() | self._logps() | self._ratios() | self._energies() | self._sharpening()
        return {name: float(value) for name, value in found.items()}

    def _of(self, column: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(which responses with tokens have it, its values)."""
        return self.given[column] & (self.column["length"] > 0), self.column[column]

    def _contrast(self, name: str, there: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Σ over mixed prompts of the class means of ``values``, and the number of these prompts."""
        weight = torch.where(there, self.class_weight, 0.0)
        return {f"{name}_pos": (weight * values)[self.correct].sum(),
                f"{name}_neg": (weight * values)[self.incorrect].sum(),
                f"{name}_prompts": (weight * self.correct).sum()}

    def _lengths(self) -> dict[str, torch.Tensor]:
        there = self.given["length"]
        if not there.any():
            return {}
        return self._contrast("length", there, self.column["length"]) | {
            "lengths": there.sum(), "length": self.column["length"][there].sum()}

    def _logps(self) -> dict[str, torch.Tensor]:
        there, logp = self._of("logp")
        if not there.any():
            return {}
        length = self.column["length"]
        return self._contrast("token_logp", there, logp / length.clamp(min=1)) | {
            "logp": logp[there].sum(), "logp_tokens": length[there].sum()}

    def _ratios(self) -> dict[str, torch.Tensor]:
        there, log_ratio = self._of("log_ratio")
        if not there.any():
            return {}
        ratio = log_ratio[there].clamp(max=LOG_RATIO_CAP).exp()
        return {"ratios": there.sum(), "ratio": ratio.sum(), "ratio_sq": ratio.square().sum(),
                "divergence": self.column["divergence"][there].sum(),
                "divergence_tokens": self.column["length"][there].sum()}

    def _energies(self) -> dict[str, torch.Tensor]:
        there, score_sq = self._of("score_sq")
        found = {}
        if there.any():
            energy, pos, neg = self.column["energy"], there & self.correct, there & self.incorrect
            found = {"score_sq": score_sq[there].sum(), "score_tokens": self.column["length"][there].sum(),
                     "collision": self.column["collision"][there].sum(),
                     "token_energy_pos": energy[pos].sum(), "token_n_pos": pos.sum(),
                     "token_energy_neg": energy[neg].sum(), "token_n_neg": neg.sum()}
            pushed = there & self.given["advantage"]
            if pushed.any():
                advantage = self.column["advantage"]
                power = advantage.square() * energy
                found |= {"power": power[pushed].sum(), "power_neg": power[pushed & (advantage < 0)].sum()}
        there, entropy = self._of("entropy")
        if there.any():
            found |= {"entropy": entropy[there].sum(), "entropy_tokens": self.column["length"][there].sum()}
        return found

    def _sharpening(self) -> dict[str, torch.Tensor]:
        there, slope = self._of("sharpening")
        if not there.any():
            return {}
        found = self._contrast("slope", there, slope)
        found |= {"slopes": there.sum(), "slope": slope[there].sum(), "slope_sq": slope[there].square().sum()}
        if self.identified:
            sides = torch.where(self.correct, 1.0, -1.0) * torch.where(there, self.class_weight, 0.0)
            found["slope_gap_sq"] = self._per_prompt(sides * slope).square().sum()
        return found


# -- gaps -------------------------------------------------------------------------------------------------------------


def _gradient_sums(rows: GradientRows) -> dict[str, float]:
    """From response gradients: a prompt's are brought together first."""
    keys, prompt_index = torch.unique(rows.keys, return_inverse=True)
    responses = Responses(rows.correct == 1, prompt_index, tuple(keys.tolist()))
    moments = ResponseGradients(responses, rows.vectors).moments()
    estimate, count, square = estimate_gap(moments), moments.count, moments.square
    columns = {"norm_sq": estimate.norm_sq, "naive": estimate.norm_sq_naive, "stderr": estimate.stderr,
               "bias": estimate.bias, "pooled": estimate.pooled.double(), "energy_neg": square[:, 0],
               "energy_pos": square[:, 1], "n_neg": count[:, 0], "n_pos": count[:, 1]}
    sums = _figures(columns)
    usable = estimate.defined & estimate.norm_sq.isfinite()
    if not usable.any():
        return sums

    # Batch gap and update are Σ a_i G_i and Σ b_i G_i. Their inner products are too large by Σ a_i b_i tr Σ of the
    # response's class: the noise that agrees with itself [derived].
    noise = class_noise(square, moments.product.diagonal(dim1=1, dim2=2), count)
    own = responses.correct.long()
    noise, size, here = noise[prompt_index, own], count[prompt_index, own], usable[prompt_index]
    towards_gap = torch.where(here, (2.0 * own - 1) / size, 0.0) / usable.sum()
    # Responses of one class only have advantage 0 where a prompt's own baseline is used; elsewhere their noise is
    # known too, unless they are alone.
    advantage = rows.advantage
    known = bool((advantage.isfinite() & (noise.isfinite() | (advantage == 0))).all())
    weights = torch.stack([towards_gap, advantage if known else torch.zeros_like(advantage)])
    products = torch.zeros(2, 2, dtype=torch.float64, device=weights.device)
    for start in range(0, rows.vectors.shape[1], GRAM_COLUMNS):
        part = weights @ rows.vectors[:, start:start + GRAM_COLUMNS].double()
        products += part @ part.T
    products -= (weights * torch.where(weights != 0, noise, 0.0)) @ weights.T
    sums |= {"batches": 1.0, "batch_norm_sq": float(products[0, 0])}
    if known and bool((advantage != 0).any()):
        sums |= {"updates": 1.0, "gap_dot_update": float(products[0, 1]), "update_norm_sq": float(products[1, 1]),
                 "update_gap_norm_sq": float(products[0, 0])}
    return sums


def _prompt_sums(rows: PromptRows) -> dict[str, float]:
    """From figures of whole prompts."""
    if len(rows.keys.unique()) < len(rows.keys):
        raise ValueError("a prompt occurs twice in this window, and its gaps cannot be joined: this level keeps no "
                         "vectors. Measure whole prompts, give a result that all ranks share on one of them only, or "
                         "use level 'hidden'")
    order = torch.argsort(rows.keys)
    columns = dict(zip(PROMPT_COLUMNS, rows.cells[order].unbind(1), strict=True))
    sums = _figures(columns)
    for name in ("coverage", "alignment", "gain"):
        values = columns[name]
        if (there := values.isfinite()).any():
            sums |= {name: float(values[there].sum()), f"{name}_prompts": float(there.sum())}
    if (there := columns["gain"].isfinite()).any():
        sums["var_gain"] = float(columns["gain_stderr"][there].square().sum())
    return sums


def _figures(columns: dict[str, torch.Tensor]) -> dict[str, float]:
    """Sums over the prompts with a gap, and class energies over all."""
    both = columns["n_neg"] * columns["n_pos"] > 0
    if not columns["naive"][both].isfinite().all():
        raise ValueError("gap must be finite, got NaN or infinity on the device: hidden states or lm_head hold such")
    usable = columns["norm_sq"].isfinite()
    sums: dict[str, torch.Tensor | int] = {
        "gaps": usable.sum(), "gap_prompts": len(both),
        "pooled": columns["pooled"].sum()}
    sums |= {f"gap_{name}": columns[name][usable].sum() for name in ("norm_sq", "naive", "bias")}
    sums["var_gap"] = columns["stderr"][usable].square().sum()
    sums |= {name: columns[name].sum() for name in ("energy_neg", "energy_pos", "n_neg", "n_pos")}
    return {name: float(value) for name, value in sums.items()}


def _step_sums(rows: torch.Tensor) -> dict[str, float]:
    """Of the steps whose curvature was measured."""
    rows = rows[rows.isfinite().all(1)]
    return dict(zip(STEP_COLUMNS, rows.sum(0).tolist(), strict=True)) if len(rows) else {}
