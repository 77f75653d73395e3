"""Whether a recipe's judge can be asked, found out while its plan is made: `plan` informs and never waits long."""

from __future__ import annotations

import os
import threading
import time

from fastconv.errors import FastconvError, JudgeError
from fastconv.run.judging import admitted
from fastconv.judge.claude import CLAUDE_URL
from fastconv.judge.identity import PAID
from fastconv.judge.access import JudgeAccess, check_endpoint, check_reachable, local_key
from fastconv.recipe import JudgeSettings
from fastconv.store.ledger import Store

#: How long a judge has to answer since it was asked, and the least that is waited once the plan is made.
GLANCE_S, LEAST_S = 1.0, 0.1


class JudgeGlance:
    """Asks on creation, in a thread that nobody waits for at the end; `problem` is the line that `run` would stop with.

    Nothing is sent where the recipe or the environment tells already, or where the base itself judges.
    """

    def __init__(self, settings: JudgeSettings, store: Store | None) -> None:
        self._settings = settings
        self._until_s = time.monotonic() + GLANCE_S
        self._thread: threading.Thread | None = None
        self._problem = ""
        paid = settings.mode in PAID
        if not paid and not (settings.mode == "local" and settings.base_url):
            return
        try:
            access = admitted(settings, store) if paid else None
        except FastconvError as error:
            self._problem = str(error)
            return
        where = settings.base_url or CLAUDE_URL
        late = f"no answer within {GLANCE_S:g} s from {where}"
        self._problem = str(JudgeError(late, where="judge", fix="check the network and judge.base_url"))
        # A daemon: looking a name up cannot be cut short, and must not hold up the end of the process.
        self._thread = threading.Thread(target=self._ask, args=(access,), name="judge-glance", daemon=True)
        self._thread.start()

    def problem(self) -> str:
        """Why the judge cannot be asked now, in one line; empty if it can be, or need not be."""
        if self._thread is not None:
            self._thread.join(max(LEAST_S, self._until_s - time.monotonic()))
        return self._problem

    def _ask(self, access: JudgeAccess | None) -> None:
        try:
            if access is not None:
                check_reachable(self._settings, access, GLANCE_S)
            else:
                check_endpoint(self._settings, local_key(os.environ), GLANCE_S)
        except FastconvError as error:
            self._problem = str(error)
        else:
            self._problem = ""
