"""How well the engine answers: benchmarks of the field, the demo's own questions, and two settings compared.

Enters: a task, and something that answers. Leaves: scores with their errors, and every answer as a line of
JSON.
"""
