"""Batches as jobs of a running Ray cluster, through Ray's job client. The project is installed on the cluster's nodes;
the batch file is sent along, with the images and other files that it names by relative paths."""

from __future__ import annotations

import glob
import itertools
import math
import os
import secrets
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pipeline.places import CLIP, located
from pipeline.spec import (
    ConceptBatch,
    Mark,
    batch_from,
    is_suite,
    marked,
    one_is_a_list,
    overridden,
    read_batch,
    sections,
)
from pipeline.terminal import print
from training.images import list_images

LIMIT = 100
"""MiB of a request to Ray's dashboard, which takes what is sent along as one."""


def client(address: str | None) -> JobSubmissionClient:
    """address: of the dashboard, `http://head:8265`; Ray's environment variables where it is None.

    Raises: ValueError when there is no cluster, or it wants another token.
    """
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        raise ValueError(
            f"no Ray cluster at {address or 'the default address'}: {str(error).strip().splitlines()[0]} "
            "(--address http://HEAD:8265 says where; its token is read from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH "
            "or ~/.ray/auth_token, with RAY_AUTH_MODE=token)"
        ) from None


def submit(batch_file: Path, address: str | None, output: str | None, deadline: float = math.inf) -> str:
    """Check the batch here, then start it there with the files that it names by relative paths. Returns the job's id.

    deadline: minutes that the job may take, from when it begins.

    Raises: ValueError when a file is named that would not be there, when there is too much to send, when there is no
        such cluster, or it does not take the job.
    """
    asked = read_batch(batch_file)
    batch = overridden(batch_from(asked), output=output)
    batch.check_places()
    if batch.signing_key and not os.path.isabs(os.path.expanduser(batch.publish.signing_key)):
        raise ValueError(
            f"{batch_file}: publish.signing_key: {batch.publish.signing_key!r} is relative, and a private key is not "
            "sent along: put it on the nodes, and name it by an absolute path"
        )
    images, others = _named(asked.data)
    if asked.written and isinstance(listed := (asked.written.value or {}).get("concepts"), str):
        others.append(listed)
    folder = Path(os.path.abspath(batch_file)).parent
    sent = {place: set(list_images(place)) for place in _sent_places(images, batch_file)}
    sent |= {place: _files(place) for place in _sent_places([batch_file.name, *others], batch_file)}
    key = os.path.realpath(batch.signing_key)
    sent = {place: {path for path in paths if os.path.realpath(path) != key} for place, paths in sent.items()}
    files = sorted(set().union(*sent.values()))
    _check_size(sent, batch_file)
    options = [] if output is None else ["--output", output]
    options += [] if math.isinf(deadline) else ["--deadline", str(deadline)]
    entrypoint = ["python", "-m", "ray_jobs.cli", "run", batch_file.name, *options]
    connection = client(address)
    with TemporaryDirectory() as scratch:
        package = Path(scratch) / "batch.zip"
        with ZipFile(package, "w", strict_timestamps=False) as archive:
            for file in files:
                archive.write(file, file.relative_to(folder))
        try:
            return connection.submit_job(
                entrypoint=shlex.join(entrypoint),
                submission_id=f"{batch.name}-{secrets.token_hex(3)}",
                runtime_env={"working_dir": str(package)},
                metadata={"batch": batch.name},
            )
        except RuntimeError as error:
            why = " … ".join(_first_and_last(str(error)))
            if "No available agent" in why:
                why += " (a head that has just started takes jobs after some seconds)"
            raise ValueError(f"the cluster did not take the job: {why}") from None


