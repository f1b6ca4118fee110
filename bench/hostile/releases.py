"""Releases: what is published and where, manifests, `latest.json`, leases, signatures, and what goes into a card."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.case import Case, Check, Seen, accepted, polyconcept, words, write

FOLDER = {"prepared/README.md": "one", "prepared/comfyui/new1.safetensors": b"weights" * 100}


def publish(
    name: str,
    destination: str,
    spoil: Callable[[], Any] = lambda: None,
    *more: str,
    folder: str = "prepared",
    refused: str | tuple[str, ...] = (),
    right: Check | None = None,
    writes: tuple[str, ...] | None = None,
    never: tuple[str, ...] = (),
) -> Case:
    def give():
        write(**FOLDER)
        spoil()
        return lambda: polyconcept("publish", folder, destination, *more)

    return Case(
        f"publish: {name}", give, words(refused), right, never, writes=("rel",) if right and writes is None else writes
    )


def there(count: int = 1, place: str = "rel") -> Check:
    """Whether so many versions are there, whole."""

    def check(_: Seen) -> bool:
        from pipeline.release.publish import verify
        from pipeline.release.versions import listed

        found = listed(place)
        return len(found) == count and all(v.manifest and not verify(f"{place}/{v.name}") for v in found)

    return check


def moto() -> None:
    """A bucket on loopback."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}
    boto3.client("s3").create_bucket(Bucket="bucket")


def in_bucket(place: str) -> Callable[[], Any]:
    def give():
        write(**FOLDER)
        moto()

        def twice() -> Any:
            polyconcept("publish", "prepared", place)
            polyconcept("publish", "prepared", place)
            from pipeline.release.versions import listed

            return [v.name for v in listed(place)]

        return twice

    return give


BUCKETS = [
    Case(
        f"publish twice to {place!r}", in_bucket(place), ("s3://|bucket",), lambda s: s.result == ["v0001"], seconds=30
    )
    for place in (
        "s3://bucket/x",
        "s3://bucket//x",
        "s3://bucket/x//y/",
        "s3://bucket/x[1]",
        "s3://bucket/./x",
        "s3://bucket/a b/ä",
        "s3://bucket",
        "s3://bucket/x?",
    )
] + [
    Case(
        "publish to a bucket that is not there",
        lambda: (in_bucket("")(), lambda: polyconcept("publish", "prepared", "s3://gone/x"))[1],
        ("gone",),
        seconds=30,
    ),
]


def _twice_at_once() -> Callable[[], None]:
    """Six processes publish the same at once."""
    write(**FOLDER)

    def publish_all() -> None:
        ready = time.time() + 0.3
        children = []
        for _ in range(6):
            child = os.fork()
            if child == 0:
                try:
                    time.sleep(max(0.0, ready - time.time()))
                    polyconcept("publish", "prepared", "rel")
                    os._exit(0)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        if any([os.waitpid(child, 0)[1] for child in children]):
            raise RuntimeError("one of them failed")

    return publish_all


def _content(name: str, content: str | bytes = "x") -> Callable[[], None]:
    return lambda: write(**{f"prepared/{name}": content})


