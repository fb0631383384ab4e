"""Stand for torch.cuda on a machine with two GPUs, to show on which device something is done."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import torch


class Stream:
    """Stand for a CUDA stream, which belongs to one device."""

    waited_for = None  # the stream of an event

    def __init__(self, number):
        self.device = torch.device("cuda", number)

    def wait_stream(self, other):
        assert other.device == self.device

    def record_event(self):
        return SimpleNamespace(stream=self)

    def wait_event(self, event):
        self.waited_for = event.stream


class TwoGPUs:
    """Stand for torch.cuda with two GPUs: each thread has a current device, 0 at first, and a stream on each device."""

    def __init__(self):
        self.thread = threading.local()
        self.capturing = self.default_capture_stream = None

    @property
    def state(self):
        if not hasattr(self.thread, "state"):
            self.thread.state = SimpleNamespace(device=0, streams=[Stream(0), Stream(1)])
        return self.thread.state

    def number(self, device):
        return self.state.device if device is None else torch.device(device).index

    def current_stream(self, device=None):
        return self.state.streams[self.number(device)]

    @contextmanager
    def device(self, device):
        before, self.state.device = self.state.device, self.number(device)
        yield
        self.state.device = before

    @contextmanager
    def stream(self, stream):
        if stream is None:
            yield
            return
        number = stream.device.index
        with self.device(stream.device):
            before, self.state.streams[number] = self.state.streams[number], stream
            yield
            self.state.streams[number] = before

    @contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        self.default_capture_stream = self.default_capture_stream or Stream(self.state.device)
        with self.stream(stream or self.default_capture_stream):
            self.capturing = (graph, self.current_stream())
            yield
            self.capturing = None

    def CUDAGraph(self):
        graph = SimpleNamespace(device=self.state.device, captured=[], pool=lambda: None)
        graph.replay = lambda: [operation() for operation in graph.captured]
        return graph

    def replace(self, monkeypatch):
        for name in ("current_stream", "device", "stream", "graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(self.number(device)))
