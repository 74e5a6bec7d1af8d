"""Bytes -> arrays: pictures decoded, put right and cut into patches. Without torch."""
