"""The HTTP API: TWAPs by wallet and time, one TWAP, health (spec 004, section 7)."""

from __future__ import annotations

import json
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer

from hlcli import __version__, sqlfiles
from hlcli.serve.models import Health, LastIngested, Problem, TwapId, TwapRows, Twaps, TwapsQuery, iso
from hlcli.serve.pool import Pool, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import ASGIApp, Receive, Scope, Send

    from hlcli.settings import Settings

_OPEN = "/healthz"
_JSON = "application/json"
LISTS = {
    by: f"with found as (\n{sqlfiles.query('twaps_api', by)}\n)\n{sqlfiles.query('twaps_api', 'page')}"
    for by in ("event", "created", "active")
}
_UNAVAILABLE: dict[int | str, dict[str, Any]] = {
    503: {"model": Problem, "description": "The database cannot answer now, or not in time"}
}
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "No such TWAP"}}
_UNAUTHORIZED: dict[int | str, dict[str, Any]] = {401: {"model": Problem, "description": "No valid token"}}


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application; its pool of connections opens and closes with its lifespan.

    Raises ConfigError for a malformed DATABASE_URL.
    """
    pool = Pool(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with pool.connections:
            yield

    app = FastAPI(
        title="hlcli",
        version=__version__,
        description="Hyperliquid's TWAP orders. Decimal numbers are text, digit for digit; times are UTC.",
        lifespan=lifespan,
    )
    app.state.pool = pool
    app.add_exception_handler(UnavailableError, _unavailable)
    app.add_exception_handler(Exception, _bug)
    if settings.api_token:
        app.add_middleware(_Token, token=settings.api_token)
        # The middleware decides, for /docs, too; this tells readers of /openapi.json.
        told = HTTPBearer(auto_error=False, description="API_TOKEN of the server")
        app.include_router(_twaps, dependencies=[Depends(told)], responses=_UNAUTHORIZED)
    else:
        app.include_router(_twaps)
    app.include_router(_health)
    return app


_twaps = APIRouter(prefix="/api/v1", tags=["twaps"])
_health = APIRouter(tags=["health"])


# The answers are returned as text that the database made: declared, but not built a second time, by the models.
@_twaps.get("/twaps", response_model=Twaps, responses=_UNAVAILABLE)
async def list_twaps(request: Request, asked: Annotated[TwapsQuery, Query()]) -> Response:
    """TWAPs of a wallet in a range of time, newest first."""
    row = await request.app.state.pool.one(LISTS[asked.by], dict(asked))
    head = json.dumps({"wallet": asked.wallet, "start": iso(asked.start), "end": iso(asked.end)})
    return Response(f'{head[:-1]}, "twaps": {row[0]}}}', media_type=_JSON)


@_twaps.get("/twaps/{twap_id}", response_model=TwapRows, responses=_UNAVAILABLE | _UNKNOWN)
async def show_twap(request: Request, twap_id: TwapId) -> Response:
    """All rows of one TWAP, oldest first."""
    row = await request.app.state.pool.one(sqlfiles.query("twaps_api", "twap"), {"twap_id": twap_id})
    if row[0] is None:
        return JSONResponse({"detail": f"there is no TWAP {twap_id}"}, 404)
    return Response(f'{{"twap_id": "{twap_id}", "rows": {row[0]}}}', media_type=_JSON)


@_health.get(_OPEN, response_model=Health, responses={503: {"model": Health, "description": "No database"}})
async def health(request: Request) -> Response:
    """Whether the database answers, and the object of TWAP statuses that was read last. Needs no token."""
    try:
        row = await request.app.state.pool.one(sqlfiles.query("twaps_api", "last_ingested"), {})
    except UnavailableError:
        found, code = Health(status="error", database="unavailable", last_ingested=None), 503
    else:
        last = (
            LastIngested.model_validate(dict(zip(LastIngested.model_fields, row, strict=True)))
            if row
            else None
        )
        found, code = Health(status="ok", database="ok", last_ingested=last), 200
    return Response(found.model_dump_json(), code, media_type=_JSON)


async def _unavailable(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "1"})


async def _bug(_: Request, __: Exception) -> Response:
    return JSONResponse({"detail": "internal error"}, 500)  # the server's log has the traceback


class _Token:
    """Lets nobody past without the token, but for the one path that monitoring asks."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == _OPEN or self._shown(scope):
            await self.app(scope, receive, send)
            return
        answer = JSONResponse({"detail": "a valid token is needed"}, 401, {"WWW-Authenticate": "Bearer"})
        await answer(scope, receive, send)

    def _shown(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(token.strip(), self.token)
