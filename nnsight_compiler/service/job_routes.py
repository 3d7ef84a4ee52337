"""Jobs: sending one, looking at it, cancelling it."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nnsight_compiler.service.bodies import Body
from nnsight_compiler.service.engine import RefusedError
from nnsight_compiler.service.front_end import FrontEnd
from nnsight_compiler.service.records import ConflictError, JobRecord, MissingBlobsError, QueueFullError, Submitted
from nnsight_compiler.service.refusals import Refusal, refusal_of, retry
from nnsight_compiler.service.result_routes import result_response
from nnsight_compiler.service.tenants import Tenant
from nnsight_compiler.service.waiting import ENDED, ended, wanted_wait

IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9_.-]{1,128}")


async def send_job(request: Request) -> Response:
    """POST /v1/jobs: checks a job, and puts it into the queue for good before it answers."""
    front: FrontEnd = request.app.state.front
    tenant: Tenant = request.state.tenant
    wait = wanted_wait(request)
    key = _idempotency_key(request)
    front.check_ready()
    submitted = await _received(front, request, key)
    location = {"Location": f"/v1/jobs/{submitted.id}"}
    record = await ended(front, submitted.id, tenant, wait, request)
    if wait and record.status == "completed":
        headers = {**location, "Nnsight-Job": record.id, "Nnsight-Events": str(record.said)}
        return await result_response(request, front, record, headers)
    over = not submitted.created or (wait and record.status in ENDED)
    return JSONResponse(described(record, submitted.place), 200 if over else 202, location)


async def show_job(request: Request) -> Response:
    """GET /v1/jobs/{id}: how a job stands."""
    front: FrontEnd = request.app.state.front
    record = await ended(front, request.path_params["id"], request.state.tenant, wanted_wait(request), request)
    place = await front.call(front.store.place, record.id) if record.status == "queued" else None
    return JSONResponse(described(record, place))


async def cancel_job(request: Request) -> Response:
    """DELETE /v1/jobs/{id}: 202 while a job that runs is being ended, 200 where it has ended."""
    front: FrontEnd = request.app.state.front
    id, tenant = request.path_params["id"], request.state.tenant
    running = await front.cancel(id, tenant)
    return JSONResponse(described(await front.job(id, tenant), None), 202 if running else 200)


def described(record: JobRecord, place: int | None) -> dict[str, object]:
    """A job as JSON; `place` counts where it still waits, and is 0 where it has just been begun."""
    return {
        "id": record.id,
        "status": record.status,
        "place": place or None if record.status == "queued" else None,
        "model": record.model,
        "created": record.created,
        "started": record.started,
        "ended": record.ended,
        "cost": record.cost,
        "error": record.error,
        "result": None if record.result is None else record.result.as_data(),
    }


async def _received(front: FrontEnd, request: Request, key: str | None) -> Submitted:
    """Takes a job in. Its body is nobody's any more when this returns, however long its end is waited for."""
    tenant: Tenant = request.state.tenant
    try:
        async with front.arrivals.received(request, front.most(tenant)) as body:
            return await _submit(front, tenant, body, key)
    except Refusal as refusal:
        front.metrics.refused(refusal.status)
        raise


async def _submit(front: FrontEnd, tenant: Tenant, body: Body, key: str | None) -> Submitted:
    arrived = front.known.arrived(body.content, tenant)
    header = arrived.header
    if header.model not in front.models:
        names = ", ".join(front.models)
        raise Refusal(422, "unknown_model", f"this service has no model {header.model!r}; it has: {names}")
    blobs = {}
    for sha256 in dict.fromkeys(header.blobs.values()):
        blobs[sha256] = await front.call(front.store.blob_path, tenant, sha256)
    if missing := [sha256 for sha256, path in blobs.items() if path is None]:
        raise _unknown_blobs(missing)
    admission = front.known.admission(arrived)
    if admission is None:
        found = {sha256: path for sha256, path in blobs.items() if path is not None}
        try:
            async with front.turns.of(tenant.name):
                admission = await front.engine.admit(body.content, found, tenant.limits)
        except RefusedError as refused:
            raise refusal_of(refused) from None
        front.known.admitted(arrived, admission)
    try:
        return await front.submit(
            tenant,
            body.content,
            model=header.model,
            group=admission.group,
            cost=admission.cost,
            blobs=tuple(blobs),
            idempotency_key=key,
        )
    except QueueFullError as error:
        raise Refusal(429, "queue_full", str(error), headers=retry(error.retry_after)) from None
    except ConflictError as error:
        raise Refusal(409, "idempotency_conflict", str(error)) from None
    except MissingBlobsError as error:
        raise _unknown_blobs(error.missing) from None


def _unknown_blobs(missing: list[str] | tuple[str, ...]) -> Refusal:
    text = "tensors that the job names were not uploaded, or are no longer kept: upload them again, and send it again"
    return Refusal(422, "unknown_blob", text, details={"missing": list(missing)})


def _idempotency_key(request: Request) -> str | None:
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1 or not IDEMPOTENCY_KEY.fullmatch(given[0]):
        raise Refusal(400, "bad_request", "Idempotency-Key is up to 128 letters, digits, '_', '.' and '-'")
    return given[0]
