"""Words <-> ids.

Enters: chat messages and tools as plain mappings, raw text, a checkpoint's tokenizer files, and later
the token ids that a model produced. Leaves: segments (`template.render`), a `Prompt` with spans
(`tokenizer.Tokenizer.encode`), text and control pieces (`detokenize.Detokenizer`) and what they mean:
text, reasoning and tool calls (`replies.ReplyParser`).

Only this room knows how control tokens are spelled and how a turn is laid out. It must not know torch,
HTTP, sampling, or what a picture looks like: a medium is a slot with a number of soft tokens.
Text from outside is never searched for control tokens; they are placed by structure alone.
"""
