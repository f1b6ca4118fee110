import os
from pathlib import Path

import fsspec
import pytest

from pipeline.catalogue import read_catalogue
from pipeline.checks import UnusableConcepts
from pipeline.miniature.world import concept_images
from pipeline.plan import make_plan
from pipeline.spec import Retraining
from pipeline.stages.features import Features
from pipeline.stages.train import Train


def fill(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        concept_images("cat", "noto", 1, seed=len(name))[0].save(folder / name / "1.png")
        (folder / name / "concept.yaml").write_text("class_word: cat\n")


def asked(catalogue: str, **changes: object) -> Retraining:
    return Retraining.model_validate({"name": "t", "catalogue": catalogue, **changes})


def trainings(retraining: Retraining) -> dict[str, str]:
    concepts, problems = read_catalogue(retraining)
    assert not problems
    return {stage.name: stage.key for stage in make_plan(retraining.with_concepts(concepts)).of(Train)}


def test_a_concept_stays_what_it_is_when_others_come_and_go(tmp_path: Path) -> None:
    fill(tmp_path / "c", ("bob", "carol"))
    before = trainings(asked(str(tmp_path / "c")))
    fill(tmp_path / "c", ("alice",))
    after = trainings(asked(str(tmp_path / "c")))
    assert list(after) == ["alice", "bob", "carol"]
    assert {name: after[name] for name in before} == before
    (tmp_path / "c/bob/concept.yaml").unlink()
    assert list(trainings(asked(str(tmp_path / "c")))) == ["alice", "carol"]


def test_bad_cards_are_named_and_the_others_read(tmp_path: Path) -> None:
    fill(tmp_path / "c", ("alice", "bob", "b ob"))
    (tmp_path / "c/bob/concept.yaml").write_text("[1")
    (tmp_path / "c/alice/concept.yaml").write_text("class_word: cat\ntraining: {steps: 7}\n")
    concepts, problems = read_catalogue(asked(str(tmp_path / "c")))
    assert [(c.name, c.token, c.training.steps) for c in concepts] == [("alice", "<alice>", 7)]
    assert "not valid YAML" in problems["bob"] and "name: String should match pattern" in problems["b ob"]


def test_a_card_that_is_meant_is_not_overlooked(tmp_path: Path) -> None:
    """Overlooked, it would retire its concept."""
    names = ("a", "b", "c", "d", "e", "empty")
    fill(tmp_path / "[c]", names)
    for name, card in (("b", "concept.yml"), ("c", "CONCEPT.YAML"), ("d", "concept.yaml.txt")):
        (tmp_path / "[c]" / name / "concept.yaml").rename(tmp_path / "[c]" / name / card)
    (tmp_path / "[c]/e/Concept.yml").write_text("class_word: dog\n")
    (tmp_path / "[c]/empty/concept.yaml").rename(tmp_path / "[c]/empty/concept.png")
    concepts, problems = read_catalogue(asked(str(tmp_path / "[c]")))
    assert [c.name for c in concepts] == ["a", "b", "c"]
    assert "concept.yaml.txt: no card is read from a file of this name; call it concept.yaml" in problems["d"]
    assert list(problems) == ["d", "e"] and "Concept.yml and concept.yaml are there; keep one" in problems["e"]
    made = make_plan(asked(str(tmp_path / "[c]")).with_concepts(concepts))
    assert all(len(stage.images) == 1 for stage in made.of(Features))


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("class_word: !!bool x", "concept.yaml:1: the tag"),
        ("class_word: !!timestamp x", "concept.yaml:1: the tag"),
        ("class_word: " + "[" * 3000, "concept.yaml:1: lists and mappings are nested"),
        ("class_word: cat\nclass_word: dog", "concept.yaml:2: the key 'class_word' is given twice, first in line 1"),
        ("class_word: cat\nname: x", "concept.yaml:2: name: given by the folder"),
        ("class_word: cat\ntraining: {steps: yes}", "concept.yaml:2: training.steps: expected a number, found yes"),
        (
            "class_word: &a [x]\nprompts: [" + "*a, " * 999 + "]",
            "concept.yaml:1: class_word: expected text, found a list",
        ),
        (None, "concept.yaml: not a regular file"),
    ],
)
def test_one_bad_card_is_one_concept_less(tmp_path: Path, card: str | None, message: str) -> None:
    fill(tmp_path / "c", ("alice", "bob"))
    place = tmp_path / "c/bob/concept.yaml"
    place.unlink()
    if card is None:
        os.mkfifo(place)
    else:
        place.write_text(card)
    concepts, problems = read_catalogue(asked(str(tmp_path / "c")))
    assert [c.name for c in concepts] == ["alice"] and message in problems["bob"] and len(problems["bob"]) < 5000


