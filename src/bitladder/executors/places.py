"""Executors by the words of the command line: ``--on`` and ``--device``."""

from __future__ import annotations

from bitladder.errors import UsageError
from bitladder.executors.base import Executor
from bitladder.executors.needs import parse_needs

LOCAL = "local"
RAY = "ray"


def devices_named(text: str) -> tuple[str, ...]:
    """``"cuda:0,cuda:1"`` as devices; one that is named twice has two lanes.

    Raises:
        UsageError: none is named.
    """
    found = tuple(one.strip() for one in text.split(",") if one.strip())
    if not found:
        raise UsageError("No --device is named.", do="For example cpu, cuda, or cuda:0,cuda:1.")
    return found


def own_device(executor: Executor | None, device: str) -> str:
    """Where this process computes what is no unit: on the first device that it was given, if it was given any."""
    return devices_named(device)[0] if executor is None or executor.here else "cpu"


def executor_of(on: str, device: str, unit_needs: str = "") -> Executor | None:
    """Where units are computed; None for right here, one after another.

    Args:
        on: ``local``, ``ray``, or an address as Ray reads it.
        device: of ``devices_named``.
        unit_needs: of ``parse_needs``.

    Raises:
        UsageError: no such place, Ray is not installed or another version, options that exclude each other.
        ClusterError: the cluster does not answer.
    """
    devices = devices_named(device)
    if on == LOCAL:
        if unit_needs:
            raise UsageError("--unit-needs is for a cluster.", do="Name one with --on ray, or leave it out.")
        if len(devices) == 1:
            return None
        from bitladder.executors.devices import Devices

        return Devices(devices)
    if len(devices) > 1:
        raise UsageError(
            f"--device {device} names several devices, and --on {on} a cluster.",
            means="On a cluster Ray hands out the devices: each unit gets one.",
            do="Give --device cuda (or cpu) with --on, and --unit-needs GPU=0.5 for two units on a GPU.",
        )
    needs = parse_needs(unit_needs)
    if on not in (RAY, "auto") and ":" not in on:
        raise UsageError(
            f"--on {on} is no place to compute.",
            do="It is local, ray (a cluster on this machine, or that RAY_ADDRESS names), or an address as Ray reads "
            "it: auto, HOST:6379, ray://HOST:10001.",
        )
    from bitladder.executors.on_ray import connect

    return connect(None if on == RAY else on, devices[0], needs)
