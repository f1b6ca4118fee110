"""The reference of all settings is what the settings say themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from pipeline import settings_page
from pipeline.spec import ConceptBatch, Retraining, section_of
from pipeline.study import Study

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date():
    """Write it again: python -m pipeline.settings_page > docs/settings.md"""
    assert (ROOT / "docs/settings.md").read_text() == settings_page.page()


def _models(model: type[BaseModel]) -> set[type[BaseModel]]:
    inner = [section_of(field.annotation)[0] for field in model.model_fields.values()]
    return {model}.union(*(_models(part) for part in inner if part))


@pytest.mark.parametrize("model", [ConceptBatch, Retraining, Study])
def test_every_setting_says_what_it_is(model):
    silent = [f"{m.__name__}.{k}" for m in _models(model) for k, f in m.model_fields.items() if not f.description]
    assert not silent
