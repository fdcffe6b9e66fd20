"""The compiled loop of generation.

    ring      one turn of the ring of devices; `program` the whole as one program
    books     what is known of each row: lengths, draws, stops
    cache     keys and values; `branches` a device's own stage

Read `ring` first.
"""
