"""Read what `gemcut bench --against` uses of vLLM and SGLang out of their wheels, without installing them.

    pip download --no-deps vllm sglang
    python tests/bench/read_signatures.py vllm-*.whl sglang-*.whl

writes peer_signatures.json, which the stand-ins of the tests are made of. Names alone, by the parser.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "peer_signatures.json"


class Wheel:
    def __init__(self, path: str) -> None:
        self.archive = zipfile.ZipFile(path)
        self.version = Path(path).name.split("-")[1]

    def tree(self, module: str) -> ast.Module:
        return ast.parse(self.archive.read(module))

    def classes(self, module: str) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in ast.walk(self.tree(module)) if isinstance(node, ast.ClassDef)}

    def fields(self, module: str, name: str) -> list[str]:
        """Annotated names of a class's body."""
        body = self.classes(module)[name].body
        return [n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]

    def parameters(self, module: str, name: str, method: str) -> dict[str, Any]:
        """positional: names in order; keyword: those after the star; more: whether there is a `**`."""
        body = self.classes(module)[name].body
        found = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == method).args
        return {
            "positional": [each.arg for each in found.args[1:]],
            "keyword": [each.arg for each in found.kwonlyargs],
            "more": found.kwarg is not None,
        }


def vllm(wheel: Wheel) -> dict[str, Any]:
    outputs, engine = "vllm/outputs.py", "vllm/v1/engine/llm_engine.py"
    methods = ("add_request", "has_unfinished_requests", "step")
    members = wheel.classes("vllm/sampling_params.py")["RequestOutputKind"].body
    return {
        "version": wheel.version,
        "LLM": wheel.parameters("vllm/entrypoints/llm.py", "LLM", "__init__"),
        "EngineArgs": wheel.fields("vllm/engine/arg_utils.py", "EngineArgs"),
        "SamplingParams": wheel.fields("vllm/sampling_params.py", "SamplingParams"),
        "RequestOutputKind": [n.targets[0].id for n in members if isinstance(n, ast.Assign)],  # type: ignore[attr-defined]
        "LLMEngine": {name: wheel.parameters(engine, "LLMEngine", name) for name in methods},
        "RequestOutput": wheel.parameters(outputs, "RequestOutput", "__init__")["positional"],
        "CompletionOutput": wheel.fields(outputs, "CompletionOutput"),
        "TokensPrompt": [
            *wheel.fields("vllm/inputs/llm.py", "_PromptOptions"),
            *wheel.fields("vllm/inputs/llm.py", "TokensPrompt"),
        ],
    }


def sglang(wheel: Wheel) -> dict[str, Any]:
    """The server's arguments lie in several classes; what an answer tells of itself is keys in the code."""
    folder = "sglang/srt/arg_groups/fields/"
    modules = [name for name in wheel.archive.namelist() if name.startswith(folder) and name.endswith(".py")]
    arguments = {
        field
        for module in modules
        for name in wheel.classes(module)
        for field in wheel.fields(module, name)
        if not field.startswith("_")
    }
    engine, sampling = "sglang/srt/entrypoints/engine.py", "sglang/srt/sampling/sampling_params.py"
    told = ("sglang/srt/managers/tokenizer_manager.py", "sglang/srt/observability/req_time_stats.py")
    return {
        "version": wheel.version,
        "ServerArgs": sorted(arguments),
        "generate": wheel.parameters(engine, "Engine", "generate"),
        "shutdown": wheel.parameters(engine, "Engine", "shutdown"),
        "SamplingParams": wheel.fields(sampling, "SamplingParams")
        or wheel.parameters(sampling, "SamplingParams", "__init__")["positional"],
        "meta_info": sorted({key for module in told for key in _keys(wheel.tree(module))}),
    }


def _keys(tree: ast.Module) -> set[str]:
    """Text keys of `meta_info` and `meta_data`: of displays, and of assignments to items."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Subscript) and _is_info(target.value) and _text(target.slice):
            found.add(_text(target.slice))
        if _is_info(target) and isinstance(node.value, ast.Dict):
            found |= {_text(key) for key in node.value.keys if _text(key)}
    return found


def _is_info(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("meta_info", "meta_data")


def _text(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def main(paths: list[str]) -> None:
    readers = {"vllm": vllm, "sglang": sglang}
    found = {}
    for path in paths:
        name = Path(path).name.split("-")[0]
        found[name] = readers[name](Wheel(path))
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
