"""What a program holds and does, read off its jaxpr or its compiled text.

    arithmetic  operations of its matrix products
    traffic     bytes that are only moved, per turn
    sizes       bytes of a model's pieces in the loop
    meeting     collectives that not all devices would reach

Read `sizes` first.
"""
