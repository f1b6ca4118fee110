"""Batches as jobs of a running Ray cluster, through Ray's job client. The project is installed on the cluster's nodes;
the batch's folder, with the images in it, is sent along."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pipeline.spec import load_batch, read_mapping

PLACES = (
    "base",
    "retrieval.corpus",
    "retrieval.clip",
    "retrieval.block_list",
    "training.deepspeed.config",
    "evaluation.clip",
    "publish.signing_key",
)
"""Settings that can name a file, beside concepts' images."""


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


def submit(batch_file: Path, address: str | None, output: str | None) -> str:
    """Check the batch here, then start it there. Returns the job's id.

    Raises: ValueError when there is no such cluster, or it does not take the job.
    """
    batch = load_batch(batch_file)
    batch = batch.model_copy(update={"output": output}) if output else batch
    batch.check_places()
    folder = Path(os.path.abspath(batch_file)).parent
    images = [image for concept in batch.concepts for image in concept.images]
    for place in images + _relative_places(batch_file):
        if "://" not in place and not Path(place).is_relative_to(folder):
            raise ValueError(f"{batch_file}: {place} is not in {folder}: only the batch's own folder is sent along")
    entrypoint = ["python", "-m", "ray_jobs.cli", "run", batch_file.name, *(["--output", output] if output else [])]
    connection = client(address)
    try:
        return connection.submit_job(
            entrypoint=shlex.join(entrypoint),
            submission_id=f"{batch.name}-{secrets.token_hex(3)}",
            runtime_env={"working_dir": str(folder)},
            metadata={"batch": batch.name},
        )
    except RuntimeError as error:
        raise ValueError(
            f"the cluster did not take the job: {str(error).strip().splitlines()[0]} "
            "(a head that has just started takes jobs after some seconds)"
        ) from None


def _relative_places(batch_file: Path) -> list[str]:
    """Where files lie that a batch file names by relative paths, but images; absolute ones are the nodes' own."""
    written, found = read_mapping(batch_file, "batch file", "concepts"), []
    for key in PLACES:
        value: Any = written
        for part in key.split("."):
            value = (value or {}).get(part)
        if value and "://" not in value and not os.path.isabs(value):
            found.append(os.path.abspath(batch_file.parent / Path(value).expanduser()))
    return found


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


def stop(job: str, address: str | None) -> None:
    """Ask a job to end; what it finished stays in the store. Raises: ValueError when there is no such job."""
    find(job, address)
    client(address).stop_job(job)


async def follow(job: str, address: str | None) -> JobStatus:
    """Print a job's log until it ends; returns how it ended."""
    connection = client(address)
    async for lines in connection.tail_job_logs(job):
        sys.stdout.write(lines)
        sys.stdout.flush()
    return connection.get_job_status(job)


def describe(details: JobDetails) -> Iterator[str]:
    """A job in words, line by line."""
    seconds = ((details.end_time or details.start_time or 0) - (details.start_time or 0)) / 1000
    yield f"{details.submission_id}  {details.status.value}" + (f"  {seconds:.0f} s" if details.end_time else "")
    if details.status in (JobStatus.FAILED, JobStatus.STOPPED) and details.message:
        yield f"  {details.message.strip().splitlines()[0]}"
