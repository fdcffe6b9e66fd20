"""A pipeline inside somebody else's gradient: `sweeps` runs blocks forwards and backwards, `sweep_loops` are their
loops, `derivatives` is the rule of `Pipeline.loss`.
"""