def _named(written: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What a batch file names, as it names it: places of images, and other files."""

    def named(*marks: Mark) -> list[str]:
        ways = marked(ConceptBatch, *marks)
        given = [section.get(way[-1]) for way in ways for section in sections(written, way[:-1])]
        lists = [value.values() if isinstance(value, dict) else one_is_a_list(value) for value in given if value]
        return [each.removeprefix(CLIP) for values in lists for each in values]

    return named(Mark.IMAGES), named(Mark.FILE, Mark.MODEL) + list(filter(is_suite, named(Mark.SUITES)))


def _sent_places(written: Iterable[str], batch_file: Path) -> list[str]:
    """Where those of some places are that are sent along: absolute ones, and URLs, are the nodes' own.

    Raises: ValueError for a place that the nodes would not find.
    """
    folder = Path(os.path.abspath(batch_file)).parent
    sent = []
    for name in written:
        if "://" in name:
            continue
        path = Path(os.path.expanduser(name))
        place = os.path.abspath(folder / path)
        inside = Path(place).is_relative_to(folder)
        if inside and path.is_absolute():
            raise ValueError(
                f"{batch_file}: {name} is in {folder}, which has another place on the nodes: "
                f"name it relative to the batch file, {os.path.relpath(place, folder)!r}"
            )
        if not inside and not path.is_absolute():
            raise ValueError(
                f"{batch_file}: {place} is not in {folder}: only what is in the batch's own folder is sent along; "
                "what the nodes have themselves is named by an absolute path"
            )
        if inside:
            sent.append(located(name, folder))
    return sent


def _files(place: str) -> set[Path]:
    """A file, those in a folder, or those that match a pattern; none for a model's name on the hub."""
    found = [place] if os.path.exists(place) else glob.glob(place, recursive=True)
    inner = [glob.glob(f"{glob.escape(path)}/**", recursive=True, include_hidden=True) for path in found]
    return {path for path in map(Path, itertools.chain(found, *inner)) if path.is_file()}


def _check_size(sent: dict[str, set[Path]], batch_file: Path) -> None:
    """Raises: ValueError when this is more than Ray takes. sent: files by the place that names them."""

    def mib(files: set[Path]) -> float:
        return sum(file.stat().st_size for file in files) / 2**20

    total, largest = mib(set().union(*sent.values())), max(sent, key=lambda place: mib(sent[place]))
    if total >= LIMIT:
        raise ValueError(
            f"{batch_file}: {total:.0f} MiB would be sent along, {mib(sent[largest]):.0f} of them {largest}; Ray takes "
            f"less than {LIMIT}: put images and models where all nodes reach them and name them by absolute paths, "
            "a corpus by an absolute path or URL"
        )


def jobs(address: str | None) -> list[JobDetails]:
    """All jobs that were submitted, oldest first."""
    found = [job for job in client(address).list_jobs() if job.submission_id]
    return sorted(found, key=lambda job: job.start_time or 0)


def find(job: str, address: str | None) -> JobDetails:
    """Raises: ValueError when there is no such job."""
    found = jobs(address)
    for details in found:
        if details.submission_id == job:
            return details
    known = ", ".join(str(details.submission_id) for details in found[-5:]) or "none"
    raise ValueError(f"no job {job!r}; the last ones: {known}")


def stop(job: str, address: str | None) -> JobDetails:
    """Ask a job to end, if it has not; what it finished stays in the store. Returns how it stood when it was asked.

    Raises: ValueError when there is no such job.
    """
    details = find(job, address)
    if not details.status.is_terminal():
        client(address).stop_job(job)
    return details


async def follow(job: str, address: str | None) -> JobDetails:
    """Print a job's log until it ends; returns how it ended."""
    connection = client(address)
    async for lines in connection.tail_job_logs(job):
        print(lines, end="", flush=True)
    return connection.get_job_info(job)


def describe(details: JobDetails) -> Iterator[str]:
    """A job in words, line by line."""
    seconds = ((details.end_time or details.start_time or 0) - (details.start_time or 0)) / 1000
    yield f"{details.submission_id}  {details.status.value}" + (f"  {seconds:.0f} s" if details.end_time else "")
    if details.status in (JobStatus.FAILED, JobStatus.STOPPED):
        for line in _first_and_last(details.message or ""):
            yield f"  {line}"


def _first_and_last(message: str) -> list[str]:
    """Lines of one of Ray's messages: what happened, and why, where a log or a traceback follows."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines if len(lines) < 2 else [lines[0], lines[-1]]
