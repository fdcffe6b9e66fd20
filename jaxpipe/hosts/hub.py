"""What process 0 decides for all: whether they fit together, where they stop, and why they end.

A state machine with no sockets and no clock: a message of one process goes in, messages to all come out.

Stopping at one step, as JAX's own sync point for preemption does it: once a process wants to stop, all are asked how
many steps they have begun, and begin no other until the answer is there: the largest of these numbers. A process that
waits inside step n for the others is not in the way, for the others are still to begin step n, and will.
"""

from typing import Any

from jaxpipe.hosts.line import Kinds, Message, is_message

REPORTS: Kinds = {
    "beat": {},
    "facts": {"name": str, "facts": dict},
    "stop": {"signal": str},
    "begun": {"steps": int},
    "failed": {"text": str, "code": int},
    "done": {},
}
"""What processes tell process 0."""


class Hub:
    """Decides for `count` processes.

    Args:
        hosts: Of all processes, by number.
    """

    def __init__(self, hosts: dict[int, str]):
        self._hosts = hosts
        self._facts: dict[str, dict[int, dict[str, Any]]] = {}
        self._wanted: str | None = None
        self._begun: dict[int, int] = {}
        self._done: set[int] = set()
        self.ended = False

    def handle(self, number: int, message: Message) -> list[Message]:
        """What all are told because process `number` sent a message."""
        if not is_message(message, REPORTS):
            return self.lost(number, "sent what is no message")
        kind = message["kind"]
        if self.ended or kind == "beat":
            return []
        if kind == "facts":
            return self._compare(number, message["name"], message["facts"])
        if kind == "stop":
            return self._ask(f"{message['signal']} on {self.name(number)}")
        if kind == "begun":
            return self._agree(number, message["steps"])
        if kind == "failed":
            return self._end(f"{self.name(number)}: {message['text']}", message["code"])
        self._done.add(number)
        self.ended = len(self._done) == len(self._hosts)
        return [{"kind": "bye"}] if self.ended else []

    def lost(self, number: int, why: str) -> list[Message]:
        """What all are told because nothing comes from a process any more."""
        return [] if self.ended else self._end(f"{self.name(number)} {why}", 1)

    def name(self, number: int) -> str:
        """What messages call a process."""
        return f"process {number} ({self._hosts[number]})"

    def reported(self, name: str) -> set[int]:
        """Who has sent its facts of that name."""
        return set(self._facts.get(name, ()))

    def _compare(self, number: int, name: str, facts: dict[str, Any]) -> list[Message]:
        known = self._facts.setdefault(name, {})
        known[number] = facts
        if len(known) < len(self._hosts):
            return []
        text = differences(known, self.name)
        return self._end(text, 2) if text else [{"kind": "agreed", "name": name}]

    def _ask(self, wanted: str) -> list[Message]:
        if self._wanted is not None:
            return []
        self._wanted = wanted
        return [{"kind": "ask"}]

    def _agree(self, number: int, steps: int) -> list[Message]:
        self._begun[number] = steps
        if len(self._begun) < len(self._hosts):
            return []
        return [{"kind": "last", "step": max(self._begun.values()), "why": self._wanted}]

    def _end(self, text: str, code: int) -> list[Message]:
        self.ended = True
        return [{"kind": "end", "text": text, "code": code}]


def differences(facts: dict[int, dict[str, Any]], name=lambda number: f"process {number}", most: int = 3) -> str:
    """What is not the same in all processes, with both values; empty if all is.

    Example:
        >>> differences({0: {"jax": "0.10.2", "train.steps": 9}, 1: {"jax": "0.10.2", "train.steps": 8}})
        'train.steps must be the same in all processes: 9 on process 0, 8 on process 1'
    """
    found = []
    keys = dict.fromkeys(key for own in facts.values() for key in own)
    for key in keys:
        others = [number for number in sorted(facts) if facts[number].get(key) != facts[0].get(key)]
        if others:
            values = f"{_value(facts[0], key)} on {name(0)}, {_value(facts[others[0]], key)} on {name(others[0])}"
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            found.append(f"{key} must be the same in all processes: {values}{more}")
    if len(found) > most:
        found[most:] = [f"and {len(found) - most} more"]
    return "; ".join(found)


def _value(facts: dict[str, Any], key: str) -> str:
    return str(facts.get(key, "nothing"))
