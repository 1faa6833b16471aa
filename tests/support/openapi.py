"""GitHub's own description of its API, from npm: requests and answers are held to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import unquote

from openapi_schema_validator import OAS30Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4

from tests.support.npm import files_of

VERSION = "23.0.2"
MEMBER = "package/generated/api.github.com.json"
URI = "urn:github"
FORMATS = {
    "uri": "https://example.org/",
    "date-time": "2026-01-01T00:00:00Z",
    "email": "someone@example.org",
}


@cache
def description() -> Description:
    """The description, fetched once for all runs of this checkout."""
    folder = files_of("@octokit/openapi", VERSION, [MEMBER])
    return Description(json.loads((folder / MEMBER).read_bytes()))


@dataclass(frozen=True)
class Operation:
    """One path and method of the description."""

    path: str
    method: str
    arguments: dict[str, str]
    table: dict[str, Any]


class Description:
    """Looks up operations, and checks values against the schemas."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        resource = Resource(contents=document, specification=DRAFT4)
        self._registry: Registry[Any] = Registry().with_resource(URI, resource)
        self._paths = [(path.strip("/").split("/"), path) for path in document["paths"]]

    def find(self, method: str, path: str) -> Operation | None:
        """The operation that a request means; literal parts win over templates."""
        parts = path.strip("/").split("/")
        found = []
        for template, name in self._paths:
            if len(template) == len(parts) and all(
                t.startswith("{") or t == p for t, p in zip(template, parts, strict=True)
            ):
                found.append((sum(t.startswith("{") for t in template), template, name))
        for _, template, name in sorted(found):
            table = self.document["paths"][name].get(method.lower())
            if table:
                pairs = zip(template, parts, strict=True)
                arguments = {t.strip("{}"): unquote(p) for t, p in pairs if t.startswith("{")}
                return Operation(name, method, arguments, table)
        return None

    def problems(self, value: Any, schema: dict[str, Any]) -> list[str]:
        """What is wrong with a value."""
        validator = OAS30Validator(_rooted(schema), registry=self._registry)
        return [
            f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(value)
        ]

    def query_problems(self, operation: Operation, query: dict[str, str]) -> list[str]:
        """Parameters that the operation does not know, or that do not fit."""
        known = {p["name"]: p for p in map(self._resolved, operation.table.get("parameters", []))}
        said = [f"unknown parameter {name}" for name in query if name not in known]
        for name, text in query.items():
            schema = known.get(name, {}).get("schema", {})
            number = text.isdigit() and schema.get("type") == "integer"
            said += self.problems(int(text) if number else text, schema)
        return said

    def body_problems(self, operation: Operation, body: Any) -> list[str]:
        """What is wrong with a request's body."""
        wanted = operation.table.get("requestBody")
        if wanted is None:
            return ["takes no body"] if body else []
        return self.problems(body, wanted["content"]["application/json"]["schema"])

    def answer_problems(self, operation: Operation, status: int, body: Any) -> list[str]:
        """What is wrong with an answer."""
        answers = operation.table["responses"]
        if str(status) not in answers:
            return [f"{status} is no answer of {operation.method} {operation.path}"]
        content = self._resolved(answers[str(status)]).get("content", {})
        if "application/json" not in content:
            return []
        return self.problems(body, content["application/json"]["schema"])

    def sample(self, name: str) -> dict[str, Any]:
        """An object with the fields that a schema requires. (The published examples lack some.)"""
        made = self._sample({"$ref": f"#/components/schemas/{name}"})
        assert isinstance(made, dict)
        return made

    def _sample(self, schema: dict[str, Any]) -> Any:
        schema = self._resolved(schema)
        if schema.get("nullable"):
            return None
        for choice in ("oneOf", "anyOf"):
            if choice in schema:
                return self._sample(schema[choice][0])
        if "allOf" in schema:
            parts = [self._sample(part) for part in schema["allOf"]]
            return {key: value for part in parts if part for key, value in part.items()}
        if "enum" in schema:
            return schema["enum"][0]
        kind = schema.get("type", "object")
        if kind == "object":
            known = schema.get("properties", {})
            return {key: self._sample(known[key]) for key in schema.get("required", [])}
        text = FORMATS.get(schema.get("format", ""), "text")
        return {"array": [], "integer": 1, "number": 1.0, "boolean": False, "string": text}[kind]

    def _resolved(self, entry: dict[str, Any]) -> dict[str, Any]:
        if "$ref" not in entry:
            return entry
        found: Any = self.document
        for part in entry["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return dict(found)


def _rooted(schema: Any) -> Any:
    """References that lead into the description, wherever the schema is used."""
    if isinstance(schema, dict):
        return {
            key: f"{URI}{value}" if key == "$ref" and isinstance(value, str) else _rooted(value)
            for key, value in schema.items()
            if key != "discriminator"  # its references are not followed by the validator
        }
    return [_rooted(entry) for entry in schema] if isinstance(schema, list) else schema
