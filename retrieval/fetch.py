"""img2dataset in a process of its own: `python -m retrieval.fetch settings.json`.

A separate process because img2dataset was written to be a command: it imports much, prints, and starts workers. Its
reader, downloader, writer and distributors are used as they are; ours are the opener its `urlopen` goes through, and
the resizer, since its own takes truncated images for whole, does not turn images as EXIF says, and has no time limit.
"""

from __future__ import annotations

import io
import json
import sys
import urllib.request
from pathlib import Path

from img2dataset.distributor import multiprocessing_distributor, ray_distributor
from img2dataset.downloader import Downloader
from img2dataset.reader import Reader
from img2dataset.writer import WebDatasetSampleWriter

from retrieval.addresses import Rules, checked_opener
from retrieval.decoding import decode
from retrieval.images import square

JPEG_QUALITY = 95
NO_AI_DIRECTIVES = ["noai", "noimageai", "noindex", "noimageindex"]
"""X-Robots-Tag directives by which a site says that its images are not to be used; img2dataset's default."""


class SquareResizer:
    """Takes the place of img2dataset's resizer: a whole image to a square JPEG, without chroma subsampling.

    Returns (bytes, width, height, original width, original height, error), one of bytes and error being None. Images
    whose shorter side is under half the size asked for are too small: blown up they would teach blur.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, stream: io.BytesIO, _boxes: object = None) -> tuple:
        try:
            decoded = decode(stream.getvalue())
            width, height = decoded.size
            if 2 * min(width, height) < self.size:
                raise ValueError(f"too small: {width} x {height}")
        except ValueError as error:
            return None, None, None, None, None, str(error)
        data = io.BytesIO()
        square(decoded.image, self.size).save(data, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return data.getvalue(), self.size, self.size, width, height, None


class CheckedDownloader(Downloader):
    """img2dataset's downloader, asking allowed addresses only in whichever process it is run."""

    def __init__(self, *, rules: Rules, **parts) -> None:
        super().__init__(**parts)
        self.rules = rules

    def __call__(self, shard: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        urllib.request.install_opener(checked_opener(self.rules))
        try:
            return super().__call__(shard)
        finally:
            urllib.request.install_opener(None)  # a Ray worker goes on to other tasks


def fetch(settings: dict) -> None:
    """Download the table `settings["table"]` into webdataset shards in the folder `settings["out"]`."""
    out, shard_rows = settings["out"], settings["shard_rows"]
    reader = Reader(
        url_list=settings["table"],
        input_format="parquet",
        url_col="url",
        caption_col=None,
        verify_hash_col=None,
        verify_hash_type=None,
        save_additional_columns=["candidate"],
        number_sample_per_shard=shard_rows,
        done_shards=set(),
        tmp_path=out,
    )
    downloader = CheckedDownloader(
        rules=Rules(local=settings["local"], max_bytes=settings["max_bytes"]),
        sample_writer_class=WebDatasetSampleWriter,
        resizer=SquareResizer(settings["image_size"]),
        thread_count=settings["threads"],
        save_caption=False,
        extract_exif=False,
        output_folder=out,
        column_list=reader.column_list,
        timeout=settings["timeout"],
        number_sample_per_shard=shard_rows,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token="polyconcept",
        disallowed_header_directives=NO_AI_DIRECTIVES,
    )
    if settings["distributor"] == "ray":
        ray_distributor(None, downloader, reader, None, None)
    elif settings["processes"] > 1:
        multiprocessing_distributor(settings["processes"], downloader, reader, None, 1)
    else:  # saves the start of a second process, most of the time of a small set
        for shard in reader:
            downloader(shard)


if __name__ == "__main__":
    fetch(json.loads(Path(sys.argv[1]).read_text()))
