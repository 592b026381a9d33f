"""What the HTTP client makes of a server that misbehaves (fault matrix F8 to F12)."""

import gzip
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hlcli.http
from hlcli.budget import Budget, DeadlineError
from hlcli.exitcodes import ExitCode, exit_code_for
from hlcli.http import BadPayloadError, HttpClient, SourceError, StatusError, decode
from hlcli.logs import one_line
from hlcli.sim import Fault, Simulator
from hlcli.sim.wire import RawNumber

VAULTS = "/Mainnet/vaults"
DETAILS = "vaultDetails"


class Clock:
    """Stands in for the client's time module: a sleep is noted and skipped, so long waits cost nothing."""

    def __init__(self) -> None:
        self.skipped = 0.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped

    def time(self) -> float:
        return time.time() + self.skipped

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.skipped += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(hlcli.http, "time", clock)
    return clock


@pytest.fixture
def quick(monkeypatch):
    """Real time, with short waits between attempts."""
    monkeypatch.setattr(hlcli.http, "BACKOFF_BASE_S", 0.001)
    monkeypatch.setattr(hlcli.http, "BACKOFF_CAP_S", 0.01)


@pytest.fixture(scope="module")
def simulator():
    with Simulator(vaults=20, weight_per_minute=10_000_000) as simulator:
        yield simulator


@pytest.fixture
def sim(simulator):
    simulator.clear_faults()
    return Sim(simulator)


