"""Benchmarks: each module measures one promise of the project and prints it beside a baseline from the same run."""
