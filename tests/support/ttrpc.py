"""ttrpc 1.2 for tests: a client of one connection, and its frames for those who break them.

Messages are bytes; whoever has generated classes serializes them. A server's error is raised as
ttrpc.Error with its code and the bytes of google.rpc.Status.
"""
import socket
import struct

HEADER = struct.Struct(">IIBB")
REQUEST, RESPONSE, DATA = 1, 2, 3
CLOSED, OPEN, NO_DATA = 1, 2, 4


class Error(Exception):
    def __init__(self, code, message, status):
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status = code, message, status


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def fields(data):
    """The fields of a message: number -> list of values (int or bytes)."""
    out, at = {}, 0

    def take():
        nonlocal at
        v = shift = 0
        while True:
            b = data[at]
            at += 1
            v |= (b & 127) << shift
            shift += 7
            if b < 128:
                return v
    while at < len(data):
        key = take()
        if key & 7 == 0:
            value = take()
        else:
            assert key & 7 == 2, key
            n = take()
            value = data[at:at + n]
            at += n
        out.setdefault(key >> 3, []).append(value)
    return out


class Client:
    """One connection. Calls may overlap; answers are read when they are asked for."""

    def __init__(self, path, timeout=10):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.next_stream = 1
        self.waiting = {}

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def send_frame(self, stream, kind, flags, payload=b""):
        self.socket.sendall(HEADER.pack(len(payload), stream, kind, flags) + payload)

    def _exactly(self, n):
        data = bytearray()
        while len(data) < n:
            piece = self.socket.recv(n - len(data))
            if not piece:
                raise EOFError("the server closed the connection")
            data += piece
        return bytes(data)

    def read_frame(self):
        n, stream, kind, flags = HEADER.unpack(self._exactly(HEADER.size))
        return stream, kind, flags, self._exactly(n)

    def start(self, path, message, timeout_ns=0, metadata=(), flags=CLOSED):
        """path: "/package.Service/Method". Returns the stream's number."""
        _, service, method = path.split("/")
        request = field(1, service.encode()) + field(2, method.encode()) + field(3, message)
        if timeout_ns:
            request += varint(4 << 3) + varint(timeout_ns & (1 << 64) - 1)
        for key, value in metadata:
            request += field(5, field(1, key.encode()) + field(2, value.encode()))
        stream = self.next_stream
        self.next_stream += 2
        self.waiting[stream] = []
        self.send_frame(stream, REQUEST, flags, request)
        return stream

    def _next(self, stream):
        while not self.waiting[stream]:
            got, *rest = self.read_frame()
            self.waiting[got].append(rest)
        return self.waiting[stream].pop(0)

    @staticmethod
    def _response(payload):
        response = fields(payload)
        if 1 in response:
            status = fields(response[1][0])
            if status.get(1, [0])[0]:
                raise Error(status[1][0], status.get(2, [b""])[0].decode(), response[1][0])
        return response.get(2, [b""])[0]

    def result(self, stream):
        kind, _, payload = self._next(stream)
        assert kind == RESPONSE, kind
        return self._response(payload)

    def unary(self, path, message, **more):
        return self.result(self.start(path, message, **more))

    def messages(self, stream):
        while True:
            kind, flags, payload = self._next(stream)
            if kind == RESPONSE:
                self._response(payload)
                return
            if not flags & NO_DATA:
                yield payload
            if flags & CLOSED:
                return

    def stream(self, path, message, **more):
        return self.messages(self.start(path, message, **more))
