"""A server with OpenAI's interface for one model; needs the extra `serve`."""

from jaxpipe.errors import ConfigError

try:
    from jaxpipe.infer.server.app import make_app as make_app
    from jaxpipe.infer.server.auth import Auth as Auth
    from jaxpipe.infer.server.limits import Limits as Limits
    from jaxpipe.infer.server.run import Server as Server
    from jaxpipe.infer.server.run import listen_on as listen_on
    from jaxpipe.infer.server.run import url_of as url_of
    from jaxpipe.infer.server.service import Service as Service
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("jaxpipe"):
        raise
    raise ConfigError(f'a server needs {error.name}; try pip install "jaxpipe[serve]"') from error
