"""The simulated exchange, over real sockets: what it serves, refuses, and spoils."""

import gzip
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
import requests

from hlcli.sim import Fault, Simulator
from hlcli.sim.faults import load_faults
from hlcli.sim.vaults import VaultUniverse
from hlcli.sim.weights import WeightWindow, base_weight, extra_weight
from hlcli.sim.wire import RawNumber, encode

NOW_MS = 1_794_000_000_000 // 3_600_000 * 3_600_000
UNKNOWN_ADDRESS = "0x" + "0" * 40
VAULTS = "/Mainnet/vaults"


@pytest.fixture(scope="module")
def universe():
    return VaultUniverse(1, 200, NOW_MS)


@pytest.fixture
def sim():
    with Simulator(vaults=60, now_ms=NOW_MS) as simulator:
        yield simulator


@pytest.fixture
def http_session():
    with requests.Session() as session:
        session.trust_env = False
        yield session


def ask(sim, session, number=0, **more):
    """A vaultDetails request, with a time limit that a hanging fault would meet."""
    request = {"type": "vaultDetails", "vaultAddress": sim.vaults.addresses[number], **more}
    return session.post(sim.info_url, json=request, timeout=5)


def raw(sim, seconds=5.0, body=None):
    """Everything one vaultDetails request brings, byte by byte, until the server closes or the time is up."""
    data = body or json.dumps({"type": "vaultDetails", "vaultAddress": sim.vaults.addresses[0]}).encode()
    got = b""
    with socket.create_connection(("127.0.0.1", sim.port), timeout=seconds) as connection:
        connection.sendall(b"POST /info HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            connection.settimeout(max(0.01, end - time.monotonic()))
            try:
                piece = connection.recv(1 << 16)
            except TimeoutError:
                break
            if not piece:
                break
            got += piece
    return got


def eventually(condition, seconds=3.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


# --- what is served ----------------------------------------------------------------------------------------


def category(value):
    if isinstance(value, str):
        if re.fullmatch(r"-?\d+(\.\d+)?", value):
            return "decimal text"
        return "address" if re.fullmatch(r"0x[0-9a-f]{40}", value) else "text"
    if isinstance(value, bool) or value is None:
        return repr(type(value))
    return "number"


def misfit(ours, recorded, where="$"):
    """The first place where a recorded value has a structure that ours has not, or None."""
    if isinstance(recorded, dict):
        if not isinstance(ours, dict):
            return f"{where}: {type(ours).__name__} for an object"
        if set(ours) != set(recorded):
            return f"{where}: keys differ in {sorted(set(ours) ^ set(recorded))}"
        found = (misfit(ours[name], recorded[name], f"{where}.{name}") for name in recorded)
        return next((text for text in found if text), None)
    if isinstance(recorded, list):
        if not isinstance(ours, list):
            return f"{where}: {type(ours).__name__} for a list"
        for item in recorded:
            if not ours:
                return f"{where}: an empty list for a filled one"
            reason = misfit(ours[0], item, f"{where}[]")
            if reason and all(misfit(own, item, where) for own in ours[1:]):
                return reason
        return None
    return None if category(ours) == category(recorded) else f"{where}: {ours!r} for {recorded!r}"


def recorded(pattern):
    folder = os.environ.get("HLCLI_RECORDED")
    if not folder:
        pytest.skip("HLCLI_RECORDED does not point at recorded responses")
    files = sorted((Path(folder) / "hyperliquid").glob(pattern))
    assert files, f"nothing recorded under {pattern}"
    return [json.loads(file.read_text("utf-8")) for file in files]


def test_list_entries_have_the_recorded_shape(sim, http_session):
    served = http_session.get(sim.stats_url + "/vaults", timeout=5).json()
    normal = [entry for entry in served if entry["summary"]["relationship"]["type"] == "normal"]
    for answer in recorded("vaults/*.json"):
        for entry in answer:
            assert misfit(normal[0], entry) is None
            counts = [(name, len(points)) for name, points in entry["pnls"]]
            assert [(name, len(points)) for name, points in normal[0]["pnls"]] == counts


def test_details_have_the_recorded_shape(sim, http_session):
    ours = ask(sim, http_session).json()
    answers = [answer for answer in recorded("vaultDetails/*.json") if answer is not None]
    assert answers
    for answer in answers:
        assert misfit(ours, answer) is None


def test_portfolio_has_the_recorded_shape_and_point_counts(sim, http_session):
    ours = ask(sim, http_session).json()["portfolio"]
    for answer in recorded("portfolio/*.json"):
        assert misfit(ours, answer) is None
        for series in ("accountValueHistory", "pnlHistory"):
            counts = [(name, len(history[series])) for name, history in answer]
            assert [(name, len(history[series])) for name, history in ours] == counts


def test_shape_comparison_can_fail():
    assert misfit({"a": 1}, {"a": "1.0"}) == "$.a: 1 for '1.0'"
    assert misfit({"a": 1}, {"b": 1}) == "$: keys differ in ['a', 'b']"
    assert misfit([[1, "1.0"]], [["day", {"x": 1}]]) is not None
    assert misfit([["day", {"x": 1}]], [["week", {"x": 2}]]) is None


def test_details_agree_with_the_list(sim, http_session):
    served = http_session.get(sim.stats_url + "/vaults", timeout=5).json()
    assert [entry["summary"]["vaultAddress"] for entry in served] == sim.vaults.addresses
    for number, entry in enumerate(served[:50]):
        details = ask(sim, http_session, number).json()
        summary, windows = entry["summary"], dict(details["portfolio"])
        for name in ("name", "leader", "isClosed", "relationship"):
            assert details[name] == summary[name]
        assert details["apr"] == entry["apr"]
        assert windows["allTime"]["accountValueHistory"][-1] == [NOW_MS, summary["tvl"]]
        for window, points in entry["pnls"]:
            assert windows[window]["pnlHistory"][-1] == [NOW_MS, points[-1]]
            assert windows[window]["pnlHistory"][0][1] == points[0] == "0.0"


def test_universe_looks_like_the_real_one():
    universe = VaultUniverse(1, 2000, NOW_MS)
    entries = json.loads(universe.list_body, parse_float=Decimal)
    summaries = [entry["summary"] for entry in entries]
    assert 0.30 < sum(not one["isClosed"] for one in summaries) / 2000 < 0.37
    assert 0.41 < sum(one["tvl"] == "0.0" for one in summaries) / 2000 < 0.49
    values = sorted(Decimal(one["tvl"]) for one in summaries if not one["isClosed"])
    assert all(value >= 0 for value in values)
    assert values[-1] > 1000 * values[len(values) // 2]
    names = [one["name"] for one in summaries]
    assert len(set(names)) < len(names)
    assert len({name.strip() for name in names}) < len(set(names))
    assert any(name != name.strip() for name in names)
    assert any(ord(char) > 0xFFFF for name in names for char in name)
    assert len({one["vaultAddress"] for one in summaries}) == 2000
    kinds = Counter(one["relationship"]["type"] for one in summaries)
    assert kinds["parent"] == 1
    children = {one["vaultAddress"] for one in summaries if one["relationship"]["type"] == "child"}
    assert set(summaries[0]["relationship"]["data"]["childAddresses"]) == children
    imitations = [one for one in summaries if one["name"] == summaries[0]["name"]]
    assert [one["isClosed"] for one in imitations] == [False, True]
    assert all(type(entry["apr"]) is Decimal for entry in entries)
    assert all(one["createTimeMillis"] < NOW_MS for one in summaries)


def test_details_hold_the_oddities(universe):
    details = [universe.vault_details(address) for address in universe.addresses[:100]]
    assert all(len(one["followers"]) <= 100 for one in details)
    assert len(details[0]["followers"]) == 100
    for one in details:
        leaders = [row for row in one["followers"] if row["user"] == "Leader"]
        assert len(leaders) == (0 if one["isClosed"] else 1)
    assert {"maxDistributable" in one for one in details} == {True, False}
    assert any("\n" in one["description"] for one in details)
    assert any(one["leaderCommission"] == 0 for one in details)
    assert any(one["leaderCommission"] == RawNumber("0.1") for one in details)
    longest = max(
        len(value.partition(".")[2])
        for one in details
        for _, history in one["portfolio"]
        for _, value in history["accountValueHistory"]
    )
    assert longest == 10


def test_histories_ascend_and_keep_most_points_an_hour_later(universe):
    later = VaultUniverse(1, 200, NOW_MS + 3_600_000)
    for address in universe.addresses[:30]:
        first = dict(universe.vault_details(address)["portfolio"])
        second = dict(later.vault_details(address)["portfolio"])
        for history in first.values():
            times = [at for at, _ in history["accountValueHistory"]]
            assert times == sorted(set(times))
            assert times == [at for at, _ in history["pnlHistory"]]
        for window in ("week", "month"):
            old = dict(map(tuple, first[window]["accountValueHistory"]))
            new = dict(map(tuple, second[window]["accountValueHistory"]))
            shared = old.keys() & new.keys()
            assert len(shared) > len(old) // 2
            assert all(old[at] == new[at] for at in shared)


def test_same_seed_same_bytes_and_a_vault_ignores_the_size_of_its_universe(universe):
    again, larger = VaultUniverse(1, 200, NOW_MS), VaultUniverse(1, 400, NOW_MS)
    assert again.list_body == universe.list_body
    assert larger.list_body.startswith(universe.list_body[:-2])
    for address in universe.addresses[:20]:
        assert encode(larger.vault_details(address)) == encode(universe.vault_details(address))
    other = VaultUniverse(2, 200, NOW_MS)
    assert not set(other.addresses) & set(universe.addresses)
    assert VaultUniverse(1, 200, NOW_MS + 3_600_000).list_body != universe.list_body


def test_answers_do_not_change_between_requests_or_processes(sim, http_session):
    first, second = ask(sim, http_session).content, ask(sim, http_session).content
    assert first == second
    code = (
        "import sys; from hlcli.sim.vaults import VaultUniverse as U; from hlcli.sim.wire import encode\n"
        f"u = U(1, 60, {NOW_MS}); sys.stdout.buffer.write(encode(u.vault_details(u.addresses[0])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=30)
    assert done.stdout == first


def test_default_time_is_the_hour():
    simulator = Simulator(vaults=1)
    assert simulator.now_ms % 3_600_000 == 0
    assert 0 <= time.time() * 1000 - simulator.now_ms < 2 * 3_600_000


def test_real_size_is_quick_and_as_large_as_the_real_list():
    started = time.process_time()
    simulator = Simulator(vaults=9500, now_ms=NOW_MS)
    assert time.process_time() - started < 2
    assert 13e6 < len(simulator.vaults.list_body) < 16e6


def test_info_requests_that_do_not_deserialize(sim, http_session):
    bad = [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"type": 1}',
        b'{"type": "leaderboard"}',
        b'{"type": "vaultDetails"}',
        b'{"type": "vaultDetails", "vaultAddress": "0x12"}',
        b'{"type": "vaultDetails", "vaultAddress": 7}',
        json.dumps({"type": "vaultDetails", "vaultAddress": UNKNOWN_ADDRESS, "user": "me"}).encode(),
    ]
    for body in bad:
        answer = http_session.post(sim.info_url, data=body, timeout=5)
        assert answer.status_code == 422, body
        assert answer.text == "Failed to deserialize the JSON body into the target type"
        assert answer.headers["Content-Type"].startswith("text/plain")
    assert sim.count(status=422) == len(bad)


def test_null_for_what_is_no_vault_and_mixed_case_addresses(sim, http_session):
    request = {"type": "vaultDetails", "vaultAddress": UNKNOWN_ADDRESS}
    answer = http_session.post(sim.info_url, json=request, timeout=5)
    assert (answer.status_code, answer.text) == (200, "null")
    upper = "0x" + sim.vaults.addresses[3][2:].upper()
    request = {"type": "vaultDetails", "vaultAddress": upper, "user": upper}
    answer = http_session.post(sim.info_url, json=request, timeout=5)
    assert answer.json()["vaultAddress"] == sim.vaults.addresses[3]


def test_paths_and_methods(sim, http_session):
    assert http_session.get(sim.info_url, timeout=5).status_code == 404
    assert http_session.get(sim.url + "/Mainnet/nothing", timeout=5).status_code == 404
    assert http_session.post(sim.stats_url + "/vaults", data=b"x", timeout=5).status_code == 405
    big = http_session.post(sim.info_url, data=b" " * ((1 << 20) + 1), timeout=5)
    assert big.status_code == 413
    chunked = http_session.post(sim.info_url, data=iter([b"{}"]), timeout=5)
    assert chunked.status_code == 411


def test_only_loopback_listens(sim):
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", sim.port), timeout=1):
        pass


def test_keep_alive_and_env(sim, http_session):
    assert sim.env() == {
        "HL_API_URL": f"http://127.0.0.1:{sim.port}/info",
        "HL_STATS_URL": f"http://127.0.0.1:{sim.port}/Mainnet",
    }
    connection = http.client.HTTPConnection("127.0.0.1", sim.port, timeout=5)
    body = json.dumps({"type": "vaultDetails", "vaultAddress": sim.vaults.addresses[0]})
    local = set()
    for _ in range(3):
        connection.request("POST", "/info", body)
        local.add(connection.sock.getsockname())
        connection.getresponse().read()
    connection.close()
    assert len(local) == 1


# --- the document ------------------------------------------------------------------------------------------


def test_list_has_validators_and_compression(sim, http_session):
    url = sim.stats_url + "/vaults"
    plain = http_session.get(url, headers={"Accept-Encoding": "identity"}, timeout=5)
    assert "Content-Encoding" not in plain.headers
    assert plain.content == sim.vaults.list_body
    packed = http_session.get(url, headers={"Accept-Encoding": "gzip"}, timeout=5, stream=True)
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.raw.read(decode_content=False)) == plain.content
    tag = plain.headers["ETag"]
    same = http_session.get(url, headers={"if-none-match": f'"x", {tag}'}, timeout=5)
    assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", tag)
    assert http_session.get(url, headers={"If-None-Match": '"other"'}, timeout=5).status_code == 200
    since = {"If-Modified-Since": plain.headers["Last-Modified"]}
    assert http_session.get(url, headers=since, timeout=5).status_code == 304
    head = http_session.head(url, headers={"Accept-Encoding": "identity"}, timeout=5)
    assert head.headers["ETag"] == tag
    assert int(head.headers["Content-Length"]) == len(plain.content)
    assert sim.count(VAULTS, 304) == 2
    assert sim.exchange.window.used == 0


def test_tag_follows_the_content(sim, http_session):
    url = sim.stats_url + "/vaults"
    tag = http_session.get(url, timeout=5).headers["ETag"]
    sim.add_fault(Fault(VAULTS, "shrink", share=0.25))
    short = http_session.get(url, headers={"If-None-Match": tag}, timeout=5)
    assert short.status_code == 200
    assert short.headers["ETag"] != tag
    assert [entry["summary"]["vaultAddress"] for entry in short.json()] == sim.vaults.addresses[:15]


# --- weights -----------------------------------------------------------------------------------------------


def test_published_weights():
    assert base_weight("clearinghouseState") == 2
    assert base_weight("vaultDetails") == base_weight("anything") == 20
    assert base_weight("userRole") == 60
    assert base_weight("userFillsByTime") + extra_weight("userFillsByTime", 2000) == 120
    assert base_weight("candleSnapshot") + extra_weight("candleSnapshot", 5000) == 104
    assert extra_weight("vaultDetails", 5000) == 0
    assert [extra_weight("userFills", items) for items in (0, 1, 20, 21)] == [0, 1, 1, 2]


def test_window_slides():
    now = [100.0]
    window = WeightWindow(100, lambda: now[0])
    assert window.admit(60)
    now[0] = 130.0
    assert window.admit(40)
    assert not window.admit(1)
    now[0] = 159.9
    assert not window.admit(1)
    now[0] = 160.0
    assert window.used == 40
    assert window.admit(60)
    window.charge(50)
    assert (window.used, window.peak, window.refused) == (150, 150, 2)
    now[0] = 190.0
    assert (window.used, window.admit(1)) == (110, False)
    now[0] = 220.0
    assert window.used == 0


def test_weights_are_enforced(http_session):
    now = [0.0]
    with Simulator(vaults=5, now_ms=NOW_MS, weight_per_minute=50, clock=lambda: now[0]) as sim:
        assert [ask(sim, http_session).status_code for _ in range(4)] == [200, 200, 429, 429]
        refused = ask(sim, http_session)
        assert (refused.text, refused.headers["Content-Type"]) == ("null", "application/json")
        assert "cloudfront" in refused.headers["X-Cache"]
        assert "Retry-After" not in refused.headers
        assert [record.weight for record in sim.log] == [20, 20, 0, 0, 0]
        assert sim.refused == sim.count("vaultDetails", 429) == 3
        assert http_session.get(sim.stats_url + "/vaults", timeout=5).status_code == 200
        now[0] = 60.0
        assert ask(sim, http_session).status_code == 200
        sim.add_fault(Fault("vaultDetails", "status", status=429))
        assert ask(sim, http_session).status_code == 429
        assert sim.refused == 3


def test_returned_items_are_charged(sim, http_session):
    from hlcli.sim.answers import Answer

    sim.exchange.register_info({"userFills": lambda _: Answer([{}] * 2000, 2000)})
    body = {"type": "userFills", "user": UNKNOWN_ADDRESS}
    assert len(http_session.post(sim.info_url, json=body, timeout=5).json()) == 2000
    (record,) = sim.log
    assert (record.weight, record.kind, record.address) == (120, "userFills", UNKNOWN_ADDRESS)


def test_parallel_clients_never_overdraw():
    with Simulator(vaults=5, now_ms=NOW_MS, weight_per_minute=400) as sim:
        codes = []

        def client():
            with requests.Session() as session:
                session.trust_env = False
                codes.extend(ask(sim, session).status_code for _ in range(5))

        threads = [threading.Thread(target=client) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Counter(codes) == {200: 20, 429: 20}
        assert sim.exchange.window.peak == 400
        assert sim.count() == 40


# --- faults: which requests they hit -----------------------------------------------------------------------


def test_faults_count_and_select(sim, http_session):
    sim.add_fault(Fault("vaultDetails", "status", status=503, times=2, after=1))
    assert [ask(sim, http_session).status_code for _ in range(4)] == [200, 503, 503, 200]
    sim.clear_faults()
    sim.add_fault(Fault("*", "status", status=500, times=None, address=sim.vaults.addresses[2].upper()))
    assert [ask(sim, http_session, number).status_code for number in (1, 2, 3, 2)] == [200, 500, 200, 500]
    assert http_session.get(sim.stats_url + "/vaults", timeout=5).status_code == 200
    sim.clear_faults()
    sim.add_fault(Fault("*", "status", status=404, times=1))
    sim.add_fault(Fault("/info", "null", after=1))
    assert [ask(sim, http_session).status_code for _ in range(2)] == [404, 200]
    assert [record.fault for record in sim.log][-2:] == ["status", "null"]
    assert ask(sim, http_session).json() is not None


@pytest.mark.parametrize(
    ("status", "content_type", "body"),
    [
        (429, "application/json", "null"),
        (422, "text/plain", "Failed to deserialize the JSON body into the target type"),
        (500, "text/html", "<html>"),
        (502, "text/html", "<html>"),
        (403, "text/html", "<html>"),
    ],
)
def test_status_bodies(sim, http_session, status, content_type, body):
    sim.add_fault(Fault("*", "status", status=status, headers={"Retry-After": "soon"}))
    answer = ask(sim, http_session)
    assert answer.status_code == status
    assert answer.headers["Content-Type"].startswith(content_type)
    assert answer.text.startswith(body)
    assert answer.headers["Retry-After"] == "soon"
    assert sim.log[0].status == status


def test_status_with_own_body(sim, http_session):
    fault = Fault("*", "status", status=500, body="null", headers={"content-type": "application/json"})
    sim.add_fault(fault)
    answer = ask(sim, http_session)
    assert (answer.status_code, answer.text, answer.headers["Content-Type"]) == (
        500,
        "null",
        "application/json",
    )


def test_impossible_scripts_are_refused():
    for wrong in (
        {"kind": "explode"},
        {"kind": "status"},
        {"kind": "replace"},
        {"kind": "patch"},
        {"kind": "cut", "times": -1},
        {"kind": "shrink", "share": 1.5},
    ):
        with pytest.raises(ValueError):
            Fault("*", **wrong)
    for text in (
        "{}",
        "[1]",
        '[{"match": "*"}]',
        '[{"match": "*", "kind": "cut", "colour": 1}]',
        '[{"match": "*", "kind": "cut", "times": "2"}]',
        '[{"match": "*", "kind": "patch", "patch": "x"}]',
    ):
        with pytest.raises(ValueError):
            load_faults(text)
    (fault,) = load_faults(
        '[{"match": "*", "kind": "status", "status": 429, "headers": {"Retry-After": "1"}}]'
    )
    assert fault == Fault("*", "status", status=429, headers={"Retry-After": "1"})


# --- faults: what they do ----------------------------------------------------------------------------------


def test_html_null_deep_bigint_replace(sim, http_session):
    for fault in (
        Fault("*", "html"),
        Fault("*", "null"),
        Fault("*", "deep"),
        Fault("*", "bigint"),
        Fault("*", "replace", body="{ not json"),
    ):
        sim.add_fault(fault)
    # Each hits once, and the first that is due wins: they come in the order in which they were added.
    html = ask(sim, http_session)
    assert html.status_code == 200
    assert html.headers["Content-Type"].startswith("text/html")
    assert html.text.startswith("<html>")
    assert ask(sim, http_session).content == b"null"
    with pytest.raises(RecursionError):
        json.loads(ask(sim, http_session).content)
    with pytest.raises(ValueError, match="digits"):
        json.loads(ask(sim, http_session).content)
    assert ask(sim, http_session).content == b"{ not json"
    assert ask(sim, http_session).json()["vaultAddress"] == sim.vaults.addresses[0]


@pytest.mark.parametrize("kind", ["cut", "cut_chunked"])
def test_cuts_that_a_client_can_see(sim, http_session, kind):
    sim.add_fault(Fault("*", kind))
    with pytest.raises((requests.exceptions.ChunkedEncodingError, requests.exceptions.ConnectionError)):
        ask(sim, http_session)
    whole = ask(sim, http_session).content
    assert 0.4 * len(whole) < sim.log[0].bytes < 0.6 * len(whole)
    assert sim.log[1].bytes == len(whole)


def test_cut_that_only_the_parser_can_see(sim, http_session):
    sim.add_fault(Fault("*", "cut_close"))
    answer = ask(sim, http_session)
    assert answer.status_code == 200
    assert not {"Content-Length", "Transfer-Encoding"} & set(answer.headers)
    with pytest.raises(ValueError):
        answer.json()
    assert ask(sim, http_session).content.startswith(answer.content)


def test_cut_spares_no_tiny_body(sim):
    sim.add_fault(Fault("*", "cut", share=1.0))
    body = json.dumps({"type": "vaultDetails", "vaultAddress": UNKNOWN_ADDRESS}).encode()
    answer = raw(sim, body=body)
    assert b"Content-Length: 4\r\n" in answer
    assert answer.endswith(b"\r\n\r\nnul")


def test_reset(sim):
    sim.add_fault(Fault("*", "reset"))
    with pytest.raises(ConnectionResetError):
        raw(sim)
    assert (sim.log[0].status, sim.log[0].fault) == (0, "reset")


def test_silent(sim):
    sim.add_fault(Fault("*", "silent", seconds=0.3))
    started = time.monotonic()
    assert raw(sim) == b""
    assert 0.25 < time.monotonic() - started < 2


def test_silent_ends_when_the_client_leaves(sim, http_session):
    sim.add_fault(Fault("*", "silent", seconds=60))
    assert raw(sim, seconds=0.1) == b""
    assert eventually(lambda: 0 < sim.log[0].seconds < 2)


def test_drip(sim):
    sim.add_fault(Fault("*", "drip", seconds=0.7))
    answer = raw(sim, seconds=3)
    body = answer.partition(b"\r\n\r\n")[2]
    assert 1 <= len(body) <= 4
    assert body == b'{"name":"'[: len(body)]


def test_drip_headers(sim):
    sim.add_fault(Fault("*", "drip_headers", seconds=0.7))
    answer = raw(sim, seconds=3)
    assert 1 <= len(answer) <= 4
    assert answer == b"HTTP/1.1"[: len(answer)]


def test_drip_of_a_short_body_completes(sim):
    sim.add_fault(Fault("*", "drip", seconds=5.0))
    body = json.dumps({"type": "vaultDetails", "vaultAddress": UNKNOWN_ADDRESS}).encode()
    assert raw(sim, body=body).endswith(b"\r\n\r\nnull")


def test_endless(sim, http_session):
    sim.add_fault(Fault("*", "endless", seconds=20))
    request = {"type": "vaultDetails", "vaultAddress": sim.vaults.addresses[0]}
    got = 0
    with http_session.post(sim.info_url, json=request, timeout=5, stream=True) as answer:
        for piece in answer.iter_content(1 << 16):
            got += len(piece)
            if got > 8_000_000:
                break
    assert got > 8_000_000
    assert eventually(lambda: sim.log[0].seconds > 0)


def test_endless_is_bounded(sim):
    sim.add_fault(Fault("*", "endless", seconds=0.1))
    answer = raw(sim, seconds=4)
    assert b"Transfer-Encoding: chunked" in answer
    assert not answer.endswith(b"0\r\n\r\n")
    assert eventually(lambda: 0 < sim.log[0].seconds < 3)


def test_gzip_bomb(sim, http_session):
    sim.add_fault(Fault("*", "gzip_bomb"))
    request = {"type": "vaultDetails", "vaultAddress": sim.vaults.addresses[0]}
    with http_session.post(sim.info_url, json=request, timeout=5, stream=True) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        packed = answer.raw.read(decode_content=False)
    assert len(packed) < 1_000_000
    unpacker, size, rest = zlib.decompressobj(31), 0, packed
    while rest and not unpacker.eof:
        size += len(unpacker.decompress(rest, 1 << 22))
        rest = unpacker.unconsumed_tail
    assert size == 200 << 20
    assert unpacker.eof


def test_latency_fault_and_latency(sim, http_session):
    sim.add_fault(Fault("*", "latency", seconds=0.3))
    started = time.monotonic()
    assert ask(sim, http_session).status_code == 200
    assert 0.3 <= time.monotonic() - started < 2
    with Simulator(vaults=3, now_ms=NOW_MS, latency=0.2) as slow:
        started = time.monotonic()
        assert ask(slow, http_session).status_code == 200
        assert 0.2 <= time.monotonic() - started < 2


def test_patch_serves_what_no_encoder_would(sim, http_session):
    def spoil(details):
        details["apr"] = float("nan")
        details["leaderFraction"] = RawNumber("1e400")
        details["maxWithdrawable"] = Decimal("-0.10")
        details["name"] = "\ud800 \x00"
        return details

    clean = ask(sim, http_session).content
    sim.add_fault(Fault("vaultDetails", "patch", patch=spoil))
    body = ask(sim, http_session).content
    assert b'"apr":NaN' in body
    assert b'"leaderFraction":1e400,' in body
    assert b'"maxWithdrawable":-0.10,' in body
    assert b'"name":"\\ud800 \\u0000"' in body
    untouched = b'"maxDistributable":' + re.search(rb'"maxDistributable":([^,]+),', clean)[1]
    assert untouched in body


def test_patch_of_the_list(sim, http_session):
    sim.add_fault(Fault(VAULTS, "patch", patch=lambda entries: entries[:1] * 3))
    served = http_session.get(sim.stats_url + "/vaults", timeout=5).json()
    assert [entry["summary"]["vaultAddress"] for entry in served] == sim.vaults.addresses[:1] * 3


def test_patch_that_fails_is_loud(sim, http_session, capfd):
    sim.add_fault(Fault("*", "patch", patch=lambda details: details["no such field"]))
    assert ask(sim, http_session).status_code == 500
    assert "KeyError" in capfd.readouterr().err


def test_raw_numbers_cannot_break_out():
    assert encode({"a": [RawNumber("1e400"), "text"]}) == b'{"a":[1e400,"text"]}'
    with pytest.raises(ValueError):
        encode(RawNumber('1","b":"'))


# --- the server --------------------------------------------------------------------------------------------


def test_a_client_that_leaves_prints_nothing(sim, capfd):
    sim.add_fault(Fault("*", "latency", seconds=0.2))
    raw(sim, seconds=0.05)
    with socket.create_connection(("127.0.0.1", sim.port)) as half:
        half.sendall(b"POST /info HTTP/1.1\r\nContent-Length: 50\r\n\r\n{")
    with socket.create_connection(("127.0.0.1", sim.port)) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        reader.sendall(b"GET /Mainnet/vaults HTTP/1.1\r\n\r\n" * 20)
    time.sleep(0.4)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_stop_ends_open_connections_and_frees_the_port():
    sim = Simulator(vaults=3, now_ms=NOW_MS, faults=[Fault("*", "silent", seconds=60)])
    sim.start()
    port = sim.port
    idle = socket.create_connection(("127.0.0.1", port), timeout=5)
    started = time.monotonic()
    waiting = threading.Thread(target=lambda: raw(sim))
    waiting.start()
    assert eventually(lambda: sim.count() == 1)
    sim.stop()
    sim.stop()
    waiting.join()
    assert idle.recv(1) == b""
    idle.close()
    assert time.monotonic() - started < 3
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    with Simulator(vaults=1, now_ms=NOW_MS, port=port) as again:
        assert again.port == port


def test_control_pages(sim, http_session):
    script = [{"match": "vaultDetails", "kind": "status", "status": 502}]
    posted = http_session.post(sim.url + "/sim/faults", json=script, timeout=5)
    assert posted.json() == {"faults": 1}
    assert ask(sim, http_session).status_code == 502
    assert ask(sim, http_session).status_code == 200
    assert http_session.post(sim.url + "/sim/faults", data=b"[{}]", timeout=5).status_code == 400
    stats = http_session.get(sim.url + "/sim/stats", timeout=5).json()
    assert stats["requests"] == 2
    assert (stats["refused"], stats["weight_used"]) == (0, 40)
    assert stats["per_status"] == {"502": 1, "200": 1}
    log = http_session.get(sim.url + "/sim/log", timeout=5).json()
    assert [(one["method"], one["path"], one["kind"], one["status"], one["fault"]) for one in log] == [
        ("POST", "/info", "vaultDetails", 502, "status"),
        ("POST", "/info", "vaultDetails", 200, None),
    ]
    assert log[1]["address"] == sim.vaults.addresses[0]


def spawn(*options):
    command = [sys.executable, "-m", "hlcli.sim", "--vaults", "20", "--now-ms", str(NOW_MS), *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_process_serves_and_ends_with_its_parent(tmp_path, http_session):
    script = tmp_path / "faults.json"
    script.write_text('[{"match": "/Mainnet/vaults", "kind": "status", "status": 503}]')
    with spawn("--until-eof", "--faults", str(script)) as child:
        urls = json.loads(child.stdout.readline())
        assert urls["info_url"].startswith("http://127.0.0.1:")
        answers = [http_session.get(urls["stats_url"] + "/vaults", timeout=5) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [503, 200]
        assert answers[1].content == VaultUniverse(1, 20, NOW_MS).list_body
        http_session.close()
        out, err = child.communicate(timeout=10)
        assert (child.returncode, out, err) == (0, b"", b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_process_ends_on_signals(number):
    with spawn() as child:
        assert json.loads(child.stdout.readline())
        child.send_signal(number)
        out, err = child.communicate(timeout=10)
        assert (child.returncode, out, err) == (0, b"", b"")


def test_process_refuses_a_bad_script(tmp_path):
    script = tmp_path / "faults.json"
    script.write_text('[{"match": "*", "kind": "explode"}]')
    with spawn("--faults", str(script)) as child:
        _, err = child.communicate(timeout=10)
        assert child.returncode == 2
        assert b"explode" in err
