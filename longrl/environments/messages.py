"""Messages between the trainer and processes of its own: pickles over a socket, the bytes of tensors beside them.

Tensors are plain bytes: no shared memory or file is left behind by a process that is killed.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
import time
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

_SIZE = struct.Struct("!Q")


class _Pickler(pickle.Pickler):
    @override
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor:
            return NotImplemented
        values = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        content: Any = values.numpy()
        return _tensor, (pickle.PickleBuffer(content), obj.dtype, tuple(obj.shape))


def _tensor(content: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(memoryview(content)):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(shape)


def send_message(connection: socket.socket, value: object, deadline: float | None = None) -> None:
    """Sends a value.

    Raises:
        TimeoutError: it did not go until `deadline`, of `time.monotonic`.
        OSError: the other side has gone.
    """
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    parts = [file.getbuffer(), *(buffer.raw() for buffer in buffers)]
    sizes = [_SIZE.pack(count) for count in (len(parts), *(part.nbytes for part in parts))]
    message: list[Any] = [b"".join(sizes), *parts]
    for part in message:
        _set_timeout(connection, deadline)
        connection.sendall(part)


def receive_message(connection: socket.socket, deadline: float | None = None) -> Any:
    """The next value.

    Raises:
        TimeoutError: it did not come until `deadline`.
        EOFError: the other side has gone.
    """
    (count,) = _SIZE.unpack(_receive(connection, _SIZE.size, deadline))
    sizes = [_SIZE.unpack(_receive(connection, _SIZE.size, deadline))[0] for _ in range(count)]
    content, *buffers = [_receive(connection, size, deadline) for size in sizes]
    return pickle.loads(content, buffers=buffers)


def _receive(connection: socket.socket, size: int, deadline: float | None) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    while len(view):
        _set_timeout(connection, deadline)
        try:
            count = connection.recv_into(view)
        except ConnectionError as error:
            raise EOFError from error
        if not count:
            raise EOFError
        view = view[count:]
    return content


def _set_timeout(connection: socket.socket, deadline: float | None) -> None:
    connection.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
