"""Check the session that a class of a task is made with."""

from __future__ import annotations

from loradeploy.errors import UsageError, shown
from loradeploy.runtime.session import AdapterSession


def check_session(session: object, user: str) -> None:
    """Raise UsageError unless `session` is an AdapterSession; `user` is the class that takes it."""
    if not isinstance(session, AdapterSession):
        what = shown(session)
        made = f": give {user}(AdapterSession({what}))" if isinstance(session, str) else ""
        raise UsageError(f"{user} takes an AdapterSession, not {what}{made}")


def check_task(session: AdapterSession, task: str, why: str) -> None:
    """Raise UsageError unless the session's bundle is for `task`; `why`: ends the message."""
    if session.manifest.task != task:
        raise UsageError(f"{session.path} is a {session.manifest.task} bundle{why}")
