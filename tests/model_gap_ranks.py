"""What the ranks of a process group run for test_model_gap_parallel: every scenario once, its answers kept on disk.

Needs no pytest: the spawned processes import it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import gloo_ranks
import model_zoo as zoo
import torch
import torch.distributed as dist
from model_gap_problems import WHOLE, direction, loss_of, problem, shard, shares
from model_gap_refusals import REFUSALS, refused
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import rlvr_fast as rf

WORLDS = (3, 2, 1)  # numbers of ranks
STEPS = 3
FEATURES = {"ddp": {"tied": True, "shared_mlp": True}, "sharded": {"tied": True}}  # fully_shard: no module twice
METHODS = ("segmented", "ghost", "sketch")
CASES = {1: [("ddp", "segmented", "training")],
         2: [("ddp", "segmented", "probe"), ("ddp", "sketch", "probe"), ("sharded", "segmented", "probe"),
             *((engine, method, "training") for engine in FEATURES for method in METHODS)],
         3: [(engine, method, "training") for engine in FEATURES for method in ("segmented", "sketch")]}
OPTIONS = {"segmented": {}, "ghost": {}, "sketch": {"sketch_size": 5}, "exact": {}}


def figures(gap: rf.ModelGapResult) -> dict[str, object]:
    measured = [gram for gram in gap.gram if gram is not None]
    return {"gram": torch.cat([gram.flatten() for gram in measured]), "norm_sq": gap.norm_sq, "stderr": gap.stderr,
            "norm_sq_naive": gap.norm_sq_naive, "alignment": gap.alignment, "share": gap.coverage.share,
            "per parameter": torch.stack([value for _, value in sorted(gap.parameter_norm_sq.items())]),
            "prompts": gap.prompt_ids, "tracked": sorted(gap.coverage.tracked), "missing": gap.coverage.missing,
            "gradient norms": {name: float(value) for name, value in gap.coverage.norm_sq.items()},
            "classes": torch.stack([gap.n_correct, gap.n_incorrect])}


def train(method: str, source: str, engine: str, wrap: Callable, rows, group) -> list[dict[str, object]]:
    """The figures of three optimizer steps, and of each how far its gradients are from those without a probe."""
    models = [wrap(zoo.build(**FEATURES[engine])) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    answers = []
    for step in range(STEPS):
        part, advantages = problem(step, rows)
        with rf.ModelGap(models[0], part.rollouts, method, direction=direction(), group=group,
                         **OPTIONS[method]) as probe:
            loss_of(models[0], part, advantages, probe if source == "probe" else None).backward()
        with CommDebugMode() if group is not None else nullcontext() as messages:
            gap = probe.gap()
        answer = figures(gap) | {"coefficients": gap.coefficients, "source": gap.source}
        if group is not None:
            answer |= {"collectives": messages.get_total_counts(), "bytes": probe._ranks.buffer_bytes}
        loss_of(models[1], part, advantages).backward()
        own, plain = (torch.cat([local(p.grad).flatten() for p in model.parameters()]) for model in models)
        answer["gradient error"] = float((own - plain).abs().max() / plain.abs().max())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        answers.append(answer)
    return answers


def local(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def data_parallel(method: str, source: str, **options) -> list[dict[str, object]]:
    return train(method, source, "ddp", lambda model: DistributedDataParallel(model, **options),
                 shares(method, dist.get_world_size())[dist.get_rank()], dist.group.WORLD)


def unused_parameters() -> list[dict[str, object]]:
    """The reducer looks through the graph, and may not miss a weight in it."""
    return data_parallel("segmented", "training", find_unused_parameters=True)


def sharded(method: str, source: str) -> list[dict[str, object]]:
    """With and without gathering the parameters again for the backward."""
    return train(method, source, "sharded", lambda model: shard(model, reshard=source == "training"),
                 shares(method, dist.get_world_size())[dist.get_rank()], dist.group.WORLD)


def left_gathered() -> dict[str, object]:
    """A forward without a backward leaves whole parameters in the modules; checkpointing gathers them once more."""
    part, advantages = problem(0, WHOLE[dist.get_world_size()][dist.get_rank()])
    model = shard(zoo.build(tied=True, checkpointing="non-reentrant").train(), reshard=False)
    with torch.no_grad():
        model(part.ids)
    with rf.ModelGap(model, part.rollouts, direction=direction(), group=dist.group.WORLD) as probe:
        loss_of(model, part, advantages).backward()
    return figures(probe.gap())


def alone(method: str, source: str, ranks: int, engine: str = "ddp") -> list[dict[str, object]]:
    """The same steps in one process, with the responses in the order of the ranks."""
    rows = [i for own in shares(method, ranks) for i in own]
    return train(method, source, engine, lambda model: model, rows, None)


def accumulated() -> dict[str, object]:
    """Two micro-batches, the first without synchronisation, as DistributedDataParallel has it."""
    part, advantages = problem(0, shares("sketch", dist.get_world_size())[dist.get_rank()])
    model = DistributedDataParallel(zoo.build(**FEATURES["ddp"]))
    with rf.ModelGap(model, part.rollouts, "sketch", direction=direction(), group=dist.group.WORLD,
                     sketch_size=5) as probe:
        for rows, context in (([0], model.no_sync()), (range(1, len(part.lengths)), nullcontext())):
            with context:
                loss_of(model, part.rows(rows), advantages[list(rows)]).backward()
    return figures(probe.gap())


def local_result() -> dict[str, object]:
    """Without a group a rank's result is about its own responses."""
    part, advantages = problem(0, WHOLE[dist.get_world_size()][dist.get_rank()])
    model = DistributedDataParallel(zoo.build(**FEATURES["ddp"]))
    with rf.ModelGap(model, part.rollouts, direction=direction()) as probe:
        loss_of(model, part, advantages).backward()
    with CommDebugMode() as messages:
        gap = probe.gap()
    return {"gram": gap.gram, "messages": messages.get_total_counts()}


