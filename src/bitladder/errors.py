"""Every error a user can meet.

    BitladderError                  exit 1   anything of ours
      UsageError                    exit 2   the command line or an argument is wrong
        UnknownLevel                exit 2   no level has this name
        BadInput                    exit 2   a file, folder, text or workload cannot be used
          BadFile                   exit 2   a model file is truncated, lies or is hostile
          BadWeights                exit 2   a tensor holds NaN or infinity
          UnknownArchitecture       exit 2   no rows for this model family
          BadWorkload               exit 2   a workload file has a fault, with its line
          TooShort                  exit 2   a text makes no window of tokens
      NothingFits                   exit 3   no level fits the machine
      BarNotMet                     exit 4   no level holds the quality bar
      ImplementationsPart           exit 4   a self-check found that two ways of computing a model differ
      EngineError                   exit 8   the engine did not start, died or answered nonsense
        EngineGone                  exit 8   its process ended, or nobody listens at its address
          ModelRefused              exit 8   it ended while it loaded the model, and not for want of memory
        EngineTimeout               exit 8   no word from it in time
        EngineReply                 exit 8   no completion came: an error status, broken JSON, a stream cut short
        WrongModel                  exit 8   it serves another model than the one asked for
      ClusterError                  exit 8   the cluster is not there, or lost what it was computing for good
      OutputError                   exit 6   no space, no permission, cannot write
      FetchError                    exit 7   a download failed or its hash differs

5 is the gate's: the evidence cannot tell.

A message has three parts: what was found (both numbers), what it usually means, what to do.
"""

from __future__ import annotations


class BitladderError(Exception):
    """An error with a message for the user.

    ``found`` says what is wrong, with the values that show it; ``means`` what that usually means; ``do`` what to do.
    """

    exit_code = 1

    def __init__(self, found: str, *, means: str = "", do: str = "") -> None:
        super().__init__(found)
        self.found = found
        self.means = means
        self.do = do

    def __str__(self) -> str:
        return "\n".join(part for part in (self.found, self.means, self.do) if part)


class UsageError(BitladderError):
    """The command line or an argument is wrong."""

    exit_code = 2


class UnknownLevel(UsageError):
    """No level has this name."""


class BadInput(UsageError):
    """A file, folder, text or workload cannot be used."""


class BadFile(BadInput):
    """A model file is truncated, contradicts itself or is hostile."""


class BadWeights(BadInput):
    """A tensor holds NaN or infinity."""


class UnknownArchitecture(BadInput):
    """No rows describe this model family."""


class BadWorkload(BadInput):
    """A workload file has a fault."""


class TooShort(BadInput):
    """A text makes no window of tokens."""


class NothingFits(BitladderError):
    """No level fits the machine."""

    exit_code = 3


class BarNotMet(BitladderError):
    """No level holds the quality bar."""

    exit_code = 4


class ImplementationsPart(BitladderError):
    """Two ways of computing one model differ by more than rounding explains."""

    exit_code = 4


class EngineError(BitladderError):
    """The engine did not start, died or answered nonsense."""

    exit_code = 8


class EngineGone(EngineError):
    """The engine's process ended, or nobody listens at its address."""


class ModelRefused(EngineGone):
    """The engine ended while it loaded the model, and not for want of memory: it does not run this file.

    ``reason`` is the line of its last words that says why, without the places in its code.
    """

    def __init__(self, found: str, *, means: str = "", do: str = "", reason: str = "") -> None:
        super().__init__(found, means=means, do=do)
        self.reason = reason


class EngineTimeout(EngineError):
    """No word from the engine in time."""


class EngineReply(EngineError):
    """The engine's reply is no completion: an error status, broken JSON, a stream cut short."""


class WrongModel(EngineError):
    """The engine serves another model than the one asked for."""


class ClusterError(BitladderError):
    """The cluster that should compute is not there, has no node that can, or lost a unit for good."""

    exit_code = 8


class OutputError(BitladderError):
    """No space, no permission, or another reason a result cannot be written."""

    exit_code = 6


class FetchError(BitladderError):
    """A download failed, or what arrived has another hash than promised."""

    exit_code = 7
