"""The `polyconcept` command."""

from __future__ import annotations

import asyncio
import importlib.metadata
import io
import json
import logging
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.limits import EXIT as OUT_OF_TIME
from pipeline.limits import Limits, OutOfTime
from pipeline.places import masked
from pipeline.terminal import print
from ray_jobs.releases import app as releases

if TYPE_CHECKING:
    from pipeline.runner import Runner

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(releases, name="release")

EXTRAS = {
    "deepspeed": "train",
    "faiss": "train",
    "imagehash": "train",
    "img2dataset": "train",
    "tensorboard": "train",
    "timm": "train",
    "torchmetrics": "train",
    "webdataset": "train",
    "ray": "cluster",
}
"""Modules that not every command needs, and the extra of this project that installs each."""


def _show_version(asked: bool) -> None:
    if asked:
        print(importlib.metadata.version("polyconcept"))
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


BatchFile = Annotated[
    Path, typer.Argument(help="Batch file: YAML, or the concepts_list.json or dataset.json of another trainer.")
]
Output = Annotated[str | None, typer.Option(help="Folder for store, report and releases, instead of the batch's own.")]
Deadline = Annotated[
    float, typer.Option(min=0, help="Minutes after which the run ends itself; what was finished is kept.")
]
DeviceWait = Annotated[
    float, typer.Option(min=0, envvar="POLYCONCEPT_DEVICE_WAIT", help="Minutes to wait for a cluster's first device.")
]
Gpu = Annotated[
    bool, typer.Option("--gpu", envvar="POLYCONCEPT_GPU", help="Use GPUs only: wait for one where there is none yet.")
]


def _load(path: Path, output: str | None):
    from pipeline.spec import load_batch, overridden

    return overridden(load_batch(path), output=output)


@app.command()
def run(
    batch_file: BatchFile,
    output: Output = None,
    deadline: Deadline = math.inf,
    device_wait: DeviceWait = math.inf,
    gpu: Gpu = False,
) -> None:
    """Do everything a batch asks for: retrieve, train, merge, measure, publish, report.

    Exit code 5 when concepts that failed were left out, as `merge.partial` allows; 2 when something failed;
    124 when the time was up.
    """
    limits, runner = Limits(deadline, device_wait, gpu), _on_ray()
    from pipeline.batch import Exit
    from pipeline.batch import run as run_batch

    batch = _load(batch_file, output)
    _refuse_overwriting(_results(batch.output_path), [batch_file])
    outcome = run_batch(batch, runner, limits)
    made = f"made release {masked(outcome.release)}"
    if outcome.report:
        _print_summary(outcome.summary)
        made += f", report {outcome.report}, figures {outcome.report.parent / 'summary.json'}"
    print(made)
    if outcome.hub:
        print(f"it is at {outcome.hub}")
    if outcome.failures:
        for failure in outcome.failures:
            print(f"left out: {masked(failure)}", file=sys.stderr)
        raise typer.Exit(Exit.PARTIAL)


