"""Tapes: fingerprints of what makes each update of a training run, by the plugin `tape` or by `record`."""
from loopctl.tape.recording import record

__all__ = ["record"]
