"""The page at /: static files of the package, which load nothing from other hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastapi import APIRouter
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)
_FILES: Final = Path(__file__).parent.parent / "page"


@router.get("/")
async def page() -> FileResponse:
    """The page's HTML."""
    return FileResponse(_FILES / "index.html")


@router.get("/page.js")
async def script() -> FileResponse:
    """The page's script."""
    return FileResponse(_FILES / "page.js", media_type="text/javascript")


@router.get("/page.css")
async def style() -> FileResponse:
    """The page's stylesheet."""
    return FileResponse(_FILES / "page.css", media_type="text/css")
