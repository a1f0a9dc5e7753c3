from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from keel.monitor.rows import RunDirectoryError
from keel.report.serve import ReportServer
from tests.hostile import SMALL
from tests.report_runs import PLANS


@pytest.fixture(scope="module")
def server(named_run) -> Iterator[ReportServer]:
    (named_run("small").parent / "secret.txt").write_text("not of the run")
    with ReportServer(named_run("small")) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def ask(server: ReportServer, path: str, *, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.putrequest(method, path, skip_host=bool(headers))
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse()


def test_it_listens_to_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_address[1]}/{server.secret}/"
    assert len(server.secret) >= 20


def test_the_page_and_its_data_are_live(server):
    answer = ask(server, f"/{server.secret}/")
    text = answer.read().decode()
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "connect-src 'self'" in text
    data = json.load(ask(server, f"/{server.secret}/data.json"))
    assert data["live"] is True
    assert data["run"]["recorded_steps"] == [0, 1, 2, 3]


def test_the_data_is_made_anew_when_the_run_goes_on_and_not_before(tmp_path, named_run):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(named_run("small"), run)
    with ReportServer(run) as served:
        first = served.data()
        assert served.data() is first
        with (run / "metrics.jsonl").open("a") as file:
            file.write(
                json.dumps({"schema_version": 1, "kind": "step", "stage": "reinforcement", "step": 4, "train_step": 7})
                + "\n"
            )
        assert json.loads(served.data())["series"]["train_step"][-1] == 7


def test_every_recorded_step_comes_in_full(server):
    step = json.load(ask(server, f"/{server.secret}/step/3.json"))
    plan = PLANS["small"]
    assert step["left_out"] == 0
    assert [len(group["trajectories"]) for group in step["groups"]] == [plan.group_size] * plan.groups
    assert all(each["tokens"] for group in step["groups"] for each in group["trajectories"] if not each["failed"])


@pytest.mark.parametrize(
    "path", ["4.json", "03.json", "-1.json", "3", "../config.toml", "%33.json", "9999999999.json", ""]
)
def test_a_step_that_is_none_is_nothing(server, path):
    assert ask(server, f"/{server.secret}/step/{path}").status == 404


OUTSIDE = [
    "../secret.txt",
    "..%2fsecret.txt",
    "%2e%2e/secret.txt",
    "....//secret.txt",
    "/etc/passwd",
    "//etc/passwd",
    "config.toml",
    "metrics.jsonl",
    "steps/000003.safetensors",
    "data.json/../../secret.txt",
    "step/../../secret.txt",
    "step/3.json/../../config.toml",
    "step/3.json%00.txt",
    "\\..\\secret.txt",
    "?file=../secret.txt%00",
    *(quote(text.encode("utf-8", "replace")) for text in SMALL.values() if text),
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_path_reads_a_file(server, path):
    answer = ask(server, f"/{server.secret}/{path}")
    body = answer.read()
    assert b"not of the run" not in body
    assert b"root:x:0" not in body
    assert answer.status == 404 or (path.startswith("?") and b"keel-data" in body)


@pytest.mark.parametrize("path", ["/", "/data.json", "/step/3.json", "/wrong/data.json", "//", "/x" * 3000])
def test_without_the_secret_there_is_nothing(server, path):
    assert ask(server, path).status == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "", "localhost:80:90", "10.0.0.1"]
)
def test_a_host_that_is_not_this_machine_is_refused(server, host):
    assert ask(server, f"/{server.secret}/data.json", Host=host).status == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost:9000"])
def test_this_machine_goes_by_its_names_at_any_forwarded_port(server, host):
    assert ask(server, f"/{server.secret}/data.json", Host=host).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "HEAD"])
def test_nothing_but_get_is_answered(server, method):
    assert ask(server, f"/{server.secret}/data.json", method=method).status == 501


def test_answers_may_not_be_kept_framed_or_guessed_at(server):
    headers = ask(server, f"/{server.secret}/data.json").headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert "Access-Control-Allow-Origin" not in headers
    assert "Python" not in headers["Server"]


def test_requests_are_not_echoed_to_the_terminal(server, capfd):
    ask(server, "/%1b[31m" + "x" * 20)
    assert capfd.readouterr() == ("", "")


def test_a_run_that_is_gone_or_none_is_told_of(tmp_path, named_run):
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        ReportServer(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_bytes((named_run("small") / "config.toml").read_bytes())
    with ReportServer(run) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        (run / "config.toml").unlink()
        answer = ask(served, f"/{served.secret}/data.json")
        served.shutdown()
        thread.join()
    assert answer.status == 404
    assert b"is not a run directory" in answer.read()
