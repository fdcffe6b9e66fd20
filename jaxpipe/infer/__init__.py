"""Generation through the pipeline: all of it in one XLA program, or as an engine that requests join and leave.

    generator   `Generator`, the entry point for whole batches; `load` makes one from a checkpoint
    model       a model's layers as the ring calls them; `weights` where its arrays lie; `few_rows` products of few rows
    sampling    from logits to a token
    loop/       the compiled loop
    serving/    the engine
    bench       tokens per second against a plain loop

Read `generator` first.
"""

from jaxpipe.errors import QueueFullError
from jaxpipe.infer.generator import Completion, Generated, Generator, generate
from jaxpipe.infer.sampling import Sampling
from jaxpipe.infer.serving.engine import Engine
from jaxpipe.infer.serving.handle import Handle, Piece, Request, RequestError

__all__ = [
    "Completion",
    "Engine",
    "Generated",
    "Generator",
    "Handle",
    "Piece",
    "QueueFullError",
    "Request",
    "RequestError",
    "Sampling",
    "generate",
]
