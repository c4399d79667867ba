"""Flower's ClientApp of a device that trains together with the cloud (`iciia_exp.methods.cotrain`).

A SuperNode is a device. Its images are in a file of its own, which nobody else reads; the cloud sends the method's name
and arguments, the network, and what `CoTrained.sent` says:

    flower-supernode --superlink HOST:PORT --root-certificates ca.crt --node-config 'device=0 data="/path/of/file"'

Loading what the cloud sends runs no code of its choosing (`iciia_exp.config.stored`).

Legend: n images of the device.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from iciia_exp.artifacts import load_tensors
from iciia_exp.config.stored import restore
from iciia_exp.errors import UserError
from iciia_exp.methods.base import Facts
from iciia_exp.methods.cotrain.base import CoTrained
from iciia_exp.methods.cotrain.sites import Job, Packed, Samples, Site
from iciia_exp.models.payloads import unpack_weights

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Context, Message
    from flwr.clientapp import ClientApp

__all__ = ["ARRAYS", "CONFIG", "METRICS", "NOT_SENT", "client_app", "from_packed", "read_device", "to_packed"]

#: Names in a message, and in what a SuperNode keeps between messages.
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"

#: In the error of a device that has lost what it was sent once.
NOT_SENT = "is asked to train before the cloud has sent its method"


def client_app() -> "ClientApp":
    """Return the ClientApp."""
    from flwr.clientapp import ClientApp

    app = ClientApp()
    app.query()(join)
    app.train("accept")(accept)
    app.train()(train)
    return app


def from_packed(packed: Packed) -> "ArrayRecord":
    """Return packed weights as a record: an array for the values, one more for the scales where there are some."""
    from flwr.app import ArrayRecord

    parts = ((f"{name}#{i}", t) for name, tensors in packed.items() for i, t in enumerate(tensors))
    return ArrayRecord({name: t.detach().cpu().contiguous() for name, t in parts})


def to_packed(record: "ArrayRecord") -> Packed:
    """Return the packed weights of a record."""
    packed: Packed = {}
    for key, t in record.to_torch_state_dict().items():
        packed[key.rpartition("#")[0]] = (*packed.get(key.rpartition("#")[0], ()), t)
    return packed


def join(message: "Message", context: "Context") -> "Message":
    """Tell the number of the device and of its images."""
    from flwr.app import ConfigRecord, Message, RecordDict

    device, own = _device(context)
    config = ConfigRecord({"device": device, "images": len(own.y)})
    return Message(RecordDict({CONFIG: config}), reply_to=message)


def accept(message: "Message", context: "Context") -> "Message":
    """Keep what the cloud sends once."""
    from flwr.app import Message, MetricRecord, RecordDict

    context.state[CONFIG] = message.content[CONFIG]
    context.state[ARRAYS] = message.content[ARRAYS]
    method = _method(str(message.content[CONFIG]["method"]))  # for its errors
    _site(method, context)
    return Message(RecordDict({METRICS: MetricRecord({"accepted": 1})}), reply_to=message)


def train(message: "Message", context: "Context") -> "Message":
    """Do a job, and send back what was trained."""
    from flwr.app import Message, MetricRecord, RecordDict

    if CONFIG not in context.state:
        raise UserError(f"the device {NOT_SENT}")
    method = _method(str(context.state[CONFIG]["method"]))
    site = _site(method, context)
    received = unpack_weights(to_packed(message.content[ARRAYS]))  # type: ignore[arg-type]
    job = Job(**json.loads(str(message.content[CONFIG]["job"])))
    update = method.train_on(site, received, job)
    metrics = MetricRecord({"samples": update.samples, "steps": update.steps, "loss": update.loss})
    arrays = from_packed(method.packed(update, received))
    return Message(RecordDict({ARRAYS: arrays, METRICS: metrics}), reply_to=message)


def _device(context: "Context") -> tuple[int, Samples]:
    """Return the number of the device, and its images."""
    settings = context.node_config
    for key, kind in (("device", int), ("data", str)):
        if not isinstance(settings.get(key), kind):
            hint = "--node-config 'device=0 data=\"/path/device.safetensors\"'"
            raise UserError(f"node config: {key}: is {settings.get(key)!r}; give the SuperNode {hint}")
    return int(settings["device"]), read_device(Path(str(settings["data"])))


@lru_cache(1)
def read_device(path: Path) -> Samples:
    """Return the images of a device from its file: ``x`` [n, ...] and ``y`` [n]."""
    tensors = load_tensors(path)
    if set(tensors) != {"x", "y"} or tensors["y"].shape != tensors["x"].shape[:1] or not len(tensors["y"]):
        found = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items()) or "nothing"
        raise UserError(f"{path}: must have images x [n, ...] and labels y [n], and has {found}")
    return Samples(tensors["x"], tensors["y"].long())


@lru_cache(1)
def _method(stored: str) -> CoTrained:
    """Build the method that the cloud names."""
    given: dict[str, Any] = json.loads(stored)
    arrays = {name: tuple(shape) for name, shape in given["arrays"].items()}
    head = nn.Linear(given["dim"], given["num_classes"])  # of the cloud's backbone, which devices do not have
    facts = Facts.of(head, given["task"], arrays)
    method = restore(given["method"], CoTrained, facts=facts)
    return method.eval()


def _site(method: CoTrained, context: "Context") -> Site:
    """Return the device with its images, and what the cloud has sent."""
    number, own = _device(context)
    if tuple(own.x.shape[1:]) != method.shape:
        raise UserError(
            f"device {number}: its images are {list(own.x.shape[1:])}, the network takes {list(method.shape)}"
        )
    if int(own.y.min()) < 0 or int(own.y.max()) >= method.num_classes:
        wrong = int(own.y.max() if own.y.max() >= method.num_classes else own.y.min())
        raise UserError(f"device {number}: has a label {wrong}, and the classes are 0 to {method.num_classes - 1}")
    site = Site(number, own)
    sent: dict[str, Tensor] = context.state[ARRAYS].to_torch_state_dict()  # type: ignore[union-attr]
    method.accept(site, sent)
    return site
