"""What editors check a batch file by."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from command import run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("batch", "examples/miniature/batch.yaml"),
        ("retraining", "examples/nightly/retrain.yaml"),
        ("study", "examples/study/study.yaml"),
    ],
)
def test_the_schema_takes_the_examples_and_no_unknown_key(kind, file, capsys):
    code, out, err = run("schema", kind, capsys=capsys)
    schema = json.loads(out)
    assert code == 0, err

    jsonschema.validate(yaml.safe_load((ROOT / file).read_text()), schema)
    with pytest.raises(jsonschema.ValidationError, match="'no_such_key' was unexpected"):
        jsonschema.validate(yaml.safe_load((ROOT / file).read_text()) | {"no_such_key": 1}, schema)
