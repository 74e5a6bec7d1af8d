"""`python scripted_server.py JSON`: a whole server over `scripted_engine`. JSON: engine, config, watch,
and the module of the engine's process."""

from __future__ import annotations

import json
import sys

from gemcut.config import EngineConfig
from gemcut.demo import CHECKPOINT
from gemcut.engine.model_files import ModelFiles
from gemcut.server.engine_client import Watch
from gemcut.server.main import serve
from gemcut.server.settings import ServerConfig

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    engine = EngineConfig(model=str(CHECKPOINT), **given.get("engine", {}))
    config = {key: tuple(v) if isinstance(v, list) else v for key, v in given.get("config", {}).items()}
    sys.exit(
        serve(
            engine,
            ServerConfig(**{"served_model_names": ("scripted",), "port": 0, **config}),
            ModelFiles.open(CHECKPOINT),
            watch=Watch(**given.get("watch", {})),
            module=given.get("module", "scripted_engine"),
        )
    )
