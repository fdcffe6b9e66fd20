"""Generation through the pipeline."""

from jaxpipe.infer.generator import Completion, Generated, Generator, generate
from jaxpipe.infer.sampling import Sampling

__all__ = ["Completion", "Generated", "Generator", "Sampling", "generate"]
