"""What Prometheus is told: every family of the list, and figures that agree with the requests made."""

from __future__ import annotations

import threading

from prometheus_client.parser import text_string_to_metric_families
from server_rig import Server

# as shared with dashboards; counters without their `_total`
FAMILIES = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "engine_up"),
    *("prefix_cache_queries", "prefix_cache_hits", "mm_cache_queries", "mm_cache_hits"),
    *("prompt_tokens", "generation_tokens", "request_success", "http_requests"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("num_preemptions", "engine_steps", "engine_restarts", "bad_frames"),
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
