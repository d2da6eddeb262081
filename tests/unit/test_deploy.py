"""Dockerfile, compose, Prometheus, Grafana and the public CI: whatever they name exists."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import prometheus_client
import promql_parser
import pytest
import yaml

from sglang_margingate.bench.doctor.examination import PARTS
from sglang_margingate.cli import COMMANDS
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.serving.frontdoor import build_parser
from sglang_margingate.settings.support import TESTED

ROOT = Path(__file__).resolve().parents[2]
DEPLOY, GITHUB = ROOT / "deploy", ROOT / ".github"
PAGE = json.loads((DEPLOY / "grafana" / "dashboards" / "margingate.json").read_text("utf-8"))
ALERTS = [
    rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text("utf-8"))["groups"] for rule in group["rules"]
]
EXPRESSIONS = [(p["title"], t["expr"]) for p in PAGE["panels"] for t in p["targets"]]
EXPRESSIONS += [(rule["alert"], rule["expr"]) for rule in ALERTS]
SCRAPED = {"instance", "job", "le"}
"""Labels that Prometheus adds, and the buckets of a histogram."""


@pytest.fixture(scope="module")
def ours() -> Iterator[dict[str, set[str]]]:
    """Our metrics as a server shows them, with their labels."""
    before = set(prometheus_client.REGISTRY._collector_to_names)
    metrics = Metrics(True, "m")
    metrics.answer("none")
    new = set(prometheus_client.REGISTRY._collector_to_names) - before
    yield {s.name: set(s.labels) for c in new for family in c.collect() for s in family.samples}
    for collector in new:
        prometheus_client.REGISTRY.unregister(collector)


@cache
def sglangs() -> str:
    """The source of SGLang's metrics."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None, "SGLang is not installed"
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    return "".join(p.read_text("utf-8") for p in folder.rglob("*.py") if "metric" in str(p.relative_to(folder)))


def selectors(node: Any) -> Iterator[Any]:
    """Give every selector of a parsed expression."""
    if type(node).__name__ == "VectorSelector":
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        inner = getattr(node, name, None)
        if inner is not None and not isinstance(inner, str):
            yield from selectors(inner)
    for inner in getattr(node, "args", None) or ():
        yield from selectors(inner)


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS)
def test_every_metric_and_label_exists(where: str, expression: str, ours: dict[str, set[str]]) -> None:
    parsed = promql_parser.parse(expression.replace("$__rate_interval", "1m").replace("$instance", ".*"))
    found = list(selectors(parsed))
    assert found, where
    for selector in found:
        name = selector.name
        if name == "up":
            continue
        used = {matcher.name for matcher in selector.matchers.matchers}
        if name.startswith("margingate_"):
            assert name in ours, f"{where}: {name}"
            assert used <= ours[name] | SCRAPED, f"{where}: {used}"
        else:
            family = name.removesuffix("_bucket")
            assert f'"{family}"' in sglangs(), f"{where}: {name}"
            assert used <= SCRAPED
    by = {word for inside in re.findall(r"by \(([^)]*)\)", expression) for word in re.split(r",\s*", inside)}
    known = set().union(*(ours.get(selector.name, set()) for selector in found)) | SCRAPED
    assert by <= known, f"{where}: {by - known}"


def test_every_metric_of_ours_is_on_the_page_or_in_an_alert(ours: dict[str, set[str]]) -> None:
    text = json.dumps(EXPRESSIONS)
    assert [name for name in ours if not name.endswith("_created") and name not in text] == []


def test_a_lost_guarantee_is_an_alert() -> None:
    (lost,) = [rule for rule in ALERTS if rule["alert"] == "MargingateGuaranteeLost"]
    assert "margingate_lowered" in lost["expr"]
    assert lost["labels"]["severity"] == "critical"
    assert all({"summary", "description"} <= set(rule["annotations"]) for rule in ALERTS)


def test_compose_mounts_files_that_exist_and_calls_commands_that_exist() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))["services"]
    for name, service in services.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), f"{name}: {source}"
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), f"{name} is open to the world"
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    for name in ("server", "dashboard"):
        command, *words = services[name]["command"]
        assert command in COMMANDS
        assert [w for w in words if w.startswith("--margingate-") and w not in flags] == []
    target = yaml.safe_load((DEPLOY / "prometheus.yml").read_text("utf-8"))["scrape_configs"][0]
    assert target["static_configs"][0]["targets"] == ["server:30000"]
    assert 'job="margingate"' in next(r["expr"] for r in ALERTS if r["alert"] == "MargingateDown")
    assert target["job_name"] == "margingate"


def test_the_image_copies_what_exists_and_its_context_lets_in() -> None:
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    base = re.search(r"ARG BASE=lmsysorg/sglang:v([\d.]+)", text)
    assert base is not None
    assert base[1] in TESTED
    let_in = (ROOT / ".dockerignore").read_text("utf-8")
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}\n" in let_in + "\n", source


def test_the_public_ci_runs_what_ci_runs() -> None:
    jobs = yaml.safe_load((GITHUB / "workflows" / "test.yml").read_text("utf-8"))["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in runs
    assert (ROOT / ".ci" / "run").is_file()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {run.split()[1] for run in runs if run.startswith("make ")} <= targets


def test_issue_templates_ask_for_doctors_report() -> None:
    forms = [path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    parts = {part.name for part in PARTS}
    for form in forms:
        body = yaml.safe_load(form.read_text("utf-8"))["body"]
        (doctor,) = [field for field in body if field["id"] == "doctor"]
        assert doctor["validations"]["required"]
        for names in re.findall(r"--parts ([\w,]+)", form.read_text("utf-8")):
            assert set(names.split(",")) <= parts
