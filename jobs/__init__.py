"""Background runs: a queue on disk, one slot, a detached supervisor, a worker a run."""
