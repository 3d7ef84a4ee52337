"""The description of the service in OpenAPI 3.1, made from the table of its operations."""

from __future__ import annotations

from collections.abc import Sequence

from nnsight_compiler.service.operations import OCTETS, Answer, Operation, refusal

Schema = dict[str, object]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer"}
OBJECT: Schema = {"type": "object"}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"oneOf": [schema, {"type": "null"}]}


def _object(required: Sequence[str] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required or properties)}


def _named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        error=_object(
            ("code", "message", "where", "op"),
            code=TEXT | {"description": "a word for programs"},
            message=TEXT | {"description": "the reason, and a way out"},
            where=_or_null(TEXT | {"description": "file:line:column of the experiment"}),
            op=_or_null(TEXT | {"description": "the operation that is refused"}),
            missing=_array(TEXT) | {"description": "hashes of uploads that are not there"},
            error=OBJECT | {"description": "all that is known of why a job was not admitted"},
            job_error=_or_null(OBJECT) | {"description": "the error of a job that failed"},
        )
    ),
    "Job": _object(
        id=TEXT,
        status={"enum": ["queued", "running", "completed", "failed", "cancelled", "expired"]},
        place=_or_null(WHOLE | {"description": "in the queue, from 1"}),
        model=TEXT,
        created=NUMBER | {"description": "seconds since 1970"},
        started=_or_null(NUMBER),
        ended=_or_null(NUMBER),
        cost=OBJECT | {"description": "what the run was expected to take, before it was queued"},
        error=_or_null(OBJECT | {"description": "kind, module, message, notes, where, op"}),
        result=_or_null(_object(bytes=WHOLE, sha256=TEXT, expires=NUMBER)),
    ),
    "Blob": _object(sha256=TEXT, bytes=WHOLE),
    "Model": _object(("name",), name=TEXT, config=OBJECT),
    "Models": _object(models=_array(_object(("name",), name=TEXT))),
    "Modules": _object(modules=_array(OBJECT)),
    "Tokenizer": _object(files={"type": "object", "additionalProperties": TEXT}),
    "Status": _object(status=TEXT),
    "Description": OBJECT,
}

PARAMETERS: dict[str, tuple[str, Schema, str]] = {
    "id": ("path", TEXT, "The job's id."),
    "sha256": ("path", {"type": "string", "pattern": "^[0-9a-f]{64}$"}, "The sha256 of the whole file."),
    "name": ("path", TEXT, "The model's name; it may hold slashes."),
    "wait": ("query", {"type": "number", "minimum": 0}, "Seconds to wait for the job's end; longer wishes are cut."),
    "Idempotency-Key": (
        "header",
        {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,128}$"},
        "A job that is sent again with the same key is the same job.",
    ),
    "Last-Event-ID": ("header", WHOLE, "The number of the last event that was received."),
    "Range": ("header", TEXT, "One range of bytes: bytes=FIRST-LAST."),
    "If-Range": ("header", TEXT, "The ETag for which the range is asked; the whole is sent where it is another."),
    "If-None-Match": ("header", TEXT, "The ETag of the result that the client has."),
}

HEADERS: dict[str, str] = {
    "Location": "The path of the job.",
    "Retry-After": "Seconds until it is worth trying again.",
    "ETag": "The sha256 of the result, in quotes.",
    "Content-Range": "bytes FIRST-LAST/LENGTH, or bytes */LENGTH.",
    "Nnsight-Job": "The job's id.",
    "Nnsight-Events": "How many `printed` and `token` events the job has.",
}

EVERYWHERE = {
    500: refusal("The service failed; its log says how."),
    503: refusal("The service's disk is full, or fails.", "Retry-After"),
}
WITH_KEY = {
    401: refusal("The key is missing or unknown."),
    429: refusal("As many requests of the tenant are being answered as may be at once.", "Retry-After"),
}


def description(operations: Sequence[Operation], version: str) -> Schema:
    """The whole description."""
    paths: dict[str, dict[str, Schema]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nnsight-compiler",
            "version": version,
            "description": "Experiments on neural networks, sent as data to a service that holds the models.",
        },
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(operation: Operation) -> Schema:
    answers = {**EVERYWHERE, **(WITH_KEY if operation.wants_key else {}), **operation.answers}
    found: Schema = {
        "operationId": operation.endpoint.__name__,
        "summary": operation.summary,
        "parameters": [_parameter(name) for name in operation.parameters],
        "responses": {str(status): _answer(answers[status]) for status in sorted(answers)},
    }
    if operation.body:
        found["requestBody"] = {"required": True, "content": {operation.body: {"schema": _bytes()}}}
    if not operation.wants_key:
        found["security"] = []
    return found


def _parameter(name: str) -> Schema:
    place, schema, text = PARAMETERS[name]
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": text}


def _answer(answer: Answer) -> Schema:
    found: Schema = {"description": answer.meaning}
    if answer.content:
        found["content"] = {
            kind: {"schema": _named(schema) if schema else _bytes() if kind == OCTETS else TEXT}
            for kind, schema in answer.content
        }
    if answer.headers:
        found["headers"] = {name: {"schema": TEXT, "description": HEADERS[name]} for name in answer.headers}
    return found


def _bytes() -> Schema:
    return {"type": "string", "contentMediaType": OCTETS}
