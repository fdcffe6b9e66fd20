"""What all requests share."""

import time
from dataclasses import dataclass, field

from jaxpipe.documents import shown
from jaxpipe.serve.http.body import Room
from jaxpipe.serve.http.pool import Pool
from jaxpipe.serve.requests.desk import Desk
from jaxpipe.serve.requests.limits import Limits
from jaxpipe.serve.requests.metrics import Metrics
from jaxpipe.serve.requests.problem import Problem, engine_failed
from jaxpipe.serve.requests.prompts import Prompts
from jaxpipe.serve.requests.protocol import Engine, Tokenizer


@dataclass
class Service:
    """A model that answers requests.

    Attributes:
        engine: Generates.
        tokenizer: The model's.
        model: The name that clients know it by.
        limits: Of what is taken on.
        stop_ids: Tokens that end an answer.
        source_len: Tokens of a prompt, for an encoder-decoder; else 0.
    """

    engine: Engine
    tokenizer: Tokenizer
    model: str
    limits: Limits
    stop_ids: tuple[int, ...]
    source_len: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self):
        self.desk = Desk(self.limits)
        self.pool = Pool()
        self.room = Room(self.limits)
        self.prompts = Prompts(self.tokenizer, self.limits, self.engine.max_len, self.source_len)

    def check_model(self, name: str | None):
        """Raises Problem 404 for another model than the one there is."""
        if name not in (None, self.model):
            raise Problem(
                404, f"model {shown(name)} is not here; try {self.model!r}", param="model", code="model_not_found"
            )

    def health(self) -> Problem | None:
        """Why no request can be answered, if that is so."""
        if self.engine.error is not None:
            return engine_failed(self.engine.error)
        return self.desk.refusal()

    def page(self) -> str:
        """The page of metrics."""
        engine = {f"engine_{name}": value for name, value in self.engine.metrics().items()}
        up = self.engine.error is None
        return self.metrics.page({"up": up, "requests_in_progress": len(self.desk), **engine})
