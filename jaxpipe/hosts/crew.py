"""The processes of one run, seen from one of them: they start, stop and fail together.

A thread listens to process 0 (in process 0: to all others). It ends this process when any other has failed or is gone,
even while the main thread waits in a collective for one that will never come: such a wait cannot be interrupted.
"""

import contextlib
import os
import selectors
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from jaxpipe.errors import JaxpipeError
from jaxpipe.hosts.hub import Hub
from jaxpipe.hosts.line import Kinds, Line, LineError, Message, is_message
from jaxpipe.hosts.place import Place

FAILED, INTERRUPTED = 1, 3
NEWS: Kinds = {
    "ask": {},
    "last": {"step": int, "why": str},
    "end": {"text": str, "code": int},
    "agreed": {"name": str},
    "bye": {},
    "beat": {},
}
"""What process 0 tells all."""
_POLL_S = 0.2
_NEWS_S = 5.0
"""How long a process whose collective broke waits to hear that another one is the cause."""


class Crew:
    """What a process has of its crew. Leave the context to part: with an exception, all processes end.

    Args:
        place: Which process this is.
        lines: From `jaxpipe.hosts.roll_call`.
        hosts: Likewise.
        patience_s: How long to wait for others where all must meet.
        silence_s: A process of which nothing is heard for so long is lost.
        exit_code: The exit code of an error.
        leave_process: Ends this process at once, with an exit code.

    Attributes:
        place: As given.
        silence_s: Likewise.
    """

    def __init__(
        self,
        place: Place,
        lines: dict[int, Line],
        hosts: dict[int, str],
        *,
        patience_s: float = 300.0,
        silence_s: float = 60.0,
        exit_code: Callable[[BaseException], int] = lambda error: FAILED,
        leave_process: Callable[[int], Any] = os._exit,
    ):
        self.place = place
        self._lines, self._hub = lines, Hub(hosts) if place.number == 0 else None
        self._names = {number: f"process {number} ({host})" for number, host in hosts.items()}
        self._patience_s, self.silence_s = patience_s, silence_s
        self._exit_code, self._leave_process = exit_code, leave_process
        self._deciding, self._steps = threading.Lock(), threading.Condition()
        self._begun, self._asked, self._last = 0, False, None
        self._wanted: str | None = None
        self._stopped_by: str | None = None
        self._agreed: set[str] = set()
        self._news = threading.Condition()
        self._bye = self._over = False
        self._ending, self._ended = threading.Lock(), threading.Event()
        self._at_end: list[Callable[[], Any]] = []
        self._beat_at = 0.0
        self._thread = threading.Thread(target=self._listen, name="crew", daemon=True)
        self._thread.start()

    @property
    def lead(self) -> bool:
        """Whether this is process 0, the one that writes."""
        return self.place.number == 0

    @property
    def stopped_by(self) -> str | None:
        """Signal and process that ended the run early, once all have agreed on it."""
        return self._stopped_by

    def at_end(self, action: Callable[[], Any]) -> None:
        """Has something done before this process is ended from outside, such as giving the terminal back."""
        self._at_end.append(action)

    def agree(self, name: str, facts: Mapping[str, Any]) -> None:
        """Waits until all have come here, and ends all if their facts differ.

        Args:
            name: The same in all processes.
            facts: JSON values by what messages call them.

        Raises:
            LineError: Some did not come within `patience_s`.
        """
        self._tell({"kind": "facts", "name": name, "facts": dict(facts)})
        patience_s = self._patience_s if self._hub else None  # that of process 0 counts
        if not self._wait_for(lambda: name in self._agreed, patience_s) and self._hub:
            late = [self._names[number] for number in sorted(set(self._names) - self._hub.reported(name))]
            raise LineError(f"{', '.join(late)} did not come as far as {name} within {patience_s:g} s")

    def want_stop(self, signal: str) -> None:
        """Asks all to stop at the next step that they can agree on. Does nothing but note it: for signal handlers."""
        self._wanted = self._wanted or signal

    def reached(self, step: int) -> bool:
        """Whether all stop after `step` steps; if not, the next one may begin. Waits while they agree."""
        with self._steps:
            self._steps.wait_for(lambda: not self._asked or self._last is not None)
            if self._last is not None and step >= self._last:
                return True
            self._begun = max(self._begun, step + 1)
            return False

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._part()
        else:
            self._fail(error)

    def _part(self) -> None:
        """Waits until all are done, so that nobody takes the end of one for a failure."""
        self._tell({"kind": "done"})
        self._wait_for(lambda: self._bye)
        self._thread.join()
        self._close()
        _stop_jax()

    def _wait_for(self, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Waits for news, and goes no further where these are that the process ends."""
        with self._news:
            came = self._news.wait_for(lambda: ready() or self._over, timeout_s)
        if self._over:
            self._ended.wait()
        return came

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            text, code = "stopped by SIGINT", INTERRUPTED
        elif isinstance(error, JaxpipeError):
            text, code = str(error), self._exit_code(error)
        else:
            with self._news:
                self._news.wait_for(lambda: self._over, _NEWS_S)
            if not self._over:
                traceback.print_exception(error)
            text, code = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", FAILED
        self._tell({"kind": "failed", "text": text, "code": code})
        with self._news:
            self._news.wait_for(lambda: self._over, 2 * _NEWS_S)
        self._end(text, code)

    def _tell(self, message: Message) -> None:
        """To process 0, which is maybe this one."""
        if self._hub is None:
            self._lines[0].send(message)
        else:
            with self._deciding:
                news = self._hub.handle(0, message)
            self._spread(news)

    def _spread(self, news: list[Message]) -> None:
        """Process 0: to all, itself last."""
        for message in news:
            for line in self._lines.values():
                line.send(message)
            self._hear(message)

    def _hear(self, message: Message) -> None:
        """News from process 0."""
        kind = message["kind"]
        if kind == "ask":
            with self._steps:
                self._asked = True
                begun = self._begun
            self._tell({"kind": "begun", "steps": begun})
        elif kind == "last":
            with self._steps:
                self._last, self._stopped_by = message["step"], message["why"]
                self._steps.notify_all()
        elif kind == "end":
            self._end(message["text"], message["code"])
        elif kind == "agreed":
            with self._news:
                self._agreed.add(message["name"])
                self._news.notify_all()
        elif kind == "bye":
            with self._news:
                self._bye = True
                self._news.notify_all()

    def _listen(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                for number, line in self._lines.items():
                    selector.register(line, selectors.EVENT_READ, number)
                while not (self._bye or self._over):
                    for key, _ in selector.select(_POLL_S):
                        self._receive(key.data)
                    self._look_around()
        except Exception as error:
            traceback.print_exception(error)
            self._end(f"the thread that listens to other processes failed: {error}", FAILED)

    def _receive(self, number: int) -> None:
        try:
            messages = self._lines[number].receive()
        except LineError:
            self._lost(number, "ended without a word: killed or crashed, its own output may say why")
            return
        for message in messages:
            if self._hub is None and not is_message(message, NEWS):
                self._lost(number, "sent what is no message")
            elif self._hub is None:
                self._hear(message)
            else:
                with self._deciding:
                    news = self._hub.handle(number, message)
                self._spread(news)

    def _look_around(self) -> None:
        """What is due without a message: beats, silence, signals."""
        now = time.monotonic()
        if now - self._beat_at > self.silence_s / 4:
            self._beat_at = now
            for line in self._lines.values():
                line.send({"kind": "beat"})
        for number, line in self._lines.items():
            if now - line.heard > self.silence_s:
                self._lost(number, f"did not answer for {self.silence_s:g} s")
        if self._wanted is not None and not self._asked:
            signal, self._wanted = self._wanted, None
            self._tell({"kind": "stop", "signal": signal})

    def _lost(self, number: int, why: str) -> None:
        if self._hub is None:
            self._hear({"kind": "end", "text": f"{self._names[number]} {why}", "code": FAILED})
        else:
            with self._deciding:
                news = self._hub.lost(number, why)
            self._spread(news)

    def _end(self, text: str, code: int) -> None:
        """Says why, and ends this process without asking any other thread of it."""
        with self._ending:
            if self._over:
                return
            with self._news:
                self._over = True
                self._news.notify_all()
            for action in self._at_end:
                with contextlib.suppress(Exception):
                    action()
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                print(f"jaxpipe: error: {text}", file=sys.stderr, flush=True)
            if self._hub is not None:
                self._wait_for_others()
            self._close()
            self._leave_process(code)
            self._ended.set()

    def _close(self) -> None:
        for line in self._lines.values():
            line.close()

    def _wait_for_others(self, limit_s: float = 3.0) -> None:
        """Lets them read the news before the connections end: a reset would take it from them."""
        end = time.monotonic() + limit_s
        for line in self._lines.values():
            with contextlib.suppress(LineError):
                while time.monotonic() < end:
                    line.receive(end - time.monotonic())


def _stop_jax() -> None:
    """Ends JAX's part, if it was started, while all processes are there to do so."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
