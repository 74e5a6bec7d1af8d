"""`tool_choice` of every interface: the form that makes an answer call what it must."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from gemcut.engine.model_files import ModelFiles
from gemcut.errors import InvalidRequest
from gemcut.prompt.call_grammar import CalledTool, call_grammar
from gemcut.sampling import StructuredOutputs
from gemcut.server.answerer import Answerer


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """What a request says of calls.

    hidden: the tools are kept from the model, so that it calls none. forced: the answer is calls and nothing
    else (a thought may precede them). only: names of the tools that may be called, None for all. single: one
    call at most.
    """

    hidden: bool = False
    forced: bool = False
    only: tuple[str, ...] | None = None
    single: bool = False

    def stop_ids(self, files: ModelFiles) -> tuple[int, ...]:
        """Tokens that end the answer beside the model's own."""
        return (files.tokenizer.control_id("<tool_call|>"),) if self.single else ()

    def form(
        self,
        files: ModelFiles,
        tools: Sequence[Mapping[str, Any]],
        asked: StructuredOutputs | None,
        *,
        strict: Collection[str],
        schemas: str,
    ) -> StructuredOutputs | None:
        """The form of the answer: what the request asked for, or one that has room for calls.

        tools: as the template reads them. strict: names of those whose arguments must fit their schema even
        if no call is forced. schemas: where a tool of the request has its parameters, for errors. Raises
        InvalidRequest if a call cannot be forced, or the form leaves no room for one.
        """
        if self.hidden or not (tools or self.forced or self.only):
            return asked
        if self.forced and asked is not None:
            raise InvalidRequest(
                "tool_choice asks for a call, which leaves no room for a form of the answer.", "tool_choice"
            )
        if asked is None and not (self.forced or strict or self.only):
            return None
        called = self._called(tools, strict, schemas)
        otherwise = None if self.forced else "text" if asked is None else _schema(asked)
        return StructuredOutputs(
            grammar=call_grammar(called, files.tokenizer.control_id, otherwise=otherwise)
        )

    def _called(
        self, tools: Sequence[Mapping[str, Any]], strict: Collection[str], schemas: str
    ) -> list[CalledTool]:
        known = {tool["function"]["name"] for tool in tools}
        for name in self.only or ():
            if name not in known:
                raise InvalidRequest(
                    f"tool_choice names {name[:80]!r}, which is none of the tools.", "tool_choice"
                )
        called = []
        for i, tool in enumerate(tools):
            function = tool["function"]
            name, parameters = function["name"], function.get("parameters")
            if self.only is None or name in self.only:
                fits = self.forced or name in strict
                called.append(CalledTool(name, parameters if fits else {}, f"tools[{i}].{schemas}"))
        if not called:
            raise InvalidRequest("tool_choice asks for a call, and there are no tools.", "tool_choice")
        return called


async def form_of(
    answerer: Answerer,
    choice: ToolChoice,
    tools: Sequence[Mapping[str, Any]],
    asked: StructuredOutputs | None,
    *,
    strict: Collection[str],
    schemas: str,
) -> StructuredOutputs | None:
    """`choice.form`, beside the loop if there are schemas to read: they may be large."""
    work = partial(choice.form, answerer.files, tools, asked, strict=strict, schemas=schemas)
    return await answerer.in_thread(work) if tools else work()


def _schema(asked: StructuredOutputs) -> Mapping[str, Any]:
    """The JSON schema of a form. Raises InvalidRequest if it is of another kind."""
    kind, text = asked.source()
    if kind not in ("json_schema", "json_object"):
        raise InvalidRequest(
            f"The model may call tools, which {kind} leaves no room for. Send tool_choice: none.",
            f"structured_outputs.{kind}",
        )
    return msgspec.json.decode(text)
