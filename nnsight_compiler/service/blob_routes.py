"""Tensors that are sent once, and named in jobs by the hash of their file."""

from __future__ import annotations

import asyncio
import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nnsight_compiler.service.arrived import check_blob
from nnsight_compiler.service.front_end import FrontEnd
from nnsight_compiler.service.records import StoredBytesError
from nnsight_compiler.service.refusals import Refusal
from nnsight_compiler.service.tenants import Tenant

SHA256 = re.compile(r"[0-9a-f]{64}")


async def keep_blob(request: Request) -> Response:
    """PUT /v1/blobs/{sha256}: a safetensors file with one tensor, `tensor`. 200 where it is there already."""
    front: FrontEnd = request.app.state.front
    tenant: Tenant = request.state.tenant
    sha256 = _sha256(request)
    front.check_ready()
    async with front.arrivals.received(request, front.most(tenant)) as body:
        if body.sha256 != sha256:
            text = f"the body has the hash {body.sha256}, not the one that the path names"
            raise Refusal(422, "other_hash", text)
        check_blob(body.content)
        staged = await asyncio.to_thread(front.store.stage, body.content, small=False)
        try:
            created = await front.call(front.store.put_blob, tenant, sha256, staged)
        except StoredBytesError as error:
            raise Refusal(413, "stored_bytes", str(error)) from None
    return JSONResponse({"sha256": sha256, "bytes": body.bytes}, 201 if created else 200)


async def has_blob(request: Request) -> Response:
    """HEAD /v1/blobs/{sha256}: 200 where the tenant has uploaded it and it is still kept, else 404."""
    front: FrontEnd = request.app.state.front
    path = await front.call(front.store.blob_path, request.state.tenant, _sha256(request))
    if path is None:
        raise Refusal(404, "no_such_blob", "there is no such upload, or it is no longer kept")
    return Response(status_code=200)


def _sha256(request: Request) -> str:
    sha256: str = request.path_params["sha256"]
    if not SHA256.fullmatch(sha256):
        raise Refusal(400, "bad_request", "a blob is named by a sha256 of 64 digits, 0 to 9 and a to f")
    return sha256
