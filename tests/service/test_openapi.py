"""The description: complete, and about what is there. That answers keep to it, every test of this folder checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from running_service import asynchronous, service
from starlette.routing import Route

from nnsight_compiler.service.openapi import HEADERS, PARAMETERS, SCHEMAS
from nnsight_compiler.service.operations import OPERATIONS


def references(data: Any) -> set[str]:
    if isinstance(data, dict):
        return {data["$ref"]} if "$ref" in data else set().union(*map(references, data.values()), set())
    return set().union(*map(references, data), set()) if isinstance(data, list) else set()


@asynchronous
async def test_each_route_is_described_with_its_methods(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        found = (await running.client.get("/openapi.json")).json()
        routes = set()
        for route in running.app.routes:
            assert isinstance(route, Route)
            for method in route.methods or ():
                if method != "HEAD" or "/blobs/" in route.path:  # HEAD is had with GET
                    routes.add((method.lower(), route.path.replace(":path", "")))
        described = {(method, path) for path, methods in found["paths"].items() for method in methods}
        assert described == routes
        assert len(described) == len(OPERATIONS)


@asynchronous
async def test_the_description_is_sound(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        found = (await running.client.get("/openapi.json")).json()
    assert found["openapi"] == "3.1.0"
    names = set()
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            names.add(operation["operationId"])
            in_path = {each["name"] for each in operation["parameters"] if each["in"] == "path"}
            assert in_path == set(re.findall(r"\{(\w+)\}", path)), path
            assert operation["summary"].endswith(".")
            statuses = set(map(int, operation["responses"]))
            assert 500 in statuses
            assert (401 in statuses) == (path not in ("/healthz", "/readyz"))
            assert ("requestBody" in operation) == (method in ("post", "put"))
            for status, answer in operation["responses"].items():
                assert answer["description"]
                if int(status) >= 400 and method != "head":
                    assert references(answer) == {"#/components/schemas/Error"}, (path, status)
    assert len(names) == len(OPERATIONS)
    assert references(found) == {f"#/components/schemas/{name}" for name in SCHEMAS}


def test_no_parameter_or_header_is_described_in_vain() -> None:
    assert {name for each in OPERATIONS for name in each.parameters} == set(PARAMETERS)
    headers = {name for each in OPERATIONS for answer in each.answers.values() for name in answer.headers}
    assert headers == set(HEADERS)
