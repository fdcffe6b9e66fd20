"""Checkpoints: written, found, checked, read, converted. Training and generation both stand on it.

    store    a folder of checkpoints; `meta` what each says about itself; `owned` what is ours to delete; `lock` one run
    at a time
    later    saving arrays that are made one after another
    resume   what a run starts from; `inherit` what it takes over; `folder` the run's own folder
    weights  parameters alone; `convert` from Hugging Face's format and back
    quiet    keeps Orbax from printing

Read `store` first.
"""
