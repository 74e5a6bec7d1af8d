"""`tool_choice` of every interface: the form that makes an answer call what it must."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gemcut.engine.model_files import ModelFiles
from gemcut.errors import InvalidRequest
from gemcut.prompt.call_grammar import CalledTool, call_grammar
from gemcut.sampling import StructuredOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """What a request says of calls.

    hidden: the tools are kept from the model, so that it calls none. forced: the answer is calls and nothing
    else (a thought may precede them). only: the one tool that is called then, None for any. single: one call
    at most.
    """

    hidden: bool = False
    forced: bool = False
    only: str | None = None
    single: bool = False

    def stop_ids(self, files: ModelFiles) -> tuple[int, ...]:
        """Tokens that end the answer beside the model's own."""
        return (files.tokenizer.control_id("<tool_call|>"),) if self.single else ()

    def form(
        self,
        files: ModelFiles,
        tools: Sequence[Mapping[str, Any]],
        asked: StructuredOutputs | None,
        schemas: str,
    ) -> StructuredOutputs | None:
        """The form of the answer: what the request asked for, or one that has room for calls.

        tools: as the template reads them. schemas: where a tool of the request has its parameters. Raises
        InvalidRequest if a call cannot be forced, or the form leaves no room for one.
        """
        if self.hidden or not (tools or self.forced):
            return asked
        if self.forced:
            if asked is not None:
                raise InvalidRequest(
                    "tool_choice asks for a call, which leaves no room for a form of the answer.",
                    "tool_choice",
                )
            called = self._called(tools, schemas)
            return StructuredOutputs(grammar=call_grammar(called, files.tokenizer.control_id))
        if asked is None:
            return None
        kind, text = asked.source()
        if kind not in ("json_schema", "json_object"):
            raise InvalidRequest(
                f"The model may call tools, which {kind} leaves no room for. Send tool_choice: none.",
                f"structured_outputs.{kind}",
            )
        called = self._called(tools, schemas)
        otherwise = msgspec.json.decode(text)
        return StructuredOutputs(
            grammar=call_grammar(called, files.tokenizer.control_id, otherwise=otherwise)
        )

    def _called(self, tools: Sequence[Mapping[str, Any]], schemas: str) -> list[CalledTool]:
        functions = [tool["function"] for tool in tools]
        called = [
            CalledTool(function["name"], function.get("parameters"), f"tools[{i}].{schemas}")
            for i, function in enumerate(functions)
            if self.only in (None, function["name"])
        ]
        if not called:
            what = "there are no tools" if not tools else f"there is no tool {(self.only or '')[:80]!r}"
            raise InvalidRequest(f"tool_choice asks for a call, and {what}.", "tool_choice")
        return called