@app.command()
def retrain(
    retraining_file: Annotated[Path, typer.Argument(help="A batch file with `catalogue` in the place of `concepts`.")],
    output: Output = None,
    wait: Annotated[float, typer.Option(min=0, help="Minutes to wait for another run at the same releases.")] = 0,
    deadline: Deadline = math.inf,
    device_wait: DeviceWait = math.inf,
    gpu: Gpu = False,
) -> None:
    """Bring releases up to date with a concept catalogue: train what changed, publish if the gate passes.

    Exit code 0: released, or nothing changed; 2: bad input or a failure; 3: the gate refused, the candidate is kept;
    4: another run is at work; 5: released, or nothing changed, but concepts that failed were left out; 124: the time
    was up.
    """
    limits, runner = Limits(deadline, device_wait, gpu), _on_ray()
    from pipeline.batch import Exit
    from pipeline.release.lease import Busy
    from pipeline.retraining import JsonLines
    from pipeline.retraining import retrain as bring_up_to_date
    from pipeline.spec import load_retraining, overridden

    logger, handler = logging.getLogger("polyconcept"), logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    start = time.monotonic()

    def log_end(code: Exit) -> None:
        logger.info("end", extra={"exit": int(code), "seconds": round(time.monotonic() - start, 1)})

    try:
        asked = overridden(load_retraining(retraining_file), output=output)
        _refuse_overwriting(_results(asked.output_path), [retraining_file])
        outcome = bring_up_to_date(asked, runner, wait * 60, limits)
    except Exception as error:
        logger.error("failed", extra={"error": str(error) or repr(error)})
        ends = {Busy: Exit.BUSY, OutOfTime: Exit.OUT_OF_TIME}
        log_end(ends.get(type(error), Exit.BAD_INPUT))
        if not isinstance(error, Busy):
            raise
        print(f"error: {masked(str(error))}", file=sys.stderr)
        raise typer.Exit(Exit.BUSY) from None
    log_end(outcome.exit)
    for line in outcome.left_out:
        print(f"left out: {masked(line)}", file=sys.stderr)
    if outcome.exit == Exit.REFUSED:
        for verdict in outcome.verdicts:
            if not verdict.passed:
                print(f"refused: {verdict}", file=sys.stderr)
        print(f"kept the candidate {masked(outcome.place)}; the latest release is what it was")
    else:
        print(f"the latest release is {masked(outcome.place)}")
    if outcome.exit:
        raise typer.Exit(outcome.exit)


@app.command()
def plan(
    batch_file: BatchFile,
    output: Output = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Predict the batch on the cluster that this YAML file describes, instead.")
    ] = None,
    concepts: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="With --cluster: as if there were so many.")
    ] = None,
    captions: Annotated[
        int | None, typer.Option(min=1, max=10**12, help="With --cluster: rows of the corpus; a million by default.")
    ] = None,
    stages: Annotated[bool, typer.Option("--stages", help="A line for each stage, with its key in the store.")] = False,
) -> None:
    """Print what there is to do, what is done already, and what the rest will cost. Does nothing."""
    from pipeline.cost.of_plan import describe_here
    from pipeline.plan import make_plan
    from pipeline.ready import check_ready
    from pipeline.store import Store

    if not cluster and (concepts or captions):
        raise ValueError(
            f"--{'concepts' if concepts else 'captions'}: only a prediction takes it; "
            "name the file that describes the cluster with --cluster"
        )
    batch = _load(batch_file, output)
    made = make_plan(batch)
    if cluster:
        from pipeline.cost.cluster import load_cluster
        from pipeline.cost.prediction import describe, predict

        nodes, count = load_cluster(cluster), concepts or len(batch.concepts)
        phases, packed = predict(made, nodes, concepts=count, captions=captions or 1_000_000)
        print("\n".join(describe(phases, packed, nodes)))
        return
    store = Store(batch.store_url)
    notes = [*made.notes, *check_ready(made, store)]
    print(f"{batch.name}: {len(batch.concepts)} concepts over {batch.base}, store {masked(batch.store_url)}")
    print("\n".join(describe_here(made, store, _this_device(), every=stages)))
    for note in notes:
        print(f"note: {note}")


def _on_ray() -> Runner:
    """Imports Ray before all else that takes long, so that where it is missing, that is what is said."""
    from ray_jobs.runner import OnRay

    return OnRay()


def _this_device():
    """What a training may use here when Ray is started on this machine."""
    import torch
    from ray._private.utils import estimate_available_memory, resolve_object_store_memory

    from pipeline.cost.estimate import Device

    if torch.cuda.is_available():
        return Device(0.9 * torch.cuda.get_device_properties(0).total_memory, cuda=True)
    memory = estimate_available_memory()
    return Device(memory - resolve_object_store_memory(memory), cuda=False)


