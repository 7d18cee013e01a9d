"""Which way a pair's KV travels."""

import pytest

from shared.transfer.choice import End, chosen

_GPU, _OTHER = "cuda:GPU-1", "cuda:GPU-2"


@pytest.mark.parametrize(
    ("sender", "receiver", "expected"),
    [
        # Nobody asks: ZeroMQ, whatever the devices.
        (End("auto", "h", "cpu"), End("auto", "h", "cpu"), None),
        (End("auto", "h", _GPU), End("auto", "h", _OTHER), None),
        (End("zmq", "h", "cpu"), End("gloo", "h", "cpu"), None),
        (End("gloo", "h", "cpu"), End("zmq", "h", "cpu"), None),
        (End("gloo", "h", "cpu"), End("auto", "h", "cpu"), None),
        # Both ask, on one host.
        (End("gloo", "h", "cpu"), End("gloo", "h", "cpu"), "gloo"),
        (End("gloo", "h", _GPU), End("gloo", "h", "cpu"), "gloo"),
        (End("nccl", "h", _GPU), End("nccl", "h", _OTHER), "nccl"),
        # Each for another.
        (End("gloo", "h", _GPU), End("nccl", "h", _OTHER), None),
        (End("nccl", "h", _GPU), End("gloo", "h", _OTHER), None),
        # NCCL without two GPUs.
        (End("nccl", "h", _GPU), End("nccl", "h", _GPU), None),
        (End("nccl", "h", "cpu"), End("nccl", "h", _GPU), None),
        (End("nccl", "h", _GPU), End("nccl", "h", "cpu"), None),
        # Never off the host, and never where the host is not known.
        (End("gloo", "h", "cpu"), End("gloo", "i", "cpu"), None),
        (End("nccl", "h", _GPU), End("nccl", "i", _OTHER), None),
        (End("gloo", "", "cpu"), End("gloo", "", "cpu"), None),
    ],
)
def test_the_choice(sender: End, receiver: End, expected: str | None) -> None:
    assert chosen(sender, receiver) == expected
