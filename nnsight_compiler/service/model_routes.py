"""The models that are served: what a client needs to write experiments for them without their weights."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nnsight_compiler.service.engine import Data
from nnsight_compiler.service.front_end import FrontEnd
from nnsight_compiler.service.refusals import Refusal, not_ready

LARGE = ("modules", "tokenizer")
"""The parts of a description that have paths of their own."""


async def list_models(request: Request) -> Response:
    """GET /v1/models: each model in a few words."""
    found = _front(request).models.values()
    return JSONResponse({"models": [_brief(model) for model in found]})


async def show_model(request: Request) -> Response:
    """GET /v1/models/{name}: its description, with its config."""
    model = _model(request)
    return JSONResponse({name: value for name, value in model.items() if name not in LARGE})


async def show_modules(request: Request) -> Response:
    """GET /v1/models/{name}/modules: its tree of modules."""
    return JSONResponse({"modules": _model(request).get("modules", [])})


async def show_tokenizer(request: Request) -> Response:
    """GET /v1/models/{name}/tokenizer: the files of its tokenizer, in base64."""
    files = _model(request).get("tokenizer")
    if not files:
        raise Refusal(404, "no_tokenizer", "this model has no tokenizer")
    return JSONResponse({"files": files})


def _brief(model: Data) -> Mapping[str, object]:
    return {name: value for name, value in model.items() if isinstance(value, (str, int, float))}


def _front(request: Request) -> FrontEnd:
    front: FrontEnd = request.app.state.front
    if not front.models:
        raise not_ready("the models are being loaded")
    return front


def _model(request: Request) -> Data:
    models = _front(request).models
    name = request.path_params["name"]
    if name not in models:
        raise Refusal(404, "no_such_model", f"this service has no model {name!r}; it has: {', '.join(models)}")
    return models[name]
