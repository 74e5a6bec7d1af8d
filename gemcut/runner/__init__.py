"""Owns the device: KV pages, batches, the forward, sampling.

Enters: `Step`s, integers and ids. Leaves: `StepResult`s. The only room that allocates KV. It does not
know queues, texts or HTTP.
"""
