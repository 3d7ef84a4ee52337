"""Every path and method of the service in one table, with what it answers: it makes the routes and the description."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import final

from starlette.requests import Request
from starlette.responses import Response

from nnsight_compiler.service import blob_routes, event_routes, health_routes, job_routes, model_routes, result_routes

JSON, OCTETS, EVENTS, TEXT = "application/json", "application/octet-stream", "text/event-stream", "text/plain"

Endpoint = Callable[[Request], Awaitable[Response]]


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """One status: what it means, and what its body is: a schema of `openapi.SCHEMAS` by name, or bytes of a type."""

    meaning: str
    content: tuple[tuple[str, str], ...] = ()
    headers: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `wants_key` is False for what a load balancer reads."""

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    answers: Mapping[int, Answer]
    parameters: tuple[str, ...] = ()
    body: str = ""
    wants_key: bool = field(default=True)


def refusal(meaning: str, *headers: str) -> Answer:
    """An answer that is an error."""
    return Answer(meaning, ((JSON, "Error"),), headers)


def data(meaning: str, schema: str, *headers: str) -> Answer:
    """An answer in JSON."""
    return Answer(meaning, ((JSON, schema),), headers)


NO_JOB = refusal("There is no such job, or it is another tenant's.")
BAD = refusal("A parameter or a header cannot be read.")
LATER = refusal(
    "Nothing is taken now: the models are being loaded, the disk is full, or the service stops.", "Retry-After"
)
TOO_LARGE = refusal("The body is larger than allowed, by its declared length or by what arrived.")
NO_LENGTH = refusal("Neither Content-Length nor chunks.")
TOO_SLOW = refusal("The body did not arrive in time.")
ENCODED = refusal("The body is compressed.")
NO_MODEL = refusal("There is no such model.")

OPERATIONS = (
    Operation(
        "POST",
        "/v1/jobs",
        job_routes.send_job,
        "Send a job: it is checked, and queued for good before this answers; with `wait`, perhaps with the result.",
        {
            200: Answer(
                "The job was known by its idempotency key, or has ended within `wait`: its result where it completed "
                "(Nnsight-Events then counts what it printed and the tokens it made, to be read from its events), "
                "else the job.",
                ((OCTETS, ""), (JSON, "Job")),
                ("Location", "ETag", "Nnsight-Job", "Nnsight-Events"),
            ),
            202: data("The job is queued.", "Job", "Location"),
            400: refusal("The body is no job, or a parameter or a header cannot be read."),
            408: TOO_SLOW,
            409: refusal("The idempotency key stands for another job."),
            410: refusal("The job has completed, and its result is no longer kept."),
            411: NO_LENGTH,
            413: TOO_LARGE,
            415: ENCODED,
            422: refusal(
                "The job is not admitted: `where` and `op` say at which line; `missing` names uploads to be made."
            ),
            429: refusal(
                "As many jobs wait as may, or as many requests of the tenant are being answered.", "Retry-After"
            ),
            503: LATER,
        },
        ("wait", "Idempotency-Key"),
        OCTETS,
    ),
    Operation(
        "GET",
        "/v1/jobs/{id}",
        job_routes.show_job,
        "How a job stands; with `wait`, once it has ended.",
        {200: data("The job.", "Job"), 400: BAD, 404: NO_JOB},
        ("id", "wait"),
    ),
    Operation(
        "DELETE",
        "/v1/jobs/{id}",
        job_routes.cancel_job,
        "Cancel a job.",
        {
            200: data("It waited, and is cancelled; or it had ended before.", "Job"),
            202: data("It is cancelled; what ran of it is being ended.", "Job"),
            404: NO_JOB,
        },
        ("id",),
    ),
    Operation(
        "GET",
        "/v1/jobs/{id}/events",
        event_routes.follow_events,
        "What happens to a job, until it has ended: queued, running, printed, token, progress, truncated, done.",
        {
            200: Answer("Server-sent events, numbered from 1; comments are signs of life.", ((EVENTS, ""),)),
            204: Answer("The last event has been received before: there is nothing to come again for."),
            400: BAD,
            404: NO_JOB,
        },
        ("id", "Last-Event-ID"),
    ),
    Operation(
        "GET",
        "/v1/jobs/{id}/result",
        result_routes.fetch_result,
        "The result of a completed job, a safetensors file; with `wait`, once it has ended.",
        {
            200: Answer("The result.", ((OCTETS, ""),), ("ETag",)),
            206: Answer("The range that was asked for.", ((OCTETS, ""),), ("ETag", "Content-Range")),
            304: Answer("It is the one that the client has.", (), ("ETag",)),
            400: BAD,
            404: NO_JOB,
            409: refusal("The job has not ended, or ended without a result."),
            410: refusal("The result is no longer kept."),
            416: refusal("There is nothing in that range.", "Content-Range"),
        },
        ("id", "wait", "Range", "If-Range", "If-None-Match"),
    ),
    Operation(
        "PUT",
        "/v1/blobs/{sha256}",
        blob_routes.keep_blob,
        "Upload a tensor that jobs name by hash: a safetensors file with one tensor, `tensor`.",
        {
            200: data("It was there before.", "Blob"),
            201: data("It is kept.", "Blob"),
            400: refusal("The name is no sha256, or the body no file with one tensor."),
            408: TOO_SLOW,
            411: NO_LENGTH,
            413: refusal("The body is larger than allowed, or than what is left of the tenant's room."),
            415: ENCODED,
            422: refusal("The body has another hash."),
            503: LATER,
        },
        ("sha256",),
        OCTETS,
    ),
    Operation(
        "HEAD",
        "/v1/blobs/{sha256}",
        blob_routes.has_blob,
        "Whether an upload is still kept.",
        {200: Answer("It is."), 400: Answer("The name is no sha256."), 404: Answer("It is not.")},
        ("sha256",),
    ),
    Operation(
        "GET",
        "/v1/models",
        model_routes.list_models,
        "The models that are served.",
        {200: data("All of them, in a few words each.", "Models"), 503: LATER},
    ),
    Operation(
        "GET",
        "/v1/models/{name}/modules",
        model_routes.show_modules,
        "The modules of a model.",
        {200: data("Its modules.", "Modules"), 404: NO_MODEL, 503: LATER},
        ("name",),
    ),
    Operation(
        "GET",
        "/v1/models/{name}/tokenizer",
        model_routes.show_tokenizer,
        "The files of a model's tokenizer.",
        {
            200: data("Names and contents, these in base64.", "Tokenizer"),
            404: refusal("There is no such model, or it has no tokenizer."),
            503: LATER,
        },
        ("name",),
    ),
    Operation(
        "GET",
        "/v1/models/{name}",
        model_routes.show_model,
        "A model, with its config.",
        {200: data("The model.", "Model"), 404: NO_MODEL, 503: LATER},
        ("name",),
    ),
    Operation(
        "GET",
        "/healthz",
        health_routes.show_health,
        "Whether the service answers.",
        {200: data("It does.", "Status")},
        wants_key=False,
    ),
    Operation(
        "GET",
        "/readyz",
        health_routes.show_readiness,
        "Whether jobs are taken.",
        {200: data("They are.", "Status"), 503: LATER},
        wants_key=False,
    ),
    Operation(
        "GET",
        "/metrics",
        health_routes.show_metrics,
        "Counters, for Prometheus.",
        {200: Answer("All of them.", ((TEXT, ""),))},
    ),
    Operation(
        "GET",
        "/openapi.json",
        health_routes.show_description,
        "This description.",
        {200: Answer("OpenAPI 3.1.", ((JSON, "Description"),))},
    ),
)
