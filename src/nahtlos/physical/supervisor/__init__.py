"""One small process per host that outlives everything else on it: it starts daemons, reaps them, and
holds the descriptors (listening sockets, taps) that must not die with the agent or a daemon.

`protocol` is what client and process say to each other; `server` answers; `units` and `descriptors` hold
the state; `journal` is what survives the supervisor itself; `client` is `physical.ports.Supervisor`.
"""
