"""What clients are told when a request cannot be answered: a status and OpenAI's JSON form of an error."""

from typing import Any

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Problem(Exception):
    """A request that gets an error for an answer.

    Args:
        status: The HTTP status.
        message: One line for the client: rule, received value, nearest valid choice.
        param: The option that is wrong.
        code: A word for programs.
        retry_after_s: After how many seconds the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    def body(self) -> dict[str, Any]:
        """OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def engine_failed(error: BaseException) -> Problem:
    """What is answered once the engine has died. Errors of XLA go over many lines; the first says what happened."""
    said = str(error).splitlines() or [type(error).__name__]
    return Problem(503, f"the engine failed: {said[0]}", code="engine_failed")
