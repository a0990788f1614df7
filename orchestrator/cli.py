"""The command `benchmatrix`. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130

app = typer.Typer(
    name="benchmatrix", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure model x optimization x hardware, and see which optimizations are worth it where.",
)  # fmt: skip


class Format(StrEnum):
    TERMINAL = "terminal"
    MARKDOWN = "md"
    CSV = "csv"
    LATEX = "latex"
    JSON = "json"


class Kind(StrEnum):
    COMPARISON = "comparison"
    TRADEOFF = "tradeoff"
    LADDER = "ladder"
    GROWTH = "growth"


class Reuse(StrEnum):
    EXACT = "exact"
    VERSIONS = "versions"


SweepArgument = Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep file, or the name of a shipped sweep.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a field; repeatable.")]
OnlyOption = Annotated[str | None, typer.Option("--only", metavar="EXPR", help="Only the cells that match.")]
AddressOption = Annotated[
    str | None, typer.Option(metavar="ADDR", help="A running Ray cluster; default: this machine.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]
OutOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="Result folder, or s3://..., gs://...; default results/<sweep>.")
]
ReuseOption = Annotated[Reuse, typer.Option(help="When a stored row counts: exact, or versions to ignore them.")]
RetryOption = Annotated[str, typer.Option(metavar="OUTCOMES", help="Measure stored rows of these outcomes again.")]
WaitOption = Annotated[str, typer.Option(metavar="TIME", help="Wait this long for missing hardware: 30s, 10m, 2h.")]
KindOption = Annotated[
    Kind,
    typer.Option(help="Of one hardware; a ratio per hardware; stacks against the one before; cost of prompt tokens."),
]
ParallelOption = Annotated[
    bool, typer.Option("--parallel-gpus", help="Measure on several GPUs of a node at once; they share the host.")
]


def main() -> None:
    """Entry point: bad input becomes one message on standard error and exit status 2."""
    from orchestrator.problems import bad_input

    try:
        app(prog_name="benchmatrix")
    except Exception as error:
        if not isinstance(error, bad_input()):
            raise
        print(f"benchmatrix: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"benchmatrix {version('benchmatrix')}")
        except PackageNotFoundError:
            print("benchmatrix, not installed")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None: ...


@app.command()
def plan(
    sweep: SweepArgument,
    set_: SetOption = [],  # noqa: B006 - typer copies it
    only: OnlyOption = None,
    address: AddressOption = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The nodes of a Ray cluster file, before they are up.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the cells, what is excluded and why, and how long it will take; runs nothing."""
    from orchestrator.planning import print_plan, read_plan

    if address is not None and cluster is not None:
        raise typer.BadParameter("give --address of a running cluster or a --cluster file, not both")
    planning = read_plan(sweep, set_, only, address, cluster)
    if as_json:
        print(json.dumps(planning.document()))
    else:
        print_plan(planning)


