"""The operator's command line: `nahtlos host|release|server|upgrade|operator|promise|status|doctor`,
for volumes `volume|snapshot|image|backup`,
and, for the virtual network, `network|subnet|port|security-group|router|floating-ip|load-balancer`.

Thin over `ops.client`: it asks, waits and shows. `entry.cli` composes it with the commands for labs.

    exit code 0  done                                2  refused: the request must be changed
              1  a promise broken, or it failed      3  unavailable: try later      4  stale: look again
"""
