"""The sandbox over a Ray cluster that is already there: a thin actor per node, each with a Sandbox of its own.

Programs go down as plain dicts and Reports come back as such. No process is made per Ray task, and Ray's own isolation is
not relied on. It starts no cluster and installs nothing: every node needs falconlib and a tier that the config accepts.
"""

from __future__ import annotations

from collections.abc import Sequence

from falconlib.config import SandboxConfig
from falconlib.errors import FalconError
from falconlib.records import Program, Report, from_dict, to_dict
from falconlib.sandbox import verdict
from falconlib.sandbox.pool import RETRIES, Sandbox, longest_last

PARTS = 4  # per actor and batch: small enough to even out nodes of different speed
STARTING = 300  # seconds until a node has its sandbox; without a free core on any node it never would


class _Node:
    """What runs on a node: owns the zygotes there."""

    def __init__(self, config: SandboxConfig):
        self.sandbox = Sandbox(config)

    def about(self) -> dict:
        return {"layers": self.sandbox.layers, "tier": self.sandbox.tier, "layers_id": self.sandbox.layers_id}

    def run(self, programs: list[dict]) -> list[dict]:
        return [to_dict(r) for r in self.sandbox.run_many([from_dict(Program, p) for p in programs])]


class RaySandbox:
    """`Sandbox` spread over the nodes of the running Ray: same `run`, `run_many`, `close`. A context manager.

    Args:
        config: as for Sandbox; `workers` are per node, and `cache` a file of each node.
        actors: how many (0: one per live node). Ray spreads them over the nodes.

    Attributes: `layers`, `tier`, `layers_id` of the node with the fewest verified layers.

    Raises FalconError without ray, without a running cluster, or when a node is refused.
    """

    def __init__(self, config: SandboxConfig = SandboxConfig(), actors: int = 0):  # noqa: B008 - frozen
        try:
            import ray
        except ImportError as error:
            raise FalconError("ray is not installed", "pip install 'falconlib[ray]'") from error
        if not ray.is_initialized():
            raise FalconError("no Ray cluster is connected", "call ray.init() first")
        self._ray = ray
        count = actors or sum(node["Alive"] for node in ray.nodes())
        options = {"scheduling_strategy": "SPREAD", "num_cpus": 1, "max_restarts": -1, "max_task_retries": RETRIES}
        self._actors = [ray.remote(_Node).options(**options).remote(config) for _ in range(count)]
        try:
            told = ray.get([actor.about.remote() for actor in self._actors], timeout=STARTING)
        except ray.exceptions.RayError as error:
            self.close()
            raise FalconError(f"a node has no sandbox: {error}", "falconlib doctor, on that node") from error
        weakest = min(told, key=lambda about: sum(layer["verified"] for layer in about["layers"].values()))
        self.layers, self.tier, self.layers_id = weakest["layers"], weakest["tier"], weakest["layers_id"]

    def __enter__(self) -> RaySandbox:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors and with them their processes. Safe to call twice."""
        while self._actors:
            self._ray.kill(self._actors.pop())

    def run(self, program: Program) -> Report:
        """The Report of one program."""
        return self.run_many([program])[0]

    def run_many(self, programs: Sequence[Program], progress: bool = False) -> list[Report]:
        """One Report per program, in their order; identical programs run once. A node that is lost is an infra_error."""
        if not self._actors:
            raise FalconError("the sandbox is closed", "use `with RaySandbox(...) as sandbox:` where it is needed")
        from tqdm.auto import tqdm

        unique = longest_last(programs)
        size = -(-len(unique) // (PARTS * len(self._actors))) or 1
        waiting = [unique[i : i + size] for i in range(0, len(unique), size)]
        idle, results = list(self._actors), dict[Program, Report]()
        busy: dict = {}  # reference: (actor, programs)
        with tqdm(total=len(unique), desc="sandbox", disable=not progress, leave=False) as bar:
            while waiting or busy:
                while waiting and idle:
                    actor, part = idle.pop(), waiting.pop(0)
                    busy[actor.run.remote([to_dict(p) for p in part])] = actor, part
                for done in self._ray.wait(list(busy))[0]:
                    actor, part = busy.pop(done)
                    idle.append(actor)
                    results.update(zip(part, self._fetch(done, len(part)), strict=True))
                    bar.update(len(part))
        return [results[p] for p in programs]

    def _fetch(self, done, count: int) -> list[Report]:
        try:
            return [from_dict(Report, row) for row in self._ray.get(done)]
        except self._ray.exceptions.RayError as error:
            return [verdict.infra(f"the node was lost: {type(error).__name__}", self.layers_id)] * count
