"""The preference study: real raters' browsers (Debian's `chromium`, headless) before the real server."""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, PngImagePlugin

from pipeline.evaluation.preference import load_study, open_answers, shares, views_of
from ray_jobs import cli

CHROMIUM = shutil.which("chromium")
browser_needed = pytest.mark.skipif(CHROMIUM is None, reason="there is no `chromium` on the PATH")

COLOURS = {"custom-diffusion": (200, 30, 30), "dreambooth": (30, 160, 60), "inversion": (40, 60, 200)}
PROMPTS = ("photo of a cat", "a cat <b>on</b> the beach")
HOSTILE = "<script>alert('x')</script>"


def make_study(folder: Path, methods: tuple[str, ...] = ("custom-diffusion", "dreambooth")) -> Path:
    """Each method draws in a colour of its own, so that a test can see what a blind rater cannot know."""
    rows = []
    for concept in ("tabby", "pot"):
        (folder / "concepts" / concept).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (96, 64), (90 * i, 90, 0)).save(folder / "concepts" / concept / f"{i}.jpg")
        for method in methods:
            (folder / method / concept).mkdir(parents=True)
            for i, prompt in enumerate((*PROMPTS, HOSTILE)):
                image = f"{method}/{concept}/{i}.png"
                note = PngImagePlugin.PngInfo()
                note.add_text("method", method)
                Image.new("RGB", (64, 64), COLOURS[method]).save(folder / image, pnginfo=note)
                rows.append({"method": method, "concept": concept, "prompt": prompt, "seed": i, "image": image})
    pd.DataFrame(rows).to_parquet(folder / "images.parquet")
    return folder


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[str]:
    """The command itself, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray_jobs.cli", "preference", "serve", str(folder), "--port", str(port), *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        printed = server.stdout.readline()
        assert "Running on http://" in printed, printed
        yield address + printed.split()[2].partition(f":{port}")[2].rstrip("/")
    finally:
        server.send_signal(signal.SIGINT)
        output = server.communicate(timeout=20)[0]
        assert "Traceback" not in output, output


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def answered_so_far(page, count: int) -> None:
    """Waits for the page that says so, and for its images: before, keys answer nothing."""
    from playwright.sync_api import expect

    expect(page.locator("#progress")).to_have_text(re.compile(rf"^{count} of \d+ answered$"))
    page.wait_for_load_state("load")


def colour(page, side: str) -> str:
    """The method whose image stands on a side, which a test knows by its colour."""
    source = page.locator(f"button[value={side}] img").evaluate("image => image.src")
    image = Image.open(io.BytesIO(page.request.get(source).body()))
    seen = np.array(image.getpixel((9, 9)))
    return min(COLOURS, key=lambda method: np.abs(seen - COLOURS[method]).sum())


def rows(folder: Path, what: str = "*") -> list[tuple]:
    with contextlib.closing(sqlite3.connect(folder / "answers.sqlite")) as answers:
        return answers.execute(f"SELECT {what} FROM answers ORDER BY answered, rowid").fetchall()


@browser_needed
def test_a_rater_answers_by_keyboard_and_goes_on_after_a_reload_and_a_restart(tmp_path, browser):
    folder, context = make_study(tmp_path), browser.new_context()
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    wanted = []
    with served(folder) as address:
        page.goto(address)
        assert page.inner_text("#progress") == "0 of 12 answered"
        assert page.inner_text("h1") == "Which image fits the text better?"
        assert page.locator(".real img").count() == 0
        text = page.inner_text(".text")
        wanted.append(("text", text, colour(page, "left")))
        page.keyboard.press("ArrowLeft")
        answered_so_far(page, 1)
        assert rows(folder, "question, prompt, chosen") == wanted
        # the same pair, now beside the real images and without the text
        assert page.inner_text("h1") == "Which image shows this concept better?"
        assert page.locator(".real img").count() == 3 and page.locator(".text").count() == 0
        before = (colour(page, "left"), page.locator("button[value=left] img").get_attribute("src"))
        page.reload()
        assert before == (colour(page, "left"), page.locator("button[value=left] img").get_attribute("src"))
        # a key that is held down answers once
        wanted.append(("concept", text, colour(page, "right")))
        page.keyboard.down("ArrowRight")
        answered_so_far(page, 2)
        for _ in range(3):
            page.keyboard.down("ArrowRight")
        page.keyboard.up("ArrowRight")
        assert page.inner_text("#progress") == "2 of 12 answered"
        assert rows(folder, "question, prompt, chosen") == wanted
    with served(folder) as address:
        page.goto(address)
        assert page.inner_text("#progress") == "2 of 12 answered"
        # back, and another answer instead: not one more
        page.keyboard.press("ArrowUp")
        page.wait_for_url("**number=2")
        assert colour(page, "right") == wanted[1][2]
        assert page.locator("button[value=right]").get_attribute("aria-pressed") == "true"
        other = colour(page, "left")
        page.keyboard.press("ArrowLeft")
        page.wait_for_url(f"{address}/")
        assert rows(folder, "question, prompt, chosen") == [wanted[0], ("concept", text, other)]
        for answered in range(3, 13):
            page.keyboard.press("2" if answered % 2 else "1")
            answered_so_far(page, answered)
        assert "all 12 answers are stored" in page.inner_text("h1")
    assert len(rows(folder)) == 12 and not problems
    context.close()


@browser_needed
def test_two_raters_at_once_are_kept_apart_also_in_one_browser(tmp_path, browser):
    folder = make_study(tmp_path)
    contexts = [browser.new_context() for _ in range(2)]
    pages = [context.new_page() for context in contexts]
    with served(folder, "--pairs", "3") as address:
        for page in pages:
            page.goto(address)
        sources = [page.locator("button[value=left] img").get_attribute("src") for page in pages]
        assert sources[0] != sources[1]
        for answered in range(1, 7):
            for page, method in zip(pages, COLOURS, strict=False):  # each always prefers one method
                side = "left" if colour(page, "left") == method else "right"
                page.click(f"button[value={side}]")
                answered_so_far(page, answered)
        by_rater: dict[str, set[str]] = {}
        for rater, chosen in rows(folder, "rater, chosen"):
            by_rater.setdefault(rater, set()).add(chosen)
        assert sorted(map(tuple, by_rater.values())) == [("custom-diffusion",), ("dreambooth",)]
        # one rater's image is not another's to see
        assert pages[1].request.get(address + sources[0]).status == 409
        # a third person takes over the first one's browser, where an old page is still open
        old = contexts[0].new_page()
        old.goto(f"{address}/?number=3")
        pages[0].click("footer button")
        answered_so_far(pages[0], 0)
        before = rows(folder)
        old.keyboard.press("ArrowLeft")
        old.wait_for_url("**/answer")
        assert "another rater's" in old.inner_text("body") and rows(folder) == before
        pages[0].click("button[value=left]")
        answered_so_far(pages[0], 1)
    assert len({rater for (rater,) in rows(folder, "rater")}) == 3
    for context in contexts:
        context.close()


@browser_needed
def test_on_a_phone_all_is_in_sight_and_prompts_are_text(tmp_path, browser):
    folder = make_study(tmp_path)
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page = context.new_page()
    seen = set()
    with served(folder) as address:
        page.goto(address)
        for answered in range(1, 13):  # every prompt of both concepts
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            for side in ("left", "right"):
                box = page.locator(f"button[value={side}]").bounding_box()
                assert box["width"] > 140 and box["y"] + box["height"] <= 640
            if page.locator(".text").count():
                seen.add(page.inner_text(".text"))
            assert page.locator(".real img").count() in (0, 3)
            page.tap("button[value=left]")
            answered_so_far(page, answered)
    assert seen == {*PROMPTS, HOSTILE}
    context.close()


def test_nothing_tells_the_methods_apart(tmp_path):
    folder = make_study(tmp_path)
    cookies = urllib.request.HTTPCookieProcessor()
    opener = urllib.request.build_opener(cookies)
    with served(folder) as address:
        with opener.open(address) as response:
            page, headers = response.read().decode(), str(response.headers)
        (cookie,) = cookies.cookiejar
        assert cookie.has_nonstandard_attr("HttpOnly") and len(cookie.value) >= 22
        answers = []
        for source in re.findall(r'src="([^"]*)"', page):
            with opener.open(address + source) as response:
                answers.append((response.read(), sorted(response.headers.keys())))
        for said in (page, headers):
            assert not any(word in said for word in (*COLOURS, "tabby", "pot", ".png", str(folder)))
        assert len(answers) == 2 and answers[0][1] == answers[1][1]
        assert not {"Last-Modified", "ETag"} & set(answers[0][1])
        for body, _ in answers:
            assert b"method" not in body and Image.open(io.BytesIO(body)).info == {}
        view = re.search(r'name="view" value="(\w+)"', page)[1]
        for place in (
            "/images.parquet",
            "/answers.sqlite",
            f"/image/{view}/..%2f..%2fimages.parquet",
            f"/image/{view}/custom-diffusion",
            f"/real/{view}/9",
            f"/real/{view}/-1",
            "/image/..%2f/left",
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                opener.open(address + place)
            assert refused.value.code in (404, 409), place
        for form in (b"view=x&question=text&side=left", f"view={view}&question=age&side=left".encode(), b""):
            with pytest.raises(urllib.error.HTTPError) as refused:
                opener.open(f"{address}/answer", form)
            assert refused.value.code in (400, 409)
    assert rows(folder) == []


def ask(address: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Status and text; redirections are not followed."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=20)
    sent = {name.replace("_", "-"): value.encode() for name, value in headers.items()}
    with contextlib.closing(connection):
        connection.request("GET" if body is None else "POST", path, body, sent)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")


FORM = "application/x-www-form-urlencoded"


def test_odd_requests_are_refused_and_leave_nothing(tmp_path):
    folder = make_study(tmp_path)
    known = f"rater={'x' * 22}"
    with served(folder) as address:
        port = address.rpartition(":")[2]
        for host in (f"localhost:{port}", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "localhost"):
            assert ask(address, "/", Host=host)[0] == 200, host
        for host in (f"rebound.example:{port}", "rebound.example", "localhost.example", "10.0.0.7", "[::1", "", "é"):
            status, text = ask(address, "/", Host=host)
            assert status in (400, 421) and "<img" not in text, host
        for number in ("1" * 5000, "-1", "1.5", "%D9%A1", "%C2%B2", "x", "", "%ff", "1%00"):
            assert ask(address, f"/?number={number}")[0] == 400, number
        assert ask(address, "/?number=999999999")[0] == 200  # as when there were more
        for rater in ("é", "%ff", "x" * 5000, "a b; =;;", r'"\303"', "'" * 22):
            assert ask(address, "/", Cookie=f"rater={rater}")[0] == 200, rater
            assert ask(address, "/image/x/left", Cookie=f"rater={rater}")[0] == 409, rater
        for body, kind in (
            (b"\xff=\xfe&view=%ff", f"{FORM}; charset=utf-8"),
            (b"view=x", f"{FORM}; charset=klingon"),
            (b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
            (b"no boundary", "multipart/form-data"),
            (b"{}", "application/json"),
            (b"&".join([b"a=b"] * 5000), FORM),
        ):
            assert ask(address, "/answer", body, Cookie=known, Content_Type=kind)[0] in (400, 409, 413), kind
        for path in ("/image/%ff/left", "/image/%00/left", "/real/x/%D9%A1", "/real/x/12", f"/image/{'x' * 2000}/left"):
            assert ask(address, path, Cookie=known)[0] in (404, 409), path
        assert ask(address, "/rater", b"", Content_Type=FORM)[0] == 303
    with contextlib.closing(sqlite3.connect(folder / "answers.sqlite")) as answers:
        assert answers.execute("SELECT count(*) FROM raters").fetchone() == (0,)
    assert rows(folder) == []


def test_other_machines_need_the_token(tmp_path):
    """The same one after a restart; with it an answer can be given, by whatever name the machine is asked for."""
    folder = make_study(tmp_path)
    roots = []
    for _ in range(2):
        with served(folder, "--host", "0.0.0.0") as address:
            root = urllib.parse.urlsplit(address).path
            roots.append(root)
            for path in ("/", "/answer", "/image/x/left", f"{root[:-1]}/", f"{root}x/", "/..%2f"):
                assert ask(address, path)[0] == 404, path
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            page = opener.open(f"{address}/").read().decode()
            sources = re.findall(r'src="([^"]*)"', page)
            assert len(sources) == 2 and all(source.startswith(f"{root}/image/") for source in sources)
            assert ask(address, f"{root}/", Host="study.example")[0] == 200
            view = re.search(r'name="view" value="(\w+)"', page)[1]
            answered = opener.open(f"{address}/answer", f"view={view}&question=text&side=left".encode())
            assert answered.url == f"{address}/" and "1 of 12 answered" in answered.read().decode()
    assert roots[0] == roots[1] and len(roots[0]) == 33
    assert len(rows(folder)) == 2


def test_sides_and_order_are_random_and_pairs_of_methods_have_equal_shares(tmp_path):
    study = load_study(make_study(tmp_path, tuple(COLOURS)))
    assert len(study.comparisons) == 2 * 3 * 3
    assert views_of(study, 7, 9) == views_of(study, 7, 9)
    views = [view for secret in range(400) for view in views_of(study, secret, 9)]
    assert len({view.id for view in views}) == len(views) == 3600
    pairs = Counter((v.comparison.method_a, v.comparison.method_b) for v in views)
    assert set(pairs.values()) == {1200}
    left = sum(v.left == v.comparison.method_a for v in views)
    assert abs(left - 1800) < 4 * 30  # four standard deviations of a fair coin
    firsts = Counter(views_of(study, secret, 1)[0].comparison for secret in range(1800))
    assert len(firsts) == 18 and max(firsts.values()) < 100 + 5 * 10


def test_report(tmp_path, capsys):
    folder = make_study(tmp_path)
    study = load_study(folder)
    file = folder / "answers.sqlite"
    with contextlib.closing(open_answers(file, study)) as answers:
        assert shares(file).empty
        for rater, first in (("r", 6), ("s", 2)):
            answers.execute("INSERT INTO raters (rater, secret) VALUES (?, 1)", (rater,))
            for i, c in enumerate(study.comparisons):
                chosen = c.method_a if i < first else c.method_b
                answers.execute(
                    "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, 'text', ?, '')",
                    (rater, c.concept, c.prompt, c.seed, c.method_a, c.method_b, chosen),
                )
        with pytest.raises(sqlite3.IntegrityError):  # one answer a rater, pair and question
            answers.execute("INSERT INTO answers SELECT * FROM answers LIMIT 1")
    (row,) = shares(file).itertuples(index=False)
    assert (row.question, row.method_a, row.method_b, row.answers, row.raters) == (
        "text",
        "custom-diffusion",
        "dreambooth",
        12,
        2,
    )
    # Wilson 1927: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    n, p, z = 12, 8 / 12, 1.959964
    middle, spread = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = np.array([middle - spread, middle + spread]) / (1 + z**2 / n)
    np.testing.assert_allclose([row.share, row.low, row.high], [p, *expected], rtol=1e-6)
    with pytest.raises(SystemExit) as end:
        cli.main(["preference", "report", str(folder)])
    assert not end.value.code and re.search(
        r"custom-diffusion +dreambooth +66.7% +39.1% – 86.2%", capsys.readouterr().out
    )


def _change(**changes):
    def spoil(folder: Path) -> None:
        table = pd.read_parquet(folder / "images.parquet")
        for column, value in changes.items():
            table.loc[0, column] = value
        table.to_parquet(folder / "images.parquet")

    return spoil


def _outside(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder.parent / "secret.png")
    _change(image="../secret.png")(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "images.parquet").unlink(), "needs images.parquet or images.csv with the columns method"),
        (lambda f: (f / "images.parquet").write_text("x"), r"images.parquet: cannot be read"),
        (lambda f: pd.DataFrame({"method": ["a"]}).to_parquet(f / "images.parquet"), r"needs the columns .*'image'"),
        (_outside, r"secret.png: is outside of"),
        (_change(image="nothing.png"), r"nothing.png: not an image"),
        (_change(prompt=None), "row 0 has an empty field"),
        (_change(seed=1, prompt=PROMPTS[1]), "two images of method 'custom-diffusion'"),
        (lambda f: (f / "custom-diffusion/tabby/0.png").write_bytes(b"\x89PNG\r\n\x1a\n0000"), "0.png: not an image"),
        (
            lambda f: Image.new("RGB", (9, 9)).save(f / "custom-diffusion/tabby/0.png", "EPS"),
            "0.png: .* not one of PNG",
        ),
        (lambda f: shutil.rmtree(f / "concepts/pot"), "no images at .*concepts/pot'"),
        (lambda f: _change(**dict(method="other"))(f) or _only(f, 1), "images of two methods or more"),
        (lambda f: (f / "answers.sqlite").write_text("no database, but a text"), "not a database of answers"),
    ],
)
def test_mistakes_are_said_before_anything_is_served(tmp_path, capsys, spoil, message):
    folder = make_study(tmp_path / "study")
    spoil(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as end:
        cli.main(["preference", "serve", str(folder), "--port", "0"])
    assert end.value.code == 2 and re.search(message, capsys.readouterr().err)
    assert sorted(folder.rglob("*")) == before


def _only(folder: Path, count: int) -> None:
    pd.read_parquet(folder / "images.parquet")[:count].to_parquet(folder / "images.parquet")


def test_places_that_cannot_be_used(tmp_path):
    folder = make_study(tmp_path / "study")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for options, message in (
            (["--port", str(taken.getsockname()[1])], "address already in use"),
            (["--answers", str(tmp_path / "nowhere" / "answers.sqlite")], "unable to open database file"),
        ):
            command = [sys.executable, "-m", "ray_jobs.cli", "preference", "serve", str(folder), *options]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert ended.returncode == 2 and message in ended.stderr and "Traceback" not in ended.stderr


def test_answers_belong_to_their_images(tmp_path):
    folder = make_study(tmp_path)
    open_answers(folder / "answers.sqlite", load_study(folder)).close()
    open_answers(folder / "answers.sqlite", load_study(folder)).close()
    Image.new("RGB", (64, 64), "white").save(folder / "dreambooth/pot/0.png")
    with pytest.raises(ValueError, match="holds answers about other images"):
        open_answers(folder / "answers.sqlite", load_study(folder))
    with pytest.raises(ValueError, match="no such file"):
        shares(folder / "nothing.sqlite")
    with pytest.raises(ValueError, match="not a database of answers"):
        shares(folder / "images.parquet")


def test_a_table_may_be_csv(tmp_path):
    folder = make_study(tmp_path)
    parquet = load_study(folder)
    pd.read_parquet(folder / "images.parquet").to_csv(folder / "images.csv", index=False)
    (folder / "images.parquet").unlink()
    assert load_study(folder).comparisons == parquet.comparisons