def test_a_new_category_has_no_token(tmp_path: Path) -> None:
    fill(tmp_path / "c", ("alice", "moongate"))
    (tmp_path / "c/moongate/concept.yaml").write_text("class_word: moongate\nclass_prompt: gate\nnew_category: true\n")
    retraining = asked(str(tmp_path / "c"))
    batch = retraining.with_concepts(read_catalogue(retraining)[0])
    assert [(c.token, c.phrase) for c in batch.concepts] == [("<alice>", "<alice> cat"), ("", "moongate")]


@pytest.mark.parametrize(
    ("names", "token", "message"),
    [
        (("alice", "bob"), "<Alice>", "the token '<alice>' is that of"),
        (("Bob", "bob"), "<other>", "the name 'bob' is that of"),
    ],
)
def test_of_two_alike_the_released_stays(tmp_path: Path, names: tuple[str, str], token: str, message: str) -> None:
    fill(tmp_path / "c", ("zoe", *names))
    first, second = names
    (tmp_path / "c" / second / "concept.yaml").write_text(f"class_word: cat\ntoken: {token}\n")
    for released, left_out in (((), second), ((first, "zoe"), second), ((second, "gone"), first)):
        concepts, problems = read_catalogue(asked(str(tmp_path / "c")), released)
        assert [c.name for c in concepts] == sorted({*names, "zoe"} - {left_out}) and list(problems) == [left_out]
        assert f"{left_out}/concept.yaml: {message}" in problems[left_out]


def test_cards_that_do_not_suit_the_settings(tmp_path: Path) -> None:
    """Each is named by itself; the name in <> is no token for a method that makes none."""
    fill(tmp_path / "c", ("alice", "bob", "carol"))
    (tmp_path / "c/bob/concept.yaml").write_text("class_word: cat\ntoken: ucd\n")
    (tmp_path / "c/carol/concept.yaml").write_text("class_word: cat\nnew_category: true\ntoken: <c>\n")
    concepts, problems = read_catalogue(asked(str(tmp_path / "c"), training={"method": "dreambooth"}))
    assert [(c.name, c.token) for c in concepts] == [("bob", "ucd")]
    assert "alice/concept.yaml: token: missing; dreambooth makes no new token: name a rare word" in problems["alice"]
    assert "carol/concept.yaml: token: a new_category goes by its class word" in problems["carol"]


def test_words_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "c", ("alice", "bob", "carol"))
    (tmp_path / "c/bob/concept.yaml").write_text("class_word: cat\ninitializer: wooden pot\n")
    (tmp_path / "c/carol/concept.yaml").write_text("class_word: cat\ntoken: cat\n")
    with pytest.raises(UnusableConcepts) as unusable:
        trainings(asked(str(tmp_path / "c")))
    found = unusable.value.concepts
    assert list(found) == ["bob", "carol"]
    assert found["bob"].startswith("concepts[1] (bob): initializer 'wooden pot': must be one token")
    assert found["carol"].startswith("concepts[2] (carol): token 'cat': the base model's tokenizer knows it already")


def test_a_catalogue_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    """It is copied to the output folder; keys that would lead elsewhere, and what is deeper, are left."""
    fill(tmp_path / "c", ("alice", "bob"))
    fs, root = fsspec.core.url_to_fs(bucket)
    fs.put(f"{tmp_path}/c/", f"{root}/concepts/", recursive=True)
    for key in ("../../evil.txt", "alice/..", "top.txt", "alice/deeper/2.png", r"alice/..\x.png"):
        fs.pipe_file(f"{root}/concepts/{key}", b"x")
    fill(tmp_path / "out/catalogue", ("mine",))  # what someone keeps there is not ours to remove
    retraining = asked(f"{bucket}/concepts", output=str(tmp_path / "out"))
    assert trainings(retraining) == trainings(asked(str(tmp_path / "c")))
    copied = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert copied - {r".catalogue/alice/..\x.png"} == {
        f"{folder}/{name}/{file}"
        for folder, names in ((".catalogue", ("alice", "bob")), ("catalogue", ("mine",)))
        for name in names
        for file in ("1.png", "concept.yaml")
    }
    fs.rm(f"{root}/concepts/bob", recursive=True)
    assert list(trainings(retraining)) == ["alice"]
    for nowhere in (f"{bucket}/nothing", f"{bucket}-of-nobody/concepts"):
        with pytest.raises(ValueError, match="not there; the catalogue has a folder for each concept"):
            read_catalogue(asked(nowhere, output=str(tmp_path / "out")))
    fs.pipe_file(f"{root}/empty/readme.txt", b"x")
    with pytest.raises(ValueError, match="no concept in it"):
        read_catalogue(asked(f"{bucket}/empty", output=str(tmp_path / "out")))
