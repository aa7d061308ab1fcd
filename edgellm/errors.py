"""Every error that edgellm raises on purpose, with the exit code of the command line.

EdgeError                      1   root; never raised itself
├── UsageError                 2   an option that cannot be understood or contradicts another
│   └── UnknownGrid            2   no grid of that name (the nearest names are in the message)
├── SourceError                3   the input model is missing, damaged or unsafe
│   ├── TensorError            3   one tensor of it: missing, wrong shape or dtype, NaN or Inf
│   ├── AdapterError           3   an adapter that is damaged, matches nothing, or has another base
│   └── HubError               3   the Hub could not give the model, or take the artifact
├── UnsupportedModel           4   an architecture, feature or config key that is not understood
│   └── UnsupportedTokenizer   4   a tokenizer that would not survive the conversion
├── UnsupportedTarget          5   this grid, container or runtime cannot hold or run that model
├── RuntimeMissing             6   a library is not installed (the message has the command)
├── OutputError                7   the output exists, is not writable, or the disk is full
├── VerificationError          8   a checksum, the parity or the check after conversion failed
└── GenerationError            9   running failed: context full, out of memory, backend error

A message says what, got, allowed and the next step. Library code raises these and never prints
or exits; only ``edgellm.cli`` turns them into text and an exit code.
"""

from __future__ import annotations


class EdgeError(Exception):
    """Root of all errors raised on purpose; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UsageError(EdgeError):
    """An option or argument that cannot be understood, or that contradicts another."""

    exit_code = 2


class ContextTooLong(UsageError):
    """A context of more tokens than the model was made for, or of none.

    ``advice``: what to choose instead; who asked in other words gives advice in them.
    """

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}: {advice}")
        self.problem = problem


class UnknownGrid(UsageError):
    """No grid, mixture or solver of that name."""


class SourceError(EdgeError):
    """The input model is missing, damaged or unsafe to read."""

    exit_code = 3


class TensorError(SourceError):
    """One tensor of the input is missing, has a wrong shape or dtype, or holds NaN or Inf."""


class AdapterError(SourceError):
    """An adapter that is damaged or incomplete, matches no weight, or belongs to another base."""


class HubError(SourceError):
    """The Hub could not give a model, or take an artifact: not found, gated, offline, damaged."""


class UnsupportedModel(EdgeError):
    """An architecture, feature or config key that edgellm does not understand."""

    exit_code = 4


class UnsupportedTokenizer(UnsupportedModel):
    """A tokenizer that the container cannot express, or that would split text differently."""


class UnsupportedTarget(EdgeError):
    """The chosen grid, container or runtime cannot hold or run this model."""

    exit_code = 5


class RuntimeMissing(EdgeError):
    """A library that is needed is not installed; the message holds the command that installs it."""

    exit_code = 6


class OutputError(EdgeError):
    """The output exists already, is not writable, or the disk is full."""

    exit_code = 7


class VerificationError(EdgeError):
    """A checksum, the tokenizer parity or the check after conversion failed."""

    exit_code = 8


class GenerationError(EdgeError):
    """Running failed: the context is full, memory ran out, or the backend reported an error."""

    exit_code = 9
