"""What Prometheus is told: every family of the list, and figures that agree with the requests made."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from server_rig import ROOT, Server

# as shared with dashboards; counters without their `_total`
FAMILIES = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "engine_up"),
    *("prefix_cache_queries", "prefix_cache_hits", "mm_cache_queries", "mm_cache_hits"),
    *("prompt_tokens", "generation_tokens", "request_success", "http_requests"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("num_preemptions", "engine_steps", "engine_restarts", "engine_kills", "bad_frames"),
    *("graph_replays", "eager_forwards", "dropped_graphs"),
}


def told(server: Server) -> dict[str, float]:
    """Sums of the samples by name; what has labels beside the model's is summed over them."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(server.get("/metrics").body.decode()):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_every_family_is_there(scripted: Server) -> None:
    text = scripted.get("/metrics").body.decode()
    names = {family.name.removeprefix("gemcut:") for family in text_string_to_metric_families(text)}
    assert {name for name in names if not name.endswith("_created")} == FAMILIES


def test_figures_agree_with_what_was_asked(scripted: Server) -> None:
    before = told(scripted)
    for stream in (False, True):
        reply = scripted.chat("hello", stream=stream)
        assert reply.status == 200
    usage = scripted.chat("hello").json["usage"]
    after = told(scripted)

    def grew(name: str) -> float:
        return after[f"gemcut:{name}"] - before.get(f"gemcut:{name}", 0.0)

    assert grew("prompt_tokens_total") == 3 * usage["prompt_tokens"]
    assert grew("generation_tokens_total") == 3 * usage["completion_tokens"]
    assert grew("request_success_total") == 3
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert grew(f"{name.removesuffix('_seconds')}_seconds_count") == 3, name
    # one stream, without its first news, which may be more than one token
    assert 0 < grew("inter_token_latency_seconds_count") < usage["completion_tokens"]
    assert grew("inter_token_latency_seconds_bucket") >= grew("inter_token_latency_seconds_count")
    assert 0 < grew("inter_token_latency_seconds_sum") < grew("e2e_request_latency_seconds_sum")
    parts = sum(grew(f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode"))
    assert abs(parts - grew("e2e_request_latency_seconds_sum")) < 1e-3


def test_waiting_shows_as_waiting() -> None:
    """One at a time: the second waits for as long as the first takes."""
    with Server.scripted(engine={"max_num_seqs": 1}, step_s=0.005) as server:
        threads = [
            threading.Thread(target=server.chat, args=("long",), kwargs={"max_tokens": 100}) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = told(server)
    assert found["gemcut:request_queue_time_seconds_sum"] > 0.4
    assert found["gemcut:request_prefill_time_seconds_sum"] < 0.3


def test_the_bench_command_against_a_server(scripted: Server, tmp_path: Path) -> None:
    out = tmp_path / "serve.json"
    line = [sys.executable, "-m", "gemcut.cli", "bench", "serve", "--base-url", f"{scripted.url}/v1"]
    line += ["--concurrency", "1,4", "--requests", "8", "--input-words", "20", "--output-tokens", "9"]
    done = subprocess.run(
        [*line, "--slo", "e2e:60000", "--out", str(out)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "scripted at 127.0.0.1" in done.stdout
    result = json.loads(out.read_text())
    assert [row["load"] for row in result["rows"]] == ["1 clients", "4 clients"]
    assert all(row["failed"] == 0 and row["good_share"] == 1 for row in result["rows"])
    for wrong in (["--rate", "0"], ["--slo", "itl:5"], ["--picture-size", "9"], ["--concurrency", "1.5"]):
        refused = subprocess.run([*line, *wrong], capture_output=True, text=True, cwd=ROOT)
        assert refused.returncode == 2, wrong
        assert wrong[0] in refused.stderr
