"""Generation through the pipeline: all of it in one XLA program, or as an engine that requests join and leave."""

from jaxpipe.errors import QueueFullError
from jaxpipe.infer.engine import Engine
from jaxpipe.infer.generator import Completion, Generated, Generator, generate
from jaxpipe.infer.handle import Handle, Piece, Request, RequestError
from jaxpipe.infer.sampling import Sampling

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