@app.command()
def run(
    sweep: SweepArgument,
    out: OutOption = None,
    address: AddressOption = None,
    set_: SetOption = [],  # noqa: B006
    only: OnlyOption = None,
    reuse: ReuseOption = Reuse.EXACT,
    retry: RetryOption = "",
    wait_nodes: WaitOption = "0s",
    parallel_gpus: ParallelOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what the result folder does not hold yet; the same command resumes."""
    from orchestrator.execute import Options, execute

    options = Options(
        out=out, address=address, overrides=tuple(set_), only=only, reuse=reuse.value, retry=_outcomes(retry),
        wait_nodes_s=seconds(wait_nodes), parallel_gpus=parallel_gpus,
    )  # fmt: skip
    try:
        finished = execute(sweep, options)
    except KeyboardInterrupt:  # before anything was measured; later ones are answered by `execute`
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        print(json.dumps(finished.document()))
    else:
        from orchestrator.show import print_results

        print_results(finished.out, finished.where)
        if finished.interrupted:
            print("interrupted: the same command goes on where this one stopped")
    raise typer.Exit(finished.status)


@app.command()
def submit(
    sweep: SweepArgument,
    address: Annotated[str, typer.Option(metavar="ADDR", help="The cluster's dashboard, http://HOST:8265.")],
    out: Annotated[
        str, typer.Option(metavar="PATH", help="Result folder as the cluster's head sees it, or s3://..., gs://...")
    ],
    set_: SetOption = [],  # noqa: B006
    only: OnlyOption = None,
    reuse: ReuseOption = Reuse.EXACT,
    retry: RetryOption = "",
    wait_nodes: WaitOption = "0s",
    parallel_gpus: ParallelOption = False,
    ship: Annotated[
        bool, typer.Option("--ship/--no-ship", help="Send local checkpoints along, or take paths as the nodes' own.")
    ] = True,
) -> None:
    """Run a sweep as a Ray job on a cluster and follow its log; Ctrl-C detaches without cancelling.

    Local files that the sweep names go along, up to 100 MB. The same command follows the running job, or resumes.
    """
    from orchestrator.staging import stage
    from orchestrator.submit import Submission
    from orchestrator.submit import submit as submit_job
    from orchestrator.sweep import load_sweep, parse_only

    staged = stage(load_sweep(sweep, set_, elsewhere=not ship), checkpoints=ship)
    seconds(wait_nodes)
    _outcomes(retry)
    options = ["--reuse", reuse.value, "--wait-nodes", wait_nodes]
    if only is not None:
        parse_only(only)
        options += ["--only", only]
    options += ["--retry", retry] if retry else []
    options += ["--parallel-gpus"] if parallel_gpus else []
    raise typer.Exit(submit_job(Submission(staged=staged, out=out, address=address, options=options), sys.stdout))


@app.command()
def status(
    directory: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="A result folder, or s3://..., gs://...")
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="ADDR", help="A cluster instead: its head, or http://HOST:8265.")
    ] = None,
) -> None:
    """What a result folder holds or a cluster runs: done, failed, running where, and the time left per hardware."""
    if (directory is None) == (address is None):
        raise typer.BadParameter("give a result folder, or --address of a cluster")
    if address is not None:
        from orchestrator.live import print_live

        print_live(address, sys.stdout)
    elif directory is not None:
        from orchestrator.show import print_status

        print_status(directory)


@app.command()
def nodes(address: AddressOption = None, as_json: JsonOption = False) -> None:
    """The live nodes, what they really are, and their hardware tags."""
    from orchestrator.machine import print_nodes

    print_nodes(address, as_json=as_json)


@app.command("list")
def list_() -> None:
    """The optimizations, workloads, metrics, named models, flags and shipped sweeps, with what each needs."""
    from orchestrator.machine import print_catalogue

    print_catalogue()


@app.command()
def tag() -> None:
    """This machine's hardware tag, for `ray start --labels bench/hw=$(benchmatrix tag)`."""
    from orchestrator.machine import local_report
    from orchestrator.planning import local_tag

    print(local_tag(local_report()))


@app.command()
def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Run the A/A gate: the same cells under two labels, a few minutes.")
    ] = False,
    out: OutOption = None,
) -> None:
    """What this machine can run and why not the rest, with its measured ceilings."""
    from orchestrator.machine import print_doctor

    if not calibrate:
        raise typer.Exit(print_doctor())
    from orchestrator.execute import Options, execute
    from orchestrator.show import print_calibration

    finished = execute("calibrate", Options(out=out))
    print_calibration(finished.out)
    raise typer.Exit(finished.status)


@app.command()
def train(
    directory: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A new folder for the checkpoint.")],
    size: Annotated[str, typer.Option(help="tiny, pocket or gpt2 (103 million parameters).")] = "gpt2",
    minutes: Annotated[float | None, typer.Option(min=0.01, help="How long to train; default 3.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="In the place of minutes.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the text.")] = 0,
) -> None:
    """Train a model on the shipped text, so that what a technique costs in quality can be measured on it."""
    from orchestrator.train_model import train_model

    train_model(directory, size=size, minutes=minutes, steps=steps, device=device, seed=seed)


@app.command()
def table(
    directories: Annotated[list[str], typer.Argument(metavar="DIR...", help="Result folders; several are joined.")],
    format_: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.TERMINAL,
    kind: KindOption = Kind.COMPARISON,
    baseline: Annotated[
        str | None, typer.Option(metavar="STACK", help="Compare with this stack, not with the sweep's baseline.")
    ] = None,
) -> None:
    """The comparison table of one or several result folders, or another kind of table.

    A trade-off puts hardware across; a ladder compares each stack with the one before it in the sweep and says why a
    slower one is; growth is what further tokens of a prompt cost in bytes and time.
    """
    from orchestrator.show import print_table

    if baseline is not None and kind not in {Kind.COMPARISON, Kind.TRADEOFF}:
        raise typer.BadParameter(f"the {kind.value} table has no baseline", param_hint="--baseline")
    print_table(directories, kind.value, format_.value, baseline)


def seconds(text: str) -> float:
    """`90`, `90s`, `10m`, `2h` in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h)?", text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time such as 30s, 10m or 2h")
    return float(match.group(1)) * {"s": 1, "m": 60, "h": 3600}[match.group(2) or "s"]


def _outcomes(text: str) -> tuple[str, ...]:
    from tasks.row import Outcome
    from tasks.stacks import nearest

    chosen = tuple(filter(None, (part.strip() for part in text.split(","))))
    known: list[Any] = [outcome.value for outcome in Outcome]
    for name in chosen:
        if name not in known:
            raise typer.BadParameter(f"unknown outcome {name!r}{nearest(name, known)}")
    return chosen
