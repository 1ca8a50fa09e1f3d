"""Barriers of a CTA and of a cluster."""

from . import races


class Barrier:
    """A named CTA barrier."""

    def __init__(self, ident):
        self.ident = ident
        self.reset()

    def reset(self):
        self.lanes = self.threads = self.count = 0
        self.waiters, self.arrivals, self.red = [], [], []
        self.vc = None


class ClusterBarrier:
    """barrier.cluster of one cluster."""

    def __init__(self):
        self.phase, self.arrived, self.live = 0, 0, 0
        self.waiters, self.vc, self.done_vc = [], None, None

    def check(self):
        if self.live and self.arrived >= self.live:
            self.arrived = 0
            self.phase += 1
            self.done_vc, self.vc = self.vc, None
            ws, self.waiters = self.waiters, []
            for W, f, nxt in ws:
                if W.check:
                    races.acquire(W, self.done_vc)
                f.pc = nxt
                W.cta.launch.progress += 1
                W.wake(f)
