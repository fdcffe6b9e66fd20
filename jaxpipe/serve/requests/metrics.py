"""What the server counts, in Prometheus's text format. Only the event loop's thread counts."""

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Counter:
    """A number that only grows, one for each value of its labels.

    Args:
        name: With the ending ``_total``.
        help: What it counts.
        labels: Names of the labels.
    """

    def __init__(self, name: str, help: str, labels: tuple[str, ...] = ()):
        self.name, self.help, self.labels = name, help, labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, value: float = 1.0, *labels: str):
        """Adds to it."""
        self._values[labels] = self._values.get(labels, 0.0) + value

    def lines(self) -> Iterator[str]:
        """Its lines of the page."""
        yield from _head(self.name, self.help, "counter")
        for labels, value in self._values.items():
            yield _line(self.name, value, dict(zip(self.labels, labels, strict=True)))


class Histogram:
    """How many values fell below some bounds.

    Args:
        name: With its unit at the end.
        help: What is measured.
        bounds: Upper bounds, rising.
    """

    def __init__(self, name: str, help: str, bounds: Iterable[float] = SECONDS):
        self.name, self.help, self.bounds = name, help, (*bounds, math.inf)
        self._counts = [0] * len(self.bounds)
        self._sum = 0.0

    def add(self, value: float):
        """Adds a value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self._sum += value

    def lines(self) -> Iterator[str]:
        """Its lines of the page."""
        yield from _head(self.name, self.help, "histogram")
        below = 0
        for bound, count in zip(self.bounds, self._counts, strict=True):
            below += count
            yield _line(f"{self.name}_bucket", below, {"le": _text(bound)})
        yield _line(f"{self.name}_sum", self._sum)
        yield _line(f"{self.name}_count", below)


class Metrics:
    """All that the server itself counts."""

    def __init__(self):
        self.answers = Counter("jaxpipe_http_answers_total", "Answers by path and status.", ("path", "status"))
        self.ended = Counter("jaxpipe_requests_ended_total", "Ends of admitted requests, by why.", ("why",))
        self.prompt_tokens = Counter("jaxpipe_prompt_tokens_total", "Tokens of prompts taken.")
        self.new_tokens = Counter("jaxpipe_generated_tokens_total", "Tokens generated.")
        self.first_token = Histogram(
            "jaxpipe_time_to_first_token_seconds", "From submission to first token, per request."
        )
        self.whole = Histogram("jaxpipe_request_seconds", "From submission to last token, of requests that ended well.")

    def page(self, numbers: Mapping[str, float]) -> str:
        """The page for Prometheus.

        Args:
            numbers: Others' numbers, by name. Those that only grow end in ``_total``.
        """
        lines = []
        for name, value in numbers.items():
            full = "jaxpipe_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            kind = "counter" if full.endswith("_total") else "gauge"
            lines += [f"# TYPE {full} {kind}", _line(full, value)]
        for part in vars(self).values():
            lines += part.lines()
        return "\n".join(lines) + "\n"


def _head(name: str, help: str, kind: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]


def _line(name: str, value: float, labels: Mapping[str, str] | None = None) -> str:
    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in (labels or {}).items())
    return f"{name}{{{inside}}} {_text(value)}" if inside else f"{name} {_text(value)}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _text(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(float(value))
