"""Python's httpx-sse on a live query: says on stdout what it gets, one JSON line each, until stdin ends.

    python httpx_client.py URL

The library reads one response. Coming back is the caller's part, so this does what its documentation recommends: wait
as long as the server said, then ask again with the last id; a status that is no stream is the end.
"""

import json
import os
import sys
import threading
import time

import httpx
from httpx_sse import connect_sse


def say(**said):
    print(json.dumps(said), flush=True)


def end_with_stdin():
    sys.stdin.read()
    os._exit(0)


def follow(url):
    last_id, retry_ms = "", 3000
    with httpx.Client(timeout=httpx.Timeout(5.0, read=None), trust_env=False) as client:
        while True:
            headers = {"Last-Event-ID": last_id} if last_id else {}
            try:
                with connect_sse(client, "GET", url, headers=headers) as source:
                    if source.response.status_code != 200:
                        say(state="stopped", status=source.response.status_code)
                        return
                    say(state="open")
                    for event in source.iter_sse():
                        last_id = event.id or last_id
                        retry_ms = event.retry or retry_ms
                        # What only says when to come back has no data, and a browser shows no event for it.
                        if event.data:
                            say(name=event.event, data=event.data)
            except httpx.TransportError:
                pass
            say(state="lost")
            time.sleep(retry_ms / 1000)


threading.Thread(target=end_with_stdin, daemon=True).start()
follow(sys.argv[1])
