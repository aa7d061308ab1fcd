"""Measurements of edgellm against its peers; `python -m benchmarks --help` says how to run them.

Nothing of this ships with the package. The process that measures imports the standard library
alone: a child's peak memory can never read lower than its parent's (see ``measure.run``).
"""
