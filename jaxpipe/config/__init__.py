"""A run as a value: what `jaxpipe train FILE` reads.

    sections  one frozen dataclass per section: keys, defaults, rules
    run       all sections together, read from TOML and written back
    toml      TOML and ``key=value`` to typed values; `keys` names of arguments as keys
    reference every key with its meaning, bounds and default

Read `sections` first.
"""
