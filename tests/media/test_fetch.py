"""Pictures by URL: what is fetched, and 200 ways into a private network that all end at the door.

Two servers on loopback: one plays a host of the public network, the other is a canary that nobody may reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from gemcut.errors import ConfigError, InvalidRequest
from gemcut.media import fetch
from gemcut.media.fetch import Domain, Fetcher, is_public, parse_url


def words(text: str) -> list[str]:
    return text.split()


PUBLIC = "127.0.0.2"  # what the tests call public
HOST = "pictures.test"
FILE = b"\x89PNG and so on"
PRIVATE = words(
    """
    0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 127.0.0.1 127.1.2.3 168.63.129.16
    169.254.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.192 192.0.2.1 192.88.99.1 192.168.0.1
    198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 :: ::1
    ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 64:ff9b::7f00:1 64:ff9b::10.0.0.1
    64:ff9b::a9fe:a9fe 64:ff9b:1::1 100::1 2001::1 2001:0:53aa:64c:0:0:80ff:fffe 2001:db8::1 2001:10::1
    2002:7f00:1:: 2002:a00:1::1 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%2 fec0::1 ff02::1
    ::1%lo 4000::1 localhost 0x7f.1
"""
)
GLOBAL = ["1.1.1.1", "8.8.8.8", "93.184.215.14", "172.32.0.1", "100.128.0.1", "192.0.1.1", "2606:4700::1111",
          "2a00:1450:4001:80b::200e", "64:ff9b::8.8.8.8"]  # fmt: skip


def numbers() -> Iterator[str]:
    """Loopback, the metadata service and a private network, as resolvers of C libraries read them."""
    for a, b, c, d in ((127, 0, 0, 1), (169, 254, 169, 254), (10, 0, 0, 1)):
        whole = (a << 24) | (b << 16) | (c << 8) | d
        forms: list[Callable[[int], str]] = [str, hex, lambda n: f"0{n:o}", lambda n: f"0x{n:08X}"]
        for form in forms:
            yield form(whole)
            yield f"{form(a)}.{form((b << 16) | (c << 8) | d)}"
            yield f"{form(a)}.{form(b)}.{form((c << 8) | d)}"
            yield f"{form(a)}.{form(b)}.{form(c)}.{form(d)}"
        for first, last in itertools.product(forms[:3], repeat=2):
            if first is not last:
                yield f"{first(a)}.{first(b)}.{last(c)}.{last(d)}"
        yield from (f"00{a}.00{b}.00{c}.00{d}", f"{a}.{b}.{c}.{d}.", f"{whole}.", f"{whole + (1 << 32)}")


def spellings(port: int) -> list[str]:
    """URLs that lead to the canary, or to the metadata service, if anything reads them so."""
    hosts = words(
        """
        localhost LOCALHOST localhost. Localhost.localdomain ip6-localhost 127.0.0.1.nip.io [::1]
        [::] [0:0:0:0:0:0:0:1] [0000::1] [::127.0.0.1] [::ffff:127.0.0.1] [::ffff:7f00:1]
        [::FFFF:7F00:0001] [64:ff9b::127.0.0.1] [2002:7f00:1::] [::1%25lo] [::1%lo] [fe80::1%eth0]
        [fd00:ec2::254] [::ffff:169.254.169.254] ::1 [::1 ::1] [127.0.0.1] [v1.127.0.0.1]
        127.0.0.1%00 127.0.0.1%2f %31%32%37.0.0.1 127%2e0%2e0%2e1 127。0。0。1 127．0．0．1 １２７.０.０.１
        ①②⑦.⓪.⓪.① ⓛocalhost ｌｏｃａｌｈｏｓｔ -127.0.0.1 127..0.0.1 .127.0.0.1 127.0.0.1.. 0 0.0.0.0 0x0
        127.127.127.127 lo_calhost metadata.google.internal instance-data xn-- host_ * $HOST
    """
    )
    hosts += numbers()
    hosts += [
        "loc\u00adalhost",
        "local\u200bhost",
        "127.0.0.1\u0000",
        "127.0.0.1\t",
        " 127.0.0.1",
        "127.0.0.1\\",
    ]
    hosts += ["127.0.0.1\r\nHost: x", "", "a" * 64, "a." * 130 + "a"]
    urls = [f"http://{host}:{port}/x.png" for host in hosts]
    host = HOST
    authorities = words(
        f"""
        {host}@127.0.0.1 {host}:80@127.0.0.1 {host}%40127.0.0.1 127.0.0.1@{host} user:password@{host} @{host}
        :@{host} 127.0.0.1#@{host} 127.0.0.1?@{host} 127.0.0.1/@{host} 127.0.0.1;{host} 127.0.0.1&{host}
        127.0.0.1,{host} 127.0.0.1:{port}@{host} {host}:{port}:{port} {host}:-1 {host}:0 {host}:99999
        {host}:８０ {host}:+80 {host}:0x50 {host}:22 {host}:6379
    """
    )
    authorities += [f"{host} 127.0.0.1", f"{host}\n127.0.0.1", f"{host}: 80", f"{host}\\@127.0.0.1"]
    authorities += [f"127.0.0.1\\@{host}"]
    urls += [f"http://{authority}/x.png" for authority in authorities]
    schemes = words(
        """
        http: http:/ http:/// http://// // ftp:// file:// gopher:// dict:// ldap:// http+unix://
        jar:http:// url:http:// HtTp: view-source:http:// http://http:// http:127.0.0.1@ unix:
    """
    )
    schemes += ["http:\\\\", "http:/\\", "https:\\/", "", "http ://", " http://", "\thttp://", "http\n://"]
    urls += [f"{scheme}127.0.0.1:{port}/x.png" for scheme in schemes]
    urls += ["file:///etc/passwd", "file://localhost/etc/passwd", "/etc/passwd", "\\\\127.0.0.1\\x", "http://",
             "https://", "http:", f"http://{HOST}:80\r\nX: y/", f"http://{HOST}:{port}/ HTTP/1.1\r\nX: y",
             f"http://{HOST}:{port}/\u2028", f"http://{HOST}:{port}/x" + "y" * 3000]  # fmt: skip
    return urls


class Canary:
    """Counts connections."""

    hits = 0

    def connected(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hits += 1
        writer.close()


Replies = dict[str, bytes]


@contextlib.asynccontextmanager
async def servers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[int, Replies, Canary]]:
    """Their port, what the public one answers by path, and the canary."""
    replies: Replies = {"/x.png": whole(FILE)}
    canary = Canary()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            if await reader.read(4) != b"GET ":
                return
            path, _, rest = (await reader.readuntil(b"\r\n\r\n")).decode().partition(" ")
            assert "\r\nHost: pictures.test" in rest
            writer.write(replies.get(path) or whole(b"", status="404 Not Found"))
            if path.startswith("/hangs"):
                await reader.read()  # until the client has had enough

    public = await asyncio.start_server(answer, PUBLIC, 0)
    port = public.sockets[0].getsockname()[1]
    private = await asyncio.start_server(canary.connected, "127.0.0.1", port)

    async def resolve(host: str, port: int) -> list[str]:
        """Every other name leads inside."""
        if host.startswith("no-such"):
            raise OSError
        return [PUBLIC] if host == HOST else ["127.0.0.1"]

    monkeypatch.setattr(fetch, "resolve", resolve)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == PUBLIC or is_public(address))
    async with public, private:
        yield port, replies, canary


def whole(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers])
    return head.encode() + b"\r\n\r\n" + body


def everywhere(port: int, **limits: float) -> Fetcher:
    return Fetcher([f"*:{port}", "*"], **limits)  # type: ignore[arg-type]


def test_addresses() -> None:
    assert [address for address in PRIVATE if is_public(address)] == []
    assert [address for address in GLOBAL if not is_public(address)] == []


def test_no_spelling_reaches_the_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with servers(monkeypatch) as (port, replies, canary):
            urls = spellings(port)
            assert len(set(urls)) >= 200
            fetcher = everywhere(port, deadline_s=5.0)
            for number, url in enumerate(urls):
                with pytest.raises(InvalidRequest):
                    await fetcher.get(url)
                if not url.isascii() or any(c in url for c in "\r\n"):
                    continue  # no header can hold it
                # the way round: a redirect of a host that may be asked
                replies["/to"] = whole(b"", f"Location: {url}", status="302 Found")
                try:
                    await fetcher.get(f"http://{HOST}:{port}/to")
                except InvalidRequest:
                    continue
                pytest.fail(f"{number}: {url!r} was fetched")
            assert canary.hits == 0
            assert await fetcher.get(f"http://{HOST}:{port}/x.png") == FILE  # or the test proved nothing

    asyncio.run(run())


def test_names_of_private_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listed name that leads inside, alone or beside a public address; and one that changes its mind."""

    async def run() -> None:
        async with servers(monkeypatch) as (port, _, canary):
            fetcher = everywhere(port)
            looked_up = 0
            answers: list[str] = []

            async def resolve(host: str, port: int) -> list[str]:
                nonlocal looked_up
                looked_up += 1
                return answers if looked_up == 1 else ["127.0.0.1"]

            monkeypatch.setattr(fetch, "resolve", resolve)
            for address in PRIVATE:
                for several in ([address], [PUBLIC, address], [address, PUBLIC]):
                    answers, looked_up = several, 0
                    with pytest.raises(InvalidRequest, match="not a host of the public network"):
                        await fetcher.get(f"http://{HOST}:{port}/x.png")
            answers, looked_up = [PUBLIC], 0
            assert await fetcher.get(f"http://{HOST}:{port}/x.png") == FILE
            assert looked_up == 1
            assert canary.hits == 0

    asyncio.run(run())


