"""Alerts and dashboard: their queries can be read, and ask for figures that there are."""

from __future__ import annotations

import json
import re

import promql_parser
from manifests import render, walk

from ray_jobs import metrics


def queries() -> list[str]:
    found = [node["expr"] for item in render("monitoring") for node in walk(item) if "expr" in node]
    (dashboard,) = (o["data"]["dashboard.json"] for o in render("monitoring") if o["kind"] == "ConfigMap")
    return found + [target["expr"] for panel in json.loads(dashboard)["panels"] for target in panel["targets"]]


def test_queries_ask_for_what_there_is():
    assert len(queries()) >= 12
    exported = {f"ray_{m.info['name']}_total" for m in (metrics.TRAINED, metrics.FAILED, metrics.GATE)}
    exported |= {f"ray_{metrics.STEP_SECONDS.info['name']}_{part}" for part in ("sum", "count")}
    asked = set()
    for query in queries():
        promql_parser.parse(query.replace("$__range", "1d"))  # Grafana's variable
        asked |= set(re.findall(r"ray_polyconcept_\w+", query))
    assert asked == exported
