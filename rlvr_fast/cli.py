"""The ``rlvr-fast`` command: thin commands over the package; each loads what it needs when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlvr_fast.simulate.commands import app as simulate

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Gradient analysis for reinforcement learning with verifiable rewards.")


app.add_typer(simulate, name="simulate")


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
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON; - for stdout.")] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a Chrome/Perfetto trace.")] = None,
) -> None:
    """Time, rate, memory and growth of every analysis stage at a model's scale, on this machine."""
    from rlvr_fast.profile import command

    try:
        command.run(model=model, hidden_size=hidden_size, vocabulary_size=vocabulary_size, parameters=parameters,
                    softcap=softcap, prompts=prompts, group_size=group_size, length=length, device=device, dtype=dtype,
                    backend=backend, levels=levels, repeats=repeats, seconds=seconds, json_file=json_file, trace=trace)
    except (ValueError, TypeError, OSError) as error:
        fail(error)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout instead of tables.")] = False,
) -> None:
    """What runs on this machine: backends, GPU, frameworks, commands; and what to install for more.

    Exit code 1 if something is there but of no use, such as a version that is too old.
    """
    from rlvr_fast import doctor as findings

    diagnosis = findings.examine()
    if as_json:
        typer.echo(json.dumps(diagnosis.to_json(), indent=1))
    else:
        findings.show(diagnosis)
    raise typer.Exit(1 if diagnosis.broken else 0)


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
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout instead of tables.")] = False,
) -> None:
    """What a dump of rollouts tells without the model: success, mixed groups, spectrum, lengths, step effects."""
    from rlvr_fast.analyze import command

    try:
        command.run(path, threshold=threshold, prompts=prompts, as_json=as_json, columns={
            "prompt": prompt, "reward": reward, "step": step, "length": length, "difficulty": difficulty,
            "logp": logp, "logp_after": logp_after})
    except (ValueError, TypeError, OSError) as error:
        fail(error)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder or JSONL file of steps, or a trainer_state.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    rollouts: Annotated[Path | None, typer.Option(help="Rollout dump, if not rollouts* beside the run.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Column of the dump: the prompt or its id.")] = None,
    reward: Annotated[str | None, typer.Option(help="Column of the dump: the reward.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Rewards from here on are successes, if not 0 and 1.")] = None,
    title: Annotated[str | None, typer.Option(help="Of the page; the run's name by default.")] = None,
) -> None:
    """One HTML file about a run: is the step safe, for which prompts, since when."""
    from rlvr_fast.report import write_report

    try:
        typer.echo(write_report(run, output, rollouts=rollouts, columns={"prompt": prompt, "reward": reward},
                                threshold=threshold, title=title))
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(error)


def fail(error: Exception) -> None:
    """Bad usage: the message on stderr, exit code 2."""
    typer.echo(f"rlvr-fast: {error}", err=True)
    raise typer.Exit(2)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
