"""From a schedule to the table that the compiled loop reads.

In: a verified `Schedule`. Out: a `TickTable`: per tick and device, what each lane does and which slots it uses. Read
`lower` first, then `table`.

    lower     the steps in order
    pack      actions into ticks, one per lane
    lockstep  what a packing takes when all devices wait for the slowest; `timing` when they do not
    slots     numbered buffers, reused once they are free
    table     the columns, and how many bytes their buffers are
    replay    the table run on paper, which checks all of it
"""
