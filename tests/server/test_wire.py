"""Between the processes: what is said arrives, what is no message is dropped and counted."""

from __future__ import annotations

import random
import socket
import threading

import msgspec
import numpy as np
import pytest

from gemcut.config import EngineConfig
from gemcut.data import Prompt, Span, TokenLogprobs
from gemcut.demo import PICTURES
from gemcut.engine.loop import Job
from gemcut.engine.model_files import ChatPrompt
from gemcut.errors import GemcutError, InvalidRequest, Overloaded
from gemcut.media.image import patches
from gemcut.outputs import CompletionOutput, Delta, RequestOutput, Stats, Timings, ToolCall, Usage
from gemcut.sampling import SamplingParams, StructuredOutputs
from gemcut.server import wire
from gemcut.server.engine_main import Orders

PICTURE = patches(PICTURES / "sign.png", 70)
STOP = 4 + PICTURE.soft_tokens
JOB = Job(
    request_id="j1",
    prompt=ChatPrompt(
        Prompt(tuple(range(STOP + 2)), (Span("image", 0, 4, STOP),)),
        (PICTURE,),
        in_thought=True,
        may_think=True,
    ),
    params=SamplingParams(
        n=2,
        stop=("a", "ü"),
        stop_token_ids=(1, 2),
        logit_bias={5: -1.5},
        seed=2**64 - 1,
        structured_outputs=StructuredOutputs(
            json_schema={"type": "object", "properties": {"a": {"enum": [1]}}}
        ),
    ),
    priority=3,
    deadline_s=1.5,
    salt=b"\0\xff",
)
STATS = Stats(
    running=1,
    waiting=2,
    steps=3,
    preemptions=4,
    prefix_queries=5,
    prefix_hits=6,
    full_pages=(1, 2, 3),
    sliding_pages=(4, 5, 6),
    encoder_tokens=(7, 8),
    encoder_hits=9,
    encoder_misses=10,
)
LOGPROBS = TokenLogprobs(5, -float("inf"), 3, ((5, -0.5), (6, -1.5)))
DELTA = Delta(
    index=1,
    text="ü",
    token_ids=(5,),
    tool_calls=(ToolCall("f", {"a": [1, None, "x"]}),),
    logprobs=(LOGPROBS,),
)
OUTPUT = RequestOutput(
    request_id="j1",
    prompt_token_ids=(),
    outputs=(CompletionOutput(index=0, text="x", reasoning="", token_ids=(1,), finish_reason="stop"),),
    usage=Usage(prompt_tokens=1, cached_tokens=0, image_tokens=0, completion_tokens=1),
    timings=Timings(queue_s=0.05, first_token_s=0.1, total_s=0.2, tokens_per_s=0.0),
    prompt_logprobs=(None, LOGPROBS),
)
ORDERS = [
    wire.Start(EngineConfig(model="x", kv_bytes=5), 7),
    wire.write_job(JOB, streamed=True),
    wire.Abort("j1"),
    wire.Ping(),
    wire.Quit(),
]
ANSWERS = [
    wire.Started(4096, {"device": "cpu"}),
    wire.Failed("ConfigError", "no"),
    wire.News((("j1", DELTA),), (OUTPUT,)),
    wire.Refused("j1", "Overloaded", "full", None, 2.0),
    wire.Pong(STATS, 0.5, 1),
]


def test_a_job_arrives_whole() -> None:
    _, body = wire.frame(wire.write_job(JOB, streamed=True))
    message = wire.read_order(body)
    assert isinstance(message, wire.Submit)
    assert message.streamed
    job = wire.read_job(message)
    (medium,) = job.prompt.media
    assert np.array_equal(medium.pixels, PICTURE.pixels)
    assert (medium.rows, medium.columns, medium.digest) == (PICTURE.rows, PICTURE.columns, PICTURE.digest)
    assert job.prompt.prompt == JOB.prompt.prompt
    assert (job.prompt.in_thought, job.prompt.may_think) == (True, True)
    assert (job.params, job.priority, job.deadline_s, job.salt) == (JOB.params, 3, 1.5, b"\0\xff")


@pytest.mark.parametrize("message", ANSWERS, ids=lambda m: type(m).__name__)
def test_answers_arrive_whole(message: wire.ToFrontEnd) -> None:
    head, body = wire.frame(message)
    assert wire.HEAD.unpack(head) == (len(body),)
    assert wire.read_answer(body) == message


@pytest.mark.parametrize(
    "error", [InvalidRequest("no", "x"), InvalidRequest("no"), Overloaded("full", 3.0), GemcutError("odd")]
)
def test_refusals_arrive_as_what_they_were(error: GemcutError) -> None:
    again = wire.refusal(wire.write_refusal("j", error))
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))


def test_fuzzed_frames_are_dropped() -> None:
    """A part of the 100,000 of the reliability rules: never another exception than BadFrame."""
    rng = random.Random(1)
    bodies = [wire.frame(message)[1] for message in (*ORDERS, *ANSWERS)]
    bodies = [body if len(body) < 2000 else body[:1500] for body in bodies]
    dropped = 0
    for _ in range(20_000):
        body = bytearray(rng.choice(bodies))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(body) + 1)
            if rng.random() < 0.6 and at < len(body):
                body[at] = rng.randrange(256)
            elif rng.random() < 0.5:
                del body[at : at + rng.randint(1, 9)]
            else:
                body[at:at] = rng.randbytes(rng.randint(1, 9))
        for read in (wire.read_order, wire.read_answer):
            try:
                message = read(body)
                if isinstance(message, wire.Submit):
                    wire.read_job(message)
            except wire.BadFrame:
                dropped += 1
    assert dropped > 20_000


@pytest.mark.parametrize("changes", [{"rows": 0}, {"rows": 2}, {"rows": 3}, {"columns": -3}, {"digest": b""}])
def test_a_picture_that_is_not_what_it_says(changes: dict[str, object]) -> None:
    good = wire.write_job(JOB, streamed=False)
    bad = msgspec.structs.replace(good, media=(msgspec.structs.replace(good.media[0], **changes),))
    with pytest.raises(wire.BadFrame):
        wire.read_job(bad)


def test_the_reader_counts_what_it_drops_and_goes_on() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        orders = Orders(theirs)

        def send() -> None:
            for body in (b"", b"\xc1", b"\x93\xa4ping\x01\x02", msgspec.msgpack.encode({"a": 1})):
                ours.sendall(wire.HEAD.pack(len(body)) + body)
            ours.sendall(b"".join(wire.frame(wire.Abort("j9"))))
            ours.sendall(wire.HEAD.pack(wire.MAX_FRAME + 1))

        sender = threading.Thread(target=send)
        sender.start()
        assert orders.next() == wire.Abort("j9")
        assert orders.next() is None  # where a frame of that size ends nobody knows
        sender.join()
        assert orders.bad_frames == 4
        orders.close()
