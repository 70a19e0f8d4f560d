"""What goes wrong, as an exception."""
import grpc

from ._proto import message


class DeltadError(Exception):
    """code: gRPC's name of the status ("INVALID_ARGUMENT"); reason: deltad's own ("CONTEXT_LENGTH"; the table is in
    docs/PROTOCOL.md); fields: paths of the fields that are wrong; metadata: what the reason comes with;
    retry_after: seconds, or None if trying again does not help."""

    def __init__(self, code, reason, text, fields=(), metadata=None, retry_after=None):
        super().__init__(f"{code} {reason}: {text}" if reason else f"{code}: {text}")
        self.code, self.reason, self.message = code, reason, text
        self.fields, self.metadata, self.retry_after = list(fields), dict(metadata or {}), retry_after


def from_rpc(e: grpc.RpcError) -> DeltadError:
    reason, fields, metadata, retry = "", [], {}, None
    for key, value in e.trailing_metadata() or ():
        if key != "grpc-status-details-bin":
            continue
        for any_ in message("google.rpc.Status").FromString(value).details:
            name = any_.type_url.rsplit("/", 1)[-1]
            if name == "google.rpc.ErrorInfo":
                info = message(name).FromString(any_.value)
                reason, metadata = info.reason, dict(info.metadata)
            elif name == "google.rpc.BadRequest":
                fields = [v.field for v in message(name).FromString(any_.value).field_violations]
            elif name == "google.rpc.RetryInfo":
                d = message(name).FromString(any_.value).retry_delay
                retry = d.seconds + d.nanos * 1e-9
    return DeltadError(e.code().name, reason, e.details(), fields, metadata, retry)