Address = Annotated[
    str | None, typer.Option(help="Of the cluster's dashboard: http://HEAD:8265; RAY_API_SERVER_ADDRESS by default.")
]
Job = Annotated[str, typer.Argument(help="The job's id, as `submit` and `status` say it.")]


@app.command()
def submit(
    batch_file: BatchFile,
    address: Address = None,
    output: Output = None,
    deadline: Deadline = math.inf,
    wait: Annotated[bool, typer.Option(help="Follow the job's log until it ends.")] = True,
) -> None:
    """Run a batch as a job of a Ray cluster; what it names by relative paths is sent along. Exit code that of the job's
    `run`; 1 when it was stopped or lost."""
    from ray_jobs.jobs import follow
    from ray_jobs.jobs import submit as submit_job

    job = submit_job(batch_file, address, output, deadline)
    print(f"submitted {job}", flush=True)
    if not wait:
        return
    try:
        details = asyncio.run(follow(job, address))
    except (KeyboardInterrupt, SystemExit) as stop:
        print(f"interrupted; {job} goes on: `polyconcept status` and `polyconcept stop` name it", file=sys.stderr)
        raise _Told(stop.code if isinstance(stop, SystemExit) else 130) from None
    print(f"{job} {details.status.value}")
    if details.status.value != "SUCCEEDED":
        raise typer.Exit(details.driver_exit_code or 1)


@app.command()
def status(job: Annotated[str | None, typer.Argument(help="One job; all when empty.")] = None, address: Address = None):
    """Say how the jobs of a Ray cluster stand."""
    from ray_jobs.jobs import describe, find, jobs

    found = [find(job, address)] if job else jobs(address)
    for details in found:
        print("\n".join(describe(details)))
    if not found:
        print("no jobs")


@app.command()
def stop(job: Job, address: Address = None) -> None:
    """Stop a job. What it has finished stays in the store; submitted again, the batch goes on from there."""
    from ray_jobs.jobs import stop as stop_job

    status = stop_job(job, address).status
    print(f"{job} has ended already: {status.value}" if status.is_terminal() else f"asked {job} to stop")


@app.command()
def sample(
    weights: Annotated[str, typer.Argument(help="Release (folder or URL), merged.safetensors or weights.safetensors.")],
    prompt: Annotated[list[str], typer.Argument(help="Prompts, naming concepts by token: 'photo of a <new1> cat'.")],
    base: Annotated[str, typer.Option(help="Base model: folder, hub name, or 'miniature'.")] = "miniature",
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("samples.png"),
    count: Annotated[int, typer.Option(min=1, help="Images a prompt.")] = 4,
    steps: Annotated[int, typer.Option(min=1)] = 50,
    guidance: Annotated[float, typer.Option(min=0, max=1000)] = 6.0,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1)] = 0,
) -> None:
    """Draw prompts with a release's merged model, or with one concept's weights."""
    if not out.parent.is_dir() or out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {out}: give a .png, .jpg or .webp file in a folder that is there")
    from tqdm import tqdm

    from pipeline.merge.files import load_change, weights_file
    from pipeline.sampling import draw, grid
    from pipeline.spec import base_path
    from training.backbone import load_backbone

    file = weights_file(weights)
    folder = [] if file == weights else [os.path.dirname(file)]  # of a release, which is not to be added to
    _refuse_overwriting({"--out": out}, [weights, *folder, base_path(base)])
    backbone = load_backbone(base_path(base))
    deltas, tokens = load_change(weights, backbone)
    prompts = [p for p in prompt for _ in range(count)]
    with backbone.changed(deltas, tokens), tqdm(total=len(prompts), unit="image") as bar:
        images = draw(
            backbone,
            prompts,
            seeds=[seed + i for i in range(len(prompts))],
            steps=steps,
            guidance=guidance,
            progress=lambda done: bar.update(done - bar.n),
        )
    rows = [images[i : i + count] for i in range(0, len(images), count)]
    grid(rows, labels=prompt).save(out)
    print(f"made {out}: {len(images)} images of {len(prompt)} prompts")


