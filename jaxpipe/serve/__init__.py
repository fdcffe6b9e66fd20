"""A server with OpenAI's interface for one model; needs the extra `serve`."""

from jaxpipe.errors import ConfigError

try:
    from jaxpipe.serve.http.app import make_app as make_app
    from jaxpipe.serve.http.auth import Auth as Auth
    from jaxpipe.serve.http.run import Server as Server, listen_on as listen_on, url_of as url_of
    from jaxpipe.serve.requests.limits import Limits as Limits
    from jaxpipe.serve.requests.service import Service as Service
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("jaxpipe"):
        raise
    raise ConfigError(f'a server needs {error.name}; try pip install "jaxpipe[serve]"') from error
