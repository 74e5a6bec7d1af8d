"""HTTP in, HTTP out: the front end of `gemcut serve` and, in a process of its own, its engine.

`main.serve` puts it together. A request walks through `guard` (who may, how much), `app` (routes), `chat` or
`completions` (schema -> `Job`), `engine_client` (to the engine's process and back) and `stream` (events). The
front end never imports torch; `engine_main`, which the engine's process runs, does.
"""