PUBLISHED = [
    publish("an ordinary folder", "rel", right=there()),
    publish("the empty place", "", refused="destination|place|empty"),
    publish("a blank place", " ", refused="destination|place|' '|empty"),
    publish("the current folder", ".", refused=".", right=accepted, writes=("v0001", "latest.json", ".lease")),
    publish("s3://", "s3://", refused="s3://"),
    publish("s3:///x", "s3:///x", refused="s3:///x"),
    publish("s3:", "s3:", refused="s3:"),
    publish("s3:/bucket/x", "s3:/bucket/x", refused="s3:/bucket/x"),
    publish("hf://", "hf://", refused="hf://|prepared"),
    publish("hf://name", "hf://name", refused="hf://|prepared"),
    publish("hf://a/b/c", "hf://a/b/c", refused="hf://|prepared"),
    publish("hf:// of a folder that is no release", "hf://owner/name", refused="prepared"),
    publish("http", "http://127.0.0.1:9/x", refused="127.0.0.1:9"),
    publish("http with a password", "http://me:SECRET@127.0.0.1:9/x", refused="127.0.0.1:9", never=("SECRET",)),
    publish("keys in the address", "s3://KEY:SECRET@bucket/x", refused="bucket", never=("SECRET",)),
    publish("an unknown kind", "nothing://x", refused="nothing"),
    publish("a file", "prepared/README.md", refused="prepared/README.md"),
    publish("inside a file", "prepared/README.md/x", refused="prepared/README.md"),
    publish("a FIFO", "fifo", lambda: os.mkfifo("fifo"), refused="fifo"),
    publish("/proc", "/proc/rel", refused="/proc/rel"),
    publish("a place one may not write to", "/usr/rel", refused="/usr/rel"),
    publish("a device", "/dev/full", refused="/dev/full"),
    publish("the folder itself", "prepared", refused="prepared"),
    publish("inside the folder", "prepared/rel", refused="prepared"),
    publish("NUL", "a\0b", refused="a|NUL|null"),
    publish("5 000 letters", "x" * 5000, refused="xxx"),
    publish(
        "~", "~/rel", right=lambda _: os.path.isdir(os.path.expanduser("~/rel/v0001")), refused="~", writes=("~/rel",)
    ),
    publish("a folder in brackets", "rel[1]", right=there(place="rel[1]"), writes=("rel",)),
    publish("an address of this machine", "file://rel", refused="rel", right=there()),
    publish("a link to nothing", "rel", lambda: os.symlink("gone/far", "rel"), refused="rel"),
    publish("no such folder", "rel", folder="gone", refused="gone"),
    publish("an empty folder", "rel", lambda: os.mkdir("e"), folder="e", refused="e"),
    publish("a file as folder", "rel", folder="prepared/README.md", refused="README.md"),
    publish("latest.json in it", "rel", _content("latest.json"), refused="latest.json"),
    publish("a name with a backslash", "rel", _content("a\\b"), refused="a\\"),
    publish("a name with a line end", "rel", _content("a\nb"), refused="prepared", right=there()),
    publish("a name with an escape", "rel", _content("a\x1b[31m"), refused="prepared", right=there()),
    publish("a name that is not UTF-8", "rel", _content(os.fsdecode(b"a\xff")), refused="prepared"),
    publish("a FIFO in it", "rel", lambda: os.mkfifo("prepared/fifo"), refused="fifo", right=there()),
    publish(
        "a link to a file outside",
        "rel",
        lambda: (write(secret="x"), os.symlink("../secret", "prepared/link")),
        refused="link",
        right=there(),
    ),
    publish("a link to nothing in it", "rel", lambda: os.symlink("gone", "prepared/link"), refused="link"),
    publish("a loop of links", "rel", lambda: os.symlink(".", "prepared/loop"), refused="loop", right=there()),
    publish("an empty file", "rel", _content("empty", b""), right=there()),
    publish(
        "a manifest of its own that is none",
        "rel",
        _content("manifest.json", "{"),
        right=there(),
        refused="manifest.json",
    ),
    publish(
        "a manifest of its own that is nested",
        "rel",
        _content("manifest.json", "[" * 100_000),
        right=there(),
        refused="manifest.json",
    ),
    Case("publish: six at once", _twice_at_once, right=there(), writes=("rel",)),
]


def released(count: int = 1, *, key: str = "") -> None:
    """So many versions at `rel`."""
    write(**FOLDER)
    for i in range(count):
        write(**{"prepared/README.md": f"version {i}"})
        polyconcept("publish", "prepared", "rel", *(["--signing-key", key] if key else []))
    shutil.rmtree("prepared")


def verified(
    name: str,
    spoil: Callable[[], Any],
    refused: str | tuple[str, ...] = (),
    right: Check | None = None,
    command: tuple[str, ...] = ("verify", "rel"),
    count: int = 1,
    never: tuple[str, ...] = (),
) -> Case:
    """Releases of which something is changed, and a command that looks at them."""

    def give():
        released(count)
        spoil()
        return lambda: polyconcept("release", *command)

    return Case(name, give, words(refused), right, never)


