"""What ranks that share layers run for test_model_gap_tensor_parallel: every scenario once, answers kept on disk.

Needs no pytest: the spawned processes import it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import gloo_ranks
import model_zoo as zoo
import tensor_parallel_models as models
import torch
import torch.distributed as dist
from model_gap_problems import SPLIT, WHOLE
from model_gap_problems import problem as responses_of
from model_gap_ranks import figures
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

import rlvr_fast as rf

WORLDS = (4, 2)  # numbers of ranks; layers are spread over two
STEPS = 3
METHODS = ("segmented", "ghost", "sketch")
# (plan, engine over the data-parallel ranks, method, source)
CASES = {2: [*(("sequence", None, method, "training") for method in METHODS), ("sequence", None, "segmented", "probe"),
             *((plan, None, "exact", "probe") for plan in ("sequence", "own head")),
             *((plan, None, method, "training") for plan in ("replicated norms", "other way round", "own head")
               for method in ("segmented", "sketch")),
             ("parallel loss", None, "segmented", "training")],
         4: [*(("sequence", "fully_shard", method, "training") for method in ("segmented", "sketch")),
             ("replicated norms", "loop", "ghost", "training"), ("own head", "ddp", "segmented", "training")]}


problem = partial(responses_of, even_width=True)  # as sequence-parallel plans ask


def rows_of(method: str, engine: str | None, data_rank: int) -> list[int]:
    return list(range(12) if engine is None else (SPLIT if method == "sketch" else WHOLE)[2][data_rank])


def direction(which: str) -> dict[str, torch.Tensor]:
    """Of whole parameters: spread by rows, by columns, replicated, and looked up."""
    generator, dtype = torch.Generator().manual_seed(9), models.FEATURES[which].get("dtype")
    shapes = {"embed.weight": (zoo.VOCABULARY, zoo.WIDTH), "norm.weight": (zoo.WIDTH,), "blocks.0.q.bias": (zoo.WIDTH,),
              "blocks.0.down.weight": (zoo.WIDTH, 18)}
    if which == "own head":
        shapes["lm_head.weight"] = (zoo.VOCABULARY, zoo.WIDTH)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def token_logp(model, ids: torch.Tensor, shard: rf.VocabularyShard | None = None) -> torch.Tensor:
    logits = model(ids)
    if hasattr(logits, "placements"):  # inside loss_parallel
        logp = -torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return torch.nn.functional.pad(logp.full_tensor().view(len(ids), -1), (1, 0))
    if shard is not None:
        return torch.nn.functional.pad(models.ShardedLogp.apply(logits[:, :-1], ids[:, 1:], shard), (1, 0))
    return zoo.token_logp(logits, ids)


def train(which: str, method: str, source: str, wrap: Callable, rows, *, group=None, shard=None, ranks: int = 1,
          average: Callable = lambda model: None, context: Callable = nullcontext, compare: bool = True
          ) -> list[dict[str, object]]:
    """The figures of three optimizer steps, and of the first how far its gradients are from those without a probe."""
    model, plain = (wrap(models.build(**models.FEATURES[which])) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, foreach=False)
    options = {"sketch_size": 5} if method == "sketch" else {}
    answers = []
    for step in range(STEPS):
        part, advantages = problem(step, rows)

        def run(own, probe=None, part=part, advantages=advantages):
            with context():
                logp = token_logp(own, part.ids, shard)
                if probe is not None and source == "probe":
                    probe.backward(logp, part.mask)
                (-ranks * (advantages[:, None] * logp * part.mask).sum()).backward()
            average(own)

        probe = rf.ModelGap(model, part.rollouts, method, direction=direction(which), group=group, vocabulary=shard,
                            **options)
        counted = step == 0 and compare and source == "training"
        with CommDebugMode() if counted else nullcontext() as inside, probe:
            run(model, probe)
        with CommDebugMode() as afterwards:
            gap = probe.gap()
        answer = figures(gap) | {"source": gap.source, "collectives": afterwards.get_total_counts(),
                                 "coefficients": gap.coefficients}
        if step == 0 and compare:
            with CommDebugMode() if counted else nullcontext() as without:
                run(plain)
            if counted:
                answer["more collectives"] = inside.get_total_counts() - without.get_total_counts()
            found, expected = (torch.cat([models.local(p.grad).flatten() for p in own.parameters()])
                               for own in (model, plain))
            answer["gradient error"] = float((found - expected).abs().max() / expected.abs().max())
            answer["restored"] = not any("forward" in vars(module) for module in model.modules())
        optimizer.step()
        optimizer.zero_grad()
        answers.append(answer)
    return answers


def case(which: str, engine: str | None, method: str, source: str) -> list[dict[str, object]]:
    data = 1 if engine is None else 2
    mesh = init_device_mesh("cpu", (data, dist.get_world_size() // data), mesh_dim_names=("data", "tensor"))
    group = None if engine is None else mesh.get_group("data")
    shard = rf.VocabularyShard.even(zoo.VOCABULARY, mesh.get_group("tensor")) if which == "own head" else None

    def wrap(model):
        model = models.own_head(model, shard) if shard else models.parallelize(model, mesh["tensor"], which)
        if engine == "fully_shard":
            for block in model.blocks:
                fully_shard(block, mesh=mesh["data"])
            return fully_shard(model, mesh=mesh["data"])
        return DistributedDataParallel(model, process_group=group) if engine == "ddp" else model

    def average(model):
        for parameter in model.parameters() if engine == "loop" else ():
            gradient = models.local(parameter.grad)
            dist.all_reduce(gradient, group=group)
            gradient /= data

    return train(which, method, source, wrap, rows_of(method, engine, mesh.get_coordinate()[0]), group=group,
                 shard=shard, ranks=data, average=average,
                 context=loss_parallel if which == "parallel loss" else nullcontext)


def alone(which: str, engine: str | None, method: str, source: str) -> list[dict[str, object]]:
    """The same steps in one process, with the responses in the order of the data-parallel ranks."""
    rows = [i for rank in range(1 if engine is None else 2) for i in rows_of(method, engine, rank)]
    return train(which, method, source, lambda model: model, rows, compare=False)


def one_step(which: str, method: str, *, spread: bool = True, ranks: int = 2, prepare: Callable = lambda model: None,
             parts=(range(12),)) -> rf.ModelGapResult:
    """A step on as many tensor-parallel ranks, or on one without any, in the micro-batches ``parts``."""
    part, advantages = problem(0, range(12))
    model = models.build(**models.FEATURES[which])
    if spread:
        mesh = init_device_mesh("cpu", (1, 2) if ranks == 2 else (2, 1), mesh_dim_names=("data", "tensor"))
        model = models.parallelize(model, mesh["tensor"], which)
    prepare(model)
    with rf.ModelGap(model, part.rollouts, method, **({"sketch_size": 5} if method == "sketch" else {})) as probe:
        for rows in map(list, parts):
            logp = token_logp(model, part.ids[rows])
            (advantages[rows][:, None] * logp * part.mask[rows]).sum().backward()
    return probe.gap()


def figures_of_a_step(which: str, method: str, **options) -> dict[str, object]:
    gap = one_step(which, method, **options)
    return {"gram": torch.cat([gram.flatten() for gram in gap.gram if gram is not None]), "tracked": set(
        gap.coverage.tracked), "missing": gap.coverage.missing}


def replaced_on_rank_one(model) -> None:
    if dist.get_rank() == 1:
        own = model.blocks[0].up.forward
        model.blocks[0].up.forward = lambda x: own(x)


OTHERS = {  # scenarios of one step
    "local heads": lambda **where: figures_of_a_step("local heads", "segmented", **where),
    "spread tokens": lambda **where: figures_of_a_step("spread tokens", "sketch", **where),
    "spread tokens, whole prompts": lambda **where: figures_of_a_step("spread tokens", "ghost", **where),
    "micro-batches": lambda **where: figures_of_a_step("sequence", "sketch", parts=[[0, 1, 2, 3, 4], range(5, 12)],
                                                       **where),
    "half precision": lambda **where: figures_of_a_step("half precision", "segmented", **where),
    "one tensor-parallel rank": lambda **where: figures_of_a_step("sequence", "ghost", ranks=1, **where),
    "replaced on one rank": lambda **where: figures_of_a_step("sequence", "segmented", prepare=replaced_on_rank_one,
                                                              **where),
}


def scenarios(ranks: int) -> dict[str, Callable[[], object]]:
    """In an order that every rank shares."""
    from tensor_parallel_refusals import REFUSALS, refused

    found = {" ".join(map(str, own)): lambda own=own: case(*own) for own in CASES[ranks]}
    if ranks == 2:
        found |= OTHERS
        found |= {f"refused: {name}": lambda attempt=attempt: refused(attempt) for name, attempt in REFUSALS.items()}
    return found


def work(rank: int, folder: str) -> None:
    """What a spawned process runs."""
    gloo_ranks.answer(rank, folder, WORLDS, scenarios)
