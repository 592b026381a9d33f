"""A simulated exchange on the loopback interface, for the demo, the tests and the benchmarks.

It answers like the real one, enforces the published weights, and fails as a script tells it to. No job uses it.
"""

from hlcli.sim.faults import Fault
from hlcli.sim.served import Served
from hlcli.sim.server import Simulator

__all__ = ["Fault", "Served", "Simulator"]