def test_what_is_fetched_and_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with servers(monkeypatch) as (port, replies, _):
            fetcher = everywhere(port, max_bytes=1000, deadline_s=0.5)
            here = f"http://{HOST}:{port}"
            chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            replies.update(
                {
                    "/x.png?a=%20b": whole(FILE),
                    "/chunked": chunked + b"3\r\n\x89PN\r\nb\r\nG and so on\r\n0\r\n\r\n",
                    "/unmeasured": b"HTTP/1.1 200 OK\r\n\r\n" + FILE,
                    "/hinted": b"HTTP/1.1 103 Early Hints\r\nLocation: /a\r\n\r\n" + whole(FILE),
                    "/moved": whole(b"gone there", "Location: x.png", status="301 Moved Permanently"),
                    "/twice": whole(b"", f"Location: {here}/moved", status="307 Temporary Redirect"),
                }
            )
            for path in replies:
                assert await fetcher.get(here + path) == FILE, path
            assert await fetcher.get(here.upper().replace("HTTP", "hTTp") + "/x.png#part") == FILE
            refused = {
                "/missing": (whole(b"x" * 10, status="404 Not Found"), "answered 404"),
                "/error": (whole(b"", status="500 Oh"), "answered 500"),
                "/part": (whole(FILE, status="206 Partial Content"), "answered 206"),
                "/nowhere": (whole(b"", status="302 Found"), "answered 302"),
                "/large": (whole(b"x" * 1001), "1,001 bytes; at most 1,000"),
                "/lies": (chunked + b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n", "more than 1,000 bytes"),
                "/zipped": (whole(b"x", "Content-Encoding: gzip"), "encoding that was not asked for"),
                "/short": (whole(b"x" * 10)[:-1], "broke the picture off"),
                "/short-chunks": (chunked + b"a\r\nxx", "broke the picture off"),
                "/empty": (b"HTTP/1.1 200 O", "broke the picture off"),
                "/other": (b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP"),
                "/headers": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000, "more than 64 KiB"),
                "/circle": (whole(b"", "Location: /circle", status="302 Found"), "more than 3 times"),
                "/hangs": (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nx", "longer than 0.5 s"),
                "/hangs-early": (b"HTTP/1.1", "longer than 0.5 s"),
            }  # fmt: skip
            for path, (reply, told) in refused.items():
                replies[path] = reply
                with pytest.raises(InvalidRequest, match=told):
                    await fetcher.get(here + path)
            with pytest.raises(InvalidRequest, match="could not be fetched from no-such-host"):
                await fetcher.get("http://no-such-host.test/x.png")

    asyncio.run(run())


def test_a_server_that_speaks_no_tls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with servers(monkeypatch) as (port, _, _):
            with pytest.raises(InvalidRequest, match="could not be fetched"):
                await everywhere(port).get(f"https://{HOST}:{port}/x.png")

    asyncio.run(run())


def test_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with servers(monkeypatch) as (port, replies, _):
            replies["/hangs"] = b"HTTP/1.1 200 OK\r\n\r\n"
            fetcher = everywhere(port, max_at_once=1, deadline_s=0.4)
            stuck = asyncio.create_task(fetcher.get(f"http://{HOST}:{port}/hangs"))
            await asyncio.sleep(0.1)
            with pytest.raises(InvalidRequest, match="longer than"):  # it waited in vain
                await asyncio.wait_for(fetcher.get(f"http://{HOST}:{port}/hangs"), 1.0)
            with pytest.raises(InvalidRequest):
                await stuck
            assert await fetcher.get(f"http://{HOST}:{port}/x.png") == FILE

    asyncio.run(run())


@pytest.mark.parametrize(
    ("listed", "url", "may"),
    [
        ("example.com", "https://example.com/x", True),
        ("EXAMPLE.com", "http://eXample.com/x", True),
        ("example.com", "https://example.com:443/x", True),
        ("example.com", "https://example.com:8443/x", False),
        ("example.com", "http://example.com:443/x", False),
        ("example.com:8443", "https://example.com:8443/x", True),
        ("example.com:8443", "https://example.com/x", False),
        ("example.com", "https://a.example.com/x", False),
        ("example.com", "https://badexample.com/x", False),
        ("example.com", "https://example.com.bad.org/x", False),
        ("*.example.com", "https://a.example.com/x", True),
        ("*.example.com", "https://a.b.example.com/x", True),
        ("*.example.com", "https://example.com/x", False),
        ("*.example.com", "https://badexample.com/x", False),
        ("*", "https://example.com/x", True),
        ("*", "https://example.com:22/x", False),
        ("*:22", "https://example.com:22/x", True),
        ("xn--bcher-kva.example", "https://xn--bcher-kva.example/x", True),
    ],
)
def test_domains(listed: str, url: str, may: bool) -> None:
    target = parse_url(url)
    assert Domain.parse(listed).covers(target.host, target.port, target.scheme) is may


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        *words(
            """
        127.0.0.1 2130706433 [::1] ::1 http://example.com example.com/ *example.com *. a.*.com
        example.com: example.com:x example.com:0 example.com:65536 exämple.com example.com. *.*
    """
        ),
    ],
)
def test_what_is_no_domain(text: str) -> None:
    with pytest.raises(ConfigError, match="allow_image_domain"):
        Domain.parse(text)
