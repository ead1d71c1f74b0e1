"""Routes of the second port: the blob store behind LFS and the content-addressed store (CAS) behind Xet."""

import hashlib
import re

from .wire import Call, HttpError, Reply, Route, bytes_reply, json_reply, route


def _authorize(call: Call, scope: str) -> None:
    if not call.hub.xet_scope_allows(call.headers.get("Authorization"), scope):
        raise HttpError(401, "Xet access token missing, expired or without the needed scope")


def put_object(call: Call) -> Reply:
    return _store_object(call, call.params["oid"], call.body)


def put_part(call: Call) -> Reply:
    key = hashlib.sha256(call.body).hexdigest()
    call.hub.objects.put("objects", key, call.body)
    return Reply(headers={"ETag": f'"{key}"'})


def complete_parts(call: Call) -> Reply:
    parts = sorted(call.json()["parts"], key=lambda part: part["partNumber"])
    body = b"".join(call.hub.content(part["etag"].strip('"')) for part in parts)
    return _store_object(call, call.params["oid"], body)


def _store_object(call: Call, oid: str, body: bytes) -> Reply:
    if hashlib.sha256(body).hexdigest() != oid:
        raise HttpError(400, "content does not match its sha256")
    call.hub.objects.put("objects", oid, body)
    return Reply(headers={"ETag": f'"{oid}"'})


def get_object(call: Call) -> Reply:
    return bytes_reply(call.hub.content(call.params["oid"]), call.headers.get("Range"))


def no_answer(call: Call) -> Reply:
    """Optional parts of the CAS protocol: clients fall back on 404."""
    raise HttpError(404, "not supported")


def put_xorb(call: Call) -> Reply:
    _authorize(call, "write")
    return json_reply({"was_inserted": call.hub.xet.add_xorb(call.params["hash"], call.body)})


def get_xorb(call: Call) -> Reply:
    xorb = call.hub.objects.get("xorbs", call.params["hash"])
    if xorb is None:
        raise HttpError(404, "no such xorb")
    return bytes_reply(xorb, call.headers.get("Range"))


def put_shard(call: Call) -> Reply:
    _authorize(call, "write")
    return json_reply({"result": 1 if call.hub.xet.add_shard(call.body) else 0})


def get_reconstruction(call: Call) -> Reply:
    _authorize(call, "read")
    file = call.hub.xet.file(call.params["hash"])
    if file is None:
        raise HttpError(404, "no such file")
    first, last = 0, file.size - 1
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or "")
    if match:
        first = int(match[1])
        last = min(last, int(match[2])) if match[2] else last
    if first > last:
        raise HttpError(416, "range outside of the file")
    return json_reply(call.hub.xet.reconstruction(file, first, last, f"{call.hub.store_endpoint}/xorbs"))


ROUTES: list[Route] = [
    route("PUT", r"/objects/{oid}", put_object),
    route("PUT", r"/objects/{oid}/parts/{part}", put_part),
    route("POST", r"/objects/{oid}/complete", complete_parts),
    route("GET", r"/objects/{oid}", get_object),
    route("GET", r"/v1/chunks/default/{hash}", no_answer),
    route("POST", r"/v1/xorb-grants/default/{hash}", no_answer),
    route("POST", r"/v1/xorbs/default/{hash}", put_xorb),
    route("GET", r"/xorbs/{hash}", get_xorb),
    route("POST", r"/v1/shards", put_shard),
    route("GET", r"/v1/reconstructions/{hash}", get_reconstruction),
]
