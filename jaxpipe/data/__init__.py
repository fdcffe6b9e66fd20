"""From files to text and ids of tokens; read `jaxpipe.data.files` first.

What comes in are paths, what goes out are texts as bytes and arrays of ids. `jaxpipe.train` makes batches of them.
"""
