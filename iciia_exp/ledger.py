"""Ledger: computations and payloads of a method by phase and site, as stated (budget) and as measured (link).

A method is a schedule of computations at two sites, cloud and device, and of payloads between them. `Budget` states it
in closed form for one client and one request. `Link` passes the payloads on and counts their bytes; it refuses a
payload that the budget does not have. A test compares both for every method.

Phases: ``cloud_once`` before any client, ``client_once`` when a client joins, ``round`` of a training together,
``request`` for every image that is classified. Bytes are those of the payload as sent: numbers times their size,
without compression or protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

__all__ = [
    *("KINDS", "PHASES", "SITES", "Budget", "Line", "Link", "Phase", "Site", "Sizes"),
    *("added_up", "payload_bytes", "serve", "total"),
]

Phase = Literal["cloud_once", "client_once", "round", "request"]
Site = Literal["cloud", "device"]

PHASES: tuple[Phase, ...] = ("cloud_once", "client_once", "round", "request")
SITES: tuple[Site, ...] = ("cloud", "device")

#: Kinds of payloads.
KINDS = ("weights", "features", "tokens", "logits", "images", "labels", "states", "id", "prompt", "picture")

#: What is computed, or whose payload it is. ``recomputation``: the method on all images of the client again, where it
#: cannot keep state that one more image leaves valid.
WORK = ("backbone", "method", "recomputation", "training")

_Payload = TypeVar("_Payload")


@dataclass(frozen=True)
class Line:
    """One computation, or one payload, of a client or a request.

    Attributes:
        phase: one of `PHASES`.
        site: where it is computed, or the sender of the payload: a payload of the cloud goes down to the device.
        what: one of `WORK`.
        macs: multiply-accumulates; None if unknown.
        kind: of the payload, one of `KINDS`; None for a computation.
        bytes: of the payload; None if unknown.
    """

    phase: Phase
    site: Site
    what: str
    macs: int | None = 0
    kind: str | None = None
    bytes: int | None = 0

    def __post_init__(self) -> None:
        known = (("phase", PHASES), ("site", SITES), ("what", WORK), ("kind", (None, *KINDS)))
        for name, values in known:
            if getattr(self, name) not in values:
                listed = ", ".join(str(value) for value in values)
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {listed}")

    @property
    def key(self) -> tuple[Phase, Site, str, str | None]:
        """All but the numbers."""
        return self.phase, self.site, self.what, self.kind


@dataclass(frozen=True)
class Sizes:
    """What a budget depends on, beside the method.

    Attributes:
        images: S; a request comes after ``images - 1`` others of its client.
        together: whether a request is all S images at once, the published convention, and not one image.
        site: where requests are served: on the device, or in the cloud.
        backbone_macs: of one image, classifier included; None if unknown.
        backbone_bytes: size of the backbone's weights, classifier included; None if unknown.
        image_bytes: size of an image as it is sent; None if unknown.
        train, val: labelled images of the client.
        epochs: passes over the train images, where the device trains.
        received: samples of other clients that come down.
        passed: such samples in training, counted once for every pass.
        cloud: labelled images of the cloud, where it trains together with the devices.
        sample_bytes: size of what such a method reads of an image, as it is stored; None if unknown.
        input_macs: MACs of making that of an image; None if unknown.
        input_on_backbone: whether the backbone makes it, and no network that devices have anyway.
        second_macs: MACs of the trunk of the second network of a pair, for one image; None if unknown.
        encoder_macs: MACs of the text encoder for a prompt; None if unknown.
        cloud_macs: MACs of a picture of the cloud's text-to-image model; None if unknown.
        picture_bytes: size of a picture, without compression; None if unknown.
        cloud_share: share of the requests that a routed method sends to the cloud; None: the one it is asked for.
    """

    images: int = 16
    together: bool = False
    site: Site = "device"
    backbone_macs: int | None = None
    backbone_bytes: int | None = None
    image_bytes: int | None = None
    train: int = 0
    val: int = 0
    epochs: int = 0
    received: int = 0
    passed: int = 0
    cloud: int = 0
    sample_bytes: int | None = None
    input_macs: int | None = 0
    input_on_backbone: bool = False
    second_macs: int | None = None
    encoder_macs: int | None = None
    cloud_macs: int | None = None
    picture_bytes: int | None = None
    cloud_share: float | None = None

    @property
    def requested(self) -> int:
        """Images of a request."""
        return self.images if self.together else 1


@dataclass(frozen=True)
class Budget:
    """The schedule of a method in closed form, for one client and one request.

    Attributes:
        lines: computations and payloads.
        state_bytes: size of what is kept of a client between requests.
    """

    lines: tuple[Line, ...]
    state_bytes: int

    def macs(self, phase: Phase, site: Site | None = None) -> int | None:
        """Return the MACs of a phase, at one site or both; None if some are unknown."""
        return total(line.macs for line in self.lines if line.phase == phase and site in (None, line.site))

    def bytes(self, phase: Phase, sender: Site) -> int | None:
        """Return the bytes that a site sends in a phase; None if some are unknown."""
        return total(line.bytes for line in self.lines if line.phase == phase and line.site == sender)

    def method_macs(self) -> int | None:
        """Return the MACs of the method itself in a request; None if it computes on all images again."""
        found = [
            line.macs for line in self.lines if line.phase == "request" and line.what == "method" and not line.kind
        ]
        return total(found) if found else None

    def leaves_device(self) -> tuple[str, ...]:
        """Return the kinds of payloads that devices send, in any phase."""
        return tuple(kind for kind in KINDS if any(k == kind and s == "device" for _, s, _, k in self.keys))

    @property
    def keys(self) -> set[tuple[Phase, Site, str, str | None]]:
        """The keys of all lines."""
        return {line.key for line in self.lines}


def total(values: Iterable[int | None]) -> int | None:
    """Return a sum; None if a part of it is unknown."""
    found = 0
    for value in values:
        if value is None:
            return None
        found += value
    return found


def serve(
    sizes: Sizes, num_classes: int, *, macs: int, weights: int | None, again: bool = False, state_bytes: int = 0
) -> Budget:
    """Return the budget of a backbone and a method behind it that serve requests at ``sizes.site``.

    On a device, the weights of both are sent once. In the cloud, every request sends its images up and the logits
    down (float32).

    Args:
        sizes: of client and request.
        num_classes: K.
        macs: of the method in a request.
        weights: bytes of what the method adds to the backbone's weights.
        again: whether ``macs`` are those of all images of the client again.
        state_bytes: of a client's state.
    """
    site, images = sizes.site, sizes.requested
    backbone = None if sizes.backbone_macs is None else images * sizes.backbone_macs
    lines = [
        Line("request", site, "backbone", macs=backbone),
        Line("request", site, "recomputation" if again else "method", macs=macs),
    ]
    if site == "device":
        sent = (("backbone", sizes.backbone_bytes), ("method", weights))
        lines += [Line("client_once", "cloud", what, kind="weights", bytes=size) for what, size in sent]
    else:
        up = None if sizes.image_bytes is None else images * sizes.image_bytes
        lines += [
            Line("request", "device", "backbone", kind="images", bytes=up),
            Line("request", "cloud", "method", kind="logits", bytes=4 * images * num_classes),
        ]
    return Budget(tuple(lines), state_bytes)


class Link:
    """Passes payloads between cloud and devices, and counts their bytes.

    Args:
        method: its name, for errors.
        budget: states which payloads there are; any other raises a `PermissionError`.
    """

    def __init__(self, method: str, budget: Budget) -> None:
        self._method, self._keys = method, budget.keys
        #: Bytes so far, by key of the line (`Line.key`).
        self.counted: dict[tuple[Phase, Site, str, str | None], int] = {}

    def down(self, kind: str, value: _Payload, phase: Phase = "client_once", what: str = "method") -> _Payload:
        """Send a payload from the cloud to devices; return it.

        Args:
            kind: one of `KINDS`.
            value: tensors, arrays, text or bytes, or mappings and sequences of such.
            phase, what: of the line in the budget.
        """
        return self._send("cloud", kind, value, phase, what)

    def up(self, kind: str, value: _Payload, phase: Phase = "client_once", what: str = "method") -> _Payload:
        """Send a payload from devices to the cloud; return it. Arguments as in `down`."""
        return self._send("device", kind, value, phase, what)

    def _send(self, sender: Site, kind: str, value: _Payload, phase: Phase, what: str) -> _Payload:
        key = Line(phase, sender, what, kind=kind).key
        if key not in self._keys:
            receiver = "device" if sender == "cloud" else "cloud"
            problem = f"may not send {kind} of the {what} from the {sender} to the {receiver} ({phase})"
            raise PermissionError(f"{self._method}: {problem}: its budget has no such line")
        self.counted[key] = self.counted.get(key, 0) + payload_bytes(value)
        return value

    def payloads(self) -> list[list[Any]]:
        """Return what was counted, as plain values: phase, site, what, kind and bytes of each."""
        return [[*key, size] for key, size in self.counted.items()]

    def lines(self) -> list[Line]:
        """Return what was counted, as lines."""
        return [Line(p, s, what, kind=kind, bytes=size) for (p, s, what, kind), size in self.counted.items()]


def added_up(counts: Iterable[Iterable[Iterable[Any]]]) -> list[list[Any]]:
    """Return the sums of several `Link.payloads`, in the same form."""
    sums: dict[tuple[Any, ...], int] = {}
    for *key, size in (payload for payloads in counts for payload in payloads):
        sums[tuple(key)] = sums.get(tuple(key), 0) + size
    return [[*key, size] for key, size in sums.items()]


def payload_bytes(value: Any) -> int:
    """Return the size of a payload: tensors and arrays by their numbers, text as UTF-8, containers by their contents.

    >>> payload_bytes({"text": "café", "more": [b"12", b"3"]})
    8
    """
    if hasattr(value, "nbytes"):  # torch.Tensor, numpy.ndarray
        return int(value.nbytes)
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes | bytearray | memoryview):
        return len(value)
    if isinstance(value, Mapping):
        return sum(payload_bytes(v) for v in value.values())
    if isinstance(value, Iterable):
        return sum(payload_bytes(v) for v in value)
    raise TypeError(f"a {type(value).__name__} has no size as a payload")