@app.command()
def merge(
    captions: Annotated[Path, typer.Option(help="Regularisation captions, one a line.")],
    weights: Annotated[
        list[Path] | None, typer.Argument(help="weights.safetensors of separately trained concepts.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("merged.safetensors"),
    base: Annotated[str, typer.Option(help="Base model: folder, hub name, or 'miniature'.")] = "miniature",
    form: Annotated[
        Literal["soft", "paper"],
        typer.Option(help="soft: as close to each concept as other captions allow; paper: equation 4, met exactly."),
    ] = "soft",
    sums: Annotated[
        Path | None,
        typer.Option(help="What is merged already: read when it is there, and written anew."),
    ] = None,
    remove: Annotated[
        list[Path] | None, typer.Option(help="weights.safetensors of concepts to take out of --sums.")
    ] = None,
) -> None:
    """Fold concept weights into one low-rank model, without a batch file.

    With --sums one concept is added to, replaced in or removed from a merged model without the other concepts' files.
    """
    from pipeline.merge.files import merge_files
    from pipeline.spec import base_path

    read = [captions, base_path(base), *(weights or ()), *(remove or ())]
    _refuse_overwriting({"--out": out}, [*read, *([sums] if sums else [])])
    _refuse_overwriting({"--sums": sums} if sums else {}, [*read, out])
    model, report = merge_files(
        weights or (), captions, base_path(base), form=form, sums=sums, remove=remove or (), out=out
    )
    worst = max(report.residuals.items(), key=lambda item: item[1], default=None)
    of = " of those added" if sums else ""
    print(
        f"made {out}: {len(model.metadata['concepts'])} concepts, {report.rows} constraint rows, {report.form} form, "
        f"{out.stat().st_size / 1e6:.2f} MB, "
        f"{f'worst residual{of} {worst[1]:.1e} ({worst[0]}), ' if worst else ''}drift {report.drift:.3f}"
    )


@app.command()
def publish(
    folder: Annotated[str, typer.Argument(help="Prepared release folder; for the hub a release, or releases.")],
    destination: Annotated[str, typer.Argument(help="Folder or URL of the releases; or hf://OWNER/NAME.")],
    signing_key: Annotated[str, typer.Option(help="Ed25519 private key (PEM) to sign the manifest with.")] = "",
) -> None:
    """Publish a prepared folder as the next version, whole or not at all; or copy a release to the Hugging Face hub."""
    from pipeline.release.hub import SCHEME, push
    from pipeline.release.place import plain_place
    from pipeline.release.publish import publish as publish_folder

    if destination.startswith(SCHEME):
        print(f"it is at {push(folder, destination.removeprefix(SCHEME))}")
        return
    if "://" not in destination:
        _refuse_overwriting({"destination": Path(destination)}, [folder], is_folder=True)
    info = publish_folder(Path(plain_place(folder)), destination, signing_key=signing_key)
    print(f"{'made release' if info.created else 'the same content is there already as'} {masked(info.url)}")


@app.command()
def report(batch_file: BatchFile, output: Output = None) -> None:
    """Write the report of a finished batch again."""
    from pipeline.plan import make_plan
    from pipeline.release.publish import resolve
    from pipeline.report import summary, write_report
    from pipeline.store import Store

    batch = _load(batch_file, output)
    made, store = make_plan(batch), Store(batch.store_url)
    todo = made.todo(store)
    if todo:
        raise ValueError(
            f"{batch_file}: {len(todo)} stages are not done, first {todo[0].kind} {todo[0].name}; run it first"
        )
    release = resolve(batch.release_url)
    folder = Path(batch.output_path)
    _refuse_overwriting(_results(folder), [batch_file])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary(made, store, release), indent=1))
    write_report(made, store, release, folder / "report.html")
    print(f"made {folder / 'report.html'} and {folder / 'summary.json'}")


