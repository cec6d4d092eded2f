"""HTTP serving: one front process that never decodes an image, and supervised inference processes.

front.py      opens the door and closes it without losing anyone
app.py        routes and error bodies
upload.py     reads the images of a request within every limit
linger.py     lets a client read a response that came before its body was sent
admission.py  the bounded line of images
pool.py       starts, feeds and replaces the inference processes
worker.py     an inference process
answers.py    the JSON of answers and errors
settings.py   addresses and limits
"""

from holotype.serve.front import run
from holotype.serve.settings import ServeSettings

__all__ = ["ServeSettings", "run"]
