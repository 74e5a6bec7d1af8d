"""Measurements of the engine and of its kernels, and their records.

Enters: a model, or its config alone and a seed. Leaves: tables, JSON records under `bench/records/<device>/`,
and what is made of them. Every number is given beside its ceiling, which the same run measures.
"""
