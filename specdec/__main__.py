"""``python -m specdec``, which ``accelerate launch -m specdec ...`` needs."""

from specdec.cli import app

app()
