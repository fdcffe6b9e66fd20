"""Requests that join and leave while others run.

    engine       the thread that drives the ring
    handle       a request, and its pieces as they come
    meter        rates and latencies
    text         tokens to text; `text_stream` piece by piece

Read `engine` first.
"""
