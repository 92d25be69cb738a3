"""Tell an error that only says that another rank is gone from one of this rank's own."""

from __future__ import annotations

# What gloo, NCCL and TCPStore report on ranks that lose a peer. These errors come milliseconds after the peer's own
# failure, or even before a killed peer is noticed, so that the time of an error does not show which rank failed first.
_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "broken pipe",
    "socket closed",
    "recvvalue failed",
    "remote process has terminated",
    "remote process exited",
    "failed to recv, got 0 bytes",
    "timed out waiting",
    "wait timeout",
    "socket timeout",
    "gloo/transport",
    "application timeout caused pair closure",
    "ncclremoteerror",
    "communicator was aborted",
    "monitoredbarrier",
    "distbackenderror",
    "distnetworkerror",
    "diststoreerror",
)


def lost_a_peer(message: str) -> bool:
    """Whether *message* is what a rank reports when a peer died, rather than an error of its own."""
    lowered = message.lower()
    return any(words in lowered for words in _LOST_PEER)
