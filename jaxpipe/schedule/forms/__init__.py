"""Schedules as text, CSV and JSON, both ways.

    text       the grid that people write, and the choice of a format by a file's name
    grids      who runs what when, as a grid of text
    csv_form   rows of devices, one action a cell
    json_form  everything, costs too
    reading    what all readers check

Read `text` first.
"""
