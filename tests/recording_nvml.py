"""A double of pynvml that records what is called; every name and number of arguments is held against the real one."""

from __future__ import annotations

import inspect

import pynvml


class RecordingNvml:
    """Answers from a dict; anything that the real module lacks is an error."""

    def __init__(self, **answers):
        self.answers, self.calls = answers, []

    def __getattr__(self, name):
        real = getattr(pynvml, name)  # AttributeError: NVML has no such thing
        if not callable(real) or isinstance(real, type):
            return real
        signature = inspect.signature(real)

        def call(*args):
            signature.bind(*args)  # TypeError: NVML takes other arguments
            self.calls.append((name, *args))
            answer = self.answers.get(name)
            if isinstance(answer, Exception):
                raise answer
            return answer() if callable(answer) else answer

        return call

    def names(self):
        return [call[0] for call in self.calls]