MANIFEST = "rel/v0001/manifest.json"


def manifest(
    name: str,
    change: Callable[[dict[str, Any]], Any],
    refused: str | tuple[str, ...] = "manifest.json",
    *,
    summed: bool = True,
) -> Case:
    """summed: its own sums are made to agree again, as by somebody who knows the form."""

    def spoil() -> None:
        from pipeline.release.manifest import content_sum, own_sum

        said = json.loads(Path(MANIFEST).read_text())
        said = change(said) or said
        if summed and isinstance(said.get("files"), dict):
            said["content"] = content_sum(said["files"])
            said["sum"] = own_sum(said)
        Path(MANIFEST).write_text(json.dumps(said))

    return verified(f"manifest: {name}", spoil, refused)


def file(name: str, **entry: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda said: said["files"].update({name: {"sha256": "a" * 64, "size": 1} | entry})


def text(
    name: str,
    content: str | bytes,
    path: str = MANIFEST,
    refused: str | tuple[str, ...] = "manifest.json",
    **expected: Any,
) -> Case:
    return verified(name, lambda: write(**{path: content}), refused, **expected)


MANIFESTS = [
    verified("an ordinary release", lambda: None, right=accepted),
    verified("a file changed", lambda: write(**{"rel/v0001/README.md": "others"}), "README.md"),
    verified("a file changed, of the same size", lambda: write(**{"rel/v0001/README.md": "version 9"}), "README.md"),
    verified("a file missing", lambda: os.unlink("rel/v0001/README.md"), "README.md"),
    verified("a file too many", lambda: write(**{"rel/v0001/extra.bin": "x"}), "extra.bin"),
    verified("a file too many with an escape in its name", lambda: write(**{"rel/v0001/a\x1b[31m": "x"}), "a"),
    verified("a file too many whose name is not UTF-8", lambda: write(**{os.fsdecode(b"rel/v0001/a\xff"): "x"}), "a"),
    verified(
        "a file that is a link to another",
        lambda: (os.unlink("rel/v0001/README.md"), os.symlink("/etc/hostname", "rel/v0001/README.md")),
        "README.md",
    ),
    verified(
        "a file that is a FIFO",
        lambda: (os.unlink("rel/v0001/README.md"), os.mkfifo("rel/v0001/README.md")),
        "README.md",
    ),
    verified(
        "a file that is a folder",
        lambda: (os.unlink("rel/v0001/README.md"), os.mkdir("rel/v0001/README.md")),
        "README.md",
    ),
    manifest("a file's sum", lambda m: m["files"]["README.md"].update(sha256="b" * 64), "README.md"),
    manifest("a date, its own sum as before", lambda m: m.update(created="2030"), summed=False),
    manifest("a name that leads out", file("../../x"), "../../x"),
    manifest("an absolute name", file("/etc/passwd"), "/etc/passwd"),
    manifest("a name with a backslash", file("..\\x"), "x"),
    manifest("an empty name", file(""), "manifest.json|''"),
    manifest("a name with NUL", file("a\0b"), "a"),
    manifest("a name with an escape", file("a\x1b[31m"), "a"),
    manifest("a name of 5 000 letters", file("x" * 5000), "xxx"),
    manifest("a size that is a word", file("x", size="1")),
    manifest("a size that is true", file("x", size=True)),
    manifest("a size that is negative", file("x", size=-1), "x"),
    manifest("a size of 10^30", file("x", size=10**30), "x|manifest.json"),
    manifest("a sum that is a number", file("x", sha256=5)),
    manifest("no files", lambda m: m.update(files={}), "README.md|extra|manifest.json"),
    manifest("files that are null", lambda m: m.update(files=None)),
    manifest("another version", lambda m: m.update(version="v0009"), "v0009"),
    manifest("a version that is a number", lambda m: m.update(version=1)),
    manifest("a format of the future", lambda m: m.update(format=99), "format|99"),
    manifest("a format that is negative", lambda m: m.update(format=-1), "manifest.json|format"),
    manifest("provenance that is null", lambda m: m.update(provenance=None)),
    manifest("provenance that is a list", lambda m: m.update(provenance=[])),
    text("manifest: empty", ""),
    text("manifest: a list", "[]"),
    text("manifest: half of it", '{"format": 2, "files": {'),
    text("manifest: nested", "[" * 100_000),
    text("manifest: 3 000 closed brackets", '{"provenance": ' + "[" * 3000 + "]" * 3000 + "}"),
    text("manifest: bytes", bytes(range(256))),
    text("manifest: a number of 5 000 digits", '{"format": ' + "9" * 5000 + "}"),
    verified("manifest: a FIFO", lambda: (os.unlink(MANIFEST), os.mkfifo(MANIFEST)), "manifest.json"),
    verified("manifest: a folder", lambda: (os.unlink(MANIFEST), os.mkdir(MANIFEST)), "manifest.json"),
    verified("manifest: gone", lambda: os.unlink(MANIFEST), "manifest.json"),
    verified(
        "manifest: a key twice",
        lambda: Path(MANIFEST).write_text(Path(MANIFEST).read_text().replace('"format"', '"format": 1, "format"', 1)),
        "manifest.json",
    ),
]

LATEST = "rel/latest.json"
ALIASES = [
    text(f"latest.json: {name}", content, LATEST, "latest.json")
    for name, content in {
        "empty": "",
        "null": "null",
        "a list": "[]",
        "a number": "5",
        "a word": '"v0001"',
        "no version": "{}",
        "a version that is a number": '{"version": 1}',
        "a version that leads out": '{"version": "../../x"}',
        "an absolute version": '{"version": "/tmp"}',
        "Arabic digits": '{"version": "v٠٠٠١"}',
        "a version with a line end": '{"version": "v0001\\n"}',
        "too few digits": '{"version": "v1"}',
        "an escape": '{"version": "\\u001b[31m"}',
        "nested": "[" * 100_000,
        "3 000 closed brackets": "[" * 3000 + "]" * 3000,
        "rolled back from a word": '{"version": "v0001", "rolled_back": "v0002"}',
        "rolled back from null": '{"version": "v0001", "rolled_back": [null]}',
        "rolled back from what leads out": '{"version": "v0001", "rolled_back": ["../x"]}',
        "bytes": bytes(range(256)),
        "a number of 5 000 digits": "9" * 5000,
    }.items()
] + [
    text("latest.json: a version that is not there", '{"version": "v9999"}', LATEST, "v9999"),
    text("latest.json: a byte order mark", '\ufeff{"version": "v0001"}', LATEST, "latest.json", right=accepted),
    text("latest.json: a key twice", '{"version": "v0001", "version": "v0002"}', LATEST, "latest.json|v0002"),
    verified("latest.json: a FIFO", lambda: (os.unlink(LATEST), os.mkfifo(LATEST)), "latest.json"),
    verified("latest.json: a folder", lambda: (os.unlink(LATEST), os.mkdir(LATEST)), "latest.json"),
    verified(
        "latest.json: a link to itself", lambda: (os.unlink(LATEST), os.symlink("latest.json", LATEST)), "latest.json"
    ),
    verified("latest.json: gone", lambda: os.unlink(LATEST), "latest.json"),
    verified(
        "a release whose number is in Arabic digits",
        lambda: os.rename("rel/v0001", "rel/v٠٠٠١"),
        "v0001",
        command=("list", "rel"),
    ),
]
COMMANDS = [
    verified(f"release {' '.join(command)}", lambda: None, refused, command=command, count=2, never=never)
    for command, refused, never in (
        (("list", "gone"), "gone", ()),
        (("list", ""), "releases|''|destination|place|empty", ()),
        (("list", "http://me:SECRET@127.0.0.1:9/x"), "127.0.0.1:9", ("SECRET",)),
        (("show", "rel/v0009"), "v0009", ()),
        (("show", "rel/../gone"), "gone", ()),
        (("diff", "rel/v0001", "rel/v0009"), "v0009", ()),
        (("promote", "rel/v0009"), "v0009", ()),
        (("promote", "rel/v0001", "--alias", "../x"), "../x", ()),
        (("promote", "rel/v0001", "--alias", "v0002"), "v0002", ()),
        (("promote", "rel/v0001", "--alias", ""), "--alias", ()),
        (("promote", "rel/v0001", "--alias", "a\nb"), "--alias", ()),
        (("promote", "rel/v0001", "--alias", "a\n"), "--alias", ()),
        (("promote", "rel/candidates/gone"), "gone", ()),
        (("rollback", "rel", "--to", "v0009"), "v0009", ()),
        (("rollback", "rel", "--to", "../x"), "../x", ()),
        (("rollback", "gone"), "gone", ()),
        (("rollback", "rel", "--alias", "gone"), "gone", ()),
        (("gc", "gone"), "gone", ()),
        (("gc", "rel", "--keep", "0"), "keep", ()),
        (("verify", "rel", "--public-key", "gone.pem"), "gone.pem", ()),
        (("verify", "s3://"), "s3://", ()),
    )
]


def lease(
    name: str,
    content: str | bytes | Callable[[], Any] | None,
    number: str = "000001",
    *,
    age: float = 0,
    refused: tuple[str, ...] = (),
    right: bool = True,
    never: tuple[str, ...] = (),
) -> Case:
    """What somebody left in the place of a lease; a retraining takes its own all the same, or says where it stands."""

    def give():
        os.makedirs("rel/.lease")
        path = f"rel/.lease/{number}.json"
        if callable(content):
            content(path)
        else:
            write(**{path: content})
            os.utime(path, (time.time() - age,) * 2)

        def taken() -> None:
            from pipeline.release.lease import Busy
            from pipeline.release.lease import lease as take

            try:
                with take("rel", 30):
                    pass
            except Busy as error:
                raise ValueError(str(error)) from None

        return taken

    return Case(
        f"lease: {name}",
        give,
        refused,
        accepted if right else None,
        never,
        writes=("rel/.lease",),
        changes=("rel/.lease",),
    )


def held(seconds: Any, until: Any, holder: Any = "somebody") -> str:
    return json.dumps({"holder": holder, "seconds": seconds, "until": until})


BUSY = (".lease",)
LEASES = [
    lease("held by another", lambda path: write(**{path: held(30, time.time() + 20)}), refused=BUSY, right=False),
    lease("run out", lambda path: write(**{path: held(30, time.time() - 20)})),
    lease("empty, an hour old, as of a full disk", "", age=3600),
    lease("empty, just now", "", refused=BUSY),
    lease("garbage, an hour old", "{", age=3600),
    lease(
        "until 2058 by its own word",
        lambda path: write(**{path: held(1e9, time.time() + 1e9)}),
        refused=BUSY,
        never=("2058",),
    ),
    lease(
        "until 2058, of an ordinary length",
        lambda path: write(**{path: held(30, time.time() + 1e9)}),
        refused=BUSY,
        never=("2058",),
    ),
    lease("never ending", held(30, 1e400).replace("Infinity", "1e400"), refused=BUSY),
    lease("NaN", '{"holder": "x", "seconds": NaN, "until": NaN}', age=3600),
    lease("words for numbers", held("soon", "later"), age=3600),
    lease("true for numbers", held(True, True), age=3600),
    lease("a list", "[]", age=3600),
    lease("null", "null", age=3600),
    lease("a negative length", lambda path: write(**{path: held(-30, time.time() + 20)}), refused=BUSY),
    lease("nested", "[" * 100_000, age=3600),
    lease("3 000 closed brackets", "[" * 3000 + "]" * 3000, age=3600),
    lease("bytes", bytes(range(256)), age=3600),
    lease("a number of 5 000 digits", '{"until": ' + "9" * 5000 + "}", age=3600),
    lease(
        "a holder with an escape",
        lambda path: write(**{path: held(30, time.time() + 20, "\x1b[2Jx")}),
        refused=BUSY,
        right=False,
    ),
    lease(
        "a holder of 10 MB",
        lambda path: write(**{path: held(30, time.time() + 20, "x" * 10_000_000)}),
        refused=BUSY,
        right=False,
    ),
    lease("a file of tomorrow", "", age=-86400),
    lease("a number in Arabic digits", held(30, 0), "٠٠٠٠٠١"),
    lease("a number of 300 digits", held(30, 0), "9" * 200, refused=BUSY),
    lease("a name that is no number", "x", "hello"),
    lease("a FIFO", os.mkfifo, refused=BUSY),
    lease("a folder", os.mkdir, refused=BUSY),
    lease("a link to itself", lambda path: os.symlink("000001.json", path), refused=BUSY),
]


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def keys() -> None:
    _openssl("genpkey", "-algorithm", "ed25519", "-out", "key.pem")
    _openssl("pkey", "-in", "key.pem", "-pubout", "-out", "public.pem")


def key(name: str, make: Callable[[], Any], refused: str | tuple[str, ...] = "odd.pem") -> Case:
    """A signing key that is none."""

    def spoil() -> None:
        keys()
        make()

    return publish(f"signing key: {name}", "rel", spoil, "--signing-key", "odd.pem", refused=refused)


KEYS = [
    key("nothing there", lambda: None),
    key("empty", lambda: write(**{"odd.pem": ""})),
    key("text", lambda: write(**{"odd.pem": "hello"})),
    key("the public one", lambda: shutil.copy("public.pem", "odd.pem")),
    key("RSA", lambda: _openssl("genpkey", "-algorithm", "rsa", "-out", "odd.pem")),
    key(
        "another curve",
        lambda: _openssl("genpkey", "-algorithm", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "odd.pem"),
    ),
    key(
        "with a password",
        lambda: _openssl("genpkey", "-algorithm", "ed25519", "-aes256", "-pass", "pass:x", "-out", "odd.pem"),
    ),
    key("a folder", lambda: os.mkdir("odd.pem")),
    key("a FIFO", lambda: os.mkfifo("odd.pem")),
    key("/dev/zero", lambda: os.symlink("/dev/zero", "odd.pem")),
]


def signed(
    name: str,
    attack: Callable[[], Any],
    refused: str | tuple[str, ...] = (),
    right: Check | None = None,
    command: tuple[str, ...] = ("verify", "rel", "--public-key", "public.pem"),
) -> Case:
    """Two signed versions, what an attacker who can write there does, and the check with the public key."""

    def give():
        keys()
        released(2, key="key.pem")
        attack()
        return lambda: polyconcept("release", *command)

    return Case(f"signature: {name}", give, words(refused), right)


def _other_project() -> None:
    """The second version of another project, signed by the same key, in the place of this one's."""
    shutil.move("rel", "ours")
    write(**FOLDER)
    for i in range(2):
        write(**{"prepared/README.md": f"another project {i}"})
        polyconcept("publish", "prepared", "rel", "--signing-key", "key.pem")
    shutil.rmtree("ours/v0002")
    shutil.move("rel/v0002", "ours/v0002")
    shutil.rmtree("rel")
    shutil.rmtree("prepared")
    shutil.move("ours", "rel")


SIGNATURE = "rel/v0002/manifest.json.sig"
SIGNATURES = [
    signed("as it was made", lambda: None, right=accepted),
    signed("gone", lambda: os.unlink(SIGNATURE), "manifest.json.sig"),
    signed("empty", lambda: write(**{SIGNATURE: b""}), "manifest.json.sig"),
    signed("cut off", lambda: os.truncate(SIGNATURE, 20), "manifest.json.sig"),
    signed("of another version", lambda: shutil.copy("rel/v0001/manifest.json.sig", SIGNATURE), "manifest.json.sig"),
    signed("of 100 MB", lambda: write(**{SIGNATURE: bytes(100_000_000)}), "manifest.json.sig"),
    signed(
        "the manifest changed by a space",
        lambda: write(**{"rel/v0002/manifest.json": Path("rel/v0002/manifest.json").read_text() + " "}),
        "manifest.json",
    ),
    signed(
        "a version under another number",
        lambda: (shutil.copytree("rel/v0002", "rel/v0003"), write(**{LATEST: '{"version": "v0003"}'})),
        "v0003|v0002",
    ),
    signed("latest.json moved back", lambda: write(**{LATEST: '{"version": "v0001"}'}), "latest.json"),
    signed("another project's version", _other_project, "project|name|manifest"),
    signed(
        "another key",
        lambda: (
            _openssl("genpkey", "-algorithm", "ed25519", "-out", "other.pem"),
            _openssl("pkey", "-in", "other.pem", "-pubout", "-out", "public.pem"),
        ),
        "manifest.json.sig",
    ),
    signed("a public key that is text", lambda: write(**{"public.pem": "x"}), "public.pem"),
]


def card(name: str, /, check: Check, refused: str | tuple[str, ...] = (), **values: Any) -> Case:
    """The model card of a release with odd words in it. check: of its text."""

    def give():
        os.mkdir("rel")

        def written() -> str:
            from pipeline.release.card import CardConcept, write_card

            own = {"name": "batch", "base_model": "owner/name", "license": "mit"} | values
            concept = CardConcept(own.pop("concept", "bus"), own.pop("token", "<new1>"), own.pop("class_word", "bus"))
            return write_card(Path("rel"), [concept], **own).read_text()

        return written

    return Case(f"card: {name}", give, words(refused), check, writes=("rel",))


def front(seen: Seen) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(seen.result.split("---")[1])


def body(seen: Seen) -> str:
    """What is shown as a page; the front matter is data."""
    return seen.result.split("\n---\n", 1)[1]


HTML = "<script>alert(1)</script>"
CARD_TEXTS = [
    card(
        "a licence with a line end",
        lambda s: "evil" not in front(s) and "\nevil" not in s.result,
        license="mit\nevil: yes",
        refused="license",
    ),
    card("a licence with HTML", lambda s: HTML not in s.result.split("---", 2)[2], license=HTML, refused="license"),
    card(
        "a licence's name with HTML",
        lambda s: HTML not in s.result.split("---", 2)[2],
        license="",
        license_name=HTML,
        refused="license",
    ),
    card(
        "a licence's link that is a script",
        lambda s: "](javascript:" not in body(s) and 'href="javascript:' not in body(s),
        license="",
        license_name="x",
        license_link="javascript:alert(1)",
        refused="license_link",
    ),
    card(
        "a licence's link that closes its bracket",
        lambda s: HTML not in body(s),
        license="",
        license_name="x",
        license_link=f"http://x){HTML}",
        refused="license_link",
    ),
    card(
        "a class word with HTML",
        lambda s: HTML not in s.result.split("---", 2)[2].replace("```", "§").split("§")[0],
        class_word=HTML,
    ),
    card(
        "a class word with a cell's end",
        lambda s: not any("| x |" in line for line in s.result.splitlines() if line.startswith("|")),
        class_word="a | x | y",
    ),
    card(
        "a class word that ends the code",
        lambda s: _compiles(s),
        class_word="'); import os; os.system('touch executed'); ('",
    ),
    card(
        "a class word with a line end and a fence",
        lambda s: s.result.count("\n```") % 2 == 0 and _compiles(s),
        class_word="bus\n```\n# title\n```",
    ),
    card("a class word that is a template", lambda s: "49" not in s.result, class_word="{{ 7*7 }}"),
    card("a base with a quote", lambda s: _compiles(s), base_model="o'wn\"er/na\\me"),
    card(
        "a private path as base",
        lambda s: "/home/me" not in s.result,
        refused="base",
        base_model="/home/me/models/mine",
    ),
    card("a front matter's end as name", lambda s: isinstance(front(s), dict), name="---", refused="'---'"),
]


def _compiles(seen: Seen) -> bool:
    """Whether each block of code is Python that calls nothing but what the card has it call."""
    blocks = [block.partition("\n```")[0] for block in seen.result.split("\n```python\n")[1:]]
    return bool(blocks) and all("os.system" not in ast_names(block) for block in blocks)


def ast_names(code: str) -> set[str]:
    import ast

    return {ast.unparse(node.func) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}


CASES = [*PUBLISHED, *BUCKETS, *MANIFESTS, *ALIASES, *COMMANDS, *LEASES, *KEYS, *SIGNATURES, *CARD_TEXTS]
