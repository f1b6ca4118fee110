"""Alerts and dashboard: their queries can be read, and ask for figures that there are."""

from __future__ import annotations

import json
import re

import promql_parser
from manifests import render, walk

from ray_jobs import metrics
from ray_jobs.board import Board


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


def test_what_only_waits_does_not_count_as_running():
    """The board's calls run as long as each training waits for its device, and Ray counts them."""
    running = [query for query in queries() if "RUNNING" in query]
    assert len(running) == 2
    assert all(f'Name!~"{Board.__name__}[.].*"' in selector for query in running for selector in _running(query))


def _running(query: str) -> list[str]:
    return [selector for selector in re.findall(r"\{.*?\}", query) if "RUNNING" in selector]