def without_an_engine() -> dict[str, object]:
    """Gradients that the loop averages itself, or not at all."""
    part, advantages = problem(0, WHOLE[dist.get_world_size()][dist.get_rank()])
    model = zoo.build(**FEATURES["ddp"])
    with rf.ModelGap(model, part.rollouts, "exact", direction=direction(), group=dist.group.WORLD) as probe:
        loss_of(model, part, advantages, probe).backward()
    own = {name: float(p.grad.square().sum()) for name, p in model.named_parameters()}
    return figures(probe.gap()) | {"own gradient norms": own}


def untracked_on_the_last_rank() -> dict[str, object]:
    """A layer that one rank cannot see is covered on none."""
    part, advantages = problem(0, WHOLE[dist.get_world_size()][dist.get_rank()])
    model = zoo.build()
    if dist.get_rank() == dist.get_world_size() - 1:
        own = model.blocks[0].o.forward
        model.blocks[0].o.forward = lambda x: own(x)
    with rf.ModelGap(model, part.rollouts, group=dist.group.WORLD) as probe:
        loss_of(model, part, advantages).backward()
    tracked = len(probe.coverage.tracked)
    return {"missing": probe.coverage.missing, "others": len(list(model.parameters())) - tracked}


# -- running them -----------------------------------------------------------------------------------------------------


def scenarios(ranks: int) -> dict[str, Callable[[], object]]:
    """In an order that every rank shares."""
    found: dict[str, Callable[[], object]] = {}
    for engine, method, source in CASES[ranks]:
        run = {"ddp": data_parallel, "sharded": sharded}[engine]
        found[f"{engine} {method} {source}"] = lambda a=(run, method, source): a[0](*a[1:])
    if ranks > 1:
        found |= {"accumulated": accumulated, "local": local_result, "no engine": without_an_engine,
                  "untracked": untracked_on_the_last_rank}
    if ranks == 2:
        found |= {"unused parameters": unused_parameters, "left gathered": left_gathered}
        found |= {f"refused: {name}": lambda case=case: refused(case) for name, case in REFUSALS.items()}
    return found


def work(rank: int, folder: str) -> None:
    """What a spawned process runs."""
    gloo_ranks.answer(rank, folder, WORLDS, scenarios)
