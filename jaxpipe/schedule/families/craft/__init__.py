"""How the orders of families are made.

    fill     puts W where a device would wait
    greedy   list scheduling under a policy: what `auto` searches with
    halves   the V-shaped placement, as two halves that meet
    stable   a repeating pattern, with its beginning and end

Read `fill` first.
"""
