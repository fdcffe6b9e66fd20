"""Several processes that train one model, each with devices of its own.

Reading order: `place` (which process is this), `line` (messages over TCP), `roll_call` (who is there), `hub` (what
process 0 decides), `crew` (what every process does: start, agree, stop and fail together), `facts` (what must be the
same in all), `launch` (from the command line to a running crew). `agree` asks all processes one
question, `share` divides data among them.
"""

from jaxpipe.hosts.crew import Crew
from jaxpipe.hosts.launch import join, start_jax
from jaxpipe.hosts.place import Place, find_place

__all__ = ["Crew", "Place", "find_place", "join", "start_jax"]
