"""HTTP: connections, bodies, replies.

    app   routes; `gate` what happens before any of them; `auth` keys; `body` reading; `reply` and `sse` answering
    run   the server's own life; `connections` how many there are; `pool` threads for what may hang

Read `app` first.
"""