@app.command()
def schema(
    kind: Annotated[Literal["batch", "retraining", "study"], typer.Argument(help="Of which file.")] = "batch",
) -> None:
    """Print the JSON schema of a file, with which editors complete and check it as you write."""
    from pydantic import BaseModel

    from pipeline.spec import ConceptBatch, Retraining
    from pipeline.study import Study

    models: dict[str, type[BaseModel]] = {"batch": ConceptBatch, "retraining": Retraining, "study": Study}
    print(json.dumps(models[kind].model_json_schema(), indent=1))


@app.command()
def study(study_file: Annotated[Path, typer.Argument(help="Study file: methods, concepts, seeds, tables.")]) -> None:
    """Compare methods on the same concepts, prompts and seeds: tables, plots, grids. What is done is not repeated."""
    runner = _on_ray()
    from pipeline.study import run_study

    print(f"made {run_study(study_file, runner) / 'README.md'}")


preference = typer.Typer(no_args_is_help=True, help="Ask people which method's images they prefer.")
app.add_typer(preference, name="preference")


@preference.command("serve")
def serve_preference(
    folder: Annotated[Path, typer.Argument(help="Folder with images.parquet (or .csv) and concepts/.")],
    answers: Annotated[
        Path | None, typer.Option(help="SQLite file the answers go to; FOLDER/answers.sqlite by default.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets those in who know the printed address.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of images a rater is asked about, at most.")] = 50,
) -> None:
    """Show images of different methods side by side on a web page, and store which ones people prefer."""
    from pipeline.evaluation.preference import serve

    answers = answers or folder / "answers.sqlite"
    _refuse_overwriting({"--answers": answers}, [folder / "images.parquet", folder / "images.csv"])
    serve(folder, answers, host=host, port=port, pairs=pairs)


@preference.command("report")
def report_preference(
    answers: Annotated[Path, typer.Argument(help="The answers' SQLite file, or the folder it is in.")],
) -> None:
    """Print how often each method was preferred to each other one, with a 95 % interval."""
    from pipeline.evaluation.preference import shares

    table = shares(answers / "answers.sqlite" if answers.is_dir() else answers)
    if table.empty:
        print("no answers yet")
        return
    print(f"{'question':9} {'preferred':24} {'to':24} {'share':>6} {'95 % interval':>15} {'answers':>8} {'raters':>7}")
    for row in table.itertuples():
        interval = f"{row.low:.1%} – {row.high:.1%}"
        print(
            f"{row.question:9} {row.method_a:24} {row.method_b:24} {row.share:6.1%} {interval:>15} "
            f"{row.answers:8} {row.raters:7}"
        )


def _print_summary(figures: dict[str, Any]) -> None:
    """A line per concept: alignment of base, single and merged model, by the last judge."""
    from pipeline.evaluation.measures import measures_in

    judge = [m.name for m in measures_in(figures["overall"]["base"]) if m.name != "text"][-1]
    print(f"\n{'concept':24} {judge + ' alignment':^32} {'text alignment':^26}")
    print(f"{'':24} {'base':>8} {'single':>8} {'merged':>8} {'gain/se':>7} {'base':>8} {'single':>8} {'merged':>8}")
    for name, concept in figures["concepts"].items():
        values = [
            f"{concept[model][score]:8.3f}" for score in (judge, "text") for model in ("base", "single", "merged")
        ]
        ratio = concept[f"{judge}_gain_merged_se"]
        gain = f"{'–':>7}" if ratio is None else f"{ratio:7.1f}"
        print(f"{name[:24]:24} {' '.join(values[:3])} {gain} {' '.join(values[3:])}")
    sizes, residuals = figures["bytes"], figures["residuals"]["after"].values()
    print(
        f"\n{sizes['concepts'] / 1e6:.2f} MB of concept weights became {sizes['merged'] / 1e6:.2f} MB; "
        f"{f'worst constraint residual {max(residuals):.1e}; ' if residuals else ''}"
        f"{figures['seconds_total']:.0f} s of stages\n"
    )


