"""HTTP serving: one front process that never decodes an image, and supervised inference processes.

front.py      opens the door and closes it without losing anyone
app.py        the application: health, middleware, the OpenAPI document
classify.py   POST /predict
kserve.py     the Open Inference Protocol
feedback.py   POST /feedback, and how the experiment stands
admin.py      load, promote, roll back
page.py       the page at /, its charts, /metrics
desk.py       how an image is answered, and by whom
fleet.py      the bundles, by name and role
trial.py      an A/B test on a running server
admission.py  the bounded line of images
pool.py       starts, feeds and replaces the inference processes of a bundle
process.py    one of them, as the front sees it
arena.py      the memory both share
worker.py     an inference process
batches.py    decoding and batching inside it
heat.py       heat maps inside it
upload.py     reads the images of a request within every limit
doors.py      keys
linger.py     lets a client read a response that came before its body was sent
problems.py   errors in one shape
answers.py    the JSON of answers, over HTTP and between the processes
telemetry.py  metrics, charts, log lines
settings.py   addresses and limits
"""

from holotype.serve.front import run
from holotype.serve.settings import ServeSettings

__all__ = ["ServeSettings", "run"]
