"""Human preference between methods (the user study of Custom Diffusion, arXiv 2212.04488, section 4): a local page
that shows two images of different methods side by side and asks which fits the text better and which shows the
concept better.

A study is a folder with `images.parquet` (or `images.csv`), a row per image with the columns `method`, `concept`,
`prompt`, `seed` and `image` (path in the folder), and the real images as `concepts/<concept>/*`. Images of two methods
are compared where concept, prompt and seed are the same.

Raters are blind: nothing that reaches the browser (addresses, page, image files) tells the methods apart.

Images may be private. A server on this machine's loopback answers only to names of it, so that another site cannot have
a browser read them under its own name; one that other machines reach answers only under an address with a token in it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import ipaddress
import itertools
import random
import re
import secrets
import sqlite3
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from aiohttp import web
from aiohttp.typedefs import Handler
from scipy.stats import binomtest

from retrieval.decoding import decode, read_file
from training.images import list_images

QUESTIONS = {"text": "Which image fits the text better?", "concept": "Which image shows this concept better?"}
COLUMNS = ("method", "concept", "prompt", "seed", "image")
REAL_IMAGES = 6
"""Real images shown of a concept, at most."""

SCHEMA = """
CREATE TABLE study (digest TEXT NOT NULL);
CREATE TABLE raters (rater TEXT PRIMARY KEY, secret INTEGER NOT NULL, started TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE TABLE answers (
    rater TEXT NOT NULL REFERENCES raters,
    concept TEXT NOT NULL, prompt TEXT NOT NULL, seed INTEGER NOT NULL,
    method_a TEXT NOT NULL, method_b TEXT NOT NULL CHECK (method_a < method_b),
    question TEXT NOT NULL CHECK (question IN ('text', 'concept')),
    chosen TEXT NOT NULL CHECK (chosen IN (method_a, method_b)),
    answered TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (rater, concept, prompt, seed, method_a, method_b, question)
);
"""


# --- what is compared ----------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Comparison:
    """Images that two methods, in the order of their names, drew of one prompt from one seed."""

    concept: str
    prompt: str
    seed: int
    method_a: str
    method_b: str


@dataclass(frozen=True)
class Study:
    comparisons: tuple[Comparison, ...]
    images: dict[tuple[str, str, int, str], Path]
    """(concept, prompt, seed, method) -> file."""
    real: dict[str, list[Path]]
    """Concept -> its real images."""
    digest: str
    """Hash of the table and of all image files: answers belong to exactly these images."""


def load_study(folder: Path) -> Study:
    """Read and check a study's folder.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    table_file = next((f for f in (folder / "images.parquet", folder / "images.csv") if f.is_file()), None)
    if table_file is None:
        raise ValueError(f"{folder}: needs images.parquet or images.csv with the columns {', '.join(COLUMNS)}")
    try:
        table = pd.read_parquet(table_file) if table_file.suffix == ".parquet" else pd.read_csv(table_file)
        table = table[list(COLUMNS)]
        for column in COLUMNS:
            if table[column].map(pd.api.types.is_list_like).any():
                raise ValueError(f"{column}: expected one value a row, found a list")
        seeds = pd.to_numeric(table["seed"].dropna())
        if not (seeds == seeds.astype("int64")).all():
            raise ValueError("seed: expected whole numbers")
        table = table.astype({c: "int64" if c == "seed" else "string" for c in COLUMNS})
    except KeyError as error:
        raise ValueError(f"{table_file}: needs the columns {', '.join(COLUMNS)}; {error.args[0]}") from None
    # what pandas and pyarrow raise for other kinds of files
    except (ValueError, TypeError, OSError, OverflowError) as error:
        raise ValueError(f"{table_file}: cannot be read: {error}") from None
    if table.isna().any(axis=None):
        raise ValueError(f"{table_file}: row {table.isna().any(axis=1).to_numpy().argmax()} has an empty field")
    for concept in sorted(set(table["concept"])):
        if (folder / "concepts" / concept).resolve().parent != (folder / "concepts").resolve():
            raise ValueError(f"{table_file}: concept {concept!r} is not the name of a folder in {folder / 'concepts'}")
    images: dict[tuple[str, str, int, str], Path] = {}
    digest = hashlib.sha256()
    for method, concept, prompt, seed, image in table.itertuples(index=False):
        key = (concept, prompt, int(seed), method)
        if key in images:
            raise ValueError(f"{table_file}: two images of method {method!r} for {concept!r}, {prompt!r}, seed {seed}")
        images[key] = _image_file(folder, folder / image)
    if len({method for *_, method in images}) < 2:
        raise ValueError(f"{table_file}: a comparison needs images of two methods or more")
    methods: defaultdict[tuple[str, str, int], list[str]] = defaultdict(list)
    for key, file in sorted(images.items()):
        methods[key[:3]].append(key[3])
        digest.update(f"{key} {hashlib.sha256(read_file(file)).hexdigest()}\n".encode())
    comparisons = [
        Comparison(*same, *pair) for same, names in methods.items() for pair in itertools.combinations(names, 2)
    ]
    if not comparisons:
        raise ValueError(f"{table_file}: no two methods have an image of the same concept, prompt and seed")
    real = {}
    for concept in sorted({c.concept for c in comparisons}):
        place = folder / "concepts" / concept
        real[concept] = [_image_file(folder, file) for file in list_images([str(place)])[:REAL_IMAGES]]
    return Study(tuple(comparisons), images, real, digest.hexdigest())


def _image_file(folder: Path, file: Path) -> Path:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{file}: is outside of {folder}")
    try:
        decode(read_file(file))
    except OSError as error:
        raise ValueError(f"{file}: not an image: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{file}: not an image that can be shown: {error}") from None
    return file


# --- who sees what, and what they answer ---------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A comparison as one rater sees it; the id says nothing about it and is no other rater's."""

    id: str
    comparison: Comparison
    left: str
    right: str


def views_of(study: Study, secret: int, pairs: int) -> list[View]:
    """A rater's comparisons in their own random order and sides, the same at every call; each pair of methods gets
    the same share of them.

    Args:
        secret: the rater's random number, which stays on the server.
        pairs: how many comparisons at most.
    """
    rng = random.Random(secret)
    shuffled = rng.sample(study.comparisons, len(study.comparisons))
    turns: defaultdict[tuple[str, str], itertools.count[int]] = defaultdict(itertools.count)
    turn = {c: next(turns[c.method_a, c.method_b]) for c in shuffled}
    views = []
    for c in sorted(shuffled, key=turn.__getitem__)[
        :pairs
    ]:  # a stable sort: every pair's first, every pair's second, …
        left, right = rng.sample((c.method_a, c.method_b), 2)
        views.append(View(f"{rng.getrandbits(64):016x}", c, left, right))
    return views


def open_answers(file: Path, study: Study) -> sqlite3.Connection:
    """The answers' database, made when it is not there. Every statement is committed at once.

    Raises:
        ValueError: the file is something else, or holds answers about other images.
    """
    answers = None
    try:
        answers = sqlite3.connect(file, isolation_level=None)
        answers.execute("PRAGMA foreign_keys = ON")
        if not answers.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            answers.executescript(f"BEGIN; {SCHEMA} INSERT INTO study VALUES ('{study.digest}'); COMMIT;")
        digest = answers.execute("SELECT digest FROM study").fetchone()
        if digest == (study.digest,):  # files of before have none
            answers.execute("CREATE TABLE IF NOT EXISTS server (key TEXT NOT NULL)")
            answers.execute(
                "INSERT INTO server SELECT ? WHERE NOT EXISTS (SELECT 1 FROM server)", (secrets.token_hex(32),)
            )
    except sqlite3.DatabaseError as error:
        if answers:
            answers.close()
        raise ValueError(f"{file}: not a database of answers: {error}") from None
    if digest != (study.digest,):
        answers.close()
        raise ValueError(f"{file}: holds answers about other images; move it away, or give another file by --answers")
    return answers


def shares(file: Path) -> pd.DataFrame:
    """How often each method was preferred: a row per question and pair of methods.

    Returns:
        Columns `question`, `method_a`, `method_b`, `share` (of the answers that chose method_a), `low` and `high` (its
        Wilson 95 % interval, which takes answers as independent), `answers` and `raters` (their numbers).

    Raises:
        ValueError: no such file, or something else.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file; `polyconcept preference serve` makes it")
    answers = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)
    try:
        counts = answers.execute(
            "SELECT question, method_a, method_b, sum(chosen = method_a), count(*), count(DISTINCT rater) FROM answers"
            " GROUP BY question, method_a, method_b ORDER BY question DESC, method_a, method_b"
        ).fetchall()
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{file}: not a database of answers: {error}") from None
    finally:
        answers.close()
    rows = []
    for *what, chosen, total, raters in counts:
        interval = binomtest(chosen, total).proportion_ci(0.95, method="wilson")
        rows.append((*what, chosen / total, interval.low, interval.high, total, raters))
    return pd.DataFrame(rows, columns=["question", "method_a", "method_b", "share", "low", "high", "answers", "raters"])


# --- the page ------------------------------------------------------------------------------------------


@dataclass
class Pages:
    """The handlers of the page's addresses. A rater is known by a random cookie; all else is in the database.

    open_to_others: whether other machines reach them.
    """

    study: Study
    answers: sqlite3.Connection
    pairs: int
    open_to_others: bool = False

    def __post_init__(self) -> None:
        (self.key,) = self.answers.execute("SELECT key FROM server").fetchone()
        # the same at every start: links that raters have go on
        self.root = f"/{self._derived('address').hex()[:32]}" if self.open_to_others else ""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
        )
        self.template = environment.get_template("preference.html.jinja")

    def application(self) -> web.Application:
        app = web.Application(middlewares=() if self.open_to_others else (_names_of_this_machine,))
        app.add_routes(
            [
                web.get(f"{self.root}/", self.question),
                web.post(f"{self.root}/answer", self.answer),
                web.post(f"{self.root}/rater", self.another_rater),
                web.get(self.root + "/image/{view}/{side:left|right}", self.image),
                web.get(self.root + "/real/{view}/{number:[0-9]}", self.real),
            ]
        )
        return app

    async def question(self, request: web.Request) -> web.Response:
        """The rater's first open question, or the one asked for by `?number=`."""
        rater, views = self._rater(request)
        if rater is None:
            rater = secrets.token_urlsafe(16)
            views = self._views_of(rater)
        chosen = self._chosen(rater)
        asked = [(view, question) for view in views for question in QUESTIONS]
        open_ = [n for n, (v, q) in enumerate(asked) if (v.comparison, q) not in chosen]
        number = request.query.get("number", "0")
        if not re.fullmatch("[0-9]{1,9}", number):
            raise web.HTTPBadRequest(text="number: a question's number is wanted, from 1 on")
        at = int(number) - 1
        if not 0 <= at < len(asked):
            at = open_[0] if open_ else len(asked)
        view, question = asked[at] if at < len(asked) else (None, "")
        nonce = secrets.token_urlsafe(16)
        side = ""
        if view and (view.comparison, question) in chosen:
            side = "left" if chosen[view.comparison, question] == view.left else "right"
        page = self.template.render(
            view=view,
            question=question,
            words=QUESTIONS.get(question, ""),
            reals=len(self.study.real[view.comparison.concept]) if view else 0,
            number=at + 1,
            total=len(asked),
            answered=len(asked) - len(open_),
            side=side,
            nonce=nonce,
            root=self.root,
        )
        response = web.Response(text=page, content_type="text/html", headers={"Cache-Control": "no-store"})
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; img-src 'self' data:; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
            "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
        )
        self._set_cookie(response, rater)
        return response

    async def answer(self, request: web.Request) -> web.Response:
        """Keep one answer, or what the rater now answers instead."""
        form = await _form(request)
        rater, view = self._view(request, str(form.get("view", "")))
        question, side = form.get("question"), form.get("side")
        if question not in QUESTIONS or side not in ("left", "right"):
            raise web.HTTPBadRequest(text="an answer has a question and a side")
        c = view.comparison
        self.answers.execute("INSERT OR IGNORE INTO raters (rater, secret) VALUES (?, ?)", (rater, self._secret(rater)))
        self.answers.execute(
            "INSERT INTO answers (rater, concept, prompt, seed, method_a, method_b, question, chosen)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET chosen = excluded.chosen,"
            " answered = CURRENT_TIMESTAMP",
            (rater, c.concept, c.prompt, c.seed, c.method_a, c.method_b, question, getattr(view, str(side))),
        )
        raise web.HTTPSeeOther(f"{self.root}/")

    async def another_rater(self, request: web.Request) -> web.Response:
        response = web.HTTPSeeOther(f"{self.root}/")
        self._set_cookie(response, secrets.token_urlsafe(16))
        raise response

    async def image(self, request: web.Request) -> web.Response:
        _, view = self._view(request, request.match_info["view"])
        c = view.comparison
        return await _picture(self.study.images[c.concept, c.prompt, c.seed, getattr(view, request.match_info["side"])])

    async def real(self, request: web.Request) -> web.Response:
        _, view = self._view(request, request.match_info["view"])
        files = self.study.real[view.comparison.concept]
        number = int(request.match_info["number"])
        if number >= len(files):
            raise web.HTTPNotFound
        return await _picture(files[number])

    def _rater(self, request: web.Request) -> tuple[str | None, list[View]]:
        rater = request.cookies.get("rater", "")
        return (rater, self._views_of(rater)) if re.fullmatch("[A-Za-z0-9_-]{22}", rater) else (None, [])

    def _views_of(self, rater: str) -> list[View]:
        row = self.answers.execute("SELECT secret FROM raters WHERE rater = ?", (rater,)).fetchone()
        return views_of(self.study, row[0] if row else self._secret(rater), self.pairs)

    def _secret(self, rater: str) -> int:
        """Of a rater without an answer yet, of whom nothing is stored: a page that is only looked at, as by a crawler,
        leaves nothing behind."""
        return int.from_bytes(self._derived(f"rater {rater}")[:8]) >> 1

    def _derived(self, what: str) -> bytes:
        return hmac.digest(self.key.encode(), what.encode(), "sha256")

    def _set_cookie(self, response: web.StreamResponse, rater: str) -> None:
        # Lax: a link to the page from a mail shall find the cookie; forms of other sites shall not
        response.set_cookie("rater", rater, max_age=365 * 86400, path=f"{self.root}/", httponly=True, samesite="Lax")

    def _view(self, request: web.Request, view_id: str) -> tuple[str, View]:
        """A page that an earlier rater left open in this browser has views that the present one does not have."""
        rater, views = self._rater(request)
        found = next((view for view in views if view.id == view_id), None)
        if rater is None or found is None:
            raise web.HTTPConflict(text="This page is another rater's, or cookies are off. Nothing was stored; reload.")
        return rater, found

    def _chosen(self, rater: str) -> dict[tuple[Comparison, str], str]:
        rows = self.answers.execute(
            "SELECT concept, prompt, seed, method_a, method_b, question, chosen FROM answers WHERE rater = ?", (rater,)
        )
        return {(Comparison(*row[:5]), row[5]): row[6] for row in rows}