def _results(output: str | Path) -> dict[str, Path]:
    """What a run writes to its output folder under names that a file of the user's may have."""
    return {name: Path(output) / name for name in ("report.html", "summary.json")}


def _refuse_overwriting(outputs: dict[str, Path], inputs: Iterable[str | Path], *, is_folder: bool = False) -> None:
    """outputs: files (or folders, if `is_folder`) to be written, by what names them. inputs: files and folders that are
    read; what is no path here (a URL, a model's name on the hub) is passed over.

    Raises: ValueError when one of the outputs is there and no regular file, or is one of the inputs, or in it.
    """
    for name, out in outputs.items():
        if out.exists() and not (out.is_dir() if is_folder else out.is_file()):
            found = "a folder" if out.is_dir() else "a file" if out.is_file() else "a pipe or a device"
            raise ValueError(f"{name} {out}: {found}; give the path of a {'folder' if is_folder else 'file'} to write")
        for read in map(Path, inputs):
            # not `Path.resolve`, which raises for a link to itself
            real, source = Path(os.path.realpath(out)), Path(os.path.realpath(read))
            same = real == source
            same = same or (out.exists() and read.exists() and out.samefile(read))  # hard links
            if same or (read.is_dir() and real.is_relative_to(source)):
                where = "is read or written, too" if same else f"is in {read}, which is read"
                raise ValueError(f"{name} {out}: {where}; give another place")


def _is_from_outside(error: Exception) -> bool:
    """Whether S3's client or Ray raised it, for which they have no OSError. Not imported: none of theirs."""
    kinds = (("botocore.exceptions", "BotoCoreError"), ("ray.exceptions", "RayError"))
    return any(name in sys.modules and isinstance(error, getattr(sys.modules[name], kind)) for name, kind in kinds)


def _is_missing_storage(error: ImportError) -> bool:
    """Whether fsspec raised it for a URL, as in `gs://…`, whose package is not installed."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") == "fsspec.registry"


class _Told(SystemExit):
    """The end of a command that has said itself what became of it."""


STOPPED = (130, 128 + signal.SIGTERM, 128 + signal.SIGHUP)
"""Exit codes after Ctrl-C (typer's) and these signals."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command. A user's mistake, and what the storage or Ray cannot do, is a message and exit code 2; a fault
    of ours is a traceback and exit code 2, too; Ctrl-C and a signal to end are a message and 128 and their number."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    # of products of 4-bit matrices, of which there are none
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # what is under way to end is not to be disturbed
        received.append(number)
        sys.exit(128 + number)

    ending = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]  # not nohup's
    for number in ending:
        signal.signal(number, stop)
    try:
        app(arguments)
    except _Told:
        raise
    except SystemExit as end:
        # out of a call of Ray's core, in which a signal was answered, comes an exit with code 1
        code = 128 + received[0] if received else end.code
        if code in STOPPED:
            print("interrupted; what was finished is kept, run the same command to go on", file=sys.stderr)
        sys.exit(code)
    except OutOfTime as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(OUT_OF_TIME)
    except ValueError as error:
        print(f"error: {masked(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # of a copy both: which of them the disk is full of, or cannot be read, is not said
        names = [str(name) for name in (error.filename, error.filename2) if name]
        place = f"{' -> '.join(names)}: " if names else ""
        has_words = type(error).__str__ is not OSError.__str__  # aiohttp's errors name the host
        told = masked(f"{place}{error if has_words else error.strerror or error}")
        print(f"error: {told}; nothing half-written was kept", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
            print(
                f"error: this command needs {error.name}, which is not installed; "
                f"run `pip install 'polyconcept[{extra}]'`",
                file=sys.stderr,
            )
        elif _is_from_outside(error):
            print(f"error: {masked(str(error))}", file=sys.stderr)
        elif isinstance(error, ImportError) and _is_missing_storage(error):
            print(f"error: {masked(str(error))}; tested is s3 only: pip install 'polyconcept[s3]'", file=sys.stderr)
        else:
            print(masked(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(2)
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
