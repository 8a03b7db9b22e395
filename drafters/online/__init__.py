"""Online speculative decoding: a draft that is distilled from the target while it serves.

``buffer`` keeps what verification said, ``learner`` makes a loss of it, ``trainer`` takes steps in the time it is
given, ``drafter`` wraps any drafter with weights, ``router`` keeps one of them per domain.
"""

from specdec.drafters.online.drafter import Online as Online
from specdec.drafters.online.router import Centroids as Centroids
from specdec.drafters.online.router import Router as Router