class Sim:
    """The shared simulator, counting from the start of this test."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.before = len(simulator.log)

    @property
    def asked(self) -> int:
        return len(self.simulator.log) - self.before

    def fault(self, kind: str, **options) -> None:
        self.simulator.add_fault(Fault(options.pop("match", "*"), kind, **options))

    @property
    def question(self) -> dict[str, str]:
        return {"type": DETAILS, "vaultAddress": self.simulator.vaults.addresses[0]}

    def post(self, client: HttpClient | None = None, **options):
        """Ask for one vault; the answer must be whole."""
        with_client = client or HttpClient()
        try:
            answer = with_client.post_json(self.simulator.info_url, self.question, weight=20, **options)
        finally:
            with_client.close()
        return answer

    def whole(self, answer) -> bool:
        return answer["vaultAddress"] == self.simulator.vaults.addresses[0] and len(answer["portfolio"]) == 8

    def get(self, **options):
        client = HttpClient()
        try:
            return client.download(
                f"{self.simulator.stats_url}/vaults", check=lambda body: decode("x", body.read()), **options
            )
        finally:
            client.close()


@contextmanager
def socket_server(talk: Callable[[socket.socket, int], None], until: bytes = b"\r\n\r\n"):
    """A server on loopback that reads a request (up to `until`) and lets `talk(connection, number)` answer it; yields url, count."""
    count = [0]
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def serve_one(connection: socket.socket, number: int) -> None:
            with connection:
                try:
                    request = b""
                    while until not in request:
                        part = connection.recv(65536)
                        if not part:
                            return
                        request += part
                    head, _, body = request.partition(b"\r\n\r\n")
                    for line in head.lower().split(b"\r\n"):
                        if line.startswith(b"content-length:"):
                            while len(body) < int(line.split(b":")[1]):
                                body += connection.recv(65536)
                    talk(connection, number)
                except OSError:
                    pass  # the client has left, which many of these tests want

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                count[0] += 1
                threading.Thread(target=serve_one, args=(connection, count[0]), daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", count
        finally:
            # close() alone does not wake a thread inside accept().
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def reply(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def sized(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return reply(
        body, "Content-Type: application/json", f"Content-Length: {len(body)}", *headers, status=status
    )


def post(url: str, client: HttpClient | None = None, **options):
    client = client or HttpClient()
    try:
        return client.post_json(url, {"type": "x"}, weight=20, **options)
    finally:
        client.close()


# F8: refused


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("1", 1, 1),
        ("120", 120, 120),
        ("999999999", 300, 300),
        ("date", 80, 90),
        ("past", 5, 15),
        ("soon", 5, 15),
        ("-5", 5, 15),
        ("1e9", 5, 15),
        ("", 5, 15),
        (None, 5, 15),
    ],
)
def test_a_429_waits_as_long_as_the_server_asks(sim, clock, value, low, high):
    value = {"date": formatdate(time.time() + 90, usegmt=True), "past": formatdate(0, usegmt=True)}.get(
        value, value
    )
    sim.fault("status", status=429, headers={} if value is None else {"Retry-After": value})
    assert sim.whole(sim.post())
    assert sim.asked == 2
    assert len(clock.sleeps) == 1
    assert low <= clock.sleeps[0] <= high


@pytest.mark.parametrize("asks", [{}, {"Retry-After": "1"}])
def test_a_429_for_ever_ends_after_a_bounded_number_of_requests(sim, clock, asks):
    sim.fault("status", status=429, times=None, headers=asks)
    with pytest.raises(StatusError) as caught:
        sim.post()
    assert caught.value.status == 429
    assert sim.asked == hlcli.http.MAX_REFUSALS
    assert exit_code_for(caught.value) is ExitCode.TEMPORARY


def test_a_429_for_ever_ends_at_the_runs_deadline(sim, clock):
    sim.fault("status", status=429, times=None, headers={"Retry-After": "40"})
    with pytest.raises(DeadlineError):
        sim.post(HttpClient(deadline=clock.monotonic() + 100))
    assert clock.sleeps == [40, 40]
    assert sim.asked == 3


def test_refusals_and_failures_are_counted_apart(sim, clock):
    # More attempts than either limit allows alone, and still the answer arrives.
    for _ in range(5):
        sim.fault("status", status=429, headers={"Retry-After": "1"})
        sim.fault("status", status=502)
    assert sim.whole(sim.post())
    assert sim.asked == 11


def test_a_429_through_a_budget_waits_at_the_gate(sim, settings):
    sim.fault("status", status=429, headers={"Retry-After": "1"})
    budget = Budget(settings())
    try:
        began = time.monotonic()
        assert sim.whole(sim.post(HttpClient(budget=budget)))
        assert time.monotonic() - began >= 1
        assert (sim.asked, budget.requests) == (2, 2)
    finally:
        budget.close()


@given(st.text(st.characters(max_codepoint=255), max_size=40) | st.integers().map(str) | st.floats().map(str))
def test_no_retry_after_is_longer_than_the_cap_or_an_error(value):
    assert 0 <= hlcli.http._retry_after({"Retry-After": value}) <= hlcli.http.RETRY_AFTER_CAP_S


# F9: error statuses


@pytest.mark.parametrize("status", [408, 425, 500, 502, 503, 504])
def test_a_server_error_is_retried_and_then_succeeds(sim, clock, status):
    sim.fault("status", status=status, times=3)
    assert sim.whole(sim.post())
    assert sim.asked == 4
    assert len(clock.sleeps) <= 3
    assert all(pause <= hlcli.http.BACKOFF_CAP_S for pause in clock.sleeps)


def test_a_server_error_for_ever_ends_after_a_bounded_number_of_requests(sim, clock):
    sim.fault("status", status=503, times=None)
    with pytest.raises(StatusError, match="503"):
        sim.post()
    assert sim.asked == hlcli.http.MAX_ATTEMPTS


def test_a_503_waits_as_long_as_the_server_asks(sim, clock):
    sim.fault("status", status=503, headers={"Retry-After": "77"})
    assert sim.whole(sim.post())
    assert clock.sleeps == [77]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 410, 413, 422, 201, 204, 301, 302, 307])
def test_a_status_that_retrying_does_not_cure_costs_one_request(sim, clock, status):
    sim.fault("status", status=status, times=None, headers={"Location": f"{sim.simulator.url}/info"})
    with pytest.raises(StatusError) as caught:
        sim.post()
    assert caught.value.status == status
    assert (sim.asked, clock.sleeps) == (1, [])


def test_null_with_200_is_an_answer_and_with_500_an_error(sim, clock):
    sim.fault("null")
    assert sim.post() is None
    sim.fault("null", status=500, times=None)
    with pytest.raises(StatusError, match="500"):
        sim.post()
    assert sim.asked == 1 + hlcli.http.MAX_ATTEMPTS


def test_the_budget_is_charged_for_every_attempt(sim, clock, settings, connection):
    sim.fault("status", status=500, times=2)
    budget = Budget(settings())
    try:
        sim.post(HttpClient(budget=budget), cost_of=lambda _: 7)
        assert (budget.requests, budget.weight) == (3, 47)
        assert connection.execute(
            "select sum(weight), sum(requests) from rate_budget_buckets"
        ).fetchone() == (47, 3)
    finally:
        budget.close()


# F10: no answer


def test_a_reset_is_retried(sim, quick):
    sim.fault("reset", times=2)
    assert sim.whole(sim.post())
    assert sim.asked == 3


def test_silence_is_ended_by_the_read_timeout_and_retried(sim, quick, monkeypatch):
    monkeypatch.setattr(hlcli.http, "READ_TIMEOUT_S", 0.3)
    sim.fault("silent", times=2)
    assert sim.whole(sim.post())
    assert sim.asked == 3


def test_a_refused_connection_and_an_unknown_host_are_source_errors(clock):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/info", "http://no-such-host.invalid/info"):
        with pytest.raises(SourceError) as caught:
            post(url)
        assert exit_code_for(caught.value) is ExitCode.TEMPORARY
    assert len(clock.sleeps) <= 2 * hlcli.http.MAX_ATTEMPTS


def test_a_server_that_speaks_no_tls_is_a_source_error(clock):
    def talk(connection, number):
        connection.sendall(sized(b"[]"))

    with socket_server(talk, until=b"\x16\x03") as (url, count):
        with pytest.raises(SourceError, match="SSL"):
            post(url.replace("http:", "https:"))
        assert count[0] == hlcli.http.MAX_ATTEMPTS


def test_what_is_no_http_is_retried(quick):
    def talk(connection, number):
        connection.sendall(b"\x00\x01\x02 what?\r\n\r\n" if number < 3 else sized(b"[1]"))

    with socket_server(talk) as (url, count):
        assert post(url) == [1]
        assert count[0] == 3


def test_a_connection_closed_while_idle_is_opened_again(quick):
    def talk(connection, number):
        connection.sendall(sized(str(number).encode()).replace(b"Connection: close\r\n", b""))

    client = HttpClient()
    with socket_server(talk) as (url, count):
        assert [client.post_json(url, {}, weight=2) for _ in range(3)] == [1, 2, 3]
        assert count[0] == 3
    client.close()


# F11: not the whole truth


@pytest.mark.parametrize("kind", ["cut", "cut_chunked", "cut_close"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_cut_answer_is_never_taken_for_a_shorter_one(sim, quick, kind, share):
    sim.fault(kind, share=share, times=2)
    assert sim.whole(sim.post())
    assert sim.asked == 3


@pytest.mark.parametrize("kind", ["cut", "cut_chunked", "cut_close"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_cut_gzipped_list_is_never_taken_for_a_shorter_one(sim, quick, kind, share):
    sim.fault(kind, match=VAULTS, share=share, times=2)
    found, _ = sim.get()
    assert len(found) == 20
    # A gzip stream may lose a byte of its trailer with nothing of the body missing.
    assert sim.asked == 3 or (sim.asked, kind, share) == (1, "cut_close", 1.0)


@pytest.mark.parametrize("kind", ["cut", "cut_chunked", "cut_close"])
def test_an_answer_that_is_always_cut_is_a_source_error(sim, clock, kind):
    sim.fault(kind, times=None)
    with pytest.raises(SourceError):
        sim.post()
    assert sim.asked == hlcli.http.MAX_ATTEMPTS


def test_a_body_cut_where_it_is_valid_json_is_noticed_by_its_length(quick):
    def talk(connection, number):
        whole = sized(b"[1, 2, 3]          ")
        connection.sendall(whole[:-8] if number == 1 else whole)

    with socket_server(talk) as (url, count):
        assert post(url) == [1, 2, 3]
        assert count[0] == 2


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "html"},
        {"kind": "replace", "body": b""},
        {"kind": "replace", "body": b'{"a": 1'},
        {"kind": "replace", "body": b'{"a": 1} {"b": 2}'},
        {"kind": "replace", "body": b'{"a": "\xff\xfe"}'},
        {"kind": "replace", "body": b"<html>with a JSON content type</html>"},
        {"kind": "replace", "body": b"[NaN]"},
        {"kind": "replace", "body": b"[Infinity]"},
        {"kind": "replace", "body": b"[-Infinity]"},
        {"kind": "replace", "body": b"[1e9999999999999999999999]"},
        {"kind": "deep"},
        {"kind": "bigint"},
    ],
    ids=lambda fault: f"{fault['kind']} {fault.get('body', b'')!r:.24}",
)
def test_what_is_no_json_is_a_bad_payload(sim, clock, fault):
    sim.fault(**fault, times=2)
    assert sim.whole(sim.post())
    assert sim.asked == 3
    sim.fault(**fault, times=None)
    with pytest.raises(BadPayloadError) as caught:
        sim.post()
    assert sim.asked == 3 + hlcli.http.MAX_ATTEMPTS
    assert len(str(caught.value)) < 200, "the answer itself is not in the message"


@pytest.mark.parametrize("body", [b"{}", b"[]", b"0", b'""', b"false"])
def test_empty_answers_stay_apart_from_null(sim, body):
    sim.fault("replace", body=body)
    answer = sim.post()
    assert answer is not None
    assert answer == json.loads(body)


def test_a_gzip_body_that_is_broken_is_retried(quick):
    packed = gzip.compress(b"[1, 2, 3]")

    def talk(connection, number):
        body = packed[:10] + b"\xff\xff\xff" + packed[13:] if number == 1 else packed
        connection.sendall(sized(body, "Content-Encoding: gzip"))

    with socket_server(talk) as (url, count):
        assert post(url) == [1, 2, 3]
        assert count[0] == 2


def test_a_list_that_is_unchanged_is_not_served_again(sim):
    client = HttpClient()
    url = f"{sim.simulator.stats_url}/vaults"
    size, etag = client.download(url, check=lambda body: len(body.read()))
    assert size == len(sim.simulator.vaults.list_body)
    assert client.download(url, etag=etag, check=lambda body: len(body.read())) == (None, etag)
    client.close()


def test_a_304_that_nobody_asked_for_is_an_error(sim):
    sim.fault("status", match=VAULTS, status=304, times=None)
    with pytest.raises(StatusError, match="304"):
        sim.get()
    assert sim.asked == 1


# Digits (G9)


def test_numbers_arrive_digit_for_digit(sim, rng):
    texts = [
        "0.1",
        "-0.0",
        "1e400",
        "1E-400",
        "1e99999999999",
        "-1e99999999999",
        "123456789012345678901234567890.123456789012345678901234567890",
        "9" * 4000,
        "0." + "0" * 5000 + "1",
        *(f"{rng.randrange(10 ** rng.randrange(1, 40))}.{rng.randrange(10**30):030d}" for _ in range(200)),
    ]
    sim.fault("patch", patch=lambda _: [RawNumber(text) for text in texts])
    found = sim.post()
    for text, number in zip(texts, found, strict=True):
        assert type(number) in (int, Decimal)
        expected = int(text) if text.isdigit() else Decimal(text)
        assert (number, str(number)) == (expected, str(expected))


@given(st.decimals(allow_nan=False, allow_infinity=False))
def test_any_decimal_survives_decoding(number):
    text = str(number)
    found = decode("x", text.encode())
    assert str(found) == text or Decimal(found).compare_total(number + 0) == 0 or (found == 0 and number == 0)


# F12: too slow, too much


def test_a_dripping_body_is_ended_by_the_requests_clock(sim, quick):
    sim.fault("drip", times=None, seconds=60)
    began = time.monotonic()
    with pytest.raises(SourceError, match="whole within 0.5 s"):
        sim.post(HttpClient(attempts=2), timeout_s=0.5)
    assert time.monotonic() - began < 30, "not by the end of the drip"


def test_a_dripping_body_is_retried(sim, quick):
    sim.fault("drip", seconds=60)
    assert sim.whole(sim.post(timeout_s=1))
    assert sim.asked == 2


def test_dripping_headers_are_ended_by_the_requests_clock_and_retried(sim, quick):
    sim.fault("drip_headers", times=2, seconds=60)
    began = time.monotonic()
    with pytest.raises(SourceError):
        sim.post(HttpClient(attempts=2), timeout_s=0.5)
    assert time.monotonic() - began < 30
    assert sim.asked == 2
    sim.simulator.clear_faults()
    assert sim.whole(sim.post())


def test_an_answer_without_a_length_that_drips_is_no_whole_answer(quick, monkeypatch):
    # The clock ends it by closing the socket, which is how such an answer says that it is complete.
    monkeypatch.setattr(hlcli.http, "MAX_ATTEMPTS", 1)

    def talk(connection, number):
        connection.sendall(reply(b"[1]", "Content-Type: application/json"))
        for _ in range(600):
            time.sleep(0.05)
            connection.sendall(b" ")

    with socket_server(talk) as (url, _), pytest.raises(SourceError, match="whole within"):
        post(url, timeout_s=0.4)


def test_headers_without_end_are_a_source_error(quick):
    def talk(connection, number):
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for index in range(100_000):
            connection.sendall(b"X-%d: y\r\n" % index)

    with socket_server(talk) as (url, count), pytest.raises(SourceError):
        post(url)
    assert count[0] <= hlcli.http.MAX_ATTEMPTS


def test_a_body_one_byte_over_the_cap_is_a_bad_payload(quick):
    def talk(connection, number):
        connection.sendall(sized(b"[1]"))

    with socket_server(talk) as (url, count):
        assert post(url, limit_bytes=3) == [1]
        with pytest.raises(BadPayloadError, match="more than"):
            post(url, limit_bytes=2)
        assert count[0] == 1 + hlcli.http.MAX_ATTEMPTS


def test_redirects_of_a_download_are_followed_a_bounded_number_of_times(quick):
    hops = 3

    def talk(connection, number):
        last = number > hops
        connection.sendall(sized(b"[7]") if last else sized(b"", f"Location: /{number}", status="302 Found"))

    def fetch(url):
        client = HttpClient()
        found, _ = client.download(url, check=lambda body: body.read())
        client.close()
        return found

    with socket_server(talk) as (url, count):
        assert fetch(url) == b"[7]"
        assert count[0] == 4
    hops = 10**9
    with socket_server(talk) as (url, count):
        with pytest.raises(SourceError, match=r"(?i)redirect"):
            fetch(url)
        assert count[0] <= hlcli.http.MAX_ATTEMPTS * (hlcli.http.MAX_REDIRECTS + 1)


MEASURED = """
import resource, sys
import requests, urllib3, hlcli.http
from hlcli.http import HttpClient, SourceError
from hlcli.sim import Fault
hlcli.http.MAX_ATTEMPTS = 2
hlcli.http.BACKOFF_BASE_S = 0.001
how, url, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = HttpClient()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
told = "no error"
try:
    if how == "post":
        client.post_json(url, {"type": "x"}, weight=20, limit_bytes=limit, timeout_s=10)
    else:
        client.download(url, check=lambda body: None, limit_bytes=limit, timeout_s=3)
