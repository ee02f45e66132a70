"""The words of the command line, a module an area: each registers its own, and is a few lines over katherine and jobs.
Nothing is decided here."""
