"""Leads a server and one client that nobody here wrote through a day's trouble, and looks at what the client saw.

The client says on its stdout what it gets, one JSON line each: `{"state": "open" | "lost" | "stopped"}` or
`{"name": …, "data": …}`. Between it and the server stands a relay of ours, which can cut every connection; where nginx is
asked for, nginx stands before the relay.

    client → [nginx →] relay → server

Every change is one commit, so every event has an id of its own, and what the client has to see is exactly one event for
each, in order, whatever happened to its connection. One line is printed for each check; the status is 1 when one failed.
Only Python's own library is needed.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOKEN = "the-administrators-token-of-these-clients-01"
# Longer than anything here takes on a busy machine: a reconnect is due within two seconds.
PATIENCE = 30
SQL = "SELECT id, v FROM t"

# What a careless framing of events would break on, or take for a field of its own.
VALUES = [
    "cr\rlf\ncrlf\r\nend",
    "\n",
    "\r\n\r\n",
    "separators \u2028 and \u2029 and \u0085",
    "id: 7\ndata: no\n\nevent: delete",
    ": no comment",
    " leading and trailing ",
    'quotes " and \\ and \t and \u0000',
    "ä € \U0001f6eb \ufeff",
    "",
    "x" * 70_000,
]


class Failed(Exception):
    """A check that failed, in words."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def until(what, condition):
    """Waits for a condition, with a bound."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise Failed(f"{what() if callable(what) else what} (waited {PATIENCE} s)")
        await asyncio.sleep(0.01)


class Server:
    """A server process on one port, so that a restart is where it was."""

    def __init__(self, binary, folder):
        self.binary, self.folder, self.port, self.process = binary, folder, free_port(), None
        self.log = open(folder / "server.log", "wb")

    async def start(self):
        settings = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
        settings["TIDEGATE_ADMIN_TOKEN"] = TOKEN
        arguments = ["serve", "--data-dir", self.folder / "data", "--bind", f"127.0.0.1:{self.port}"]
        self.process = await asyncio.create_subprocess_exec(
            self.binary, *arguments, env=settings, stdout=self.log, stderr=self.log
        )
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while not await asyncio.to_thread(self.ready):
            if self.process.returncode is not None or asyncio.get_running_loop().time() > deadline:
                raise Failed(f"the server did not start; what it said is in {self.folder}/server.log")
            await asyncio.sleep(0.05)

    def ready(self):
        try:
            with LOCAL.open(f"http://127.0.0.1:{self.port}/readyz", timeout=PATIENCE) as answer:
                return answer.status == 200
        except OSError:
            return False

    async def stop(self, how):
        if self.process is None or self.process.returncode is not None:
            return
        self.process.send_signal(how)
        await asyncio.wait_for(self.process.wait(), PATIENCE)

    def post(self, path, body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
        )
        try:
            with LOCAL.open(request, timeout=PATIENCE) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Failed(f"{path} was answered {error.code}: {error.read().decode()}") from error

    async def sql(self, sql, *params):
        return await asyncio.to_thread(self.post, "/v1/sql", {"sql": sql, "params": params})


# Proxies of the environment are for the outside.
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Relay:
    """Passes bytes on, until it is told to cut."""

    def __init__(self, upstream):
        self.upstream, self.port, self.open = upstream, free_port(), set()

    async def start(self):
        self.listener = await asyncio.start_server(self.pass_on, "127.0.0.1", self.port)

    async def pass_on(self, reader, writer):
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            writer.close()
            return
        both = {writer, up_writer}
        self.open |= both
        try:
            pumps = [asyncio.create_task(pump(*pair)) for pair in ((reader, up_writer), (up_reader, writer))]
            _, pending = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
        finally:
            self.open -= both
            for side in both:
                side.close()

    def cut(self):
        """As a cable would: nothing that is under way arrives."""
        for side in list(self.open):
            side.transport.abort()

    def stop(self):
        self.listener.close()
        self.cut()


async def pump(reader, writer):
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass


class Nginx:
    """nginx as an ordinary process with a configuration of its own."""

    def __init__(self, binary, upstream, folder):
        self.binary, self.folder, self.port, self.process = binary, folder, free_port(), None
        text = (HERE / "nginx.conf").read_text()
        for name, value in (("LISTEN", self.port), ("SERVER", upstream), ("FOLDER", folder)):
            text = text.replace(f"@{name}@", str(value))
        if os.getuid() == 0:
            # Its worker would be another user, who may not write here.
            text = f"user root;\n{text}"
        (folder / "nginx.conf").write_text(text)

    async def start(self):
        command = [self.binary, "-p", self.folder, "-e", self.folder / "error.log", "-c", self.folder / "nginx.conf"]
        self.process = await asyncio.create_subprocess_exec(*command)
        await until(f"nginx does not listen; see {self.folder}/error.log", self.listens)

    def listens(self):
        if self.process.returncode is not None:
            raise Failed(f"nginx ended; see {self.folder}/error.log")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    async def stop(self):
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(self.process.wait(), PATIENCE)


class Client:
    """The program under test and what it has said."""

    def __init__(self, command):
        self.command, self.said, self.process = command, [], None

    async def start(self, url):
        command = [url if word == "URL" else word for word in self.command]
        self.process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 24
        )
        self.listening = asyncio.create_task(self.listen())

    async def listen(self):
        async for line in self.process.stdout:
            self.said.append(json.loads(line))
        # A client that ends has given up, whether it says so or not.
        if not self.count(state="stopped"):
            self.said.append({"state": "stopped", "why": f"the program ended by itself: {self.command}"})

    async def stop(self):
        if self.process is None:
            return
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), PATIENCE)
        except asyncio.TimeoutError:
            self.process.kill()

    def count(self, **what):
        return sum(all(said.get(key) == value for key, value in what.items()) for said in self.said)

    def changes(self):
        """(event, id, value) of every change since the start; of a delete the value is none."""
        seen = []
        for said in self.said:
            if said.get("name") in ("insert", "update", "delete"):
                data = json.loads(said["data"])
                if not data.get("snapshot"):
                    seen.append((said["name"], data["key"]["id"], data.get("row", {}).get("v")))
        return seen


class Day:
    """One client, one way to the server, and every check."""

    def __init__(self, server, relay, client):
        self.server, self.relay, self.client = server, relay, client
        self.due, self.rows = [], {0: "there before"}

    async def commit(self, name, key, value=None):
        """One change, one commit; noted as due once it is acknowledged."""
        sql = {
            "insert": ("INSERT INTO t VALUES ($1, $2)", key, value),
            "update": ("UPDATE t SET v = $2 WHERE id = $1", key, value),
            "delete": ("DELETE FROM t WHERE id = $1", key),
        }[name]
        await self.server.sql(*sql)
        self.due.append((name, key, value))
        if name == "delete":
            del self.rows[key]
        else:
            self.rows[key] = value

    async def some(self, first):
        """Ten commits of every kind."""
        for key in range(first, first + 4):
            await self.commit("insert", key, f"new {key}")
        for key in range(first, first + 4):
            await self.commit("update", key, f"other {key}")
        for key in (first, first + 2):
            await self.commit("delete", key)

    async def all_arrive(self):
        """Exactly what is due: no hole, no double, in order."""
        await until(self.amiss, lambda: len(self.client.changes()) >= len(self.due) or self.stopped())
        if self.client.changes() != self.due:
            raise Failed(self.amiss())
        if self.client.count(name="resync"):
            raise Failed("a resync, where the change log has everything")

    def amiss(self):
        seen = self.client.changes()
        at = next((i for i, pair in enumerate(zip(seen, self.due)) if pair[0] != pair[1]), min(len(seen), len(self.due)))
        given_up = ", and the client has given up" if self.stopped() else ""
        shown = [repr(one[at : at + 1])[:200] for one in (seen, self.due)]
        return f"{len(seen)} changes of {len(self.due)}; number {at} is {shown[0]}, due is {shown[1]}{given_up}"

    def stopped(self):
        return self.client.count(state="stopped") > 0

    async def comes_back(self, opened):
        await until(
            lambda: "the client has given up" if self.stopped() else "the client does not come back",
            lambda: self.client.count(state="open") > opened or self.stopped(),
        )
        if self.stopped():
            last = next(said for said in self.client.said if said.get("state") == "stopped")
            raise Failed(f"the client has given up instead of coming back: {last}")

    async def connects(self):
        await until(
            "no uptodate: the snapshot does not end", lambda: self.client.count(name="uptodate") > 0 or self.stopped()
        )
        first = [said["name"] for said in self.client.said if "name" in said][:3]
        if first != ["start", "insert", "uptodate"] or self.client.count(state="open") != 1:
            raise Failed(f"after connecting there came {first or self.client.said}")

    async def in_order(self):
        await self.some(100)
        await self.all_arrive()

    async def odd_values(self):
        for key, value in enumerate(VALUES, 200):
            await self.commit("insert", key, value)
        await self.all_arrive()

    async def cut(self):
        opened = self.client.count(state="open")
        self.relay.cut()
        await self.some(300)
        await self.comes_back(opened)
        await self.some(310)
        await self.all_arrive()

    async def cut_in_a_burst(self):
        opened = self.client.count(state="open")
        for key in range(400, 460):
            if key == 430:
                self.relay.cut()
            await self.commit("insert", key, "x" * 2_000)
        await self.comes_back(opened)
        await self.all_arrive()

    async def restart(self, how, first):
        opened = self.client.count(state="open")
        await self.server.stop(how)
        await self.server.start()
        await self.some(first)
        await self.comes_back(opened)
        await self.some(first + 10)
        await self.all_arrive()

    async def killed(self):
        await self.restart(signal.SIGKILL, 500)

    async def stopped_in_order(self):
        await self.restart(signal.SIGTERM, 600)

    async def ended(self):
        start = next(json.loads(said["data"]) for said in self.client.said if said.get("name") == "start")
        await self.server.sql(f"KILL LIVE QUERY '{start['live_id']}'")
        await until("the client comes back to a query that was ended", self.stopped)
        if not self.client.count(name="closed"):
            raise Failed("the stream did not say that it is closed")
        await self.all_arrive_before_the_end()

    async def all_arrive_before_the_end(self):
        if self.client.changes() != self.due:
            raise Failed(self.amiss())

    def checks(self):
        return [
            ("connects: start, snapshot, uptodate", self.connects),
            ("every change once and in order", self.in_order),
            ("CR, LF, U+2028 and the like come through", self.odd_values),
            ("comes back by itself after a cut: no gap, no double", self.cut),
            ("a cut amid a burst: no gap, no double", self.cut_in_a_burst),
            ("the server killed: goes on with its ticket", self.killed),
            ("the server stopped: goes on with its ticket", self.stopped_in_order),
            ("KILL LIVE QUERY: stops for good", self.ended),
        ]


async def run_day(options, label, command, through_nginx):
    """All checks of one client; how many failed."""
    folder = Path(tempfile.mkdtemp(prefix="tidegate-clients-"))
    server = Server(options.server, folder)
    relay, client, nginx = Relay(server.port), Client(command), None
    failed = 0
    try:
        await server.start()
        await relay.start()
        front = relay.port
        if through_nginx:
            nginx = Nginx(options.nginx, relay.port, folder)
            await nginx.start()
            front = nginx.port
        await server.sql("CREATE TABLE t (id INT PRIMARY KEY, v TEXT)")
        await server.sql("INSERT INTO t VALUES (0, 'there before')")
        ticket = await asyncio.to_thread(server.post, "/v1/auth/ticket", {"sql": SQL})
        await client.start(f"http://127.0.0.1:{front}/v1/live?ticket={ticket['ticket']}")
        for name, check in Day(server, relay, client).checks():
            if options.without and options.without in name:
                continue
            if failed:
                print(f"not looked at   {label}: {name}", flush=True)
                continue
            try:
                await check()
                print(f"ok              {label}: {name}", flush=True)
            except Failed as reason:
                failed += 1
                print(f"FAILED          {label}: {name}\n                {reason}", flush=True)
    finally:
        await client.stop()
        if nginx is not None:
            await nginx.stop()
        await server.stop(signal.SIGKILL)
        relay.stop()
    if failed:
        print(f"                what the server and nginx said is in {folder}", flush=True)
    else:
        shutil.rmtree(folder)
    return failed


async def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--server", required=True, help="the server's program")
    options.add_argument("--modules", required=True, help="where npm has put its packages")
    options.add_argument("--python", required=True, help="a Python that has httpx-sse")
    options.add_argument("--nginx", help="nginx; without it every client goes straight to the server only")
    options.add_argument("--chromium", help="Chromium; without it it is left out")
    options.add_argument("--only", default="", help="only clients with this in their name")
    options.add_argument("--without", help="leave out the checks with this in their name")
    options = options.parse_args()

    clients = [
        ("eventsource", ["node", HERE / "eventsource.mjs", options.modules, "URL"]),
        ("httpx-sse", [options.python, HERE / "httpx_client.py", "URL"]),
    ]
    if options.chromium:
        clients.append(("chromium", ["node", HERE / "chromium.mjs", options.modules, "URL", options.chromium]))
    failed = 0
    for name, command in clients:
        for way in ("direct", "nginx"):
            label = f"{name} ({way})"
            if options.only in label and (way == "direct" or options.nginx):
                failed += await run_day(options, label, command, way == "nginx")
    return 1 if failed else 0


sys.exit(asyncio.run(main()))