async def _form(request: web.Request) -> Mapping[str, Any]:
    """Fields of the page's form. Raises: HTTPBadRequest for what it does not send."""
    if request.content_type != "application/x-www-form-urlencoded":
        raise web.HTTPBadRequest(text="a form is wanted as browsers send it: application/x-www-form-urlencoded")
    try:
        return await request.post()
    except (ValueError, LookupError) as error:  # no such encoding, or not in it
        raise web.HTTPBadRequest(text=f"the form cannot be read: {error}") from None


@web.middleware
async def _names_of_this_machine(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses what asks for another host: its name may be a stranger's that now leads here (DNS rebinding)."""
    asked = request.headers.get("Host", "")
    if not _is_loopback(asked if asked.endswith("]") else asked.rpartition(":")[0] or asked):
        raise web.HTTPMisdirectedRequest(
            text="This page is there for this machine only, as http://localhost or http://127.0.0.1 with its port. "
            "Other machines are let in by `--host 0.0.0.0`."
        )
    return await handler(request)


def _is_loopback(name: str) -> bool:
    """name: `localhost`, or an address, in brackets or not."""
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


async def _picture(file: Path) -> web.Response:
    """The pixels alone, as PNG: a file's format, metadata, date or size may tell the method."""

    def pixels() -> bytes:
        data = io.BytesIO()
        decode(read_file(file)).image.save(data, "png")
        return data.getvalue()

    body = await asyncio.to_thread(pixels)
    return web.Response(body=body, content_type="image/png", headers={"Cache-Control": "private, max-age=86400"})


def serve(folder: Path, answers: Path, *, host: str, port: int, pairs: int) -> None:
    """Serve a study's page until interrupted. Beyond loopback its address has a token in it, which is printed.

    Raises:
        ValueError: the folder or the answers' file is not as it has to be.
        OSError: the port is taken.
    """
    study = load_study(folder)
    connection = open_answers(answers, study)

    def announce(text: str) -> None:
        text = text.replace("======== ", "").replace(" ========", "")
        print(re.sub(r"http://[^\s,]+", rf"\g<0>{pages.root}/", text), flush=True)

    try:
        pages = Pages(study, connection, pairs, open_to_others=not _is_loopback(host))
        web.run_app(pages.application(), host=host, port=port, access_log=None, print=announce)
    finally:
        connection.close()