except SourceError as error:
    told = str(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, told)
"""


def grown_by(how: str, url: str, limit: int) -> tuple[float, str]:
    """By how many MB a process grew that asked for this, and what it was told."""

    def bound() -> None:
        # A client without bounds must fail the test, not the machine.
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    done = subprocess.run(
        [sys.executable, "-c", MEASURED, how, url, str(limit)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=bound,
    )
    assert done.returncode == 0, done.stderr
    grown, _, told = done.stdout.strip().partition(" ")
    return int(grown) / (1 if sys.platform != "darwin" else 1024) / 1024, told


@pytest.mark.parametrize(("kind", "how"), [("endless", "post"), ("gzip_bomb", "post"), ("gzip_bomb", "get")])
def test_a_body_without_end_is_ended_by_the_cap_in_bounded_memory(sim, kind, how):
    sim.fault(kind, times=None, seconds=60)
    url = sim.simulator.info_url if how == "post" else f"{sim.simulator.stats_url}/vaults"
    grown, told = grown_by(how, url, 24 << 20)
    assert "more than 24 MB" in told
    assert grown < 20, "the body is kept in a file, not in memory"


def test_a_redirect_with_a_body_without_end_is_ended_in_bounded_memory():
    def talk(connection, number):
        connection.sendall(reply(b"", "Location: /next", status="302 Found"))
        while True:
            connection.sendall(bytes(1 << 16))

    with socket_server(talk) as (url, _):
        grown, told = grown_by("get", url, 4 << 20)
    assert told != "no error"
    assert grown < 40


def test_an_error_page_without_end_is_ended_by_the_cap(quick):
    def talk(connection, number):
        connection.sendall(reply(b"", status="503 Service Unavailable"))
        while True:
            connection.sendall(bytes(1 << 16))

    with socket_server(talk) as (url, count):
        with pytest.raises(SourceError):
            post(url, limit_bytes=1 << 20)
        assert count[0] == hlcli.http.MAX_ATTEMPTS


# The run's deadline


@pytest.mark.parametrize("kind", ["silent", "drip", "drip_headers", "endless"])
def test_the_runs_deadline_beats_every_slow_answer(sim, kind):
    sim.fault(kind, times=None, seconds=60)
    client = HttpClient(deadline=time.monotonic() + 0.5)
    began = time.monotonic()
    with pytest.raises(DeadlineError):
        sim.post(client, limit_bytes=1 << 40)
    assert time.monotonic() - began < 15, "the read timeout is 20 s"


def test_the_runs_deadline_beats_the_connect_timeout():
    with socket.socket() as full, ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        # Fill the queue of a server that never accepts: further connections get no answer at all.
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            post(f"http://127.0.0.1:{full.getsockname()[1]}", HttpClient(deadline=began + 0.5))
        assert time.monotonic() - began < 8, "the connect timeout is 10 s"


@pytest.mark.parametrize(("status", "raised"), [(429, DeadlineError), (500, StatusError)])
def test_the_runs_deadline_beats_the_wait_before_a_retry(sim, clock, status, raised):
    """A 429 speaks of all that the run asks; a 500 that will not pass in time costs its own unit only."""
    sim.fault("status", status=status, times=None, headers={"Retry-After": "50"})
    with pytest.raises(raised):
        sim.post(HttpClient(deadline=clock.monotonic() + 40))
    assert (sim.asked, clock.sleeps) == (1, [])


def test_a_run_that_ends_while_waiting_tells_why_it_waited(sim, clock):
    sim.fault("status", status=503, times=None)
    with pytest.raises(StatusError, match="HTTP 503"):
        sim.post(HttpClient(deadline=clock.monotonic() + 0.001 + hlcli.http.BACKOFF_BASE_S))


def test_nothing_is_sent_after_the_runs_deadline(sim):
    with pytest.raises(DeadlineError):
        sim.post(HttpClient(deadline=time.monotonic() - 1))
    assert sim.asked == 0


def test_an_own_limit_spaces_requests_evenly(sim, clock):
    client = HttpClient(per_second=4)
    began = clock.monotonic()
    for _ in range(5):
        sim.post(client)
    assert clock.monotonic() - began >= 1.0
    assert all(pause <= 0.25 for pause in clock.sleeps)


def test_threads_share_a_client(sim, quick):
    for kind in ("reset", "cut", "html"):
        sim.fault(kind, times=3)
    client = HttpClient()
    found: list[bool] = []

    def work():
        for _ in range(5):
            answer = client.post_json(sim.simulator.info_url, sim.question, weight=20)
            found.append(sim.whole(answer))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    client.close()
    assert found == [True] * 30
    assert sim.asked == 39


# Secrets (G8)

SECRET = "hunter2secret"


def test_user_and_password_of_a_url_are_never_in_an_error(sim, clock, caplog):
    port = sim.simulator.port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    for kind, options in {
        "status": {"status": 500},
        "html": {},
        "cut": {},
        "reset": {},
        "bigint": {},
    }.items():
        sim.simulator.clear_faults()
        sim.fault(kind, times=None, **options)
        with pytest.raises(SourceError) as caught:
            post(f"http://user:{SECRET}@127.0.0.1:{port}/info")
        assert SECRET not in str(caught.value)
    for place in (f"127.0.0.1:{closed}/x", "no-such-host.invalid/x"):
        with pytest.raises(SourceError) as caught:
            post(f"http://user:{SECRET}@{place}?token={SECRET}")
        assert SECRET not in str(caught.value)
        assert SECRET not in one_line(caught.value)
    assert SECRET not in caplog.text


def test_a_url_that_requests_cannot_parse_shows_no_password(clock):
    with pytest.raises(SourceError) as caught:
        post(f"http://user:{SECRET}@127.0.0.1:99999/info")
    assert SECRET not in one_line(caught.value)
