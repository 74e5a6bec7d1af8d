"""The demo: a small Gemma 4 that the project trains itself, on pictures that it renders itself.

``checkpoint/`` is the trained model in transformers' folder format and ``pictures/`` holds a few rendered
samples. The other modules are how it came about: ``scenes`` and ``questions`` say what there is to see and to
ask, ``lettering``, ``render_pil`` and ``render`` draw it, ``rows`` and ``tokenizer`` turn it into tokens,
``net``, ``train`` and ``export`` make the model, ``evaluate`` measures it.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
PICTURES = Path(__file__).parent / "pictures"
