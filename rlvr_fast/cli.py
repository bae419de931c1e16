"""The ``rlvr-fast`` command: thin commands over the package; each loads what it needs when it runs.

What is common to all, exit codes, errors and progress, is in ``command_line``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlvr_fast.command_line import EXIT_CODES, FOUND_BAD, Commands, print_json, require
from rlvr_fast.simulate.commands import app as simulate

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Gradient analysis for reinforcement learning with verifiable rewards.", epilog=EXIT_CODES)
app.add_typer(simulate, name="simulate")

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")]
JsonFile = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON; - for stdout, and nothing "
                                                                               "else there.")]


def print_version(wanted: bool) -> None:
    if wanted:
        from rlvr_fast import __version__

        typer.echo(f"rlvr-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True,
                                                  help="The version, and nothing more.")] = False) -> None:
    """Gradient analysis for reinforcement learning with verifiable rewards."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for steps.jsonl and the figure; made if "
                                                                "missing.")] = Path("outputs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="GRPO steps of the run at the safe rate; 40 by default.")
                     ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few small steps: shows that it runs, nothing more.")
                     ] = False,
    as_json: Json = False,
) -> None:
    """GRPO on arithmetic from scratch, at a safe and at an unsafe learning rate, the gap and the threshold live.

    Takes two to four minutes on a CPU; the loop is the file rlvr_fast/demo/grpo.py, made to be copied from.
    """
    require("demo")
    from rlvr_fast.demo import command

    command.run(output, seed=seed, steps=steps, quick=quick, as_json=as_json)


@app.command()
def profile(
    model: Annotated[str | None, typer.Option(help="A public model's shape, such as qwen2.5-7b; 'list' shows all.")
                     ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="D, instead of --model.")] = None,
    vocabulary_size: Annotated[int | None, typer.Option(help="V, instead of --model.")] = None,
    parameters: Annotated[float | None, typer.Option(help="Of the model, e.g. 7.6e9, for the share of a step.")] = None,
    softcap: Annotated[float | None, typer.Option(help="Bound of the soft-capped logits.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of a batch.")] = 64,
    group_size: Annotated[int, typer.Option(help="Responses per prompt.")] = 8,
    length: Annotated[int, typer.Option(help="Mean tokens per response.")] = 512,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32; auto: bfloat16 on a GPU, else float32.")
                     ] = "auto",
    backend: Annotated[str, typer.Option(help="auto, triton, native, torch.")] = "auto",
    levels: Annotated[str, typer.Option(help="Levels of the gap, separated by commas.")] = "logits,hidden,head",
    repeats: Annotated[int, typer.Option(help="Timed calls per stage.")] = 5,
    seconds: Annotated[float | None, typer.Option(
        help="Scale the shape down to take about so long; 60 on a CPU, no limit on a GPU.")] = None,
    json_file: JsonFile = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a Chrome/Perfetto trace.")] = None,
) -> None:
    """Time, rate, memory and growth of every analysis stage at a model's scale, on this machine."""
    from rlvr_fast.profile import command

    command.run(model=model, hidden_size=hidden_size, vocabulary_size=vocabulary_size, parameters=parameters,
                softcap=softcap, prompts=prompts, group_size=group_size, length=length, device=device, dtype=dtype,
                backend=backend, levels=levels, repeats=repeats, seconds=seconds, json_file=json_file, trace=trace)


@app.command()
def bench(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for cpu_NxVxD.csv; made if "
                                                                               "missing.")] = Path("outputs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="A small shape, 512,8192,256, and 3 rounds.")] = False,
    kernel: Annotated[list[str] | None, typer.Option(help="Only this one, such as token_stats; may be repeated.")
                      ] = None,
    shape: Annotated[str | None, typer.Option(metavar="N,V,D", help="Tokens, vocabulary, hidden size; 2048,49152,576 "
                                                                    "by default.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Times that every provider runs; 6 by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch and the native backend; 2 by default.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Microbenchmarks on the CPU, beside a bare product, torch eager, torch.compile, autograd and TRL.

    All take turns in one process; peers that are not installed are listed with the reason.
    About 15 minutes and 6 GB of memory on two cores. Exit code 1 if a provider failed.
    """
    require("bench")
    from rlvr_fast.bench import command

    raise typer.Exit(command.run(output=output, quick=quick, kernels=kernel or (), shape=shape, rounds=rounds,
                                 threads=threads, json_file=json_file))


@app.command()
def doctor(
    as_json: Json = False,
) -> None:
    """What runs on this machine: backends, GPU, tiers of GapMonitor, commands, frameworks; what to install for more.

    Exit code 1 if something is there but of no use, such as a version that is too old.
    """
    from rlvr_fast import doctor as findings

    diagnosis = findings.examine()
    if as_json:
        print_json(diagnosis.to_json())
    else:
        findings.show(diagnosis)
    raise typer.Exit(FOUND_BAD if diagnosis.broken else 0)


@app.command()
def analyze(
    path: Annotated[Path, typer.Argument(help="JSONL, Parquet or npz file of one row per response, or a folder.")],
    prompt: Annotated[str | None, typer.Option(help="Column of the prompt or its id.")] = None,
    reward: Annotated[str | None, typer.Option(help="Column of the reward.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Rewards from here on are successes, if not 0 and 1.")] = None,
    step: Annotated[str | None, typer.Option(help="Column of the training step.")] = None,
    length: Annotated[str | None, typer.Option(help="Column of the length, or of tokens or text to measure.")] = None,
    difficulty: Annotated[str | None, typer.Option(help="Column of a known difficulty.")] = None,
    logp: Annotated[str | None, typer.Option(help="Column of log-probs before the update.")] = None,
    logp_after: Annotated[str | None, typer.Option(help="Column of log-probs after the update.")] = None,
    prompts: Annotated[int, typer.Option(min=0, help="Prompts to list.")] = 10,
    as_json: Json = False,
) -> None:
    """What a dump of rollouts tells without the model: success, mixed groups, spectrum, lengths, step effects."""
    from rlvr_fast.analyze import command

    command.run(path, threshold=threshold, prompts=prompts, as_json=as_json, columns={
        "prompt": prompt, "reward": reward, "step": step, "length": length, "difficulty": difficulty,
        "logp": logp, "logp_after": logp_after})


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder or JSONL file of steps, or a trainer_state.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    rollouts: Annotated[Path | None, typer.Option(help="Rollout dump, if not rollouts* beside the run.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Column of the dump: the prompt or its id.")] = None,
    reward: Annotated[str | None, typer.Option(help="Column of the dump: the reward.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Rewards from here on are successes, if not 0 and 1.")] = None,
    title: Annotated[str | None, typer.Option(help="Of the page; the run's name by default.")] = None,
    gate: Annotated[bool, typer.Option("--check", help="Exit code 1 if a run's last verdict is overshoot, or its "
                                                       "success has collapsed.")] = False,
    as_json: Json = False,
) -> None:
    """One HTML file about a run: is the step safe, for which prompts, since when.

    Prints the file's name; with --json its headlines too. Exit code 1 with --check only.
    """
    require("report")
    from rlvr_fast.report import command

    bad = command.run(run, output, rollouts=rollouts, columns={"prompt": prompt, "reward": reward},
                      threshold=threshold, title=title, as_json=as_json)
    raise typer.Exit(FOUND_BAD if gate and bad else 0)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
